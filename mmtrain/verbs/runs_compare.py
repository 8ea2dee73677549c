"""`mmtrain runs compare`: one page of several runs, the settings that differ first, then their curves overlaid."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.config import UserError, write_text_atomic
from mmtrain.track import closing_box, read_metrics
from mmtrain.track.curves import overlay, run_colors
from mmtrain.track.metrics import Row
from mmtrain.track.page import large, page, plot, scientific, table, text
from mmtrain.verbs.run_settings import Settings, differing, read_settings
from mmtrain.verbs.run_state import CONFIG, METRICS, SWEEP, RunState, find_run, list_runs, read_run
from mmtrain.verbs.runs import number

PAGE = "compare.html"
MODALITIES = {"": "all tokens", "_text": "text", "_image": "image"}
AXES = {"tokens": "tokens", "flops_total": "training FLOPs (model FLOPs, causal)"}
# What makes losses of two runs different quantities.
OF_THE_LOSS = ("corpus", "corpora", "mix", "clean", "dedupe", "text_tokenizer", "image_tokenizer", "objective",
               "retrieval", "diffusion", "model.family", "stream.sequence_length")  # fmt: skip
STYLE = """
.legend { position: sticky; top: 0; background: var(--paper); padding: 8px 0; z-index: 1; font-size: 0.86rem;
  border-bottom: 1px solid var(--line); max-height: 30vh; overflow-y: auto; }
.legend span { margin-right: 16px; overflow-wrap: anywhere; display: inline-block; }
.swatch { display: inline-block; width: 0.85em; height: 0.85em; border-radius: 3px; margin-right: 6px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 18px; }
.panels figcaption { margin: 0 0 4px; color: var(--ink); font-weight: 600; }
th, th.number { white-space: normal; overflow-wrap: normal; vertical-align: bottom; }
td:first-child { min-width: 15em; } td { min-width: 4.5em; overflow-wrap: break-word; }
"""


@dataclass(frozen=True)
class Compared:
    """A run on the page."""

    state: RunState
    settings: Settings
    rows: list[Row]
    color: str


def compare(words: Sequence[str], root: Path, out: str | None) -> int:
    """Write the page; raises UserError unless there are two runs with numbers among those that are named."""
    folders = folders_of(words, root)
    names = _names(folders)
    rows = {folder: read_metrics(folder / METRICS) for folder in folders}
    left_out = [names[folder] for folder in folders if not rows[folder]]
    shown = [folder for folder in folders if rows[folder]]
    if len(shown) < 2:
        without = f" ({', '.join(left_out)} has logged nothing yet)" if left_out else ""
        raise UserError(
            f"there are {len(shown)} runs to compare{without}; give two or more, or the folder of a sweep, such as "
            "`mmtrain runs compare runs/lr_grid`"
        )
    runs = [
        Compared(read_run(folder, names[folder]), read_settings(folder), rows[folder], color)
        for folder, color in zip(shown, run_colors(len(shown)), strict=True)
    ]
    path = Path(out) if out else (_sweep_of(words, root) or shown[0].parent) / PAGE
    command = shlex.join(["mmtrain", "runs", "compare", *words])
    try:
        write_text_atomic(path, page(f"{len(runs)} runs compared", _body(runs, left_out, command), STYLE))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another out=FILE.html") from error
    places = {"runs": str(len(runs)), "settings that differ": str(len(differing([run.settings for run in runs])))}
    if left_out:
        places["without numbers"] = ", ".join(left_out)
    closing_box("compared", places | {"open": os.path.relpath(path)})
    return 0


def folders_of(words: Sequence[str], root: Path) -> list[Path]:
    """The run directories that the words name: runs, and sweeps or other folders of runs with all of theirs."""
    found: list[Path] = []
    for word in words:
        many = next((folder for folder in (Path(word), root / word) if _holds_runs(folder)), None)
        inside = [run.folder for run in list_runs(many) if (run.folder / CONFIG).is_file()] if many else []
        found += inside or [find_run(word, root)]
    return list({folder.resolve(): folder for folder in found}.values())


def _holds_runs(folder: Path) -> bool:
    is_run = (folder / CONFIG).is_file()
    return folder.is_dir() and not is_run and ((folder / SWEEP).is_file() or any(folder.glob(f"*/{CONFIG}")))


def _sweep_of(words: Sequence[str], root: Path) -> Path | None:
    """The folder that holds all runs, where one was named."""
    return next((f for f in (Path(words[0]), root / words[0]) if _holds_runs(f)), None) if len(words) == 1 else None


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Paths below the folder that holds all of them."""
    above = os.path.commonpath([folder.resolve().parent for folder in folders]) if folders else "."
    return {folder: os.path.relpath(folder.resolve(), above) for folder in folders}


