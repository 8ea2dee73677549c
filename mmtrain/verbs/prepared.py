"""Opening what `mmtrain data` made of a corpus; what is missing is made first."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config import Config, UserError
from mmtrain.retrieval import Neighbours
from mmtrain.shards import DocumentShards, TokenShards
from mmtrain.tokens import ImageTokenizer, TextTokenizer
from mmtrain.verbs import prepare


@dataclass(frozen=True)
class PreparedCorpus:
    """The shards of a corpus by split, and what they were made with; of several corpora, by SOURCE/SPLIT.

    facts: what facts.json holds (by source where there are several). neighbours: empty where none were asked for.
    """

    folder: Path
    facts: dict[str, Any]
    documents: dict[str, DocumentShards]
    tokens: dict[str, TokenShards]
    text: TextTokenizer
    image: ImageTokenizer
    neighbours: dict[str, Neighbours]

    def memory(self, split: str) -> DocumentShards:
        """The documents that the neighbours of a split are among."""
        source, slash, _ = split.rpartition("/")
        return self.documents[f"{source}{slash}train"]


def open_corpus(config: Config, with_neighbours: bool = False) -> PreparedCorpus:
    """Build what is missing of the corpus, or corpora, and open it; the neighbours only when asked for.

    Corpora that came as ready token shards have no documents and are left out. Raises UserError if there is no other.
    """
    documents = prepare.prepare_documents(config)
    if not documents:
        names = ", ".join(config.sources)
        raise UserError(f"corpus {names} came as ready token shards: it has no documents to look at")
    text = prepare.prepare_text_tokenizer(config, documents)
    image = prepare.prepare_image_tokenizer(config, documents)
    tokens = prepare.prepare_tokens(config, documents, text, image)
    neighbours = (
        prepare.prepare_neighbours(config, documents, prepare.prepare_encoder(config, documents))
        if with_neighbours
        else {}
    )

    def by_split(folders: dict[str, Path]) -> dict[str, Path]:
        return {
            f"{name}/{split}" if len(documents) > 1 else split: folder / split
            for name, folder in folders.items()
            for split in prepare.SPLITS
        }

    facts = {name: json.loads((folder / "facts.json").read_text()) for name, folder in documents.items()}
    return PreparedCorpus(
        text.parent,
        facts if len(facts) > 1 else next(iter(facts.values())),
        {split: DocumentShards(folder) for split, folder in by_split(documents).items()},
        {split: TokenShards(folder) for split, folder in by_split({name: tokens[name] for name in documents}).items()},
        TextTokenizer.load(text / "tokenizer.json"),
        ImageTokenizer.load(image),
        {split: Neighbours(folder) for split, folder in by_split(neighbours).items()},
    )
