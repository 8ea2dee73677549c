"""Parity with transformers, out and back; foreign tokenizers; what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtrain.config import ModelConfig, TextTokenizerConfig, UserError
from mmtrain.config.weights import open_weights
from mmtrain.models import Decoder, build_model
from mmtrain.models.huggingface import export_folder, import_folder
from mmtrain.models.huggingface.shards import TensorFiles
from mmtrain.models.weights import load_weights
from mmtrain.tokens import TextTokenizer, Vocabulary
from mmtrain.tokens.vocabulary import SPECIALS
from tests.models.foreign import FOREIGN, POSITIONS, ROWS, SENTENCES, foreign_source, randomize

transformers = pytest.importorskip("transformers")

GREEDY = 200
TEXTS = ["a red house", " leading blanks", "two\nlines\n\n", "naïve 北京 🙂🏽", "tabs\tand </s> <s> <pad> <break>",
         "a <image:3>", "", "   ", "\x00\x07", "UPPER 1234567", "<0x0A>▁"]  # fmt: skip
FAMILIES = {
    "opt": ModelConfig(family="cm3leon", activation="gelu"),
    "opt-untied": ModelConfig(family="cm3leon", tie_embeddings=False),
    "llama": ModelConfig(family="llama", tie_embeddings=False, rope_base=5000.0, norm_eps=1e-6),
    "llama-gqa": ModelConfig(family="llama", kv_heads=2),
    "chameleon": ModelConfig(family="chameleon", tie_embeddings=False, kv_heads=2),
    "chameleon-swin": ModelConfig(family="chameleon", tie_embeddings=False, norm_after=True),
}
AUTO = {"chameleon": transformers.AutoModelForImageTextToText}


def small(config: ModelConfig) -> ModelConfig:
    config.layers, config.width, config.heads, config.ffn_width = 2, 32, 4, 48
    return config


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    TextTokenizer.train(SENTENCES, TextTokenizerConfig(vocab_size=300)).save(path)
    return path


VOCABULARY = Vocabulary(text_size=300, image_codes=16, num_sentinels=3)


def our_model(config: ModelConfig, vocabulary: Vocabulary = VOCABULARY) -> Decoder:
    model = build_model(config, vocabulary.size, POSITIONS)
    model.initialize(0)
    randomize(model)
    return model.eval()


def export(config: ModelConfig, tokenizer: Path, out: Path, **settings) -> Decoder:
    out.mkdir()
    model = our_model(small(config))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    export_folder(config, parameters, VOCABULARY, tokenizer, POSITIONS, out, **settings)
    return model


@torch.no_grad()
def our_logits(model: Decoder, ids: Tensor) -> Tensor:
    position = torch.arange(ids.shape[1]).expand_as(ids)
    return model.logits(ids, torch.zeros_like(ids), position, torch.full_like(ids, -1))


@torch.no_grad()
def our_greedy(model: Decoder, ids: Tensor, number: int, among: Tensor) -> list[int]:
    """The most probable tokens in turn, as places in `among`, the ids that are allowed."""
    cache, new, written = model.new_cache(1, ids.shape[1] + number), ids, []
    for _ in range(number):
        length = cache.length + new.shape[1]
        position = torch.arange(cache.length, length)[None]
        mask = (torch.arange(length) <= position[..., None])[:, None]
        best = model.decode(new, position, torch.full_like(new, -1), mask, cache)[:, among].argmax(-1, keepdim=True)
        new = among[best]
        written.append(int(best))
    return written


def load(folder: Path, family: str) -> torch.nn.Module:
    auto = AUTO.get(family, transformers.AutoModelForCausalLM)
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_computes_the_same_and_comes_back_bit_for_bit(name: str, tokenizer_file: Path, tmp_path: Path):
    config = FAMILIES[name]
    ours = export(config, tokenizer_file, tmp_path / "out", shard_bytes=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    theirs = load(tmp_path / "out", config.family)

    ids = torch.randint(6, VOCABULARY.sentinel_end, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (our_logits(ours, ids) - theirs(input_ids=ids).logits).abs().max()
    assert difference <= 1e-5
    theirs.generation_config.eos_token_id = None
    prompt = ids[:1, :20]
    drawn = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY, do_sample=False)
    assert drawn[0, 20:].tolist() == our_greedy(ours, prompt, GREEDY, torch.arange(VOCABULARY.size))

    (tmp_path / "back").mkdir()
    import_folder(tmp_path / "out", tmp_path / "back", shard_bytes=20_000)
    back = open_weights(tmp_path / "back")
    assert back.facts["new_rows"] == []
    with TensorFiles(tmp_path / "back") as files:
        parameters = dict(ours.named_parameters())
        assert files.shapes.keys() == parameters.keys()
        assert all(torch.equal(files[name], parameter) for name, parameter in parameters.items())
    assert back.model.pop("max_positions") == POSITIONS
    assert back.model == {key: getattr(config, key) for key in back.model}
    assert (tmp_path / "back" / "vocabulary.json").read_bytes() == (tmp_path / "out" / "vocabulary.json").read_bytes()
    original, text = (TextTokenizer.load(path) for path in (tokenizer_file, tmp_path / "back" / "tokenizer.json"))
    assert text.fingerprint == original.fingerprint


@pytest.mark.parametrize("name", ["opt", "llama", "chameleon"])
def test_auto_tokenizer_gives_our_ids(name: str, tokenizer_file: Path, tmp_path: Path) -> None:
    export(FAMILIES[name], tokenizer_file, tmp_path / "out", dtype="bf16")
    assert load(tmp_path / "out", FAMILIES[name].family).dtype == torch.bfloat16
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = TextTokenizer.load(tokenizer_file)
    for text in (text for text in TEXTS if "<" not in text):
        ids = [VOCABULARY.text_start + id for id in ours.encode(text)]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    named = theirs("<eos>a dog<break><image:15><sentinel:2><eoss>")["input_ids"]
    dog = [VOCABULARY.text_start + id for id in ours.encode("a dog")]
    v = VOCABULARY
    assert named == [v.eos, *dog, v.brk, v.image_start + 15, v.sentinel_start + 2, v.eoss]
    assert theirs.decode(named, skip_special_tokens=True) == "a dog"
    kinds = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
    assert [getattr(theirs, kind) for kind in kinds] == [v.pad, v.bos, v.eos, v.unk]


def imported_model(folder: Path, vocabulary: Vocabulary) -> Decoder:
    """The model that a run with this vocabulary starts with."""
    facts = open_weights(folder).model
    model = build_model(ModelConfig(**facts), vocabulary.size, facts["max_positions"])
    model.initialize(0)
    load_weights(model, folder, vocabulary, seed=0)
    return model.eval()


def our_ids(vocabulary: Vocabulary, name: str) -> Tensor:
    """Our id of each of their ids, worked out here from the names alone."""
    special = FOREIGN[name][1]
    ours = {"</s>": 2, "<s>": 1, "<pad>": 0, "<unk>": 3, "<racm3:break>": 4, "<eoss>": 5}
    found, text = {}, iter(range(vocabulary.text_start, vocabulary.text_end))
    names = {id: token for token, id in special.items()}
    codes = {f"IMGIMG{letters}Z": n for letters, n in zip("ABCDEFGHIJ", range(10), strict=True)} | {"IMGIMGBAZ": 10}
    for id in range(ROWS):
        token = names.get(id, "")
        if token in codes:
            found[id] = vocabulary.image_start + codes[token]
        else:
            found[id] = ours[token] if token in ours else next(text)
    return torch.tensor([found[id] for id in range(ROWS)])


@pytest.mark.parametrize("name", FOREIGN)
def test_an_import_computes_the_same_on_every_token_it_knows(name: str, tmp_path: Path) -> None:
    theirs, _ = foreign_source(name, tmp_path / "source")
    (tmp_path / "weights").mkdir()
    import_folder(tmp_path / "source", tmp_path / "weights", shard_bytes=30_000)
    known = Vocabulary.load(tmp_path / "weights" / "vocabulary.json")
    vocabulary = Vocabulary(known.text_size, 20, 5)  # more image codes and sentinels than it has
    ours = imported_model(tmp_path / "weights", vocabulary)
    match = our_ids(vocabulary, name)
    ids = torch.randint(0, ROWS, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    allowed = expected[0, 0] > torch.finfo(torch.float32).min  # Chameleon forbids image codes there
    assert int((~allowed).sum()) == (11 if name.startswith("chameleon") else 0)
    assert (our_logits(ours, match[ids])[..., match] - expected)[..., allowed].abs().max() <= 1e-5
    theirs.generation_config.eos_token_id = None
    prompt = ids[:1, :20]
    drawn = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY, do_sample=False)
    text = allowed.nonzero()[:, 0]
    assert drawn[0, 20:].tolist() == text[our_greedy(ours, match[prompt], GREEDY, match[text])].tolist()
    rows = theirs.get_input_embeddings().weight
    assert torch.equal(ours.token_embedding.weight[match], rows)


@pytest.mark.parametrize("name", ["opt", "llama", "chameleon"])
def test_a_foreign_tokenizer_encodes_and_decodes_as_before_and_no_text_is_special(name: str, tmp_path: Path) -> None:
    _, theirs = foreign_source(name, tmp_path / "source")
    (tmp_path / "weights").mkdir()
    import_folder(tmp_path / "source", tmp_path / "weights")
    vocabulary = Vocabulary.load(tmp_path / "weights" / "vocabulary.json")
    text = TextTokenizer.load(tmp_path / "weights" / "tokenizer.json")
    assert text.size == vocabulary.text_size
    match = our_ids(vocabulary, name) - vocabulary.text_start
    special = [token for token in theirs.get_vocab() if token in FOREIGN[name][1]]
    for sentence in TEXTS + SENTENCES:
        mine = text.encode(sentence)
        if not any(token in sentence for token in special):
            ids = theirs.encode(sentence, add_special_tokens=False).ids
            assert mine == match[ids].tolist() if ids else mine == []
            assert text.decode(mine) == theirs.decode(ids, skip_special_tokens=False)
    for token in special:
        spelled = text.encode(f"a {token} b")
        assert int(match[theirs.token_to_id(token)]) not in spelled and text.decode(spelled) == f"a {token} b"


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_rows_that_are_like_the_others_and_steal_no_probability(tied: bool, tmp_path: Path) -> None:
    foreign_source("llama", tmp_path / "source", tie_word_embeddings=tied)
    (tmp_path / "weights").mkdir()
    import_folder(tmp_path / "source", tmp_path / "weights")
    known = Vocabulary.load(tmp_path / "weights" / "vocabulary.json")
    vocabulary = Vocabulary(known.text_size, 500, 16)
    model = imported_model(tmp_path / "weights", vocabulary)
    old, new = our_ids(vocabulary, "llama"), torch.arange(vocabulary.image_start, vocabulary.image_end)
    rows = model.token_embedding.weight.detach()
    assert (rows[new].mean(0) - rows[old].mean(0)).abs().max() < 0.05
    assert (rows[[vocabulary.pad, vocabulary.brk, vocabulary.eoss]].std(1) > 0.01).all()  # Llama has none of these
    ratio = rows[new].std(0) / rows[old].std(0)
    assert (ratio / (0.5 if tied else 1.0) - 1).abs().max() < 0.15
    probability = our_logits(model, old[torch.randint(0, ROWS, (4, 50))]).softmax(-1)
    assert (probability[..., new].mean(-1) <= 1.01 * probability[..., old].mean(-1)).all()
    again = imported_model(tmp_path / "weights", vocabulary)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_half_precision_is_copied_bit_for_bit_and_other_text_or_shapes_are_refused(tmp_path: Path) -> None:
    theirs, _ = foreign_source("llama-gqa", tmp_path / "source", dtype="bfloat16")
    (tmp_path / "weights").mkdir()
    import_folder(tmp_path / "source", tmp_path / "weights", shard_bytes=30_000)
    with TensorFiles(tmp_path / "weights") as files:
        assert set(files.dtypes.values()) == {torch.bfloat16}
        name = "blocks.1.attention.out.weight"
        assert torch.equal(files[name], theirs.state_dict()["model.layers.1.self_attn.o_proj.weight"])
    known = Vocabulary.load(tmp_path / "weights" / "vocabulary.json")
    with pytest.raises(UserError, match=r"entries of text, this run's tokenizer 7; use the tokenizer of the weights"):
        imported_model(tmp_path / "weights", Vocabulary(7, 4, 4))
    wider = build_model(ModelConfig(**open_weights(tmp_path / "weights").model | {"ffn_width": 52}), known.size, 9)
    with pytest.raises(UserError, match=r"of another model: blocks.0.ffn.wide.weight has shape \[96, 32\]"):
        load_weights(wider, tmp_path / "weights", known, 0)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ModelConfig(family="llama", picture_grid=4), "model.picture_grid=4: no model of transformers has rows"),
        (ModelConfig(norm_eps=1e-6), "model.norm_eps=1e-06: transformers computes norms of this family with 1e-05"),
        (ModelConfig(family="chameleon", norm_eps=1e-6), "model.norm_eps=1e-06"),
    ],
)
def test_what_transformers_cannot_compute_is_not_exported(config, sentence: str, tokenizer_file: Path, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        export(config, tokenizer_file, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("opt", "llama", "chameleon")}
    for name, folder in folders.items():
        foreign_source(name, folder)
    return folders


SETTINGS = [
    ("llama", {"model_type": "mistral"}, "is of the architecture 'mistral'; `mmtrain import` reads opt, llama"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rotary positions of type 'llama3'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary positions of type 'linear'"),
    ("llama", {"attention_bias": True}, "attention_bias=True is not supported, only False is"),
    ("llama", {"sliding_window": 64}, "sliding_window=64 is not supported"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported, only 'silu' is"),
    ("llama", {"head_dim": 16}, "head_dim=16 is not supported, only 8 is"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
    ("llama", {"num_hidden_layers": 10**9}, "says 1000000000 layers, and there are"),
    ("llama", {"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
    ("llama", {"num_hidden_layers": 1}, "tensor model.layers.1.* is not one of this model"),
    ("llama", {"intermediate_size": 40}, r"gate_proj.weight has shape \[48, 32\], config.json asks for \[40, 32\]"),
    ("llama", {"hidden_size": "32"}, "hidden_size=32 must be a whole number"),
    ("llama", {"num_attention_heads": 5}, "do not fit each other"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight is tied to the embedding, and is another one"),
    ("opt", {"enable_bias": True}, "this OPT has biases or norms with parameters"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 is not supported"),
    ("opt", {"activation_function": "silu"}, "activation_function='silu' is not relu or gelu"),
    ("chameleon", {"rms_norm_eps": 1e-6}, "norms of queries and keys have 1e-05"),
]


def refused(source: Path, tmp_path: Path, sentence: str) -> None:
    """Importing says so in one sentence, and leaves nothing."""
    from mmtrain.config import build_artifact

    with pytest.raises(UserError, match=sentence) as error:
        build_artifact(tmp_path / "weights", lambda folder: import_folder(source, folder))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*weights*"))


@pytest.mark.parametrize(("name", "change", "sentence"), SETTINGS)
def test_what_ours_cannot_compute_is_not_imported(name, change, sentence, sources: dict[str, Path], tmp_path: Path):
    source = shutil.copytree(sources[name], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    if "rope_scaling" in change:
        del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config | change))
    refused(source, tmp_path, sentence)


def shard_with(source: Path, tensor: str) -> Path:
    return source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def damage(source: Path, how: str) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    norm = shard_with(source, "model.norm.weight")
    if how == "pickled":
        for path in source.glob("model*"):
            path.unlink()
        (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif how == "meta":
        for path in source.iterdir():
            path.unlink()
        (source / "consolidated.00.pth").write_bytes(b"\x80\x04.")
    elif how == "cut":
        norm.write_bytes(norm.read_bytes()[:-7])
    elif how == "gone":
        norm.unlink()
    elif how in ("nan", "int8"):
        tensors = load_file(norm)
        weight = tensors["model.norm.weight"]
        weight[3] = torch.nan if how == "nan" else 1
        tensors["model.norm.weight"] = weight.to(torch.int8) if how == "int8" else weight
        save_file(tensors, norm)
    elif how == "outside":
        index = source / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(norm.name, f"../{norm.name}"))
    elif how == "no tokenizer":
        (source / "tokenizer.json").unlink()
    elif how == "unigram":
        unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
        (source / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": unigram, "added_tokens": []}))
    elif how == "id":
        tokenizer["model"]["vocab"]["house"] = 5000
        (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif how == "added":
        (source / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": [3]}))
    elif how == "json":
        (source / "tokenizer.json").write_text(json.dumps(tokenizer)[:-9])


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("pickled", r"holds pickled weights \(pytorch_model.bin\)"),
        ("meta", r"consolidated.00.pth is pickled, which is never opened"),
        ("cut", "cannot be read .* cut or damaged"),
        ("gone", "cannot be read .* missing, cut or damaged"),
        ("nan", "tensor model.norm.weight holds NaN or infinity"),
        ("int8", "tensor model.norm.weight is of type I8"),
        ("outside", r"names '../model.*', which is not a file beside it"),
        ("no tokenizer", "has no tokenizer.json; make one with transformers"),
        ("unigram", "is a tokenizer of type 'Unigram', only BPE is supported"),
        ("id", "entry 'house' has the id 5000, and the model has 344 rows"),
        ("json", "tokenizer.json cannot be read"),
        ("added", "is no tokenizer.json of the tokenizers library"),
    ],
)
def test_a_damaged_folder_is_named_in_one_sentence(how: str, sentence: str, sources: dict[str, Path], tmp_path: Path):
    source = shutil.copytree(sources["llama"], tmp_path / "source")
    damage(source, how)
    refused(source, tmp_path, sentence)


def test_names_of_specials_that_text_has_already_are_changed(tokenizer_file: Path, tmp_path: Path) -> None:
    content = json.loads(tokenizer_file.read_text())
    content["model"]["vocab"]["<eos>"] = 300  # as an entry that was special in the model it was imported from
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = TextTokenizer.load(tmp_path / "tokenizer.json")
    vocabulary = Vocabulary(text.size, 4, 2)
    config = small(ModelConfig(family="llama"))
    (tmp_path / "out").mkdir()
    parameters = {name: p.detach() for name, p in our_model(config, vocabulary).named_parameters()}
    export_folder(config, parameters, vocabulary, tmp_path / "tokenizer.json", 64, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("<eos>")["input_ids"] == [6 + id for id in text.encode("<eos>")]
    assert theirs.convert_tokens_to_ids("<eos>") == 306
    assert theirs("<eos_>")["input_ids"] == [vocabulary.eos] == [SPECIALS.index("<eos>")]
    (tmp_path / "back").mkdir()
    import_folder(tmp_path / "out", tmp_path / "back")
    assert TextTokenizer.load(tmp_path / "back" / "tokenizer.json").fingerprint == text.fingerprint


def test_an_export_that_lost_its_vocabulary_is_read_by_the_names_of_its_tokens(tokenizer_file: Path, tmp_path: Path):
    model = export(FAMILIES["llama-gqa"], tokenizer_file, tmp_path / "out")
    (tmp_path / "out" / "vocabulary.json").unlink()
    (tmp_path / "back").mkdir()
    import_folder(tmp_path / "out", tmp_path / "back")
    padding = VOCABULARY.size - VOCABULARY.sentinel_end  # rows without a name
    known = Vocabulary.load(tmp_path / "back" / "vocabulary.json")
    assert known == Vocabulary(300 + padding, 16, 3)
    rows = imported_model(tmp_path / "back", known).token_embedding.weight
    before = model.token_embedding.weight
    assert torch.equal(rows[: VOCABULARY.text_end], before[: VOCABULARY.text_end])
    ours, theirs = (slice(v.image_start, v.sentinel_end) for v in (known, VOCABULARY))
    assert torch.equal(rows[ours], before[theirs])


def test_an_unknown_token_that_texts_need_stays_text(tmp_path: Path) -> None:
    foreign_source("llama", tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["byte_fallback"] = False
    path.write_text(json.dumps(content))
    (tmp_path / "weights").mkdir()
    import_folder(tmp_path / "source", tmp_path / "weights")
    text = TextTokenizer.load(tmp_path / "weights" / "tokenizer.json")
    assert text.decode(text.encode("a 🙂")) == "a <unk>"
    assert 3 in open_weights(tmp_path / "weights").facts["new_rows"]
    content["model"]["unk_token"] = None
    path.write_text(json.dumps(content))
    refused(tmp_path / "source", tmp_path / "lossy", "cannot spell every text")
