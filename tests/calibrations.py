"""Calibration files for tiny models: ranges and levels of a normal distribution, which random numbers are near."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvfactory.nonuniform import normal_levels

SHARES = (0.0, 0.005, 0.01, 0.02, 0.5)


@cache
def tiny_calibration(layers: int, kv_heads: int, head_dim: int, spread: float = 3.0) -> str:
    """A file for a model of this shape; key channels have ranges of -spread to spread."""
    tables = {}
    for share in SHARES:
        bounds = torch.tensor([-spread, spread]) * (1 - share)
        tables[f"key_bounds/{share}"] = bounds.expand(layers, kv_heads, head_dim, 2).contiguous()
        for bits in (2, 3, 4, 8):
            levels = normal_levels(bits).expand(layers, -1).contiguous()
            tables |= {f"{kind}_levels/{share}/{bits}": levels.clone() for kind in ("key", "value")}
    file = Path(tempfile.mkdtemp()) / f"{layers}x{kv_heads}x{head_dim}.safetensors"
    save_file(tables, file)
    return str(file)
