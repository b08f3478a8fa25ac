"""Stored predictions are scored anew without a model: what a run scored, what other tools predicted, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from entry_points import exit_code
from rich.console import Console

from kvfactory import results
from kvfactory.benchmarks import Benchmark
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.benchmarks.longbench import LongBench
from kvfactory.benchmarks.multiturn import MultiTurn, conversations_of
from kvfactory.benchmarks.needle import STYLES, Needle
from kvfactory.benchmarks.reading import Reading, read_passages
from kvfactory.benchmarks.ruler import GeneratedRuler, Sources
from kvfactory.errors import UserError
from kvfactory.models import EMBEDDED_PACKAGE, load_tokenizer
from kvfactory.registry import Registry, get_registry
from kvfactory.rescoring import changes, rescored, save
from kvfactory.results import RunFolder, load_rows, load_run

FORK = multiprocessing.get_context("fork")
score = partial(exit_code, "kvfactory")


def make_row(example_id: str, method: str = "fullkv", budget: int | None = None, **fields: Any) -> dict[str, Any]:
    """A multiturn row: its score is whether the answer is there, its f1 the overlap of words."""
    row = {"benchmark": "multiturn, own answers", "group": "turn 1", "example_id": example_id, "method": method}
    row |= {"budget": budget, "budget_share": None, "settings": {}, "memory": "physical"}
    row |= {"prediction": "the red fox", "answers": ["red"], "score": 1.0, "f1": 2 / 3, "scores": ["score", "f1"]}
    return row | {"cache_bytes": 10, "kept_tokens_mean": 3.0, "evicted": False} | fields


def make_run(path: Path, rows: list[dict[str, Any]]) -> Path:
    environment = {"kvfactory": "0.0.1", "device_of_model": "cpu"}
    with RunFolder.open(path, {"seed": 42}, environment=environment, arguments={"device": "cpu"}) as folder:
        for row in rows:
            folder.append(row)
        folder.write_csv()
        folder.note("kept.jsonl", {"kept": "9"})
    return path


def contents(folder: Path) -> dict[str, str]:
    """A digest of each file, the lock left out."""
    files = sorted(each for each in folder.rglob("*") if each.is_file() and each.name != ".lock")
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


# -- the rule that scores a run and its stored rows ------------------------------------------------------------------


def benchmarks(folder: Path) -> list[Benchmark]:
    row = {"input": "", "context": "It rained.", "length": 2, "language": "en", "all_classes": ["Rain", "Snow"]}
    for dataset in ("gov_report", "qasper", "trec"):
        (folder / f"{dataset}.jsonl").write_text(json.dumps({**row, "answers": ["Rain"]}))
    tokenizer, hay = load_tokenizer(), load_haystack()
    grid: dict[str, Any] = {"lengths": [800], "depths": [50], "samples": 1, "haystack": hay}
    tasks = ["niah_multivalue", "qa_1"]
    return [
        LongBench(tokenizer, ["gov_report", "qasper", "trec"], data_dir=folder, max_prompt_tokens=99, chat=False),
        *(Needle(tokenizer, style=style, **grid) for style in STYLES),
        Reading(tokenizer, read_passages()[:2]),
        GeneratedRuler(tokenizer, tasks=tasks, lengths=[1024], samples=1, sources=Sources()),
        MultiTurn(tokenizer, conversations_of(read_passages()[:1]), history="own"),
    ]


@pytest.mark.skipif(
    not any(metadata.distributions(name=EMBEDDED_PACKAGE[0])), reason="the embedded model is not installed"
)
def test_a_stored_row_scores_what_its_benchmark_scored(tmp_path):
    seen, scores_seen = set(), set()
    for benchmark in benchmarks(tmp_path):
        for example in benchmark.examples():
            for prediction in ("", "no", f"It is {example.answers[0]}, true", "Rain eat a sandwich"):
                scores = benchmark.score(example, prediction)
                row = make_row(example.id, benchmark=benchmark.name, group=example.group, prediction=prediction)
                stored = json.loads(json.dumps({**row, "answers": example.answers, **example.info}))
                [found] = rescored([stored], get_registry())
                assert {name: found[name] for name in found["scores"]} == scores, (example, prediction)
                seen.add(benchmark.name.partition(",")[0])
                scores_seen.add((benchmark.name, scores["score"] > 0))
    assert seen == {name for name, runner in get_registry().benchmarks.items() if runner.score}
    assert scores_seen == {(name, found) for name, _ in scores_seen for found in (True, False)}, "no rule is constant"


def test_scores_are_computed_anew_and_nothing_else_is_touched():
    old = make_row("1/1", score=0.0, f1=0.1, bleu=0.7, scores=["score", "f1", "bleu"], depth=3)
    [new] = rescored([old], get_registry())
    assert new == make_row("1/1", depth=3), "bleu is no score of this benchmark any more"
    assert old["score"] == 0.0
    [older] = rescored([{k: v for k, v in old.items() if k not in ("scores", "f1", "bleu")}], get_registry())
    assert older["scores"] == ["score", "f1"] and older["score"] == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row("a", benchmark="multitern, own answers"), "unknown benchmark 'multitern'; did you mean 'multiturn'?"),
        (make_row("a", benchmark="mine"), "--plugin FILE"),
        (
            {"benchmark": "perplexity, strided", "example_id": "a"},
            "'perplexity' cannot be scored anew: its rows have no pre",
        ),
        (make_row("a", benchmark="latency"), "'latency' cannot be scored anew: its Runner has no 'score'"),
        (
            make_row("9/1", benchmark="reading", kind="matching"),
            "9/1: its row has no 'options', by which answers of reading",
        ),
        ({"benchmark": "ruler", "group": "g", "example_id": "x", "answers": []}, "x: its row has no 'prediction'"),
        (make_row("a", benchmark="needle", style="numbre"), "unknown needle style 'numbre'; did you mean 'number'?"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_line(row, message):
    with pytest.raises(UserError) as caught:
        rescored([row], get_registry())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_changes_are_counted_by_configuration_with_both_averages():
    before = [make_row(name, "snapkv", 8, score=value) for name, value in (("a", 0.0), ("b", 1.0), ("c", 1.0))]
    before += [make_row("a", budget=None), make_row("a", group="turn 2", score=0.0)]
    frame = changes(before, rescored(before, get_registry()))
    assert frame[["group", "method", "budget", "rows", "changed"]].values.tolist() == [
        ["turn 1", "snapkv", 8, 3, 1],
        ["turn 2", "fullkv", "full", 1, 1],
    ]
    assert list(frame["score before"]) == [66.67, 0] and list(frame["score now"]) == [100, 100]
    assert list(frame["f1 before"]) == list(frame["f1 now"]) == [66.67, 66.67]
    assert changes(before, before).empty


# -- kvfactory score of a run ----------------------------------------------------------------------------------------

PLUGIN = """
from kvfactory import hookimpl
from kvfactory.runner import Runner

