"""`mmtrain flops`: training compute of published models, of a configuration, and of a run."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mmtrain.config import Config, UserError
from mmtrain.config.compose import compose
from mmtrain.config.suggest import did_you_mean, nearest

if TYPE_CHECKING:
    from mmtrain.tokens import Vocabulary


WIDTH_OF_FILES = 140


def main(argv: list[str]) -> int:
    """ls | show NAME | count [settings] | run=FOLDER; see `mmtrain flops --help`."""
    word, *rest = argv or ["ls"]
    if word == "ls" and not rest:
        return _list()
    if word == "show" and len(rest) == 1:
        return _show(rest[0])
    if word == "count":
        return _count(compose(rest))
    if word.startswith("run=") and not rest:
        return _run(Path(word.partition("=")[2]))
    raise UserError(f"`mmtrain flops {' '.join(argv)}` means nothing; see `mmtrain flops --help`")


def _list() -> int:
    """One line per published model, by rising training compute; those without a checked figure last."""
    from mmtrain.flops import load_registry

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("id", "model", "family", "training FLOPs", "remark", "best FID"):
        table.add_column(heading, no_wrap=heading in ("id", "training FLOPs", "best FID"))
    known = [(baseline, baseline.training_compute) for baseline in load_registry()]
    for baseline, compute in sorted(known, key=lambda pair: float(pair[1][0].value or 0) if pair[1] else math.inf):
        fid = baseline.best_fid
        table.add_row(
            baseline.id,
            baseline.name,
            baseline.family.replace("_", " "),
            f"{float(compute[0].value or 0):.2e}" if compute else "no checked figure",
            compute[1] if compute else "",
            f"{float(fid.value or 0):.2f}" if fid else "",
        )
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES  # a pipe has no width; rich would assume 80 columns
    console.print(table)
    console.print("\n1 multiply-add = 2 FLOPs. FID: zero-shot COCO 30k, lowest of each paper; settings differ.")
    console.print("`mmtrain flops show ID` prints every number of a model with its source.")
    return 0


def _show(name: str) -> int:
    """Every number of one published model with its provenance."""
    from mmtrain.flops import load_registry

    baselines = {baseline.id: baseline for baseline in load_registry()}
    if name not in baselines:
        close = nearest(name, baselines)
        raise UserError(
            f"{name} is not a published model that mmtrain knows; "
            + (did_you_mean(close) if close else "`mmtrain flops ls` lists them")
        )
    baseline = baselines[name]
    print(f"{baseline.name}  ({baseline.family.replace('_', ' ')}, {baseline.modality})")
    for quantity in (*baseline.quantities.values(), *baseline.fids):
        value = f"{quantity.value:,}" if isinstance(quantity.value, int) else str(quantity.value)
        print(f"\n{quantity.path} = {value} {quantity.unit}".rstrip())
        print(f"    {quantity.kind}, checked: {quantity.verified}; {quantity.source}")
        for label, text in (("formula", quantity.formula), ("note", quantity.note)):
            if text:
                print(f"    {label}: {text}")
    return 0


def _count(config: Config) -> int:
    """Parameters and training FLOPs of a configuration, for sequences that are full of one document."""
    from mmtrain.flops import matmul_parameters, step_flops
    from mmtrain.models.registry import count_parameters

    model, length = config.model, config.stream.sequence_length
    vocabulary = vocabulary_of(config)
    is_dense = model.attention not in ("flex", "varlen")
    step = step_flops(model, vocabulary.size, [length], 1, length, dense_attention=is_dense)
    parameters = count_parameters(model, vocabulary.size, model.max_positions or length)
    matmul = matmul_parameters(model, vocabulary.size)
    tokens = config.stream.global_batch * length * config.train.steps
    print(f"{model.family}: {model.layers} layers of width {model.width}, {length} tokens, {vocabulary.size:,} ids")
    print(f"  {'parameters':<44}{parameters:,}")
    print(f"  {'of which in matrix products':<44}{matmul:,}")
    print("training FLOPs per token, forward and backward, one document per sequence")
    recomputation = ", recomputation" if model.activation_checkpointing else ""
    rows = (
        ("model, causal", step.model_causal),
        ("model, PaLM (full attention)", step.model_palm),
        ("6 N", 6 * matmul * length),
        (f"hardware ({'dense' if is_dense else 'causal'} scores{recomputation})", step.hardware),
    )
    for label, flops in rows:
        print(f"  {label:<44}{flops / length:.4g}")
    print(f"whole run: {config.train.steps:,} steps of {config.stream.global_batch} sequences = {tokens:,} tokens")
    print(f"  {'model, causal (packed documents: less)':<44}{step.model_causal / length * tokens:.4g}")
    return 0


def vocabulary_of(config: Config) -> "Vocabulary":
    """The vocabulary that `config` leads to, when both tokenizers are trained to their full size."""
    from mmtrain.tokens.vocabulary import Vocabulary

    pictures = config.image_tokenizer
    codes = math.prod(pictures.levels) if pictures.quantizer == "fsq" else pictures.codebook_size
    return Vocabulary(config.text_tokenizer.vocab_size, codes, config.objective.num_sentinels)


def _run(folder: Path) -> int:
    """The ledger of a run: FLOPs by book, share, totals and conventions."""
    from mmtrain.flops import BOOKS, Ledger

    path = folder / "ledger.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give run=FOLDER of a run that has trained, such as run=runs/quickstart"
        )
    ledger = Ledger.read(path)
    spent = ledger.spent_total or 1
    for kind in BOOKS:
        if ledger[kind]:
            print(f"{kind:<26}{ledger[kind]:>12.4g}  {100 * ledger[kind] / spent:5.1f} %")
    print(f"{'training (sum of train_*)':<26}{ledger.training_total:>12.4g}")
    print(f"{'everything spent':<26}{ledger.spent_total:>12.4g}")
    for name, meaning in json.loads(path.read_text(encoding="utf-8"))["conventions"].items():
        print(f"  {name}: {meaning}")
    return 0
