"""`kvfactory train-learned`: train the network that the method `learned` scores tokens with.

    kvfactory train-learned --text novel.txt --held_out manual.txt --output mine.safetensors
    run_needle_in_haystack.py --method learned --weights mine.safetensors

Texts are cut into documents of a context and a horizon. The model reads each once; of a KV head's context tokens those are
labelled that get most attention from the queries of the horizon, which is what H2O would keep could it look ahead. What the
network reads is what the method would see when the context ends. Every fifth document is kept out of training: it decides
which epoch is the best one, and on it, and on text of another kind if there is any, the scores are compared with SnapKV's
and with how recent a token is. The tokens that the method protects do not compete, here neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfactory import Engine, LayerContext, hookimpl, load_model, require
from kvfactory.errors import UserError, unknown
from kvfactory.flag_types import CommaList, OutputFile, PositiveInt
from kvfactory.hookspecs import RegisterCommand
from kvfactory.models import EMBEDDED, prepare_process

from ._training import Score, Task, Training, collect, judge, train
from .learned import FEATURES, FORMAT, Layout, Scorer
from .snapkv import SnapKV


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no text can be read ({error}); give a text file in UTF-8") from None


def documents_of(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Pieces of a text that do not overlap, of so many tokens, each begun as the tokenizer begins a prompt."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    first = [tokenizer.bos_token_id] if tokenizer.encode("a")[0] == tokenizer.bos_token_id else []
    step = length - len(first)
    return [first + ids[start : start + step] for start in range(0, len(ids) - step + 1, step)]


def spread_over(documents: list[list[int]], count: int) -> list[list[int]]:
    """At most `count` of the documents, at even distances."""
    if len(documents) <= count:
        return documents
    return [documents[each * len(documents) // count] for each in range(count)]


def split(documents: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The documents to learn from, and every fifth, at least the last, to validate on."""
    validating = set(range(4, len(documents), 5)) or {len(documents) - 1}
    both: tuple[list[list[int]], list[list[int]]] = [], []
    for each, document in enumerate(documents):
        both[each in validating].append(document)
    return both


