"""Cleaning rules: each finds what it names, counts it, and leaves everything else as it was."""

from dataclasses import replace

import numpy as np
import pytest

from mmtrain.config import CleanConfig
from mmtrain.config.compose import compose
from mmtrain.documents import Document, encode_png, image_from_bytes
from mmtrain.documents.cleaning import (
    character_repetition,
    clean,
    drop_pictures,
    punctuation_share,
    special_share,
    word_repetition,
)
from mmtrain.documents.corpus import Account

OBELICS = compose(["clean=obelics"]).clean
PROSE = (
    "We walked along the river until it was dark, and then we sat down on the old bench by the mill. The water was "
    "so quiet that you could hear the bats above us; nobody wanted to go home before the moon came up."
)
OTHER = "She has been at the market since six in the morning, and there is still no bread to be had for us."
KEYWORDS = "cheap holiday flights hotels rental cars insurance deals Mallorca Tenerife Ibiza discount vouchers online"


def picture(seed: int, width: int = 200, height: int = 160):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return image_from_bytes(encode_png(pixels.repeat(50, 0).repeat(50, 1)[:height, :width]), 10**7)


def document(*segments, **meta) -> Document:
    return Document("d-1", "test", segments, meta)


def cleaned(given: Document, **rules):
    account = Account()
    return clean(given, replace(CleanConfig(), **rules), account), dict(account.skipped)


def test_without_rules_a_document_is_the_same_object():
    odd = document("  a\n\n\n\nb ", picture(0, 1, 1), picture(0, 1, 1), "!!!", url="http://x/porn/logo.png")
    assert clean(odd, compose([]).clean, Account()) is odd
    assert clean(odd, replace(CleanConfig(), paragraph_max_words=9), Account()) is odd


def test_prose_with_pictures_passes_the_rules_of_obelics():
    good = document(PROSE, picture(1), OTHER, picture(2))
    account = Account()
    assert clean(good, OBELICS, account) is good
    assert not account.skipped


@pytest.mark.parametrize(
    ("rules", "bad", "reason"),
    [
        ({"picture_min_side": 150}, picture(3, 300, 149), "picture too small"),
        ({"picture_max_side": 300}, picture(3, 301, 200), "picture too large"),
        ({"picture_max_aspect": 2.0}, picture(3, 160, 321), "picture too long or tall"),
        ({"picture_once": True}, picture(1), "picture repeated in its document"),
    ],
)
def test_bad_pictures_go_and_their_neighbours_join(rules, bad, reason):
    result, counts = cleaned(document(picture(1, 300, 200), picture(1), "a", bad, "b"), **rules)
    assert result.segments == (picture(1, 300, 200), picture(1), "a\n\nb")
    assert counts == {reason: 1}


def test_limits_themselves_are_allowed():
    edge = document(picture(3, 150, 300))
    assert cleaned(edge, picture_min_side=150, picture_max_side=300, picture_max_aspect=2.0)[0] is edge


def test_banned_words_are_looked_for_in_the_names_that_readers_gave():
    alone = document("a", picture(1), url="https://x.org/LOGO.png")
    assert cleaned(alone, picture_banned_words=["logo"])[0].segments == ("a",)
    many = document(picture(1), "a", picture(2), picture(3), pictures=["a/1.png", "a/icon.png", "b/3.png"])
    result, counts = cleaned(many, picture_banned_words=["logo", "Icon"])
    assert result.images == [picture(1), picture(3)] and result.meta["pictures"] == ["a/1.png", "b/3.png"]
    assert many.meta["pictures"] == ["a/1.png", "a/icon.png", "b/3.png"], "the given document was changed"
    assert counts == {"picture with a banned word in its name": 1}


@pytest.mark.parametrize(
    ("rules", "bad", "reason"),
    [
        ({"min_words": 4}, "Read more \u2192 2024", "of too few words"),
        ({"max_words": 60}, "the end of it all " * 13, "of too many words"),
        ({"max_character_repetition": 0.1}, "Haha, " + "ha" * 40, "that repeats characters"),
        ({"max_word_repetition": 0.1}, "one two three four five six. " * 3, "that repeats words"),
        ({"max_special": 0.3}, "1024 x 768 = 786432 (ok) #12 [3] <4>", "of too many special characters"),
        ({"min_stopwords": 0.3}, KEYWORDS, "of too few function words"),
        ({"min_punctuation": 0.001}, KEYWORDS, "of too little punctuation"),
    ],
)
def test_bad_paragraphs_and_documents_go(rules, bad, reason):
    rules_of = {unit: {f"{unit}_{rule}": value for rule, value in rules.items()} for unit in ("paragraph", "document")}
    result, counts = cleaned(document(f"{PROSE}\n\n{bad}\n\n{OTHER}", picture(1)), **rules_of["paragraph"])
    assert result.segments == (f"{PROSE}\n\n{OTHER}", picture(1))
    assert counts == {f"paragraph {reason}": 1}
    assert cleaned(document(bad, picture(1)), **rules_of["document"]) == (None, {f"document {reason}": 1})
    assert cleaned(document(PROSE, picture(1)), **rules_of["document"])[1] == {}


def test_a_document_of_pictures_alone_has_too_few_words_at_most():
    pictures = document(picture(1))
    rules = ("document_max_special", "document_min_stopwords", "document_min_punctuation")
    assert cleaned(pictures, **dict.fromkeys(rules, 0.5))[0] is pictures
    assert cleaned(pictures, document_min_words=1) == (None, {"document of too few words": 1})


def test_number_of_pictures_is_judged_after_bad_ones_are_gone():
    given = document(PROSE, picture(1), picture(2, 10, 10))
    assert cleaned(given, picture_min_side=20, document_max_pictures=1)[0].images == [picture(1)]
    assert cleaned(given, document_max_pictures=1)[1] == {"document with too many pictures": 1}
    assert cleaned(given, picture_min_side=170, document_min_pictures=1)[1] == {
        "picture too small": 2,
        "document with too few pictures": 1,
    }


def test_nothing_left_is_counted():
    assert cleaned(document(picture(1)), picture_min_side=900)[1] == {
        "picture too small": 1,
        "document with nothing left": 1,
    }


def test_pictures_named_by_hash_are_dropped():
    account = Account()
    result = drop_pictures(document("a", picture(1), "b", picture(2)), {picture(1).sha256}, account)
    assert result.segments == ("a\n\nb", picture(2))
    assert account.skipped == {"picture that is in too many documents": 1}


def test_shares():
    assert special_share("ab 1") == 0.5 and special_share("हिंदी") == 0
    assert word_repetition(list("abcdeabcde")) == 2 / 6
    assert character_repetition("abcdefghij" * 2) == pytest.approx(2 / 11)  # 10 distinct, 1 of them twice
    assert character_repetition("short") == word_repetition([]) == 0
    assert punctuation_share("a, b. c", 0) == 2 / 5 and punctuation_share("a, b. c", 6) == 1


def test_hostile_text_takes_no_time():
    for text in ("!" * 200_000, "a" + "-" * 200_000 + " ", ("a" * 50 + "1") * 4000, "\n\n" * 100_000):
        clean(document(text), OBELICS, Account())
