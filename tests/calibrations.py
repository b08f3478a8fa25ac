"""Files for tiny models: ranges and levels of a normal distribution, which random numbers are near, and token scorers."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvfactory.nonuniform import normal_levels
from kvfactory.registry import get_registry

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


@cache
def tiny_weights(
    layers: int,
    kv_heads: int,
    head_dim: int,
    features: tuple[str, ...] = ("unrotated_key", "log_distance", "window_attention"),
    seed: int = 0,
    query_heads: int = 8,
    window_size: int = 4,
) -> str:
    """A file with a random token scorer for a model of this shape, one network of width 8 for each KV head."""
    generator = torch.Generator().manual_seed(seed)
    per_channel = {"unrotated_key", "key", "value", "head_mean_key"}
    numbers = sum(head_dim if name in per_channel else 1 for name in features)
    tensors = {}
    for each, (given, made) in enumerate([(numbers, 8), (8, 1)]):
        tensors[f"{each}.weight"] = torch.randn(layers, kv_heads, made, given, generator=generator)
        tensors[f"{each}.bias"] = torch.randn(layers, kv_heads, made, generator=generator)
    file = Path(tempfile.mkdtemp()) / "scorer.safetensors"
    save_file(tensors, file)
    shape = {"num_layers": layers, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    facts = {"format": 1, "features": features, "window_size": window_size, **shape}
    file.with_suffix(".json").write_text(json.dumps(facts))
    return str(file)


def small_settings(name: str, layers: int = 3, kv_heads: int = 2, head_dim: int = 8, **wanted: Any) -> dict[str, Any]:
    """Those of the wanted settings that the method knows, a small window, and weights for a model of this shape."""
    wanted = {"window_size": 4, "weights": tiny_weights(layers, kv_heads, head_dim), **wanted}
    return {each: value for each, value in wanted.items() if each in get_registry().own_settings(name)}
