"""`mmtrain plan`: what a run would need and take on a cluster, by ZeRO stage and number of nodes."""

import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mmtrain.config import UserError
from mmtrain.config.compose import compose
from mmtrain.verbs.flops import WIDTH_OF_FILES
from mmtrain.verbs.flops_count import vocabulary_of

if TYPE_CHECKING:
    from mmtrain.train.plan import Candidate, Plan

MEMORY_COLUMNS = ("parameters", "gradients", "masters_and_moments", "activations", "logits", "buffers")


def main(argv: list[str]) -> int:
    """Print the plan of a configuration (as JSON with --json); raises UserError, after printing, where nothing fits."""
    config = compose([word for word in argv if word != "--json"])

    from mmtrain.train.plan import describe, make_plan  # torch: only once the settings are sound

    plan = make_plan(config, vocabulary_of(config).size)
    best = plan.recommended()
    if "--json" in argv:
        print(json.dumps(describe(plan), indent=1))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = WIDTH_OF_FILES
        report(plan, best, console)
    if best is None:
        raise UserError(plan.no_fit())
    return 0


def report(plan: "Plan", best: "Candidate | None", console: Console) -> None:
    """All of a plan, for reading."""
    from mmtrain.train.plan import in_words, why

    say = console.out
    _model(plan, say)
    shown = best or plan.candidates[-1]
    say(f"\nGiB per GPU at {in_words(shown.nodes)} = {shown.ranks} GPUs of {plan.device.memory_gib:g} GiB")
    console.print(_memory_table([c for c in plan.candidates if c.nodes == shown.nodes], best))
    say(
        "\na step and the whole run; two numbers: communication hidden as far as it can be, and not hidden at all\n"
        "sent: GB per GPU and step, gradients + parameters"
    )
    console.print(_table(plan, best))
    if best:
        say(f"\nrecommended: {why(plan, best)}.")
    _checkpoint(plan, shown, say)
    _assumptions(plan, say)


def _model(plan: "Plan", say) -> None:
    """Parameters, FLOPs and the budget."""
    config, model = plan.config, plan.config.model
    total = sum(plan.parameters.values())
    say(
        f"{model.family}: {model.layers} layers of width {model.width}, rows of {config.stream.sequence_length:,} "
        f"tokens, {plan.vocabulary_size:,} ids"
    )
    parts = ", ".join(f"{name} {number:,}" for name, number in plan.parameters.items())
    say(f"parameters  {total:,}: {parts}")
    names = {"model_causal": "causal", "model_palm": "PaLM, full attention", "hardware": "hardware, as computed"}
    each = plan.flops_per_token.items()
    say("FLOPs per token  " + "; ".join(f"{names[name]} {flops:.4g}" for name, flops in each))
    say(
        f"budget  {plan.tokens:.4g} tokens = {plan.steps:,} steps of {plan.tokens_per_step:,}; "
        + "; ".join(f"{names[name]} {flops * plan.tokens:.3g} FLOPs" for name, flops in each)
    )


def _new_table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number == 0)
    return table


def _label(candidate: "Candidate") -> str:
    s = candidate.setup
    name = "DDP" if s.stage is None else f"ZeRO {s.stage}"
    name += ", optimizer" if s.offload_optimizer else ""
    return name + (" and parameters" if s.offload_parameters else "") + (" on the host" if candidate.offloads else "")


def _memory_table(candidates: "list[Candidate]", best: "Candidate | None") -> Table:
    """One row per stage: what takes the memory, the total, and the host's share per node."""
    table = _new_table("", "rows", *(name.replace("_", " ") for name in MEMORY_COLUMNS), "total", "", "host, per node")
    for c in candidates:
        parts = [f"{getattr(c.memory, name) / 2**30:.1f}" for name in MEMORY_COLUMNS]
        host = c.memory.host_total * c.ranks / c.nodes / 2**30
        fits = "fits" if c.fits else "does not fit"
        label = f"{'*' if c is best else ' '} {_label(c)}"
        table.add_row(label, str(c.micro_batch), *parts, f"{c.memory.device_total / 2**30:.1f}", fits, f"{host:.0f}")
    return table


def _table(plan: "Plan", best: "Candidate | None") -> Table:
    """One row per candidate: time, communication and cost."""
    price = plan.config.plan.price_per_gpu_hour
    headings = ("", "GPUs", "rows", "GiB", "sent", "compute s", "communicate s", "tokens/s", "days", "GPU hours")
    table = _new_table(*headings, *(["cost"] if price else []))
    for c in plan.candidates:
        label = f"{'*' if c is best else ' '} {_label(c)}"
        memory = f"{c.memory.device_total / 2**30:.1f}"
        if not c.fits:
            table.add_row(label, str(c.ranks), str(c.micro_batch), memory, "", "", "", "does not fit")
            continue
        both = (c.overlapped_seconds, c.serial_seconds)
        rates = [plan.tokens_per_step / seconds for seconds in both]
        days = [plan.days(seconds) for seconds in both]
        table.add_row(
            label,
            str(c.ranks),
            str(c.micro_batch),
            memory,
            f"{c.traffic.gradients / 1e9:.1f} + {c.traffic.parameters / 1e9:.1f}",
            f"{c.compute_seconds:.3g}",
            f"{c.communication_seconds:.3g}",
            f"{rates[0]:,.0f} - {rates[1]:,.0f}",
            f"{_number(days[0])} - {_number(days[1])}",
            f"{plan.gpu_hours(c):,.0f}",
            *([f"{plan.gpu_hours(c) * price:,.0f}"] if price else []),
        )
    return table


def _number(value: float) -> str:
    """Three digits, and no exponent of what is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _checkpoint(plan: "Plan", shown: "Candidate", say) -> None:
    """Size and time of checkpoints."""
    train, size, seconds = plan.config.train, plan.checkpoint_bytes, plan.checkpoint_seconds(shown.nodes)
    every, each = train.checkpoint_every * shown.serial_seconds, size / shown.ranks
    say(
        f"checkpoint  {size / 1e9:,.1f} GB in {shown.ranks} files of {each / 1e9:.2g} GB: {seconds:.3g} s, "
        f"every {train.checkpoint_every:,} steps = {_number(every / 60)} min "
        + ("behind training" if train.async_checkpoint else f"and {seconds / (every + seconds):.2%} of the time")
        + f"; {train.keep_checkpoints} kept = {train.keep_checkpoints * size / 1e9:,.0f} GB"
    )


def _assumptions(plan: "Plan", say) -> None:
    p = plan.config.plan
    source = f"measured by {p.run}" if p.run else "assumed (plan.mfu)"
    dense = plan.config.model.attention not in ("flex", "varlen")
    say(
        f"\nassumed\n"
        f"  MFU {plan.mfu:.1%}, {source}, of {plan.device.peak / 1e12:,.0f} TFLOP/s ({plan.device.name}, dense bf16),"
        " by PaLM's convention: 6 N + full attention over the row, recomputation not counted\n"
        f"  every row full of one document; hardware FLOPs with {'a dense mask' if dense else 'causal kernels'}\n"
        f"  rings over {p.intra_node_gbps:,.0f} Gbit/s per GPU within a node and {p.inter_node_gbps:,.0f} Gbit/s per "
        "node between them, no latency; bytes as DeepSpeed sends them\n"
        f"  fits = at most 90 % of a GPU's memory; rows = engine.micro_batch"
        + ("" if plan.config.engine.micro_batch else ", the largest that fits")
        + "\n  updates and copies of what is on the host take no time, evaluation and failures neither\n"
        f"  the file system takes {p.storage_gbps:,.0f} Gbit/s"
    )