def score(example, prediction):
    return {"score": float(prediction.strip() == example.answers[0]), "length": len(prediction) / example.info["longest"]}

def finish(rows, folder, console):
    (folder / "mine.csv").write_text(f"{len(rows)} rows")

@hookimpl
def kvfactory_register_benchmarks(register):
    register("capitals", Runner(help="", options=[], make=None, finish=finish, score=score))
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """A benchmark of a third party, in a registry that no other test sees."""
    monkeypatch.setattr("kvfactory.cli.get_registry", Registry.load)
    path = tmp_path / "capitals.py"
    path.write_text(PLUGIN)
    return path


def capitals(path: Path) -> Path:
    common = {"benchmark": "capitals, easy", "group": "europe", "longest": 10, "scores": ["score"], "score": 0.0}
    rows = [
        make_row("oslo", "snapkv", 64, prediction=" Oslo", answers=["Oslo"], **common),
        make_row("oslo", prediction="Oslo", answers=["Oslo"], **common),
        make_row("rome", "snapkv", 64, prediction="Milan", answers=["Rome"], **common),
        make_row("rome", prediction="Rome!", answers=["Rome"], **common),
    ]
    for row in rows:
        del row["f1"]
    return make_run(path, rows)


def test_a_third_partys_run_is_scored_in_place_and_says_so(tmp_path, plugin, capsys):
    folder = capitals(tmp_path / "run")
    before, stored = contents(folder), load_rows(folder)
    assert score(["score", str(folder), "--plugin", str(plugin)]) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 rows have other scores now" in printed
    assert "0.00" in printed and "50.00" in printed
    rows = load_rows(folder)
    assert [row["score"] for row in rows] == [1, 1, 0, 0]
    assert [row["length"] for row in rows] == [0.5, 0.4, 0.5, 0.5]
    assert all(row["scores"] == ["score", "length"] for row in rows)
    for old, new in zip(stored, rows, strict=True):
        assert {**new, "score": 0.0, "scores": ["score"]} == old | {"length": new["length"]}
    table = pd.read_csv(folder / "results.csv")
    assert list(table["score"]) == [50, 50] and (folder / "mine.csv").read_text() == "4 rows"
    meta = json.loads((folder / "run_meta.json").read_text())
    assert meta["settings"] == {"seed": 42} and len(meta["sessions"]) == 2
    assert meta["sessions"][0]["arguments"] == {"device": "cpu"}
    assert meta["sessions"][1]["arguments"]["rescored_rows"] == 4
    assert meta["sessions"][1]["environment"]["kvfactory"] == metadata.version("kvfactory")
    changed = {name for name, digest in contents(folder).items() if before.get(name) != digest}
    assert changed == {"rows.jsonl", "results.csv", "run_meta.json", "mine.csv"}
    with RunFolder.open(folder, {"seed": 42}, environment={}) as opened:
        assert opened.rows == rows, "it may be resumed"


