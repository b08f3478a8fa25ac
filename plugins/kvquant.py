"""KVQuant: keep everything in 2 to 4 bits, at levels and key ranges calibrated for the model (arXiv 2401.18079).

Keys are quantised as they are before their rotation, where channels keep their ranges from token to token, and rotated anew
whenever they are read. Each channel has a range that was measured on other text; a number outside of it is an outlier and
stored as it is. Each token's values have a range of their own, without its largest and smallest numbers. Levels are not
equally far apart: they are centres of the clusters that the model's own numbers form, one table a layer for keys and one
for values. The first token, on which attention rests, stays exact. Nothing waits in full precision: a token is quantised
after the step that made it. Any method may be stored so: `--quant_method kvquant`.

`python scripts/calibrate_kvquant.py --output FILE` measures a model; the tables of the embedded one come along. Deviations:
the authors' simulation lets the prompt attend to its own quantised entries, here it attends before; clusters are not
weighted by gradients; no mean and deviation are matched for 2 bits. A token's values are one vector over all heads, as the
authors' are, unless an eviction left heads with different tokens: then each head's are one. KVCache-Factory's `kvquant` is
another quantiser.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvfactory import LayerContext, UserError, at_least, hookimpl, require
from kvfactory.aging import AgingBuffer
from kvfactory.buffers import Buffer, Positions
from kvfactory.columns import Column, Encoder, Piece
from kvfactory.hookspecs import RegisterMethod, RegisterQuantisation
from kvfactory.nonuniform import (
    Fixed,
    NonUniformColumn,
    PerToken,
    Ranges,
    normal_levels,
    tamed,
    uniform_levels,
)
from kvfactory.quantisation import Bits, stored_dtype
from kvfactory.storage import Quantisation
from kvfactory.stores import spread

from .fullkv import FullKV

EMBEDDED = Path(__file__).parent / "calibration" / "SmolLM2-135M-Instruct.safetensors"
COMMAND = "make one with: python scripts/calibrate_kvquant.py --model_path MODEL --output FILE"


@dataclass(frozen=True, kw_only=True)
class KVQuant(Quantisation):
    """Calibrated non-uniform levels, with outliers apart."""

    aliases: ClassVar[dict[str, str]] = {"sink_size": "exact_size"}

    nbits: Bits = 4
    """Bits of a level."""
    outlier_ratio: float = 0.01
    """Share of the numbers that is stored as it is, one that the calibration was made for; 0 for none."""
    exact_size: int = 1
    """First tokens, which stay exact."""
    levels: Literal["calibrated", "normalfloat", "uniform"] = "calibrated"
    """Where levels lie in a range: as calibrated, at quantiles of a normal distribution, or equally far apart."""
    scale_dtype: Literal["float16", "model"] = "float16"
    """What the range of a token's values is stored in: float16, or the model's own type."""
    calibration: str | None = None
    """File with the ranges and levels of the model; that of the embedded model if not given."""

    def __post_init__(self) -> None:
        at_least(self, outlier_ratio=0, exact_size=0)
        read_calibration(self.calibration, self.outlier_ratio, self.nbits)

    def buffer(self, layer: LayerContext, keys: Tensor, values: Tensor) -> Buffer:
        require(keys.shape[-1] % 8 == 0, f"kvquant takes a head_dim that is a multiple of 8, not {keys.shape[-1]}")
        table = read_calibration(self.calibration, self.outlier_ratio, self.nbits).of_layer(layer)
        bounds = spread(table.bounds, len(keys)).to(keys.device)
        ranges = Fixed(*(each[:, None].contiguous() for each in bounds.unbind(-1)))
        frequencies = layer.rotary_frequencies()
        key_levels, value_levels = (
            self.level_table(each).to(keys.device) for each in (table.key_levels, table.value_levels)
        )
        return AgingBuffer(
            Piece(KeyEncoder(self, key_levels, ranges, frequencies), keys.clone()),
            Piece(ValueEncoder(self, value_levels), values.clone()),
        )

    def level_table(self, calibrated: Tensor) -> Tensor:
        """Levels in -1..1, ascending, [2 ** bits], float32."""
        if self.levels == "calibrated":
            return calibrated
        return {"normalfloat": normal_levels, "uniform": uniform_levels}[self.levels](self.nbits)


class EachToken(Encoder):
    """What keys and values have in common: every entry is due once its step is done, and the levels are the model's."""

    def __init__(self, kvquant: KVQuant, levels: Tensor) -> None:
        """Levels [2 ** bits], float32, ascending."""
        self.kvquant, self.levels = kvquant, levels

    def due(self, recent: int, old: int) -> int:
        return recent

    def column(self, x: Tensor, outlying: Tensor, positions: Tensor, ranges: Ranges) -> Column:
        """Of x [heads, length, head_dim], in ranges that leave out what is outlying, bool of that shape."""
        stored = outlying | (positions < self.kvquant.exact_size)[..., None]
        return NonUniformColumn.of(x, stored, ranges, self.levels, self.kvquant.nbits)


