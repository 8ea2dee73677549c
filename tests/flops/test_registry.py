"""The registry of published models keeps its schema and keeps unchecked numbers out of figures."""

import copy

import pytest
import yaml

from mmtrain.config import UserError
from mmtrain.flops.registry import load_registry, parse_registry

ENTRY = """
schema_version: 1
models:
- id: a
  name: A
  family: autoregressive_tokens
  modality: text->image
  training: {steps: {value: 10, kind: published, verified: memory, source: paper}}
  compute:
    train_flops: {value: 1.0e+20, unit: FLOP, kind: published, verified: text, source: paper}
  fid_coco30k_zero_shot:
  - {value: 9.0, kind: published, verified: text, source: paper}
  - {value: 8.0, kind: published, verified: memory, source: paper}
"""


@pytest.fixture
def content():
    return copy.deepcopy(yaml.safe_load(ENTRY))


def test_packaged_registry_is_valid_and_complete():
    registry = {baseline.id: baseline for baseline in load_registry()}
    assert len(registry) == 41  # and 9 of text alone
    assert registry["cm3leon-7b"].training_compute[0].value == 1.043e23
    assert registry["cm3leon-7b"].best_fid.value == 4.88
    assert registry["sd-1.5"].training_compute[0].value == 6.698e21
    assert registry["sd-1.5"].is_token_model is False
    assert all(quantity.source for baseline in registry.values() for quantity in baseline.quantities.values())


@pytest.mark.parametrize("id", ["gpt-3.5", "gpt-4", "midjourney"])
def test_undisclosed_stays_undisclosed(id):
    model = next(baseline for baseline in load_registry(text_models=True) if baseline.id == id)
    assert model.is_undisclosed and model.training_compute is None


@pytest.mark.parametrize("id", ["sd3-8b", "make-a-scene", "llamagen-c2i-3b", "mdt-xl2", "u-vit-h2", "emu3-8b"])
def test_compute_from_memory_is_no_headline(id):
    assert next(baseline for baseline in load_registry() if baseline.id == id).training_compute is None


def test_fid_from_memory_or_not_to_be_ranked_on_is_no_headline(content):
    registry = {baseline.id: baseline for baseline in load_registry()}
    assert registry["ediff-i"].best_fid is None and registry["wuerstchen"].best_fid is None
    assert parse_registry(content)[0].best_fid.value == 9.0


def test_compute_derived_from_memory_is_no_headline(content):
    compute = content["models"][0]["compute"]["train_flops"]
    compute.update(kind="derived", verified="computed", formula="6 * N * steps")
    assert parse_registry(content)[0].training_compute is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("source", ""), ("kind", "guess"), ("verified", "yes"), ("value", "1e20"), ("extra", 1), ("kind", "derived")],
)
def test_a_number_without_provenance_is_refused(content, key, value):
    content["models"][0]["compute"]["train_flops"][key] = value
    with pytest.raises(UserError, match=r"a\.compute\.train_flops"):
        parse_registry(content)


def test_duplicate_ids_and_other_versions_are_refused(content):
    with pytest.raises(UserError, match="twice"):
        parse_registry({**content, "models": content["models"] * 2})
    with pytest.raises(UserError, match="schema_version"):
        parse_registry({**content, "schema_version": 2})
