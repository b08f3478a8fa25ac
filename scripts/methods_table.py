"""Write the tables of docs/methods.md and README.md: what each method is, what it keeps, what it costs, what it finds.

python scripts/methods_table.py                  # needles with the embedded model first; a killed run goes on
python scripts/methods_table.py --no-measure     # the words alone, and the numbers as they are

Texts between the markers `<!-- name -->` and `<!-- end of name -->` are replaced, and nothing else.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import NoReturn

import click
from rich.progress import track

from kvfactory import Engine, UserError, load_model
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.cli import run_command
from kvfactory.eviction import EvictionMethod
from kvfactory.flag_types import CommaList
from kvfactory.folder_format import budget_name
from kvfactory.jobs import Job, make_jobs
from kvfactory.registry import Registry, get_registry
from kvfactory.report.methods import facts, markdown, settings_text
from kvfactory.results import Row, load_rows
from kvfactory.settings import settings_of
from kvfactory.sweep import full_cache_bytes

ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"
BUDGETS, LENGTH, PROMPT, BUDGET, REPEATS = (64, 128, 256), 1024, 2048, 128, 3
VARIANTS = [
    "snapkv:quant_method=kivi",
    "snapkv:retrieval=quest:token_budget=64",
    "headkv:head_table=docs/heads/SmolLM2-135M-Instruct.json",
    "duoattention:head_patterns=docs/heads/SmolLM2-135M-Instruct.json",
    "h2o:decode_budget=same",
    "streamingllm:decode_budget=same:cache_positions=true",
    "semantic:strategy=attention",
    "semantic:strategy=representative",
    "semantic:strategy=thesis",
    "snapkv:kernel_size=1",
    "snapkv:merge=pivot",
    "snapkv:merge=weighted",
    "snapkv:merge=kvmerger",
    "streamingllm:allocator=head-table:head_table=docs/heads/SmolLM2-135M-Instruct.json",
]
"""Lines beside those of the methods themselves."""
CONTINUED = [
    "fullkv",
    "snapkv",
    "h2o",
    "streamingllm",
    "random",
    "hierarchical",
    "semantic",
    "semantic:strategy=attention",
    "semantic:strategy=representative",
    "semantic:strategy=thesis",
    "learned",
]
"""Methods whose continuation of a text is compared."""
PREFIX, CONTINUATION, PIECES = 1024, 128, 1
HEADS = [
    "method",
    "paper",
    "acts in",
    "reads attention of",
    "prefill",
    "allocators",
    "merges",
    "storage",
    f"MiB at {BUDGET} of {PROMPT}",
    "of full",
    "compress s",
    *(f"needle {budget}" for budget in BUDGETS),
]


def built_in(registry: Registry) -> list[str]:
    """Methods that come with kvfactory, by name."""
    return sorted(name for name, entry in registry.methods.items() if entry.plugin.distribution == "kvfactory")


def readme_table(registry: Registry) -> str:
    """Every method in a line."""
    lines = [(f"`{each.name}`", each.paper, each.does) for each in facts(registry, built_in(registry))]
    return markdown(["method", "paper", "what it does"], lines)


def settings_table(registry: Registry) -> str:
    """Settings of each method and part; those that all evicting methods have are explained once, above the table."""
    common = {each.name for each in fields(EvictionMethod)}
    own = {f"`{name}`": registry.own_settings(name).values() for name in built_in(registry)}
    texts = {name: settings_text(each for each in known if each.name not in common) for name, known in own.items()}
    for kind, shelf in registry.parts.items():
        texts |= {f"`--{kind} {name}`": settings_text(settings_of(part).values()) for name, part in shelf.items()}
    return markdown(["method or part", "settings and their defaults"], texts.items())


def words(registry: Registry) -> dict[str, list[str]]:
    """The columns that need no measurement, by method."""
    return {
        each.name: [each.paper, each.acts_in, each.reads, each.prefill, each.allocators, each.merges, each.storages]
        for each in facts(registry, built_in(registry))
    }


def table(registry: Registry, numbers: dict[str, list[str]]) -> str:
    """The big table: a line for each method, and below it one for each of its variants."""
    known = words(registry)
    lines: list[list[str]] = []
    for name in known:
        lines.append([f"`{name}`", *known[name], *numbers.get(name, ["?"] * (3 + len(BUDGETS)))])
        lines += [[f"`{each}`", *[""] * 7, *numbers[each]] for each in numbers if each.startswith(f"{name}:")]
    return markdown(HEADS, lines)


def read_numbers(text: str) -> dict[str, list[str]]:
    """The measured columns of a page, as they are."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in between(text, "table").splitlines()[2:]]
    return {line[0].strip("`"): line[8:] for line in lines}


