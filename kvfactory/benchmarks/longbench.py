"""LongBench and LongBench-E: their rows, prompts and scores, by the official protocol.

The facts of the 21 datasets (template, length of the answer, metric, ...) are in longbench.json beside this file. Rows
come from `<dataset>.jsonl` files or the official data.zip in a folder of yours, else from the Hugging Face hub.
Three rules change scores and are easily missed: a prompt that is too long loses its middle as text, before the chat
template is put around it; six datasets never get a chat template; samsum also ends at a line break.
"""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from kvfactory import metrics
from kvfactory.benchmarks import Benchmark, Example
from kvfactory.benchmarks.long_texts import both_ends
from kvfactory.chat import chat_ids, split_chat_ids
from kvfactory.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DatasetConfig:
    """What the official code knows of one dataset."""

    template: str
    max_new_tokens: int
    metric: str
    """Its function in `kvfactory.metrics.METRICS`, without the `_score` at the end."""
    language: str
    type: str
    placeholders: list[str]
    no_chat_template: bool
    first_line_only: bool
    stop_at_newline: bool
    samples: int
    avg_length: int
    longbench_e_bins: list[int] | None
    """Rows of `<dataset>_e` with a length below 4000, below 8000 and above; None where LongBench-E lacks it."""


_FACTS = json.loads(resources.files("kvfactory.benchmarks").joinpath("longbench.json").read_text("utf-8"))
DATASETS = {name: DatasetConfig(**facts) for name, facts in _FACTS.items()}
ENGLISH = tuple(name for name, config in DATASETS.items() if config.language != "zh")
"""The 16 datasets of the KV-cache papers, in their order."""
LONGBENCH_E = tuple(f"{name}_e" for name in ENGLISH if DATASETS[name].longbench_e_bins)
"""The 13 datasets of LongBench-E, whose rows are told apart by length."""
_WITH_E = {**DATASETS, **{f"{name}_e": config for name, config in DATASETS.items() if config.longbench_e_bins}}


def dataset_config(dataset: str) -> DatasetConfig:
    """The facts of a dataset, or for one of LongBench-E such as `qasper_e` those of its base."""
    if dataset not in _WITH_E:
        raise unknown("dataset", dataset, _WITH_E)
    return _WITH_E[dataset]


# ---- rows ----


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "input": (_is_text, "a string"),
    "context": (_is_text, "a string"),
    "answers": (_is_texts, "a list of strings"),
    "length": (lambda value: isinstance(value, int), "a whole number"),
    "language": (_is_text, "a string"),
    "all_classes": (lambda value: value is None or _is_texts(value), "a list of strings or null"),
}


def _row(line: bytes, where: str, config: DatasetConfig) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for field, (is_valid, expected) in _FIELDS.items():
        if field not in row:
            raise UserError(f"{where}: field '{field}' is missing; a row has {', '.join(_FIELDS)}")
        if not is_valid(row[field]):
            raise UserError(f"{where}: field '{field}' is not {expected}")
    if config.metric == "classification" and not row["all_classes"]:
        raise UserError(f"{where}: field 'all_classes' is empty, but this dataset is scored by class names")
    return row