def _body(runs: Sequence[Compared], left_out: Sequence[str], command: str) -> str:
    keys = differing([run.settings for run in runs])
    parts = [f"<header><h1>{len(runs)} runs compared</h1></header>"]
    parts.append(f"<h2>Settings that differ</h2>{_settings(runs, keys)}")
    parts.append(f"<h2>Where they stand</h2>{_results(runs)}{_caution(keys)}")
    if left_out:
        parts.append(f'<p class="soft">Without numbers, and so not here: {text(", ".join(left_out), 2000)}</p>')
    parts.append("<h2>Curves</h2>")
    parts.append(f'<div class="legend">{"".join(f"<span>{_name(run)}</span>" for run in runs)}</div>')
    for x_key, label in AXES.items():
        panels = _panels(runs, x_key, label)
        parts.append(f'<h3>Over {label}</h3><div class="panels">{panels}</div>' if panels else "")
    parts.append(f"<h2>How</h2><pre>{text(command, 4000)}</pre>")
    return "\n".join(parts)


def _name(run: Compared) -> str:
    return f'<i class="swatch" style="background:{run.color}"></i>{text(run.state.name, 200)}'


def _settings(runs: Sequence[Compared], keys: Sequence[str]) -> str:
    """Runs by settings, or settings by runs: whichever has fewer columns."""
    same = len({key for run in runs for key in run.settings}) - len(keys)
    note = f'<p class="soft">{same} other settings are the same in all of them.</p>'
    if not keys:
        return f"<p>None: they are the same run, at different times or places.</p>{note}"

    def cell(run: Compared, key: str) -> str:
        return text(run.settings[key], 200) if key in run.settings else '<span class="soft">not there</span>'

    if len(keys) <= len(runs):
        rows = [[_name(run), *(cell(run, key) for key in keys)] for run in runs]
        return table(("run", *(text(key, 120) for key in keys)), rows) + note
    rows = [[text(key, 120), *(cell(run, key) for run in runs)] for key in keys]
    return table(("setting", *map(_name, runs)), rows) + note


def _results(runs: Sequence[Compared]) -> str:
    """One line per run; the lowest validation losses stand out."""
    losses = [f"val_loss{kind}" for kind in MODALITIES] + ["loss"]
    best = {key: min(run.state.numbers.get(key, float("inf")) for run in runs) for key in losses[:-1]}
    rows = []
    for run in runs:
        state = run.state
        cells = [_name(run), text(state.state), f"{state.step:,}" + (f" of {state.steps:,}" if state.steps else "")]
        cells += [number(state, "tokens", large), number(state, "flops_total", scientific)]
        for key in losses:
            shown = number(state, key, "{:.4f}".format)
            cells.append(f"<b>{shown}</b>" if shown and state.numbers[key] == best.get(key) else shown)
        cells.append(number(state, "mfu_causal", "{:.1%}".format))
        rows.append(cells)
    names = [f"validation loss, {label}" for label in MODALITIES.values()]
    header = ("run", "state", "step", "tokens", "training FLOPs", *names, "training loss", "MFU, causal")
    return table(header, rows, ("", "", *["number"] * (len(header) - 2)))


def _caution(keys: Sequence[str]) -> str:
    """Which of the differing settings make the losses different quantities."""
    found = [key for key in keys if any(key == part or key.startswith(f"{part}.") for part in OF_THE_LOSS)]
    if not found:
        return ""
    named = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return f"<p>With care: losses are per token of what each run learns from, and this differs: {text(named)}.</p>"


def _panels(runs: Sequence[Compared], x_key: str, label: str) -> str:
    """A picture for each loss that any of the runs has."""
    figures = []
    for prefix, kind in (("val_", "validation"), ("", "training")):
        for suffix, modality in MODALITIES.items():
            picture = overlay([run.rows for run in runs], f"{prefix}loss{suffix}", x_key, label)
            if picture is not None:
                title = f"{kind} loss, {modality}"
                shown = plot(picture, f"{title}, over {label}")
                figures.append(f"<figure><figcaption>{title}</figcaption>{shown}</figure>")
    return "".join(figures)
