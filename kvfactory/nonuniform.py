"""Quantisation to levels that are not equally far apart, in ranges that leave outliers out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .columns import Column
from .compiled import has_numba, has_vectors
from .growing import Growing
from .indexing import entries
from .packing import Sparse, pack, unpack

if TYPE_CHECKING:
    from .numba_levels import Encoded

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


@cache
def ranks(shares: tuple[float, ...], count: int) -> list[float]:
    """Where quantiles lie among so many numbers in ascending order, as torch.quantile has it."""
    return (torch.tensor(shares) * (count - 1)).tolist()


def quantiles(x: Tensor, shares: tuple[float, ...], dim: int) -> list[Tensor]:
    """As torch.quantile of x, float32, 1 along `dim`, which takes five times as long for a single vector."""
    ascending, found = x.sort(dim=dim).values, []
    for rank in ranks(shares, x.shape[dim]):
        below = ascending.narrow(dim, math.floor(rank), 1)
        found.append(below.lerp(ascending.narrow(dim, math.ceil(rank), 1), rank - math.floor(rank)))
    return found


def dynamic_outliers(x: Tensor, share: float, dim: int = -1) -> Tensor:
    """The numbers of each vector at or beyond its quantiles, half of the share at each end, bool.

    None for a share of 0; otherwise all of a vector of two or fewer.
    """
    if not share:
        return torch.zeros_like(x, dtype=torch.bool)
    low, high = quantiles(x.float(), (share / 2, 1 - share / 2), dim)
    return (x <= low) | (x >= high)


def inner_range(x: Tensor, outlying: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of each vector of x without outliers, shaped like x but for 1 along `dim`, float32.

    An outlier counts as the median of all, and so does not widen it.
    """
    x = x.float()
    tame = torch.where(outlying, quantiles(x, (0.5,), dim)[0], x)
    return tame.amin(dim, keepdim=True), tame.amax(dim, keepdim=True)


