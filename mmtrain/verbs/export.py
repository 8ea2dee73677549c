"""`mmtrain export`: a checkpoint as a Hugging Face folder."""

import json
import os
from functools import partial
from pathlib import Path

from mmtrain.config import UserError, build_artifact
from mmtrain.flops import read_account
from mmtrain.flops.lineage import write_compute
from mmtrain.models import count_parameters, num_positions
from mmtrain.models.huggingface import check_exportable, export_folder
from mmtrain.models.huggingface.exporting import DTYPES
from mmtrain.models.huggingface.shards import SHARD_BYTES
from mmtrain.track import closing_box
from mmtrain.train.checkpoint import load_model
from mmtrain.verbs.trained import TrainedRun, open_trained

ORIGIN = "export.json"
AUTO_CLASS = {"cm3leon": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM",
              "chameleon": "AutoModelForImageTextToText"}  # fmt: skip

CARD = """\
# {name}

A {family} model of {parameters:,} parameters that mmtrain trained: step {step:,} of the run {name}, {tokens:,} tokens,
{flops:.3g} training FLOPs (multiply-add = 2, causal).
Text and pictures are one sequence of ids; vocabulary.json says which ids are what.

| | |
|---|---|
| objective | {objective} |
| corpus | {corpus} |
| layers, width, heads, heads of keys | {layers}, {width}, {heads}, {kv_heads} |
| positions | {positions} |
| dtype | {dtype} |

```python
import torch
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {auto}.from_pretrained("FOLDER")
start = tokenizer("<eos>a caption<break>", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**start, max_new_tokens={tokens_per_image}, do_sample=True)[0]))
```

`<image:17>` is code 17 of a picture, {tokens_per_image} codes row by row. The folder image_tokenizer turns them into
pixels: `mmtrain.tokens.ImageTokenizer.load("FOLDER/image_tokenizer").decode([codes])`.
"""


def main(argv: list[str]) -> int:
    """Write the run's checkpoint to out=FOLDER."""
    given, rest = named(argv, ("out", "dtype", "shard_bytes"))
    out, dtype = Path(need(given, "out", "export")), given.get("dtype", "float32")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
    shard_bytes = read_shard_bytes(given)
    run = open_trained(rest)
    if run.config.model.is_diffusion:
        raise UserError("transformers has no model like the baseline of model.family=dit; export a run of tokens")
    check_exportable(run.config.model)
    origin = {
        "run": run.folder.name,
        "run_id": run.checkpoint.state.get("run_id"),
        "step": run.checkpoint.step,
        "vocabulary": run.vocabulary.fingerprint,
        "model": run.checkpoint.state.get("model"),
        "dtype": dtype,
    }
    refuse_another(out, ORIGIN, origin)
    build_artifact(out, partial(_fill, run, origin, dtype, shard_bytes))
    places = {"model": os.path.relpath(out), "card": os.path.relpath(out / "README.md")}
    closing_box(f"step {run.checkpoint.step} of {run.folder.name} for transformers", places)
    return 0


def named(argv: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The words NAME=VALUE of these names, and the other words."""
    mine = [word for word in argv if word.partition("=")[0] in names and "=" in word]
    return {w.partition("=")[0]: w.partition("=")[2] for w in mine}, [word for word in argv if word not in mine]


def need(given: dict[str, str], name: str, verb: str) -> str:
    """The value of a word that must be there."""
    if not given.get(name):
        raise UserError(f"{name}=FOLDER is missing; see `mmtrain {verb} --help`")
    return given[name]


def read_shard_bytes(given: dict[str, str]) -> int:
    """shard_bytes=N, 5 GB without it."""
    text = given.get("shard_bytes", str(SHARD_BYTES))
    if not text.isdecimal() or not int(text):
        raise UserError(f"shard_bytes={text} must be a whole number of bytes above 0")
    return int(text)


def refuse_another(out: Path, file_name: str, facts: dict) -> None:
    """Raise UserError when `out` is there and its JSON file `file_name` does not hold all `facts`."""
    if not out.exists() and not out.is_symlink():
        return
    try:
        found = json.loads((out / file_name).read_text())
        same = all(found[key] == value for key, value in facts.items())
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"out={out} exists and is something else; choose another folder, or delete that one")


def _fill(run: TrainedRun, origin: dict, dtype: str, shard_bytes: int, out: Path) -> None:
    config, positions = run.config, num_positions(run.config)
    model = load_model(run.checkpoint, config, run.vocabulary.size, run.vocabulary.fingerprint)
    tokenizer = run.artifacts.text_tokenizer / "tokenizer.json"
    parameters = dict(model.named_parameters())
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}
    export_folder(config.model, parameters, run.vocabulary, tokenizer, positions, out, dtype, shard_bytes)
    run.image.save(out / "image_tokenizer")
    m, account = config.model, read_account(run.folder)
    write_compute(out, run.folder.name, account)
    card = CARD.format(
        name=run.folder.name,
        family=m.family,
        parameters=count_parameters(m, run.vocabulary.size, positions),
        step=run.checkpoint.step,
        tokens=int(run.checkpoint.state["tokens"]),
        flops=account.ledger.training_total,
        objective=config.objective.kind,
        corpus=", ".join(config.sources),
        layers=m.layers,
        width=m.width,
        heads=m.heads,
        kv_heads=m.num_kv_heads,
        positions=positions,
        dtype=dtype,
        auto=AUTO_CLASS[m.family],
        tokens_per_image=run.image.tokens_per_image,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / ORIGIN).write_text(json.dumps(origin, indent=1))
