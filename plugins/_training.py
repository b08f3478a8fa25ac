"""What `train_learned` is made of: labels from a model's own later attention, how well scores tell them, and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kvfactory import DenseStore, Engine, LayerContext, Method, Store, reduce_groups
from kvfactory.indexing import largest

from .learned import Learned, features

CHUNK = 64
"""Queries of the horizon whose attention is held at once."""
SAMPLED = 512
"""Tokens of each head and document that are learned from."""
PATIENCE = 3
"""Epochs without a better one after which training ends."""
PROTECTED = Learned(budget=64).protected()
"""First and last tokens of a context, which do not compete."""

Score = Callable[[LayerContext], Tensor]
"""A layer -> [kv_heads, tokens], float32."""


@dataclass(frozen=True)
class Task:
    """What is to be told of a context, and by which features."""

    context_length: int
    horizon: int
    top_share: float
    features: tuple[str, ...]
    window_size: int

    @property
    def competing(self) -> slice:
        return slice(PROTECTED[0], self.context_length - PROTECTED[1])

    def context(self, layer: LayerContext) -> LayerContext:
        """The layer as a method would see it when the context ends."""
        return cut(layer, self.context_length)

    def labels(self, layer: LayerContext) -> Tensor:
        """Which of the competing tokens of the context will get most attention, [kv_heads, competing], bool."""
        mass = future_attention(layer, self.context_length)[:, self.competing]
        return largest(mass, max(1, round(self.top_share * mass.shape[1])))


def cut(layer: LayerContext, tokens: int) -> LayerContext:
    """The layer as it was after so many tokens."""
    queries, keys, values = (each[:, :tokens] for each in (layer.queries, layer.keys, layer.values))
    hidden = None if layer.hidden is None else layer.hidden[:tokens]
    return LayerContext(layer.layer_index, layer.num_layers, queries, keys, values, hidden, layer.inverse_frequencies)


def future_attention(layer: LayerContext, context: int) -> Tensor:
    """Attention that each of the first `context` tokens gets from all queries behind them, [kv_heads, context], float32.

    Summed over the queries, and the mean over the query heads that share a KV head.
    """
    mass = layer.keys.new_zeros(layer.kv_heads, context, dtype=torch.float32)
    for start in range(context, layer.num_tokens, CHUNK):
        stop = min(start + CHUNK, layer.num_tokens)
        rows = cut(layer, stop).window_attention(stop - start)
        mass += reduce_groups(rows[:, :, :context].sum(1), layer.kv_heads, "mean")
    return mass


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """How often a labelled entry scores above one that is not, ties half: [..., tokens] twice -> [...], float64."""
    scores = scores.contiguous()
    ordered = scores.sort(-1).values
    ranks = (torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True) + 1).double() / 2
    positives = labels.sum(-1)
    won = (ranks * labels).sum(-1) - positives * (positives + 1) / 2
    return won / (positives * (labels.shape[-1] - positives))


# ---- what the model shows ----


class Noted(DenseStore):
    """Keeps nothing of a layer but what was noted of it."""

    def __init__(self, layer: LayerContext, *notes: Tensor) -> None:
        super().__init__(layer.keys[:, -1:], layer.values[:, -1:])
        self.notes = [each.cpu() for each in notes]


@dataclass(frozen=True, kw_only=True)
class Collect(Method):
    """Notes features [kv_heads, sampled, numbers], float16, and labels [kv_heads, sampled] of some competing tokens."""

    task: Task
    sampled: tuple[int, ...]

    def compress(self, layer: LayerContext) -> Store:
        context, chosen = self.task.context(layer), list(self.sampled)
        found = features(context, self.task.features, self.task.window_size)[:, self.task.competing][:, chosen]
        found = found.expand(layer.kv_heads, -1, -1).half()
        return Noted(layer, found, self.task.labels(layer)[:, chosen], layer.rotary_frequencies().float())


@dataclass(frozen=True, kw_only=True)
class Judge(Method):
    """Notes the AUC of each score, [kv_heads]."""

    task: Task
    scores: tuple[Score, ...]

    def compress(self, layer: LayerContext) -> Store:
        context, labels = self.task.context(layer), self.task.labels(layer)
        return Noted(layer, *(auc(score(context)[:, self.task.competing], labels) for score in self.scores))


def read(engine: Engine, ids: list[int], method: Method) -> list[Tensor]:
    """What a method notes of a document, each stacked over layers."""
    stores = engine.prefill(ids, [method])[0].cache.stores
    return [
        torch.stack(each) for each in zip(*(store.notes for store in stores if isinstance(store, Noted)), strict=True)
    ]


def collect(engine: Engine, documents: Sequence[list[int]], task: Task, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features [layers, kv_heads, samples, numbers], float16, and labels [layers, kv_heads, samples] of all documents.

    The third are the model's rotary angles [head_dim / 2].
    """
    generator = torch.Generator().manual_seed(seed)
    competing = task.competing.stop - task.competing.start
    found = []
    for ids in track(documents, description="reading"):
        chosen = torch.randperm(competing, generator=generator)[:SAMPLED].tolist()
        found.append(read(engine, ids, Collect(task=task, sampled=tuple(chosen))))
    read_features, labels, frequencies = zip(*found, strict=True)
    return torch.cat(read_features, 2), torch.cat(labels, 2), frequencies[0][0]


