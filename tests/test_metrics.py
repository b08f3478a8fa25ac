"""The official scores: golden values of the official code, slow and obvious versions, and what must always hold."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfactory import metrics
from kvfactory.errors import UserError

with warnings.catch_warnings(action="ignore"):  # it misses python-Levenshtein, whose place IndelMatcher takes
    from fuzzywuzzy import fuzz

TEXT = st.text(st.sampled_from("abc the,.'A\n\t一二。《"), max_size=30)
WORDS = st.lists(st.sampled_from(["a", "b", "c", "b.", "."]), max_size=12).map(" ".join)
CLASSES = st.lists(st.text("ab", min_size=1, max_size=3), max_size=6)


def golden(shared: Path, name: str) -> dict:
    return json.loads((shared / "golden" / f"{name}_public.json").read_text("utf-8"))


def wrong(cases: list[dict], value: str, compute) -> list[tuple]:
    """The cases whose computed value is not the golden one, to be shown by a failing assertion."""
    found = [(case["id"], compute(case), case[value]) for case in cases if case.get("quirk") != "rouge_recursion_limit"]
    return [each for each in found if each[1] != pytest.approx(each[2], abs=1e-9)]


# ---- golden values ----


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
def test_metric_equals_the_official_one(shared, name):
    cases = golden(shared, "longbench_metrics")[name]
    assert len(cases) > 100
    metric = metrics.METRICS[name]
    assert not wrong(cases, "score", lambda c: metric(c["prediction"], c["ground_truth"], c["all_classes"]))


@pytest.mark.parametrize("name", ["normalize_answer", "normalize_zh_answer"])
def test_normalisation_equals_the_official_one(shared, name):
    cases = golden(shared, "longbench_metrics")[name]
    assert len(cases) > 100
    assert [getattr(metrics, name)(case["text"]) for case in cases] == [case["output"] for case in cases]


def test_score_of_one_example_equals_the_official_one(shared):
    cases = golden(shared, "longbench_samples")["samples"]
    assert len({case["dataset"] for case in cases}) == 21

    def compute(case: dict) -> float:
        return round(100 * metrics.score(case["dataset"], case["prediction"], case["answers"], case["all_classes"]), 2)

    assert not wrong(cases, "score", compute)


def run_of(shared: Path, case: dict) -> dict:
    """Predictions, answers, lengths and classes of a golden dataset, from the run's file where it has one."""
    if "predictions_file" not in case:
        return case
    lines = (shared / case["predictions_file"]).read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    columns = {"predictions": "pred", "answers": "answers", "lengths": "length"}
    run = {name: [row[key] for row in rows] for name, key in columns.items()}
    return {**run, "all_classes": rows[-1]["all_classes"]}


def test_dataset_scores_and_bins_equal_the_official_and_the_published_ones(shared):
    cases = golden(shared, "longbench_datasets")["datasets"]
    assert sum("published_score" in case for case in cases) == 9
    assert sum("published_bins" in case for case in cases) == 7
    for case in cases:
        run = run_of(shared, case)
        bins = metrics.dataset_score_e(
            case["dataset"], run["predictions"], run["answers"], run["lengths"], run["all_classes"]
        )
        assert bins == case["score_e"], case["id"]
        for name, value in case.get("published_bins", {}).items():
            assert name not in bins or bins[name] == value, case["id"]
        score = metrics.dataset_score(case["dataset"], run["predictions"], run["answers"], run["all_classes"])
        assert score == case["score"] == case.get("published_score", score), case["id"]


def test_rouge_score_package_column_is_a_different_number(shared):
    run = run_of(shared, {"predictions_file": "data/longbench_preds/adakv_mistral7b_fullkv/samsum.jsonl"})
    pairs = [(metrics.scored_part("samsum", p), a) for p, a in zip(run["predictions"], run["answers"], strict=True)]
    values = [max(metrics.rouge_l(prediction, answer) for answer in answers) for prediction, answers in pairs]
    assert round(100 * sum(values) / len(values), 2) == 38.79


