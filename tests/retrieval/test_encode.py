import numpy as np
import pytest

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import Document, Image, decode_square
from mmtrain.retrieval import open_encoder
from mmtrain.retrieval.encode import Encoded, combine, encode_documents, mean_vectors
from mmtrain.retrieval.hashed import encode_picture, encode_text
from tests.retrieval.conftest import COLORS, pair, picture

ENCODER = open_encoder(RetrievalConfig())
ZERO = np.zeros((2, 256), np.float32)


def vectors(*documents: Document, means: np.ndarray = ZERO) -> np.ndarray:
    encoded = encode_documents(documents, ENCODER)
    return combine(encoded.text, encoded.image, means)


def test_document_vectors_have_unit_norm_and_are_always_the_same():
    (vector,) = vectors(pair(1))
    assert vector.shape == (256,) and vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(vector, vectors(pair(1))[0])


def test_a_document_with_nothing_in_it_is_zero_and_one_modality_is_enough():
    assert not vectors(Document("a", "t", (" - ",), {})).any()
    for segments in (("a caption",), (picture("red", 0),)):
        assert np.linalg.norm(vectors(Document("a", "t", segments, {}))) == pytest.approx(1, abs=1e-5)


def test_the_vector_is_the_mean_of_the_unit_vectors_of_its_parts():
    text, image = (vectors(Document("a", "t", (segment,), {}))[0] for segment in pair(1).segments)
    assert np.allclose(vectors(pair(1))[0], (text + image) / np.linalg.norm(text + image), atol=1e-3)


def test_texts_that_share_words_or_stems_are_nearer():
    query, same, stem, other = (
        encode_text(text, 256) for text in ("a red fox runs", "red fox", "foxes running", "blue whales")
    )
    assert query @ same > query @ stem > query @ other
    assert abs(query @ other) < 0.25


def test_unrelated_centered_documents_have_cosines_near_zero():
    documents = [pair(i) for i in range(60)]
    means = mean_vectors([encode_documents(documents, ENCODER)], 256)
    off = ~np.eye(60, dtype=bool)
    centered, plain = vectors(*documents, means=means), vectors(*documents)
    assert abs((centered @ centered.T)[off].mean()) < 0.05
    assert (plain @ plain.T)[off].mean() > 0.3  # what centering is for


def test_pictures_of_one_color_are_nearer():
    found = {c: [encode_picture(decode_square(picture(c, i).data, 64), 256) for i in (0, 1)] for c in COLORS}
    for color, (first, second) in found.items():
        assert all(first @ second > first @ other[1] for name, other in found.items() if name != color)


def test_query_dropout_leaves_words_out_of_the_text_query_alone():
    documents = [pair(i) for i in range(20)]
    whole, dropped, again, other = (
        encode_documents(documents, ENCODER, query_dropout=share, seed=seed)
        for share, seed in ((0.0, 0), (0.5, 0), (0.5, 0), (0.5, 1))
    )
    assert np.array_equal(dropped.queries, again.queries) and not np.array_equal(dropped.queries, other.queries)
    assert not np.array_equal(dropped.queries[:, 0], whole.queries[:, 0])
    assert np.array_equal(dropped.queries[:, 1], whole.queries[:, 1])
    assert np.array_equal(dropped.text, whole.text)


def test_columns_are_saved_and_a_file_cut_short_is_refused(tmp_path):
    encoded = encode_documents([pair(i) for i in range(3)], ENCODER, first=5)
    assert encoded.windows.tolist() == [[5, 0, 1], [6, 0, 1], [7, 0, 1]]
    path = tmp_path / "part.npz"
    encoded.save(path)
    assert all(np.array_equal(getattr(Encoded.load(path), name), column) for name, column in vars(encoded).items())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="no encoded documents"):
        Encoded.load(path)


def test_a_damaged_picture_is_named():
    damaged = Document("doc-7", "t", ("x", Image(b"nothing", 8, 8, "0" * 64, "png")), {})
    with pytest.raises(UserError, match="doc-7"):
        vectors(damaged)
