"""Entries by index: each head of a tensor [heads, tokens, ...] gives those that its row of an index [heads, count] names."""

from __future__ import annotations

import torch
from torch import Tensor


def entries(x: Tensor, index: Tensor) -> Tensor:
    """The entries of x [heads, tokens, ...] at index [rows, count]: a new tensor [rows, count, ...].

    There are as many rows as heads, or several for each head.
    """
    heads, tokens = x.shape[:2]
    apart, step = x.stride()[:2]
    # rows of a flat tensor are copied whole, many times faster than element by element
    flat = tokens > 0 and step > 0 and apart > 0 and apart % step == 0
    apart = apart // step if flat else 1
    starts = torch.arange(0, heads * apart, apart, device=index.device)
    if len(index) > heads:
        starts = starts.repeat_interleave(len(index) // heads)
    if not flat:
        return x[starts[:, None], index]
    one = x.as_strided((apart * (heads - 1) + tokens, *x.shape[2:]), (step, *x.stride()[2:]))
    return one.index_select(0, (index + starts[:, None]).view(-1)).view(*index.shape, *x.shape[2:])


def largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest numbers of the last dimension are, bool; of equals the earlier ones."""
    if count >= x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    bound = x.topk(count).values[..., -1:]
    above, equal = x > bound, x == bound
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def evicted(kept: Tensor, tokens: int) -> Tensor:
    """The index of what is not kept, [heads, tokens - count], ascending, from that of what is, [heads, count]."""
    gone = torch.ones(len(kept), tokens, dtype=torch.bool, device=kept.device).scatter(1, kept, False)
    return gone.nonzero()[:, 1].view(len(kept), -1)
