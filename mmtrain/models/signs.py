"""Warning signs of a training run that is about to diverge, from the forward pass of the steps that ask for them.

Chameleon (arXiv 2405.09818, sec. 2.3): modalities compete by growing norms, long before the loss shows it; it watched
the norm of the last layer's output, and held log Z down. Everything here stays on the device, outside of autograd.
B batch, S sequence, N = B S tokens, D width.
"""

import torch
from torch import Tensor

ROWS = ("output", "log_z", "gradient_special", "gradient_text", "gradient_image")


class Signs:
    """Sums over the tokens of the micro-batches of a step; `sums` add up over ranks."""

    def __init__(self) -> None:
        self._output: Tensor | None = None
        self._loss: Tensor | None = None

    def add_output(self, x_BSD: Tensor, is_token_BS: Tensor) -> None:
        """Of the last block before the final norm; is_token_BS: False on padding."""
        mean_square_BS = torch.linalg.vector_norm(x_BSD.detach(), dim=-1, dtype=torch.float32) ** 2 / x_BSD.shape[-1]
        sums_2 = torch.stack([torch.where(is_token_BS, mean_square_BS, 0).sum(), is_token_BS.sum()]).double()
        self._output = sums_2 if self._output is None else self._output + sums_2

    def add_loss(self, log_z_N: Tensor, gradient_norm_N: Tensor, counted_3N: Tensor) -> None:
        """Of the head; gradient_norm_N: length of d(sum of losses)/d(input of the head) of each token.

        counted_3N: for each modality, the tokens whose target has it and a weight > 0.
        """
        is_target_N = counted_3N.any(0)
        values_4N = torch.cat([log_z_N[None], (gradient_norm_N**2).expand(3, -1)])
        counted_4N = torch.cat([is_target_N[None], counted_3N])
        sums_42 = torch.stack([torch.where(counted_4N, values_4N, 0).sum(1), counted_4N.sum(1)], dim=1).double()
        self._loss = sums_42 if self._loss is None else self._loss + sums_42

    @property
    def sums(self) -> Tensor | None:
        """(5, 2) float64, to add over ranks: sum and number of tokens for each of `ROWS`; None before a forward pass.

        output: mean square of a token's channels. log_z: log Z of a target. gradient_...: squared length of the
        gradient of a target's weighted loss, before any normalization, with respect to the input of the head.
        """
        return None if self._output is None or self._loss is None else torch.cat([self._output[None], self._loss])


def describe_signs(sums: Tensor) -> dict[str, float | None]:
    """The log row of `Signs.sums` of all ranks: roots of the mean squares, and the mean log Z; None without tokens.

    Waits for the device.
    """
    row = {}
    for name, (total, count) in zip(ROWS, sums.tolist(), strict=True):
        mean = total / count if count else None
        row[name if name == "log_z" else f"{name}_rms"] = mean if mean is None or name == "log_z" else mean**0.5
    return row
