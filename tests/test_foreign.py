"""Predictions of other tools become rows: under their method and budget, with official scores, and no line is guessed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from entry_points import exit_code

from kvfactory.errors import UserError
from kvfactory.foreign import read_results
from kvfactory.metrics import length_bin
from kvfactory.registry import get_registry
from kvfactory.report.intervals import baseline
from kvfactory.report.tables import overall, summarise
from kvfactory.rescoring import rescored
from kvfactory.results import load_run

score = partial(exit_code, "kvfactory")

Line = dict[str, Any]


def line(pred: str = "Rain", answers: tuple[str, ...] = ("Rain",), **fields: Any) -> Line:
    return {"pred": pred, "answers": [*answers], "all_classes": None, "length": 100} | fields


def write(file: Path, *lines: Line | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return file


def meta(folder: Path, **arguments: Any) -> None:
    told = {
        "git_commit": "abc",
        "args": arguments,
        "transformers_version": "4.41",
        "torch_version": "2.3",
        "timestamp": "T",
    }
    (folder / "run_meta.json").write_text(json.dumps(told))


@pytest.fixture
def kvcache_factory(tmp_path: Path) -> Path:
    """What its LongBench leaves: two budgets of a model, names in any case, and what lies beside predictions."""
    root = tmp_path / "results_long_bench"
    for budget in (256, 128):
        folder = root / f"llama-3-8b_{budget}"
        rows = [line(_id=f"id{number}", length=length) for number, length in enumerate((100, 4000, 9000))]
        write(folder / "hotpotqa" / "FullKV.json", *rows)
        partly = [{**row, "pred": "Snow" if number < budget // 128 else "Rain"} for number, row in enumerate(rows)]
        write(folder / "hotpotqa" / "SnapKV.json", partly[0], "", *partly[1:])
        write(folder / "trec" / "snapkv.json", line("Animal", ("Animal",), all_classes=["Animal", "Color"], _id="x"))
        write(folder / "trec" / "AdaKV.json")
        write(folder / "hotpotqa" / "metrics.json", '{"hotpotqa": 50}')
        write(folder / "results.csv", "dataset,hotpotqa")
        meta(
            folder,
            method="SnapKV",
            model_path="meta/Llama-3-8B",
            max_capacity_prompts=budget,
            seed=42,
            save_dir=str(root),
        )
    return root


def by_line(rows: list[Line]) -> dict[tuple[Any, ...], list[float]]:
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        found.setdefault((row["group"], row["method"], row["budget"]), []).append(row["score"])
    return found


def test_a_folder_of_kvcache_factory_is_read_file_by_file(kvcache_factory, capsys):
    run = read_results(kvcache_factory / "llama-3-8b_128")
    assert by_line(run.rows) == {
        ("hotpotqa", "fullkv", None): [1, 1, 1],
        ("hotpotqa", "snapkv", 128): [0, 1, 1],
        ("trec", "snapkv", 128): [1],
    }
    about = {"benchmark": "longbench", "group": "hotpotqa", "example_id": "hotpotqa/id0", "dataset": "hotpotqa"}
    known = {"_id": "id0", "length": 100, "all_classes": None, "method": "fullkv", "budget": None, "budget_share": None}
    assert run.rows[0] == about | known | {"prediction": "Rain", "answers": ["Rain"], "score": 1.0, "scores": ["score"]}
    assert run.settings == {"model": "llama-3-8b", "seed": 42}
    [session] = run.sessions
    assert session["environment"] == {"git_commit": "abc", "torch": "2.3", "transformers": "4.41"}
    told = capsys.readouterr().err
    assert told.count("notice:") == 1 and "empty" in told and "trec/AdaKV.json" in told


def test_a_folder_of_folders_has_the_budgets_of_each(kvcache_factory, capsys):
    run = read_results(kvcache_factory)
    assert by_line(run.rows) == {
        ("hotpotqa", "fullkv", None): [1, 1, 1],
        ("hotpotqa", "snapkv", 128): [0, 1, 1],
        ("hotpotqa", "snapkv", 256): [0, 0, 1],
        ("trec", "snapkv", 128): [1],
        ("trec", "snapkv", 256): [1],
    }
    assert run.settings == {"model": "llama-3-8b", "seed": 42} and len(run.sessions) == 2
    assert "llama-3-8b_256/hotpotqa/FullKV.json" in capsys.readouterr().err, "what is left out is said"


def test_the_budget_is_that_of_run_meta_or_else_of_the_folders_name(tmp_path, capsys):
    for name, arguments, expected in (
        ("llama_64", None, (64, None)),
        ("mine", {"max_capacity_prompts": 96}, (96, None)),
        ("llama_-1", {"max_capacity_prompts": -1, "max_capacity_prompts_ratio": 0.1}, (None, "10%")),
        ("mine-too", None, (None, "unknown")),
    ):
        folder = tmp_path / name
        write(folder / "qasper" / "H2O.json", line())
        write(folder / "qasper" / "FullKV.json", line())
        write(folder / "qasper" / "OfAnotherWorld.json", line())
        if arguments:
            meta(folder, **arguments)
        rows = {row["method"]: row for row in read_results(folder).rows}
        assert (rows["h2o"]["budget"], rows["h2o"]["budget_share"]) == expected, name
        assert (rows["ofanotherworld"]["budget"], rows["ofanotherworld"]["budget_share"]) == expected, name
        assert (rows["fullkv"]["budget"], rows["fullkv"]["budget_share"]) == (None, None), name
        assert baseline([*rows.values()]) == {"longbench": ("fullkv", "full")}, "an unknown budget keeps not everything"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_ruler_is_read_at_each_level(tmp_path, depth):
    top = tmp_path / "results_ruler" / "llama_128" / "4096"
    write(top / "niah_multivalue" / "SnapKV.json", line("ONE", ("one", "two")), line("nothing", ("one", "two")))
    write(top / "qa_1" / "snapkv.json", line("ONE", ("one", "two")))
    run = read_results(top if depth == 0 else top.parents[depth - 1])
    assert by_line(run.rows) == {
        ("niah_multivalue 4096", "snapkv", 128): [0.5, 0],
        ("qa_1 4096", "snapkv", 128): [1],
    }
    assert [row["example_id"] for row in run.rows] == [
        "niah_multivalue/4096/0",
        "niah_multivalue/4096/1",
        "qa_1/4096/0",
    ]
    assert {row["context_length"] for row in run.rows} == {4096} and run.settings == {"model": "llama"}


def test_longbenchs_own_folder_says_no_method_and_numbers_its_rows(tmp_path):
    write(tmp_path / "vicuna" / "hotpotqa.jsonl", line("Rain"), line("Snow"))
    write(tmp_path / "vicuna" / "notes.jsonl", {"other": 1})
    run = read_results(tmp_path / "vicuna")
    assert by_line(run.rows) == {("hotpotqa", "unknown", None): [1, 0]}
    assert [row["example_id"] for row in run.rows] == ["hotpotqa/1", "hotpotqa/2"]
    assert run.settings == {"model": "vicuna"} and run.sessions == []
    write(tmp_path / "llama" / "hotpotqa.jsonl", line("Rain"))
    with pytest.raises(UserError, match=r"several models \(llama, vicuna\)"):
        read_results(tmp_path)


def test_bins_are_by_length_where_asked_for_and_in_longbench_e_itself(tmp_path, kvcache_factory):
    groups = [row["group"] for row in read_results(kvcache_factory / "llama-3-8b_128", longbench_e=True).rows]
    assert groups[:3] == ["hotpotqa 0-4k", "hotpotqa 4-8k", "hotpotqa 8k+"]
    write(tmp_path / "e" / "qasper_e.jsonl", line(length=5000))
    [row] = read_results(tmp_path / "e").rows
    assert (row["group"], row["score"]) == ("qasper_e 4-8k", 1)
    write(tmp_path / "e" / "qasper_e.jsonl", {"pred": "x", "answers": ["x"]})
    with pytest.raises(UserError, match=r"qasper_e\.jsonl:1: no 'length'"):
        read_results(tmp_path / "e")


def test_methods_in_two_cases_are_one_and_two_files_of_one_are_refused(tmp_path):
    write(tmp_path / "m_8" / "qasper" / "SnapKV.json", line())
    write(tmp_path / "m_8" / "qasper" / "snapkv.json", line("Snow"))
    with pytest.raises(UserError, match=r"snapkv\.json: .*SnapKV\.json has snapkv at budget 8 too; remove one"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("file", "bad", "message"),
    [
        ("m_8/qasper/SnapKV.json", '{"pred": "x', "SnapKV.json:3: not JSON"),
        ("m_8/qasper/SnapKV.json", "[1]", "SnapKV.json:3: expected a JSON object, found list"),
        ("m_8/qasper/SnapKV.json", '{"answers": ["x"]}', "SnapKV.json:3: no 'pred'"),
        (
            "m_8/qasper/SnapKV.json",
            '{"pred": "x", "answers": "x"}',
            "SnapKV.json:3: 'answers' is missing or not a list",
        ),
        ("m_8/trec/SnapKV.json", '{"pred": "x", "answers": ["x"]}', "SnapKV.json:3: 'all_classes' is empty, but trec"),
        (
            "m_8/passage_retrieval_en/a.json",
            '{"pred": "3", "answers": ["3"]}',
            "a.json:3: the answer '3' names no paragraph",
        ),
        ("m_8/4096/vt/a.json", '{"pred": "x", "answers": []}', "a.json:3: 'answers' is empty"),
        ("m_8/hotpotqa.jsonl", '{"input": "x", "answers": ["x"]}', "hotpotqa.jsonl:3: no 'pred'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, capsys, file, bad, message):
    write(tmp_path / file, line("Paragraph 3", ("Paragraph 3",), all_classes=["a"]), "", bad)
    assert score(["score", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_folders_without_results_say_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"no results in it; expected rows\.jsonl"):
        read_results(tmp_path)
    write(tmp_path / "m_8" / "qasper" / "SnapKV.json")
    with pytest.raises(UserError, match="all files of predictions are empty"):
        read_results(tmp_path)
    write(tmp_path / "m_8" / "qasper" / "SnapKV.json", line())
    (tmp_path / "m_8" / "run_meta.json").write_text("[]")
    with pytest.raises(UserError, match=r"run_meta\.json: not the run_meta\.json of KVCache-Factory"):
        read_results(tmp_path)


def test_tables_cope_with_what_such_folders_do_not_know(kvcache_factory):
    rows = read_results(kvcache_factory).rows
    frame = summarise(rows)
    assert frame[["cache_bytes", "kept_tokens_mean", "compressed_share", "memory"]].isna().all(axis=None)
    line_of = frame.set_index(["group", "method", "budget"]).loc[("hotpotqa", "snapkv", 256)]
    assert line_of["score"] == 33.33 and line_of["score_difference"] == -66.67
    assert len(overall(rows)) == 3


def test_output_makes_a_run_that_is_read_like_any_other(kvcache_factory, tmp_path, capsys):
    before = sorted(kvcache_factory.rglob("*"))
    assert score(["score", str(kvcache_factory), "--output", str(tmp_path / "out")]) == 0
    assert "snapkv" in capsys.readouterr().out and sorted(kvcache_factory.rglob("*")) == before
    run = load_run(tmp_path / "out")
    assert run.rows == read_results(kvcache_factory).rows == rescored(run.rows, get_registry())
    assert run.settings == {"model": "llama-3-8b", "seed": 42}
    assert [each["environment"]["torch"] for each in run.sessions][:2] == ["2.3", "2.3"] and len(run.sessions) == 3
    wide = pd.read_csv(tmp_path / "out" / "scores.csv").set_index(["method", "budget"])
    assert wide.loc[("snapkv", "256"), "hotpotqa"] == 33.33 and wide.loc[("snapkv", "256"), "average"] == 66.66
    assert score(["score", str(tmp_path / "out")]) == 0
    assert "0 of 11 rows" in capsys.readouterr().out


# -- published figures -----------------------------------------------------------------------------------------------


def published(shared: Path, folder: str) -> dict[str, Line]:
    """Golden figures of a folder's files, by dataset."""
    cases = json.loads((shared / "golden" / "longbench_datasets_public.json").read_text("utf-8"))["datasets"]
    return {case["dataset"]: case for case in cases if Path(case.get("predictions_file", "")).parent.name == folder}


