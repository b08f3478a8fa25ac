"""Whether loops of our own may be compiled for a device: without Numba torch's operations do the same, and take longer."""

from __future__ import annotations

import platform
from functools import cache
from importlib.util import find_spec

import torch


@cache
def is_installed() -> bool:
    """Whether Numba can be imported and used, looked up once: every layer of every step asks."""
    return find_spec("numba") is not None and not _lacks_float16()


def _lacks_float16() -> bool:
    """Whether it is an x86 processor without AVX2, for whose float16 the compiler calls functions that nobody has."""
    return platform.machine().lower() in ("x86_64", "amd64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT"


WIDEST = 16
"""Numbers of float32 in the widest vectors that processors have."""


def has_numba(device: torch.device) -> bool:
    """Whether it is a CPU, and Numba is installed."""
    return device.type == "cpu" and is_installed()


def has_vectors(device: torch.device, channels: int) -> bool:
    """Whether loops over vectors may be compiled for so many channels.

    They are compiled anew for each number of channels, which takes seconds, and gain nothing where vectors are not filled.
    """
    return channels % WIDEST == 0 and has_numba(device)


@cache
def may_use_matrices() -> bool:
    """Whether the system lets this process use the registers for matrices that some processors have; it is asked once."""
    ask = getattr(torch.cpu, "_init_amx", None)  # a private name
    return ask is not None and bool(ask())
