"""Secrets are found by name and by look; everyday words of this program are not."""

import pytest

from mmtrain.track.secrets import REDACTED, is_secret_name, redact

CANARY = "canary" + "0123456789abcdef" * 2


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "hf_token", "apiKey", "db.password", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"]
)
def test_secret_names(name):
    assert is_secret_name(name)
    assert redact({name: CANARY}) == {name: REDACTED}


@pytest.mark.parametrize(
    "name", ["tokens", "text_tokenizer", "max_text_tokens", "tokens_per_second", "keys", "author", "keep_checkpoints"]
)
def test_everyday_names_are_kept(name):
    assert redact({name: "value"}) == {name: "value"}


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "a1B2" * 8,
        "sk-" + "x" * 40,
        "ghp_" + "Z9" * 18,
        "AKIA" + "A" * 16,
        "https://user:hunter2hunter2@host/x",
        "mmtrain train --token=" + CANARY,
        "WANDB_API_KEY=" + CANARY,
        '{"api_key": "' + CANARY + '"}',
        "curl -H 'Authorization: Bearer " + CANARY + "'",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_values_that_look_like_secrets_go(text):
    cleaned = redact({"notes": [text]})["notes"][0]
    assert REDACTED in cleaned
    assert not any(secret in cleaned for secret in (CANARY, "hunter2", "a1B2a1B2", "xxxx", "Z9Z9", "AAAA", "abc\n"))


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "commit 0f3c9a1d2b4e5f60718293a4b5c6d7e8f9012345",
        "tokens = 512",
        "https://example.org/a@b",
        "name=shapes",
    ],
)
def test_everyday_values_are_kept(text):
    assert redact(text) == text


def test_values_of_the_environment_go_wherever_they_appear(monkeypatch):
    monkeypatch.setenv("MY_PRIVATE_KEY", CANARY)
    assert redact({"a": [f"x{CANARY}y"], "n": 3, "none": None}) == {"a": [f"x{REDACTED}y"], "n": 3, "none": None}
