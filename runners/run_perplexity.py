"""Perplexity under compression: `run_perplexity.py --method h2o,snapkv --max_capacity_prompts 256`.

By default a prefix of 1024 tokens is compressed once and the 256 tokens behind it are scored one by one. The five
protocols differ in when a method may act; their figures do not compare with each other, and every row and table says
which it was. disjoint and strided take methods that evict nothing. token_by_token presumes --decode_budget same, since
there is no prompt that a budget could be for. leaky_single_pass evicts first and masks what is kept by its index, so that
queries see later tokens; it is there to reproduce figures of code that does so, and for nothing else.

WikiText-2 is given as --text wiki.test.raw. Most papers join the rows of its `datasets` form with empty lines between,
which makes half a percent more tokens of it; a file that is written so gives their text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvfactory.benchmarks import Benchmark
from kvfactory.errors import UserError, require
from kvfactory.flag_types import CommaList, PositiveInt
from kvfactory.hookspecs import RegisterBenchmark, hookimpl
from kvfactory.installed import get_registry
from kvfactory.runner import Runner, run_benchmark, sweep_jobs

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvfactory.benchmarks.haystack import Haystack
    from kvfactory.benchmarks.perplexity import Protocol
    from kvfactory.jobs import Job
    from kvfactory.method import Method
    from kvfactory.registry import Registry
    from kvfactory.results import Row

SETTINGS = {
    "seqlen": "Tokens of a window.  disjoint, strided, leaky_single_pass [default: 2048]",
    "stride": "Tokens from one window's beginning to the next.  strided [default: 512]; prefill_then_continue [default: "
    "a window's length]",
    "tokens": "Tokens of the text that are read; all but the first are scored.  token_by_token [default: 2048]",
    "prefix": "Tokens that are compressed.  prefill_then_continue [default: 1024]",
    "continuation": "Tokens behind them that are scored.  prefill_then_continue [default: 256]",
    "windows": "Windows of each text, at most.  prefill_then_continue [default: 8]",
}
"""Flags of protocols, and what they mean."""


def options() -> list[click.Option]:
    """Flags of its own."""
    from kvfactory.benchmarks.perplexity import PROTOCOLS, PrefillThenContinue
    from kvfactory.benchmarks.texts import TEXTS

    return [
        click.Option(
            ["--protocol"],
            type=click.Choice(list(PROTOCOLS)),
            default=PrefillThenContinue.name,
            show_default=True,
            help="How the text is cut and read.",
        ),
        *(click.Option([f"--{name}"], type=PositiveInt(), help=meaning) for name, meaning in SETTINGS.items()),
        click.Option(["--text"], help="A UTF-8 text file, or a folder of .txt files, in place of --texts."),
        click.Option(
            ["--texts"],
            type=CommaList(click.STRING),
            help=f"Texts that come with this package and with Python, separated by commas.  [default: {','.join(TEXTS)}]",
        ),
        click.Option(["--max_tokens"], type=PositiveInt(), help="Tokens of each text to use.  [default: all]"),
    ]


def protocol_of(flags: dict[str, Any]) -> Protocol:
    """What the flags ask for; see `choose_protocol`."""
    from kvfactory.benchmarks.perplexity import choose_protocol

    return choose_protocol(flags["protocol"], {name: flags[name] for name in SETTINGS})


def jobs(registry: Registry, flags: dict[str, Any], settings: dict[str, Any]) -> list[Job]:
    """What runs; raises `UserError` for methods that the protocol would never let act."""
    from kvfactory.benchmarks.one_pass import acts_in_one_pass, attending
    from kvfactory.benchmarks.perplexity import PrefillThenContinue, TokenByToken

    protocol, made = protocol_of(flags), sweep_jobs(registry, flags, settings)
    if protocol.evicts_on_the_way:
        shares = [str(job.budget) for job in made if isinstance(job.budget, str)]
        require(
            not shares,
            f"--max_capacity_prompts {', '.join(dict.fromkeys(shares))}: under --protocol {protocol.name} there is no "
            "prompt to take a share of; give a number of entries",
        )
        refuse(
            [job for job in made if goes_by_prompt(job.method)],
            f"budgets are split over heads and keys pruned when a prompt ends, and --protocol {protocol.name} has none; "
            f"give --allocator uniform, --key_pruning none or --protocol {PrefillThenContinue.name}",
        )
        return holding_to_budgets(registry, flags, settings)
    if protocol.mask_by is not None:
        whole = protocol.mask_by == "position"
        refuse(
            [
                job
                for job in made
                if not acts_in_one_pass(job.method) or (whole and registry.has_budget(name_of(job.label)))
            ],
            f"--protocol {protocol.name} scores a text in one pass, and what this does comes after it; give --protocol "
            f"{TokenByToken.name} or {PrefillThenContinue.name}",
        )
        return [replace(job, method=attending(job.method, protocol.mask_by)) for job in made]
    return made


def refuse(unfit: Sequence[Job], why: str) -> None:
    """Raise a `UserError` that names the methods, if there are any."""
    require(not unfit, f"--method {', '.join(dict.fromkeys(job.label for job in unfit))}: {why}")


def goes_by_prompt(method: Method) -> bool:
    """Whether a part of the method acts when a prompt ends, and never again."""
    from kvfactory.budget import Uniform

    uneven = getattr(method, "allocator", Uniform()) != Uniform()
    return uneven or getattr(method, "key_pruning", None) is not None


def holding_to_budgets(registry: Registry, flags: dict[str, Any], settings: dict[str, Any]) -> list[Job]:
    """Jobs whose methods evict while decoding, down to their budget unless something else was asked for."""
    from kvfactory.benchmarks.perplexity import PrefillThenContinue, TokenByToken

    setting = "decode_budget"
    if setting in settings or not any(setting in registry.own_settings(name_of(spec)) for spec in flags["method"]):
        return sweep_jobs(registry, flags, settings)
    try:
        return sweep_jobs(registry, flags, settings | {setting: "same"})
    except UserError as problem:
        raise UserError(
            f"--protocol {TokenByToken.name} presumes --{setting} same, which cannot be here: {problem}; "
            f"or give --protocol {PrefillThenContinue.name}"
        ) from None


def name_of(spec: str) -> str:
    """A method's name, the settings behind it left out."""
    return spec.partition(":")[0]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    from kvfactory.benchmarks.long_texts import first_ids
    from kvfactory.benchmarks.perplexity import Perplexity

    protocol = protocol_of(flags)
    check_windows(protocol, model)
    texts = texts_of(flags)
    most = min((each for each in (flags["max_tokens"], protocol.reads()) if each is not None), default=None)
    ids = {name: first_ids(tokenizer, text.text, most) for name, text in texts.items()}
    facts = {"dtype": str(model.dtype).removeprefix("torch.")}
    sources = {name: text.record() for name, text in texts.items()}
    return Perplexity(protocol, ids, facts), {"sources": sources, **protocol.record()}