def judge(
    engine: Engine, documents: Sequence[list[int]], task: Task, scores: Mapping[str, Score], what: str
) -> dict[str, float]:
    """AUC of each score, the mean over documents, layers and heads."""
    method = Judge(task=task, scores=tuple(scores.values()))
    found = [torch.stack(read(engine, ids, method)) for ids in track(documents, description=f"comparing on {what}")]
    means = torch.stack(found).mean((0, 2, 3)).tolist()
    return {name: round(each, 4) for name, each in zip(scores, means, strict=True)}


# ---- training ----


@dataclass(frozen=True)
class Training:
    """How a network is trained."""

    hidden: tuple[int, ...]
    shared_by: str
    """Whose tokens one network scores: those of a `head`, of all heads of a `layer`, or of the whole `model`."""
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


def train(samples: Sequence[Tensor], validation: Sequence[Tensor], how: Training) -> dict[str, Tensor]:
    """The tensors of a weights file, of the epoch that does best on the validation samples.

    Of each, features [layers, kv_heads, samples, numbers], float16, and labels [layers, kv_heads, samples], bool.
    """
    generator = torch.Generator().manual_seed(how.seed)
    std, mean = torch.std_mean(over_shared(samples[0].float(), how.shared_by), 2)
    std = std.clamp(min=1e-4)
    widths = [mean.shape[-1], *how.hidden, 1]
    network: dict[str, Tensor] = {}
    for each, (given, made) in enumerate(pairwise(widths)):
        bound = given**-0.5  # as torch's own linear layers begin
        for name, shape in (("weight", (made, given)), ("bias", (made,))):
            start = torch.rand(*mean.shape[:2], *shape, generator=generator) * 2 * bound - bound
            network[f"{each}.{name}"] = start.requires_grad_()
    optimizer = torch.optim.Adam(network.values(), lr=how.learning_rate)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        x = (over_shared(x.float(), how.shared_by) - mean[:, :, None]) / std[:, :, None]
        for each in range(len(widths) - 1):
            x = x.relu() if each else x
            x = x @ network[f"{each}.weight"].transpose(-1, -2) + network[f"{each}.bias"][:, :, None]
        wanted = over_shared(labels[..., None].float(), how.shared_by)
        return binary_cross_entropy_with_logits(x, wanted)

    best, kept, since = torch.inf, dict(network), 0
    for _ in track(range(how.epochs), description="training"):
        for chosen in torch.randperm(samples[0].shape[2], generator=generator).split(how.batch_size):
            optimizer.zero_grad()
            loss(samples[0][:, :, chosen], samples[1][:, :, chosen]).backward()
            optimizer.step()
        with torch.no_grad():
            pieces = zip(*(each.split(how.batch_size, 2) for each in validation), strict=True)
            now = sum(float(loss(*piece)) * piece[1].shape[2] for piece in pieces)
        since = since + 1 if now >= best else 0
        if now < best:
            best, kept = now, {name: each.detach().clone() for name, each in network.items()}
        if since == PATIENCE:
            break
    return {"mean": mean, "std": std} | {name: each.half() for name, each in kept.items()}


def over_shared(x: Tensor, shared_by: str) -> Tensor:
    """x [layers, kv_heads, samples, ...] with the samples of all that share a network side by side."""
    if shared_by == "layer":
        return x.flatten(1, 2)[:, None]
    return x if shared_by == "head" else x.flatten(0, 2)[None, None]
