"""The official scores of LongBench and RULER, so that a number here can be put beside a published one.

`METRICS` holds LongBench's metric functions under their official names; `score` and `dataset_score` apply the one
that belongs to a dataset, `dataset_score_e` splits it into LongBench-E's bins, `ruler_score` scores a RULER task.
`rouge_l` is no official score: it is the `rouge-score` package's ROUGE-L, reported in a column of its own.
"""

from __future__ import annotations

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import resources
from typing import Any, Protocol

import numpy as np
from rapidfuzz.distance import Indel

from kvfactory.errors import UserError, unknown


class Metric(Protocol):
    """Compares one prediction with one answer; 0 is wrong, 1 is right."""

    def __call__(self, prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None) -> float: ...


# ---- question answering: overlap of words ----

# The official list, which leaves out 《 and ·.
_ZH_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_ZH_PUNCTUATION = str.maketrans("", "", string.punctuation + _ZH_PUNCTUATION)


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation, English articles and extra blanks."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split())


def normalize_zh_answer(text: str) -> str:
    """Lower case without ASCII or Chinese punctuation and without any blank."""
    return "".join(text.lower().translate(_NO_ZH_PUNCTUATION).split())


@cache
def _jieba() -> Any:
    import jieba  # late, since only Chinese datasets need its dictionary

    jieba.setLogLevel(logging.WARNING)
    return jieba


