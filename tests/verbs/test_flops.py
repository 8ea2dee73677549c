"""`mmtrain flops`: runs beside published models, networks counted, base models shown apart."""

import re

import pytest

from mmtrain.cli import main
from mmtrain.flops import Ledger, load_registry, read_account
from mmtrain.flops.journal import Journal
from mmtrain.flops.lineage import lineage_total, read_compute, write_compute


def booked(folder, flops, base=None):
    """A run whose journal says that it spent `flops` on training."""
    folder.mkdir(parents=True)
    journal, ledger = Journal(folder), Ledger()
    journal.start(ledger, 0, {}, base)
    ledger.book_training({"text": flops})
    journal.write(ledger, 10)
    return folder


def test_compare_puts_runs_among_published_models_and_shows_no_number_from_memory(tmp_path, capsys):
    first, second = booked(tmp_path / "first", 2 * 10**20), booked(tmp_path / "second", 5 * 10**22)
    assert main(["flops", "compare", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = [float(found[0]) for line in lines if (found := re.findall(r"\b\d\.\d\de\+\d\d\b", line))]
    assert values == sorted(values)
    own = [next(line for line in lines if folder.name in line and "ledger" in line) for folder in (first, second)]
    assert "2.00e+20" in own[0] and re.search(r"\b250\b", own[1])  # as many times the first
    known = {baseline.name for baseline in load_registry(text_models=True) if baseline.training_compute}
    unknown = {baseline.name for baseline in load_registry(text_models=True)} - known
    shown = {name for name in known | unknown if any(line.startswith(f"{name}  ") for line in lines)}
    assert len(known) >= 30 and unknown and shown == known


def test_compare_without_a_run_is_refused(tmp_path, capsys):
    assert main(["flops", "compare", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_network_is_counted_with_what_is_frozen_apart(capsys):
    pytest.importorskip("diffusers")
    assert main(["flops", "count", "dit_s2"]) == 0
    out = capsys.readouterr().out
    numbers = {label: int(n.replace(",", "")) for label, n in re.findall(r"^  (\S.*?)\s{2,}([\d,]+)$", out, re.M)}
    forward = numbers["forward, FLOPs per image"]
    assert 10e9 < forward < 14e9  # the paper: 6.06 GMACs
    assert numbers["training step of the network (3 x forward)"] == 3 * forward
    encode = next(n for label, n in numbers.items() if label.startswith("VAE encode"))
    assert numbers["with one forward pass of what is frozen"] == 3 * forward + encode
    assert main(["flops", "count", "dit_s2", "resolution=100"]) == 2
    assert "multiple of 16" in capsys.readouterr().err


def test_what_a_model_descends_from_is_added_apart(tmp_path, capsys):
    """A run, its exported weights, a run from them, and one from those: 3 + 5 + 7."""
    base = None
    for name, flops, whole in (("first", 3, 3), ("second", 5, 8), ("third", 7, 15)):
        run = booked(tmp_path / name, flops, base)
        account = read_account(run)
        assert (account.ledger.training_total, lineage_total(account)) == (flops, whole)
        write_compute(run, name, account)
        base = {"weights": name, **read_compute(run)}
    assert main(["flops", f"run={run}"]) in (0, 1)
    out = capsys.readouterr().out
    assert re.search(r"base model, in no book here\s+5\s+second", out)
    assert re.search(r"training with all base models\s+15", out)
    (run / "compute.json").write_text('{"training": -1}')
    assert read_compute(run) is None  # unknown, not zero
