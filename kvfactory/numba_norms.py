"""Root mean square norms of single tokens on a CPU, compiled by Numba: one call for the seven operations that they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .inference import NORM_RUN as RUN
from .numba_entries import numbers, put, vector
from .numba_loops import compiled
from .numba_memory import entries_at
from .numba_vectors import repeated, size, total


class Normaliser:
    """Vectors over their root mean squares, rounded to their dtype, times a weight of that dtype."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        """Weight [hidden_size], bfloat16 or float32; `epsilon` is added to the mean of squares."""
        self.weight, self.epsilon, self.channels = numbers(weight), np.float32(epsilon), size(RUN)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., hidden_size], shaped and typed alike; squares are summed in float32."""
        x = x.contiguous()
        output = torch.empty_like(x)
        rows = x.numel() // len(self.weight)
        _normalise(rows, x.data_ptr(), self.weight, self.epsilon, self.channels, output.data_ptr())
        return output


@compiled
def _normalise(rows: Any, of_x: Any, weight: Any, epsilon: Any, channels: Any, of_output: Any) -> None:
    """See `Normaliser`; x and output are at addresses."""
    dim = len(weight)
    runs = dim // RUN
    x, output = entries_at(of_x, rows, dim, weight), entries_at(of_output, rows, dim, weight)
    for row in range(rows):
        squares = repeated(np.float32(0), channels)
        for place in range(row * runs, (row + 1) * runs):
            some = vector(x, place, channels)
            squares = squares + some * some
        scale = repeated(1 / np.sqrt(total(squares) / np.float32(dim) + epsilon), channels)
        for run in range(runs):
            place = row * runs + run
            put(output, place, scale * vector(x, place, channels))
            put(output, place, vector(weight, run, channels) * vector(output, place, channels))