def _f1(prediction: Sequence[str], ground_truth: Sequence[str]) -> float:
    common = sum((Counter(prediction) & Counter(ground_truth)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(ground_truth)
    return 2 * precision * recall / (precision + recall)


def qa_f1_score(prediction: str, ground_truth: str) -> float:
    """F1 of the two bags of normalised words."""
    return _f1(normalize_answer(prediction).split(), normalize_answer(ground_truth).split())


def qa_f1_zh_score(prediction: str, ground_truth: str) -> float:
    """F1 of the two bags of Chinese words: cut from the raw text first, normalised one by one."""
    bags = [[normalize_zh_answer(word) for word in _jieba().cut(text)] for text in (prediction, ground_truth)]
    return _f1(*([word for word in bag if word] for bag in bags))


# ---- summaries: ROUGE-L ----


def _sentences(text: str) -> list[list[str]]:
    # A piece of blanks only stays, as a sentence of one empty word; an empty piece does not.
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_subsequence(reference: list[str], hypothesis: list[str]) -> set[str]:
    """Words of one longest common subsequence; where several exist, of the one the official table walk finds."""
    lengths = [[0] * (len(hypothesis) + 1)]
    for word in reference:
        above, left = lengths[-1], 0
        row = [0]
        for j, other in enumerate(hypothesis):
            left = above[j] + 1 if word == other else max(above[j + 1], left)
            row.append(left)
        lengths.append(row)
    words = set()
    i, j = len(reference), len(hypothesis)
    while i and j:
        if reference[i - 1] == hypothesis[j - 1]:
            words.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_score(prediction: str, ground_truth: str) -> float:
    """Summary-level ROUGE-L F as LongBench counts it: distinct words, sentences end at ".", case and commas matter.

    A perfect match gives 0.999999995. The official package runs into Python's recursion limit, and LongBench then
    counts 0, where a "sentence" is about a thousand words long; here it has its true value.
    """
    hypothesis, reference = _sentences(prediction), _sentences(ground_truth)
    if not hypothesis or not reference:
        return 0.0
    common = set().union(*(_common_subsequence(r, h) for r in reference for h in hypothesis))
    precision = len(common) / len(set().union(*hypothesis))
    recall = len(common) / len(set().union(*reference))
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_zh_score(prediction: str, ground_truth: str) -> float:
    """`rouge_score` of the two texts cut into Chinese words."""
    return rouge_score(*(" ".join(_jieba().cut(text)) for text in (prediction, ground_truth)))


class Tokenizer(Protocol):
    """What the rouge-score package asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]: ...


class ChineseWords:
    """A rouge-score tokenizer for Chinese, which that package's own would drop character by character."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in _jieba().cut(text) if word.strip()]


def rouge_l(prediction: str, answer: str, tokenizer: Tokenizer | None = None) -> float:
    """ROUGE-L F of the rouge-score package, which counts otherwise than LongBench's `rouge_score`."""
    from rouge_score.rouge_scorer import RougeScorer  # here, because it imports nltk

    return float(RougeScorer(["rougeL"], tokenizer=tokenizer).score(answer, prediction)["rougeL"].fmeasure)


# ---- classes, numbers, code ----


def classification_score(prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None) -> float:
    """One over the number of class names that the prediction mentions, if the right one is among them."""
    if all_classes is None:
        raise UserError("classification_score needs all_classes: the list of class names of the dataset")
    hits = [name for name in all_classes if name in prediction]
    index = 0
    while index < len(hits):
        if hits[index] != ground_truth and hits[index] in ground_truth:
            del hits[index]
        index += 1  # after a removal too: the official loop skips the name that moved up
    return 1 / len(hits) if ground_truth in hits else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _paragraph_score(word: str, prediction: str, ground_truth: str) -> float:
    wanted = re.search(word + r"(\d+)", ground_truth)
    if wanted is None:
        raise UserError(f"the answer '{ground_truth}' names no paragraph; expected '{word}' and its number")
    return _share_of_numbers(prediction, wanted[1])


def retrieval_score(prediction: str, ground_truth: str) -> float:
    """Share of the numbers in the prediction that are the answer's paragraph number."""
    return _paragraph_score("Paragraph ", prediction, ground_truth)


def retrieval_zh_score(prediction: str, ground_truth: str) -> float:
    """`retrieval_score` for answers such as 段落7."""
    return _paragraph_score("段落", prediction, ground_truth)


def count_score(prediction: str, ground_truth: str) -> float:
    """Share of the numbers in the prediction that are the answer."""
    return _share_of_numbers(prediction, str(ground_truth))


def code_sim_score(prediction: str, ground_truth: str) -> float:
    """Edit similarity, in whole percents, of the answer and the prediction's first line without comment or fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    # fuzzywuzzy takes this ratio from python-Levenshtein and, where that is missing, without an error from difflib,
    # which is up to two points lower per dataset. rapidfuzz has the Levenshtein form everywhere.
    return round(100 * Indel.normalized_similarity(line, ground_truth)) / 100


def _without_classes(metric: Callable[[str, str], float]) -> Metric:
    @wraps(metric)
    def official(prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None) -> float:
        return metric(prediction, ground_truth)

    return official


_WORD_METRICS = (qa_f1_score, qa_f1_zh_score, rouge_score, rouge_zh_score, code_sim_score)
_NUMBER_METRICS = (retrieval_score, retrieval_zh_score, count_score)
METRICS: dict[str, Metric] = {
    "classification_score": classification_score,
    **{metric.__name__: _without_classes(metric) for metric in (*_WORD_METRICS, *_NUMBER_METRICS)},
}


# ---- LongBench ----

_LONGBENCH = json.loads(resources.files("kvfactory.benchmarks").joinpath("longbench.json").read_text("utf-8"))


def _facts(dataset: str) -> dict[str, Any]:
    facts: dict[str, Any] | None = _LONGBENCH.get(dataset.removesuffix("_e"))
    if facts is None:
        raise unknown("dataset", dataset, _LONGBENCH)
    return facts


def scored_part(dataset: str, prediction: str) -> str:
    """What of a prediction is scored: the first line that is not empty for the few-shot sets, else all of it."""
    return prediction.lstrip("\n").split("\n")[0] if _facts(dataset)["first_line_only"] else prediction


def score(dataset: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None) -> float:
    """Official score in [0, 1] of one LongBench example: the best over its answers."""
    metric = METRICS[_facts(dataset)["metric"] + "_score"]
    prediction = scored_part(dataset, prediction)
    return max((metric(prediction, answer, all_classes) for answer in answers), default=0.0)


def _check(predictions: Sequence[str], others: Sequence[object], what: str) -> None:
    if not predictions:
        raise UserError("no predictions to score")
    if len(predictions) != len(others):
        raise UserError(f"{len(predictions)} predictions but {len(others)} {what}; expected one for each")


def dataset_score(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    all_classes: Sequence[str] | None = None,
) -> float:
    """Official score of a LongBench dataset, 0 to 100 with two decimals; `answers` has a list per prediction."""
    _check(predictions, answers, "lists of answers")
    total = 0.0  # added up plainly: from Python 3.12 on, sum() rounds floats differently
    for prediction, wanted in zip(predictions, answers, strict=True):
        total += score(dataset, prediction, wanted, all_classes)
    return round(100 * total / len(predictions), 2)


def length_bin(length: int) -> str:
    """LongBench-E's name for rows with such a `length`."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"


def dataset_score_e(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    lengths: Sequence[int],
    all_classes: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """LongBench-E's three scores by the rows' `length` field, 0 to 100; None where a bin has no row."""
    _check(predictions, answers, "lists of answers")
    _check(predictions, lengths, "lengths")
    bins: dict[str, list[float]] = {"0-4k": [], "4-8k": [], "8k+": []}
    for length, prediction, wanted in zip(lengths, predictions, answers, strict=True):
        bins[length_bin(length)].append(score(dataset, prediction, wanted, all_classes))
    # numpy's mean and its way of rounding, as in the official script: the second decimal can depend on them.
    return {name: float(round(100 * np.mean(values), 2)) if values else None for name, values in bins.items()}


# ---- RULER ----

RULER_TASKS = (
    *(f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3)),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)


def postprocess_pred(prediction: str) -> str:
    """RULER's cleaning of a prediction: control characters become line ends, the margins go."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def _contained(prediction: str, references: Sequence[str]) -> list[bool]:
    if not references:
        raise UserError(f"no reference answers for the prediction {prediction[:40]!r}; each needs one or more")
    return [reference.lower() in prediction.lower() for reference in references]


def string_match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean share of the references contained in each prediction, ignoring case; 0 to 100 with two decimals."""
    _check(predictions, references, "lists of references")
    found = [_contained(*pair) for pair in zip(predictions, references, strict=True)]
    return round(sum(sum(each) / len(each) for each in found) / len(predictions) * 100, 2)


def string_match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of the predictions that contain any of their references, ignoring case; 0 to 100 with two decimals."""
    _check(predictions, references, "lists of references")
    found = [any(_contained(*pair)) for pair in zip(predictions, references, strict=True)]
    return round(sum(found) / len(predictions) * 100, 2)


def ruler_score(task: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Official score of a RULER task from raw predictions, 0 to 100; `references` has a list per prediction."""
    if task not in RULER_TASKS:
        raise unknown("RULER task", task, RULER_TASKS)
    match = string_match_part if task.startswith("qa") else string_match_all
    return match([postprocess_pred(prediction) for prediction in predictions], references)
