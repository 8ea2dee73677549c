"""What a run would need and take on a cluster, before there is one: memory, time, communication, checkpoints, cost.

Nothing is allocated and nothing is measured: closed forms over a configuration. What they rest on: flops/count.py,
train/memory.py, train/communication.py; what is assumed is said by `mmtrain plan`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmtrain.config import Config, UserError
from mmtrain.flops import StepFlops, find_device, memory_gib, step_flops
from mmtrain.flops.devices import DEVICES, MEMORY_GIB
from mmtrain.models import num_positions, shapes_only
from mmtrain.track.metrics import read_metrics
from mmtrain.train.communication import Traffic, traffic
from mmtrain.train.hosts import divides
from mmtrain.train.memory import USABLE, Memory, Setup, gib

MOST_NODES = 64
WORTH_ITS_GPUS = 1.1  # a faster way is recommended while it takes at most so many times the fewest GPU hours
NO_SLOWER = 1.01  # what is less than 1 % slower counts as no slower: a lower stage is simpler
SECONDS_PER_DAY = 86400
HEADER_BYTES = 120  # of a tensor in a safetensors file, about: name, type, shape, and offsets


@dataclass(frozen=True)
class Device:
    """A GPU: its name, dense bf16 FLOP/s, and GiB of memory."""

    name: str
    peak: float
    memory_gib: float

    @classmethod
    def of(cls, config: Config) -> "Device":
        """The GPU of `config.plan`; raises UserError for one that is not known."""
        name, given = config.plan.device, config.plan.memory_gib
        found = find_device(name)
        if found is None:
            raise UserError(
                f"plan.device={name} is not a GPU whose peak is known; give one of "
                f"{', '.join(device.name for device in DEVICES)}, with plan.memory_gib= where yours has another memory"
            )
        memory = given or memory_gib(name)
        if memory is None:
            raise UserError(
                f"the memory of plan.device={name} is not known (that of {', '.join(MEMORY_GIB)} is); give it as "
                "plan.memory_gib="
            )
        return cls(found.name, found.peak, memory)


@dataclass(frozen=True)
class Candidate:
    """A way to train, and what it comes to.

    setup: engine, micro-batch and number of ranks; memory: of one GPU; fits: in 90 % of its memory. Seconds are of an
    optimizer step: of computing at the MFU, and of communication alone.
    """

    nodes: int
    setup: Setup
    memory: Memory
    fits: bool
    traffic: Traffic
    compute_seconds: float
    communication_seconds: float

    @property
    def ranks(self) -> int:
        """GPUs."""
        return self.setup.ranks

    @property
    def offloads(self) -> bool:
        """Whether anything is kept in host memory."""
        return self.setup.offload_optimizer or self.setup.offload_parameters

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass."""
        return self.setup.config.engine.micro_batch

    @property
    def serial_seconds(self) -> float:
        """A step whose communication overlaps with nothing."""
        return self.compute_seconds + self.communication_seconds

    @property
    def overlapped_seconds(self) -> float:
        """A step whose communication is hidden as far as it can be."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def settings(self) -> str:
        """What sets this on the command line."""
        s = self.setup
        words = ["engine=ddp" if s.stage is None else f"engine=zero{s.stage}", f"engine.micro_batch={self.micro_batch}"]
        words += ["engine.offload_optimizer=true"] if s.offload_optimizer else []
        return " ".join(words + (["engine.offload_parameters=true"] if s.offload_parameters else []))


@dataclass(frozen=True)
class Plan:
    """All candidates and what is common to them.

    tokens: the data budget; flops_per_token: forward and backward, a row holding one document; steps: of the budget.
    """

    config: Config
    device: Device
    mfu: float
    vocabulary_size: int
    parameters: dict[str, int]
    flops_per_row: StepFlops
    tokens: float
    checkpoint_bytes: int
    candidates: list[Candidate]

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.config.stream.global_batch * self.config.stream.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps that the budget gives."""
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def flops_per_token(self) -> dict[str, float]:
        """By convention."""
        length, flops = self.config.stream.sequence_length, self.flops_per_row
        return {name: getattr(flops, name) / length for name in ("model_causal", "model_palm", "hardware")}

    def days(self, step_seconds: float) -> float:
        """Of the whole budget."""
        return self.steps * step_seconds / SECONDS_PER_DAY

    def gpu_hours(self, candidate: Candidate) -> float:
        """Of the whole budget, with no communication overlapped."""
        return 24 * candidate.ranks * self.days(candidate.serial_seconds)

    def checkpoint_seconds(self, nodes: int) -> float:
        """Of writing one: the file system takes plan.storage_gbps, and no node sends more than it can."""
        p = self.config.plan
        return self.checkpoint_bytes / (min(p.storage_gbps, nodes * p.inter_node_gbps) * 1e9 / 8)

    def recommended(self) -> Candidate | None:
        """The fastest that fits and is worth its GPUs, or a lower stage that is no slower; None where nothing fits.

        Without offload where anything fits without.
        """
        fitting = [c for c in self.candidates if c.fits]
        fitting = [c for c in fitting if not c.offloads] or fitting
        if not fitting:
            return None
        fewest = min(map(self.gpu_hours, fitting))
        worth = [c for c in fitting if self.gpu_hours(c) <= WORTH_ITS_GPUS * fewest]
        fastest = min(c.serial_seconds for c in worth)
        near = [c for c in worth if c.serial_seconds <= NO_SLOWER * fastest]
        return min(near, key=lambda c: c.setup.stage or 0)

    def no_fit(self) -> str:
        """Where nothing fits: a sentence that says so, and what to change."""
        least = min(self.candidates, key=lambda c: c.setup.needed).setup
        advice = least.advice()
        if least.memory.device_total == least.memory.parameters:
            advice = (
                "every GPU first holds the whole model in float32, so more of them do not help; use a smaller model"
            )
        return (
            f"this fits on no number of nodes planned for, up to {max(c.ranks for c in self.candidates)} GPUs of "
            f"{self.device.memory_gib:g} GiB: the least is {least.describe()}; {advice}"
        )


