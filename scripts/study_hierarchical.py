"""Popularity tiers against sinks and recent tokens: what is still answered, and how much of the cache is read.

python scripts/study_hierarchical.py                     # writes the tables of docs/studies/hierarchical.md
python scripts/study_hierarchical.py --passages FILE --output tables.md

A prompt is a passage, in half of the cases with a question before it. Every configuration goes on from one prefill and
tells what the passage is about, stop tokens barred, so that tiers have windows to act in; then the question is asked, again
or for the first time, and answered behind the beginning of a sentence. `nats` is what each token of the right answer costs,
less is better; `right` the share of answers that begin with it. Read tokens are what a head reads in a step, the mean over
heads and layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import click
import pandas as pd
from rich.progress import track

from kvfactory import Engine, UserError, load_model
from kvfactory.chat import chat_ids, stop_ids
from kvfactory.cli import run_command
from kvfactory.engine import Sequence as DecodedSequence
from kvfactory.flag_types import OutputFile
from kvfactory.jobs import Job, make_jobs
from kvfactory.models import prepare_process
from kvfactory.registry import get_registry
from kvfactory.report.methods import markdown

ROOT = Path(__file__).parent.parent
PAGE, PASSAGES = ROOT / "docs" / "studies" / "hierarchical.md", ROOT / "scripts" / "passages.json"
CONFIGURATIONS = {
    "FullKV": "fullkv",
    "32 sinks and 256 recent": "streamingllm:budget=288:sink_size=32:decode_budget=same",
    "tiers, masked, generated tokens counted": "hierarchical:budget=none:mode=mask:profile_prompt=false",
    "the same, literal promotion": "hierarchical:budget=none:mode=mask:profile_prompt=false:promotion=literal",
    "tiers, masked, prompt counted too": "hierarchical:budget=none:mode=mask",
    "the same, for a layer as a whole": "hierarchical:budget=none:mode=mask:popularity_scope=layer",
    "tiers, dropped": "hierarchical:budget=none",
    "tiers, dropped, 64 hits a query": "hierarchical:budget=none:access_size=64",
    "tiers, dropped, one window of ghosts": "hierarchical:budget=none:ghost_windows=1",
    "tiers, low ones on the host": "hierarchical:budget=none:mode=offload",
    "tiers, dropped, at most 288": "hierarchical:budget=288",
}
PLACEMENTS = {
    "before": "Read the text and answer: {question}\n\n{text}\n\nTell what the text is about.",
    "after": "{text}\n\nTell what the text is about.",
}
QUESTION = "\n\nQuestion: {question}\nAnswer: {prefix}"


def read_passages(path: Path) -> list[dict[str, Any]]:
    """Passages, each with a text and questions: their kind, the question, the answer, and the words before the answer."""
    try:
        passages = json.loads(path.read_text("utf-8"))
        asked = [question for passage in passages for question in passage["questions"] if passage["text"]]
        assert asked and all(each[name] for each in asked for name in ("kind", "question", "prefix", "answer"))
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"--passages {path}: not a list of passages, each with text and questions in JSON") from None
    return passages


def words(text: str) -> str:
    """Lower case, without punctuation."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def run(engine: Engine, jobs: dict[str, Job], passages: Sequence[dict[str, Any]], new_tokens: int) -> pd.DataFrame:
    """One line for each passage, question, placement and configuration."""
    asked = [(passage, *each) for passage in passages for each in product(passage["questions"], PLACEMENTS)]
    lines: list[dict[str, Any]] = []
    told: dict[str, list[Told]] = {}  # a prompt without a question before it is one for all of its questions
    for passage, question, placement in track(asked, description="reading and answering"):
        prompt = PLACEMENTS[placement].format(text=passage["text"], question=question["question"])
        if prompt not in told:
            told[prompt] = tell(engine, list(jobs.values()), prompt, new_tokens)
        for name, each in zip(jobs, told[prompt], strict=True):
            facts = {"configuration": name, "placement": placement, "kind": question["kind"]}
            lines.append(facts | each.sizes | answer(engine, each.sequence, question))
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class Told:
    """A sequence that has told what its passage is about, and what it read and held meanwhile."""

    sequence: DecodedSequence
    sizes: dict[str, float]


