"""Console scripts in this process, found as a shell would find them: by the entry points of the installed package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points


def exit_code(script: str, arguments: Sequence[str]) -> int:
    """What the console script exits with."""
    (entry_point,) = entry_points(group="console_scripts", name=script)
    try:
        entry_point.load()(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError(f"{script} returned without an exit code")


def run_needle(arguments: Sequence[str]) -> int:
    return exit_code("run_needle_in_haystack.py", arguments)


def run_longbench(arguments: Sequence[str]) -> int:
    return exit_code("run_longbench.py", arguments)