def test_scoring_again_changes_no_row_and_no_order(tmp_path, capsys):
    rows = [make_row(name, *what) for name in "ab" for what in (("snapkv", 64), ("fullkv", None), ("snapkv", 8))]
    folder = make_run(tmp_path / "run", rows)
    by_method = sorted(rows, key=lambda row: (row["method"], row["budget"] or 0))
    with RunFolder.open(folder, {"seed": 42}, environment={}) as opened:
        opened.write_csv(by_method)
    before = contents(folder)
    assert score(["score", str(folder)]) == 0
    assert "0 of 6 rows have other scores now" in capsys.readouterr().out
    after = contents(folder)
    assert [name for name in before if before[name] != after[name]] == ["run_meta.json"]
    assert [*after.keys() - before.keys()] == ["turns.csv"]
    assert list(pd.read_csv(folder / "turns.csv")["budget"]) == ["full", "8", "64"]


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    folder = make_run(tmp_path / "run", [make_row("a", score=0.0)])
    before = contents(tmp_path)
    assert score(["score", str(folder), "--dry_run", "--output", str(tmp_path / "out")]) == 0
    assert contents(tmp_path) == before
    printed = capsys.readouterr().out
    assert "1 of 1 rows have other scores now" in printed and "nothing is written" in printed


def test_output_is_a_run_of_its_own_and_the_source_stays(tmp_path, capsys):
    folder = make_run(tmp_path / "run", [make_row("a", score=0.0), make_row("b")])
    make_run(folder / "inner", [make_row("x")])
    before = contents(folder)
    assert score(["score", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert contents(folder) == before
    assert load_rows(tmp_path / "out" / "inner") == [make_row("x")]
    run = load_run(tmp_path / "out")
    assert run.rows == [make_row("a"), make_row("b")] and run.settings == {"seed": 42}
    assert [each["environment"]["kvfactory"] for each in run.sessions] == ["0.0.1", metadata.version("kvfactory")]
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == (folder / "kept.jsonl").read_bytes()
    for place, why in ((tmp_path / "out", "there already"), (folder / "in", "inside of")):
        capsys.readouterr()
        assert score(["score", str(folder), "--output", str(place)]) == 2
        told = capsys.readouterr()
        assert why in told.err and told.err.count("\n") == 1 and told.out == ""
    assert contents(folder) == before


def test_a_run_that_is_writing_is_left_alone(tmp_path, capsys):
    folder = make_run(tmp_path / "run", [make_row("a", score=0.0)])
    with RunFolder.open(folder, {"seed": 42}, environment={}) as opened:
        before = contents(folder)
        assert score(["score", str(folder)]) == 2
        assert "another process is writing here" in capsys.readouterr().err
        assert contents(folder) == before
        opened.append(make_row("b"))


def test_rows_that_came_while_others_were_scored_are_not_lost(tmp_path):
    folder = make_run(tmp_path / "run", [make_row("a", score=0.0)])
    run = load_run(folder)
    with RunFolder.open(folder, {"seed": 42}, environment={}) as opened:
        opened.append(make_row("b"))
    with pytest.raises(UserError, match="was changed while its rows were scored"):
        write(run)
    assert [row["example_id"] for row in load_rows(folder)] == ["a", "b"]


def write(run: results.Run) -> None:
    """The run with other scores, in place."""
    registry, console = get_registry(), Console(quiet=True)
    save(run, rescored(run.rows, registry), registry=registry, output=None, arguments={}, console=console)


def test_a_write_that_fails_leaves_the_old_rows(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", [make_row("a", score=0.0)])
    run, replace = load_run(folder), Path.replace

    def fails(path: Path, target: Path) -> Path:
        if Path(target).name == "rows.jsonl":
            raise OSError("no space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        write(run)
    assert load_rows(folder) == run.rows


def test_a_kill_at_any_moment_leaves_old_rows_or_new_ones(tmp_path):
    old = [make_row(f"{number}/1", score=0.0, prediction="red " + "x" * 3000) for number in range(300)]
    folder = make_run(tmp_path / "run", old)
    new, run, chance, seen = rescored(old, get_registry()), load_run(folder), random.Random(3), set()
    for turn in range(12):
        child = FORK.Process(target=write, args=(run,))
        child.start()
        if turn < 11:  # the last one may finish
            time.sleep(chance.uniform(0, 0.1))
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        rows = load_rows(folder)
        assert rows in (old, new), "half of it"
        seen.add(rows == new)
        json.loads((folder / "run_meta.json").read_text())
        if rows == new:
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert seen == {True, False}


@pytest.mark.parametrize("flags", [[], ["--longbench_e"]])
def test_a_folder_that_cannot_be_scored_is_refused_in_one_line(tmp_path, capsys, flags):
    folder = make_run(tmp_path / "run", [make_row("a", benchmark="latency")]) if flags else tmp_path / "nowhere"
    assert score(["score", str(folder), *flags]) == 2
    told = capsys.readouterr().err
    assert ("--longbench_e" if flags else "no such folder") in told and told.count("\n") == 1
