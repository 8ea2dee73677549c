"""The Chameleon family: Llama with norms of queries and keys, CM3leon's successor.

Source: Chameleon team 2024 (arXiv 2405.09818) sec. 2.3. Its 7B has `model.dropout`, its 34B `model.norm_after` and
grouped-query attention; the z-loss of both is `model.z_loss`.
"""

from mmtrain.models.attention import SelfAttention
from mmtrain.models.decoder import Block
from mmtrain.models.llama import GatedFeedForward, Llama


class Chameleon(Llama):
    """The models of the paper."""

    def new_block(self) -> Block:
        c = self.config
        attention = SelfAttention(c, has_qk_norm=True)
        return Block(self.new_norm(), attention, self.new_norm(), GatedFeedForward(c), c.norm_after, c.dropout)
