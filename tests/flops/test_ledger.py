"""The ledger: exact, only growing, surviving resume and crash."""

import json

import numpy as np
import pytest

from mmtrain.config import UserError
from mmtrain.flops.count import split_by_kind
from mmtrain.flops.ledger import BOOKS, Ledger

STEP = {"text": 3, "image": 5, "retrieved": 2, "special": 1}


def trained(steps: int) -> Ledger:
    ledger = Ledger()
    for _ in range(steps):
        ledger.book_training(split_by_kind(1001, STEP))
    return ledger


def test_training_total_is_the_exact_sum_of_steps():
    assert trained(7).training_total == 7007


def test_numpy_integers_are_fine_floats_are_not():
    ledger = Ledger()
    ledger.book("evaluation", np.int64(5))
    assert type(ledger["evaluation"]) is int
    with pytest.raises(TypeError):
        ledger.book("evaluation", 5.0)


@pytest.mark.parametrize(("kind", "flops"), [("training", 1), ("sampling", -1)])
def test_unknown_books_and_negative_amounts_are_refused(kind, flops):
    with pytest.raises(ValueError):
        Ledger().book(kind, flops)


def test_file_and_state_round_trip_beyond_64_bits(tmp_path):
    ledger = trained(2)
    ledger.book("retrieval_encode", 10**24 + 1)
    ledger.save(tmp_path / "ledger.json")
    again = Ledger.read(tmp_path / "ledger.json")
    assert again.state() == ledger.state() and again["retrieval_encode"] == 10**24 + 1
    content = json.loads((tmp_path / "ledger.json").read_text())
    assert set(content["flops"]) == set(BOOKS) and content["spent_total"] == 10**24 + 1 + 2002
    assert "multiply-add" in content["conventions"]["flop"]


def test_steps_lost_in_crashes_are_spent_but_no_progress(tmp_path):
    path, checkpoint = tmp_path / "ledger.json", trained(10).state()
    trained(13).save(path)  # the run died at step 13
    resumed = Ledger()
    resumed.load(checkpoint)
    assert resumed.recover(path) == 3 * 1001
    assert (resumed.training_total, resumed.spent_total) == (10010, 13013)
    resumed.book_training(split_by_kind(1001, STEP))
    resumed.save(path)  # and again at step 11, from the same checkpoint
    third = Ledger()
    third.load(checkpoint)
    third.recover(path)
    assert (third.training_total, third.spent_total) == (10010, 14014)


def test_resume_without_loss_repeats_nothing(tmp_path):
    ledger = trained(5)
    ledger.save(tmp_path / "ledger.json")
    assert ledger.recover(tmp_path / "ledger.json") == 0 == ledger.recover(tmp_path / "absent.json")


DAMAGED = ("", "{", "[]", '{"format_version": 1}', '{"format_version": 9, "flops": {}}')


@pytest.mark.parametrize("text", [*DAMAGED, '{"format_version": 1, "flops": {"train_text": 1.5}}'])
def test_damaged_files_are_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(UserError):
        Ledger.read(path)