def text_facts(path: Path) -> dict[str, str]:
    return {"name": path.stem, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def layout_of(model: PreTrainedModel, task: Task) -> Layout:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, head_dim
    return Layout(*shape, features=task.features, window_size=task.window_size)


def write(output: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """The .safetensors file and the .json beside it, each whole or not at all."""
    half_done = [output.with_name(f".{output.stem}{suffix}") for suffix in (".safetensors", ".json")]
    half_done[0].write_bytes(save({name: each.contiguous() for name, each in tensors.items()}))
    half_done[1].write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    for path in half_done:
        path.replace(output.with_suffix(path.suffix))


class FeatureName(click.ParamType):
    """One of the features that a network may read."""

    name = "feature"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in FEATURES:
            raise unknown("feature", value, FEATURES)
        return value


TASK = ("context_length", "horizon", "top_share", "window_size")
DEFAULT = "unrotated_key,key_norm,value_norm,log_distance,window_attention"
EXISTING = click.Path(path_type=Path, dir_okay=False)
SIZE = PositiveInt()


@click.command(help="Train the network that the method `learned` scores tokens with, on texts of your own.")
@click.option("--text", "texts", type=EXISTING, multiple=True, required=True, help="A text file; may be repeated.")
@click.option("--output", type=OutputFile(".safetensors"), required=True, help="A .safetensors file.")
@click.option("--held_out", type=EXISTING, help="A text of another kind, to compare on.")
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
@click.option("--documents", type=click.IntRange(min=2), default=80, show_default=True, help="At most so many.")
@click.option("--context_length", type=click.IntRange(min=64), default=1024, show_default=True, help="Tokens scored.")
@click.option("--horizon", type=SIZE, default=512, show_default=True, help="Tokens whose attention is to be told.")
@click.option(
    "--top_share",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.1,
    show_default=True,
    help="Share of a head's tokens that are labelled as worth keeping.",
)
@click.option(
    "--features", type=CommaList(FeatureName()), default=DEFAULT, show_default=True, help=f"Of {', '.join(FEATURES)}."
)
@click.option("--window_size", type=SIZE, default=8, show_default=True, help="Last queries whose attention is read.")
@click.option("--hidden", type=CommaList(SIZE), default="64", show_default=True, help="Widths of the hidden layers.")
@click.option(
    "--shared_by",
    type=click.Choice(["head", "layer", "model"]),
    default="layer",
    show_default=True,
    help="One network for each KV head, for each layer, or for all.",
)
@click.option("--epochs", type=SIZE, default=20, show_default=True, help="At most; training ends when nothing is won.")
@click.option("--batch_size", type=SIZE, default=512, show_default=True, help="Tokens of each head in a step.")
@click.option("--learning_rate", type=click.FloatRange(0, min_open=True), default=3e-3, show_default=True)
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16 or bfloat16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def train_learned(
    texts: tuple[Path, ...],
    output: Path,
    held_out: Path | None,
    model_path: str | None,
    documents: int,
    seed: int,
    dtype: str,
    device: str,
    **flags: Any,
) -> None:
    read_texts = [read_text(path) for path in texts]
    other = None if held_out is None else read_text(held_out)
    task = Task(features=tuple(flags.pop("features")), **{each: flags.pop(each) for each in TASK})
    how = Training(hidden=tuple(flags.pop("hidden")), seed=seed, **flags)
    prepare_process()
    model, tokenizer = load_model(model_path, dtype=dtype, device=device)
    length = task.context_length + task.horizon
    pieces = [piece for text in read_texts for piece in documents_of(text, tokenizer, length)]
    require(
        len(pieces) >= 2,
        f"--text: the texts make {len(pieces)} documents of {length} tokens, and it takes one to train on and one to "
        "validate; give more text, or a shorter --context_length or --horizon",
    )
    training, validation = split(spread_over(pieces, documents))
    groups = {"validation": validation}
    if held_out is not None and other is not None:
        groups["held out"] = spread_over(documents_of(other, tokenizer, length), max(2, len(validation)))
        require(bool(groups["held out"]), f"--held_out {held_out}: it is shorter than one document of {length} tokens")
    engine = Engine(model, tokenizer)
    *samples, frequencies = collect(engine, training, task, seed)
    *unseen, _ = collect(engine, validation, task, seed + 1)
    tensors = train(samples, unseen, how) | {"inverse_frequencies": frequencies}
    layout = layout_of(model, task)
    scores = scores_to_compare(Scorer(layout, tensors))
    table = {what: judge(engine, each, task, scores, what) for what, each in groups.items()}
    facts: dict[str, Any] = {"format": FORMAT, "model": model_name(model_path)} | asdict(layout)
    facts["training"] = {each: getattr(task, each) for each in TASK} | asdict(how) | {"documents": len(training)}
    facts["training"]["dtype"] = str(model.dtype).removeprefix("torch.")
    facts["texts"] = [text_facts(path) for path in texts]
    facts["held_out"] = None if held_out is None else text_facts(held_out)
    facts["auc"] = {what: {"documents": len(groups[what])} | found for what, found in table.items()}
    write(output, tensors, facts)
    Console().print(auc_table(table))
    click.echo(output)


def model_name(model_path: str | None) -> str:
    """What a user calls the model, without folders of this machine."""
    if model_path is None:
        return EMBEDDED
    return Path(model_path).name if Path(model_path).exists() else model_path


def scores_to_compare(scorer: Scorer) -> dict[str, Score]:
    snapkv = SnapKV(budget=64)

    def recency(layer: LayerContext) -> Tensor:
        return layer.positions.float().expand(layer.kv_heads, -1)

    return {"learned": scorer.logits, "snapkv": snapkv.shared_scores, "recency": recency}


def auc_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("score", *(f"AUC, {what}" for what in found), title="Which tokens get most attention later")
    for name in next(iter(found.values())):
        table.add_row(name, *(f"{each[name]:.3f}" for each in found.values()))
    return table


@hookimpl
def kvfactory_register_commands(register: RegisterCommand) -> None:
    register("train-learned", train_learned)