def tell(engine: Engine, jobs: Sequence[Job], prompt: str, new_tokens: int) -> list[Told]:
    """One for each configuration, all from one prefill."""
    assert engine.tokenizer is not None
    stop = stop_ids(engine.model, engine.tokenizer)
    sequences = engine.prefill(chat_ids(engine.tokenizer, prompt), [job.method for job in jobs])
    read: list[list[float]] = [[] for _ in sequences]
    for _ in range(new_tokens):
        engine.decode(sequences, 1, stop=stop, min_new_tokens=2)
        for sequence, counts in zip(sequences, read, strict=True):
            counts.append(fmean(sequence.cache.read()))
    found = []
    for sequence, counts in zip(sequences, read, strict=True):
        fields = sequence.cache.method.row_fields(sequence.cache.stores)
        moves = fields.get("moves", {})
        sizes = {
            "prompt_tokens": sequence.prompt_tokens,
            "read": fmean(counts[1:]),
            "read_at_end": counts[-1],
            "bytes": sequence.cache.nbytes() - fields.get("host_bytes", 0),
            "host": fields.get("host_bytes", 0),
            "back": moves.get("back", 0),
            "to_host": moves.get("bytes_out", 0),
            "to_device": moves.get("bytes_back", 0),
        }
        found.append(Told(sequence, sizes))
    return found


def answer(engine: Engine, told: DecodedSequence, question: dict[str, str]) -> dict[str, float]:
    """What the right answer costs, and whether the answer begins with it."""
    assert engine.tokenizer is not None
    encode = partial(engine.tokenizer.encode, add_special_tokens=False)
    asked = engine.extend(told.fork(), encode(QUESTION.format(**question)))
    right = encode(" " + question["answer"])
    tokens = engine.decode([asked.fork()], len(right) + 2)[0]
    begins = words(engine.tokenizer.decode(tokens)).startswith(words(question["answer"]))
    return {"nats": float(engine.score([asked], right)[0].mean()), "right": float(begins)}


def tables(found: pd.DataFrame, names: Sequence[str]) -> str:
    """Markdown: everything by configuration and placement, then read tokens by kind of question."""
    heads = [
        "configuration",
        "question",
        "nats",
        "right %",
        "read tokens",
        "read at the end",
        "on the device",
        "on the host",
    ]
    full = found[found.configuration == names[0]].groupby("placement").bytes.mean()
    lines: list[list[object]] = []
    for name in names:
        for placement, part in found[found.configuration == name].groupby("placement", sort=False):
            held = (f"{part[column].mean() / full[placement]:.0%}" for column in ("bytes", "host"))
            reads = f"{part.read.mean():.0f}", f"{part.read_at_end.mean():.0f}"
            lines.append([name, placement, f"{part.nats.mean():.2f}", f"{100 * part.right.mean():.0f}", *reads, *held])
    before = found[found.placement == "before"]
    by_kind = before.pivot_table("read_at_end", "configuration", "kind", sort=False).loc[list(names)]
    sizes = [[name, *(f"{size:.0f}" for size in by_kind.loc[name])] for name in names]
    moved = found[found.to_host > 0].groupby("configuration", sort=False)[["back", "to_host", "to_device"]].mean()
    traffic = [
        [name, f"{line.back:.0f}", f"{line.to_host / 2**20:.1f}", f"{line.to_device / 2**20:.1f}"]
        for name, line in moved.iterrows()
    ]
    return "\n\n".join(
        [
            markdown(heads, lines),
            "Read tokens at the end where the question came first, by its kind:",
            markdown(["configuration", *by_kind.columns], sizes),
            "What moved, a prompt and its answer, all layers and heads:",
            markdown(["configuration", "entries taken back", "MiB to the host", "MiB back"], traffic),
        ]
    )


@click.command(help=__doc__)
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
@click.option("--passages", type=click.Path(path_type=Path), default=PASSAGES, show_default="scripts/passages.json")
@click.option("--new_tokens", default=82, show_default=True, help="Tokens between the prompt and the question.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--output", type=OutputFile(".md"), help="Where the tables go.  [default: into the study's page]")
def study(model_path: str | None, passages: Path, new_tokens: int, dtype: str, output: Path | None) -> None:
    prepare_process()
    texts = read_passages(passages)
    jobs = dict(zip(CONFIGURATIONS, make_jobs(get_registry(), list(CONFIGURATIONS.values()), [1]), strict=True))
    found = run(Engine(*load_model(model_path, dtype=dtype)), jobs, texts, new_tokens)
    shortest, longest = found.prompt_tokens.min(), found.prompt_tokens.max()
    questions = sum(len(each["questions"]) for each in texts)
    facts = (
        f"{questions} questions, prompts of {shortest} to {longest} tokens, {new_tokens} tokens before the question."
    )
    text = f"{facts}\n\n{tables(found, list(jobs))}"
    if output:
        output.write_text(f"{text}\n", "utf-8")
    else:
        page = PAGE.read_text("utf-8")
        start, end = "<!-- tables -->", "<!-- end of tables -->"
        PAGE.write_text(f"{page.split(start)[0]}{start}\n{text}\n{end}{page.split(end)[1]}", "utf-8")
    click.echo(text)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: study, arguments)


if __name__ == "__main__":
    main()
