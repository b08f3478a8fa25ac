"""Search the pattern of each attention head of a model, for the sparse prefill of MInference.

python scripts/search_patterns.py --output patterns.json
python scripts/search_patterns.py --model_path meta-llama/Llama-3.1-8B-Instruct --context_length 16384 --keys 2048 \
    --output patterns.json
run_needle_in_haystack.py --method minference --patterns patterns.json

A text is read once with whole attention. Each head gets the candidate that retains most of its attention, over all queries
that have more keys than `--keys` before them; all candidates let a query see about so many. The authors turn winners of
other patterns into `vertical_and_slash` afterwards; here a winner stays what it is.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
import torch
from kvfactory_plugins.minference import FORCED_SLASHES, LEAST_COLUMNS, MInference, Pattern
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import DenseStore, Engine, LayerContext, Method, Store, load_model, require
from kvfactory.benchmarks.haystack import TokenizedHaystack, load_haystack
from kvfactory.cli import run_command
from kvfactory.flag_types import OutputFile, PositiveInt
from kvfactory.models import prepare_process
from kvfactory.sparse import Choice, gathered


def candidates(keys: int) -> list[Pattern]:
    """Patterns under which a query sees about so many keys."""
    first = max(keys // 8, 1)
    shares = (keys // 8, keys // 2, keys - FORCED_SLASHES)
    lines = {Pattern("vertical_and_slash", columns, keys - columns) for columns in shares if columns >= LEAST_COLUMNS}
    return [*sorted(lines), Pattern("stream_llm", first, keys - first), Pattern("block_sparse", 0, 0)]


def retained(query: Tensor, key: Tensor, choice: Choice | None) -> Tensor:
    """The share of each query's attention that goes to the keys it is left, [tokens], float32; all are [tokens, dim]."""
    tokens = len(query)
    if choice is None:
        return torch.ones(tokens, device=query.device)
    key = key.float()
    scaled = pad(query.float() / math.sqrt(query.shape[-1]), (0, 0, 0, -tokens % choice.size))
    shares = []
    for queries, at, seen in gathered(choice, tokens, query.device):
        left = torch.matmul(scaled[queries], key[at].transpose(1, 2)).masked_fill(~seen, -torch.inf)
        later = torch.arange(tokens, device=key.device) > queries[:, :, None]
        whole = torch.matmul(scaled[queries], key.T).masked_fill(later, -torch.inf)
        shares.append((left.logsumexp(-1) - whole.logsumexp(-1)).exp().flatten())
    return torch.cat(shares)[:tokens]


class SearchedStore(DenseStore):
    """Keeps every token, and what each candidate would have retained."""

    def __init__(self, keys: Tensor, values: Tensor, recall: Tensor) -> None:
        super().__init__(keys, values)
        self.recall = recall
        """[query_heads, candidates]."""


@dataclass(frozen=True, kw_only=True)
class Search(Method):
    """FullKV that tries candidates."""

    keys: int
    sparse: MInference

    def compress(self, layer: LayerContext) -> Store:
        heads = zip(layer.queries, layer.keys.repeat_interleave(layer.query_heads // layer.kv_heads, 0), strict=True)
        recall = torch.stack([self._recall(query, key) for query, key in heads])
        return SearchedStore(layer.keys, layer.values, recall)

    def _recall(self, query: Tensor, key: Tensor) -> Tensor:
        choices = (self.sparse.choose(each, query, key) for each in candidates(self.keys))
        each = [retained(query, key, choice)[self.keys :].mean() for choice in choices]
        return torch.stack(each)


def search(engine: Engine, ids: list[int], keys: int, block_size: int) -> list[dict[str, list[object]]]:
    """The best candidate of each query head by layer, as MInference's files have it."""
    sparse = MInference(block_size=block_size, block_count=max(keys // block_size, 1))
    stores = engine.prefill(ids, [Search(keys=keys, sparse=sparse)])[0].cache.stores
    tried = candidates(keys)
    layers: list[dict[str, list[object]]] = []
    for store in stores:
        assert isinstance(store, SearchedStore)
        score, winner = (each.tolist() for each in store.recall.max(1))
        chosen = ([*tried[index], round(share, 5)] for index, share in zip(winner, score, strict=True))
        layers.append({str(head): each for head, each in enumerate(chosen)})
    return layers


@click.command(help="Search the pattern of each attention head of a model, for the sparse prefill of MInference.")
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
@click.option("--output", type=OutputFile(".json"), required=True, help="The patterns, a JSON file.")
@click.option("--context_length", type=PositiveInt(), default=2048, show_default=True, help="Tokens of the text.")
@click.option("--keys", type=PositiveInt(), default=512, show_default=True, help="Keys that a query may see.")
@click.option("--block_size", type=PositiveInt(), default=64, show_default=True, help="As minference will have it.")
@click.option("--haystack", help="A text file, or a folder of .txt files.  [default: Python's own documentation]")
def write_patterns(
    model_path: str | None, output: Path, context_length: int, keys: int, block_size: int, haystack: str | None
) -> None:
    least = max(LEAST_COLUMNS + FORCED_SLASHES, block_size)
    require(keys >= least, f"--keys is {keys}; the patterns tried see {least} keys or more")
    require(keys < context_length, f"--keys is {keys}; it is less than --context_length, {context_length}")
    prepare_process()
    model, tokenizer = load_model(model_path)
    ids = TokenizedHaystack(load_haystack(haystack), tokenizer).window(0, context_length)
    with Console(stderr=True).status("searching"):
        layers = search(Engine(model, tokenizer), ids, keys, block_size)
    output.write_text(json.dumps(layers) + "\n", encoding="utf-8")
    winners = Counter(str(head[0]) for layer in layers for head in layer.values())
    named = ", ".join(f"{kind} {count}" for kind, count in winners.most_common())
    blocks = f"; use --block_count {keys // block_size}" if "block_sparse" in winners else ""
    click.echo(f"heads by pattern: {named}{blocks}\n{output}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: write_patterns, arguments)


if __name__ == "__main__":
    main()
