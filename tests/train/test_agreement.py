"""What must be the same on all ranks; that a run is refused otherwise is in tests/faults."""

from pathlib import Path

from mmtrain.train.agreement import code_fingerprint, identity


def test_the_program_is_told_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    before = code_fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not part of the program")
    assert code_fingerprint(tmp_path) == before
    (tmp_path / "a.py").write_text("onet")
    (tmp_path / "b.py").write_text("wo")
    moved = code_fingerprint(tmp_path)
    assert moved != before
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert code_fingerprint(tmp_path) not in (before, moved)


def test_a_configuration_is_told_by_every_byte(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    before = identity(tmp_path)
    assert identity(tmp_path) == before
    (tmp_path / "config.yaml").write_text("seed: 2\n")
    after = identity(tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["a config.yaml of fingerprint"]
