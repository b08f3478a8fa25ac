"""Samples of RULER's official generator: sent as they are, and refused where they are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruler_samples import BYTES, embedded_tokenizer, jsonl, row, text_of, wrapped, write

from kvfactory.benchmarks.ruler_files import ReadyMade
from kvfactory.errors import UserError
from kvfactory.metrics import RULER_TASKS, ruler_score

GENERATED = "data/ruler/official_gen_smollm2"


def ready(folder, tokenizer=BYTES, **changes):
    return ReadyMade(tokenizer, Path(folder), **{"samples": 500, **changes})


def test_official_samples_are_sent_as_they_are(shared):
    benchmark = ready(shared / GENERATED)
    examples = benchmark.examples()
    rows = [
        (task, length, each)
        for length in (2048, 4096)
        for task in RULER_TASKS
        for each in jsonl(shared / GENERATED / str(length) / f"{task}.jsonl")
    ]
    assert len(examples) == len(rows) == 130
    for example, (task, length, each) in zip(examples, rows, strict=True):
        assert example.group == f"{task} {length}" and example.answers == each["outputs"]
        assert text_of(BYTES, benchmark.prompt_ids(example)) == each["input"] + each["answer_prefix"]
    assert [each.info["sample"] for each in examples[:6]] == [0, 1, 2, 3, 4, 0]


def test_official_lengths_are_those_of_the_same_tokenizer(shared):
    benchmark = ready(shared / GENERATED, embedded_tokenizer(), lengths=[2048])
    for example in benchmark.examples():
        each = jsonl(shared / GENERATED / "2048" / f"{example.info['task']}.jsonl")[example.info["sample"]]
        assert len(benchmark.prompt_ids(example)) + example.max_new_tokens == each["length"]


def test_older_files_have_the_beginning_of_the_answer_inside(shared):
    folder = shared / "data/ruler/kvcache_factory_4096"
    rows = jsonl(folder / "niah_multikey_3.jsonl")
    benchmark = ready(folder, lengths=[4096])
    assert [each.answers for each in benchmark.examples()] == [each["outputs"] for each in rows]
    for example, each in zip(benchmark.examples(), rows, strict=True):
        assert "answer_prefix" not in each
        assert text_of(BYTES, benchmark.prompt_ids(example)) == each["input"]


def test_a_perfect_and_an_empty_answer(shared):
    benchmark = ready(shared / GENERATED)
    for example in benchmark.examples():
        task = example.info["task"]
        perfect, answers = "It is: " + ", ".join(example.answers).upper(), [example.answers]
        assert (
            benchmark.score(example, perfect)
            == {"score": 1.0}
            == {"score": ruler_score(task, [perfect], answers) / 100}
        )
        assert benchmark.score(example, "\n\x00") == {"score": 0.0}
        some = example.answers[0] if task.startswith("qa") else example.answers[-1]
        found = sum(answer.lower() in some.lower() for answer in example.answers) / len(example.answers)
        assert benchmark.score(example, some)["score"] == (1.0 if task.startswith("qa") else found)


def test_which_files_and_rows_are_taken(tmp_path):
    write(tmp_path / "4096", [row(), row(outputs=["C"]), row(outputs=["D"])])
    write(tmp_path / "4096", [row()], "cwe")
    write(tmp_path / "512", [row()])
    (tmp_path / "logs").mkdir()
    assert [each.id for each in ready(tmp_path, samples=2).examples()] == [
        "vt/512/0",
        "vt/4096/0",
        "vt/4096/1",
        "cwe/4096/0",
    ]
    assert [each.id for each in ready(tmp_path, lengths=[4096], tasks=["cwe"]).examples()] == ["cwe/4096/0"]
    flat = ready(tmp_path / "4096", lengths=[700], tasks=["vt"])
    assert [each.group for each in flat.examples()] == ["vt 700"] * 3
    assert [each.answers for each in flat.examples()] == [["A", "B"], ["C"], ["D"]]
    assert {json.dumps(each.info) for each in flat.examples()[:1]} == {
        json.dumps({"task": "vt", "context_length": 700, "sample": 0})
    }


def test_rows_are_read_when_they_are_needed(tmp_path):
    """Files may be larger than memory; lines end at line feeds alone and may begin with a byte order mark."""
    texts = ["first 🙂\u2028", "zweite\x85\r\nZeile", "{braces}", "x" * 10**4]
    path = write(tmp_path / "512", [row(input=text, answer_prefix=None) for text in texts])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n") + b"\n")
    benchmark = ready(tmp_path)
    assert [text_of(BYTES, benchmark.prompt_ids(each)) for each in reversed(benchmark.examples())] == texts[::-1]


def test_the_chat_template_goes_around_the_input(tmp_path):
    write(tmp_path / "512", [row()])
    (example,) = (benchmark := ready(tmp_path, chat=wrapped)).examples()
    assert text_of(BYTES, benchmark.prompt_ids(example)) == "<user>Which?<assistant> It is"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ("3", "expected a JSON object, found int"),
        (json.dumps({"input": "a"}), "field 'outputs' is missing"),
        (json.dumps({"outputs": ["a"]}), "field 'input' is missing"),
        (json.dumps(row(input=None)), "field 'input' is not a text"),
        (json.dumps(row(input="\ud83d")), "field 'input' is not a text"),
        (json.dumps(row(answer_prefix=3)), "field 'answer_prefix' is not a text"),
        (json.dumps(row(outputs="A")), "field 'outputs' is not a list of one text or more"),
        (json.dumps(row(outputs=[])), "field 'outputs' is not a list of one text or more"),
        (json.dumps(row(outputs=["A", ""])), "field 'outputs' is not a list of one text or more"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "512", [row()])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        ready(tmp_path)
    assert str(error.value).startswith(f"{path}:3: {message}") and "\n" not in str(error.value)


def test_what_is_not_there_is_named(tmp_path):
    cases = {
        f"--ruler_dir {tmp_path / 'none'}: no such folder": (tmp_path / "none", {}),
        f"--ruler_dir {tmp_path}: it has no folder for each length": (tmp_path, {}),
        f"--ruler_dir {tmp_path}: no file is named as a task": (tmp_path, {"lengths": [512]}),
        f"{tmp_path / 'vt.jsonl'}: No such file": (tmp_path, {"lengths": [512], "tasks": ["vt"]}),
        "unknown RULER task 'vtt'": (tmp_path, {"lengths": [512], "tasks": ["vtt"]}),
    }
    for message, (folder, how) in cases.items():
        with pytest.raises(UserError) as error:
            ready(folder, **how)
        assert str(error.value).startswith(message)
    path = write(tmp_path / "512", [])
    with pytest.raises(UserError, match=f"^{path} has no rows"):
        ready(tmp_path)
    with pytest.raises(UserError, match=r"^--lengths 1024: --ruler_dir .* has 512$"):
        ready(tmp_path, lengths=[1024])


def test_prompts_beyond_the_window_are_refused(tmp_path):
    path = write(tmp_path / "512", [row(), row(input="x" * 475)])
    assert len(ready(tmp_path, window=512).examples()) == 2  # 475 and 6 bytes, a BOS and 30 tokens of answer
    path = write(tmp_path / "512", [row(), row(input="x" * 476)])
    with pytest.raises(UserError, match=f"^{path}:2: 513 tokens .* the model's window is 512; leave out --lengths 512"):
        ready(tmp_path, window=512)
    with pytest.raises(UserError, match=r"^--lengths 512: longer than the model's window of 511 tokens"):
        ready(tmp_path, window=511)
