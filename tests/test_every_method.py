"""Every method with the embedded model: in both runners, and in a left-padded batch under generate()."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from entry_points import run_longbench, run_needle

from kvfactory import Engine, compress, load_method, load_model
from kvfactory.models import EMBEDDED_PACKAGE
from kvfactory.registry import get_registry
from kvfactory.results import load_rows

REGISTRY = get_registry()
METHODS = sorted(name for name, entry in REGISTRY.methods.items() if entry.plugin.distribution == "kvfactory")
WHOLE_LAYERS = {"l2norm": 2}
"""Layers that a method leaves whole by its definition."""
BUDGET = 48

pytestmark = pytest.mark.skipif(
    not any(metadata.distributions(name=EMBEDDED_PACKAGE[0])), reason="the embedded model is not installed"
)
AS_IT_IS = ("fullkv", "minference")
"""Methods that store everything and nothing else."""


def check_rows(folder: Path, budget: int) -> None:
    rows = load_rows(folder)
    assert {row["method"] for row in rows} == set(METHODS)
    assert len(rows) == len(METHODS)
    for row in rows:
        assert row["new_tokens"] >= 1
        if row["budget"] is None:
            assert not row["evicted"]
            assert (row["ratio"] == 1) == (row["method"] in AS_IT_IS), row["method"]
            continue
        assert row["evicted"], row["method"]
        whole = WHOLE_LAYERS.get(row["method"], 0)
        most = (whole * row["prompt_tokens"] + (30 - whole) * budget) / 30
        assert row["kept_tokens_mean"] <= most + 0.5, f"{row['method']}; counts of heads are rounded"
        assert row["ratio"] <= 1.3 * most / row["prompt_tokens"], f"{row['method']}: bytes follow what is kept"


def test_the_needle_runner_runs_them_all(tmp_path: Path) -> None:
    grid = ["--context_lengths", "300", "--depths", "50", "--samples", "1"]
    flags = ["--method", ",".join(METHODS), "--max_capacity_prompts", str(BUDGET), "--save_dir", str(tmp_path)]
    assert run_needle([*flags, *grid]) == 0
    check_rows(tmp_path, BUDGET)


def test_the_longbench_runner_runs_them_all_at_a_share_of_the_prompt(tmp_path: Path) -> None:
    context = " ".join(f"Sentence {number} is about rivers and hills." for number in range(36))
    row = {"input": "What is a lemur?", "context": context, "answers": ["Animal"], "all_classes": None}
    row |= {"length": 300, "dataset": "hotpotqa", "language": "en", "_id": "0"}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--method", ",".join(METHODS), "--max_capacity_prompts", "10%", "--save_dir", str(tmp_path / "run")]
    assert run_longbench([*flags, "--datasets", "hotpotqa", "--data_dir", str(tmp_path)]) == 0
    rows = load_rows(tmp_path / "run")
    assert {(row["budget"] is None, row["budget_share"]) for row in rows} == {(True, None), (False, "10%")}
    check_rows(tmp_path / "run", int(rows[0]["prompt_tokens"] * 0.1))


@pytest.mark.parametrize("name", METHODS)
def test_generate_gives_each_row_of_a_batch_what_the_engine_gives_it_alone(name: str) -> None:
    model, tokenizer = load_model(dtype="float32", device="cpu")
    texts = ["The museum opens at nine. " + "Rain fell on the quiet town all day. " * each for each in (6, 9)]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    method = load_method(name, budget=BUDGET)
    with compress(model, method):
        output = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    engine = Engine(model)
    for text, row in zip(texts, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        ids = tokenizer.encode(text)
        assert len(ids) > BUDGET
        stop = [torch.as_tensor(model.generation_config.eos_token_id).flatten().tolist()[0]]
        alone = engine.decode(engine.prefill(ids, [method]), 5, stop=stop, min_new_tokens=5)[0]
        assert row == alone
