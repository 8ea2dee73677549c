"""Versions that are known to be bad, alone or together."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet

from mmtrain.config import Config
from mmtrain.verbs.doctor_machine import Check


@dataclass(frozen=True)
class KnownBad:
    """packages: specifier of each; all that match together are bad. status: warn or fail. source: who says so."""

    packages: dict[str, str]
    status: str
    what: str
    mend: str
    source: str


NEW_DEEPSPEED = "pip install 'deepspeed>=0.19.8'"
NO_SWEEPER = "of Hydra is not needed by mmtrain, and needs"

KNOWN_BAD = (
    KnownBad(
        {"deepspeed": ">=0.18.6,<0.19.0"},
        "fail",
        "ZeRO 1 in bf16 leaves the last micro-batch out of the sum of gradients over ranks",
        NEW_DEEPSPEED,
        "deepspeedai/DeepSpeed#7985",
    ),
    KnownBad(
        {"deepspeed": "<0.19.0"},
        "fail",
        "ZeRO 2 with overlap_comm can give NaN, and offload with several backward calls loses gradients",
        NEW_DEEPSPEED,
        "deepspeedai/DeepSpeed#7965, #7981",
    ),
    KnownBad(
        {"deepspeed": "<0.19.0", "torch": ">=2.9,<2.11"},
        "warn",
        "ZeRO 3 with DeepCompile does not work",
        f"{NEW_DEEPSPEED} 'torch>=2.11'",
        "deepspeedai/DeepSpeed#7951, #8024",
    ),
    KnownBad(
        {"deepspeed": "<0.19.3"},
        "fail",
        "Muon with reduce_scatter is wrong in silence under ZeRO 1 and 2, and fp32 gradients are not always used",
        NEW_DEEPSPEED,
        "deepspeedai/DeepSpeed#8090, #8141, #8056",
    ),
    KnownBad(
        {"hydra-core": "<1.3.8"},
        "warn",
        "calls what a configuration names, os.system included, where a program lets it (mmtrain does not)",
        "pip install 'hydra-core>=1.3.8,<1.4'",
        "facebookresearch/hydra#3258",
    ),
    KnownBad(
        {"hydra-optuna-sweeper": "<=1.3.0", "optuna": ">=3"},
        "warn",
        f"the sweeper {NO_SWEEPER} optuna below 3",
        "pip uninstall hydra-optuna-sweeper",
        "its requirements",
    ),
    KnownBad(
        {"hydra-ax-sweeper": ">=0", "ax-platform": ">=0.2.1"},
        "warn",
        f"the sweeper {NO_SWEEPER} ax below 0.2.1",
        "pip uninstall hydra-ax-sweeper",
        "its requirements",
    ),
    KnownBad(
        {"wandb": "<0.29"},
        "warn",
        "it has no `wandb leet inspect`, which reads offline runs",
        "pip install 'wandb>=0.31'",
        "its wheels",
    ),
    KnownBad(
        {"trackio": "==0.43.*", "pillow": ">=13"},
        "warn",
        "trackio needs pillow below 13",
        "pip install 'pillow<13'",
        "its requirements",
    ),
    KnownBad(
        {"nvidia-resiliency-ext": ">=0", "torch": "<2.8"},
        "warn",
        "nvidia-resiliency-ext needs torch 2.8",
        "pip install 'torch>=2.11'",
        "NVIDIA/nvidia-resiliency-ext, README.md",
    ),
)


def check_versions(config: Config) -> Iterator[Check]:
    """What is installed against KNOWN_BAD."""
    bad = list(known_bad(_installed()))
    for entry, found in bad:
        yield Check("known bad", entry.status, f"{found}: {entry.what} ({entry.source})", entry.mend)
    if not bad:
        yield Check("known bad", "pass", f"none of {len(KNOWN_BAD)} combinations of versions that are known to be bad")


def known_bad(versions: dict[str, str]) -> Iterator[tuple[KnownBad, str]]:
    """The entries that fit all of these versions by package, with the versions in words."""
    for entry in KNOWN_BAD:
        if all(
            name in versions and SpecifierSet(bounds, prereleases=True).contains(versions[name])
            for name, bounds in entry.packages.items()
        ):
            yield entry, " with ".join(f"{name} {versions[name]}" for name in entry.packages)


def _installed() -> dict[str, str]:
    """Versions of the packages that the table names."""
    versions = {}
    for name in {name for entry in KNOWN_BAD for name in entry.packages}:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
