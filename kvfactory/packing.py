"""Small integers, really small: levels of 1 to 8 bits side by side in bytes, and groups of entries that share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths that fit bytes, whose sum is a number of bits: 3 bits are packed as 2 and 1."""


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels [..., dim], uint8 below 2 ** bits, as bytes [..., dim * bits / 8]; dim is a multiple of 8.

    Along the last dimension, so that an entry's bytes are its own and may be kept or let go of without its neighbours. The
    first fields of an entry's bytes are its first levels, the second fields those behind them, and so on.
    """
    if bits == 8:
        return levels
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        fields = ((levels >> shift) & (2**width - 1)).unflatten(-1, (per_byte, -1))
        byte = fields[..., 0, :].clone()
        for place in range(1, per_byte):
            byte |= fields[..., place, :] << (width * place)
        planes.append(byte)
        shift += width
    return torch.cat(planes, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What `pack` was given, [..., dim], uint8."""
    if bits == 8:
        return packed
    dim = packed.shape[-1] * 8 // bits
    levels, shift = None, 0
    for plane, width in zip(packed.split([dim * width // 8 for width in PLANES[bits]], -1), PLANES[bits], strict=True):
        fields = _fields(plane, width)
        levels = fields if levels is None else levels | fields << shift
        shift += width
    assert levels is not None
    return levels


def _fields(plane: Tensor, width: int) -> Tensor:
    """The fields of bytes [..., bytes], [..., 8 / width * bytes], uint8: the first of all bytes, the second of all, ..."""
    size = next(size for size in WORDS if plane.shape[-1] % size == 0)
    mask = int.from_bytes(bytes([2**width - 1] * size), "little")
    words = plane.reshape(-1).view(WORDS[size]).view(*plane.shape[:-1], plane.shape[-1] // size)
    fields = [(words >> place if place else words) & mask for place in range(0, 8, width)]
    if fields[0].shape[-1] % 2 == 0 and size == 8:  # a copy of 16 bytes at a time is several times faster
        fields = [each.view(torch.complex128) for each in fields]
    return torch.cat(fields, -1).view(torch.uint8)


WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""Integers of so many bytes, which are worked on at once."""


class Groups:
    """Which group each entry is of, where groups are runs of entries: a count a group and head, and nothing an entry."""

    def __init__(self, counts: Tensor, size: int | None = None) -> None:
        """Counts [heads, groups], int32: how many entries of each group there are, 0 where all were let go of.

        `size` is what all of them are, where that is known.
        """
        self.counts, self.size = counts, size

    @classmethod
    def of(cls, heads: int, tokens: int, size: int, device: torch.device) -> Groups:
        """Groups of `size` consecutive tokens, of which the last may be short."""
        counts = torch.full((heads, -(-tokens // size)), size, dtype=torch.int32, device=device)
        if counts.shape[1] and tokens % size:
            counts[:, -1] = tokens % size
        return cls(counts, None if tokens % size else size)

    def index(self) -> Tensor:
        """The group of each entry, [heads, entries], int64."""
        heads, groups = self.counts.shape
        of_each = torch.arange(groups, device=self.counts.device).repeat(heads)
        return of_each.repeat_interleave(self.counts.flatten().long()).view(heads, -1)

    def keep(self, index: Tensor) -> tuple[Groups, Tensor]:
        """The groups of the entries at index [heads, count], and which groups are left in some head, [groups], bool."""
        kept = torch.zeros_like(self.counts).scatter_add_(
            1, self.index().gather(1, index), torch.ones_like(index, dtype=torch.int32)
        )
        left = kept.any(0)
        return Groups(kept[:, left]), left

    def heads(self) -> list[Groups]:
        """The groups of each head."""
        return [Groups(row.clone(), self.size) for row in self.counts.split(1)]

    def joined(self, later: Groups) -> Groups:
        size = self.size if self.size == later.size else None
        return Groups(torch.cat([self.counts, later.counts], 1), size)


@dataclass(frozen=True)
class Sparse:
    """A few numbers of a matrix [heads, length, dim], as they are: each with where it stands, in 4 bytes."""

    where: Tensor
    """Where each stands in the flat matrix, [count], int32, ascending."""
    what: Tensor
    """[count]."""
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor, chosen: Tensor) -> Sparse:
        """Those numbers of x that a bool of its shape names."""
        heads, length, dim = x.shape
        return cls(chosen.flatten().nonzero()[:, 0].int(), x[chosen], (heads, length, dim))

    def put_into(self, x: Tensor) -> Tensor:
        """Write the numbers into x [heads, length, dim], in place."""
        x.view(-1).index_copy_(0, self.where.long(), self.what.to(x.dtype))
        return x

    def keep(self, index: Tensor) -> Sparse:
        """Those of the entries at index [heads, count], which is ascending in each head."""
        heads, length, dim = self.shape
        rows = (index + length * torch.arange(heads, device=index.device)[:, None]).flatten()
        place = torch.full((heads * length,), -1, device=index.device)
        place[rows] = torch.arange(len(rows), device=index.device)
        row = place[self.where.long() // dim]
        stays = row >= 0
        where = (row * dim + self.where % dim)[stays].int()
        return Sparse(where, self.what[stays], (heads, index.shape[1], dim))

    def heads(self) -> list[Sparse]:
        """The numbers of each head."""
        heads, length, dim = self.shape
        head = self.where // (length * dim)
        return [
            Sparse(self.where[head == each] - each * length * dim, self.what[head == each], (1, length, dim))
            for each in range(heads)
        ]

    def joined(self, later: Sparse) -> Sparse:
        """These, and those of a matrix behind this one: the entries of each head follow each other."""
        heads, length, dim = self.shape
        total = length + later.shape[1]
        where, what = [], []
        for head, both in enumerate(zip(self._ends(), later._ends(), strict=True)):
            for part, start, (begin, end) in zip((self, later), (0, length), both, strict=True):
                moved = head * (total - part.shape[1]) + start
                where.append(part.where[begin:end] + moved * dim)
                what.append(part.what[begin:end])
        return Sparse(torch.cat(where), torch.cat(what), (heads, total, dim))

    def _ends(self) -> list[tuple[int, int]]:
        """Where the numbers of each head begin and end in the lists."""
        heads, length, dim = self.shape
        bounds = torch.arange(heads + 1, device=self.where.device, dtype=self.where.dtype) * (length * dim)
        return list(pairwise(torch.searchsorted(self.where, bounds).tolist()))

    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.where.nbytes + self.what.nbytes
