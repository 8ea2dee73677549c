import numpy as np
import pytest

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import Document, Image, decode_square
from mmtrain.retrieval import encode_document
from mmtrain.retrieval.encode import combine, encode_parts
from mmtrain.retrieval.hashed import encode_picture, encode_text
from tests.retrieval.conftest import COLORS, pair, picture

CONFIG = RetrievalConfig()


def test_document_vectors_have_unit_norm_and_are_always_the_same():
    vector = encode_document(pair(1), CONFIG)
    assert vector.shape == (256,) and vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(vector, encode_document(pair(1), CONFIG))


def test_a_document_with_nothing_in_it_is_zero_and_one_modality_is_enough():
    assert not encode_document(Document("a", "t", (" - ",), {}), CONFIG).any()
    for segments in (("a caption",), (picture("red", 0),)):
        assert np.linalg.norm(encode_document(Document("a", "t", segments, {}), CONFIG)) == pytest.approx(1, abs=1e-5)


def test_texts_that_share_words_or_stems_are_nearer():
    query, same, stem, other = (
        encode_text(text, 256) for text in ("a red fox runs", "red fox", "foxes running", "blue whales")
    )
    assert query @ same > query @ stem > query @ other
    assert abs(query @ other) < 0.25


def test_unrelated_centered_documents_have_cosines_near_zero():
    parts = encode_parts((pair(i) for i in range(60)), CONFIG)
    vectors = combine(parts, parts.means())
    cosines = (vectors @ vectors.T)[~np.eye(60, dtype=bool)]
    assert abs(cosines.mean()) < 0.05
    assert (combine(parts) @ combine(parts).T)[~np.eye(60, dtype=bool)].mean() > 0.3  # what centering is for


def test_pictures_of_one_color_are_nearer():
    vectors = {c: [encode_picture(decode_square(picture(c, i).data, 64), 256) for i in (0, 1)] for c in COLORS}
    for color, (first, second) in vectors.items():
        assert all(first @ second > first @ other[1] for name, other in vectors.items() if name != color)


def test_a_damaged_picture_is_named():
    damaged = Document("doc-7", "t", ("x", Image(b"nothing", 8, 8, "0" * 64, "png")), {})
    with pytest.raises(UserError, match="doc-7"):
        encode_document(damaged, CONFIG)
