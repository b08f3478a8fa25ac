"""The commands as a user types them: what they write, what they refuse, and that a kill loses nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_points import run_longbench, run_needle
from rich.console import Console
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from kvfactory import Engine, UserError, models
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.benchmarks.needle import Needle
from kvfactory.folder_format import budget_name
from kvfactory.jobs import make_jobs
from kvfactory.progress import RunningScores, RunProgress, shown
from kvfactory.recording import load_kept
from kvfactory.registry import get_registry
from kvfactory.results import Key, RunFolder, key_of, load_rows
from kvfactory.sweep import Sweep
from kvfactory.testing import TINY, TINY_CONFIGS

DATASETS = {
    "trec": {"input": "What is a lemur?", "answers": ["Animal"], "all_classes": ["Animal", "Color"]},
    "samsum": {"input": "Ann: hi\nBob: hello", "answers": ["Ann greets Bob."], "all_classes": None},
    "gov_report": {"input": "", "answers": ["A report about rivers."], "all_classes": None},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of two heads and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = models.load_tokenizer()
    config = TINY_CONFIGS["llama"].to_dict() | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three LongBench datasets, made up here."""
    folder = tmp_path_factory.mktemp("data")
    for dataset, own in DATASETS.items():
        context = " ".join(f"Sentence {number} of {dataset} is about rivers and hills." for number in range(40))
        rows = [
            {
                "context": context,
                "length": 300,
                "dataset": dataset,
                "language": "en",
                "_id": f"{dataset}{number}",
                **own,
            }
            for number in range(2)
        ]
        (folder / f"{dataset}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def needle(tiny: Path, save_dir: Path, *more: str, method: str = "fullkv,snapkv", budgets: str = "32") -> list[str]:
    flags = {"--method": method, "--max_capacity_prompts": budgets, "--model_path": tiny, "--save_dir": save_dir}
    grid = {
        "--context_lengths": "160",
        "--depths": "0,50,100",
        "--samples": "1",
        "--dtype": "float32",
        "--device": "cpu",
    }
    return [str(part) for pair in (flags | grid).items() for part in pair] + list(more)


def test_a_sweep_writes_a_row_for_each_example_method_and_budget(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_needle(needle(tiny, tmp_path, method="FullKV,SnapKV,h2o:recent_size=4", budgets="32,64")) == 0
    rows = load_rows(tmp_path)
    keys = {(row["example_id"], row["method"], row["budget"]) for row in rows}
    assert len(rows) == len(keys) == 3 * 5
    assert {method for _, method, _ in keys} == {"fullkv", "snapkv", "h2o:recent_size=4"}
    for row in rows:
        assert row["prompt_tokens"] <= 160 and row["new_tokens"] >= 1 and row["stop_reason"] in ("stop", "length")
        if row["method"] == "fullkv":
            assert row["budget"] is None and not row["evicted"]
            assert row["cache_bytes"] == row["full_cache_bytes"] and row["ratio"] == 1
        else:
            assert row["evicted"] and row["kept_tokens_mean"] == row["budget"]
            entries = row["budget"] * TINY["num_hidden_layers"] * TINY["num_key_value_heads"]
            assert row["cache_bytes"] == entries * (2 * 8 * 4 + 4), "keys and values in float32, and a position each"
        assert all(row[name] >= 0 for name in ("prefill_seconds", "compress_seconds", "decode_seconds"))
    assert {row["settings"]["recent_size"] for row in rows if row["method"].startswith("h2o")} == {4}
    printed = capsys.readouterr().out
    for path in ("rows.jsonl", "results.csv", "plots/needle_all.png"):
        assert (tmp_path / path).is_file() and path in printed
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    order = [("fullkv", "full"), ("snapkv", "32"), ("snapkv", "64")]
    assert [(line["method"], line["budget"]) for line in lines][:3] == order


def test_what_a_user_should_know_first_is_said_once(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_needle(needle(tiny, tmp_path, method="headkv,headkv:beta=2", budgets="32,64")) == 0
    assert capsys.readouterr().err.count("notice: without --head_table") == 1


def test_a_table_that_goes_into_a_pipe_folds_no_name(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    names = "quest", "snapkv:key_pruning=think"
    run_needle(needle(tiny, tmp_path, "--token_budget", "48", method=",".join(names)))
    printed = capsys.readouterr().out
    assert "read" in printed and all(f"\n{name} " in printed for name in names)


def test_needles_at_both_ends_are_cells_of_their_own(tiny: Path, tmp_path: Path) -> None:
    run_needle(needle(tiny, tmp_path))
    depths = [row["depth_percent"] for row in load_rows(tmp_path) if row["method"] == "snapkv"]
    assert sorted(depths) == [0, 50, 100]


def test_the_next_method_overwrites_nothing(tiny: Path, tmp_path: Path) -> None:
    run_needle(needle(tiny, tmp_path, method="fullkv,snapkv"))
    before = load_rows(tmp_path)
    assert run_needle(needle(tiny, tmp_path, method="adakv,snapkv", budgets="32,48")) == 0
    after = load_rows(tmp_path)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 3 * 3
    predictions = {(row["example_id"], row["method"], row["budget"]): row["prediction"] for row in after}
    assert len(predictions) == len(after)


def test_other_settings_are_refused_with_the_difference(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    run_needle(needle(tiny, tmp_path))
    capsys.readouterr()
    assert run_needle(needle(tiny, tmp_path, "--window_size", "4")) == 2
    said = capsys.readouterr().err
    assert "--window_size was not set, is" in said and said.count("\n") == 1


def test_longbench_end_to_end(tiny: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--model_path", str(tiny), "--data_dir", str(data), "--datasets", ",".join(DATASETS), "--device", "cpu"]
    sweep = ["--method", "fullkv,streamingllm", "--max_capacity_prompts", "64", "--dtype", "float32"]
    assert run_longbench([*flags, *sweep, "--save_dir", str(tmp_path)]) == 0
    rows = load_rows(tmp_path)
    assert len(rows) == 3 * 2 * 2
    limits = {"trec": 64, "samsum": 128, "gov_report": 512}
    for row in rows:
        assert 1 <= row["new_tokens"] <= limits[row["group"]]
        assert ("rougeL" in row) == (row["group"] != "trec")
    with (tmp_path / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["fullkv", "streamingllm"]
    assert set(lines[0]) == {"method", "budget", *DATASETS, "average"}
    meta = json.loads((tmp_path / "run_meta.json").read_text())
    environment = meta["sessions"][0]["environment"]
    assert {plugin["name"] for plugin in environment["plugins"]} >= {"fullkv", "streamingllm"}
    assert meta["settings"]["dtype"] == "float32" and environment["torch"] == torch.__version__


def refused(code: int, capsys: Any) -> str:
    """The one line on stderr of a command that was refused."""
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--method", "snapvk"], ["unknown method 'snapvk'", "did you mean 'snapkv'"]),
        (["--method", "snapkv", "--max_capacity_prompts", "8"], ["budget 8", "--max_capacity_prompts"]),
        (["--method", "snapkv", "--max_capacity_prompts", "0"], ["max_capacity_prompts"]),
        (["--method", "snapkv", "--max_capacity_prompts", "a"], ["max_capacity_prompts", "'a'"]),
        (["--method", "fullkv", "--window_size", "8"], ["--window_size", "snapkv"]),
        (["--method", "snapkv", "--window_size", "big"], ["--window_size is 'big'", "whole number"]),
        (["--method", "snapkv", "--pooling", "avg"], ["--pooling", "avgpool"]),
        (["--method", "snapkv", "--allocator", "piramid"], ["allocator 'piramid'", "pyramid"]),
        (["--method", "snapkv:windowsize=4"], ["windowsize", "window_size"]),
        (["--method", "snapkv:window_size"], ["snapkv:window_size", "setting=value"]),
        (["--attn_implementation", "sdp"], ["attn_implementation 'sdp'", "sdpa"]),
        (["--attn_implementation", "flash_attention_2"], ["flash_attention_2", "sdpa"]),
        (["--dtype", "float8"], ["dtype 'float8'"]),
        (["--model_path", "nowhere/at/all"], ["nowhere/at/all"]),
        (["--plugin", "no_such_file.py"], ["no_such_file.py", "no such file"]),
        (["--nosuchflag", "1"], ["--nosuchflag"]),
        (["--context_lengths", "20"], ["--context_lengths 20", "shortest"]),
        (["--depths", "120"], ["--depths 120"]),
        (["--haystack", "no_such_text"], ["--haystack", "no_such_text"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(
    changes: list[str], words: list[str], tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    said = refused(run_needle(needle(tiny, tmp_path / "run", *changes)), capsys)
    assert all(word in said for word in words), said


def test_bad_longbench_data_is_named_by_file_and_line(tiny: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    base = ["--model_path", str(tiny), "--method", "fullkv", "--device", "cpu", "--save_dir", str(tmp_path / "run")]
    assert "'trek'" in refused(run_longbench([*base, "--data_dir", str(data), "--datasets", "trek"]), capsys)
    said = refused(run_longbench([*base, "--data_dir", str(tmp_path), "--datasets", "trec"]), capsys)
    assert str(tmp_path / "trec.jsonl") in said
    whole = (data / "trec.jsonl").read_text().splitlines()
    (tmp_path / "trec.jsonl").write_text(whole[0] + "\n{broken\n")
    said = refused(run_longbench([*base, "--data_dir", str(tmp_path), "--datasets", "trec"]), capsys)
    assert f"{tmp_path / 'trec.jsonl'}:2" in said


def test_an_unknown_model_family_is_named(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "neox"
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50000, **small)).save_pretrained(folder)
    models.load_tokenizer(tiny).save_pretrained(folder)
    said = refused(run_needle(needle(folder, tmp_path / "run")), capsys)
    assert "model family 'gpt_neox'" in said and "llama" in said


def test_a_method_from_a_file(tiny: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "middle.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from kvfactory import EvictionMethod, hookimpl\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Middle(EvictionMethod):\n"
        "    spread: float = 1.0\n"
        "    def score(self, layer):\n"
        "        middle = torch.arange(layer.num_tokens, dtype=torch.float32) - layer.num_tokens / 2\n"
        "        return -(middle * self.spread).abs().expand(layer.kv_heads, -1)\n"
        "@hookimpl\n"
        "def kvfactory_register_methods(register):\n"
        "    register('middle', attention=Middle)\n"
    )
    script = Path(__file__).parents[1] / "runners" / "run_needle_in_haystack.py"
    flags = needle(tiny, tmp_path / "run", "--plugin", str(plugin), "--spread", "2", method="middle")
    subprocess.run([sys.executable, script, *flags], check=True, capture_output=True)
    rows = load_rows(tmp_path / "run")
    assert len(rows) == 3 and {row["settings"]["spread"] for row in rows} == {2.0}


def small_sweep(model: Any, tokenizer: Any, folder: RunFolder) -> Sweep:
    grid = {"lengths": [160], "depths": [0.0, 50.0, 100.0], "samples": 4}
    benchmark = Needle(tokenizer, style="number", haystack=load_haystack(), **grid)
    jobs = make_jobs(get_registry(), ["fullkv", "snapkv", "h2o"], [32, 64])
    return Sweep(Engine(model), tokenizer, benchmark, jobs, folder, stop=(), rows_at_once=12, record_tokens=64)


def keys_of(rows: list[dict[str, Any]]) -> list[Key]:
    return [key_of(row) for row in rows]


def test_a_hundred_kills_at_random_moments_lose_no_row_and_make_none_twice(tiny: Path, tmp_path: Path) -> None:
    """Forked children, since each start of the command itself would spend seconds on imports.

    Once, while a child works, another process asks for the folder and is told in one line that it cannot have it.
    """
    model, tokenizer = models.load_model(tiny, dtype="float32", device="cpu")
    rng = random.Random(7)
    seen: list[dict[str, Any]] = []
    refusals = 0
    torch.set_num_threads(1)  # a forked child must not wait for threads that stayed behind
    for attempt in range(100):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            with RunFolder.open(tmp_path, {"grid": 1}, environment={}) as folder:
                small_sweep(model, tokenizer, folder).run()
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.25))
        if not refusals:
            try:
                RunFolder.open(tmp_path, {"grid": 1}, environment={}).close()
            except UserError as problem:
                said = f"{tmp_path}: another process is writing here; let it finish or use another --save_dir"
                assert str(problem) == said
                refusals += 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rows = load_rows(tmp_path) if (tmp_path / "rows.jsonl").exists() else []
        assert rows[: len(seen)] == seen, f"kill {attempt} lost or changed a row"
        seen = rows
    assert refusals == 1
    with RunFolder.open(tmp_path, {"grid": 1}, environment={}) as folder:
        sweep = small_sweep(model, tokenizer, folder)
        wanted = {(example.id, job.label, job.budget) for example in sweep.benchmark.examples() for job in sweep.jobs}
        sweep.run()
        assert sweep.missing() == []
    rows = load_rows(tmp_path)
    assert len(rows) == len(wanted) and set(keys_of(rows)) == wanted
    assert set(load_kept(tmp_path)) == {(row["example_id"], row["method"], str(budget_name(row))) for row in rows}
    with RunFolder.open(tmp_path / "unbroken", {"grid": 1}, environment={}) as folder:
        small_sweep(model, tokenizer, folder).run()
    predictions = dict(zip(keys_of(rows), [row["prediction"] for row in rows], strict=True))
    for row in load_rows(tmp_path / "unbroken"):
        assert predictions[key_of(row)] == row["prediction"]


# -- progress --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_says_how_to_go_on_and_does(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append, written = RunFolder.append, []

    def interrupted(folder: RunFolder, row: dict[str, Any]) -> None:
        append(folder, row)
        written.append(row)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append", interrupted)
    flags = needle(tiny, tmp_path / "run")
    assert run_needle(flags) == 130
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"error: interrupted: 2 of 6 rows are in {tmp_path / 'run'}; the same command goes on from there"
    monkeypatch.setattr(RunFolder, "append", append)
    assert run_needle(flags) == 0
    captured = capsys.readouterr()
    assert f"2 rows are in {tmp_path / 'run'} already, 4 to go" in captured.err
    assert load_rows(tmp_path / "run")[:2] == written and len(load_rows(tmp_path / "run")) == 6


def test_a_log_has_no_progress_and_a_quiet_run_says_nothing_of_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert run_needle(needle(tiny, tmp_path / "run")) == 0
    assert capsys.readouterr().err == "", "not a terminal"
    assert run_needle([*needle(tiny, tmp_path / "run"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "needle: " in captured.out


def test_the_progress_shows_rate_time_left_and_each_methods_score_so_far() -> None:
    row = {"method": "snapkv", "budget": 64, "score": 1.0}
    before = [row, row | {"score": 0.0}, row | {"method": "fullkv", "budget": None}]
    progress = RunProgress("needle: 5 prompts, 2 configurations", total=10, before=before)
    page = io.StringIO()
    terminal = Console(file=page, force_terminal=True, color_system=None, width=110)
    with shown(progress, terminal, quiet=False):
        for _ in range(4):
            progress(row)
    last = page.getvalue().split("needle: 5 prompts")[-1]
    assert "4/10" in last and "rows/s" in last and "left" in last
    assert progress.scores.means() == {"snapkv": {"64": pytest.approx(100 * 5 / 6)}, "fullkv": {"full": 100.0}}
    lines = [line.split() for line in last.splitlines()[1:4]]
    assert lines == [["score", "so", "far", "64", "full"], ["snapkv", "83.3"], ["fullkv", "100.0"]]
    silent = io.StringIO()
    for console, quiet in ((Console(file=silent), False), (Console(file=silent, force_terminal=True), True)):
        with shown(progress, console, quiet):
            progress(row)
    assert silent.getvalue() == ""


def test_running_scores_follow_what_a_benchmark_measures() -> None:
    scores = RunningScores([{"method": "a", "budget": 8, "oom": True}])
    for nll in (2.0, 3.0):
        scores.add({"method": "a", "budget": 8, "budget_share": "10%", "nll": nll})
    assert (scores.measure, scores.means()) == ("nll", {"a": {"10%": 2.5}})
