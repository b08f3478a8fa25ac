"""Rotary positions of keys that are stored: turned back, and turned anew."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FEWEST = 1024
"""Positions whose angles are looked up together, at least."""


def rotated(x: Tensor, shift: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotated x [heads, tokens, head_dim] as if its positions were larger by shift [heads or 1, tokens], in its dtype.

    `inverse_frequencies` [head_dim / 2] are the angles of one position.
    """
    angle = shift.float()[..., None] * inverse_frequencies.float()
    cos, sin = angle.cos(), angle.sin()
    left, right = x.float().chunk(2, -1)
    turned = torch.empty(x.shape, device=x.device)
    turned_left, turned_right = turned.chunk(2, -1)
    torch.mul(left, cos, out=turned_left).addcmul_(
        right, sin, value=-1
    )  # in place: new memory takes longer than numbers
    torch.mul(right, cos, out=turned_right).addcmul_(left, sin)
    return turned.to(x.dtype)


def angles(inverse_frequencies: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which `rotated` turns, of positions up to `end` and more, [positions, head_dim / 2], float32.

    They are looked up for all layers once; what they take is the model's and no sequence's.
    """
    return _angles(tuple(inverse_frequencies.tolist()), 1 << max(end - 1, FEWEST - 1).bit_length())


@cache
def _angles(inverse_frequencies: tuple[float, ...], end: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(end).float()[:, None] * torch.tensor(inverse_frequencies)
    return angle.cos(), angle.sin()
