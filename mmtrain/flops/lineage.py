"""The compute of the model that a run starts from: it travels with exported and imported weights as compute.json.

Epoch AI's rule: the training compute of a model includes that of the pretrained models it is made of. It is never
booked in the run's own ledger: `mmtrain flops run=FOLDER` shows it apart.
"""

import json
from pathlib import Path
from typing import Any

from mmtrain.config import Config, UserError, write_text_atomic
from mmtrain.flops.journal import Account
from mmtrain.flops.registry import load_registry

COMPUTE = "compute.json"


def lineage_total(account: Account) -> int | None:
    """Training FLOPs of the run and of all models it descends from; None when one of them is unknown."""
    if account.base is None:
        return account.ledger.training_total
    before = account.base.get("with_base")
    return None if before is None else account.ledger.training_total + before


def write_compute(folder: Path, name: str, account: Account) -> None:
    """Leave compute.json with the weights of a run."""
    facts = {
        "name": name,
        "training": account.ledger.training_total,
        "with_base": lineage_total(account),
        "base": account.base,
        "source": "ledger of mmtrain: 1 multiply-add = 2 FLOPs, 3 x forward, causal and document-masked",
    }
    write_text_atomic(folder / COMPUTE, json.dumps(facts, indent=1) + "\n")


def compute_of_published(id: str) -> dict[str, Any]:
    """The facts of compute.json for a model of the registry. Raises UserError when nothing citable is known of it."""
    baseline = next((each for each in load_registry(text_models=True) if each.id == id), None)
    if baseline is None or baseline.training_compute is None:
        raise UserError(
            f"baseline={id}: the registry has no checked training compute of such a model; `mmtrain flops ls` lists all"
        )
    quantity, reservation = baseline.training_compute
    flops = int(quantity.number)
    source = f"registry of mmtrain: {quantity.path}{f' ({reservation})' if reservation else ''}; {quantity.source}"
    return {"name": baseline.name, "training": flops, "with_base": flops, "base": None, "source": source}


def read_compute(folder: Path) -> dict[str, Any] | None:
    """compute.json of a weights folder; None without a sound one: the compute is unknown then."""
    try:
        facts = json.loads((folder / COMPUTE).read_text(encoding="utf-8"))
        assert type(facts["training"]) is int and facts["training"] >= 0
        assert facts["with_base"] is None or (type(facts["with_base"]) is int and facts["with_base"] >= 0)
        return {key: facts[key] for key in ("name", "training", "with_base", "base", "source")}
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return None


def base_model(config: Config, weights: str) -> dict[str, Any] | None:
    """Facts about the model that a run starts from, for its journal; None for a run from scratch.

    weights: the fingerprint of its weights folder.
    """
    if not config.model.weights:
        return None
    folder = Path(config.model.weights)
    known = read_compute(folder) or {"name": folder.name, "training": None, "with_base": None, "base": None,
                                     "source": "unknown: its folder has no compute.json"}  # fmt: skip
    return {"weights": weights, **known}
