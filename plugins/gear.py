"""GEAR: keep everything in few bits, with outliers apart and a low-rank matrix for the rest of the error (arXiv 2403.05527).

A block of entries is outliers + levels + low rank: the largest and smallest numbers of each vector are stored as they are,
what is left is quantised, and the error of that is approximated by `rank` directions a head, found by power iteration. A
vector is a channel of the block for keys and a token for values (the paper's KCVT, where `q_group_size` is none, as by
default; 32 makes KIVI's groups of it). The prompt is one block, short of what does not fill the buffer, and each 20
generated tokens are another. Any method may be stored so: `--quant_method gear`.

Deviations. Blocks made while decoding have the prompt's rank, 4, where the paper has 2. The iteration starts from numbers
drawn with a fixed seed. Outliers stay exact: the authors add the low-rank part on top of them. Three things of the authors'
simulation are left out: bits ** 2 - 1 levels, the number of outliers of a channel taken from the number of channels, and
rounding to float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import at_least, hookimpl, require
from kvfactory.columns import Column
from kvfactory.hookspecs import RegisterMethod, RegisterQuantisation
from kvfactory.indexing import entries
from kvfactory.packing import Groups, Sparse
from kvfactory.quantisation import Bits, WindowedQuantisation

from .fullkv import FullKV

if TYPE_CHECKING:
    from kvfactory.numba_levels import Encoded

ITERATIONS = 3


@dataclass(frozen=True, kw_only=True)
class GEAR(WindowedQuantisation):
    """Uniform quantisation whose error is approximated by a matrix of low rank, with outliers apart."""

    nbits: Bits = 4
    q_group_size: int | None = None
    quant_residual_length: int = 20
    rank: int = 4
    """Directions a head, in each block, that approximate the error; 0 for none."""
    outlier_ratio: float = 0.02
    """Share of each vector that is stored as it is, half of it the largest numbers and half the smallest."""

    def __post_init__(self) -> None:
        at_least(self, rank=0, outlier_ratio=0)
        require(self.outlier_ratio <= 1, f"--outlier_ratio is {self.outlier_ratio}; it is a share, 1 or less")
        super().__post_init__()

    def due(self, axis: int, recent: int) -> int:
        return recent - recent % self.quant_residual_length

    def encode(self, x: Tensor, axis: int) -> Column:
        dtype = self.stored_dtype(x)
        exact = x.float()
        outlying = outliers(exact, 1 + axis, self.outlier_ratio)
        # numbers that are stored apart must not widen the range of the others
        tame = torch.where(outlying, exact.mean(1 + axis, keepdim=True), exact)
        levels = super().encode(tame.to(x.dtype), axis)
        error = (exact - levels.decoded()).masked_fill(outlying, 0)
        rows, directions = low_rank(error, start(x, self.rank))
        blocks = Groups.of(len(x), x.shape[1], x.shape[1], x.device)
        missing = min(self.rank, x.shape[2]) - rows.shape[2]  # of a block that has fewer entries than directions
        rows, directions = pad(rows, (0, missing)), pad(directions, (0, missing)).transpose(1, 2)[:, None]
        return GEARColumn(levels, rows.to(dtype), directions.to(dtype), blocks, Sparse.of(x, outlying))


@dataclass(frozen=True)
class GEARColumn(Column):
    """Levels, the low-rank part of their error, and outliers."""

    levels: Column
    rows: Tensor
    """[heads, length, rank]."""
    directions: Tensor
    """[heads, blocks, rank, head_dim]."""
    blocks: Groups
    outliers: Sparse

    def decoded(self) -> Tensor:
        decoded, rows, directions = self.levels.decoded(), self.rows.float(), self.directions.float()
        if directions.shape[1] == 1:
            decoded.baddbmm_(rows, directions[:, 0])
        else:
            decoded += (rows[:, :, None] @ entries(directions, self.blocks.index()))[:, :, 0]
        return self.outliers.put_into(decoded)

    @cached_property
    def compiled(self) -> Encoded | None:
        levels = self.levels.compiled
        if levels is None:
            return None
        from kvfactory.numba_levels import corrected, with_exact  # late: nobody else waits for its import

        low_rank = corrected(levels, self.rows, self.directions, self.blocks.counts)
        return with_exact(low_rank, self.outliers)

    def keep(self, index: Tensor) -> GEARColumn:
        blocks, left = self.blocks.keep(index)
        levels, rows = self.levels.keep(index), entries(self.rows, index)
        return GEARColumn(levels, rows, self.directions[:, left], blocks, self.outliers.keep(index))

    def heads(self) -> list[GEARColumn]:
        parts = zip(
            self.levels.heads(),
            self.rows.split(1),
            self.directions.split(1),
            self.blocks.heads(),
            self.outliers.heads(),
            strict=True,
        )
        return [
            GEARColumn(levels, rows.clone(), directions.clone(), blocks, outliers)
            for levels, rows, directions, blocks, outliers in parts
        ]

    def joined(self, later: GEARColumn) -> GEARColumn:
        return GEARColumn(
            self.levels.joined(later.levels),
            torch.cat([self.rows, later.rows], 1),
            torch.cat([self.directions, later.directions], 1),
            self.blocks.joined(later.blocks),
            self.outliers.joined(later.outliers),
        )

    def nbytes(self) -> int:
        low = self.rows.nbytes + self.directions.nbytes + self.blocks.counts.nbytes
        return self.levels.nbytes() + low + self.outliers.nbytes()


def outliers(x: Tensor, axis: int, share: float) -> Tensor:
    """The largest and the smallest numbers of each vector along an axis, half of the share each; bool, shaped like x."""
    count = min(int(x.shape[axis] * share / 2 + 1e-9), x.shape[axis] // 2)
    order = x.argsort(dim=axis, stable=True)
    chosen = torch.cat([order.narrow(axis, 0, count), order.narrow(axis, x.shape[axis] - count, count)], axis)
    everything = share >= 1  # halves of an odd length leave one out
    return torch.full_like(x, everything, dtype=torch.bool).scatter(axis, chosen, True)


def start(x: Tensor, rank: int) -> Tensor:
    """Where the iteration starts, [heads, head_dim, rank], float32: the same numbers each time."""
    generator = torch.Generator().manual_seed(0)
    rank = min(rank, x.shape[1], x.shape[2])
    return torch.rand(x.shape[2], rank, generator=generator).to(x.device).expand(len(x), -1, -1)


def low_rank(x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Power iteration from directions [heads, head_dim, rank]: x [heads, tokens, head_dim] is about rows @ directions^T.

    Rows [heads, tokens, rank] are orthonormal, so that the product is x projected on what they span.
    """
    rows = x
    for iteration in range(ITERATIONS):
        last = iteration == ITERATIONS - 1
        rows = x @ (torch.linalg.qr(directions).Q if last else directions)
        rows = torch.linalg.qr(rows).Q if last else rows
        directions = x.transpose(1, 2) @ rows
    return rows, directions


@dataclass(frozen=True, kw_only=True)
class FullInGEAR(FullKV):
    """Every token, stored so."""


@hookimpl
def kvfactory_register_quantisations(register: RegisterQuantisation) -> None:
    register("gear", GEAR)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("gear", attention=FullInGEAR, quant_method="gear")
