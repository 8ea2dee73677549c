"""A Hugging Face folder becomes a weights folder, which `model.weights` starts a run from.

FOLDER/
    model.json         the architecture, as keys of the section model
    model.safetensors  our parameters by name, in their dtype (several files and an index where they are large)
    tokenizer.json     text alone, ids from 0
    vocabulary.json    our id space
    import.json        where it came from, hashes of the files, ids that the source has no row for
"""

import json
import re
from functools import partial, reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.config import UserError, fingerprint
from mmtrain.config.weights import ARCHITECTURE, IMPORT, MODEL, TOKENIZER, VOCABULARY
from mmtrain.models.huggingface.architecture import Architecture, from_config
from mmtrain.models.huggingface.layout import Piece, tensor_layout
from mmtrain.models.huggingface.shards import (
    PICKLED,
    SHARD_BYTES,
    Planned,
    TensorFiles,
    file_facts,
    read_json,
    write_tensors,
)
from mmtrain.models.huggingface.tokenizer import Correspondence, correspond, of_ours, read_tokenizer, write_tokenizer
from mmtrain.models.registry import build_model
from mmtrain.tokens import Vocabulary

FORMAT_VERSION = 1
OF_THE_VOCABULARY = ("token_embedding.weight", "head.weight")
# Buffers that old versions saved, and Chameleon's image encoder: its tokens come from an image tokenizer here.
LEFT_OUT = re.compile(r"(.*\.)?rotary_emb\.inv_freq|model\.vqmodel\..*")
SOURCE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", VOCABULARY)