class KeyEncoder(EachToken):
    """Keys without their rotation, in the model's ranges of channels."""

    def __init__(self, kvquant: KVQuant, levels: Tensor, ranges: Fixed, frequencies: Tensor) -> None:
        super().__init__(kvquant, levels)
        self.ranges, self.frequencies = ranges, frequencies

    def encode(self, x: Tensor, positions: Positions) -> Column:
        lower, upper = self.ranges.ends()
        outlying = (x < lower) | (x > upper) if self.kvquant.outlier_ratio else torch.zeros_like(x, dtype=torch.bool)
        return self.column(x, outlying, positions(), self.ranges)

    def of_head(self, head: int) -> KeyEncoder:
        own = copy(self)
        own.ranges = self.ranges.heads(len(self.ranges.lower))[head]
        return own


class ValueEncoder(EachToken):
    """Values, each token's in a range of its own."""

    def encode(self, x: Tensor, positions: Positions) -> Column:
        at = positions()
        together = len(at) == 1 or bool((at == at[:1]).all())  # entries of all heads are the same tokens
        vectors = x.transpose(0, 1).flatten(1)[None] if together else x
        outlying, *ends = tamed(vectors, self.kvquant.outlier_ratio)
        dtype = stored_dtype(x, self.kvquant.scale_dtype)
        ranges = PerToken.of(*(each.to(dtype) for each in ends))
        outlying = outlying[0].unflatten(1, (len(x), -1)).transpose(0, 1) if together else outlying
        return self.column(x, outlying, at, ranges)


@dataclass(frozen=True)
class LayerTable:
    """What was measured of a layer, or of some of its heads."""

    bounds: Tensor
    """The range of each key channel, [kv_heads, head_dim, 2], float32."""
    key_levels: Tensor
    """[2 ** bits], float32, ascending."""
    value_levels: Tensor


class Calibration:
    """What was measured of a model, for one share of outliers and one number of bits."""

    def __init__(self, path: Path, bounds: Tensor, key_levels: Tensor, value_levels: Tensor) -> None:
        """Bounds [layers, kv_heads, head_dim, 2], levels [layers, 2 ** bits]."""
        self.path, self.bounds, self.key_levels, self.value_levels = path, bounds, key_levels, value_levels

    def of_layer(self, layer: LayerContext) -> LayerTable:
        """Raises `UserError` for a model of another shape."""
        layers, heads, dim, _ = self.bounds.shape
        first = layer.first_kv_head or 0
        fits = heads == layer.kv_heads if layer.first_kv_head is None else heads >= first + layer.kv_heads
        require(
            layers == layer.num_layers and fits and dim == layer.keys.shape[-1],
            f"--calibration {self.path} is of a model with {layers} layers, {heads} KV heads and head_dim {dim}, "
            f"and this one has {layer.num_layers}, {layer.kv_heads} and {layer.keys.shape[-1]}; {COMMAND}",
        )
        at = layer.layer_index
        return LayerTable(self.bounds[at, first : first + layer.kv_heads], self.key_levels[at], self.value_levels[at])


@cache
def read_calibration(given: str | None, share: float, bits: int) -> Calibration:
    """The tables in a file, that of the embedded model if none is given.

    Raises `UserError` for a file that is none, and for a share of outliers that it was not made for.
    """
    path = EMBEDDED if given is None else Path(given)
    try:
        with safe_open(path, "pt") as file:
            shares = sorted({float(name.split("/")[1]) for name in file.keys()})  # noqa: SIM118
            require(
                share in shares,
                f"--outlier_ratio {share}: --calibration {path} was made for {', '.join(map(str, shares))}; take one of "
                f"them, or {COMMAND} --outlier_ratios {share}",
            )
            names = f"key_bounds/{share}", f"key_levels/{share}/{bits}", f"value_levels/{share}/{bits}"
            return Calibration(path, *(file.get_tensor(name).float() for name in names))
    except (OSError, SafetensorError, IndexError) as error:
        raise UserError(f"--calibration {path}: no calibration ({error}); {COMMAND}") from None


@dataclass(frozen=True, kw_only=True)
class FullInKVQuant(FullKV):
    """Every token, stored so."""


@hookimpl
def kvfactory_register_quantisations(register: RegisterQuantisation) -> None:
    register("kvquant", KVQuant)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("kvquant", attention=FullInKVQuant, quant_method="kvquant")
