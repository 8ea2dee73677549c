"""Opening what `mmtrain data` made of a corpus; what is missing is made first."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config import Config
from mmtrain.retrieval import Neighbours
from mmtrain.shards import DocumentShards, TokenShards
from mmtrain.tokens import ImageTokenizer, TextTokenizer
from mmtrain.verbs import prepare


@dataclass(frozen=True)
class PreparedCorpus:
    """The shards of a corpus by split, and what they were made with. neighbours: empty where there are none yet."""

    folder: Path
    facts: dict[str, Any]
    documents: dict[str, DocumentShards]
    tokens: dict[str, TokenShards]
    text: TextTokenizer
    image: ImageTokenizer
    neighbours: dict[str, Neighbours]


def open_corpus(config: Config, with_neighbours: bool = False) -> PreparedCorpus:
    """Build what is missing of the corpus and open it; the neighbours only when asked for."""
    documents = prepare.prepare_documents(config)
    text = prepare.prepare_text_tokenizer(config, documents)
    image = prepare.prepare_image_tokenizer(config, documents)
    tokens = prepare.prepare_tokens(config, documents, text, image)
    neighbours = prepare.prepare_neighbours(config, documents) if with_neighbours else None
    return PreparedCorpus(
        documents.parent,
        json.loads((documents / "facts.json").read_text()),
        {split: DocumentShards(documents / split) for split in prepare.SPLITS},
        {split: TokenShards(tokens / split) for split in prepare.SPLITS},
        TextTokenizer.load(text / "tokenizer.json"),
        ImageTokenizer.load(image),
        {split: Neighbours(neighbours / split) for split in prepare.SPLITS} if neighbours else {},
    )