def test_ruler_scores_equal_the_official_ones(shared):
    cases = golden(shared, "ruler_metrics")
    for name in ("string_match_all", "string_match_part"):
        assert len(cases[name]) > 100
        assert not wrong(cases[name], "score", lambda c, name=name: getattr(metrics, name)(c["preds"], c["refs"]))
    for case in cases["postprocess_pred"]:
        assert metrics.postprocess_pred(case["text"]) == case["output"]
    assert {case["task"] for case in cases["task_score"]} == set(metrics.RULER_TASKS)
    assert not wrong(cases["task_score"], "score", lambda c: metrics.ruler_score(c["task"], c["preds"], c["refs"]))


# ---- slow and obvious versions ----


def naive_rouge(prediction: str, answer: str) -> float:
    def sentences(text: str) -> list[list[str]]:
        return [" ".join(piece.split()).split(" ") for piece in text.split(".") if len(piece) > 0]

    def subsequence(x: list[str], y: list[str]) -> list[str]:
        @lru_cache(None)
        def length(i: int, j: int) -> int:
            if i == 0 or j == 0:
                return 0
            if x[i - 1] == y[j - 1]:
                return length(i - 1, j - 1) + 1
            return max(length(i - 1, j), length(i, j - 1))

        def walk(i: int, j: int) -> list[str]:
            if i == 0 or j == 0:
                return []
            if x[i - 1] == y[j - 1]:
                return [*walk(i - 1, j - 1), x[i - 1]]
            return walk(i - 1, j) if length(i - 1, j) > length(i, j - 1) else walk(i, j - 1)

        words = walk(len(x), len(y))
        assert len(words) == length(len(x), len(y))
        return words

    predicted, wanted = sentences(prediction), sentences(answer)
    if not predicted or not wanted:
        return 0.0
    union = {word for r in wanted for h in predicted for word in subsequence(r, h)}
    p = len(union) / len({word for sentence in predicted for word in sentence})
    r = len(union) / len({word for sentence in wanted for word in sentence})
    return 2 * ((p * r) / (p + r + 1e-8))


@settings(deadline=None)
@given(WORDS | TEXT, WORDS | TEXT)
def test_rouge_equals_the_slow_version(prediction, answer):
    assert metrics.rouge_score(prediction, answer) == pytest.approx(naive_rouge(prediction, answer), abs=1e-12)


@settings(deadline=None)
@given(st.text("ab", max_size=6), CLASSES, st.text("ab", min_size=1, max_size=3))
def test_classification_equals_the_loop_that_shortens_its_own_list(prediction, classes, answer):
    hits = [name for name in classes if name in prediction]
    for name in hits:
        if name in answer and name != answer:
            hits.remove(name)
    expected = 1 / len(hits) if answer in hits else 0.0
    assert metrics.classification_score(prediction, answer, classes) == expected


class IndelMatcher:
    """python-Levenshtein's place in fuzzywuzzy: twice the common subsequence over the sum of the lengths."""

    def __init__(self, _, first, second):
        self.first, self.second = first, second

    def ratio(self) -> float:
        row = [0] * (len(self.second) + 1)
        for a in self.first:
            above, row = row, [0]
            for j, b in enumerate(self.second):
                row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
        return 2 * row[-1] / (len(self.first) + len(self.second))


@settings(deadline=None)
@given(st.text("ab#`/\n =一", max_size=40), st.text("ab =一", max_size=20))
def test_code_similarity_equals_fuzzywuzzy_over_the_indel_ratio(prediction, answer):
    lines = prediction.lstrip("\n").split("\n")
    code = [line for line in lines if "`" not in line and "#" not in line and "//" not in line]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "SequenceMatcher", IndelMatcher)
        expected = fuzz.ratio([*code, ""][0], answer) / 100
    assert metrics.code_sim_score(prediction, answer) == expected


# ---- what must always hold ----


@settings(deadline=None)
@given(TEXT, TEXT, CLASSES)
def test_every_metric_is_between_zero_and_one(prediction, answer, classes):
    for name, metric in metrics.METRICS.items():
        answer_of = {"retrieval_score": f"Paragraph 3{answer}", "retrieval_zh_score": f"段落3{answer}"}
        assert 0 <= metric(prediction, answer_of.get(name, answer), all_classes=classes) <= 1, name
    for tokenizer in (None, metrics.ChineseWords()):
        assert 0 <= metrics.rouge_l(prediction, answer, tokenizer) <= 1