def between(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- end of {name} -->", text, re.DOTALL)
    if not found:
        raise UserError(f"the page has no '<!-- {name} -->' and '<!-- end of {name} -->' to write between")
    return found[1]


def put(page: Path, name: str, content: str) -> None:
    text = page.read_text("utf-8")
    page.write_text(text.replace(f"<!-- {name} -->\n{between(text, name)}", f"<!-- {name} -->\n{content}", 1), "utf-8")


def find_needles(specs: Sequence[str], folder: Path) -> list[Row]:
    """20 needles of four digits for each method and budget; rows that are there already are not run again."""
    arguments = ["--method", ",".join(specs), "--max_capacity_prompts", ",".join(map(str, BUDGETS))]
    arguments += ["--context_lengths", str(LENGTH), "--samples", "4", "--dtype", "float32", "--save_dir", str(folder)]
    subprocess.run([sys.executable, ROOT / "runners" / "run_needle_in_haystack.py", *arguments], check=True)
    return load_rows(folder)


def costs(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Of one prompt: MiB kept, the share of a full cache, and seconds to compress, the median of a few passes."""
    model, tokenizer = load_model(dtype="float32")
    text = load_haystack(None).text[: 10 * PROMPT]  # more characters than so many tokens have
    ids = tokenizer.encode(text)[:PROMPT]
    engine, methods = Engine(model, tokenizer), [job.method for job in jobs]
    passes = [engine.prefill(ids, methods) for _ in range(1 + REPEATS)][1:]  # the first one warms up
    found = {}
    for job, *sequences in zip(jobs, *passes, strict=True):
        held = sequences[0].cache.nbytes()
        seconds = median(each.cache.compress_seconds for each in sequences)
        share = held / full_cache_bytes(model, len(ids))
        found[job.label] = [f"{held / 2**20:.2f}", f"{share:.1%}", f"{seconds:.2f}"]
    return found


def texts() -> dict[str, str]:
    """Two kinds of text that every Python has."""
    return {"prose": load_haystack(None).text, "code": Path(argparse.__file__).read_text("utf-8")}


def continuations(registry: Registry) -> dict[str, list[str]]:
    """Perplexity of what follows a compressed text, by method: at each budget, of each kind of text."""
    jobs = make_jobs(registry, CONTINUED, BUDGETS)
    model, tokenizer = load_model(dtype="float32")
    engine = Engine(model, tokenizer)
    found: dict[str, list[str]] = {name: [] for name in CONTINUED}
    for text in texts().values():
        ids = tokenizer.encode(text, verbose=False)
        nats: dict[Job, list[float]] = {job: [] for job in jobs}
        for start in track(range(0, PIECES * (PREFIX + CONTINUATION), PREFIX + CONTINUATION), description="continuing"):
            sequences = engine.prefill(ids[start : start + PREFIX], [job.method for job in jobs])
            after = ids[start + PREFIX : start + PREFIX + CONTINUATION]
            for job, losses in zip(jobs, engine.score(sequences, after), strict=True):
                nats[job] += losses.tolist()
        for name in CONTINUED:
            at = {job.budget: f"{exp(fmean(nats[job])):.2f}" for job in jobs if job.label == name}
            found[name].extend(at.get(budget, at.get(None, "-")) for budget in BUDGETS)
    return found


def continuation_table(found: dict[str, list[str]], rows: Sequence[Row]) -> str:
    heads = ["method", *(f"{kind} {budget}" for kind in ("prose", "code", "needle") for budget in BUDGETS)]
    return markdown(heads, [[f"`{name}`", *found[name], *scores(rows, name)] for name in CONTINUED])


def scores(rows: Iterable[Row], label: str) -> list[str]:
    """Percent of needles found, one text a budget."""
    found: dict[object, list[float]] = {}
    for row in rows:
        if row["method"] == label:
            found.setdefault(budget_name(row), []).append(row["score"])
    means = {budget: f"{100 * sum(each) / len(each):.0f}" for budget, each in found.items()}
    return [means.get(budget, means.get("full", "-")) for budget in BUDGETS]


@click.command(help=__doc__)
@click.option("--measure/--no-measure", default=True, show_default=True, help="Run the model, or keep the numbers.")
@click.option("--method", type=CommaList(click.STRING), help="Lines to measure; others stay.  [default: all]")
@click.option("--save_dir", type=click.Path(path_type=Path), default=Path("results/methods"), show_default=True)
def write(measure: bool, method: list[str] | None, save_dir: Path) -> None:
    registry = get_registry()
    put(README, "methods", readme_table(registry))
    put(PAGE, "settings", settings_table(registry))
    numbers = read_numbers(PAGE.read_text("utf-8"))
    if measure:
        every = dict.fromkeys([*built_in(registry), *VARIANTS, *CONTINUED])
        specs = list(every) if method is None else method
        rows = find_needles(specs, save_dir)
        for label, cost in costs(make_jobs(registry, specs, [BUDGET])).items():
            numbers[label] = [*cost, *scores(rows, label)]
        if set(CONTINUED) <= set(specs):
            put(PAGE, "continuations", continuation_table(continuations(registry), rows))
    put(PAGE, "table", table(registry, numbers))
    click.echo(f"wrote {PAGE} and {README}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: write, arguments)


if __name__ == "__main__":
    main()
