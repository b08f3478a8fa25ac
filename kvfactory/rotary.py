"""Rotary positions of keys that are stored: turned back, and turned anew."""

from __future__ import annotations

import torch
from torch import Tensor


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
