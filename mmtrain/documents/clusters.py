"""Near-duplicate clusters of a corpus: from the signatures of all documents, which of them belong together.

Two documents are linked when they are copies, when they share enough of their pictures, or when their texts are
nearly the same; clusters are the connected parts. Everything runs on the distinct contents in the order of their
hashes, so that the order of the corpus changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mmtrain.config import DedupeConfig
from mmtrain.documents.corpus import Account
from mmtrain.documents.signatures import NUM_MINIMA, Signatures, mix

# Pictures whose hashes are near must have near colors, too: flags differ in nothing else. In levels of 256, in the
# worst of 4 x 4 cells; re-encoded and resized copies of 800 drawings and photographs differed by 15 at most.
MOST_COLOR_DIFFERENCE = 24
# A hash of 64 bits in distance + 3 blocks: within the distance, three blocks at least are the same.
SAME_BLOCKS = 3
# Bands of minima are as long as they can be while a pair at the threshold is missed with at most this probability.
MOST_MISSED = 0.1
# In larger buckets what is linked to one candidate is compared with no other (a crowd of copies would take n^2); after
# so many candidates that were not linked to one another the rest is given up, and counted.
LARGE_BUCKET = 64
MOST_LEADERS = 200
COMPARED_AT_ONCE = 1 << 16  # pairs, or pictures in them
ROUNDING = 1e-9

Same = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From two (p,) arrays of indices, (p,) bool: which pairs are near-duplicates."""


@dataclass(frozen=True)
class Clusters:
    """Per document of a corpus (n, in its order) its cluster, and what deduplication leaves out.

    cluster: (n,) int64, the first 63 bits of the smallest content hash in it. duplicate: (n,) bool, an exact copy of
    an earlier document. dropped: (n,) bool, not to be kept, as the configuration says. common_pictures: SHA-256
    (hexadecimal) of the pictures to take out of all documents. num_uncompared: candidates given up in crowds that
    share a trait and nothing else; 0 in every honest corpus.
    """

    cluster: np.ndarray
    duplicate: np.ndarray
    dropped: np.ndarray
    common_pictures: frozenset[str]
    num_uncompared: int

    def book(self, signatures: Signatures, account: Account) -> None:
        """Count the dropped documents in `account`, by reason."""
        for reason, rows in (
            ("exact copy of an earlier document", self.dropped & self.duplicate),
            ("near-duplicate of an earlier document", self.dropped & ~self.duplicate),
        ):
            if rows.any():
                account.skip(reason, signatures.ids[rows.argmax()].decode(), int(rows.sum()))


def find_clusters(signatures: Signatures, config: DedupeConfig) -> Clusters:
    """Cluster the documents of a corpus.

    In memory: about as much as the signatures again, 1.3 GB in all for a million documents with 2.5 million pictures.
    """
    content, first = _distinct(signatures.content)
    graph = _Graph(len(first))
    common: frozenset[str] = frozenset()
    if config.pictures or config.max_picture_uses:
        picture, graph.num_uncompared = _same_pictures(signatures, config.picture_distance)
        sets = _picture_sets(signatures, picture, first)
        if config.max_picture_uses:
            is_common = sets.uses > config.max_picture_uses
            digests = signatures.picture_digest[is_common[picture]]
            common = frozenset(digest.tobytes().hex() for digest in digests)
            sets = sets.where(~is_common[sets.picture])
        if config.pictures:
            _link_by_pictures(graph, sets, config.picture_overlap)
    if config.texts:
        _link_by_texts(graph, signatures, first, config.text_similarity)

    # The label of a cluster is its smallest index in the order of the content hashes.
    smallest = np.ascontiguousarray(signatures.content[first[graph.label]][:, :8]).view(">u8")[:, 0]
    cluster = (smallest >> np.uint64(1)).astype(np.int64)[content]
    rows = np.arange(len(signatures))
    duplicate = first[content] != rows
    dropped = duplicate & config.exact
    if config.near == "drop":
        _, earliest, member = np.unique(cluster, return_index=True, return_inverse=True)
        dropped = earliest[member] != rows
    return Clusters(cluster, duplicate, dropped, common, graph.num_uncompared)