def _download(dataset: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:  # the archive itself, since `datasets` no longer runs the script that the hub's LongBench is made of
        return Path(hf_hub_download("THUDM/LongBench", "data.zip", repo_type="dataset"))
    except OSError as error:
        raise UserError(
            f"cannot download LongBench's data.zip ({type(error).__name__}); "
            f"put {dataset}.jsonl or data.zip in a folder and name it with --data_dir"
        ) from error


def _from_archive(archive: Path, file: str) -> tuple[str, bytes]:
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.namelist():
                if PurePosixPath(member).name == file:
                    return f"{archive}/{member}", opened.read(member)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is not a zip archive: {error}") from error
    raise UserError(f"{archive} has no {file}")


def _file(dataset: str, data_dir: Path | None) -> tuple[str, bytes]:
    """Name and content of the dataset's file."""
    file = f"{dataset}.jsonl"
    if data_dir is None:
        return _from_archive(_download(dataset), file)
    for path in (data_dir / file, data_dir / "data" / file):
        if path.is_file():
            return str(path), path.read_bytes()
    archive = data_dir / "data.zip"
    if archive.is_file():
        return _from_archive(archive, file)
    raise UserError(f"no rows of {dataset}: neither {data_dir / file} nor {archive} exists (--data_dir)")


def load_rows(dataset: str, data_dir: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a dataset, with the official fields, out of the folder `data_dir` or else from the hub.

    Raises UserError for an unknown dataset, a missing or empty file, and a line that is no row, which it names.
    """
    config = dataset_config(dataset)
    name, content = _file(dataset, data_dir)
    # Split at line feeds alone: a JSON string may hold other characters that str.splitlines takes for line ends.
    lines = enumerate(content.split(b"\n"), start=1)
    rows = [_row(line, f"{name}:{number}", config) for number, line in lines if line.strip()]
    if not rows:
        raise UserError(f"{name} has no rows")
    return rows


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def unique_ids(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The `_id` of each row of a dataset, or their numbers from 1 on where one has none or two have the same."""
    ids = [str(row.get("_id") or "") for row in rows]
    if "" in ids or len(set(ids)) < len(ids):
        return [str(number) for number in range(1, len(rows) + 1)]
    return ids


# ---- prompts and scores ----


def truncate_middle(prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """The prompt; where it has more than `max_length` tokens, the text of its first and last `max_length // 2`.

    As in the official code special tokens count but do not stay in the text, which therefore tokenises to a few
    tokens more or less than asked for. A `max_length` of 1 drops nothing but them.
    """
    half = max_length // 2
    ends = both_ends(tokenizer, prompt, max_length) if half else None
    if ends is None:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        if len(ids) <= max_length:
            return prompt
        ends = ids, ids
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ends[0][:half], ends[1][-half:]))


def group_of(dataset: str, length: int | None) -> str:
    """The group of a row: its dataset, and for a `length` LongBench-E's bin of that."""
    return dataset if length is None else f"{dataset} {metrics.length_bin(length)}"


def score(example: Example, prediction: str) -> dict[str, float]:
    """The official `score`, and beside that by ROUGE the `rougeL` of another package."""
    dataset = example.info["dataset"]
    config = dataset_config(dataset)
    scores = {"score": metrics.score(dataset, prediction, example.answers, example.info["all_classes"])}
    if config.metric.startswith("rouge"):
        tokenizer = metrics.ChineseWords() if config.language == "zh" else None
        line = metrics.scored_part(dataset, prediction)
        scores["rougeL"] = max((metrics.rouge_l(line, each, tokenizer) for each in example.answers), default=0.0)
    return scores


class LongBench(Benchmark):
    """The examples of some LongBench datasets, which are also their groups; one of LongBench-E has a group for each bin.

    `chat` puts texts inside the model's chat template. A dataset is cut down to `max_num_examples`: its first ones
    ("topk") or a seeded choice ("random"). With `query_agnostic` the question, and all else that the template has behind
    the context, is read after the context was compressed, and questions about the same context share it; the context
    loses its middle so that it fits `max_prompt_tokens` with the longest question about it, a question that is longer
    than half of them its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        datasets: Sequence[str],
        *,
        data_dir: Path | None = None,
        max_prompt_tokens: int,
        chat: bool,
        query_agnostic: bool = False,
        max_num_examples: int | None = None,
        sample_method: Literal["topk", "random"] = "topk",
        seed: int = 42,
    ) -> None:
        if max_prompt_tokens < 2:
            raise UserError(f"max_prompt_tokens is {max_prompt_tokens}; a prompt needs 2 or more")
        if max_num_examples is not None and max_num_examples < 1:
            raise UserError(f"max_num_examples is {max_num_examples}; expected 1 or more")
        if sample_method not in ("topk", "random"):
            raise unknown("sample_method", sample_method, ("topk", "random"))
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.chat = chat
        self.query_agnostic = query_agnostic
        self.name = "longbench, query-agnostic" if query_agnostic else "longbench"
        self._examples: list[Example] = []
        self._rows: dict[str, dict[str, Any]] = {}
        self._sharing: dict[str, list[Example]] = {}
        for dataset in dict.fromkeys(datasets):
            rows = load_rows(dataset, data_dir)
            numbered = list(zip(unique_ids(rows), rows, strict=True))
            count = min(max_num_examples or len(rows), len(rows))
            if sample_method == "random":
                chosen = sorted(random.Random(seed).sample(range(len(rows)), count))
                numbered = [numbered[index] for index in chosen]
            if query_agnostic:  # those that share a context next to each other
                first = {row["context"]: rank for rank, (_, row) in reversed([*enumerate(numbered[:count])])}
                numbered = sorted(numbered[:count], key=lambda each: first[each[1]["context"]])
            for row_id, row in numbered[:count]:
                example = self._example(f"{dataset}/{row_id}", dataset, row)
                self._examples.append(example)
                self._rows[example.id] = row
                self._sharing.setdefault(str(example.context), []).append(example)

    def _example(self, example_id: str, dataset: str, row: dict[str, Any]) -> Example:
        config = dataset_config(dataset)
        newline = self.tokenizer.encode("\n", add_special_tokens=False)[-1:] if config.stop_at_newline else []
        return Example(
            id=example_id,
            group=group_of(dataset, row["length"] if dataset in LONGBENCH_E else None),
            context=f"{dataset}/{_digest(row['context'])}" if self.query_agnostic else None,
            answers=row["answers"],
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=1 if config.stop_at_newline else 0,
            stop_ids=frozenset(newline),
            info={
                "dataset": dataset,
                "query_agnostic": self.query_agnostic,
                **{key: row.get(key) for key in ("_id", "language", "length", "all_classes")},
            },
        )

    def examples(self) -> Sequence[Example]:
        return self._examples

    def prompt_ids(self, example: Example) -> list[int]:
        config = dataset_config(example.info["dataset"])
        template = self.chat and not config.no_chat_template
        if self.query_agnostic:
            return split_chat_ids(self.tokenizer, self._context(example), self._question(example), template=template)[0]
        text = truncate_middle(config.template.format(**self._rows[example.id]), self.tokenizer, self.max_prompt_tokens)
        return chat_ids(self.tokenizer, text, template=template)

    def question_ids(self, example: Example) -> list[int]:
        if not self.query_agnostic:
            return []
        template = self.chat and not dataset_config(example.info["dataset"]).no_chat_template
        return split_chat_ids(self.tokenizer, "", self._question(example), template=template)[1]

    def _context(self, example: Example) -> str:
        """What the template has up to the context's end, short enough for each question about it."""
        head = dataset_config(example.info["dataset"]).template.partition("{context}")[0]
        questions = [self._question(each) for each in self._sharing[str(example.context)]]
        longest = max(len(self.tokenizer(each, verbose=False)["input_ids"]) for each in questions)
        text = head + self._rows[example.id]["context"]
        return truncate_middle(text, self.tokenizer, max(self.max_prompt_tokens - longest, 2))

    def _question(self, example: Example) -> str:
        """What the template has behind the context."""
        tail = dataset_config(example.info["dataset"]).template.partition("{context}")[2]
        text = tail.format(**self._rows[example.id])
        return truncate_middle(text, self.tokenizer, max(self.max_prompt_tokens // 2, 2))

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return score(example, prediction)
