"""Run folders are a format: every field documented and of one type, readable without this package, old ones too."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import datasets
import pandas as pd
import pytest
from calibrations import small_settings
from test_recording import Words, example
from test_sweep import Given

from kvfactory import Engine, Share, UserError
from kvfactory.folder_format import FORMAT, ROW, Meta, Session, budget_name
from kvfactory.jobs import make_jobs
from kvfactory.recording import KEPT, PROMPTS, KeptTokens, PromptText
from kvfactory.registry import get_registry
from kvfactory.report.tables import summarise
from kvfactory.results import RunFolder, load_run
from kvfactory.settings import row_value
from kvfactory.sweep import Sweep
from kvfactory.testing import tiny_model
from scripts import load_script

SPECS = [
    "fullkv",
    "snapkv:window_size=4",
    "h2o:decode_budget=same:recent_size=4",
    "streamingllm:decode_budget=8:budget=8",
]


def run(folder: Path, specs: list[str] = SPECS, budgets: tuple = (8,)) -> None:
    jobs = make_jobs(get_registry(), specs, budgets)
    benchmark = Given([example("a"), example("b")], {"a": list(range(1, 41)), "b": list(range(50, 110))})
    with RunFolder.open(folder, {"seed": 1}, environment={"torch": "2"}, arguments={"quiet": True}) as opened:
        Sweep(Engine(tiny_model()), Words(), benchmark, jobs, opened, (), record_tokens=64).run()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with budgets in entries and in shares, and a setting that is a number for one method and a word for another."""
    path = tmp_path_factory.mktemp("run")
    run(path, budgets=(8, Share(25)))
    return path


def test_files_have_the_fields_that_the_dataclasses_tell(folder: Path) -> None:
    told = {each.name for part in ROW for each in fields(part)}
    assert all(set(row) == told for row in load_run(folder).rows)
    meta = json.loads((folder / "run_meta.json").read_text())
    assert list(meta) == [each.name for each in fields(Meta)]
    assert [list(each) for each in meta["sessions"]] == [[each.name for each in fields(Session)]]
    for name, cls in ((PROMPTS, PromptText), (KEPT, KeptTokens)):
        for line in (folder / name).read_text().splitlines():
            assert list(json.loads(line)) == [each.name for each in fields(cls)]


def test_a_share_of_the_prompt_is_told_and_so_are_the_entries_it_came_to(folder: Path) -> None:
    rows = [row for row in load_run(folder).rows if row["budget_share"]]
    assert {(row["example_id"], row["budget_share"], row["budget"], row["settings"]["budget"]) for row in rows} == {
        ("a", "25%", 10, 10),
        ("b", "25%", 15, 15),
    }
    assert {budget_name(row) for row in rows} == {"25%"}
    frame = summarise(load_run(folder).rows)
    assert set(frame["budget"]) == {"full", 8, "25%"} and (frame["examples"] == 2).all()


def test_datasets_and_pandas_read_rows_without_this_package(folder: Path, tmp_path: Path) -> None:
    rows = load_run(folder).rows
    loaded = datasets.load_dataset(
        "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    assert loaded.num_rows == len(rows) == 12
    assert loaded["budget"] == [row["budget"] for row in rows]
    assert loaded["budget_share"] == [row["budget_share"] for row in rows]
    assert [each.get("decode_budget") for each in loaded["settings"]] == [
        row["settings"].get("decode_budget") for row in rows
    ]
    frame = pd.read_json(folder / "rows.jsonl", lines=True)
    assert frame["method"].tolist() == [row["method"] for row in rows]
    assert frame["cache_bytes"].tolist() == [row["cache_bytes"] for row in rows]
    for name in (PROMPTS, KEPT):
        extra = datasets.load_dataset("json", data_files=str(folder / name), split="train", cache_dir=str(tmp_path))
        assert extra.num_rows == len((folder / name).read_text().splitlines())


def test_a_setting_has_one_type_whatever_method_or_part_has_it() -> None:
    """Over every method with every part it takes, at values of each kind that a setting may have."""
    registry = get_registry()
    kinds: dict[str, set[str]] = defaultdict(set)
    for name in registry.methods:
        method = registry.load_method(
            name, **({"budget": 64} if registry.has_budget(name) else {}) | small_settings(name)
        )
        for setting, value in method.row_settings().items():
            if value is not None and setting != "budget":
                kinds[setting].add(type(value).__name__)
    assert {name: each for name, each in kinds.items() if len(each) > 1} == {}
    assert row_value(8, int | str) == row_value("8", int | str) == "8"
    assert row_value(1, float) == 1.0 and isinstance(row_value(1, float), float)
    assert row_value(None, int | None) is None and row_value(True, bool) is True and row_value((1, 2), tuple[int, ...])


def test_an_older_folder_is_read_and_gone_on_with(folder: Path, tmp_path: Path) -> None:
    """Version 1 had the share in `budget`, and no word of its version."""
    lines = []
    for row in load_run(folder).rows[:9]:
        old = {name: value for name, value in row.items() if name != "budget_share"}
        lines.append(json.dumps(old | {"budget": row["budget_share"] or row["budget"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run_meta.json").write_text(json.dumps({"settings": {"seed": 1}, "sessions": []}))
    read = load_run(tmp_path)
    assert [budget_name(row) for row in read.rows] == [budget_name(row) for row in load_run(folder).rows[:9]]
    run(tmp_path, budgets=(8, Share(25)))
    rows = load_run(tmp_path).rows
    assert len(rows) == 12 and json.loads((tmp_path / "run_meta.json").read_text())["format"] == FORMAT
    assert (tmp_path / "rows.jsonl").read_text().splitlines()[:9] == lines, "what was there stays as it was"


@pytest.mark.parametrize("version", [FORMAT + 1, "3"])
def test_a_folder_of_a_newer_format_is_refused(folder: Path, tmp_path: Path, version: object) -> None:
    (tmp_path / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    (tmp_path / "run_meta.json").write_text(json.dumps({"format": version, "settings": {}, "sessions": []}))
    wanted = rf"run_meta\.json: format {version}, and this kvfactory reads up to {FORMAT}; use the version that made it"
    with pytest.raises(UserError, match=wanted):
        load_run(tmp_path)
    with pytest.raises(UserError, match=wanted):
        run(tmp_path)


def test_the_tables_of_the_docs_are_those_of_the_dataclasses() -> None:
    module = load_script("results_page")
    text = module.PAGE.read_text("utf-8")
    assert module.page(text) == text, "python scripts/results_page.py writes it anew"
    assert text.count("| `example_id` | text |") == 3