def scored(folder: Path, output: Path, *flags: str) -> dict[str, float]:
    """What the command says of each group."""
    assert score(["score", str(folder), "--output", str(output), *flags]) == 0
    frame = pd.read_csv(output / "results.csv")
    return dict(zip(frame["group"], frame["score"], strict=True))


@pytest.mark.parametrize("folder", ["adakv_mistral7b_fullkv", "galabduljabbar_allam_E", "haorandeng_llama2_7b"])
def test_published_predictions_get_their_published_scores(shared, tmp_path, folder):
    cases = published(shared, folder)
    found = scored(shared / "data" / "longbench_preds" / folder, tmp_path / "out")
    assert found == {dataset: case["score"] for dataset, case in cases.items()}
    if folder.startswith("adakv"):
        assert found == {dataset: case["published_score"] for dataset, case in cases.items()}


@pytest.mark.parametrize("folder", ["galabduljabbar_allam_E", "haorandeng_llama2_7b"])
def test_published_predictions_get_their_published_bins(shared, tmp_path, folder):
    cases = published(shared, folder)
    found = scored(shared / "data" / "longbench_preds" / folder, tmp_path / "out", "--longbench_e")
    bins = {(dataset, name): value for dataset, case in cases.items() for name, value in case["score_e"].items()}
    assert found == {f"{dataset} {name}": value for (dataset, name), value in bins.items() if value is not None}
    for dataset, case in cases.items():
        for name, value in case.get("published_bins", {}).items():
            if name in ("0-4k", "4-8k"):
                assert found.get(f"{dataset} {name}") == value


def test_bins_of_any_dataset_are_the_official_ones(shared, tmp_path):
    source = shared / "data" / "longbench_preds" / "adakv_mistral7b_fullkv"
    cases = {name: case for name, case in published(shared, source.name).items() if name not in ("multi_news", "qmsum")}
    folder = tmp_path / "model"
    for dataset in cases:
        write(folder / f"{dataset}.jsonl", (source / f"{dataset}.jsonl").read_text("utf-8"))
    found = scored(folder, tmp_path / "out", "--longbench_e")
    lengths = {length_bin(row["length"]) for row in read_results(folder).rows}
    assert lengths == {"0-4k", "4-8k", "8k+"}
    assert found == {
        f"{dataset} {name}": value
        for dataset, case in cases.items()
        for name, value in case["score_e"].items()
        if value is not None
    }
