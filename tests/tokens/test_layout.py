import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import TextTokenizerConfig, UserError
from mmtrain.documents import Document, Image
from mmtrain.tokens import TextTokenizer, TokenSegment, Vocabulary, document_to_tokens, tokens_to_segments

TEXT = TextTokenizer.train(["a red circle"] * 3, TextTokenizerConfig(vocab_size=270))
VOCABULARY = Vocabulary(TEXT.size, 64, 4)
PICTURE = Image(b"", 8, 8, "", "png")
CODES = st.lists(st.integers(0, 63), min_size=1, max_size=6).map(np.array)


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(min_size=1), CODES), max_size=6))
def test_segments_come_back(parts):
    segments = tuple(part if isinstance(part, str) else PICTURE for part in parts)
    codes = [part for part in parts if not isinstance(part, str)]
    laid_out = document_to_tokens(Document("d", "test", segments, {"k": 1}), TEXT, codes, VOCABULARY)
    back = tokens_to_segments(laid_out.tokens, VOCABULARY)
    assert [TEXT.decode(ids.tolist()) if kind == "text" else ids.tolist() for kind, ids in back] == [
        part if isinstance(part, str) else part.tolist() for part in parts
    ]
    assert [segment.kind for segment in laid_out.segments] == [kind for kind, _ in back]
    assert (laid_out.tokens == VOCABULARY.brk).sum() == max(len(parts) - 1, 0)
    for segment, (kind, ids) in zip(laid_out.segments, back, strict=True):
        start = VOCABULARY.text_start if kind == "text" else VOCABULARY.image_start
        piece = laid_out.tokens[segment.start : segment.start + segment.length]
        assert np.array_equal(piece.astype(int) - start, ids)


def test_layout_of_a_pair():
    document = Document("d", "test", ("a", PICTURE), {})
    laid_out = document_to_tokens(document, TEXT, [np.array([[0, 63], [1, 2]])], VOCABULARY)
    image = VOCABULARY.image_start
    expected = [6 + TEXT.encode("a")[0], VOCABULARY.brk, image, image + 63, image + 1, image + 2]
    assert laid_out.tokens.tolist() == expected and laid_out.tokens.dtype == np.uint16
    assert laid_out.segments == (TokenSegment("text", 0, 1), TokenSegment("image", 2, 4))


def test_empty_text_leaves_no_stray_break():
    laid_out = document_to_tokens(Document("d", "test", ("", PICTURE), {}), TEXT, [np.array([5])], VOCABULARY)
    assert laid_out.tokens.tolist() == [VOCABULARY.image_start + 5]


def test_codes_of_another_tokenizer_are_refused():
    document = Document("d", "test", (PICTURE,), {})
    with pytest.raises(UserError, match="image ids outside"):
        document_to_tokens(document, TEXT, [np.array([64])], VOCABULARY)
    with pytest.raises(UserError, match="1 images but codes for 0"):
        document_to_tokens(document, TEXT, [], VOCABULARY)


def test_model_output_without_breaks_is_split_by_modality():
    image = VOCABULARY.image_start
    written = np.array([VOCABULARY.eos, 7, 8, image, image + 1, VOCABULARY.sentinel_start, image + 2, VOCABULARY.eoss])
    found = [(kind, ids.tolist()) for kind, ids in tokens_to_segments(written, VOCABULARY)]
    assert found == [("text", [1, 2]), ("image", [0, 1]), ("image", [2])]
