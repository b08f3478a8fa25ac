"""Quantisation to levels that are not equally far apart, in ranges that leave outliers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .columns import Column
from .indexing import entries
from .packing import Sparse, pack, unpack

NORMAL_OFFSET = 0.9677083
"""Where the outermost level of a normal distribution lies, as a quantile: the one that NormalFloat uses."""


def uniform_levels(bits: int) -> Tensor:
    """2 ** bits levels from -1 to 1, equally far apart, float32."""
    return torch.linspace(-1, 1, 2**bits)


def normal_levels(bits: int) -> Tensor:
    """NormalFloat's 2 ** bits levels: quantiles of a normal distribution, -1, 0 and 1 among them, ascending, float32."""
    half = 2 ** (bits - 1)

    def side(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(NORMAL_OFFSET, 0.5, count + 1, dtype=torch.float64)[:-1])

    above, below = side(half), side(half - 1)
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above])
    return (levels / levels.abs().max()).sort().values.float()


def cluster_levels(x: Tensor, count: int, rounds: int = 50) -> Tensor:
    """Centres of `count` clusters of numbers [n], by k-means from their quantiles, ascending, float32."""
    x = x.double().sort().values
    sums = torch.cat([x.new_zeros(1), x.cumsum(0)])
    centres = x[((torch.arange(count) + 0.5) / count * len(x)).long()]
    for _ in range(rounds):
        edges = torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(x))])
        sizes = edges.diff()
        centres = torch.where(sizes > 0, sums[edges].diff() / sizes.clamp(min=1), centres)
    return centres.float()


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the level next to each number, int64."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def normalised(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Numbers of a range as -1..1; 0 where it is empty."""
    half = (upper - lower) / 2
    return torch.where(half > 0, (x - (upper + lower) / 2) / half, 0)


def dynamic_outliers(x: Tensor, share: float, dim: int = -1) -> Tensor:
    """The numbers of each vector at or beyond its quantiles, half of the share at each end, bool.

    None for a share of 0; otherwise all of a vector of two or fewer.
    """
    if not share:
        return torch.zeros_like(x, dtype=torch.bool)
    low, high = torch.quantile(x.float(), x.new_tensor([share / 2, 1 - share / 2]).float(), dim=dim, keepdim=True)
    return (x <= low) | (x >= high)


def inner_range(x: Tensor, outlying: Tensor, dim: int = -1) -> Tensor:
    """The least and the greatest number of each vector of x [..., n, dim] without outliers, [..., n, 2] along the last.

    An outlier counts as the median of all, and so does not widen it.
    """
    x = x.float()
    tame = torch.where(outlying, x.quantile(0.5, dim=dim, keepdim=True), x)
    return torch.stack([tame.amin(dim), tame.amax(dim)], -1)


class Table:
    """Levels: the model's, and no sequence's."""

    def __init__(self, levels: Tensor) -> None:
        """[2 ** bits], float32, ascending."""
        self.levels = levels


class Ranges(ABC):
    """The ranges in which numbers are quantised."""

    @abstractmethod
    def of_entries(self) -> Tensor:
        """Least and greatest numbers, [2, heads or 1, length or 1, head_dim or 1], float32."""

    @abstractmethod
    def keep(self, index: Tensor) -> Ranges:
        """Those of the entries at index [heads, count]."""

    @abstractmethod
    def joined(self, later: Any, heads: int) -> Ranges:
        """These, and later ones of the same kind."""

    @abstractmethod
    def heads(self, heads: int) -> Sequence[Ranges]:
        """Those of each of so many heads."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that a sequence holds for them."""


class Fixed(Ranges):
    """Ranges of channels, measured beforehand: the model's and no sequence's."""

    def __init__(self, bounds: Tensor) -> None:
        """The least and the greatest number that is no outlier, [heads, head_dim, 2]."""
        self.bounds = bounds

    def of_entries(self) -> Tensor:
        return self.bounds[:, None].movedim(-1, 0)

    def keep(self, index: Tensor) -> Fixed:
        return self

    def joined(self, later: Fixed, heads: int) -> Fixed:
        return self

    def heads(self, heads: int) -> list[Fixed]:
        return [Fixed(row) for row in self.bounds.split(1)]

    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True)
class PerToken(Ranges):
    """Ranges of tokens."""

    bounds: Tensor
    """[heads, length, 2], or [1, length, 2] where heads share them."""

    def of_entries(self) -> Tensor:
        return self.bounds.float().movedim(-1, 0)[..., None]

    def keep(self, index: Tensor) -> PerToken:
        alike = len(self.bounds) == 1 and bool((index == index[:1]).all())
        return PerToken(entries(self.bounds if alike else self._of(len(index)), index[: 1 if alike else None]))

    def joined(self, later: PerToken, heads: int) -> PerToken:
        count = 1 if len(self.bounds) == len(later.bounds) == 1 else heads
        return PerToken(torch.cat([self._of(count), later._of(count)], 1))

    def heads(self, heads: int) -> list[PerToken]:
        return [PerToken(row.clone()) for row in self._of(heads).split(1)]

    def _of(self, heads: int) -> Tensor:
        return self.bounds if len(self.bounds) == heads else self.bounds.expand(heads, -1, -1).contiguous()

    def nbytes(self) -> int:
        return self.bounds.nbytes


@dataclass(frozen=True)
class NonUniformColumn(Column):
    """The nearest level in a range, and outliers."""

    packed: Tensor
    """[heads, length, head_dim * bits / 8], uint8."""
    ranges: Ranges
    outliers: Sparse
    table: Table
    bits: int

    @classmethod
    def of(cls, x: Tensor, outlying: Tensor, ranges: Ranges, levels: Tensor, bits: int) -> NonUniformColumn:
        """x [heads, length, head_dim], and which of its numbers are stored as they are, bool of that shape."""
        index = nearest(normalised(x.float(), *ranges.of_entries()), levels)
        return cls(pack(index.to(torch.uint8), bits), ranges, Sparse.of(x, outlying), Table(levels), bits)

    def decoded(self) -> Tensor:
        lower, upper = self.ranges.of_entries()
        index = unpack(self.packed, self.bits)
        x = self.table.levels.index_select(0, index.flatten().int()).view(index.shape)
        return self.outliers.put_into(x.mul_((upper - lower) / 2).add_((upper + lower) / 2))

    def keep(self, index: Tensor) -> NonUniformColumn:
        kept = entries(self.packed, index), self.ranges.keep(index), self.outliers.keep(index)
        return NonUniformColumn(*kept, self.table, self.bits)

    def heads(self) -> list[NonUniformColumn]:
        heads = len(self.packed)
        parts = zip(self.packed.split(1), self.ranges.heads(heads), self.outliers.heads(), strict=True)
        return [
            NonUniformColumn(packed.clone(), ranges, outliers, self.table, self.bits)
            for packed, ranges, outliers in parts
        ]

    def joined(self, later: NonUniformColumn) -> NonUniformColumn:
        packed = torch.cat([self.packed, later.packed], 1)
        ranges = self.ranges.joined(later.ranges, len(packed))
        return NonUniformColumn(packed, ranges, self.outliers.joined(later.outliers), self.table, self.bits)

    def nbytes(self) -> int:
        return self.packed.nbytes + self.ranges.nbytes() + self.outliers.nbytes()