def tamed(x: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """`dynamic_outliers` of vectors x [..., n], and the `inner_range` of the others."""
    if share and has_numba(x.device):
        from .numba_encoding import tamed_by_rank  # late: nobody else waits for its import

        return tamed_by_rank(x, *ranks((share / 2, 0.5, 1 - share / 2), x.shape[-1]))
    outlying = dynamic_outliers(x, share)
    return outlying, *inner_range(x, outlying)


class Table:
    """Levels: the model's, and no sequence's."""

    def __init__(self, levels: Tensor) -> None:
        """[2 ** bits], float32, ascending."""
        self.levels = levels


class Ranges(ABC):
    """The ranges in which numbers are quantised."""

    of_tokens: bool
    """Whether each token has its own."""

    @abstractmethod
    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and greatest numbers, [heads or 1, length or 1, head_dim or 1]."""

    @abstractmethod
    def held(self) -> tuple[Tensor, Tensor]:
        """`ends`, perhaps with room behind them."""

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

    of_tokens = False

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        """The least and the greatest numbers that are no outliers, [heads, 1, head_dim], float32."""
        self.lower, self.upper = lower, upper

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.lower, self.upper

    held = ends

    def keep(self, index: Tensor) -> Fixed:
        return self

    def joined(self, later: Fixed, heads: int) -> Fixed:
        return self

    def heads(self, heads: int) -> list[Fixed]:
        return [Fixed(*row) for row in zip(self.lower.split(1), self.upper.split(1), strict=True)]

    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True)
class PerToken(Ranges):
    """Ranges of tokens."""

    of_tokens = True

    lower: Growing
    """[heads, length, 1], or [1, length, 1] where heads share them."""
    upper: Growing

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor) -> PerToken:
        return cls(Growing(lower), Growing(upper))

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.lower.read(), self.upper.read()

    def held(self) -> tuple[Tensor, Tensor]:
        return self.lower.held, self.upper.held

    def keep(self, index: Tensor) -> PerToken:
        alike = len(self.lower.held) == 1 and bool((index == index[:1]).all())
        rows, index = (1, index[:1]) if alike else (len(index), index)
        return PerToken.of(*(entries(_of_heads(each, rows), index) for each in self.ends()))

    def joined(self, later: PerToken, heads: int) -> PerToken:
        if len(self.lower.held) == len(later.lower.held):
            lower, upper = later.ends()
            return PerToken(self.lower.joined(lower), self.upper.joined(upper))
        both = zip(self.ends(), later.ends(), strict=True)
        return PerToken.of(*(torch.cat([_of_heads(each, heads) for each in pair], 1) for pair in both))

    def heads(self, heads: int) -> list[PerToken]:
        sides = (_of_heads(each, heads).split(1) for each in self.ends())
        return [PerToken.of(lower.clone(), upper.clone()) for lower, upper in zip(*sides, strict=True)]

    def nbytes(self) -> int:
        return self.lower.nbytes + self.upper.nbytes


def _of_heads(shared: Tensor, heads: int) -> Tensor:
    """[heads or 1, length, 1] as [heads, length, 1]."""
    return shared.expand(heads, -1, -1)


@dataclass(frozen=True)
class NonUniformColumn(Column):
    """The nearest level in a range, and outliers."""

    packed: Growing
    """[heads, length, head_dim * bits / 8], uint8."""
    ranges: Ranges
    outliers: Sparse
    table: Table
    bits: int

    @classmethod
    def of(cls, x: Tensor, outlying: Tensor, ranges: Ranges, levels: Tensor, bits: int) -> NonUniformColumn:
        """x [heads, length, head_dim], and which of its numbers are stored as they are, bool of that shape."""
        lower, upper = (each.float() for each in ranges.ends())
        if has_numba(x.device):
            from .numba_encoding import by_table  # late: nobody else waits for its import

            packed = by_table(x.float(), lower, upper, levels, bits)
        else:
            packed = pack(nearest(normalised(x.float(), lower, upper), levels).to(torch.uint8), bits)
        return cls(Growing(packed), ranges, Sparse.of(x, outlying), Table(levels), bits)

    def decoded(self) -> Tensor:
        lower, upper = (each.float() for each in self.ranges.ends())
        index = unpack(self.packed.read(), self.bits)
        x = self.table.levels.index_select(0, index.flatten().int()).view(index.shape)
        return self.outliers.put_into(x.mul_((upper - lower) / 2).add_((upper + lower) / 2))

    @cached_property
    def compiled(self) -> Encoded | None:
        packed = self.packed.held
        if not has_vectors(packed.device, packed.shape[2] * 8 // self.bits):
            return None
        from .numba_levels import tabled, with_exact  # late, too

        levels = tabled(self.packed, *self.ranges.held(), self.ranges.of_tokens, self.table.levels, self.bits)
        return with_exact(levels, self.outliers)

    def keep(self, index: Tensor) -> NonUniformColumn:
        packed = Growing(entries(self.packed.read(), index))
        return self._with(packed, self.ranges.keep(index), self.outliers.keep(index))

    def heads(self) -> list[NonUniformColumn]:
        rows = self.packed.read().split(1)
        parts = zip(rows, self.ranges.heads(len(rows)), self.outliers.heads(), strict=True)
        return [self._with(Growing(packed.clone()), ranges, outliers) for packed, ranges, outliers in parts]

    def joined(self, later: NonUniformColumn) -> NonUniformColumn:
        packed = self.packed.joined(later.packed.read())
        ranges = self.ranges.joined(later.ranges, len(packed.held))
        return self._with(packed, ranges, self.outliers.joined(later.outliers))

    def _with(self, packed: Growing, ranges: Ranges, outliers: Sparse) -> NonUniformColumn:
        """Others at the same levels."""
        return NonUniformColumn(packed, ranges, outliers, self.table, self.bits)

    def nbytes(self) -> int:
        return self.packed.nbytes + self.ranges.nbytes() + self.outliers.nbytes()
