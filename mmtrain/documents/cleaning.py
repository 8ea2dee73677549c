"""Rules that clean a document, those of OBELICS (Laurencon et al. 2023, appendix A.1.4 and the published code).

Left out, for they need a model or a long list: language identification, perplexity, flagged and common words, unsafe
pictures, opt-outs. Rules that need the whole corpus are deduplication's (clusters.py).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace

from mmtrain.config import CleanConfig
from mmtrain.documents.corpus import Account
from mmtrain.documents.document import Document, Image

PARAGRAPHS = "\n\n"
REPEATED_CHARACTERS = 10
REPEATED_WORDS = 5
PUNCTUATION = frozenset(",;:?!.")
# Shorter paragraphs, such as headings, need no punctuation; a whole document does.
PUNCTUATED_WORDS = {"paragraph": 12, "document": 0}
# From the first to the last letter between blanks.
WORD = re.compile(r"[^\W\d_](?:\S*[^\W\d_])?")
WORD_OR_MARK = re.compile(r"[\w']+|[,;:?!.]")
STOPWORDS = frozenset(
    """
    a about above across after again against ago all almost along already also although always am among an and another
    any anybody anyone anything are aren't around as at away back be because been before behind being below beneath
    beside besides between beyond both but by can can't cannot could couldn't did didn't do does doesn't doing don't
    down during each either else enough even ever every everybody everyone everything except few for from further get
    gets getting given got had hadn't has hasn't have haven't having he he'd he'll he's her here hers herself him
    himself his how however i i'd i'll i'm i've if in including inside instead into is isn't it it'd it'll it's its
    itself just least less let's like made many may me might mine more most much must my myself near neither never next
    no nobody none nor not nothing now of off often on once one ones only onto or other others our ours ourselves out
    outside over own past per perhaps quite rather same shall she she'd she'll she's should shouldn't since so some
    somebody someone something sometimes still such than that that's the their theirs them themselves then there
    there's these they they'd they'll they're they've this those though through throughout till to together too toward
    towards under unless unlike until up upon us use used very via was wasn't we we'd we'll we're we've were weren't
    what what's whatever when whenever where whereas wherever whether which while who who's whoever whom whose why will
    with within without won't would wouldn't yes yet you you'd you'll you're you've your yours yourself yourselves
    """.split()
)


def clean(document: Document, config: CleanConfig, account: Account) -> Document | None:
    """The document without what the rules of `config` forbid, or None when it falls, or nothing is left.

    Pictures first, then paragraphs (blank lines are between them), then the document that these make. Texts that
    then follow one another become one, a blank line between them. A document that no rule touches is returned as
    it is. meta["pictures"], where a reader gives one name or URL per picture, stays aligned. Everything left out is
    counted in `account`, by rule.
    """
    seen: set[str] = set()

    def picture_fault(image: Image, name: str) -> str:
        repeated = config.picture_once and image.sha256 in seen
        seen.add(image.sha256)
        return "picture repeated in its document" if repeated else _picture_fault(image, name, config)

    cleaned = _filtered(document, picture_fault, lambda text: _text_fault(text, config, "paragraph"), account)
    if cleaned is not None and (fault := _document_fault(cleaned, config)):
        account.skip(fault, document.id)
        return None
    return cleaned


def drop_pictures(document: Document, banned: Collection[str], account: Account) -> Document | None:
    """The document without the pictures of these SHA-256 (hexadecimal), or None when nothing is left."""

    def picture_fault(image: Image, name: str) -> str:
        return "picture that is in too many documents" if image.sha256 in banned else ""

    return _filtered(document, picture_fault, lambda text: "", account)


def _filtered(
    document: Document,
    picture_fault: Callable[[Image, str], str],
    paragraph_fault: Callable[[str], str],
    account: Account,
) -> Document | None:
    """The document without the pictures and paragraphs that have a fault (a phrase), or None when nothing is left."""
    segments: list[str | Image] = []
    names = iter(_picture_names(document))
    kept_names: list[str] = []
    for segment in document.segments:
        if isinstance(segment, Image):
            name = next(names)
            if fault := picture_fault(segment, name):
                account.skip(fault, name or document.id)
            else:
                segments.append(segment)
                kept_names.append(name)
            continue
        kept = []
        for paragraph in segment.split(PARAGRAPHS):
            if fault := paragraph_fault(paragraph):
                account.skip(fault, document.id)
            else:
                kept.append(paragraph)
        if text := PARAGRAPHS.join(kept).strip():
            if segments and isinstance(segments[-1], str):
                segments[-1] += PARAGRAPHS + text
            else:
                segments.append(text)
    if tuple(segments) == document.segments:
        return document
    if not segments:
        account.skip("document with nothing left", document.id)
        return None
    meta = document.meta
    if len(kept_names) < len(document.images) and "pictures" in meta:
        meta = {**meta, "pictures": kept_names}
    return replace(document, segments=tuple(segments), meta=meta)


def _picture_names(document: Document) -> list[str]:
    """URL or file name of each picture as the reader gave them, "" where it did not."""
    num_pictures, meta = len(document.images), document.meta
    names = meta.get("pictures")
    if isinstance(names, list) and len(names) == num_pictures:
        return [str(name) for name in names]
    if num_pictures == 1:
        return [f"{meta.get('url', '')} {meta.get('path', '')}".strip()]
    return [""] * num_pictures


def _picture_fault(image: Image, name: str, config: CleanConfig) -> str:
    shorter, longer = sorted((image.width, image.height))
    if shorter < config.picture_min_side:
        return "picture too small"
    if config.picture_max_side and longer > config.picture_max_side:
        return "picture too large"
    if config.picture_max_aspect and longer > config.picture_max_aspect * shorter:
        return "picture too long or tall"
    if any(word.casefold() in name.casefold() for word in config.picture_banned_words):
        return "picture with a banned word in its name"
    return ""


def _document_fault(document: Document, config: CleanConfig) -> str:
    num_pictures = len(document.images)
    if num_pictures < config.document_min_pictures:
        return "document with too few pictures"
    if config.document_max_pictures and num_pictures > config.document_max_pictures:
        return "document with too many pictures"
    return _text_fault(PARAGRAPHS.join(document.texts), config, "document")


def _text_fault(text: str, config: CleanConfig, unit: str) -> str:
    """What is wrong with a text as a "paragraph" or "document"; an empty one has too few words at most."""

    def limit(rule: str) -> float:
        return getattr(config, f"{unit}_{rule}")

    words = [word.replace("\u2019", "'") for word in WORD.findall(text.casefold())]
    if unit == "paragraph" and not text.strip():
        return ""  # two blank lines in a row
    if len(words) < limit("min_words"):
        return f"{unit} of too few words"
    if limit("max_words") and len(words) > limit("max_words"):
        return f"{unit} of too many words"
    if not text:
        return ""
    if (most := limit("max_character_repetition")) and character_repetition(text) > most:
        return f"{unit} that repeats characters"
    if (most := limit("max_word_repetition")) and word_repetition(words) > most:
        return f"{unit} that repeats words"
    if (most := limit("max_special")) and special_share(text) > most:
        return f"{unit} of too many special characters"
    if (least := limit("min_stopwords")) and _share(sum(word in STOPWORDS for word in words), len(words)) < least:
        return f"{unit} of too few function words"
    if (least := limit("min_punctuation")) and punctuation_share(text, PUNCTUATED_WORDS[unit]) < least:
        return f"{unit} of too little punctuation"
    return ""


def character_repetition(text: str) -> float:
    """Share of the most frequent runs of ten characters among all: of sqrt(n) of the n distinct, or all that repeat."""
    counts = Counter(text[start : start + REPEATED_CHARACTERS] for start in range(len(text) - REPEATED_CHARACTERS + 1))
    repeated = sorted((count for count in counts.values() if count > 1), reverse=True)
    return _share(sum(repeated[: int(len(counts) ** 0.5)]), counts.total())


def word_repetition(words: list[str]) -> float:
    """Share of the runs of five words that occur more than once."""
    runs = zip(*(words[start:] for start in range(REPEATED_WORDS)), strict=False)
    counts = Counter(runs)
    return _share(sum(count for count in counts.values() if count > 1), counts.total())


def special_share(text: str) -> float:
    """Share of the characters that are neither letters nor their accents and vowel signs; blanks count."""
    return _share(sum(not (c.isalpha() or unicodedata.category(c)[0] == "M") for c in text), len(text))


def punctuation_share(text: str, fewest: int) -> float:
    """Share of , ; : ? ! . among words and these marks; 1 where there are fewer than `fewest` of both."""
    found = WORD_OR_MARK.findall(text)
    return _share(sum(item in PUNCTUATION for item in found), len(found)) if len(found) >= fewest else 1.0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