def validation_side(cluster: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, (n,) bool: those of the clusters whose ids hash into the lowest `fraction`.

    cluster: (n,) int64. The side of a cluster does not depend on the others, with one exception for small corpora:
    when one side would be empty and there are two clusters, the one next to the limit moves over. So there is always
    something to train on and, unless the fraction is 0, something to validate on.
    """
    ids, member = np.unique(cluster, return_inverse=True)
    # Hashed again: an id is the smallest of its cluster's hashes, so ids of large clusters are small.
    place = mix(ids.astype(np.uint64)) / 2**64
    held_out = place < fraction
    if len(ids) < 2:
        held_out[:] = False
    elif fraction and not held_out.any():
        held_out[place.argmin()] = True
    elif held_out.all():
        held_out[place.argmax()] = False
    return held_out[member]


class _Graph:
    """Connected parts of n nodes. label: (n,) int64, the smallest node of each node's part."""

    def __init__(self, num_nodes: int) -> None:
        self.label = np.arange(num_nodes)
        self.num_uncompared = 0

    def link(self, a: np.ndarray, b: np.ndarray) -> None:
        """Add the edges a[i] - b[i]: smaller labels are handed on until nothing changes."""
        label = self.label
        while True:
            ends = np.stack([label[a], label[b]])
            apart = ends[0] != ends[1]
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            np.minimum.at(label, ends.max(axis=0)[apart], ends.min(axis=0)[apart])
            while not np.array_equal(jumped := label[label], label):
                label[:] = jumped

    def link_within(self, bucket: np.ndarray, node: np.ndarray, same: Same, leads: np.ndarray | None = None) -> None:
        """Link the nodes of each bucket that are the `same`. bucket, node: (e,), a node may be in several buckets.

        leads: (e,) bool; pairs without a leading entry are not looked at. The work grows with the candidates that are
        not linked: every round compares the first entry of each bucket with its others.
        """
        leads = np.ones(len(node), dtype=bool) if leads is None else leads
        order = np.lexsort((node, ~leads, bucket))
        bucket, node, leads = bucket[order], node[order], leads[order]
        is_first, size = _runs(bucket)
        is_large = size > LARGE_BUCKET
        edges = []
        for _ in range(MOST_LEADERS):
            worth = (size > 1) & np.repeat(leads[is_first], size[is_first])
            bucket, node, leads, is_large = bucket[worth], node[worth], leads[worth], is_large[worth]
            is_first, size = _runs(bucket)
            a, b = np.repeat(node[is_first], size[is_first])[~is_first], node[~is_first]
            if not len(a):
                break
            linked = self.label[a] == self.label[b]
            unknown = np.flatnonzero(~linked)
            for start in range(0, len(unknown), COMPARED_AT_ONCE):
                part = unknown[start : start + COMPARED_AT_ONCE]
                linked[part] = same(a[part], b[part])
            found = unknown[linked[unknown]]
            edges.append((a[found], b[found]))
            rest = np.flatnonzero(~is_first)[~(linked & is_large[~is_first])]
            bucket, node, leads, is_large = bucket[rest], node[rest], leads[rest], is_large[rest]
            is_first, size = _runs(bucket)
        else:
            self.num_uncompared += len(node)
        if edges:
            self.link(np.concatenate([a for a, _ in edges]), np.concatenate([b for _, b in edges]))


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sorted values: which is the first of its run of equals, and how long that run is."""
    is_first = np.append(True, values[1:] != values[:-1])[: len(values)]
    lengths = np.diff(np.append(np.flatnonzero(is_first), len(values)))
    return is_first, np.repeat(lengths, lengths)


def _distinct(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (n, 32) SHA-256: (n,) which of the u distinct ones, in their order, each is, and (u,) the row of its first.

    128 bits are compared, which no two contents share by accident.
    """
    high, low = np.ascontiguousarray(digests[:, :16]).view(">u8").astype(np.uint64).T
    order = np.lexsort((low, high))  # stable: the first of equals stays the first
    is_first = _runs(high[order])[0] | _runs(low[order])[0]
    number = np.empty(len(digests), dtype=np.int64)
    number[order] = np.cumsum(is_first) - 1
    return number, order[is_first]


def _same_pictures(signatures: Signatures, distance: int) -> tuple[np.ndarray, int]:
    """(m,) a number per picture, equal for the same files and for what looks alike; candidates not compared."""
    file, first = _distinct(signatures.picture_digest)
    graph = _Graph(len(first))
    telling = np.flatnonzero(signatures.picture_tells[first])
    hashes = signatures.picture_hash[first]
    colors = signatures.picture_colors[first].astype(np.int16)

    def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
        near = np.flatnonzero(result)
        result[near] = np.abs(colors[a[near]] - colors[b[near]]).max(axis=1) <= MOST_COLOR_DIFFERENCE
        return result

    if distance >= 0:
        num_blocks = distance + SAME_BLOCKS
        edges = [64 * number // num_blocks for number in range(num_blocks + 1)]
        blocks = [(1 << end) - (1 << start) for start, end in zip(edges, edges[1:], strict=False)]
        for kept in combinations(blocks, SAME_BLOCKS):
            graph.link_within(hashes[telling] & np.uint64(sum(kept)), telling, same)
    return graph.label[file], graph.num_uncompared


@dataclass(frozen=True)
class _PictureSets:
    """The pictures of u documents, each once, the rare ones first. start: (u + 1,) where each document's begin."""

    document: np.ndarray
    picture: np.ndarray
    uses: np.ndarray
    num_documents: int

    @property
    def start(self) -> np.ndarray:
        return np.searchsorted(self.document, np.arange(self.num_documents + 1))

    def where(self, kept: np.ndarray) -> "_PictureSets":
        return _PictureSets(self.document[kept], self.picture[kept], self.uses, self.num_documents)


def _picture_sets(signatures: Signatures, picture: np.ndarray, first: np.ndarray) -> _PictureSets:
    """Sets of the distinct documents; uses: of each picture number, in how many of them it is."""
    distinct_of_row = np.full(len(signatures), -1)
    distinct_of_row[first] = np.arange(len(first))
    document = np.repeat(distinct_of_row, signatures.num_pictures)
    document, picture = document[document >= 0], picture[document >= 0]
    order = np.lexsort((picture, document))
    once = order[_runs(picture[order])[0] | _runs(document[order])[0]]
    document, picture = document[once], picture[once]
    uses = np.bincount(picture, minlength=len(signatures.picture_hash))
    order = np.lexsort((picture, uses[picture], document))
    return _PictureSets(document[order], picture[order], uses, len(first))


def _link_by_pictures(graph: _Graph, sets: _PictureSets, overlap: float) -> None:
    """Link the documents whose sets of pictures have at least this Jaccard overlap.

    Sets with that overlap share one of the rarest pictures of each (prefix filtering: Bayardo et al. 2007, the tighter
    prefix of the smaller set: Xiao et al. 2008), so that a picture that is everywhere brings few together.
    """
    start = sets.start
    size = np.diff(start)

    def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if len(a) > 1 and size[a].sum() + size[b].sum() > 16 * COMPARED_AT_ONCE:
            half = len(a) // 2
            return np.concatenate([shared(a[:half], b[:half]), shared(a[half:], b[half:])])
        entries = []
        for side in (a, b):
            pair = np.repeat(np.arange(len(a)), size[side])
            row = np.arange(len(pair)) + np.repeat(start[side] - np.cumsum(size[side]) + size[side], size[side])
            entries.append(pair * len(sets.uses) + sets.picture[row])
        both = np.sort(np.concatenate(entries))
        twice = both[1:][both[1:] == both[:-1]]
        return np.bincount(twice // max(len(sets.uses), 1), minlength=len(a))

    def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        num_shared = shared(a, b)
        return num_shared >= overlap * (size[a] + size[b] - num_shared) - ROUNDING

    place = np.arange(len(sets.document)) - start[sets.document]
    rest = size[sets.document] - place  # pictures from here on
    of_larger = rest >= overlap * size[sets.document] - ROUNDING
    of_smaller = rest >= 2 * overlap / (1 + overlap) * size[sets.document] - ROUNDING
    graph.link_within(sets.picture[of_larger], sets.document[of_larger], same, leads=of_smaller[of_larger])


def _link_by_texts(graph: _Graph, signatures: Signatures, first: np.ndarray, similarity: float) -> None:
    """Link the documents whose MinHashes agree in this share: candidates agree in one whole band (LSH)."""
    row = np.cumsum(signatures.has_minima)[first] - 1
    nodes = np.flatnonzero(signatures.has_minima[first])
    minima = signatures.text_minima
    lengths = (16, 8, 4, 2, 1)
    length = next(r for r in lengths if (1 - similarity**r) ** (NUM_MINIMA // r) <= MOST_MISSED)

    def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (minima[row[a]] == minima[row[b]]).sum(axis=1) >= similarity * NUM_MINIMA - ROUNDING

    for start in range(0, NUM_MINIMA, length):
        band = np.zeros(len(nodes), dtype=np.uint64)
        for column in range(start, start + length):
            band = mix(band + minima[row[nodes], column])
        graph.link_within(band, nodes, same)
