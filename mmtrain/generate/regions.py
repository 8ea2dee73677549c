"""A rectangle of a picture, widened to whole codes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.config import UserError


@dataclass(frozen=True)
class Region:
    """Codes [top, bottom) x [left, right) of a grid of `grid` x `grid` codes, each of `cell` x `cell` pixels."""

    left: int
    top: int
    right: int
    bottom: int
    grid: int
    cell: int

    @classmethod
    def of_pixels(cls, box: Sequence[int], size: int, grid: int) -> "Region":
        """The smallest region that covers `box`, (left, top, right, bottom) in pixels of a picture of `size` pixels.

        Raises UserError for a box that is none, or that leaves the picture.
        """
        if len(box) != 4:
            raise UserError(
                f"generate.region={list(box)} must be [left,top,right,bottom], in pixels of the {size} x {size} picture"
            )
        left, top, right, bottom = box
        if not (0 <= left < right <= size and 0 <= top < bottom <= size):
            raise UserError(
                f"generate.region={list(box)} is no rectangle inside the picture: it needs 0 <= left < right <= {size} "
                f"and 0 <= top < bottom <= {size}, in pixels of the square picture"
            )
        cell = size // grid
        return cls(left // cell, top // cell, -(-right // cell), -(-bottom // cell), grid, cell)

    def runs(self) -> list[tuple[int, int]]:
        """(start, end) of its runs of codes in raster order: one per row, or one in all where the rows are whole."""
        if self.right - self.left == self.grid:
            return [(self.top * self.grid, self.bottom * self.grid)]
        return [(row * self.grid + self.left, row * self.grid + self.right) for row in range(self.top, self.bottom)]

    def paste(self, drawn: np.ndarray, picture: np.ndarray) -> np.ndarray:
        """`picture` with this region out of `drawn`; both (S, S, 3) uint8."""
        rows = slice(self.top * self.cell, self.bottom * self.cell)
        columns = slice(self.left * self.cell, self.right * self.cell)
        pasted = picture.copy()
        pasted[rows, columns] = drawn[rows, columns]
        return pasted
