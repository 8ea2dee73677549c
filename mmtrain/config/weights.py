"""A weights folder that `mmtrain import` wrote, as a configuration sees it: its architecture and its tokenizer."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmtrain.config.errors import UserError
from mmtrain.config.schema import Config, ModelConfig

MODEL, TOKENIZER, VOCABULARY, IMPORT = "model.json", "tokenizer.json", "vocabulary.json", "import.json"
ARCHITECTURE = ("family", "layers", "width", "heads", "kv_heads", "ffn_width", "activation", "norm_after", "rope_base",
                "norm_eps", "tie_embeddings")  # fmt: skip


@dataclass(frozen=True)
class WeightsFolder:
    """Its keys of the section model, and what import.json says."""

    path: Path
    model: dict[str, Any]
    facts: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return self.facts["fingerprint"]


def open_weights(path: Path) -> WeightsFolder:
    """Read the small files of a weights folder.

    Raises UserError if it is none, or a file of it is missing or of another size than was written.
    """
    if not (path / IMPORT).is_file():
        hint = f"it is a Hugging Face folder: first `mmtrain import {path} out=FOLDER`"
        why = hint if (path / "config.json").is_file() else "give a folder that `mmtrain import` wrote"
        raise UserError(f"model.weights={path} has no {IMPORT}; {why}")
    try:
        facts = json.loads((path / IMPORT).read_text(encoding="utf-8"))
        for name, entry in facts["files"].items():
            if (path / name).stat().st_size != entry["bytes"]:
                raise UserError(f"model.weights={path} is damaged: {name} is not as it was written; import it again")
        model = json.loads((path / MODEL).read_text(encoding="utf-8"))
        folder = WeightsFolder(path, {key: model[key] for key in (*ARCHITECTURE, "max_positions")}, facts)
        usual = ModelConfig()
        assert folder.fingerprint and all(type(value) is type(getattr(usual, key)) for key, value in model.items())
        assert all(isinstance(id, int) for id in facts["new_rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"model.weights={path} is incomplete or damaged ({error!r}); import it again") from error
    return folder


def with_weights(config: Config, explicit: set[str]) -> Config:
    """`config` with the architecture and the text tokenizer of its model.weights.

    explicit: keys of the section model that somebody has set; raises UserError where one contradicts the weights.
    """
    folder = open_weights(Path(config.model.weights or ""))
    learned_positions = folder.model["family"] == "cm3leon"
    chosen = {key: folder.model[key] for key in ARCHITECTURE}
    if learned_positions or not config.model.max_positions:
        chosen["max_positions"] = folder.model["max_positions"]
    model = replace(config.model, **chosen)
    for key in chosen:
        old, new = _meaning(config.model, key), _meaning(model, key)
        if key in explicit and old != new and (key, old) != ("max_positions", 0):
            raise UserError(
                f"model.{key}={old} contradicts model.weights={folder.path}, which has {new}; leave it out, the "
                "architecture comes with the weights"
            )
    length = config.stream.sequence_length
    if length > model.max_positions:
        beyond = "" if learned_positions else f", or set model.max_positions={length} to go beyond them"
        raise UserError(
            f"stream.sequence_length={length} is longer than the {model.max_positions} positions that "
            f"model.weights={folder.path} has learned; shorten it{beyond}"
        )
    return replace(config, model=model, text_tokenizer=replace(config.text_tokenizer, path=_tokenizer(config, folder)))


def _meaning(model: ModelConfig, key: str) -> Any:
    """The value of a key, its 0 replaced by what it stands for."""
    return {"kv_heads": model.num_kv_heads, "ffn_width": model.feed_forward_width}.get(key, getattr(model, key))


def _tokenizer(config: Config, folder: WeightsFolder) -> str:
    ours, given = folder.path / TOKENIZER, config.text_tokenizer.path
    if given and (not Path(given).is_file() or Path(given).read_bytes() != ours.read_bytes()):
        raise UserError(
            f"text_tokenizer.path={given} contradicts model.weights={folder.path}, which has its own; leave it out"
        )
    return given or str(ours)
