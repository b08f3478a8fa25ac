"""Predictions of other tools, read as if they were a run: the folders of KVCache-Factory, and LongBench's own.

    run = read_results("results_long_bench/llama-3-8b_128")

What a file is goes by where it lies:

    <model>_<budget>/<dataset>/<Method>.json             LongBench by KVCache-Factory, and beside it run_meta.json
    <model>_<budget>/<length>/<task>/<method>.json       RULER by KVCache-Factory
    <model>/<dataset>.jsonl                              LongBench's own, which says nothing of methods and budgets

All of them are JSON lines with `pred` and `answers`. A folder of such folders is read as one run, if they are of one model.
Names of methods are in lower case here. Such folders know no bytes, times and kept entries; rows lack those fields.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvfactory.benchmarks.longbench import DATASETS, LONGBENCH_E, dataset_config, group_of, unique_ids
from kvfactory.benchmarks.ruler import Ruler
from kvfactory.errors import UserError, require
from kvfactory.folder_format import FULL, budget_name
from kvfactory.metrics import RULER_TASKS
from kvfactory.registry import Registry, get_registry
from kvfactory.rescoring import rescored
from kvfactory.results import META, ROWS, Row, Run, load_run

UNKNOWN = "unknown"
"""The method of predictions that do not say theirs, and the budget of a method that has one, if nothing says which."""
FEW = 3
"""Files that a notice names."""
PLACES = ("*.jsonl", "*/*.jsonl", "*/*.json", "*/*/*.json", "*/*/*/*.json")
"""Where files of predictions may lie."""
SET_BY_EACH = ("method", "save_dir", "max_capacity_prompts", "max_capacity_prompts_ratio")
"""Arguments of KVCache-Factory's run_meta.json that are no settings: they tell rows and folders apart."""

_TASKS = {name: rank for rank, name in enumerate((*DATASETS, *LONGBENCH_E, *RULER_TASKS))}
"""Names that predictions may be of, by their order in tables."""


@dataclass(frozen=True)
class Place:
    """A folder of predictions of one model at one budget."""

    path: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What its run_meta.json says; empty without one."""
        file = self.path / META
        try:
            meta = json.loads(file.read_bytes()) if file.is_file() else {}
            return {**meta, "args": {**meta.get("args", {})}}
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{file}: not the {META} of KVCache-Factory; mend or remove it") from None

    @property
    def _named(self) -> tuple[str, int | None]:
        """Model and budget, as the folder's name has them."""
        named = re.fullmatch(r"(.+)_(-?\d+)", self.path.name)
        return (named[1], int(named[2])) if named else (self.path.name, None)

    @property
    def model(self) -> str:
        model = self.meta["args"].get("model_path")
        return Path(model).name.lower() if isinstance(model, str) else self._named[0]

    def budget(self) -> tuple[int | None, str | None]:
        """Entries, and a share of the prompt such as `10%` or `UNKNOWN`; one of the two is None."""
        arguments = self.meta["args"]
        entries = arguments.get("max_capacity_prompts", self._named[1])
        if isinstance(entries, int) and entries > 0:
            return entries, None
        share = arguments.get("max_capacity_prompts_ratio", -1)
        return None, f"{100 * share:g}%" if isinstance(share, int | float) and share > 0 else UNKNOWN

    def session(self) -> dict[str, Any]:
        """Its run_meta.json as a session of ours."""
        environment = {
            "git_commit": self.meta.get("git_commit"),
            "torch": self.meta.get("torch_version"),
            "transformers": self.meta.get("transformers_version"),
        }
        return {"started": self.meta.get("timestamp"), "arguments": self.meta["args"], "environment": environment}


@dataclass(frozen=True)
class Predictions:
    """A file of predictions."""

    file: Path
    place: Place
    task: str
    """The dataset, or RULER's task."""
    method: str
    length: int | None = None
    """RULER's, in tokens."""

    def lines(self) -> list[tuple[str, dict[str, Any]]]:
        """Its predictions, each with its place; UserError for a line that is none."""
        numbered = [(f"{self.file}:{n}", line) for n, line in enumerate(self.file.read_bytes().split(b"\n"), start=1)]
        return [(where, _parsed(line, where)) for where, line in numbered if line.strip()]

    def budget(self, registry: Registry) -> dict[str, Any]:
        """The fields of rows that say it; a method that keeps everything has none, and so have those that are unknown."""
        keeps_everything = self.method in registry.methods and not registry.has_budget(self.method)
        entries, share = (None, None) if keeps_everything or self.method == UNKNOWN else self.place.budget()
        return {"budget": entries, "budget_share": share}


def read_results(path: str | Path, *, longbench_e: bool = False) -> Run:
    """A run folder, or predictions of another tool with the scores that they have here.

    With `longbench_e` LongBench's predictions are grouped by the length of their rows, whatever dataset they are of.
    Raises UserError for a folder that is neither, for a line that is no prediction, and where two files say the same.
    """
    folder = Path(path)
    if (folder / ROWS).is_file():
        require(
            not longbench_e, f"--longbench_e: {folder} is a run, whose rows have their groups already; leave it out"
        )
        return load_run(folder)
    require(folder.is_dir(), f"{folder}: no such folder")
    registry = get_registry()
    found = _found(folder, registry)
    require(
        bool(found),
        f"{folder}: no results in it; expected {ROWS} of a run, <dataset>/<method>.json or <dataset>.jsonl of LongBench, or "
        "<length>/<task>/<method>.json of RULER",
    )
    places = list(dict.fromkeys(each.place for each in found))
    models = list(dict.fromkeys(each.model for each in places))
    require(
        len(models) == 1, f"{folder}: results of several models ({', '.join(models)}); give the folder of one of them"
    )
    rows = [row for each in _distinct(found, registry) for row in _rows(each, registry, longbench_e)]
    require(bool(rows), f"{folder}: all files of predictions are empty")
    with_meta = [each for each in places if (each.path / META).is_file()]
    return Run(folder, rows, {"model": models[0], **_common(with_meta)}, [each.session() for each in with_meta])


