"""MInference: a prompt attends to itself sparsely, each head in its own pattern, and is kept whole (arXiv 2407.02490).

A head has one of three patterns. `stream_llm`, the A-shape, sees the first tokens and a window of recent ones.
`vertical_and_slash` sees the columns and the diagonals that the last queries attend to most. `block_sparse` sees the blocks
of keys whose means fit best to the mean of a block of queries. Heads for which `patterns` says nothing, all of them without
a file, are `vertical_and_slash` with 1000 columns and 6096 diagonals: up to 6096 tokens a prompt is attended to in
full, by the model's own kernel. Decoding is that of FullKV.

Here a diagonal is one token wide. The authors' CUDA kernel runs every block of 64 that a chosen diagonal touches and lets
queries see all of its keys, a superset; `backend=minference` calls it, and theirs for the other patterns. Here those blocks
are gathered and masked to what was chosen: memory grows with the choice and never with the square of the prompt. The mean
of a last block that is not full is over its own tokens. Under a sliding window shorter than the prompt, of which the paper
knows nothing, the model's own attention runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import DenseStore, LayerContext, Method, Store, at_least, hookimpl, require
from kvfactory.errors import UserError
from kvfactory.hookspecs import RegisterMethod
from kvfactory.kernels import sdpa_prefill
from kvfactory.sparse import Blocks, Choice, Lines, sparse_attention

LEAST_COLUMNS, LEAST_SLASHES = 30, 50
FORCED_COLUMNS, FORCED_SLASHES = 30, 100


class Pattern(NamedTuple):
    """What a file says of one head; for `stream_llm` the sizes are those of the beginning and of the window."""

    kind: str = "vertical_and_slash"
    vertical_size: int = 1000
    slash_size: int = 6096


KINDS = ("stream_llm", "vertical_and_slash", "block_sparse")


def sums(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the last queries [queries, dim] to keys [tokens, dim], summed by column and by diagonal, float32."""
    rows, tokens = len(query), len(key)
    logits = query.float() @ key.float().T / math.sqrt(query.shape[-1])
    later = torch.ones_like(logits, dtype=torch.bool).triu(tokens - rows + 1)
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    # backwards, each row sheared by one more: diagonals stand upright and sum in an order that is always the same
    sheared = pad(weights.flip(1), (0, rows)).as_strided((rows, tokens), (tokens + rows - 1, 1), rows - 1)
    return weights.sum(0), sheared.sum(0)


def best(scores: Tensor, count: int, forced: int) -> Tensor:
    """The first `forced` and the largest of the others, `count` in all, ascending."""
    scores = scores.index_fill(0, torch.arange(min(forced, len(scores)), device=scores.device), torch.inf)
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def vertical_and_slash(
    query: Tensor, key: Tensor, columns: int, slashes: int, last_queries: int, size: int
) -> Lines | None:
    """The columns and diagonals that the last of the queries [tokens, dim] attend to most."""
    tokens = len(query)
    columns, slashes = max(columns, LEAST_COLUMNS), max(slashes, LEAST_SLASHES)
    if columns >= tokens or slashes >= tokens:
        return None
    by_column, by_slash = sums(query[-last_queries:], key)
    chosen = torch.zeros(tokens, dtype=torch.bool, device=query.device)
    chosen[best(by_slash, slashes, FORCED_SLASHES)] = True
    return Lines(best(by_column, columns, FORCED_COLUMNS), chosen, size)


def a_shape(tokens: int, first: int, recent: int, size: int, device: torch.device) -> Lines | None:
    """The first tokens and the most recent ones, a query's own among them."""
    if first + recent >= tokens:
        return None
    return Lines(torch.arange(first, device=device), torch.arange(tokens, device=device) < recent, size)


def block_sparse(query: Tensor, key: Tensor, count: int, size: int) -> Blocks | None:
    """For each block of queries the `count` blocks of keys with the largest product of means."""

    def means(x: Tensor) -> Tensor:
        return torch.stack([each.float().mean(0) for each in x.split(size)])

    scores = means(query) @ means(key).T
    if count >= len(scores):
        return None
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return Blocks(scores.masked_fill(later, -torch.inf).argsort(descending=True, stable=True)[:, :count], size)


@cache
def read_patterns(path: str) -> tuple[dict[int, Pattern], ...]:
    """What MInference's file says, by layer and query head; UserError for a file that is none."""
    wanted = 'a list over layers of {"head": [type, vertical_size, slash_size, score]}'
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--patterns {path}: cannot be read as JSON ({error}); it is {wanted}") from None
    require(isinstance(layers, list), f"--patterns {path}: it holds no list; it is {wanted}")
    return tuple(_read_layer(each or {}, f"--patterns {path}: layer {index}") for index, each in enumerate(layers))


def _read_layer(heads: Any, where: str) -> dict[int, Pattern]:
    require(
        isinstance(heads, dict), f'{where} is no object; it is {{"head": [type, vertical_size, slash_size, score]}}'
    )
    read = {}
    for head, given in heads.items():
        here = f"{where}, head '{head}'"
        require(head.isdecimal(), f"{here}: a head is a number, counted from 0")
        if given is None:
            continue
        require(
            isinstance(given, list) and len(given) >= 3 and given[0] in KINDS,
            f"{here} is {json.dumps(given)}; it is [type, vertical_size, slash_size, score], type one of {', '.join(KINDS)}",
        )
        kind, *sizes = given[:3]
        whole = all(isinstance(each, int) and not isinstance(each, bool) for each in sizes)
        require(
            whole and sizes[0] >= 0 and (sizes[1] >= 1 or kind != "stream_llm"),
            f"{here} is {json.dumps(given)}; sizes are whole numbers, 0 or more, and a window is 1 or more",
        )
        read[int(head)] = Pattern(kind, *sizes)
    return read