def import_folder(source: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Fill the folder `out` from the Hugging Face folder `source`.

    Tensors are copied bit by bit, one output file in memory at a time. Raises UserError for a folder that is no such
    model, whose tensors are not those of its config, or whose tokenizer does not fit.
    """
    if not (source / "config.json").is_file():
        pickled = next((p.name for pattern in PICKLED for p in source.glob(pattern)), None)
        why = f"{pickled} is pickled, which is never opened" if pickled else "config.json is missing"
        raise UserError(f"{source} is no folder that transformers saved ({why}); give one with safetensors")
    architecture = from_config(read_json(source / "config.json"), str(source / "config.json"))
    with TensorFiles(source) as files:
        _check_tensors(architecture, files, source)
        match = _correspondence(source, architecture.vocabulary_size)
        write_tokenizer(match.text, out / TOKENIZER, str(source / "tokenizer.json"))
        match.vocabulary.save(out / VOCABULARY)
        model = {key: getattr(architecture.model, key) for key in (*ARCHITECTURE, "max_positions")}
        (out / MODEL).write_text(json.dumps(model, indent=1))
        planned = _planned(architecture, match, files)
        write_tensors(out, planned, shard_bytes)
        left_out = sorted(name for name in files.shapes if LEFT_OUT.fullmatch(name))
    known = set(match.ours)
    used = [name for name in SOURCE_FILES if (source / name).is_file()]
    facts = {
        "format_version": FORMAT_VERSION,
        "source": str(source),
        "source_files": file_facts(source, [*used, *sorted(path.name for path in source.glob("*.safetensors"))]),
        "new_rows": [id for id in range(match.vocabulary.size) if id not in known],
        "left_out": left_out,
        "parameters": sum(prod(tensor.shape) for tensor in planned),
        "files": file_facts(out, sorted(path.name for path in out.iterdir())),
    }
    facts["fingerprint"] = fingerprint("weights", facts["files"], facts["new_rows"])
    (out / IMPORT).write_text(json.dumps(facts, indent=1))


def _check_tensors(architecture: Architecture, files: TensorFiles, source: Path) -> None:
    """Raise UserError for the first tensor that is missing, too much, or of another shape."""
    if architecture.model.layers > len(files.shapes):  # before a layout of billions of names is made
        raise UserError(
            f"{source}: config.json says {architecture.model.layers} layers, and there are {len(files.shapes)} tensors"
        )
    layout = tensor_layout(architecture.model, architecture.vocabulary_size, architecture.positions)
    expected = {piece.name: piece.shape for pieces in layout.values() for piece in pieces}
    for name, shape in expected.items():
        if name not in files.shapes:
            raise UserError(f"{source}: tensor {name} is missing; the download is not complete, or of another model")
        if files.shapes[name] != shape:
            found = list(files.shapes[name])
            raise UserError(f"{source}: tensor {name} has shape {found}, config.json asks for {list(shape)}")
    for name in sorted(files.shapes.keys() - expected.keys()):
        if LEFT_OUT.fullmatch(name):
            continue
        # Older versions of transformers saved a tied head, too.
        embedding = layout["token_embedding.weight"][0].name
        same_type = name == "lm_head.weight" and files.dtypes[name] == files.dtypes[embedding]
        if same_type and torch.equal(files[name], files[embedding]):
            continue
        hint = "tied to the embedding, and is another one" if name == "lm_head.weight" else "not one of this model"
        raise UserError(f"{source}: tensor {name} is {hint} by config.json; it would be lost")


def _correspondence(source: Path, rows: int) -> Correspondence:
    """Their ids and ours, by their tokenizer; by vocabulary.json where the folder came from here."""
    path = source / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{source} has no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    content = read_tokenizer(path)
    if (source / VOCABULARY).is_file() and (vocabulary := Vocabulary.load(source / VOCABULARY)).size == rows:
        return of_ours(content, vocabulary, str(path))
    return correspond(content, _special_ids(source, content, rows), rows, str(path))


def _special_ids(source: Path, content: dict[str, Any], rows: int) -> dict[str, int | None]:
    """Their ids of <bos>, <eos>, <pad> and <unk>: by the names in the tokenizer's files, else by config.json.

    Names first: Chameleon's config.json gives the id of its `<pad>` for the beginning.
    """
    config, model = read_json(source / "config.json"), content["model"]
    named: dict[str, Any] = {"unk_token": model["unk_token"]}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (source / file_name).is_file():
            named |= {key: value for key, value in read_json(source / file_name).items() if value is not None}
    ids = {token["content"]: token["id"] for token in content["added_tokens"]} | model["vocab"]
    found: dict[str, int | None] = {}
    for kind in ("bos", "eos", "pad", "unk"):
        name = named.get(f"{kind}_token")
        name = name.get("content") if isinstance(name, dict) else name
        id = ids.get(name) if isinstance(name, str) else None
        if id is None:
            id = config.get(f"{kind}_token_id")
            id = id[0] if isinstance(id, list) and id else id
        # Old configs say -1 where there is none.
        found[f"<{kind}>"] = id if isinstance(id, int) and 0 <= id < rows else None
    return found


def _planned(architecture: Architecture, match: Correspondence, files: TensorFiles) -> list[Planned]:
    """Our tensors, to be gathered from theirs."""
    size = match.vocabulary.size
    layout = tensor_layout(architecture.model, architecture.vocabulary_size, architecture.positions)
    ours = build_model(architecture.model, size, architecture.positions, "meta").named_parameters()
    planned = []
    for name, parameter in ours:
        pieces, shape = layout[name], tuple(parameter.shape)
        dtype = reduce(torch.promote_types, [files.dtypes[piece.name] for piece in pieces])
        rows = match.ours if name in OF_THE_VOCABULARY else None
        planned.append(Planned(name, shape, dtype, partial(_gather, files, pieces, shape, rows)))
    return planned


def _gather(files: TensorFiles, pieces: tuple[Piece, ...], shape: tuple[int, ...], rows: list[int] | None) -> Tensor:
    """Our tensor; with `rows`, row i of theirs is our row rows[i], and those that they do not have are zero."""
    theirs = torch.cat([files[piece.name][piece.skip :].flatten() for piece in pieces])
    if rows is None:
        return theirs.view(shape)
    found = theirs.view(len(rows), *shape[1:])
    gathered = found.new_zeros(shape)
    gathered[torch.tensor(rows)] = found
    return gathered
