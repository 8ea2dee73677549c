"""docs/reference/metrics.md as a table: every key that a run logs, and its name on W&B."""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "metrics.md"
ROW = re.compile(r"^\| `(?P<key>[^`]+)` \| (?:`(?P<name>[^`]+)`)? *\|[^|]*\| [^|]+ \|$", re.MULTILINE)


def table() -> dict[str, str | None]:
    """Name on W&B by key; words in capitals stand for any."""
    return {match["key"]: match["name"] for match in ROW.finditer(PAGE.read_text())}


def undescribed(keys: Iterable[str]) -> set[str]:
    """Keys of metrics.jsonl that the page does not have."""
    patterns = [re.compile(re.sub(r"[A-Z]{3,}", "[^/]+", re.escape(key))) for key in table()]
    return {key for key in keys if not any(pattern.fullmatch(key) for pattern in patterns)}
