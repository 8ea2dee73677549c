"""`mmtrain data browse`: one page with a sample of the documents, their tokens and their neighbours."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmtrain.config import Config, UserError
from mmtrain.config.randomness import random_stream
from mmtrain.documents import Document
from mmtrain.retrieval import window_document
from mmtrain.shards import DocumentShards, TokenShards
from mmtrain.tokens import TokenSegment
from mmtrain.track import closing_box
from mmtrain.track.browse import BrowseData, Shown, write_browse
from mmtrain.track.statistics import EOS_TOKENS, cluster_of
from mmtrain.verbs.inspect import Place, at, find
from mmtrain.verbs.prepared import PreparedCorpus, open_corpus
from mmtrain.verbs.progress import Bar
from mmtrain.verbs.stats import size

PAGE = "browse.html"
NUM_DOCUMENTS = 24
MOST_DOCUMENTS = 2000
NUM_NEIGHBOURS = 4


def main(config: Config, words: list[str]) -> int:
    """Write DATA_DIR/CORPUS/browse.html: the documents that the words name, and a random sample.

    words: a number (how many to draw), ids, SPLIT:INDEX, and .html files (where the page goes).
    """
    paths = [word for word in words if word.endswith(".html")]
    numbers = [int(word) for word in words if word.isascii() and word.isdigit()]
    names = [word for word in words if word not in paths and not (word.isascii() and word.isdigit())]
    if len(paths) > 1 or len(numbers) > 1 or sum(numbers) > MOST_DOCUMENTS:
        raise UserError(
            f"`mmtrain data browse` takes one number of documents (at most {MOST_DOCUMENTS:,}), ids and one .html file"
        )
    corpus = open_corpus(config, with_neighbours=True)
    path = Path(paths[0]) if paths else corpus.folder / PAGE
    places = [find(corpus.documents, name) for name in names]
    places += sample(corpus.documents, sum(numbers) if numbers or names else NUM_DOCUMENTS, config.seed, places)
    write_browse(path, collect(config, corpus, places))
    closing_box("browse", {"open": os.path.relpath(path), "size": size(path.stat().st_size), "documents": len(places)})
    return 0


def sample(documents: Mapping[str, DocumentShards], count: int, seed: int, taken: Sequence[Place] = ()) -> list[Place]:
    """Up to `count` documents drawn evenly from all splits, none twice and none of `taken`; the same for a seed."""
    total = sum(map(len, documents.values()))
    drawn = random_stream("browse", seed).choice(total, min(count + len(taken), total), replace=False)
    places = [place for i in drawn.tolist() if (place := at(documents, i)) not in taken]
    return places[:count]


def collect(config: Config, corpus: PreparedCorpus, places: Sequence[Place]) -> BrowseData:
    """What the page shows of the documents at `places`, read one at a time while the page is written."""
    total = sum(map(len, corpus.documents.values()))
    vocabulary = next(iter(corpus.tokens.values())).vocabulary
    images = [name for split, i in places for name in corpus.documents[split].content(i)["images"]]
    capacity = config.stream.sequence_length - EOS_TOKENS
    fit = sum(int((n <= capacity).sum()) for shards in corpus.tokens.values() for n in shards.lengths())
    facts = [
        *((f"{split}", len(shards)) for split, shards in corpus.documents.items()),
        ("text tokens", sum(shards.manifest.text_tokens for shards in corpus.tokens.values())),
        ("image tokens", sum(shards.manifest.image_tokens for shards in corpus.tokens.values())),
        (f"fit in {config.stream.sequence_length:,} tokens", f"{fit / total:.1%}"),
    ]
    return BrowseData(
        title=f"corpus {', '.join(config.sources)}",
        subtitle=f"{len(places):,} of {total:,} documents, drawn with seed {config.seed}",
        documents=shown(corpus, places, cluster_sizes(corpus.documents, places)),
        num_pictures=sum(name is not None for name in images),
        text=corpus.text,
        image=corpus.image,
        vocabulary=vocabulary,
        sequence_length=config.stream.sequence_length,
        facts=facts,
    )


def cluster_sizes(documents: Mapping[str, DocumentShards], places: Sequence[Place]) -> Counter[str]:
    """Documents of the whole corpus in the near-duplicate clusters of the documents at `places`."""
    wanted = {cluster_of(documents[split].meta(i)) for split, i in places} - {None}
    sizes: Counter[str] = Counter()
    if not wanted:
        return sizes
    with Bar("counting near-duplicates", sum(map(len, documents.values()))) as advance:
        for done, (shards, i) in enumerate(((s, i) for s in documents.values() for i in range(len(s))), start=1):
            cluster = cluster_of(shards.meta(i))
            if cluster is not None and cluster in wanted:
                sizes[cluster] += 1
            advance(done)
    return sizes


def shown(corpus: PreparedCorpus, places: Sequence[Place], clusters: Mapping[str, int]) -> Iterator[Shown]:
    """The documents at `places` with all that the page says about them."""
    with Bar("writing the page", len(places)) as advance:
        for done, (split, i) in enumerate(places):
            advance(done)
            document = corpus.documents[split][i]
            tokens, segments = _tokens(corpus.tokens.get(split), document.id)
            cluster = cluster_of(document.meta)
            cluster_size = clusters[cluster] if cluster is not None else None
            yield Shown(document, split, tokens, segments, cluster_size, _neighbours(corpus, split, i))


def _tokens(shards: TokenShards | None, id: str) -> tuple[np.ndarray | None, Sequence[TokenSegment]]:
    if shards is None:
        return None, ()
    try:
        i = shards.index_of(id)
    except KeyError:
        return None, ()
    return shards.tokens(i), shards.segments(i)


def _neighbours(corpus: PreparedCorpus, split: str, i: int) -> list[tuple[Document, float]] | None:
    found = corpus.neighbours.get(split)
    if found is None:
        return None
    pairs = zip(found.candidates(i)[:NUM_NEIGHBOURS], found.scores(i)[:NUM_NEIGHBOURS], strict=True)
    memory = corpus.memory(split)
    return [(window_document(memory, *found.place(int(j))), float(score)) for j, score in pairs]
