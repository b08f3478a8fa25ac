"""The run folder: no row is lost, none is there twice, and rows made in different ways never mix."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import time
import tracemalloc
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvfactory import results
from kvfactory.environment import environment
from kvfactory.errors import UserError
from kvfactory.results import RunFolder, load_rows

FORK = multiprocessing.get_context("fork")  # a child starts in milliseconds: it need not import torch again
SETTINGS = {"window_size": 8, "pooling": "maxpool"}


def make_row(example_id: str, method: str = "snapkv", budget: int | None = 64, **fields: object) -> dict:
    row = {"benchmark": "longbench", "group": "hotpotqa", "example_id": example_id, "method": method, "budget": budget}
    return row | {"score": 0.5, "memory": "physical", "evicted": True} | fields


def reopen(path: Path, **changed: object) -> RunFolder:
    return RunFolder.open(path, SETTINGS | changed, environment={"torch": "2.4"})


def lines_of(path: Path) -> list[bytes]:
    """The finished lines of the folder's rows."""
    file = path / "rows.jsonl"
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_on_disk_when_append_returns(tmp_path):
    with reopen(tmp_path / "run") as folder:
        folder.append(make_row("a"))
        assert load_rows(tmp_path / "run") == [make_row("a")] == folder.rows
        folder.append(make_row("a", budget=None))
        assert load_rows(tmp_path / "run") == [make_row("a"), make_row("a", budget=None)] == folder.rows
        assert folder.done == {("a", "snapkv", 64), ("a", "snapkv", None)}


def test_a_row_is_never_written_twice(tmp_path):
    with reopen(tmp_path) as folder:
        folder.append(make_row("a", score=0.1))
        with pytest.raises(ValueError, match=r"second row for \('a', 'snapkv', 64\)"):
            folder.append(make_row("a", score=0.9))
    with reopen(tmp_path) as folder, pytest.raises(ValueError, match="second row"):
        folder.append(make_row("a", score=0.9))
    assert load_rows(tmp_path) == [make_row("a", score=0.1)]


