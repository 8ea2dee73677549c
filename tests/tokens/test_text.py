import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import TextTokenizerConfig, UserError
from mmtrain.tokens import TextTokenizer

TEXTS = ["a red circle above a blue star", "two green squares on a white background", "ein roter Kreis", "赤い円"] * 5
TOKENIZER = TextTokenizer.train(TEXTS, TextTokenizerConfig(vocab_size=320))


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back_whole(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= id < TOKENIZER.size for id in ids)


def test_training_compresses_and_is_deterministic():
    assert len(TOKENIZER.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert TextTokenizer.train(TEXTS, TextTokenizerConfig(vocab_size=320)).fingerprint == TOKENIZER.fingerprint


def test_batch_equals_single():
    assert TOKENIZER.encode_batch(TEXTS) == [TOKENIZER.encode(text) for text in TEXTS]


def test_saved_tokenizer_gives_the_same_ids(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])


def test_unreadable_file_and_empty_corpus_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        TextTokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="cannot read"):
        TextTokenizer.load(tmp_path / "bad.json")
    with pytest.raises(UserError, match="no text"):
        TextTokenizer.train([], TextTokenizerConfig())


def test_lone_surrogate_from_json_does_not_stop_encoding():
    assert TOKENIZER.decode(TOKENIZER.encode("a \ud800 b")) == "a ? b"
