"""Small integers, really small: levels of 1 to 8 bits side by side in bytes, and groups of entries that share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .compiled import has_numba
from .errors import require
from .growing import Growing

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
    """A few numbers of entries, as they are: each with where it stands, in 4 bytes."""

    where: Growing
    """Entry, head and channel of each, in the bits of an int32 from the highest on, ascending, [1, count]."""
    what: Growing
    """[1, count]."""
    shape: tuple[int, int, int]
    """Heads, entries and channels."""

    def __post_init__(self) -> None:
        """Raises `UserError` for entries that have too many numbers."""
        heads, length, dim = self.shape
        require(
            length <= 2**31 >> sum(place_bits(heads, dim)),
            f"{length} entries of {heads} heads and head_dim {dim} are too many for outliers, whose places take 4 bytes",
        )

    @classmethod
    def of(cls, x: Tensor, chosen: Tensor) -> Sparse:
        """Those numbers of x [heads, length, head_dim] that a bool of its shape names."""
        heads, length, dim = x.shape
        if has_numba(x.device):
            from .numba_encoding import apart  # late: nobody else waits for its import

            where, what = apart(x, chosen, *place_bits(heads, dim))
            return cls(Growing(where[None]), Growing(what[None]), (heads, length, dim))
        by_entry = chosen.transpose(0, 1)
        entry, head, channel = by_entry.nonzero(as_tuple=True)
        return cls._at(entry, head, channel, x[head, entry, channel], (heads, length, dim))

    @classmethod
    def _at(cls, entry: Tensor, head: Tensor, channel: Tensor, what: Tensor, shape: tuple[int, int, int]) -> Sparse:
        """Of numbers [count] at places [count] each."""
        of_head, of_channel = place_bits(shape[0], shape[2])
        where = ((entry << of_head | head) << of_channel | channel).int()
        return cls(Growing(where[None]), Growing(what[None]), shape)

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entry, head and channel of each, int64."""
        of_head, of_channel = place_bits(self.shape[0], self.shape[2])
        where = self.where.read()[0].long()
        return where >> of_head + of_channel, where >> of_channel & (1 << of_head) - 1, where & (1 << of_channel) - 1

    def put_into(self, x: Tensor) -> Tensor:
        """Write the numbers into x [heads, length, head_dim], in place."""
        entry, head, channel = self._places()
        return x.index_put_((head, entry, channel), self.what.read()[0].to(x.dtype))

    def keep(self, index: Tensor) -> Sparse:
        """Those of the entries at index [heads, count], which is ascending in each head."""
        heads, length, dim = self.shape
        entry, head, channel = self._places()
        new = torch.full((heads, length), -1, device=index.device)
        new.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        entry = new[head, entry]
        kept, shape = (entry >= 0).nonzero()[:, 0], (heads, index.shape[1], dim)
        out_of_step = Sparse._at(entry[kept], head[kept], channel[kept], self.what.read()[0, kept], shape)
        where, order = out_of_step.where.read().sort()  # heads may have let go of different entries
        return Sparse(Growing(where), Growing(out_of_step.what.read()[:, order[0]]), shape)

    def heads(self) -> list[Sparse]:
        """The numbers of each head."""
        entry, head, channel = self._places()
        each = [(head == one).nonzero()[:, 0] for one in range(self.shape[0])]
        what, shape = self.what.read()[0], (1, *self.shape[1:])
        return [Sparse._at(entry[own], head[own] * 0, channel[own], what[own], shape) for own in each]

    def joined(self, later: Sparse) -> Sparse:
        """These, and those of the entries behind these."""
        heads, length, dim = self.shape
        where = self.where.joined(later.where.read() + (length << sum(place_bits(heads, dim))))
        return Sparse(where, self.what.joined(later.what.read()), (heads, length + later.shape[1], dim))

    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.where.nbytes + self.what.nbytes


def place_bits(heads: int, dim: int) -> tuple[int, int]:
    """How many bits of a `Sparse` place say which head it is of, and how many which channel."""
    return (heads - 1).bit_length(), (dim - 1).bit_length()