@settings(deadline=None)
@given(st.lists(st.sampled_from(["x", "y", "z", "The"]), max_size=8), st.randoms(), st.text("xyz ", max_size=8))
def test_qa_f1_knows_no_order_and_no_sides(words, random, answer):
    shuffled = random.sample(words, len(words))
    score = metrics.qa_f1_score(" ".join(words), answer)
    assert metrics.qa_f1_score(" ".join(shuffled), answer) == score
    assert metrics.qa_f1_score(answer, " ".join(words)) == pytest.approx(score)


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, max_size=4))
def test_score_is_the_best_over_the_answers(prediction, answers):
    expected = max([0.0, *(metrics.METRICS["qa_f1_score"](prediction, answer) for answer in answers)])
    assert metrics.score("hotpotqa", prediction, answers) == expected


@pytest.mark.parametrize("dataset", ["trec", "triviaqa", "samsum", "lsht"])
def test_few_shot_sets_score_the_first_line_that_is_not_empty(dataset):
    classes = ["x y", "other"]
    assert metrics.score(dataset, "\n\nx y\nother", ["x y"], classes) > 0.9999
    assert metrics.score(dataset, " \nx y", ["x y"], classes) == 0


def test_other_sets_score_the_whole_prediction():
    assert metrics.score("hotpotqa", "wrong\nx y", ["x y"]) == pytest.approx(0.8)


def test_perfect_rouge_is_a_hair_below_one_and_long_sentences_are_no_error():
    assert metrics.rouge_score("a b. c", "a b. c") == pytest.approx(0.999999995, abs=1e-12)
    words = " ".join(f"w{i}" for i in range(1500))
    assert metrics.rouge_score(words, words) == pytest.approx(0.999999995, abs=1e-12)


def test_chinese_is_counted_by_the_second_rouge_column():
    text = "经济增长很快。"
    assert metrics.rouge_l(text, text) == 0
    assert metrics.rouge_l(text, " 经济 增长很快。\n", metrics.ChineseWords()) == 1


def test_bins_are_open_at_their_upper_end_and_may_be_empty():
    bins = metrics.dataset_score_e("hotpotqa_e", ["x", "y", "x"], [["x"]] * 3, [3999, 4000, 7999])
    assert bins == {"0-4k": 100.0, "4-8k": 50.0, "8k+": None}
    assert metrics.dataset_score_e("hotpotqa_e", ["x"], [["x"]], [8000])["8k+"] == 100.0


def test_ruler_counts_every_reference_but_for_qa_any():
    assert metrics.ruler_score("niah_multivalue", ["It is\tONE"], [["one", "two"]]) == 50
    assert metrics.ruler_score("qa_1", ["It is ONE"], [["one", "two"]]) == 100
    assert metrics.ruler_score("vt", ["a\tb"], [["a\nb"]]) == 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.score("hotpot", "", [""]), "unknown dataset 'hotpot'; did you mean 'hotpotqa'?"),
        (lambda: metrics.ruler_score("niah", [""], [["x"]]), "unknown RULER task 'niah'"),
        (lambda: metrics.ruler_score("qa_3", [""], [["x"]]), "unknown RULER task 'qa_3'"),
        (lambda: metrics.ruler_score("vt", ["x"], [[]]), "no reference answers for the prediction 'x'"),
        (lambda: metrics.ruler_score("vt", [], []), "no predictions to score"),
        (lambda: metrics.dataset_score("trec", [], []), "no predictions to score"),
        (lambda: metrics.dataset_score("lcc", ["x"], []), "1 predictions but 0 lists of answers"),
        (lambda: metrics.dataset_score_e("lcc", ["x"], [["x"]], []), "1 predictions but 0 lengths"),
        (lambda: metrics.score("trec", "Date", ["Date"]), "needs all_classes"),
        (lambda: metrics.score("passage_retrieval_en", "3", ["3"]), "the answer '3' names no paragraph"),
    ],
)
def test_bad_input_is_one_line_that_names_it(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_chinese_metrics_are_silent_and_others_leave_jieba_alone():
    program = """
import sys
from kvfactory import metrics
metrics.score("hotpotqa", "x", ["x"])
assert "jieba" not in sys.modules
assert metrics.score("multifieldqa_zh", "经济增长", ["经济增长"]) == 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
