"""How attention keeps the documents of a packed batch apart: decided once per batch, used in every layer.

B batch, S sequence, N documents (of one row, or of the batch) of at most L tokens.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mmtrain.config import UserError


class Packing(NamedTuple):
    """One of four ways: a dense mask, one document per row, the blocks of a mask, or where documents begin.

    mask: (B, 1, S, S) bool of `document_mask`. positions_NL: int64, where in the flattened (B S) batch each token of a
    document stands; the last one repeats up to L. slots: (B S,) int64, the way back; padding points to slot 0, which
    is harmless, since nothing attends to padding and no loss falls on it. blocks: FlexAttention's. bounds: (n,) int32,
    0, where in the flattened batch the documents begin, and B S; equal ones hold an empty document between them.
    """

    mask: Tensor | None = None
    positions_NL: Tensor | None = None
    slots: Tensor | None = None
    blocks: BlockMask | None = None
    bounds: Tensor | None = None


def document_mask(document_BS: Tensor) -> Tensor:
    """(B, 1, S, S) bool, True where position s may look at position t: same document and t <= s.

    Padding (document -1) forms a document of its own, so that no row of the softmax is empty.
    """
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril_()[:, None]


def pack_documents(document_BS: Tensor, attention: str = "auto", starts_BN: Tensor | None = None) -> Packing:
    """The packing of a batch for a backend of `model.attention`; starts_BN: `document_starts`, which varlen needs.

    auto: on a CPU the cheaper of scores of N L^2 by document, or of B S^2 under a mask; on a GPU always the mask: the
    layout depends on the data, and reading it there would stop the step. Where the kernels of flex and varlen do not
    work (a run of theirs that is looked at on a CPU, or in float32), the mask gives the same.
    """
    is_cpu = document_BS.device.type == "cpu"
    if attention == "auto" and is_cpu:
        return _one_per_row(document_BS)
    if attention == "flex" and not is_cpu:
        return Packing(blocks=document_blocks(document_BS))
    if attention == "varlen" and starts_BN is not None:
        return Packing(bounds=document_bounds(starts_BN, document_BS.shape[1]))
    return Packing(document_mask(document_BS))


def _one_per_row(document_BS: Tensor) -> Packing:
    """Documents laid out one per row, or the mask where that means fewer scores."""
    B, S = document_BS.shape
    starts = _begins(document_BS).flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([B * S]))
    is_document = document_BS.flatten()[starts] >= 0
    starts, lengths = starts[is_document], lengths[is_document]
    longest = int(lengths.max()) if len(lengths) else 0
    if not longest or len(starts) * longest**2 >= B * S**2:
        return Packing(document_mask(document_BS))
    offsets = torch.arange(longest)
    positions_NL = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    is_token_NL = offsets < lengths[:, None]
    slots = torch.zeros(B * S, dtype=torch.int64)
    slots[positions_NL[is_token_NL]] = is_token_NL.flatten().nonzero()[:, 0]
    return Packing(None, positions_NL, slots)


def document_blocks(document_BS: Tensor) -> BlockMask:
    """`document_mask` as the blocks that FlexAttention computes in full, in part, or not at all."""
    B, S = document_BS.shape

    def sees(b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return (document_BS[b, s] == document_BS[b, t]) & (s >= t)

    return create_block_mask(sees, B, None, S, S, device=document_BS.device)


def document_starts(document_BS: Tensor) -> Tensor:
    """(B, N) int32: the columns where the documents of each row begin, then S up to the most of any row.

    Of a batch on the CPU, before it moves: on a GPU their number would have to be waited for. A batch can be cut along
    its rows afterwards. Padding counts as a document.
    """
    is_start_BS = _begins(document_BS)
    number_BS = is_start_BS.cumsum(1) - 1
    B, S = document_BS.shape
    starts_BN = torch.full((B, int(number_BS.max()) + 1), S, dtype=torch.int32)
    rows, columns = is_start_BS.nonzero(as_tuple=True)
    starts_BN[rows, number_BS[rows, columns]] = columns.int()
    return starts_BN


def document_bounds(starts_BN: Tensor, sequence_length: int) -> Tensor:
    """(B N + 1,) int32: where in the flattened batch documents begin and the last one ends, without a wait."""
    B = starts_BN.shape[0]
    offsets_B1 = torch.arange(B, device=starts_BN.device, dtype=torch.int32)[:, None] * sequence_length
    return F.pad((starts_BN + offsets_B1).flatten(), (0, 1), value=B * sequence_length)


def _begins(document_BS: Tensor) -> Tensor:
    """(B, S) bool: whether a document, or padding, begins here."""
    is_start_BS = torch.ones_like(document_BS, dtype=torch.bool)
    is_start_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return is_start_BS


def check_attention(attention: str, device: torch.device) -> None:
    """Raise UserError where `model.attention` cannot train on this device with this torch."""
    if attention not in ("flex", "varlen"):
        return
    instead = "use model.attention=auto"
    if device.type != "cuda":
        raise UserError(f"model.attention={attention} trains on CUDA alone, not on {device.type}; {instead}")
    if attention == "flex":
        return
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (slow to import)

    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"model.attention=varlen needs an Ampere GPU or a newer one, not a {name}; {instead}")
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        raise UserError(f"model.attention=varlen needs torch 2.11 or newer, not {torch.__version__}; {instead}")
