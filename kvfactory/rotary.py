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
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)
