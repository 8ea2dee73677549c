import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config import UserError
from mmtrain.documents import Document
from mmtrain.retrieval import window_tokens, windows_of
from mmtrain.retrieval.windows import cut
from mmtrain.shards import TokenShards, write_tokens
from mmtrain.tokens import TextTokenizer, document_to_tokens
from tests.retrieval.conftest import picture
from tests.stream.conftest import VOCABULARY


@given(st.lists(st.booleans(), max_size=12))
def test_windows_are_all_segments_in_order_with_one_picture_each(is_image):
    bounds = cut(is_image)
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(len(is_image)))
    assert len(bounds) == max(1, sum(is_image))
    if sum(is_image) > 1:
        assert all(sum(is_image[start:stop]) == 1 for start, stop in bounds)
        assert all(is_image[stop - 1] for _, stop in bounds[:-1])


def test_a_document_and_its_tokens_have_the_same_windows(tmp_path):
    class Letters(TextTokenizer):
        def __init__(self) -> None: ...
        def encode(self, text: str) -> list[int]:
            return [ord(letter) - ord("a") for letter in text]

    red, green, blue = (picture(color, 0) for color in ("red", "green", "blue"))
    documents = [
        Document("pair", "t", ("ab", red), {}),
        Document("page", "t", ("a", red, "bc", "", green, blue, "d", "e"), {}),
        Document("text", "t", ("abc", "de"), {}),
    ]

    def tokens(document: Document):
        return document_to_tokens(document, Letters(), [[7, 8]] * len(document.images), VOCABULARY)

    write_tokens(tmp_path, map(tokens, documents), VOCABULARY, "text", "image")
    shards = TokenShards(tmp_path)
    for i, document in enumerate(documents):
        windows = windows_of(document)
        assert len(windows) == (3 if document.id == "page" else 1)
        for number, window in enumerate(windows):
            assert window.id == document.id
            found = window_tokens(shards, i, number, len(windows))
            assert found.tolist() == tokens(window).tokens.tolist()
    with pytest.raises(UserError, match="page has 3 windows, not the 2"):
        window_tokens(shards, 1, 0, 2)
