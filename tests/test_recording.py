"""What a run remembers of its prompts: texts that join to the prompt, and which tokens each configuration kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ruler_samples import embedded_tokenizer
from test_sweep import Given

from kvfactory import Engine, load_method
from kvfactory.benchmarks import Example
from kvfactory.errors import UserError
from kvfactory.jobs import make_jobs
from kvfactory.recording import (
    PROMPTS,
    Recorder,
    kept_by_layer,
    kept_levels,
    load_kept,
    load_prompts,
    recorded,
    token_texts,
)
from kvfactory.registry import get_registry
from kvfactory.results import RunFolder, load_rows
from kvfactory.sweep import Sweep
from kvfactory.testing import tiny_model


class Words:
    """A tokenizer whose token 5 is the text "5 "."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f"{each} " for each in ids)

    def convert_ids_to_tokens(self, id: int) -> str:
        return f"{id}"


@given(st.text(max_size=60))
def test_texts_of_tokens_join_to_the_whole_text(text: str) -> None:
    """Also where a character takes several tokens, as emoji and Chinese do."""
    tokenizer = embedded_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assume("\ufffd" not in whole)  # characters that the tokenizer does not know
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == whole


def test_a_character_stands_with_its_last_token() -> None:
    tokenizer = embedded_tokenizer()
    ids = tokenizer.encode("a龘b", add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert texts[0] == "a" and texts[-1] == "b" and texts[-2] == "龘" and set(texts[1:-2]) == {""}


def test_sentencepiece_words_keep_the_blank_before_them() -> None:
    pieces = {1: "▁It", 2: "▁rain", 3: "ed"}
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: "".join(pieces[each] for each in ids).replace("▁", " ").strip(),
        convert_ids_to_tokens=pieces.__getitem__,
    )
    assert token_texts(tokenizer, [1, 2, 3, 2]) == [" It", " rain", "ed", " rain"]  # type: ignore[arg-type]


@given(st.integers(1, 3000), st.integers(1, 2000))
def test_long_prompts_are_recorded_with_their_ends_alone(tokens: int, most: int) -> None:
    first, last = recorded(tokens, most)
    assert first + last == min(tokens, most) and (last == 0 or last >= first)


def test_kept_shares_and_levels_are_what_the_stores_hold() -> None:
    model = tiny_model()
    methods = [
        load_method("fullkv"),
        load_method("streamingllm", budget=12),
        load_method("adakv", budget=12, window_size=4),
    ]
    prompt = list(range(1, 41))
    for method, sequence in zip(methods, Engine(model).prefill(prompt, methods), strict=True):
        stores = sequence.cache.stores
        share = kept_by_layer(stores, 40)
        slow = torch.tensor(
            [
                [
                    sum(token in head.tolist() for head in store.positions()) / len(store.positions())
                    for token in range(40)
                ]
                for store in stores
            ]
        )
        assert torch.allclose(share, slow)
        levels = kept_levels(stores, 40, 40)
        expected = slow.mean(0).tolist()
        assert [(level == "0", level == "9") for level in levels] == [(each == 0, each > 0.999) for each in expected]
        assert all(
            level in "09" or (int(level) - 1) / 8 <= each < int(level) / 8 + 1e-6
            for level, each in zip(levels, expected, strict=True)
        )
        assert kept_levels(stores, 40, 8) == levels[:2] + levels[-6:]
        if type(method).__name__ == "StreamingLLM":
            assert levels == "9999" + "0" * 28 + "9" * 8
    assert kept_levels(Engine(model).prefill(prompt, [methods[0]])[0].cache.stores, 40, 100) == "9" * 40


def run(folder: Path, benchmark: Given, record_tokens: int = 100) -> None:
    jobs = make_jobs(get_registry(), ["fullkv", "streamingllm"], [8])
    with RunFolder.open(folder, {}, environment={}) as opened:
        Sweep(Engine(tiny_model()), Words(), benchmark, jobs, opened, (), record_tokens=record_tokens).run()  # type: ignore[arg-type]


def example(name: str, **fields: object) -> Example:
    return Example(name, "g", ["x"], max_new_tokens=2, **fields)  # type: ignore[arg-type]


def test_a_sweep_records_prompts_questions_and_what_each_configuration_kept(tmp_path: Path) -> None:
    asked = [example("a"), example("b1", context="b"), example("b2", context="b"), example("b2 more", after="b2")]
    prompts = {"a": list(range(1, 13)), "b": list(range(20, 40))}
    questions = {"b1": [3, 4], "b2": [5], "b2 more": [6, 7]}
    run(tmp_path, Given(asked, prompts, questions))
    found = load_prompts(tmp_path)
    assert list(found) == ["a", "b1", "b2", "b2 more"]
    assert "".join(found["a"].begin) == "".join(f"{each} " for each in range(1, 13)) and found["a"].tokens == 12
    assert {name: each.question for name, each in found.items()} == {
        "a": "",
        "b1": "3 4 ",
        "b2": "5 ",
        "b2 more": "6 7 ",
    }
    assert found["b2"].begin == found["b1"].begin == found["b2 more"].begin and len(found["b1"].begin) == 20
    assert (found["b2"].shared_with, found["b2 more"].shared_with, found["b2 more"].after) == ("b1", "b1", "b2")
    kept = load_kept(tmp_path)
    assert len(kept) == len(load_rows(tmp_path)) == 8
    assert kept["a", "fullkv", "full"] == "9" * 12 and kept["a", "streamingllm", "8"] == "9999" + "0" * 4 + "9999"
    assert kept["b2 more", "streamingllm", "8"] == "9999" + "0" * 12 + "9999"


def test_long_prompts_and_runs_that_record_nothing(tmp_path: Path) -> None:
    prompts = {"a": list(range(1, 31))}
    run(tmp_path / "some", Given([example("a")], prompts), record_tokens=8)
    (prompt,) = load_prompts(tmp_path / "some").values()
    assert (prompt.tokens, prompt.begin, prompt.end) == (30, ["1 ", "2 "], [f"{each} " for each in range(25, 31)])
    assert load_kept(tmp_path / "some")["a", "streamingllm", "8"] == "99" + "00" + "9999"
    run(tmp_path / "none", Given([example("a")], prompts), record_tokens=0)
    assert sorted(each.name for each in (tmp_path / "none").iterdir() if each.suffix == ".jsonl") == ["rows.jsonl"]
    assert load_prompts(tmp_path / "none") == {} == load_kept(tmp_path / "none")


def test_what_a_kill_left_of_a_line_is_cut_off_and_written_again(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, {}, environment={}) as folder:
        Recorder(folder, Words(), 9).prompt("a", [1, 2])  # type: ignore[arg-type]
    path = tmp_path / PROMPTS
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b'"a"', b'"b"')[:20])
    assert list(load_prompts(tmp_path)) == ["a"]
    with RunFolder.open(tmp_path, {}, environment={}) as folder:
        Recorder(folder, Words(), 9).prompt("b", [3])  # type: ignore[arg-type]
    assert list(load_prompts(tmp_path)) == ["a", "b"]
    path.write_text("nonsense\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: not JSON"):
        load_prompts(tmp_path)
