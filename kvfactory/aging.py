"""A buffer whose old entries are encoded in fewer bytes, and whose recent ones are as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from .buffers import Buffer, Positions
from .columns import Piece

if TYPE_CHECKING:
    from .numba_aging import Steps


class AgingBuffer(Buffer):
    """Old entries encoded, recent ones as they are; keys and values each by a schedule of their own.

    Where loops are compiled for them, single tokens are taken in some `Steps`, and nothing else is done as long as it lasts.
    """

    def __init__(self, keys: Piece, values: Piece) -> None:
        """Pieces whose recent entries are all there is; those that are due are encoded when the buffer settles."""
        self.length = keys.recent.shape[1]
        self._keys, self._values = [keys], [values]
        self._steps: Steps | None = None
        self._newest: tuple[Tensor, Tensor] | None = None
        """Key and value of a token that was appended, and is not in what there is yet."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape[1] == 1 and self._newest is None:
            self._newest = keys, values
        else:
            self._pause()
            self._put_behind(keys, values)
        self.length += keys.shape[1]

    def read(self, positions: Positions) -> tuple[Tensor, Tensor]:
        self._pause()
        keys, values = (
            torch.cat([piece.decoded(at) for piece, at in _located(side, positions)])
            for side in (self._keys, self._values)
        )
        return keys, values

    def attend(self, query: Tensor, positions: Positions) -> Tensor | None:
        if self._newest is not None and self._steps is None:
            self._steps = self._new_steps(query.dtype)
        if self._newest is not None and self._steps is not None and self._steps.settled:
            newest, self._newest = self._newest, None
            return self._steps.take(query, *newest)
        self._pause()
        if len(self._keys) > 1 or len(self._values) > 1:
            return None
        (keys,), (values,) = self._keys, self._values
        of_keys, of_values = keys.compiled(positions), values.compiled(positions)
        if of_keys is not None and of_values is not None:
            from .numba_aging import attend  # late, too

            return attend(query, of_keys, keys.recent, of_values, values.recent)
        exact = query.float() / math.sqrt(query.shape[-1])
        weights = keys.products(exact, positions).softmax(-1)
        return values.mixed(weights, positions).to(query.dtype)

    def keep(self, index: Tensor) -> None:
        self._pause()
        self._keys = [kept for piece, part in _by_piece(self._keys, index) for kept in piece.keep(part)]
        self._values = [kept for piece, part in _by_piece(self._values, index) for kept in piece.keep(part)]
        self.length = index.shape[1]

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Merged entries are encoded anew, all of them: a merge may have touched any."""
        self._pause()
        self._keys = [Piece(piece.encoder, x) for piece, x in _by_piece(self._keys, keys)]
        self._values = [Piece(piece.encoder, x) for piece, x in _by_piece(self._values, values)]
        self.length = keys.shape[1]

    def settle(self, positions: Positions) -> None:
        if self._steps is not None:
            self._steps.settled = True
            if self._steps.left and self._newest is None:
                return
        self._pause()
        self._keys = [piece.settled(at) for piece, at in _located(self._keys, positions)]
        self._values = [piece.settled(at) for piece, at in _located(self._values, positions)]

    def nbytes(self) -> int:
        newest = sum(x.nbytes for x in self._newest or ())
        held = (
            sum(piece.nbytes() for piece in (*self._keys, *self._values))
            if self._steps is None
            else self._steps.nbytes()
        )
        return held + newest

    def fork(self) -> Self:
        self._pause()
        return copy(self)

    def _new_steps(self, dtype: torch.dtype) -> Steps | None:
        """Steps from here on, if loops are compiled for what there is and nothing is turned."""
        if len(self._keys) > 1 or len(self._values) > 1:
            return None
        (keys,), (values,) = self._keys, self._values
        encoded = [piece.unturned(dtype) for piece in (keys, values)]
        if encoded[0] is None or encoded[1] is None:
            return None
        from .numba_aging import Steps  # late, too

        return Steps(keys, values, encoded[0], encoded[1])

    def _pause(self) -> None:
        """Have everything in pieces."""
        if self._steps is not None:
            (keys, values), self._steps = self._steps.pieces(), None
            self._keys, self._values = [keys], [values]
        if self._newest is not None:
            newest, self._newest = self._newest, None
            self._put_behind(*newest)

    def _put_behind(self, keys: Tensor, values: Tensor) -> None:
        """Append to the pieces."""
        self._keys = [piece.appended(x) for piece, x in _by_piece(self._keys, keys)]
        self._values = [piece.appended(x) for piece, x in _by_piece(self._values, values)]


def _by_piece(side: list[Piece], x: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Pieces and their heads of x [heads, ...]."""
    if len(side) == 1:  # as nearly always
        return iter([(side[0], x)])
    return zip(side, x.split(len(x) // len(side)), strict=True)


def _located(side: list[Piece], positions: Positions) -> Iterator[tuple[Piece, Positions]]:
    """Pieces and what gives the positions of their entries; all heads have one where positions have one row."""
    if len(side) == 1:
        return iter([(side[0], positions)])

    def of(start: int, stop: int) -> Tensor:
        every = positions()
        return every if len(every) == 1 else every[start:stop]

    heads = len(side[0].recent)
    return ((piece, partial(of, start * heads, (start + 1) * heads)) for start, piece in enumerate(side))
