"""Byte-level BPE: any text to ids and back, without loss."""

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmtrain.config import TextTokenizerConfig, UserError, write_text_atomic
from mmtrain.config.artifact import FINGERPRINT_LENGTH


class TextTokenizer:
    """Text to 0-based ids (the vocabulary adds its offset later) and back.

    Trained here it is byte-level BPE with no special tokens: decode(encode(text)) == text for every text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        # A foreign tokenizer.json may have holes in its ids: the largest id counts, not the number of entries.
        self.size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        self.fingerprint: str = digest[:FINGERPRINT_LENGTH]

    @classmethod
    def train(cls, texts: Iterable[str], config: TextTokenizerConfig) -> "TextTokenizer":
        """Learn `config.vocab_size` entries, the 256 bytes included, from the first `config.max_documents` texts.

        A small corpus may give fewer entries than asked for. Raises UserError if there is no text at all.
        """
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        seen = 0

        def counted() -> Iterable[str]:
            nonlocal seen
            for text in islice(texts, config.max_documents):
                seen += bool(text)
                yield _encodable(text)

        tokenizer.train_from_iterator(counted(), trainer)
        if not seen:
            raise UserError(
                "the corpus has no text to train a text tokenizer on; set text_tokenizer.path or add captions"
            )
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read any tokenizer.json. Raises UserError if the file is missing or is not one."""
        try:
            content = Path(path).read_text(encoding="utf-8")
            return cls(Tokenizer.from_str(content))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise UserError(
                f"cannot read the text tokenizer {path} ({error}); give a tokenizer.json of the tokenizers library"
            ) from error

    def save(self, path: Path) -> None:
        """Write tokenizer.json (atomically)."""
        write_text_atomic(Path(path), self._tokenizer.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, 0-based; [] for the empty text."""
        return self._tokenizer.encode(_encodable(text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        encodings = self._tokenizer.encode_batch([_encodable(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; bytes that are not UTF-8 (a model may write them) become U+FFFD."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)


def _encodable(text: str) -> str:
    """`text` with lone surrogates (legal in JSON, not in UTF-8) replaced by "?"."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text
