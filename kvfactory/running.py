"""The run of a benchmark, from flags to table: the model is loaded, what is missing runs, and everything is written."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from . import models
from .attention import family_of
from .budget import Share
from .chat import stop_ids
from .chunks import take_in_chunks
from .engine import Engine
from .environment import environment
from .errors import Interrupted, require
from .inference import for_inference
from .progress import RunProgress, shown
from .registry import Registry
from .report.terminal import print_table, wide_console
from .results import ROWS, RunFolder
from .runner import GROWING, HARMLESS, Runner
from .sweep import Sweep


def run_sweep(name: str, runner: Runner, flags: dict[str, Any], settings: dict[str, Any], registry: Registry) -> None:
    """Load, run what is missing, write the tables and say where everything is."""
    console = wide_console()
    jobs = runner.jobs(registry, flags, settings)
    for notice in dict.fromkeys(part.notice for job in jobs for part in job.method.parts() if part.notice):
        print(f"notice: {notice}", file=sys.stderr)
    if flags["prefill_chunk"]:
        for job in jobs:
            take_in_chunks(job.method)
    models.prepare_process()
    _seed(flags["seed"])
    model, tokenizer = models.load_model(
        flags["model_path"], flags["attn_implementation"], flags["dtype"], flags["device"]
    )
    family_of(model, registry.families)
    benchmark, facts = runner.make(model, tokenizer, flags)
    require(
        not (benchmark.one_pass and flags["prefill_chunk"]),
        f"--prefill_chunk {flags['prefill_chunk']}: this benchmark scores prompts that are read at once; leave it out",
    )
    arguments = {each: _plain(value) for each, value in flags.items()} | settings
    free = (*GROWING, *HARMLESS, *runner.grows)
    kept = {each: value for each, value in arguments.items() if each not in free}
    model_facts = {"model": flags["model_path"] or models.EMBEDDED, "dtype": str(model.dtype).removeprefix("torch.")}
    where = {**environment([asdict(plugin) for plugin in registry.plugins]), "device_of_model": str(model.device)}
    save_dir = flags["save_dir"] or Path("results") / name / Path(str(model_facts["model"])).name
    with RunFolder.open(
        save_dir, kept | model_facts | facts, environment=where, arguments=arguments | {"command": sys.argv}, free=free
    ) as folder:
        if folder.notice:
            print(f"notice: {folder.notice}", file=sys.stderr)
        sweep = (runner.sweep or Sweep)(
            Engine(for_inference(model), tokenizer),
            tokenizer,
            benchmark,
            jobs,
            folder,
            stop_ids(model, tokenizer),
            rows_at_once=flags["eval_batch_size"],
            bytes_at_once=flags["eval_cache_gib"] * 2**30,
            record_tokens=flags["record_tokens"],
            prefill_chunk=flags["prefill_chunk"],
        )
        _run_with_progress(sweep, name, flags["quiet"])
        rows = sweep.rows()
        print_table(rows, console)
        console.print(f"rows    {folder.path / ROWS}\ntable   {folder.write_csv(rows)}", soft_wrap=True)
        runner.finish(rows, folder.path, console)


def _run_with_progress(sweep: Sweep, name: str, quiet: bool) -> None:
    console, folder = Console(stderr=True), sweep.folder
    missing, total, already = sweep.missing(), sweep.count_missing(), len(folder.done)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > models.default_threads():
        print(
            "notice: other programs use the processors, so this takes longer and times are not comparable",
            file=sys.stderr,
        )
    if already and not quiet:
        console.print(f"{already} rows are in {folder.path} already, {total} to go", soft_wrap=True)
    title = f"{name}: {len(missing)} prompts, {len(sweep.jobs)} configurations"
    progress = RunProgress(title, total, folder.rows)
    try:
        with shown(progress, console, quiet):
            if missing:
                sweep.warm_up()
            sweep.run(progress)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {len(folder.done)} of {already + total} rows are in {folder.path}; "
            "the same command goes on from there"
        ) from None


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value) if isinstance(value, Share) else value
