"""Documents and token documents on disk: indexed webdataset tars with a manifest.

In: an iterable of `Document` or `TokenDocument`. Out: a folder that is complete or refused, and readers that give
any document by its index. It must never end early in silence, unpickle anything, or let a name in an archive
reach the file system.
"""

from mmtrain.shards.manifest import Manifest, ShardInfo
from mmtrain.shards.reader import DocumentShards, TokenShards
from mmtrain.shards.store import join_location, mirror, open_store
from mmtrain.shards.verify import broken_seal, find_fault, manifest_faults, repeated_ids, seal, verify
from mmtrain.shards.writer import (
    content_bytes,
    finish_documents,
    finish_tokens,
    write_document_shard,
    write_documents,
    write_token_shard,
    write_tokens,
)

__all__ = [
    "DocumentShards",
    "Manifest",
    "ShardInfo",
    "TokenShards",
    "broken_seal",
    "content_bytes",
    "find_fault",
    "finish_documents",
    "finish_tokens",
    "join_location",
    "manifest_faults",
    "mirror",
    "open_store",
    "repeated_ids",
    "seal",
    "verify",
    "write_document_shard",
    "write_documents",
    "write_token_shard",
    "write_tokens",
]