def make_plan(config: Config, vocabulary_size: int) -> Plan:
    """The plan of `config`; vocabulary_size: rows of the embedding. Raises UserError for what cannot be planned."""
    device, model, length = Device.of(config), config.model, config.stream.sequence_length
    mfu = measured_mfu(Path(config.plan.run)) if config.plan.run else config.plan.mfu
    is_dense = model.attention not in ("flex", "varlen")
    flops = step_flops(model, vocabulary_size, [length], 1, length, dense_attention=is_dense)
    parameters = parameters_by_module(config, vocabulary_size)
    tokens = config.plan.tokens or config.train.steps * config.stream.global_batch * length
    candidates: list[Candidate] = []
    for nodes in node_counts(config):
        tokens_per_gpu = config.stream.global_batch * length / (nodes * config.plan.gpus_per_node)
        seconds = tokens_per_gpu / tokens_per_second(flops.model_palm / length, device.peak, mfu)
        plain = [_candidate(config, vocabulary_size, nodes, ways, device, seconds) for ways in _plain(config)]
        candidates += plain
        if not any(candidate.fits for candidate in plain):
            candidates += [_candidate(config, vocabulary_size, nodes, w, device, seconds) for w in _offloaded(config)]
    size = checkpoint_bytes(config, vocabulary_size)
    return Plan(config, device, mfu, vocabulary_size, parameters, flops, tokens, size, candidates)


def node_counts(config: Config) -> list[int]:
    """Those of plan.nodes; raises UserError where their GPUs do not divide the global batch."""
    p, batch = config.plan, config.stream.global_batch
    if not p.nodes:
        chosen = [n for n in (2**i for i in range(MOST_NODES.bit_length())) if divides(config, n * p.gpus_per_node)]
        if chosen:
            return chosen
    for nodes in p.nodes or [1]:
        ranks = nodes * p.gpus_per_node
        if not divides(config, ranks):
            rows = f" of micro-batches of {config.engine.micro_batch}" if config.engine.micro_batch else ""
            raise UserError(
                f"stream.global_batch={batch} does not divide into {ranks} equal shares{rows}, for {in_words(nodes)} "
                f"of {p.gpus_per_node} GPUs; change plan.nodes, plan.gpus_per_node, engine.micro_batch or "
                "stream.global_batch"
            )
    return p.nodes


def in_words(nodes: int) -> str:
    """A number of nodes for a sentence."""
    return f"{nodes} node" if nodes == 1 else f"{nodes} nodes"


Ways = tuple[int | None, bool, bool]
"""ZeRO stage (None: DDP), and whether optimizer and parameters are offloaded."""


def _plain(config: Config) -> list[Ways]:
    """What can be tried with the offload that the configuration asks for."""
    e = config.engine
    if e.kind == "ddp":
        return [(None, False, False)]
    first = 3 if e.offload_parameters else 1 if e.offload_optimizer or e.dtype != "fp32" else 0
    return [(stage, e.offload_optimizer, e.offload_parameters) for stage in range(first, 4)]


def _offloaded(config: Config) -> list[Ways]:
    """What needs less of a GPU's memory than any of `_plain`."""
    e = config.engine
    ways: list[Ways] = [(1, True, False), (2, True, False), (3, True, False), (3, True, True)]
    return [] if e.kind == "ddp" else [w for w in ways if w[1:] > (e.offload_optimizer, e.offload_parameters)]


