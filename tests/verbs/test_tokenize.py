"""Documents to token shards: in any number of processes, of any kind, from one source or several."""

from pathlib import Path

import numpy as np
import pytest

from mmtrain import cli
from mmtrain.config import Config, DataConfig, ImageTokenizerConfig, TextTokenizerConfig, UserError
from mmtrain.config.compose import compose
from mmtrain.documents import Document, encode_png, image_from_bytes
from mmtrain.shards import TokenShards, write_documents
from mmtrain.tokens import ImageTokenizer, TextTokenizer
from mmtrain.verbs import prepare, stats, verify
from mmtrain.verbs.tokenize import tokenize_documents

SIZE = 16


def picture(rng: np.random.Generator):
    return image_from_bytes(encode_png(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)), 10_000)


@pytest.fixture
def tokenizers(tmp_path: Path) -> tuple[Path, Path]:
    text, image = tmp_path / "text", tmp_path / "image"
    text.mkdir()
    TextTokenizer.train(["some words"], TextTokenizerConfig(vocab_size=260)).save(text / "tokenizer.json")
    ImageTokenizer(ImageTokenizerConfig(levels=[4, 4], width=4), SIZE).save(image)
    return text, image


def test_documents_of_texts_of_pictures_and_of_many_of_both(tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [("only words",), (picture(rng),), tuple(picture(rng) for _ in range(300)), ("a", picture(rng), "b")] * 2
    documents = [Document(f"d{number}", "test", segments, {}) for number, segments in enumerate(rows)]
    write_documents(tmp_path / "documents" / "train", documents)
    write_documents(tmp_path / "documents" / "validation", documents[:1])
    for processes in (1, 2):
        out = tmp_path / f"tokens{processes}"
        out.mkdir()
        config = Config(data=DataConfig(processes=processes, shard_documents=3))
        tokenize_documents(config, tmp_path / "documents", *tokenizers, out)
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert len(files) > 8
    assert all((tmp_path / "tokens1" / name).read_bytes() == (out / name).read_bytes() for name in files)
    shards = TokenShards(out / "train")
    assert [shard.documents for shard in shards.manifest.shards] == [3, 3, 2]
    per_picture = (SIZE // 8) ** 2
    kinds = [[(s.kind, s.length) for s in shards.segments(i)] for i in range(len(shards))]
    assert [kind for kind, _ in kinds[0]] == ["text"] and kinds[1] == [("image", per_picture)]
    assert kinds[2] == [("image", per_picture)] * 300 and [kind for kind, _ in kinds[3]] == ["text", "image", "text"]


def test_tokenizers_take_turns_among_the_sources_of_a_mix(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("few", 1), ("more", 2)):
        path = tmp_path / "conf" / "corpus" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"name: {name}\nkind: shapes\nseed: {seed}\nnum_documents: {8 * seed}\nnum_validation: 4\n")
    words = ["experiment=smoke", "mix={few:1,more:3}", "image_tokenizer.steps=2", "data.processes=1"]
    assert cli.main(["data", *words, "--config-dir", str(tmp_path / "conf")]) == 0
    output = capsys.readouterr().out
    assert "corpus few, more" in output and "train of more" in output
    folders = sorted(path.parent.name + "/" + path.name.partition("-")[0] for path in Path("data").glob("*/*"))
    assert folders == ["few/documents", "few/tokens", "mix/image", "mix/text", "more/documents", "more/tokens"]
    documents = {name: next(Path("data", name).glob("documents-*")) for name in ("few", "more")}
    ids = [document.id for document in prepare._in_turns(documents, "train")]
    assert len(ids) == 24 and ids[:4:2] == ids[1:5:2]  # one of each in turn (scenes are numbered alike)


def test_a_corpus_without_pictures_is_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    write_documents(tmp_path / "train", [Document("a", "test", ("words",), {})])
    write_documents(tmp_path / "validation", [Document("b", "test", ("words",), {})])
    with pytest.raises(prepare.UserError, match=r"no train document of texts has a picture.*image_tokenizer.path"):
        prepare.prepare_image_tokenizer(Config(data_dir=str(tmp_path / "data")), {"texts": tmp_path})


def test_ready_token_shards_take_the_place_of_a_corpus(tokenizers: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    text, image = tokenizers
    documents = [Document(f"d{number}", "test", (f"words {number}",), {}) for number in range(4)]
    for split, some in (("train", documents[:3]), ("validation", documents[3:])):
        write_documents(tmp_path / "documents" / split, some)
    (tmp_path / "ready").mkdir()
    tokenize_documents(Config(), tmp_path / "documents", text, image, tmp_path / "ready")
    words = ["corpus=pairs", "corpus.name=ready", f"corpus.tokens={tmp_path / 'ready'}", f"corpus.image_size={SIZE}"]
    words += ["retrieval=none", f"image_tokenizer.path={image}", f"data_dir={tmp_path / 'data'}"]
    with pytest.raises(UserError, match="text_tokenizer.path"):
        compose(words)
    config = compose([*words, f"text_tokenizer.path={text / 'tokenizer.json'}"])
    found = prepare.prepare(config)
    assert found.documents == {} == found.neighbours and list(found.tokens) == ["ready"]
    here, there = (TokenShards(folder / "train") for folder in (found.tokens["ready"], tmp_path / "ready"))
    assert len(here) == 3 and here.tokens(2).tolist() == there.tokens(2).tolist()
    assert all(books.get("image_tokenizer_encode", 0) == 0 for books in found.flops_by_folder().values())
    with pytest.raises(UserError, match="are elsewhere"):
        verify.main(config, [])
    with pytest.raises(UserError, match="no documents to look at"):
        stats.main(config, [])
    assert cli.main(["data", *words, f"text_tokenizer.path={text / 'tokenizer.json'}"]) == 0
    assert "3 documents" in capsys.readouterr().out
    other = tmp_path / "other.json"
    TextTokenizer.train(["quite another text"], TextTokenizerConfig(vocab_size=260)).save(other)
    with pytest.raises(UserError, match="made with another text"):
        prepare.prepare(compose([*words, f"text_tokenizer.path={other}", f"data_dir={tmp_path / 'again'}"]))
    with pytest.raises(UserError, match="password or a signature"):
        compose([*words, f"text_tokenizer.path={other}", "corpus.tokens=https://me:secret@host/x"])
