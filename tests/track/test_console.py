"""The console: plain lines into a pipe, a live line on a terminal."""

import io

import pytest

from mmtrain.track.console import Console, closing_box, duration, human

ROW = {
    "loss": 1.23456,
    "loss_text": 2.0,
    "loss_image": 0.5,
    "tokens_per_second": 9012.3,
    "mfu_causal": 0.4321,
    "lr": None,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_plain_line_per_row_without_a_terminal():
    out = io.StringIO()
    console = Console(100, stream=out)
    console.row(10, ROW)
    console.message("[bold]saved[/bold] " + "x" * 300)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 10/100  loss 1.2346  text 2.000  image 0.500  9.01k tok/s  MFU 43.2%  ETA ")
    assert lines[1] == "[bold]saved[/bold] " + "x" * 300  # not wrapped, not read as markup
    assert "\x1b" not in out.getvalue() and len(lines) == 2


def test_missing_numbers_are_left_out():
    out = io.StringIO()
    Console(10, stream=out).row(10, {"loss": None, "val_loss": 2.0})
    assert out.getvalue() == "step 10/10  val 2.0000\n"


def test_live_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    console = Console(100, resumed_step=40, stream=out)
    console.row(50, ROW)
    console.close()
    console.close()
    assert "50/100" in out.getvalue() and "9.01k tok/s" in out.getvalue()


def test_closing_box_shows_paths_whole_and_verbatim():
    out = io.StringIO()
    closing_box("Done", {"report": "runs/[x]/report.html", "steps": 5}, out)
    assert "runs/[x]/report.html" in out.getvalue() and "Done" in out.getvalue()


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1234567, "1.23M"), (999999, "1M"), (2.4e12, "2.4T")]
)
def test_human_numbers(number, text):
    assert human(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (65, "1m05s"), (3725, "1h02m"), (90000, "1d01h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