def _candidate(
    config: Config, vocabulary_size: int, nodes: int, ways: Ways, device: Device, compute_seconds: float
) -> Candidate:
    """With the micro-batch of the configuration, or else the largest that fits."""
    p, e = config.plan, config.engine
    ranks = nodes * p.gpus_per_node
    available = USABLE * device.memory_gib * 2**30
    for rows in [e.micro_batch] if e.micro_batch else _divisors(config.stream.global_batch // ranks):
        chosen = replace(config, engine=replace(e, micro_batch=rows))
        setup = Setup(chosen, vocabulary_size, num_positions(config), ranks, *ways, "cuda")
        fits = setup.needed <= available
        if fits:
            break
    sent = traffic(chosen, vocabulary_size, setup.positions, ranks, ways[0])
    seconds = sent.seconds(p.gpus_per_node, nodes, p.intra_node_gbps, p.inter_node_gbps)
    return Candidate(nodes, setup, setup.memory, fits, sent, compute_seconds, seconds)


def _divisors(number: int) -> Iterator[int]:
    """From the largest to 1."""
    return (n for n in range(number, 0, -1) if number % n == 0)


def tokens_per_second(flops_per_token: float, peak: float, mfu: float) -> float:
    """Of one GPU whose `peak` (FLOP/s) is used to the share `mfu`."""
    return mfu * peak / flops_per_token


def utilization(flops_per_token: float, peak: float, tokens_per_second: float) -> float:
    """MFU of one GPU by the convention of `flops_per_token`."""
    return tokens_per_second * flops_per_token / peak


def measured_mfu(folder: Path) -> float:
    """Median of what a run logged as mfu_palm, its first row left out; raises UserError where it logged none."""
    values = [row["mfu_palm"] for row in read_metrics(folder / "metrics.jsonl")[1:] if row.get("mfu_palm")]
    if not values:
        raise UserError(
            f"plan.run={folder} has no measured MFU in metrics.jsonl (it needs two logged steps on a device whose peak "
            "is known); give plan.mfu= instead"
        )
    return statistics.median(values)


def checkpoint_bytes(config: Config, vocabulary_size: int) -> int:
    """Bytes of a checkpoint: float32 parameters and moments with their headers, whatever engine wrote them.

    Muon has one moment, of the blocks' matrices. The state is left out: some KB, of the stream's lanes.
    """
    parameters = parameters_by_module(config, vocabulary_size)
    muon = parameters["attention"] + parameters["ffn"] if config.optim.kind == "muon" else 0
    names = list(shapes_only(config.model, vocabulary_size, num_positions(config)).named_parameters())
    return 12 * sum(parameters.values()) - 4 * muon + 3 * HEADER_BYTES * len(names)


def parameters_by_module(config: Config, vocabulary_size: int) -> dict[str, int]:
    """Parameters by the module that holds them: token_embedding, attention, ffn, head, ..., blocks added up."""
    counts: Counter[str] = Counter()
    for name, parameter in shapes_only(config.model, vocabulary_size, num_positions(config)).named_parameters():
        module = name.split(".")
        counts[module[2] if module[0] == "blocks" else module[0]] += parameter.numel()
    return dict(counts)


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able numbers; bytes, seconds and FLOPs in their plain units."""
    best = plan.recommended()
    return {
        "device": vars(plan.device),
        "mfu": plan.mfu,
        "vocabulary_size": plan.vocabulary_size,
        "parameters": {"total": sum(plan.parameters.values()), **plan.parameters},
        "tokens": plan.tokens,
        "tokens_per_step": plan.tokens_per_step,
        "steps": plan.steps,
        "flops_per_token": plan.flops_per_token,
        "flops": {name: flops * plan.tokens for name, flops in plan.flops_per_token.items()},
        "checkpoint_bytes": plan.checkpoint_bytes,
        "candidates": [_describe(plan, candidate) for candidate in plan.candidates],
        "recommended": plan.candidates.index(best) if best else None,
        "why": why(plan, best) if best else plan.no_fit(),
    }


def _describe(plan: Plan, c: Candidate) -> dict[str, Any]:
    price = plan.config.plan.price_per_gpu_hour
    both = (c.overlapped_seconds, c.serial_seconds)
    return {
        "nodes": c.nodes,
        "gpus": c.ranks,
        "settings": c.settings,
        "fits": c.fits,
        "memory": vars(c.memory) | {"device_total": c.memory.device_total},
        "sent": vars(c.traffic),
        "compute_seconds": c.compute_seconds,
        "communication_seconds": c.communication_seconds,
        "tokens_per_second": [plan.tokens_per_step / seconds for seconds in both],
        "days": [plan.days(seconds) for seconds in both],
        "gpu_hours": plan.gpu_hours(c),
        "cost": plan.gpu_hours(c) * price if price else None,
        "checkpoint_seconds": plan.checkpoint_seconds(c.nodes),
    }


def why(plan: Plan, best: Candidate) -> str:
    """The reason for the recommendation, in one sentence."""
    room = f"{gib(best.setup.needed)} of {plan.device.memory_gib:g} GiB"
    reason = (
        f"of what fits ({room}) it ends first, to 1 % and at the lowest stage, among all whose GPU hours with no "
        f"communication hidden are within {WORTH_ITS_GPUS - 1:.0%} of the fewest"
    )
    if best.offloads:
        reason = f"nothing fits without host memory; {reason}"
    return f"{in_words(best.nodes)} with {best.settings}: {reason}"
