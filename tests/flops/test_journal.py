"""The append-only journal of the ledger: resume, crash, roll-back, two writers, a line cut by a kill."""

import json

import pytest

from mmtrain.config import UserError
from mmtrain.flops import Journal, Ledger, read_account
from mmtrain.flops.journal import replay
from mmtrain.flops.lineage import lineage_total, write_compute

ARTIFACTS = {"shapes/tokens-1": {"image_tokenizer_encode": 50}, "tok/vq-1": {"image_tokenizer_train": 7}}
STEP = {"text": 60, "image": 30, "retrieved": 0, "special": 10}


class Training:
    """A run of 100 FLOPs a step that logs every second step."""

    def __init__(self, folder, step=0, checkpoint=None):
        self.folder, self.step, self.ledger = folder, step, Ledger()
        if checkpoint:
            self.ledger.load(checkpoint)
        self.journal = Journal(folder)
        self.lost = self.journal.start(self.ledger, step, ARTIFACTS)

    def go(self, steps):
        for _ in range(steps):
            self.step += 1
            self.ledger.book_training(STEP)
            if self.step % 2 == 0:
                self.journal.write(self.ledger, self.step)
        return self.ledger.state()


def test_lost_steps_are_spent_but_no_progress_and_artifacts_are_booked_once(tmp_path):
    checkpoint = Training(tmp_path).go(4)
    dead = Training(tmp_path, 4, checkpoint)
    dead.go(6)
    again = Training(tmp_path, 4, checkpoint)
    assert again.lost == 600
    again.go(8)
    account = read_account(tmp_path)
    assert (account.ledger.training_total, account.ledger["repeated"]) == (1200, 600)
    assert account.ledger.spent_total == 1800 + 57 and account.artifacts == ARTIFACTS
    assert [(s.first_step, s.last_step, s.training, s.lost) for s in account.segments] == [
        (0, 4, 400, 0), (4, 10, 600, 600), (4, 12, 800, 0)]  # fmt: skip
    assert account.problems() == []
    assert sum(s.training for s in account.segments) == account.ledger.training_total + account.ledger["repeated"]
    assert Ledger.read(tmp_path / "ledger.json").state() == account.ledger.state() == again.ledger.state()


def test_the_file_is_only_appended_to(tmp_path):
    run, before = Training(tmp_path), b""
    for _ in range(3):
        run.go(2)
        now = (tmp_path / "ledger.jsonl").read_bytes()
        assert now.startswith(before) and len(now) > len(before)
        before = now
    Training(tmp_path, 2, {"train_text": 120, "train_image": 60, "train_special": 20})
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(before)


def test_a_line_cut_by_a_kill_is_left_out_and_the_next_one_follows_whole(tmp_path):
    checkpoint = Training(tmp_path).go(4)
    path = tmp_path / "ledger.jsonl"
    Training(tmp_path, 4, checkpoint).go(2)
    path.write_bytes(path.read_bytes()[:-9])
    assert read_account(tmp_path).ledger.training_total == 400
    Training(tmp_path, 4, checkpoint).go(2)
    account = read_account(tmp_path)
    assert account.ledger.training_total == 600 and account.problems() == []


def test_what_a_command_books_during_training_is_kept(tmp_path):
    run = Training(tmp_path)
    run.go(2)
    Journal(tmp_path).book("evaluation", 9, "evaluate")
    run.go(2)
    account = read_account(tmp_path)
    assert run.ledger["evaluation"] == account.ledger["evaluation"] == 9 and account.ledger.training_total == 400
    assert Ledger.read(tmp_path / "ledger.json").state() == account.ledger.state()


def test_lines_that_a_power_cut_took_come_back_from_the_checkpoint(tmp_path):
    checkpoint = Training(tmp_path).go(6)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    Training(tmp_path, 6, checkpoint)
    account = read_account(tmp_path)
    assert account.ledger.training_total == 600 and account.problems() == []


def test_a_run_from_before_the_journal_goes_on(tmp_path):
    old = Ledger()
    old.load({"train_text": 500, "image_tokenizer_encode": 50, "evaluation": 3})
    old.save(tmp_path / "ledger.json")
    run = Training(tmp_path, 4, {"train_text": 400, "image_tokenizer_encode": 50})
    assert run.ledger["repeated"] == 100 and run.ledger["image_tokenizer_encode"] == 50
    run.go(2)
    assert read_account(tmp_path).ledger.spent_total == 400 + 100 + 50 + 3 + 200


def test_gaps_double_steps_and_damage_are_told(tmp_path):
    start = {"start": 0, "segment": 1}
    window = [{"steps": [a, b], "segment": 1, "books": {"train_text": 1}} for a, b in ((0, 4), (6, 8), (7, 9))]
    assert replay([start, *window]).problems() == ["steps 4 to 6 are not booked", "steps 7 to 8 are booked twice"]
    with pytest.raises(UserError, match="books"):
        replay([start, {"steps": [0, 1], "segment": 1, "books": {"train_text": -1}}])
    (tmp_path / "ledger.jsonl").write_text('{"start": 0, "segment": 1}\n{"steps": [0\n{"start": 0, "segment": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_account(tmp_path)


def test_a_base_model_is_shown_apart_and_its_unknown_compute_stays_unknown(tmp_path):
    folders = [tmp_path / name for name in ("base", "tuned", "stranger")]
    for folder in folders:
        folder.mkdir()
    Training(folders[0]).go(10)
    write_compute(folders[0], "base", read_account(folders[0]))
    facts = json.loads((folders[0] / "compute.json").read_text())
    for folder, base in zip(folders[1:], (facts, facts | {"with_base": None}), strict=True):
        ledger = Ledger()
        Journal(folder).start(ledger, 0, {}, base)
        ledger.book_training(STEP)
    journal = Journal(folders[1])
    journal.start(tuned := Ledger(), 0, {}, facts)
    tuned.book_training(STEP)
    journal.write(tuned, 1)
    account = read_account(folders[1])
    assert account.ledger.training_total == 100 and lineage_total(account) == 1100
    assert lineage_total(read_account(folders[2])) is None
