"""Loops that compiled kernels are made of; each is one that a processor takes for many numbers at once."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import njit
from numba.core.registry import cpu_target

from .compiled import may_use_matrices
from .folders import cache_folder, can_be_written


def _state() -> str:
    """What compiled loops depend on and Numba does not look at: what they call in other files, what the system allows."""
    sources = sorted(Path(__file__).parent.glob("numba_*.py"))
    whole = b"".join(each.read_bytes() for each in sources) + bytes([may_use_matrices()])
    return hashlib.sha256(whole).hexdigest()[:16]


FOLDER = Path(numba.config.CACHE_DIR or cache_folder() / "numba") / _state()  # type: ignore[attr-defined]
numba.config.CACHE_DIR = str(FOLDER)  # type: ignore[attr-defined]
KEPT = can_be_written(FOLDER)
compiled = njit(fastmath={"reassoc", "contract", "nsz", "arcp"}, cache=KEPT, nogil=True)
"""Sums in any order, but infinities and what is no number stay what they are. What is compiled is kept if it can be."""
exact = njit(fastmath=False, cache=KEPT, nogil=True)
"""Arithmetic to the bit as it is written; unless told, a function takes what its caller may do."""
in_threads = njit(parallel=True, cache=KEPT)

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
"""What the processor can do that loops are compiled for, in the compiler's words, such as +avx512f."""
LANES = 64
"""Numbers that are compared at once."""
LOG2_E = np.float32(1 / math.log(2))
POWERS = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(7))
"""2 ** x is the sum of POWERS[n] * x ** n, to float32's precision where x is between -1/2 and 1/2."""


def run(work: Any, work_in_threads: Any, *arguments: Any) -> None:
    """Call compiled `work(thread, threads, *arguments)` once for each of the threads that torch has, or in this one alone.

    `work_in_threads(threads, *arguments)` is the first in a parallel loop: one such loop for all, given the function, costs
    more to call than most of them take.
    """
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if threads == 1:
        work(0, 1, *arguments)
    else:
        numba.set_num_threads(threads)
        work_in_threads(threads, *arguments)


@compiled
def exponential(x: Any) -> Any:
    """e ** x for x <= 0, float32; a library's own takes one number at a time."""
    power = max(x * LOG2_E, np.float32(-126))
    whole = np.floor(power + np.float32(0.5))
    rest, total = power - whole, POWERS[6]
    for n in (5, 4, 3, 2, 1, 0):
        total = total * rest + POWERS[n]
    return total * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def greatest(numbers: Any) -> Any:
    """The greatest of numbers [count], one at least, by lanes: a single maximum would wait for itself at every number."""
    lanes = np.full(LANES, numbers[0])
    whole = len(numbers) - len(numbers) % LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] = max(lanes[lane], numbers[start + lane])
    most = lanes[0]
    for number in lanes:
        most = max(most, number)
    for number in numbers[whole:]:
        most = max(most, number)
    return most


@compiled
def softmax_sums(logits: Any) -> tuple[Any, Any]:
    """Turns logits [entries] into weights of 1 at most; returns the highest logit and the sum of weights."""
    highest, total = greatest(logits), np.float32(0)
    for at in range(len(logits)):
        logits[at] = exponential(logits[at] - highest)
        total += logits[at]
    return highest, total
