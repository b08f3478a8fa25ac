"""Linear layers of a few tokens on a CPU, compiled by Numba: a weight is read once, where it lies, as memory sends it.

A library's products of one row take as long to call as to compute in small models, and want weights in an order of theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .compiled import WIDEST
from .inference import INPUTS, OUTPUTS
from .numba_entries import number, numbers, put, rounded_as
from .numba_loops import compiled, exponential, in_threads, run
from .numba_memory import ask_for, entries_at
from .numba_products import add_entries
from .numba_vectors import repeated, size, total

SUMS, RUN, ONE = size(WIDEST), size(INPUTS), size(1)
AHEAD = 256
"""Runs of numbers between those that are read and those that memory is asked for."""


class Multiplier:
    """x times the transpose of a weight, and a bias: what a linear layer computes, or several that read the same x."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Weight [outputs, inputs], which stays where it is, and bias [outputs]; see `has_loops`."""
        self.weight, self.bias = numbers(weight), None if bias is None else bias.float().numpy()

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], of the weight's dtype; sums are in float32."""
        x, output = x.contiguous(), x.new_empty(*x.shape[:-1], len(self.weight))
        rows = x.numel() // x.shape[-1]
        run(_multiply, _multiply_in_threads, rows, x.data_ptr(), self.weight, self.bias, output.data_ptr())
        return output


class GatedMultiplier:
    """down(silu(gate(x)) * up(x)): the feed-forward of a layer in two calls, rounded where the layer rounds."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Weights [outputs, inputs] without biases, as those of `Multiplier`."""
        self.weights = numbers(gate), numbers(up), numbers(down)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., hidden_size], shaped and typed alike."""
        gate, up, down = self.weights
        x, rows = x.contiguous(), x.numel() // x.shape[-1]
        hidden, output = x.new_empty(rows, len(gate)), torch.empty_like(x)
        run(_gate, _gate_in_threads, rows, x.data_ptr(), gate, up, hidden.data_ptr())
        run(_multiply, _multiply_in_threads, rows, hidden.data_ptr(), down, None, output.data_ptr())
        return output


@compiled
def _four(x: Any, row: Any, weight: Any, first: Any) -> tuple[Any, Any, Any, Any]:
    """The products of a row of x and OUTPUTS rows of a weight from the first on, as four sums: each is a chain."""
    runs = x.shape[1] // INPUTS
    own, at = row * runs, first * runs
    none = repeated(np.float32(0), SUMS)
    a, b, c, d = none, none, none, none
    for each in range(runs):
        a = add_entries(a, x, own + each, weight, at + each)
        b = add_entries(b, x, own + each, weight, at + runs + each)
        c = add_entries(c, x, own + each, weight, at + 2 * runs + each)
        d = add_entries(d, x, own + each, weight, at + 3 * runs + each)
    return total(a), total(b), total(c), total(d)


@compiled
def _ask_for_rows(weight: Any, first: Any) -> None:
    """Those rows of a weight that follow OUTPUTS from the first on, some way ahead."""
    runs = weight.shape[1] // INPUTS
    for each in range(first * runs, (first + OUTPUTS) * runs):
        ask_for(weight, each + AHEAD, RUN)


@compiled
def _share(thread: Any, threads: Any, outputs: Any) -> Any:
    """Which tiles of OUTPUTS outputs are a thread's: a run of them."""
    tiles = -(-outputs // OUTPUTS)
    return range(tiles * thread // threads, tiles * (thread + 1) // threads)


@compiled
def _multiply(thread: Any, threads: Any, rows: Any, of_x: Any, weight: Any, bias: Any, of_output: Any) -> None:
    """Every thread's share of outputs [rows, outputs], of x [rows, inputs] at addresses."""
    outputs, inputs = weight.shape
    x, output = entries_at(of_x, rows, inputs, weight), entries_at(of_output, rows, outputs, weight)
    for tile in _share(thread, threads, outputs):
        first = min(tile * OUTPUTS, outputs - OUTPUTS)  # the last may make some anew
        _ask_for_rows(weight, first)
        for row in range(rows):
            sums = _four(x, row, weight, first)
            for each in range(OUTPUTS):
                whole = sums[each] if bias is None else sums[each] + bias[first + each]
                put(output, row * outputs + first + each, repeated(whole, ONE))


@in_threads
def _multiply_in_threads(threads: Any, rows: Any, x: Any, weight: Any, bias: Any, output: Any) -> None:
    for thread in prange(threads):
        _multiply(thread, threads, rows, x, weight, bias, output)


@compiled
def _gate(thread: Any, threads: Any, rows: Any, of_x: Any, gate: Any, up: Any, of_hidden: Any) -> None:
    """Every thread's share of silu(gate(x)) * up(x), [rows, outputs], of x [rows, inputs] at addresses."""
    outputs, inputs = gate.shape
    x, hidden = entries_at(of_x, rows, inputs, gate), entries_at(of_hidden, rows, outputs, gate)
    for tile in _share(thread, threads, outputs):
        first = min(tile * OUTPUTS, outputs - OUTPUTS)  # the last may make some anew
        _ask_for_rows(gate, first)
        _ask_for_rows(up, first)
        for row in range(rows):
            gates, ups = _four(x, row, gate, first), _four(x, row, up, first)
            for each in range(OUTPUTS):
                at = row * outputs + first + each
                put(hidden, at, repeated(gates[each], ONE))  # and read again: as it is rounded
                exact = number(hidden, at)
                small = exponential(-abs(exact))
                share = (np.float32(1) if exact >= 0 else small) / (1 + small)
                opened = rounded_as(repeated(exact * share, ONE), hidden)
                put(hidden, at, opened * rounded_as(repeated(ups[each], ONE), hidden))


@in_threads
def _gate_in_threads(threads: Any, rows: Any, x: Any, gate: Any, up: Any, hidden: Any) -> None:
    for thread in prange(threads):
        _gate(thread, threads, rows, x, gate, up, hidden)
