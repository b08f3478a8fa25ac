"""The run folder: one row per (example, method, budget), kept so that a run may be killed at any moment and resumed.

    with RunFolder.open(save_dir, settings, environment=environment(plugins)) as folder:
        if (example_id, method, budget) not in folder.done:
            folder.append(row)
        folder.write_csv()

A folder holds `rows.jsonl` (one row a line, out of this process when `append` returns), `run_meta.json` (the settings
that change results, and an entry for each session that worked here) and `results.csv` (the summary). Reopening it with
other settings is refused. A row counts once its newline is written: what a kill left of a last line is cut off, and
`folder.notice` says so. Tools that only look use `load_rows`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout

from kvfactory.errors import UserError
from kvfactory.report.tables import summarise

Row = dict[str, Any]
Key = tuple[str, str, int | str | None]  # example_id, method, budget

ROWS = "rows.jsonl"
META = "run_meta.json"
CSV = "results.csv"


class RunFolder:
    """One run's folder, held by one process at a time; use it in a `with`, which hands it back.

    `rows` are the rows as a reader of the file gets them, `done` their keys, `notice` a line for the user or None.
    """

    def __init__(self, path: Path, rows: list[Row], notice: str | None, file: BinaryIO, held: ExitStack) -> None:
        self.path = path
        self.rows = rows
        self.done = {key_of(row) for row in rows}
        self.notice = notice
        self._file = file
        self._held = held

    @classmethod
    def open(
        cls,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        environment: Mapping[str, Any],
        arguments: Mapping[str, Any] | None = None,
        free: Collection[str] = (),
    ) -> RunFolder:
        """Start a run in `path`, or resume the one that is there if its `settings` are the same.

        `settings` are those that change results, None for one that is not set; `arguments` (every flag) and `environment`
        are recorded per session. Names that are `free` may differ, should the folder have them from an earlier version.
        Raises UserError where the settings differ, another process holds the folder, or its files cannot be trusted.
        """
        folder = Path(path)
        with ExitStack() as held:
            held.enter_context(_claim(folder))
            meta = _joined(folder, settings, {"arguments": arguments or {}, "environment": environment}, free)
            rows, sound = _read(folder / ROWS) if (folder / ROWS).exists() else ([], 0)
            _replace(folder / META, json.dumps(meta, indent=2) + "\n")  # before any row: rows without it are refused
            file = held.enter_context((folder / ROWS).open("ab"))
            notices = []
            if torn := file.tell() - sound:
                file.truncate(sound)
                notices.append(f"{folder / ROWS}: dropped a torn last line ({torn} bytes); its row is computed again")
            before, now = (_by_plugin(session["environment"]) for session in (meta["sessions"] * 2)[-2:])
            if changed := _differences(before, now):
                notices.append(f"{folder}: resumed in another environment: {changed}")
            return cls(folder, rows, "; ".join(notices) or None, file, held.pop_all())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and write it out at once; ValueError where its key is here already."""
        line = json.dumps(row)  # ASCII: newlines, U+2028 and lone surrogates of a prediction are all escaped
        kept = json.loads(line)
        if key_of(kept) in self.done:
            raise ValueError(f"{self.path / ROWS}: a second row for {key_of(kept)}")
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.rows.append(kept)
        self.done.add(key_of(kept))

    def write_csv(self, rows: Sequence[Row] | None = None) -> Path:
        """Write `results.csv`, one line per benchmark, group, method and budget; return its path.

        `rows` are all rows in another order than that in which they were written: the order of the lines follows it.
        """
        frame = summarise(self.rows if rows is None else rows)
        _replace(self.path / CSV, frame.to_csv(index=False, lineterminator="\n"))
        return self.path / CSV

    def close(self) -> None:
        """Hand the folder back; another process may open it then."""
        self._held.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_rows(folder: str | Path) -> list[Row]:
    """The rows of a run folder, which may still be in use; a torn last line is left out. Nothing is written."""
    path = Path(folder) / ROWS
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder (it has no {ROWS})")
    return _read(path)[0]


def key_of(row: Mapping[str, Any]) -> Key:
    """What tells a row from every other row of its folder; KeyError where one of the three fields is missing."""
    return row["example_id"], row["method"], row["budget"]


def environment(plugins: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a run happens: commit of the working directory, versions, the `plugins` given, and the machine."""
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("kvfactory", "torch", "transformers")},
        "plugins": plugins,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cpu_count": os.cpu_count(),
    }


def _claim(folder: Path) -> FileLock:
    """The folder's lock, taken; the system drops it when the process ends, however it ends."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is writing here; let it finish or use another --save_dir") from None
    except OSError as problem:
        raise UserError(f"{folder}: cannot be used as --save_dir: {problem.strerror}") from None
    return lock


def _joined(
    folder: Path, settings: Mapping[str, Any], session: dict[str, Any], free: Collection[str]
) -> dict[str, Any]:
    """What run_meta.json says once this session has joined the folder; UserError where it may not."""
    session = {"started": datetime.now(UTC).isoformat(timespec="seconds"), **session}
    meta: dict[str, Any] = json.loads(json.dumps({"settings": settings, "sessions": [session]}, default=str))
    path = folder / META
    if not path.exists():
        if (folder / ROWS).exists():
            raise UserError(f"{folder}: {ROWS} has no {META} that says how it was made; use another --save_dir")
        return meta
    try:
        old = json.loads(path.read_bytes())
        settings_before, sessions = old["settings"], old["sessions"]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path}: not the {META} of a run; use another --save_dir") from None
    bound = {name: value for name, value in settings_before.items() if name not in free}
    if changed := _differences(bound, meta["settings"], prefix="--"):
        raise UserError(f"{folder}: made with other settings: {changed}; set them back or use another --save_dir")
    return {"settings": settings_before, "sessions": [*sessions, *meta["sessions"]]}


def _by_plugin(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment with a name of its own for each plugin, so that those alone are told that changed."""
    plugins = environment.get("plugins") or []
    return {
        **{name: value for name, value in environment.items() if name != "plugins"},
        **{f"plugin {each['name']}": each.get("error") or each["version"] for each in plugins},
    }


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """Each name whose value changed, on one line; empty where nothing did. None and False are the same as not set."""

    def shown(values: dict[str, Any], name: str) -> str:
        value = values.get(name)
        return "not set" if value is None or value is False else json.dumps(value, sort_keys=True)

    pairs = [(name, shown(before, name), shown(now, name)) for name in before | now]
    return "; ".join(f"{prefix}{name} was {old}, is {new}" for name, old, new in pairs if old != new)


def _read(path: Path) -> tuple[list[Row], int]:
    """The rows of a file, and how many bytes of it are sound; anything after those is a torn last line."""
    rows: dict[Key, Row] = {}
    sound = 0
    *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) and not rest:
                break
            raise UserError(f"{path}:{number}: not JSON; mend or remove the line") from None
        try:
            key = key_of(row)
        except (TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a row; it needs example_id, method and budget") from None
        if key in rows:
            raise UserError(f"{path}:{number}: a second row for {key}; remove one of them")
        rows[key] = row
        sound += len(line) + 1
    return list(rows.values()), sound


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, finds the old text or the new one, never half of it."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
