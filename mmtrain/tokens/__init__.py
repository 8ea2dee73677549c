"""Documents to token ids and back.

In: `Document`s, texts and square pictures. Out: `TokenDocument`s, trained tokenizers, one `Vocabulary`.
It must never know about training sequences, masks or batches, and never unpickle a file.
"""

from mmtrain.tokens.image import ImageTokenizer
from mmtrain.tokens.image_training import train_image_tokenizer
from mmtrain.tokens.layout import TokenDocument, TokenSegment, document_to_tokens, tokens_to_segments
from mmtrain.tokens.precision import has_fast_bf16
from mmtrain.tokens.text import TextTokenizer
from mmtrain.tokens.vocabulary import MODALITIES, Vocabulary

__all__ = [
    "MODALITIES",
    "ImageTokenizer",
    "TextTokenizer",
    "TokenDocument",
    "TokenSegment",
    "Vocabulary",
    "document_to_tokens",
    "has_fast_bf16",
    "tokens_to_segments",
    "train_image_tokenizer",
]