def check_fit(path: str, layer: LayerContext) -> None:
    """Raise a `UserError` for a file that is for a model with more layers or heads."""
    layers = read_patterns(path)
    heads = max((head + 1 for each in layers for head in each), default=0)
    require(
        len(layers) <= layer.num_layers and heads <= layer.query_heads,
        f"--patterns {path} is for {len(layers)} layers and at least {heads} heads; the model has {layer.num_layers} and "
        f"{layer.query_heads}",
    )


def package() -> Any:
    """MInference's own kernels."""
    try:
        kernels = import_module("minference")
    except ImportError:
        raise UserError(
            "--backend minference takes the package minference, which cannot be imported; pip install it, or give torch"
        ) from None
    require(torch.cuda.is_available(), "--backend minference takes a CUDA device, and there is none; give torch")
    return kernels


def package_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, choice: Choice) -> Tensor:
    """As `sparse_attention`, by the authors' kernels."""
    kernels = package()
    row = [each[None, None].contiguous() for each in (query, key, value)]
    if isinstance(choice, Blocks):
        output = kernels.block_sparse_attention(*row, choice.chosen.shape[1])
    elif pattern.kind == "stream_llm":
        output = kernels.streaming_forward(*row, pattern.vertical_size, pattern.slash_size)
    else:
        slashes = choice.slashes.nonzero().flatten().flip(0)
        lines = (each.int()[None, None] for each in (choice.columns, slashes))
        output = kernels.vertical_slash_sparse_attention(*row, *lines)
    return output[0, 0]


@dataclass(frozen=True, kw_only=True)
class MInference(Method):
    """Sparse attention over the prompt; every token is kept."""

    reads: ClassVar[str] = "the last queries and means of blocks"
    prefill: ClassVar[str] = "its own, sparse"

    patterns: str | None = None
    """File with the pattern of each head, in MInference's form; 1000 columns and 6096 diagonals where it says nothing."""
    last_queries: int = 64
    """The last queries, by whose attention columns and diagonals are chosen."""
    block_size: int = 64
    """Tokens of a block; queries are worked on in such blocks under every pattern."""
    block_count: int = 100
    """Blocks of keys for each block of queries, under `block_sparse`."""
    backend: Literal["torch", "minference"] = "torch"
    """Whose kernels do the sparse attention; `minference` is the authors' package, for CUDA."""

    def __post_init__(self) -> None:
        at_least(self, last_queries=1, block_size=1, block_count=1)
        if self.patterns is not None:
            read_patterns(self.patterns)
        if self.backend == "minference":
            require(
                self.block_size == 64, f"--block_size {self.block_size}: the kernels of --backend minference take 64"
            )
            package()

    def compress(self, layer: LayerContext) -> Store:
        if self.patterns is not None:
            check_fit(self.patterns, layer)
        return DenseStore(layer.keys, layer.values)

    def pattern(self, layer_index: int, head: int) -> Pattern:
        """That of a query head, the default one where the file names none."""
        layers = read_patterns(self.patterns) if self.patterns is not None else ()
        return layers[layer_index].get(head, Pattern()) if layer_index < len(layers) else Pattern()

    def choose(self, pattern: Pattern, query: Tensor, key: Tensor) -> Choice | None:
        """What a head sees, its query and key [tokens, dim]; None if it is everything."""
        sizes = pattern.vertical_size, pattern.slash_size
        match pattern.kind:
            case "stream_llm":
                return a_shape(len(query), *sizes, self.block_size, query.device)
            case "block_sparse":
                return block_sparse(query, key, self.block_count, self.block_size)
            case _:
                return vertical_and_slash(query, key, *sizes, self.last_queries, self.block_size)

    def prefill_attention(self, layer: LayerContext) -> Tensor | None:
        """See `kvfactory.kernels.PromptAttention`; None if no head leaves anything out."""
        query, key, value = layer.queries, layer.keys, layer.values
        group = len(query) // len(key)
        heads = [(query[head], key[head // group], value[head // group]) for head in range(len(query))]
        patterns = [self.pattern(layer.layer_index, head) for head in range(len(query))]
        choices = [self.choose(pattern, q, k) for pattern, (q, k, _) in zip(patterns, heads, strict=True)]
        if not any(choices):
            return None
        todo = zip(heads, patterns, choices, strict=True)
        return torch.stack([self._attend(pattern, choice, *head) for head, pattern, choice in todo])

    def _attend(self, pattern: Pattern, choice: Choice | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One head's output, [tokens, dim] as all of its input."""
        if choice is None:
            output, _ = sdpa_prefill(query[None, None], key[None, None], value[None, None], None, None)
            return output[0, 0]
        if self.backend == "minference":
            return package_attention(query, key, value, pattern, choice)
        return sparse_attention(query, key, value, choice)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("minference", attention=MInference)
