from pathlib import Path

from mmtrain.config.reference import reference
from mmtrain.config.suggest import known_keys

COMMITTED = Path(__file__).parents[2] / "docs" / "reference" / "config.md"


def test_the_committed_reference_is_current() -> None:
    assert COMMITTED.read_text() == reference(), "python -m mmtrain.config.reference > docs/reference/config.md"


def test_the_reference_has_every_key() -> None:
    missing = [key for key in known_keys() if f"| `{key}` |" not in reference()]
    assert not missing
