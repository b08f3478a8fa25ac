"""Learned: a small network scores tokens, trained on the attention that they are going to get.

`kvfactory train-learned` makes the weights of a model: its own later queries say which tokens of a context they attend to
most, and a network learns to tell those from what is known of a token when the prompt ends. Scores are probabilities of
being among them. Weights of the embedded model come along; others are given with `--weights`. A file says which features
its network reads, how deep it is, and whether all layers, or all KV heads of a layer, share one.

The master's thesis that this comes from has one network of widths 128 and 64 for all layers, which reads the mean over KV
heads of the rotated keys: a file with the one feature `head_mean_key`. Literature: Locret (arXiv 2410.01805) reads queries,
keys and values, Attention-Gate (2410.12876) and KVzap (2601.07891) hidden states, which no cache holds while decoding;
2601.14279 finds that what keys and values alone tell is no more than positions or the prompt's attention do.

Deviations from the thesis: it drops the newest tokens whenever the best ones and they exceed the budget, feeds no more of
a prompt than its last token, and takes labels from a cache that evicts, without documents kept apart; here the newest
tokens stay, contexts are read whole, and labels come from the model's full attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import (
    EvictionMethod,
    LayerContext,
    UserError,
    at_least,
    hookimpl,
    pool,
    reduce_groups,
)
from kvfactory.errors import unknown
from kvfactory.hookspecs import RegisterMethod
from kvfactory.rotary import rotated
from kvfactory.stores import spread

FORMAT = 1
SHIPPED = Path(__file__).parent / "calibration"
COMMAND = "kvfactory train-learned --model_path MODEL --text FILE --output FILE.safetensors"
POOLED = 7
"""Neighbours over which the window's attention is pooled, as SnapKV does."""


# ---- what a network may know of a token ----


@dataclass(frozen=True)
class Feature:
    """One or more numbers a token."""

    compute: Callable[[LayerContext, int], Tensor]
    """(layer, window size) -> [kv_heads or 1, tokens, numbers], float32."""
    per_channel: bool = False
    """Whether these are as many numbers as a key has, or one."""
    reads_window: bool = False
    """Whether the attention of the last queries is looked at."""


def unrotated_key(layer: LayerContext, window_size: int) -> Tensor:
    """Keys as they were before their rotation."""
    return rotated(layer.keys.float(), -layer.positions, layer.rotary_frequencies())


def log_distance(layer: LayerContext, window_size: int) -> Tensor:
    """Log of how far behind the end a token stands, as a share of all positions, so that long prompts look like short."""
    end = layer.positions[:, -1:] + 1
    return ((end - layer.positions) / end).float().log()[..., None]


def log_norm(x: Tensor) -> Tensor:
    return x.float().norm(dim=-1, keepdim=True).clamp(min=1e-6).log()


def window_attention(layer: LayerContext, window_size: int) -> Tensor:
    """Log of the mean attention of the last queries."""
    return window_votes(layer, window_size).clamp(min=1e-6).log()[..., None]


def pooled_window_attention(layer: LayerContext, window_size: int) -> Tensor:
    """Log of the most that a token or a neighbour got; the window's own tokens have no part in it."""
    votes = window_votes(layer, window_size)[:, : -min(window_size, layer.queries.shape[1])]
    votes = pool(votes, POOLED, "maxpool") if votes.shape[1] else votes
    return pad(votes, (0, layer.num_tokens - votes.shape[1])).clamp(min=1e-6).log()[..., None]


def window_votes(layer: LayerContext, window_size: int) -> Tensor:
    """Mean attention of the last queries, over the query heads that share a KV head, [kv_heads, tokens], float32."""
    window = min(window_size, layer.queries.shape[1])
    return reduce_groups(layer.window_attention(window).mean(1), layer.kv_heads, "mean")


