"""Whether loops of our own may be compiled for a device: without Numba torch's operations do the same, and take longer."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def is_installed() -> bool:
    """Whether Numba can be imported, looked up once: every layer of every step asks."""
    return find_spec("numba") is not None


def has_numba(device: torch.device) -> bool:
    """Whether it is a CPU, and Numba is installed."""
    return device.type == "cpu" and is_installed()
