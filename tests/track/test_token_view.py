"""Tokens as a person looks at them: pieces that join to the text, a strip in proportion, codes told apart."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config import TextTokenizerConfig
from mmtrain.tokens import TextTokenizer, TokenSegment
from mmtrain.track.token_view import code_grid, code_map, piece_attributes, pieces, strip

TOKENIZER = TextTokenizer.train(["the cat sat on the mat, naïve 猫"] * 3, TextTokenizerConfig(vocab_size=280))


@given(st.text(max_size=40) | st.text("\ufffd猫é🐈a \n", max_size=20))
def test_pieces_join_to_the_text_and_keep_every_token(words):
    ids = TOKENIZER.encode(words)
    found = list(pieces(ids, TOKENIZER.decode))
    assert "".join(piece for _, piece in found) == TOKENIZER.decode(ids)
    assert [id for group, _ in found for id in group] == ids


def test_a_character_of_several_tokens_is_one_piece_and_others_are_split():
    found = list(pieces(TOKENIZER.encode("cat 🐈!"), TOKENIZER.decode))
    assert [piece for _, piece in found][-2:] == ["🐈", "!"]
    assert len(found[-2][0]) == 4 and all(len(group) == 1 for group, _ in found[:1])


def test_a_tokenizer_that_writes_spaces_only_between_tokens_keeps_them():
    words = ["red", "cats", "sit"]
    found = list(pieces([0, 1, 2], lambda ids: " ".join(words[id] for id in ids)))
    assert found == [([0], "red"), ([1], " cats"), ([2], " sit")]


def test_attributes_hold_ids_of_the_vocabulary_and_escaped_pieces():
    ids = TOKENIZER.encode('"<b>\n')
    attributes = piece_attributes(ids, 7, 6, TOKENIZER.decode)
    element = ElementTree.fromstring(f"<p {attributes.replace(chr(10), '&#10;')}/>").attrib
    assert element["data-first"] == "7" and element["data-ids"].split() == [str(id + 6) for id in ids]
    assert element["data-pieces"].split("\n") == ['"', "<", "b", ">", "↵"]


def test_the_strip_is_in_proportion_and_marks_every_end_of_a_sequence():
    source = strip(100, [TokenSegment("text", 0, 30), TokenSegment("image", 31, 69)], 40)
    bars = re.findall(r'class="(text|image)" x="(\d+)" y="0" width="(\d+)"', source)
    assert bars == [("text", "0", "30"), ("image", "31", "69")]
    assert re.findall(r'<line x1="(\d+)"', source) == ["40", "80"] and 'viewBox="0 -1 100 12"' in source
    assert 'viewBox="0 -1 512 12"' in strip(100, [], 512)


@pytest.mark.parametrize(("length", "shape"), [(16, (4, 4)), (15, (1, 15))])
def test_codes_are_read_row_by_row_and_equal_ones_look_equal(length, shape):
    codes = np.arange(length) % 5
    grid = code_grid(codes)
    assert grid.shape == shape and grid.reshape(-1).tolist() == codes.tolist()
    colors = code_map(grid).reshape(-1, 3)
    assert len(np.unique(colors, axis=0)) == 5 and all((colors[i] == colors[i % 5]).all() for i in range(length))


def test_pieces_that_look_like_a_secret_only_when_torn_apart_stay_in_line():
    words = ["token", "=" * 20, "x"]
    attributes = piece_attributes([0, 1, 2], 0, 6, lambda ids: "".join(words[id] for id in ids))
    assert attributes.endswith('data-pieces="token\n====================\nx"')