def joined_surrogates(value):
    """What JSON makes of a string: a high surrogate followed by a low one is one character."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(value, list):
        return [joined_surrogates(item) for item in value]
    return value


any_text = st.text(st.characters())
any_value = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | any_text | st.lists(any_text)


@given(rows=st.lists(st.dictionaries(st.text("xyz", min_size=1), any_value, max_size=4), max_size=4))
@example(rows=[{"x": "one\ntwo\r\n\u2028\u2029\x85\x0b\x00 \ud800 \udfff 🥪"}, {"x": "\\n\\ud800"}])
@settings(max_examples=60, deadline=None)
def test_whatever_a_row_says_it_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("run")
    rows = [make_row(str(number), **row) for number, row in enumerate(rows)]
    with reopen(path) as folder:
        for row in rows:
            folder.append(row)
    assert len(lines_of(path)) == len(rows)
    expected = [{name: joined_surrogates(value) for name, value in row.items()} for row in rows]
    with reopen(path) as folder:
        assert load_rows(path) == folder.rows == expected
        assert folder.notice is None


def test_a_folder_holds_the_keys_of_its_rows_and_nothing_else_of_them(tmp_path):
    """Or a long run would need more memory the longer it gets."""
    rows = [make_row(f"hotpotqa/{number}") for number in range(1000)]
    with reopen(tmp_path) as folder:
        tracemalloc.start()
        try:
            for row in rows:
                folder.append(row | {"prediction": "x" * 2000})
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held / len(rows) < 400, "a key is a tuple of 64 bytes, and a place in a set"
        assert [row["example_id"] for row in folder.rows] == [row["example_id"] for row in rows]


def test_rows_are_written_behind_those_that_are_there_and_read_once_at_the_end(tmp_path, monkeypatch):
    read = Mock(side_effect=results._read)
    monkeypatch.setattr(results, "_read", read)
    with reopen(tmp_path) as folder:
        file = (tmp_path / "rows.jsonl").stat().st_ino
        for number in range(5):
            written = (tmp_path / "rows.jsonl").read_bytes()
            folder.append(make_row(f"{number}"))
            now = (tmp_path / "rows.jsonl").read_bytes()
            assert now.startswith(written) and now.count(b"\n") == number + 1
        assert read.call_count == 0 and (tmp_path / "rows.jsonl").stat().st_ino == file
        assert len(folder.rows) == 5 == folder.write_csv().read_text().count("snapkv") * 5
        assert folder.rows is folder.rows and read.call_count == 1
    with reopen(tmp_path) as folder:
        assert len(folder.rows) == len(folder.done) == 5 and read.call_count == 2, "what was read to resume"
        folder.append(make_row("5"))
        assert [row["example_id"] for row in folder.rows] == list("012345") and read.call_count == 3


# -- killed runs -----------------------------------------------------------------------------------------------------

WORK = list(product([f"hotpotqa/{number}" for number in range(100)], ["fullkv", "snapkv", "h2o"]))


def work(path: Path) -> None:
    with reopen(path) as folder:
        for number, (example_id, method) in enumerate(WORK):
            if (example_id, method, 64) not in folder.done:
                long = "x" * (30_000 if number % 10 == 0 else 10)  # a long line takes the system more than one step
                folder.append(make_row(example_id, method, prediction=f"{example_id} {method} {long}"))
                time.sleep(0.002)


def test_a_run_killed_twenty_times_has_every_row_once(tmp_path):
    chance = random.Random(8)
    before: list[bytes] = []
    for turn in range(20):
        run = FORK.Process(target=work, args=(tmp_path,))
        run.start()
        while turn % 4 and run.is_alive() and len(lines_of(tmp_path)) == len(before):
            time.sleep(0.001)  # three in four are killed while they write, the others may still be opening the folder
        time.sleep(chance.uniform(0, 0.02))
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        assert run.exitcode == -signal.SIGKILL
        after = lines_of(tmp_path)
        assert after[: len(before)] == before, "a finished row was lost or changed"
        before = after
    assert 15 <= len(before) < len(WORK), "every run but the first few must have added rows, and none have finished"
    work(tmp_path)
    rows = load_rows(tmp_path)
    assert [(row["example_id"], row["method"]) for row in rows] == WORK
    assert all(row["prediction"].startswith(f"{row['example_id']} {row['method']} x") for row in rows)
    assert len(json.loads((tmp_path / "run_meta.json").read_text())["sessions"]) >= 16


def test_a_line_torn_at_any_byte_is_dropped_and_said(tmp_path):
    rows = [make_row("a"), make_row("b", prediction="schön"), make_row("c", "h2o", None)]
    with reopen(tmp_path) as folder:
        for row in rows:
            folder.append(row)
    file = tmp_path / "rows.jsonl"
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        sound = whole[:cut].count(b"\n")
        assert load_rows(tmp_path) == rows[:sound]
        assert file.stat().st_size == cut, "reading changes nothing"
        torn = cut - len(b"".join(whole.splitlines(keepends=True)[:sound]))
        with reopen(tmp_path) as folder:
            assert folder.rows == rows[:sound]
            assert (folder.notice is not None and f"({torn} bytes)" in folder.notice) == (torn > 0)
            for row in rows[sound:]:
                folder.append(row)
        assert file.read_bytes() == whole


def test_a_broken_last_line_is_dropped_even_where_its_newline_is_there(tmp_path):
    with reopen(tmp_path) as folder:
        folder.append(make_row("a"))
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'{"example_id": "b", "meth\n')
    with reopen(tmp_path) as folder:
        assert folder.notice is not None and "torn" in folder.notice
        folder.append(make_row("b"))
    assert load_rows(tmp_path) == [make_row("a"), make_row("b")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{half\n", "not JSON"),
        (b"\n", "not JSON"),
        (b'{"example_id": "x", "method": "h2o"}\n', "it needs example_id, method and budget"),
        (b"[1]\n", "it needs example_id, method and budget"),
        (json.dumps(make_row("a")).encode() + b"\n", r"a second row for \('a', 'snapkv', 64\)"),
    ],
)
def test_a_line_nobody_tore_is_an_error_with_its_place(tmp_path, line, complaint):
    with reopen(tmp_path) as folder:
        folder.append(make_row("a"))
        folder.append(make_row("b"))
    first, second = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(first + line + second)
    for reading in (load_rows, reopen):
        with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{complaint}"):
            reading(tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == first + line + second


# -- one folder, one run ---------------------------------------------------------------------------------------------


def test_other_settings_are_refused_with_every_difference_on_one_line(tmp_path):
    with reopen(tmp_path, beta=20) as folder:
        folder.append(make_row("a"))
    with pytest.raises(UserError) as caught:
        reopen(tmp_path, window_size=16, pooling="avgpool\n", floor=0.2)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message and "another --save_dir" in message
    assert "--window_size was 8, is 16; " in message
    assert '--pooling was "maxpool", is "avgpool\\n"; ' in message
    assert "--beta was 20, is not set; --floor was not set, is 0.2; " in message
    with reopen(tmp_path, beta=20) as folder:  # the refusal changed nothing and left no lock
        assert folder.rows == [make_row("a")]
    assert len(json.loads((tmp_path / "run_meta.json").read_text())["sessions"]) == 2


def test_settings_that_read_the_same_are_the_same(tmp_path):
    reopen(tmp_path, datasets=("a", "b"), head_path=Path("x.json"), nested={"p": 1, "q": None}).close()
    reopen(tmp_path, datasets=["a", "b"], head_path="x.json", nested={"q": None, "p": 1}).close()
    with pytest.raises(UserError, match="--datasets was"):
        reopen(tmp_path, datasets=["b", "a"], head_path="x.json", nested={"q": None, "p": 1})


def test_a_flag_that_came_later_and_is_not_given_changes_nothing(tmp_path):
    reopen(tmp_path).close()
    reopen(tmp_path, needles=None, query_agnostic=False).close()
    with pytest.raises(UserError, match="--needles was not set, is 3"):
        reopen(tmp_path, needles=3)


def test_a_name_that_became_free_may_differ(tmp_path):
    reopen(tmp_path, context_lengths=[512]).close()
    reopen(tmp_path, context_lengths=[512]).close()
    with pytest.raises(UserError, match="--context_lengths was"):
        reopen(tmp_path)
    RunFolder.open(tmp_path, SETTINGS, environment={"torch": "2.4"}, free=["context_lengths"]).close()


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    with reopen(tmp_path) as folder:
        with pytest.raises(UserError, match="another process is writing here"):
            reopen(tmp_path)
        stranger = FORK.Process(target=work, args=(tmp_path,))
        stranger.start()
        stranger.join()
        assert stranger.exitcode == 1
        folder.append(make_row("a"))
    assert load_rows(tmp_path) == [make_row("a")]
    reopen(tmp_path).close()


def test_foreign_files_are_no_reason_to_refuse_but_rows_of_unknown_origin_are(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    reopen(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "run_meta.json").unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl has no run_meta\.json"):
        reopen(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"args": {}}'])
def test_a_run_meta_of_something_else_is_refused_and_kept(tmp_path, text):
    (tmp_path / "run_meta.json").write_text(text)
    with pytest.raises(UserError, match=r"run_meta\.json: not the run_meta\.json of a run"):
        reopen(tmp_path)
    assert (tmp_path / "run_meta.json").read_text() == text


def test_what_is_no_folder_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be used as --save_dir"):
        reopen(tmp_path / "file")
    with pytest.raises(UserError, match="not a run folder"):
        load_rows(tmp_path / "nowhere")


# -- what is recorded ------------------------------------------------------------------------------------------------


def test_each_session_is_recorded_before_its_first_row(tmp_path):
    with RunFolder.open(tmp_path, SETTINGS, environment={"torch": "2.4"}, arguments={"device": "cpu"}) as folder:
        meta = json.loads((tmp_path / "run_meta.json").read_text())
        assert folder.notice is None
    assert meta["settings"] == SETTINGS
    assert meta["sessions"][0].keys() == {"started", "arguments", "environment"}
    with RunFolder.open(tmp_path, SETTINGS, environment={"torch": "2.5"}, arguments={"device": "cuda"}) as folder:
        assert folder.notice == f'{tmp_path}: resumed in another environment: torch was "2.4", is "2.5"'
    again = json.loads((tmp_path / "run_meta.json").read_text())
    assert again["sessions"][0] == meta["sessions"][0]
    assert [session["arguments"]["device"] for session in again["sessions"]] == ["cpu", "cuda"]


def test_of_many_plugins_those_are_told_that_changed(tmp_path):
    def plugins(**versions):
        return {"plugins": [{"name": name, "version": version, "error": None} for name, version in versions.items()]}

    RunFolder.open(tmp_path, SETTINGS, environment=plugins(mine="1.0", yours="3")).close()
    with RunFolder.open(tmp_path, SETTINGS, environment=plugins(mine="1.1", yours="3", new="2")) as folder:
        told = 'plugin mine was "1.0", is "1.1"; plugin new was not set, is "2"'
        assert folder.notice == f"{tmp_path}: resumed in another environment: {told}"


def test_environment_names_versions_plugins_machine_and_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = environment([{"name": "mine", "version": "1.0"}])
    assert json.loads(json.dumps(found)) == found
    assert found["git_commit"] is None
    assert found["torch"] == str(torch.__version__)
    assert found["python"] == platform.python_version()
    assert found["transformers"] and found["device"] and found["cpu_count"] >= 1
    assert found["plugins"] == [{"name": "mine", "version": "1.0"}]

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    Path("f").write_text("1")
    git("add", "f")
    git("commit", "-m", "one")
    git("tag", "v1")
    assert environment([])["git_commit"] == git("rev-parse", "HEAD")
    Path("f").write_text("2")
    assert environment([])["git_commit"] == git("rev-parse", "HEAD") + "-dirty"


def test_results_csv_keeps_every_method_under_its_own_name(tmp_path):
    """Two sessions, the second with its methods the other way round: no line is swapped and none replaced."""
    scores = {"fullkv": 0.75, "cam": 1.0, "l2norm": 0.0}
    with reopen(tmp_path) as folder:
        for method in ("cam", "l2norm"):
            folder.append(make_row("a", method, score=scores[method]))
        folder.write_csv()
    with reopen(tmp_path) as folder:
        for method in ("l2norm", "cam"):
            folder.append(make_row("b", method, score=scores[method]))
        folder.append(make_row("a", "fullkv", None, score=0.75))
        path = folder.write_csv()
    assert path == tmp_path / "results.csv"
    table = pd.read_csv(path).set_index(["method", "budget"])
    assert list(table.index) == [("cam", "64"), ("l2norm", "64"), ("fullkv", "full")]
    assert list(table["score"]) == [100, 0, 75]
    assert list(table["examples"]) == [2, 2, 1]
