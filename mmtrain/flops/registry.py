"""Published models: parameters, training compute and FID, each number with its source and how it was checked.

The data is `baselines.yaml` beside this file. A number marked `memory` was not re-checked against a source:
it stays in the file as a note to the next reader and is kept out of every figure and table.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from mmtrain.config import UserError

SCHEMA_VERSION = 1
KINDS = ("published", "derived")
VERIFIED = ("text", "secondary", "measured", "computed", "memory")
TEXT_FAMILY = "autoregressive_text"
TOKEN_FAMILIES = ("autoregressive_tokens", "masked_tokens", TEXT_FAMILY)

# Training FLOPs of the trainable network, best convention first (the one nearest to the ledger's), with the
# reservation that a figure must print. Frozen parts and hours-based figures are other quantities.
COMPUTE_KEYS = {
    "train_flops_causal": "",
    "train_flops": "",
    "train_flops_6nd": "6ND",
    "train_flops_base": "base model only",
    "train_flops_upper": "upper bound",
    "base_train_upper": "upper bound, base model only",
    "train_flops_lower": "lower bound",
    "train_flops_hours_30pct": "from hours at an assumed 30 % of peak",
}
CONVENTIONS = {
    "train_flops_causal": "3 x forward, causal half",
    "train_flops_6nd": "6ND",
    "train_flops_hours_30pct": "hours x peak x 30 %",
}
"""How a figure was counted, by key; the others are 3 x forward of the trained network, attention in full."""


@dataclass(frozen=True)
class Quantity:
    """One number: `path` in the registry ("compute.train_flops"), value (None: unknown), unit and provenance."""

    path: str
    value: float | int | str | None
    unit: str
    kind: str
    verified: str
    source: str
    formula: str = ""
    note: str = ""

    @property
    def citable(self) -> bool:
        """A number that may appear in figures and tables: known, checked, and not marked as unfit to rank on."""
        return isinstance(self.value, (int, float)) and self.verified != "memory" and "do not rank" not in self.note

    @property
    def number(self) -> float:
        """The value as a number. Raises ValueError when it is unknown or a phrase."""
        if not isinstance(self.value, (int, float)):
            raise ValueError(f"{self.path} is no number: {self.value!r}")
        return float(self.value)


@dataclass(frozen=True)
class Baseline:
    """A published model. `fids`: zero-shot COCO-30k values, each with its own sampling settings in the note."""

    id: str
    name: str
    family: str
    modality: str
    quantities: dict[str, Quantity]
    fids: tuple[Quantity, ...]
    fid_settings: str

    @property
    def is_token_model(self) -> bool:
        """Predicts tokens (autoregressive or masked), as opposed to diffusion."""
        return self.family in TOKEN_FAMILIES

    @property
    def training_compute(self) -> tuple[Quantity, str] | None:
        """Training FLOPs and the reservation about them ("" for none); None when nothing citable is known."""
        for key, reservation in COMPUTE_KEYS.items():
            quantity = self.quantities.get(f"compute.{key}")
            if quantity is not None and quantity.citable and not self._rests_on_memory(quantity):
                return quantity, reservation
        return None

    def _rests_on_memory(self, quantity: Quantity) -> bool:
        """Whether the formula names a number of this model that was not re-checked."""
        names = set(re.findall(r"\w+", quantity.formula))
        inputs = [other for path, other in self.quantities.items() if path.split(".")[-1] in names]
        return any(other.verified == "memory" or "from memory" in other.source for other in inputs)

    @property
    def convention(self) -> str:
        """How `training_compute` was counted; "" without it."""
        if self.training_compute is None:
            return ""
        return CONVENTIONS.get(self.training_compute[0].path.split(".")[-1], "3 x forward")

    @property
    def is_undisclosed(self) -> bool:
        """Whether its makers published neither size, data nor compute."""
        numbers = [quantity for quantity in self.quantities.values() if quantity.value is not None]
        return not numbers and any("undisclosed" in quantity.source for quantity in self.quantities.values())

    @property
    def best_fid(self) -> Quantity | None:
        """The lowest citable zero-shot COCO-30k FID."""
        return min((fid for fid in self.fids if fid.citable), key=lambda fid: fid.number, default=None)


def _quantity(path: str, entry: Any, owner: str) -> Quantity:
    """Read one {value, unit, kind, verified, source, ...}; raises UserError when it breaks the schema."""
    known = {"value", "unit", "kind", "verified", "source", "formula", "note"}
    problem = ""
    if not isinstance(entry, dict) or not {"value", "kind", "verified", "source"} <= set(entry):
        problem = "needs value, kind, verified and source"
    elif set(entry) - known:
        problem = f"has unknown keys {sorted(set(entry) - known)}"
    elif entry["kind"] not in KINDS or entry["verified"] not in VERIFIED:
        problem = f"has kind={entry['kind']!r}, verified={entry['verified']!r}; allowed: {KINDS}, {VERIFIED}"
    elif entry["kind"] == "derived" and not entry.get("formula"):
        problem = "is derived and needs a formula"
    elif not str(entry["source"]).strip():
        problem = "has no source"
    elif str(entry.get("unit", "")).startswith("FLOP") and not isinstance(entry["value"], (int, float, type(None))):
        problem = f"counts FLOPs and is no number: {entry['value']!r}"
    if problem:
        raise UserError(f"Registry of published models: {owner}.{path} {problem}.")
    return Quantity(
        path,
        entry["value"],
        str(entry.get("unit", "")),
        entry["kind"],
        entry["verified"],
        str(entry["source"]),
        str(entry.get("formula", "")),
        str(entry.get("note", "")),
    )


def _baseline(entry: Any) -> Baseline:
    if not isinstance(entry, dict) or not {"id", "name", "family", "modality"} <= set(entry):
        raise UserError(
            f"Registry of published models: an entry lacks id, name, family or modality: {str(entry)[:80]}."
        )
    quantities: dict[str, Quantity] = {}
    for group, content in entry.items():
        if isinstance(content, dict) and "value" not in content:
            for key, value in content.items():
                quantities[f"{group}.{key}"] = _quantity(f"{group}.{key}", value, entry["id"])
    fids = entry.get("fid_coco30k_zero_shot", [])
    fids = fids if isinstance(fids, list) else [fids]
    return Baseline(
        entry["id"],
        entry["name"],
        entry["family"],
        entry["modality"],
        quantities,
        tuple(_quantity("fid_coco30k_zero_shot", fid, entry["id"]) for fid in fids),
        _settings(entry.get("fid_settings", "")),
    )


def _settings(value: Any) -> str:
    return str(value.get("value", "")) if isinstance(value, dict) else str(value)


def parse_registry(content: Any) -> list[Baseline]:
    """Baselines of a loaded registry file. Raises UserError that names the entry which breaks the schema."""
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"Registry of published models: expected schema_version {SCHEMA_VERSION}.")
    baselines = [_baseline(entry) for entry in content.get("models", [])]
    ids = [baseline.id for baseline in baselines]
    if len(set(ids)) != len(ids):
        raise UserError(f"Registry of published models: the id {max(ids, key=ids.count)!r} is there twice.")
    return baselines


@lru_cache(maxsize=1)
def _content() -> Any:
    return yaml.safe_load(resources.files("mmtrain.flops").joinpath("baselines.yaml").read_text(encoding="utf-8"))


def load_registry(text_models: bool = False) -> list[Baseline]:
    """The published models that travel with the package: those of pictures, and on demand those of text alone, too."""
    return [each for each in parse_registry(_content()) if text_models or each.family != TEXT_FAMILY]


def load_accelerators() -> dict[str, Quantity]:
    """Peak dense bf16 rates of the accelerators that the registry's hours refer to, in FLOP/s."""
    return {
        name: Quantity(
            f"accelerators.{name}",
            entry["bf16_dense_flops"],
            "FLOP/s",
            "published",
            "text",
            entry["source"],
            "",
            entry.get("note", ""),
        )
        for name, entry in _content()["accelerators"].items()
    }