def _found(folder: Path, registry: Registry) -> list[Predictions]:
    """Files of predictions in the order of tables: what has no budget first."""
    files = [file for pattern in PLACES for file in folder.resolve().glob(pattern) if file.name != "metrics.json"]

    def rank(each: Predictions) -> tuple[Any, ...]:
        without = budget_name(each.budget(registry)) == FULL
        return _TASKS[each.task], each.length or 0, not without, each.method, each.place.budget()[0] or 0, each.file

    return sorted((each for file in files if (each := _recognised(file))), key=rank)


def _recognised(file: Path) -> Predictions | None:
    """What a file holds, by where it lies; None where that says nothing."""
    parent, above = file.parent, file.parent.parent
    if file.suffix == ".jsonl":
        known = file.stem in _TASKS and file.stem not in RULER_TASKS
        return Predictions(file, Place(parent), file.stem, UNKNOWN) if known else None
    if parent.name in RULER_TASKS:
        length = int(above.name) if above.name.isdecimal() else None
        return Predictions(file, Place(above.parent), parent.name, file.stem.lower(), length) if length else None
    return Predictions(file, Place(above), parent.name, file.stem.lower()) if parent.name in _TASKS else None


def _distinct(found: Sequence[Predictions], registry: Registry) -> list[Predictions]:
    """One file for each task, length, method and budget; UserError where two are of the same.

    Files without a line are left out. What takes no budget is there once in each folder, and is taken from the first.
    """
    empty = [each for each in found if not each.file.read_bytes().strip()]
    first: dict[tuple[Any, ...], Predictions] = {}
    again = []
    for each in found:
        if each in empty:
            continue
        budget = budget_name(each.budget(registry))
        other = first.setdefault((each.task, each.length, each.method, budget), each)
        if other is not each:
            apart = budget == FULL and other.place != each.place
            same = f"{each.file}: {other.file} has {each.method} at budget {budget} too; remove one of them"
            require(apart, same)
            again.append(each)
    _notice("empty, as runs that failed leave them", empty)
    _notice("of methods without a budget that another folder has already", again)
    return [*first.values()]


def _notice(what: str, left_out: Sequence[Predictions]) -> None:
    if left_out:
        names = [str(Path(*each.file.parts[-3:])) for each in left_out]
        more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
        print(f"notice: files left out, {what}: {', '.join(names[:FEW])}{more}", file=sys.stderr)


def _rows(predictions: Predictions, registry: Registry, longbench_e: bool) -> Iterator[Row]:
    """Scored rows; UserError that names the line of one that cannot be scored."""
    lines = predictions.lines()
    ids = unique_ids([fields for _, fields in lines])
    common = {"method": predictions.method, **predictions.budget(registry)}
    for number, (where, fields) in enumerate(lines):
        if predictions.length is None:
            about = _of_longbench(predictions.task, ids[number], fields, where, longbench_e)
        else:
            require(bool(fields["answers"]), f"{where}: 'answers' is empty; RULER's scores need one or more")
            example = Ruler.example(predictions.task, predictions.length, number, fields["answers"])
            about = {"benchmark": Ruler.name, "group": example.group, "example_id": example.id, **example.info}
        row = {**about, **common, "prediction": fields["pred"], "answers": fields["answers"]}
        try:
            yield from rescored([row], registry)
        except UserError as problem:
            raise UserError(f"{where}: {problem}") from None


def _of_longbench(dataset: str, name: str, fields: dict[str, Any], where: str, by_length: bool) -> Row:
    """What a row of LongBench is about."""
    classes = fields.get("all_classes")
    if dataset_config(dataset).metric == "classification":
        require(bool(classes), f"{where}: 'all_classes' is empty, but {dataset} is scored by class names")
    length = fields.get("length")
    by_length = by_length or dataset in LONGBENCH_E
    require(isinstance(length, int) or not by_length, f"{where}: no 'length', by which rows are grouped")
    known: Row = {key: fields[key] for key in ("_id", "language", "length") if key in fields}
    return {
        "benchmark": "longbench",
        "group": group_of(dataset, length if by_length else None),
        "example_id": f"{dataset}/{name}",
        "dataset": dataset,
        **known,
        "all_classes": classes,
    }


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where}: not JSON: {problem}; mend or remove the line") from None
    require(isinstance(fields, dict), f"{where}: expected a JSON object, found {type(fields).__name__}")
    require(isinstance(fields.get("pred"), str), f"{where}: no 'pred'; a prediction is a text")
    answers = fields.get("answers")
    texts = isinstance(answers, list) and all(isinstance(each, str) for each in answers)
    require(texts, f"{where}: 'answers' is missing or not a list of texts")
    return fields


def _common(places: Sequence[Place]) -> dict[str, Any]:
    """Arguments that all folders were made with."""
    first, *others = [each.meta["args"] for each in places] or [{}]
    return {
        name: value
        for name, value in first.items()
        if name not in (*SET_BY_EACH, "model_path") and all(each.get(name) == value for each in others)
    }
