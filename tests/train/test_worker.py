from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtrain.config import Config, CorpusConfig, StreamConfig
from mmtrain.shards import write_tokens
from mmtrain.train.run import Artifacts
from mmtrain.train.worker import ending, open_stream
from tests.stream.conftest import VOCABULARY, token_document


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    """Token shards of two sources: 60 training and 30 held-out documents each."""
    for name in ("a", "b"):
        for split, numbers in (("train", range(60)), ("validation", range(60, 90))):
            documents = (token_document(number, name, 4, 16) for number in numbers)
            write_tokens(tmp_path / name / split, documents, VOCABULARY, "t" * 12, "i" * 12)
    return Artifacts({}, tmp_path, tmp_path, {name: tmp_path / name for name in ("a", "b")}, {})


def test_training_follows_the_shares_and_validation_holds_every_source_once(artifacts: Artifacts) -> None:
    config = Config(
        mix={"a": 1, "b": {"0": 0, "8": 2}},
        corpora={name: CorpusConfig(name=name) for name in ("a", "b")},
        stream=StreamConfig(sequence_length=96, global_batch=4, lanes=4),
    )
    train, held_out = (open_stream(config, artifacts, VOCABULARY, split) for split in ("train", "validation"))
    assert [dict(source.schedule) for source in train.sources] == [{0: 1.0}, {0: 0.0, 8: 2.0}]
    assert [dict(source.schedule) for source in held_out.sources] == [{0: 1.0}, {0: 2.0}]
    for step in range(3):
        held_out.batch(step)
        for lane in held_out.state()["lane_states"].values():
            assert len(lane["waiting"]) <= 5  # a row of four, and one
    assert held_out.counts.by_source[:, 0].min() > 0 and train.config.lookahead > 1


@pytest.mark.parametrize(
    ("code", "reason", "complaint", "expected"),
    [
        (0, "", "", ("Training finished", "one, step 3 of 9", "INFO")),
        (0, "SIGTERM", "", ("Training was stopped", "one, step 3 of 9: SIGTERM; the same command goes on", "WARN")),
        (2, "", "no room", ("Training failed", "one, step 3 of 9: no room", "ERROR")),
        (1, "", "", ("Training failed", "one, step 3 of 9: exit code 1", "ERROR")),
    ],
)
def test_how_the_end_is_told(code: int, reason: str, complaint: str, expected: tuple[str, str, str]) -> None:
    config = Config(name="one")
    config.train.steps = 9
    run: Any = SimpleNamespace(config=config, step=3, stopping=SimpleNamespace(reason=reason))
    assert ending(run, code, complaint) == expected
