"""What a batch costs: equal work for everyone, numbers that can be counted, and rows where memory did not suffice."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import fmean, median
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from entry_points import exit_code
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from kvfactory import Engine, UserError, load_method, models
from kvfactory.benchmarks.latency import Latency, LatencySweep, largest_batch, measure, plain_ids
from kvfactory.folder_format import budget_name
from kvfactory.jobs import Job, make_jobs
from kvfactory.registry import get_registry
from kvfactory.report.card import card, print_card, with_scores
from kvfactory.report.tables import summarise
from kvfactory.report.terminal import print_table
from kvfactory.results import Row, RunFolder, load_rows
from kvfactory.sweep import full_cache_bytes
from kvfactory.testing import TINY, TINY_CONFIGS, tiny_model
from scripts import load_script

METHODS = ["fullkv", "snapkv", "streamingllm"]
ALL_IDS = range(TINY["vocab_size"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of two heads and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = models.load_tokenizer()
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY_CONFIGS["llama"].to_dict() | own)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def jobs() -> list[Job]:
    return make_jobs(get_registry(), METHODS, [16])


def latency(**changes: Any) -> Latency:
    return Latency(**{"vocabulary": range(8, 190), "lengths": [40], "new_tokens": 5, "repeats": 3, **changes})


def run(benchmark: Latency, jobs: Sequence[Job], path: Path, stop: Sequence[int] = ()) -> list[Row]:
    with RunFolder.open(path, {}, environment={}) as folder:
        sweep = LatencySweep(Engine(tiny_model()), SimpleNamespace(), benchmark, jobs, folder, stop)
        sweep.run()
        return sweep.rows()


def shown(rows: Sequence[Row]) -> str:
    page = io.StringIO()
    print_table(rows, Console(file=page, width=100))
    return page.getvalue()


@pytest.mark.parametrize(
    "spec",
    [
        "fullkv",
        "snapkv",
        "adakv",
        "h2o:decode_budget=same:recent_size=4",
        "kvzip",
        "minference",
        "streamingllm:merge=pivot",
    ],
)
def test_a_batch_is_prefilled_as_its_prompts_are_alone(spec: str) -> None:
    (job,) = make_jobs(get_registry(), [spec], [24])
    engine, benchmark = Engine(tiny_model()), latency(lengths=[50], batch_sizes=[3])
    prompts = benchmark.prompts(benchmark.examples()[0])
    together = engine.prefill_batch(prompts, job.method)
    alone = [engine.prefill(prompt, [job.method])[0] for prompt in prompts]
    assert len(together) == 3
    for one, other in zip(together, alone, strict=True):
        assert one.prompt_tokens == 50 and one.cache.nbytes() == other.cache.nbytes()
        assert one.cache.kept() == other.cache.kept()
        assert one.logits is not None and other.logits is not None
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)
    assert len({each.prefill_seconds for each in together}) == 1, "one pass"
    tokens = engine.decode(together, 8)
    assert tokens == [engine.decode([each], 8)[0] for each in alone]
    assert len({tuple(each) for each in tokens}) > 1, "prompts that differ"


@pytest.mark.parametrize("prompts", [[[5, 6], [7]], [[]], []])
def test_a_batch_of_uneven_prompts_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="prompts of one length"):
        Engine(tiny_model()).prefill_batch(prompts, load_method("fullkv"))


def test_prompts_have_exact_lengths_and_ordinary_tokens_and_are_the_same_again() -> None:
    tokenizer = models.load_tokenizer()
    vocabulary = plain_ids(tokenizer, len(tokenizer))
    assert not {*tokenizer.all_special_ids} & {*vocabulary} and len(vocabulary) > 40_000
    assert max(plain_ids(tokenizer, 1000)) == 999, "none that the model has no embedding for"
    benchmark = latency(vocabulary=vocabulary, lengths=[64, 300, 64], batch_sizes=[1, 4])
    examples = {each.id: each for each in benchmark.examples()}
    assert list(examples) == ["64/batch1", "64/batch4", "300/batch1", "300/batch4"]
    prompts = benchmark.prompts(examples["300/batch4"])
    assert [len(prompt) for prompt in prompts] == [300] * 4 and len(set(map(tuple, prompts))) == 4
    assert {*prompts[0], *prompts[1]} <= {*vocabulary}
    again = latency(vocabulary=vocabulary, lengths=[300], batch_sizes=[1])
    assert again.prompts(again.examples()[0]) == prompts[:1] == [benchmark.prompt_ids(examples["300/batch1"])]
    other = latency(vocabulary=vocabulary, lengths=[300], seed=7)
    assert other.prompts(other.examples()[0]) != prompts[:1]


def test_rows_say_what_can_be_counted(jobs: list[Job], tmp_path: Path) -> None:
    benchmark = latency(lengths=[40, 60], batch_sizes=[1, 3], memory_bytes=10_000_000)
    rows = run(benchmark, jobs, tmp_path, stop=ALL_IDS)
    assert len(rows) == 4 * 3
    engine, by_id = Engine(tiny_model()), {job.key: job for job in jobs}
    examples = {each.id: each for each in benchmark.examples()}
    weights = sum(each.nbytes for each in (*engine.model.parameters(), *engine.model.buffers()))
    for row in rows:
        length, batch_size = row["length"], row["batch_size"]
        assert row["example_id"] == row["group"] == f"{length}/batch{batch_size}"
        assert row["new_tokens"] == 5, "every token is a stop token, and stops nothing"
        method = by_id[row["method"], row["budget"]].method
        prompts = benchmark.prompts(examples[row["example_id"]])
        sequences = [engine.prefill(prompt, [method])[0] for prompt in prompts]
        stores = [store for each in sequences for store in each.cache.stores]
        assert row["cache_bytes"] == sum(store.nbytes() for store in stores)
        assert row["full_cache_bytes"] == batch_size * full_cache_bytes(engine.model, length)
        assert row["ratio"] == row["cache_bytes"] / row["full_cache_bytes"]
        kept = length if row["budget"] is None else 16
        assert row["kept_tokens_min"] == row["kept_tokens_mean"] == row["kept_tokens_max"] == kept
        assert row["evicted"] == (row["budget"] is not None) and row["oom"] is False
        engine.decode(sequences, 5)
        assert row["cache_bytes_end"] == sum(each.cache.nbytes() for each in sequences) > row["cache_bytes"]
        assert row["read_tokens_mean"] == kept + 4
        assert row["weight_bytes"] == weights
        assert row["largest_batch"] == (10_000_000 - weights) * batch_size // row["cache_bytes_end"] > 1
        assert row["peak_rss_bytes"] > weights and "peak_bytes" not in row


def test_times_are_medians_of_runs_that_add_up(jobs: list[Job], tmp_path: Path) -> None:
    rows = run(latency(batch_sizes=[2], repeats=4), jobs, tmp_path)
    for row in rows:
        for name in ("ttft", "tpot", "total", "prefill", "compress", "decode"):
            assert len(row[f"{name}_runs"]) == 4 and min(row[f"{name}_runs"]) > 0
            assert row[f"{name}_seconds"] == median(row[f"{name}_runs"])
        names = "ttft_runs", "tpot_runs", "total_runs", "prefill_runs", "compress_runs"
        for ttft, tpot, total, prefill, compress in zip(*(row[name] for name in names), strict=True):
            assert total == pytest.approx(ttft + 4 * tpot)
            assert ttft >= prefill + compress
        assert row["tokens_per_second"] == pytest.approx(2 / row["tpot_seconds"])
        assert row["end_to_end_tokens_per_second"] == pytest.approx(2 * 5 / row["total_seconds"])
    line = summarise(rows).set_index("method").loc["snapkv"]
    (row,) = [row for row in rows if row["method"] == "snapkv"]
    for name in ("ttft_seconds", "tpot_seconds", "tokens_per_second", "cache_bytes", "compress_seconds"):
        assert line[name] == row[name]


def watched(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[Any, int], None] = lambda method, count: None
) -> list[str]:
    """The classes of methods in the order in which batches of them are prefilled; `before` may refuse one."""
    plain, order = Engine.prefill_batch, []

    def prefill_batch(engine: Engine, prompts: Any, method: Any, chunk: int | None) -> Any:
        order.append(type(method).__name__)
        before(method, order.count(order[-1]))
        return plain(engine, prompts, method, chunk)

    monkeypatch.setattr(Engine, "prefill_batch", prefill_batch)
    return order


def test_configurations_take_turns_and_a_resumed_run_measures_what_is_missing(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = latency(batch_sizes=[1, 2], warmup=1, repeats=2)
    order = watched(monkeypatch)
    rows = run(benchmark, jobs, tmp_path)
    turn = ["FullKV", "SnapKV", "StreamingLLM"]
    assert order == [*turn, *reversed(turn), *turn] * 2
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:4]))
    order.clear()
    again = run(benchmark, jobs, tmp_path)
    assert order == [*turn[1:], *reversed(turn[1:]), *turn[1:]]
    assert [row for row in again if row in rows] == [json.loads(line) for line in lines[:1] + lines[3:4] + lines[1:3]]
    keys = [(row["example_id"], row["method"]) for row in rows]
    assert [(row["example_id"], row["method"]) for row in again] == keys and len(set(keys)) == 6
    order.clear()
    assert run(benchmark, jobs, tmp_path) == again and order == []


@pytest.mark.parametrize(
    ("error", "at_run"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."), 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 1),
        (MemoryError(), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_running_out_of_memory_is_a_result(
    error: Exception, at_run: int, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(method: Any, count: int) -> None:
        if type(method).__name__ == "SnapKV" and count == at_run:
            raise error

    order = watched(monkeypatch, refuse)
    rows = {row["method"]: row for row in run(latency(memory_bytes=10**9), jobs, tmp_path)}
    assert order.count("SnapKV") == at_run and order.count("FullKV") == order.count("StreamingLLM") == 4
    failed = rows["snapkv"]
    assert failed["oom"] is True and failed["budget"] == 16 and failed["settings"]["budget"] == 16
    assert not [name for name in failed if name.endswith(("_seconds", "_runs", "_bytes", "_batch"))]
    assert not rows["fullkv"]["oom"] and not rows["streamingllm"]["oom"]
    assert len(rows["fullkv"]["ttft_runs"]) == 3
    lines = {line.split()[0]: line.split()[3:] for line in shown([*rows.values()]).splitlines() if line.strip()}
    assert set(lines["snapkv"]) == {"oom"} and "oom" not in lines["fullkv"] + lines["streamingllm"]
    assert run(latency(), jobs, tmp_path) and order.count("SnapKV") == at_run, "it is not tried again"


def test_other_errors_are_not_taken_for_lack_of_memory(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(method: Any, count: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    watched(monkeypatch, refuse)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(latency(), jobs, tmp_path)


def test_a_largest_batch_is_arithmetic() -> None:
    assert largest_batch(1000, 400, 100) == 6
    assert largest_batch(1000, 401, 100) == 5
    assert largest_batch(1000, 400, 100.5) == 5
    assert largest_batch(300, 400, 100) == 0, "not even the weights fit"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"new_tokens": 1}, "--new_tokens 1"),
        ({"lengths": [40, 509], "window": 512}, "--lengths 509: with 5 new tokens beyond the model's window of 512"),
        ({"vocabulary": []}, "special tokens alone"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        latency(**changes)


def scored(group: str, method: str, budget: int | None, score: float) -> Row:
    row = {"benchmark": "needle", "group": group, "example_id": f"{group}{method}{budget}", "memory": "physical"}
    return {**row, "method": method, "budget": budget, "score": score, "scores": ["score"]}


def test_scores_stand_beside_the_costs_of_their_own_method_budget_and_length(jobs: list[Job], tmp_path: Path) -> None:
    rows = run(latency(lengths=[40, 60], memory_bytes=10**9), jobs, tmp_path)
    by_length = [scored("40", "fullkv", None, 1.0), scored("60", "fullkv", None, 0.5), scored("60", "snapkv", 16, 0.25)]
    frame = card(with_scores(rows, by_length)).set_index(["prompt", "method"])
    assert frame.loc[("40/batch1", "fullkv"), "score"] == 100 and frame.loc[("60/batch1", "fullkv"), "score"] == 50
    assert frame.loc[("60/batch1", "snapkv"), "score"] == 25
    assert frame["score"].isna().sum() == 3 and len(frame) == 6
    page = io.StringIO()
    print_card(frame.reset_index(), Console(file=page, width=100))
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in page.getvalue().splitlines() if "batch1" in line}
    (row,) = [row for row in rows if row["method"] == "snapkv" and row["length"] == 60]
    assert lines["60/batch1", "snapkv"] == [
        "16",
        "25.00",
        "-",
        f"{row['cache_bytes'] / 2**30:.4f}",
        f"{row['tokens_per_second']:,.1f}",
        f"{row['ttft_seconds']:.3f}",
        f"{row['largest_batch']:,}",
    ]
    assert lines["40/batch1", "streamingllm"][1] == "-"
    elsewhere = [scored("qa", "snapkv", 16, 1.0), scored("code", "snapkv", 16, 0.5), scored("qa", "fullkv", None, 1.0)]
    frame = card(with_scores(rows, elsewhere)).set_index(["prompt", "method"])
    assert frame.loc[("40/batch1", "snapkv"), "score"] == frame.loc[("60/batch1", "snapkv"), "score"] == 75
    assert frame.loc[("40/batch1", "fullkv")].isna()["score"], "an average over fewer groups compares with nothing"


def flags(
    tiny: Path, save_dir: Path, *more: str, method: str = ",".join(METHODS), budgets: str | None = "16"
) -> list[str]:
    run_flags = [
        "--method",
        method,
        "--model_path",
        str(tiny),
        "--save_dir",
        str(save_dir),
        "--device",
        "cpu",
    ]
    budget_flags = [] if budgets is None else ["--max_capacity_prompts", budgets]
    shape = ["--lengths", "160", "--new_tokens", "3", "--repeats", "2", "--dtype", "float32"]
    return [*run_flags, *budget_flags, *shape, *more]


def run_latency(arguments: Sequence[str]) -> int:
    return exit_code("run_latency.py", arguments)


def test_the_command_and_its_card(tiny: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = flags(tiny, tmp_path, "--memory_gib", "1", method="fullkv,streamingllm", budgets="50%,12.5%")
    assert run_latency(asked) == 0
    assert not (tmp_path / "card.csv").exists() and "streamingllm" in capsys.readouterr().out
    order = watched(monkeypatch)
    asked = flags(tiny, tmp_path, "--memory_gib", "1", method="fullkv,streamingllm", budgets=None)
    asked += ["--card", "--samples", "1", "--batch_sizes", "1,2"]
    assert run_latency(asked) == 0, "a run may go on with a card, and with more budgets and batches"
    printed = capsys.readouterr().out
    configurations = [("fullkv", "full"), *(("streamingllm", share) for share in ("50%", "25%", "12.5%", "6.25%"))]
    with (tmp_path / "card.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(each["prompt"], each["method"], each["budget"]) for each in lines] == [
        (f"160/batch{size}", *each) for size in (1, 2) for each in configurations
    ]
    rows = {(row["group"], row["method"], str(budget_name(row))): row for row in load_rows(tmp_path)}
    needles = load_rows(tmp_path / "needle")
    assert len(needles) == 5 * len(configurations) and len(order) == 3 * (2 + 5), "of batch 1, what was missing"
    for line in lines:
        row = rows[line["prompt"], line["method"], line["budget"]]
        found = [
            each["score"]
            for each in needles
            if (each["method"], str(budget_name(each))) == (line["method"], line["budget"])
        ]
        assert float(line["score"]) == pytest.approx(100 * fmean(found))
        assert float(line["score_low"]) <= float(line["score"]) <= float(line["score_high"])
        assert float(line["ttft_seconds"]) == pytest.approx(row["ttft_seconds"])
        assert float(line["cache_gib"]) == row["cache_bytes"] / 2**30
        assert int(line["largest_batch"]) == row["largest_batch"]
        if row["budget_share"]:
            assert row["budget"] == int(160 * float(row["budget_share"][:-1]) / 100)
            assert row["kept_tokens_mean"] == pytest.approx(row["budget"], abs=4)
    page = (tmp_path / "card.md").read_text().splitlines()
    assert len(page) == 2 + len(lines) and page[0].startswith(
        "| prompt | method | budget | score | 95 % interval | cache GiB | tokens/s |"
    )
    assert "card.csv" in printed and "card.md" in printed
    order.clear()
    before = (tmp_path / "needle" / "rows.jsonl").read_bytes(), (tmp_path / "card.csv").read_bytes()
    assert run_latency(asked) == 0 and order == []
    assert before == ((tmp_path / "needle" / "rows.jsonl").read_bytes(), (tmp_path / "card.csv").read_bytes())


def other_run(folder: Path, rows: Sequence[Row]) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scores_of_a_run_that_is_there(tiny: Path, tmp_path: Path) -> None:
    there = other_run(tmp_path / "there", [scored("qa", "snapkv", 16, 0.5), scored("qa", "fullkv", None, 0.75)])
    assert run_latency(flags(tiny, tmp_path / "run", "--card", "--scores", str(there))) == 0
    with (tmp_path / "run" / "card.csv").open() as file:
        scores = {line["method"]: line["score"] for line in csv.DictReader(file)}
    assert scores == {"fullkv": "75.0", "snapkv": "50.0", "streamingllm": ""}
    assert not (tmp_path / "run" / "needle").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--card", "--scores", "{there}"], ["--scores", "none of the methods and budgets", "snapkv 999"]),
        (["--card", "--scores", "{empty}"], ["--scores", "no scores"]),
        (["--card", "--scores", "nowhere"], ["nowhere", "not a run folder"]),
        (["--scores", "{there}"], ["--scores", "--card"]),
        (["--samples", "2"], ["--samples 2", "--card"]),
        (["--new_tokens", "1"], ["--new_tokens"]),
        (["--batch_sizes", "0"], ["--batch_sizes"]),
        (["--lengths", "1024"], ["--lengths 1024", "window of 1024"]),
        (["--memory_gib", "0"], ["--memory_gib"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_input_is_one_line(changes: list[str], words: list[str], tiny: Path, tmp_path: Path, capsys: Any) -> None:
    there = other_run(tmp_path / "there", [scored("qa", "snapkv", 999, 0.5)])
    empty = other_run(tmp_path / "empty", [])
    more = [each.format(there=there, empty=empty) for each in changes]
    assert run_latency(flags(tiny, tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and all(word in said[0] for word in words), said


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmark_latency_memory")


def script_exit_code(script: ModuleType, *arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        script.main([str(each) for each in arguments])
    return int(stop.value.code or 0)


def test_the_script_writes_the_keys_that_users_know(
    script: ModuleType, tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    prompt, output = tmp_path / "prompt.txt", tmp_path / "new" / "out.json"
    prompt.write_bytes("\ufeffA river 🏞 and\r\n一座山.\r\n".encode())
    run_flags = ["--model_path", tiny, "--device", "cpu", "--max_new_tokens", 4, "--repeat", 2, "--output_json", output]
    own = ["--method", "snapkv", "--max_capacity_prompt", 32, "--window_size", 4, "--prompt_repeats", 8]
    assert script_exit_code(script, *run_flags, *own, "--prompt_file", prompt) == 0
    told = capsys.readouterr()
    report = json.loads(output.read_text())
    assert json.loads(told.out) == report and "notice" not in told.err
    known = "model_path", "method", "attn_implementation", "max_capacity_prompt", "window_size", "max_new_tokens"
    assert [report[name] for name in known] == [str(tiny), "snapkv", "sdpa", 32, 4, 4]
    tokens = len(models.load_tokenizer().encode("A river 🏞 and\n一座山.\n" * 8))
    assert len(report["runs"]) == 2
    for each in report["runs"]:
        assert each["input_tokens"] == tokens and each["generated_tokens"] == 4
        assert each["tokens_per_sec"] == pytest.approx(4 / each["elapsed_sec"])
        assert each["elapsed_sec"] == pytest.approx(each["ttft_sec"] + 3 * each["tpot_sec"])
    assert report["mean_tokens_per_sec"] == fmean(each["tokens_per_sec"] for each in report["runs"])
    assert report["kept_tokens_mean"] == 32 and report["evicted"] and report["cache_bytes"] < report["full_cache_bytes"]


def test_the_script_says_when_nothing_was_evicted(script: ModuleType, tiny: Path, capsys: Any) -> None:
    assert (
        script_exit_code(script, "--model_path", tiny, "--device", "cpu", "--max_new_tokens", 2, "--method", "h2o") == 0
    )
    assert "within the budget of 512; nothing was evicted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "snapkvv"], ["unknown method 'snapkvv'", "did you mean 'snapkv'"]),
        (["--method", "fullkv,snapkv"], ["unknown method"]),
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "a", "--prompt_file", "b"], ["--prompt_file", "leave one out"]),
        (["--prompt_file", "nowhere.txt"], ["--prompt_file nowhere.txt"]),
        (["--prompt_repeats", "900"], ["--max_new_tokens 256", "window is 1024"]),
        (["--window_size", "4"], ["--window_size", "snapkv"]),
    ],
)
def test_the_script_refuses_in_one_line(
    script: ModuleType, tiny: Path, capsys: Any, arguments: list[str], words: list[str]
) -> None:
    assert script_exit_code(script, "--model_path", tiny, "--device", "cpu", *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and all(word in said for word in words), said


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_what_was_allocated_at_most() -> None:
    model = deepcopy(tiny_model(dtype=torch.bfloat16)).to("cuda")
    benchmark = latency(lengths=[400], batch_sizes=[4])
    prompts = benchmark.prompts(benchmark.examples()[0])
    torch.cuda.empty_cache()
    found = {name: measure(Engine(model), prompts, load_method(name, budget=16), 8) for name in ("fullkv", "snapkv")}
    for each in found.values():
        assert each.memory["allocated_before_bytes"] >= model.get_memory_footprint()
        assert each.memory["peak_reserved_bytes"] >= each.memory["peak_bytes"] >= each.size["cache_bytes"]
    assert found["snapkv"].memory["peak_bytes"] < found["fullkv"].memory["peak_bytes"]
