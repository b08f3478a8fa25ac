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
    return turn(x.float(), angle.cos(), angle.sin()).to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., head_dim] with its two halves, as pairs, turned by angles of this cosine and sine [..., head_dim / 2]."""
    (left, right), turned = x.chunk(2, -1), torch.empty_like(x)
    new_left, new_right = turned.chunk(2, -1)  # in place: new memory takes longer than numbers
    torch.mul(left, cos, out=new_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=new_right).addcmul_(left, sin)
    return turned


def angles(inverse_frequencies: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which `rotated` turns, of positions up to `end` and more, [positions, head_dim / 2], float32.

    They are looked up for all layers once; what they take is the model's and no sequence's.
    """
    frequencies, device = tuple(inverse_frequencies.tolist()), inverse_frequencies.device
    return _angles(frequencies, 1 << max(end - 1, FEWEST - 1).bit_length(), device)


@cache
def _angles(inverse_frequencies: tuple[float, ...], end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.arange(end, device=device).float()[:, None] * torch.tensor(inverse_frequencies, device=device)
    return angle.cos(), angle.sin()