def texts_of(flags: dict[str, Any]) -> dict[str, Haystack]:
    """The texts by name."""
    from kvfactory.benchmarks.haystack import load_haystack
    from kvfactory.benchmarks.texts import TEXTS, load_texts

    if flags["text"] is None:
        return load_texts(flags["texts"] or TEXTS)
    require(flags["texts"] is None, "--text and --texts each say what is read; give one of them")
    return {Path(flags["text"]).resolve().name: load_haystack(flags["text"], "--text")}


def check_windows(protocol: Protocol, model: PreTrainedModel) -> None:
    """Say what should be known of windows of this length; raises `UserError` for those that the model cannot read so."""
    from kvfactory.attention import family_of
    from kvfactory.chat import check_window, context_window

    notices = [protocol.notice] if protocol.notice else []
    window = context_window(model.config)
    if protocol.evicts_on_the_way and window and protocol.size > window:
        notices.append(
            f"{protocol.flags()}: the model's window is {window}; what keeps more than that, or goes by true positions, "
            "breaks behind it"
        )
    else:
        check_window(model.config, protocol.size, protocol.flags())
    sliding = family_of(model, get_registry().families).sliding_window(model.config)
    require(
        protocol.mask_by is None or sliding is None or protocol.size <= sliding,
        f"{protocol.flags()}: in one pass nothing acts beyond this model's sliding window, {sliding} tokens; give fewer",
    )
    for notice in notices:
        print(f"notice: {notice}", file=sys.stderr)


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    """perplexity.csv: a line for each text, method and budget, and what the protocol was."""
    from kvfactory.report.tables import summarise

    path = folder / "perplexity.csv"
    figures = ["perplexity", "nll", "scored_tokens"]
    frame = summarise(rows)[["group", "method", "budget", *figures, "examples"]]
    frame = frame.rename(columns={"group": "text", "examples": "windows"}).astype({"scored_tokens": int})
    said = {name: rows[0].get(name) for name in ("protocol", *SETTINGS, "dtype") if name in rows[0]}
    frame.insert(0, "protocol", said.pop("protocol"))
    frame.assign(**said).to_csv(path, index=False)
    console.print(f"perplexity  {path}", soft_wrap=True)


@hookimpl
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    from kvfactory.benchmarks.perplexity import PerplexitySweep

    runner = Runner(
        help=__doc__ or "",
        options=options(),
        make=make,
        finish=finish,
        grows=("windows",),
        jobs=jobs,
        sweep=PerplexitySweep,
    )
    register("perplexity", runner)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_benchmark("perplexity", arguments)


if __name__ == "__main__":
    main()
