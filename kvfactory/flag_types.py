"""What flags take: lists, budgets, counts, and files to write."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .budget import Share


class CommaList(click.ParamType):
    """`a,b,c`, each read as another type."""

    name = "list"

    def __init__(self, item: click.ParamType) -> None:
        self.item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not parts:
            self.fail("the list is empty", param, ctx)
        return [self.item.convert(part, param, ctx) for part in parts]


class BudgetType(click.ParamType):
    """Entries, or a share of the prompt: `128`, `10%`."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Share:
        from .budget import Share
        from .settings import convert

        budget: int | Share = convert("max_capacity_prompts", value, int | Share)
        if isinstance(budget, int) and budget < 1:
            self.fail(
                f"'{value}' is no budget; it is 1 entry or more, or a share of the prompt such as 10%", param, ctx
            )
        return budget


class PositiveInt(click.IntRange):
    """A whole number, 1 or more."""

    name = "count"

    def __init__(self) -> None:
        super().__init__(min=1)


class OutputFile(click.ParamType):
    """A file to write when the work is done; that it can be is found out, and its folder made, before the work begins."""

    name = "file"

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.suffix != self.suffix or path.is_dir():
            self.fail(f"'{value}': give a file that ends in {self.suffix}", param, ctx)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            self.fail(
                f"'{value}' cannot be written ({error.strerror}); give a file in a folder that can be", param, ctx
            )
        return path
