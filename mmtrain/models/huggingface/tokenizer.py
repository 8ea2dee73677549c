"""tokenizer.json of BPE: theirs becomes ours for text alone, and ours becomes one over the whole id space.

Text is encoded and decoded by the same merges as before; only numbers change. What is special (`</s>`, image codes)
is in no text: a caption that holds these characters is spelled with ordinary entries.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from mmtrain.config import UserError
from mmtrain.models.huggingface.shards import read_json
from mmtrain.tokens import Vocabulary
from mmtrain.tokens.vocabulary import SPECIALS

IMAGE, SENTINEL = re.compile(r"<image:(\d{1,7})>"), re.compile(r"<sentinel:(\d{1,7})>")
CHAMELEON_IMAGE = re.compile(r"IMGIMG([A-J]{1,7})Z")
CHAMELEON_BREAK = "<racm3:break>"
LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


@dataclass(frozen=True)
class Correspondence:
    """ours[i] is our id of their id i; every one of theirs has one, and no two the same. text: our tokenizer.json."""

    vocabulary: Vocabulary
    ours: list[int]
    text: dict[str, Any]


def correspond(content: dict[str, Any], special: dict[str, int | None], rows: int, place: str) -> Correspondence:
    """Our vocabulary for their tokenizer.json `content` and an embedding of `rows` rows.

    special: their ids of <pad>, <bos>, <eos>, <unk>, where they have one. All ids that are neither special, an image
    code nor a sentinel are text, in ascending order, those without a name too.
    Raises UserError for what is no BPE, and for ids that do not fit.
    """
    names = _names(content, rows, place)
    if content["model"]["unk_token"] is not None and not _spells_everything(content, set(names.values())):
        # It stands for what the merges cannot spell, so it occurs in texts: no special token of ours does.
        special = special | {"<unk>": None}
    place_of: dict[int, str] = {}
    for name in ("<eos>", "<bos>", "<pad>", "<unk>"):  # where one id is several, it is the first of these
        id = special.get(name)
        if id is not None and id not in place_of and name not in place_of.values():
            place_of[id] = name
    reserved = {token["content"] for token in content["added_tokens"] if token["special"]}
    images: dict[int, int] = {}
    sentinels: dict[int, int] = {}
    for id, name in names.items():
        if id in place_of:
            continue
        if code := CHAMELEON_IMAGE.fullmatch(name):
            images[id] = int(code[1].translate(LETTERS))
        elif name == CHAMELEON_BREAK:
            place_of[id] = "<break>"
        elif name == "<eoss>" or (name == "<break>" and name in reserved and CHAMELEON_BREAK not in names.values()):
            place_of[id] = name
        elif name in reserved and (code := IMAGE.fullmatch(name)):
            images[id] = int(code[1])
        elif name in reserved and (code := SENTINEL.fullmatch(name)):
            sentinels[id] = int(code[1])
    for what, numbers in (("image codes", images), ("sentinels", sentinels)):
        if sorted(numbers.values()) != list(range(len(numbers))):
            raise UserError(f"{place}: its {len(numbers)} {what} are not numbered from 0 without holes")
    text_ids = [id for id in range(rows) if not (id in place_of or id in images or id in sentinels)]
    if not text_ids:
        raise UserError(f"{place} has no entry for text")
    vocabulary = Vocabulary(len(text_ids), len(images), len(sentinels))
    ours = {id: SPECIALS.index(name) for id, name in place_of.items()}
    ours |= {id: vocabulary.text_start + i for i, id in enumerate(text_ids)}
    ours |= {id: vocabulary.image_start + code for id, code in images.items()}
    ours |= {id: vocabulary.sentinel_start + code for id, code in sentinels.items()}
    return Correspondence(vocabulary, [ours[id] for id in range(rows)], text_of(content, text_ids, names, place))


def of_ours(content: dict[str, Any], vocabulary: Vocabulary, place: str) -> Correspondence:
    """The correspondence of a folder that `mmtrain export` wrote: every id is its own."""
    names = _names(content, vocabulary.size, place)
    text_ids = list(range(vocabulary.text_start, vocabulary.text_end))
    return Correspondence(vocabulary, list(range(vocabulary.size)), text_of(content, text_ids, names, place))


def text_of(content: dict[str, Any], text_ids: list[int], names: dict[int, str], place: str) -> dict[str, Any]:
    """tokenizer.json of the entries `text_ids` alone, numbered from 0 in their order.

    Special entries among them stay, and no text is encoded as them. Raises UserError where a text would lose
    characters.
    """
    model = content["model"]
    number = {id: i for i, id in enumerate(text_ids)}
    # An entry without a name (rows that pad a matrix) gets one that no merge leads to.
    vocab = {names.get(id, f"<unused:{id}>"): i for id, i in number.items()}
    if len(vocab) != len(text_ids):
        raise UserError(f"{place}: two entries of text have the same name")
    unk = model["unk_token"] if model["unk_token"] in vocab else None
    if unk is None and not _spells_everything(content, set(vocab)):
        raise UserError(f"{place} cannot spell every text: it has neither all bytes nor an unknown token")
    kept = [[left, right] for left, right in model["merges"] if {left, right, left + right} <= vocab.keys()]
    added = [
        token | {"id": vocab[token["content"]]}
        for token in content["added_tokens"]
        if not token["special"] and token["content"] in vocab
    ]
    result = content | {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    result["model"] = model | {"vocab": vocab, "merges": kept, "unk_token": unk}
    return result


def whole_space(content: dict[str, Any], vocabulary: Vocabulary, place: str) -> tuple[dict[str, Any], list[str]]:
    """Our text tokenizer as a tokenizer.json over all our ids, and the names of the six specials in it.

    Specials, image codes and sentinels are added tokens: a prompt may hold them by name.
    """
    names = _names(content, vocabulary.text_size, place)
    taken = set(names.values())

    def free(name: str) -> str:
        while name in taken:  # a corpus about HTML may have made `<eos>` an entry of text
            name = f"{name[:-1]}_>"
        return name

    specials = [free(name) for name in SPECIALS]
    images = [free(f"<image:{i}>") for i in range(vocabulary.image_codes)]
    sentinels = [free(f"<sentinel:{i}>") for i in range(vocabulary.num_sentinels)]
    ids = dict(enumerate(specials))
    ids |= {vocabulary.text_start + id: name for id, name in sorted(names.items())}
    ids |= {vocabulary.image_start + i: name for i, name in enumerate(images)}
    ids |= {vocabulary.sentinel_start + i: name for i, name in enumerate(sentinels)}
    vocab = {name: id for id, name in ids.items()}
    added = [token | {"id": vocab[token["content"]]} for token in content["added_tokens"]]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added += [{"id": vocab[name], "content": name, **flags} for name in (*specials, *images, *sentinels)]
    result = content | {"added_tokens": sorted(added, key=lambda token: token["id"]), "post_processor": None}
    result["model"] = content["model"] | {"vocab": vocab}
    return result, specials


def read_tokenizer(path: Path) -> dict[str, Any]:
    """A tokenizer.json of BPE as the tokenizers library would write it: every key there, and of its type."""
    text = json.dumps(read_json(path))
    try:
        content = json.loads(Tokenizer.from_str(text).to_str())
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"{path} is no tokenizer.json of the tokenizers library ({error})") from error
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(f"{path} is a tokenizer of type {model['type']!r}, only BPE is supported")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise UserError(f"{path}: BPE with marks inside or at the end of words is not supported")
    return content


def write_tokenizer(content: dict[str, Any], path: Path, place: str) -> None:
    """Write tokenizer.json; raises UserError if the library would number its entries otherwise.

    place: the file that it was made from.
    """
    text = json.dumps(content, ensure_ascii=False, indent=1)
    try:
        loaded = Tokenizer.from_str(text)
    except Exception as error:  # as above
        raise UserError(f"{place} cannot be rewritten ({error})") from error
    for token, id in content["model"]["vocab"].items():
        if loaded.token_to_id(token) != id:
            raise UserError(f"{place}: entry {token!r} cannot be numbered {id}")
    path.write_text(text, encoding="utf-8")


def _names(content: dict[str, Any], rows: int, place: str) -> dict[int, str]:
    """Names of ids, those of added tokens among them."""
    names: dict[int, str] = {}
    added = [(token["content"], token["id"]) for token in content["added_tokens"]]
    for name, id in [*content["model"]["vocab"].items(), *added]:
        if id >= rows:
            raise UserError(f"{place}: entry {name[:40]!r} has the id {id}, and the model has {rows} rows")
        if names.setdefault(id, name) != name:
            raise UserError(f"{place}: {names[id][:40]!r} and {name[:40]!r} have the same id {id}")
    return names


def _spells_everything(content: dict[str, Any], vocab: set[str]) -> bool:
    """Whether every text can be spelled: all 256 bytes are entries, and are used."""
    if content["model"]["byte_fallback"] and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        return True
    return _has_byte_level(content["pre_tokenizer"]) and vocab.issuperset(pre_tokenizers.ByteLevel.alphabet())


def _has_byte_level(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") == "ByteLevel" or any(_has_byte_level(p) for p in part.get("pretokenizers") or [])
