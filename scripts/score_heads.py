"""Measure how well each attention head of a model retrieves, for the budgets of HeadKV.

python scripts/score_heads.py --output heads.json
python scripts/score_heads.py --model_path meta-llama/Llama-3.1-8B-Instruct --context_length 4096 --output heads.json
run_needle_in_haystack.py --method headkv --head_table heads.json

A number is hidden in a text of each example. At every step of a right answer a query head looks at the n tokens that it
attends to most, n being the length of the hidden sentence, and earns its attention to those in the sentence, divided by n
(`retrieval-reasoning`, the rule of HeadKV). Under `copy` it earns that only for a token that the step generates again.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfactory import DenseStore, Engine, LayerContext, Method, Store, load_model, require
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.benchmarks.needle import Needle, depth_grid
from kvfactory.benchmarks.needle_styles import Secret
from kvfactory.chat import chat_ids, has_chat_template, stop_ids
from kvfactory.cli import run_command
from kvfactory.flag_types import OutputFile, PositiveInt
from kvfactory.models import prepare_process


class WatchedStore(DenseStore):
    """Keeps every token, and the attention of every step."""

    observes = True

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        self.steps: list[Tensor] = []
        """Attention of each step's query, [query_heads, length], float32."""

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        assert isinstance(weights, Tensor)
        self.steps.append(weights[:, -1])


@dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """FullKV, watched."""

    def compress(self, layer: LayerContext) -> Store:
        return WatchedStore(layer.keys, layer.values)


def earned(attention: Tensor, counts: Tensor, size: int) -> Tensor:
    """What each head earns by its `size` most attended tokens, [heads].

    Attention is [heads, tokens]; counts [tokens] or longer, bool, says which tokens are worth something.
    """
    best = attention.topk(size)
    return (best.values * counts[best.indices]).sum(1) / size


def find(text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> range:
    """Where in `ids` the tokens are that spell a text, whatever the first and the last of them spell beside it."""

    def spelt(start: int, stop: int) -> bool:
        return text in tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False)

    stop = bisect_left(range(len(ids)), True, key=lambda stop: spelt(0, stop))
    start = bisect_left(range(stop), True, key=lambda start: not spelt(start, stop)) - 1
    return range(start, stop)


def answer(engine: Engine, ids: list[int], limit: int, stop: frozenset[int]) -> tuple[list[int], list[Tensor]]:
    """The tokens of an answer, and the attention by which each was chosen, [layers, query_heads, length] each."""
    # the last token of the prompt goes by itself: its query chooses the first token of the answer
    sequence = engine.extend(engine.prefill(ids[:-1], [Watch()])[0], ids[-1:])
    tokens = engine.decode([sequence], limit, stop)[0]
    watched = [store.steps for store in sequence.cache.stores if isinstance(store, WatchedStore)]
    return tokens, [torch.stack(layers) for layers in zip(*watched, strict=True)]


def score_heads(engine: Engine, benchmark: Needle, rule: str) -> Iterator[Tensor | None]:
    """What each head earned in each example, [layers, query_heads]; None for an answer that is wrong."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    stop = stop_ids(engine.model, tokenizer)
    for example in benchmark.examples():
        ids = benchmark.prompt_ids(example)
        tokens, steps = answer(engine, ids, example.max_new_tokens, stop)
        if not benchmark.score(example, tokenizer.decode(tokens, skip_special_tokens=True))["score"]:
            yield None
            continue
        secret = Secret(example.info["key"], example.info["expected"], example.info["haystack_start"])
        needle = find(secret.sentence, ids, tokenizer)
        read = torch.tensor(ids + tokens, device=engine.device)
        inside = torch.zeros_like(read, dtype=torch.bool)
        inside[needle.start : needle.stop] = True
        yield sum(
            (
                earned(layers.flatten(0, 1), inside & (read == token) if rule == "copy" else inside, len(needle))
                for token, layers in zip(tokens, steps, strict=True)
            ),
            torch.zeros(1, device=engine.device),
        ).view(steps[0].shape[:2])


@click.command(help="Measure how well each attention head of a model retrieves, for the budgets of HeadKV.")
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
@click.option("--output", type=OutputFile(".json"), required=True, help="The table, a JSON file.")
@click.option("--examples", type=PositiveInt(), default=10, show_default=True, help="Needles, each at another depth.")
@click.option("--context_length", type=PositiveInt(), default=512, show_default=True, help="Prompt length in tokens.")
@click.option(
    "--rule", type=click.Choice(["retrieval-reasoning", "copy"]), default="retrieval-reasoning", show_default=True
)
@click.option("--haystack", help="A text file, or a folder of .txt files.  [default: Python's own documentation]")
@click.option("--seed", type=int, default=42, show_default=True)
def measure(
    model_path: str | None,
    output: Path,
    examples: int,
    context_length: int,
    rule: str,
    haystack: str | None,
    seed: int,
) -> None:
    prepare_process()
    model, tokenizer = load_model(model_path)
    benchmark = Needle(
        tokenizer,
        style="number",
        lengths=[context_length],
        depths=depth_grid(examples),
        samples=1,
        haystack=load_haystack(haystack),
        seed=seed,
        chat=partial(chat_ids, tokenizer) if has_chat_template(tokenizer) else None,
    )
    scored = score_heads(Engine(model, tokenizer), benchmark, rule)
    watched = track(scored, "needles", total=examples, console=Console(stderr=True))
    right = [each.cpu() for each in watched if each is not None]
    require(
        bool(right),
        f"none of {examples} answers was right, so no head can be said to retrieve; shorten --context_length",
    )
    heads = torch.stack(right, 2)
    table = {
        f"{layer}-{head}": [round(score, 5) for score in heads[layer, head].tolist()]
        for layer in range(heads.shape[0])
        for head in range(heads.shape[1])
    }
    output.write_text(json.dumps(table) + "\n", encoding="utf-8")
    best = heads.mean(2).flatten().argsort(descending=True)[:5].tolist()
    named = ", ".join(f"{each // heads.shape[1]}-{each % heads.shape[1]}" for each in best)
    click.echo(f"{len(right)} of {examples} answers were right; most was earned by the heads {named}\n{output}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: measure, arguments)


if __name__ == "__main__":
    main()