FEATURES = {
    "unrotated_key": Feature(unrotated_key, per_channel=True),
    "key": Feature(lambda layer, _: layer.keys.float(), per_channel=True),
    "value": Feature(lambda layer, _: layer.values.float(), per_channel=True),
    "head_mean_key": Feature(lambda layer, _: layer.keys.float().mean(0, keepdim=True), per_channel=True),
    "key_norm": Feature(lambda layer, _: log_norm(layer.keys)),
    "value_norm": Feature(lambda layer, _: log_norm(layer.values)),
    "log_distance": Feature(log_distance),
    "window_attention": Feature(window_attention, reads_window=True),
    "pooled_window_attention": Feature(pooled_window_attention, reads_window=True),
}


def features(layer: LayerContext, names: Sequence[str], window_size: int) -> Tensor:
    """The named features of every token side by side, [kv_heads or 1, tokens, numbers], float32."""
    found = [FEATURES[name].compute(layer, window_size) for name in names]
    heads = max(map(len, found))
    return torch.cat([each.expand(heads, -1, -1) for each in found], -1)


def width(names: Sequence[str], head_dim: int) -> int:
    """How many numbers a token's features are."""
    return sum(head_dim if FEATURES[name].per_channel else 1 for name in names)


# ---- a network and its file ----


@dataclass(frozen=True)
class Layout:
    """What a weights file is for, as its .json says."""

    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    features: tuple[str, ...]
    window_size: int
    """Last queries whose attention is a feature."""

    @property
    def recent_queries(self) -> int:
        return self.window_size if any(FEATURES[name].reads_window for name in self.features) else 0

    @property
    def shape(self) -> str:
        return f"{self.num_layers} layers, {self.kv_heads} KV heads and head_dim {self.head_dim}"


class Scorer:
    """A trained network for each KV head of each layer, or one that several share."""

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        """Tensors as the file has them.

        `0.weight` [layers or 1, kv_heads or 1, width, numbers], `0.bias` [layers or 1, kv_heads or 1, width], `1.weight`
        and so on; the last width is 1. If features are to be normalised, their `mean` and `std` [layers or 1,
        kv_heads or 1, numbers]; `inverse_frequencies` [head_dim / 2], the model's rotary angles, where they are known.
        """
        self.layout = layout
        self.inverse_frequencies = tensors.get("inverse_frequencies")
        depth = sum(name.endswith(".weight") for name in tensors)
        linear = [(tensors[f"{each}.weight"].float(), tensors[f"{each}.bias"].float()) for each in range(depth)]
        if "mean" in tensors:  # once, in the first layer, rather than on every token's features
            (weight, bias), mean, std = linear[0], tensors["mean"].float(), tensors["std"].float()
            weight = weight / std[..., None, :]
            linear[0] = weight, bias - (weight * mean[..., None, :]).sum(-1)
        self.linear = [(weight.transpose(-1, -2).contiguous(), bias[..., None, :]) for weight, bias in linear]
        numbers = width(layout.features, layout.head_dim)
        for weight, bias in self.linear:
            layers, heads, given, numbers_next = weight.shape
            shared = layers in (1, layout.num_layers) and heads in (1, layout.kv_heads)
            if not shared or given != numbers or bias.shape != (layers, heads, 1, numbers_next):
                raise ValueError(
                    f"a weight of {layers} layers, {heads} heads and {given} numbers where {numbers} come in"
                )
            numbers = numbers_next
        if depth == 0 or numbers != 1:
            raise ValueError("the last weight does not give one number")

    def fits(self, layer: LayerContext) -> bool:
        """Whether the layer is of the model that this was trained for, as far as shapes and rotation tell."""
        layout = self.layout
        heads = layer.kv_heads == layout.kv_heads or layer.first_kv_head is not None
        if layer.listed_positions is not None:  # heads are stored heads
            heads = heads or layer.kv_heads == layout.query_heads
        shape = layer.num_layers == layout.num_layers and layer.keys.shape[-1] == layout.head_dim
        return heads and shape and self.turns_alike(layer)

    def turns_alike(self, layer: LayerContext) -> bool:
        ours, theirs = self.inverse_frequencies, layer.inverse_frequencies
        if ours is None or theirs is None:
            return True
        return ours.shape == theirs.shape and torch.allclose(ours, theirs.float().cpu(), rtol=1e-3)

    def logits(self, layer: LayerContext) -> Tensor:
        """[kv_heads, tokens], float32: log odds that a token is among those that will get most attention."""
        x = features(layer, self.layout.features, self.layout.window_size)
        for each, (weight, bias) in enumerate(self.linear):
            x = x.relu_() if each else x
            x = (x @ self.of_layer(weight, layer)).add_(self.of_layer(bias, layer))
        return x.squeeze(-1).expand(layer.kv_heads, -1)

    def of_layer(self, parameter: Tensor, layer: LayerContext) -> Tensor:
        """A parameter [layers or 1, kv_heads or 1, ...] for the heads that a layer holds, [kv_heads or 1, ...]."""
        own = parameter[layer.layer_index if len(parameter) > 1 else 0].to(layer.keys.device)
        if len(own) == 1:
            return own
        if layer.first_kv_head is not None:
            return own[layer.first_kv_head : layer.first_kv_head + layer.kv_heads]
        return spread(own, layer.kv_heads)


