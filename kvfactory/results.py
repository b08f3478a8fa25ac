"""The run folder: one row per (example, method, budget), kept so that a run may be killed at any moment and resumed.

    with RunFolder.open(save_dir, settings, environment=environment(plugins)) as folder:
        if (example_id, method, budget) not in folder.done:
            folder.append(row)
        folder.write_csv()

A folder holds `rows.jsonl` (one row a line, out of this process when `append` returns), `run_meta.json` (`Meta`) and
`results.csv` (the summary), and may hold notes in files of their own. Reopening it with other settings is refused. A row
counts once its newline is written: what a kill left of a last line is cut off, and `folder.notice` says so. Tools that
only look use `load_run`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from kvfactory.errors import UserError
from kvfactory.folder_format import FORMAT, Meta, Session
from kvfactory.report.tables import summarise

Row = dict[str, Any]
Key = tuple[str, str, int | str | None]  # example_id, method, budget

ROWS = "rows.jsonl"
META = "run_meta.json"
CSV = "results.csv"
LONGEST_LINE = 2**24  # bytes; a note is shorter


@dataclass(frozen=True)
class Run:
    """A run folder as it was read."""

    path: Path
    rows: list[Row]
    settings: dict[str, Any]
    """Those that make results what they are; empty where the folder does not say."""
    sessions: list[dict[str, Any]]
    """`Session`s, as JSON has them."""


class RunFolder:
    """One run's folder, held by one process at a time; use it in a `with`, which hands it back.

    `done` are the keys of its rows, `notice` a line for the user or None. While rows are appended it holds keys
    alone, so that a long run needs hardly more memory than a short one.
    """

    def __init__(self, path: Path, rows: list[Row], notice: str | None, file: BinaryIO, held: ExitStack) -> None:
        self.path = path
        self._rows: list[Row] | None = rows
        self.done = {key_of(row) for row in rows}
        self.notice = notice
        self._file = file
        self._held = held
        self._notes: dict[str, BinaryIO] = {}

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
            started = datetime.now(UTC).isoformat(timespec="seconds")
            session = Session(started=started, arguments=dict(arguments or {}), environment=dict(environment))
            meta = _joined(folder, Meta(format=FORMAT, settings=dict(settings), sessions=[session]), free)
            rows, sound = _read(folder / ROWS) if (folder / ROWS).exists() else ([], 0)
            _replace(folder / META, json.dumps(meta, indent=2) + "\n")  # before any row: rows without it are refused
            file = held.enter_context((folder / ROWS).open("ab"))
            notices = []
            if torn := file.tell() - sound:
                file.truncate(sound)
                notices.append(f"{folder / ROWS}: dropped a torn last line ({torn} bytes); its row is computed again")
            before, now = (by_plugin(session["environment"]) for session in (meta["sessions"] * 2)[-2:])
            if changed := _differences(before, now):
                notices.append(f"{folder}: resumed in another environment: {changed}")
            return cls(folder, rows, "; ".join(notices) or None, file, held.pop_all())

    @property
    def rows(self) -> list[Row]:
        """The rows as a reader of the file gets them; it is read again if one was appended since the last time."""
        if self._rows is None:
            self._rows, _ = _read(self.path / ROWS)
        return self._rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and write it out at once; ValueError where its key is here already."""
        line = json.dumps(row)  # ASCII: newlines, U+2028 and lone surrogates of a prediction are all escaped
        key = key_of(row)
        if key in self.done:
            raise ValueError(f"{self.path / ROWS}: a second row for {key}")
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._rows = None
        self.done.add(key)

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to the file `name` of the folder: what is good to know of a row and not needed to go on."""
        if name not in self._notes:
            file = self._held.enter_context((self.path / name).open("a+b"))
            _cut_torn_line(file)
            self._notes[name] = file
        self._notes[name].write(json.dumps(record).encode() + b"\n")
        self._notes[name].flush()

    def rewrite(self, rows: Sequence[Row]) -> None:
        """Put rows in place of those that are here; a kill leaves the old ones or these, never some of both."""
        self._file.close()
        _replace(self.path / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self._held.enter_context((self.path / ROWS).open("ab"))
        self._rows = [*rows]
        self.done = {key_of(row) for row in rows}

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


def load_run(folder: str | Path) -> Run:
    """A run folder, which may still be in use; a torn last line is left out. Nothing is written.

    Raises UserError where it is none, its files cannot be read or a newer version made it.
    """
    path = Path(folder)
    if not (path / ROWS).is_file():
        raise UserError(f"{folder}: not a run folder (it has no {ROWS})")
    meta = _meta(path / META) if (path / META).exists() else {"settings": {}, "sessions": []}
    return Run(path, _read(path / ROWS)[0], meta["settings"], meta["sessions"])


def load_rows(folder: str | Path) -> list[Row]:
    """The rows of a run folder, as `load_run` reads them."""
    return load_run(folder).rows


def key_of(row: Mapping[str, Any]) -> Key:
    """What tells a row from every other row of its folder; KeyError where one of the three fields is missing."""
    return row["example_id"], row["method"], row.get("budget_share") or row["budget"]


def _upgraded(row: Row) -> Row:
    """A row of any earlier format as this one has it."""
    if isinstance(row["budget"], str):
        return row | {"budget": None, "budget_share": row["budget"]}
    return row


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


def _joined(folder: Path, begun: Meta, free: Collection[str]) -> dict[str, Any]:
    """What run_meta.json says once a new session has joined the folder; UserError where it may not."""
    meta: dict[str, Any] = json.loads(json.dumps(asdict(begun), default=str))
    path = folder / META
    if not path.exists():
        if (folder / ROWS).exists():
            raise UserError(f"{folder}: {ROWS} has no {META} that says how it was made; use another --save_dir")
        return meta
    old = _meta(path)
    settings_before, sessions = old["settings"], old["sessions"]
    bound = {name: value for name, value in settings_before.items() if name not in free}
    if changed := _differences(bound, meta["settings"], prefix="--"):
        raise UserError(f"{folder}: made with other settings: {changed}; set them back or use another --save_dir")
    return meta | {"settings": settings_before, "sessions": [*sessions, *meta["sessions"]]}


def _meta(path: Path) -> dict[str, Any]:
    """What a run_meta.json says; UserError where it is none or a newer version's."""
    try:
        meta: dict[str, Any] = json.loads(path.read_bytes())
        version, _, _ = meta.get("format", 1), meta["settings"], meta["sessions"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: not the {META} of a run; use another folder") from None
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(
            f"{path}: format {version}, and this kvfactory reads up to {FORMAT}; use the version that made it"
        )
    return meta


def by_plugin(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment with a name of its own for each plugin, so that those alone are told that changed."""
    plugins = environment.get("plugins") or []
    return {
        **{name: value for name, value in environment.items() if name != "plugins"},
        **{f"plugin {each['name']}": each.get("error") or each["version"] for each in plugins},
    }


def changed_values(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each name whose value changed, with both values as JSON; None and False are the same as not set."""

    def shown(values: dict[str, Any], name: str) -> str:
        value = values.get(name)
        return "not set" if value is None or value is False else json.dumps(value, sort_keys=True)

    pairs = [(name, shown(before, name), shown(now, name)) for name in before | now]
    return [each for each in pairs if each[1] != each[2]]


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The same on one line; empty where nothing changed."""
    return "; ".join(f"{prefix}{name} was {old}, is {new}" for name, old, new in changed_values(before, now))


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
            row = _upgraded(row)
            key = key_of(row)
        except (TypeError, KeyError, AttributeError):
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


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut off a last line that a kill left half written."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - LONGEST_LINE)
    file.seek(start)
    file.truncate(start + file.read().rfind(b"\n") + 1)
