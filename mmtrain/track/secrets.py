"""Secrets out of everything that is written or sent: by the name of a key, and by the look of a value."""

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

# Words of a key that make its value a secret. "tokens" and "tokenizer" are everyday words here, so only the
# singular counts, and only for texts (a token count named "max_token" is a number).
SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
SECRET_WORDS |= {"token", "authorization", "cookie", "netrc", "bearer"}
SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("signing", "key"), ("auth", "key")}

SECRET_VALUES = re.compile(
    r"""
    (?<![A-Za-z0-9])(?:
        sk-[A-Za-z0-9_-]{20,} | hf_[A-Za-z0-9]{20,} | wandb_v\d+_[A-Za-z0-9_]{20,}
        | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,} | glpat-[A-Za-z0-9_-]{20,}
        | xox[abprs]-[A-Za-z0-9-]{10,} | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[A-Za-z0-9_-]{30,}
        | eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+
        | pypi-[A-Za-z0-9_-]{30,}
    )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
URL_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]+@")
ASSIGNMENTS = re.compile(
    r"(?P<name>[A-Za-z0-9_.-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key|token|bearer)[\"']?)"
    r"(?P<sign>\s*[=:]\s*|\s+(?=\S{16}))(?P<quote>[\"']?)(?P<value>[^\s\"',;&]+)",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether a key of this name holds a secret: "HF_TOKEN", "apiKey", "db.password"; not "max_text_tokens"."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    return bool(SECRET_WORDS & set(words)) or any(pair in SECRET_PAIRS for pair in zip(words, words[1:], strict=False))


def secrets_of_environment() -> list[str]:
    """Values of environment variables with a secret's name, the longest first."""
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= 8}
    return sorted(values, key=len, reverse=True)


def redact_text(text: str) -> str:
    """`text` with secrets replaced: known formats, URL credentials, NAME=VALUE, values of the environment."""
    for secret in secrets_of_environment():
        text = text.replace(secret, REDACTED)
    text = SECRET_VALUES.sub(REDACTED, text)
    text = URL_CREDENTIALS.sub(rf"\g<scheme>{REDACTED}@", text)
    return ASSIGNMENTS.sub(_assignment, text)


def _assignment(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"]):
        return match[0]
    return f"{match['name']}{match['sign']}{match['quote']}{REDACTED}"


def redact(value: Any) -> Any:
    """A copy of plain data (dicts, lists, texts, numbers) without secrets. Keys stay; numbers stay."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {
            redact_text(key) if isinstance(key, str) else key: REDACTED
            if isinstance(key, str) and isinstance(item, (str, bytes)) and item and is_secret_name(key)
            else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value