@cache
def read_weights(given: str) -> Scorer:
    """The network in a .safetensors file, with a .json of the same name beside it.

    Raises `UserError` for files that are missing or hold something else.
    """
    path = Path(given)
    try:
        facts = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, and this reads {FORMAT}")
        for name in facts["features"]:
            if name not in FEATURES:
                raise unknown("feature", name, FEATURES)
        shapes = {
            each: int(facts[each]) for each in ("num_layers", "query_heads", "kv_heads", "head_dim", "window_size")
        }
        return Scorer(Layout(features=tuple(facts["features"]), **shapes), load_file(path))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--weights {given}: no weights of a token scorer ({why}); make them with: {COMMAND}") from None


@cache
def shipped() -> list[Scorer]:
    """The networks that come with kvfactory."""
    return [read_weights(str(path)) for path in sorted(SHIPPED.glob("learned-*.safetensors"))]


# ---- the method ----


@dataclass(frozen=True, kw_only=True)
class Learned(EvictionMethod):
    """Keeps the tokens that a trained network gives the best chances of being attended to later."""

    reads: ClassVar[str] = "the window's queries"

    weights: str | None = None
    """File with the network of the model, made by `kvfactory train-learned`; those that come along if not given."""
    sink_size: int = 4
    """First tokens, always kept."""
    recent_size: int = 8
    """Last tokens, always kept."""

    def __post_init__(self) -> None:
        at_least(self, sink_size=0, recent_size=0)
        if self.weights is not None:
            read_weights(self.weights)
        super().__post_init__()

    @property
    def recent_queries(self) -> int:
        return max((each.layout.recent_queries for each in self.scorers()), default=0)

    def protected(self) -> tuple[int, int]:
        return self.sink_size, self.recent_size

    def score(self, layer: LayerContext) -> Tensor:
        """Probabilities, which rank as logits do, and unlike those are weights that allocators and merges can take."""
        return self.scorer(layer).logits(layer).sigmoid()

    def scorers(self) -> list[Scorer]:
        return shipped() if self.weights is None else [read_weights(self.weights)]

    def scorer(self, layer: LayerContext) -> Scorer:
        """The network for the layer's model.

        Raises `UserError` if there is none.
        """
        for each in self.scorers():
            if each.fits(layer):
                return each
        shape = f"{layer.num_layers} layers, {layer.kv_heads} KV heads and head_dim {layer.keys.shape[-1]}"
        if self.weights is None:
            raise UserError(
                f"no learned weights come along for this model of {shape}; "
                f"make them with: {COMMAND}, then give --weights FILE.safetensors"
            )
        layout = self.scorers()[0].layout
        turned = " and turns keys by other angles" if layout.shape == shape else ""
        raise UserError(
            f"--weights {self.weights} is of a model with {layout.shape}, and this one has {shape}{turned}; "
            f"make others with: {COMMAND}"
        )


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("learned", attention=Learned)
