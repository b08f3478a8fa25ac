"""How queries scatter around their mean, and what a matrix makes of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import has_vectors
from .rotary import turn

TILE = 64
"""Numbers of the widest tile that products are compiled for."""


def turned_moments(queries: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [heads, head_dim] and covariance [heads, head_dim, head_dim] of queries that are turned, float32.

    Queries [heads, tokens, head_dim]; cosines and sines of their angles are [tokens, head_dim / 2], float32.
    """
    count = queries.shape[1]
    if has_tiles(queries):
        from .numba_moments import turned_sums  # late: nobody else waits for its import

        sums, products = turned_sums(queries, cos, sin)
        mean = sums / count
        return mean, torch.baddbmm(products, mean[:, :, None], mean[:, None], beta=1 / count, alpha=-1)
    means, covariances = [], []
    for one in queries:  # one by one, to stay in the processor's cache
        x = turn(one.float(), cos, sin)
        means.append(x.mean(0))
        covariances.append(torch.addmm(means[-1].outer(means[-1]), x.T, x, beta=-1, alpha=1 / count))
    return torch.stack(means), torch.stack(covariances)


def quadratic(keys: Tensor, matrices: Tensor, vectors: Tensor) -> Tensor:
    """key @ (matrix @ key + vector) of keys [kv_heads, tokens, head_dim], float32.

    Matrices are [query_heads, head_dim, head_dim] and symmetric, vectors [query_heads, head_dim], both float32; those of all
    query heads of a KV head meet its keys, [query_heads, tokens].
    """
    if has_tiles(keys):
        from . import numba_moments  # late, too

        return numba_moments.quadratic(keys, matrices, vectors)
    rows = []
    for own, *of_queries in zip(keys, matrices.chunk(len(keys)), vectors.chunk(len(keys)), strict=True):
        exact = own.float()
        rows += [
            torch.linalg.vecdot(torch.addmm(vector, exact, matrix), exact)
            for matrix, vector in zip(*of_queries, strict=True)
        ]
    return torch.stack(rows)


def has_tiles(x: Tensor) -> bool:
    """Whether products of x [..., head_dim] may be compiled."""
    return x.shape[-1] % TILE == 0 and has_vectors(x.device, x.shape[-1])
