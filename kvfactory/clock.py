"""Time that counts what was asked for: a GPU is waited for before the clock is read."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    """Seconds on a clock, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
