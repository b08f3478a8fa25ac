"""Budgets from files: how much each head (HeadKV's tables) or each layer deserves, measured once for a model.

A head table has a number for each head of each layer, these being query heads or KV heads, in one of three forms:
- `{"layer-head": [score, ...], ...}` in JSON, as HeadKV publishes its own and scripts/score_heads.py writes them: a
  head's score is the mean of its list;
- `[[score of head 0, ...], ...]` in JSON, one list a layer;
- the same as lines of numbers in a .tsv file, as DuoAttention publishes its patterns.

A layer table is a JSON list with one number a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .budget import BudgetAllocator, whole_shares
from .errors import UserError, at_least, require


def read_head_table(path: str, flag: str = "--head_table") -> Tensor:
    """The scores of a head table, [layers, heads], float64, 0 or more; UserError for a file that is none."""
    return _read(path, flag, _head_scores)


def read_layer_table(path: str) -> Tensor:
    """The numbers of a layer table, [layers], float64, 0 or more; UserError for a file that is none."""
    return _read(path, "--layer_table", _layer_numbers)


def _read(path: str, flag: str, understand: Callable[[Any], Tensor]) -> Tensor:
    try:
        return _parsed(path, Path(path).stat().st_mtime_ns, understand)
    except OSError as problem:
        raise UserError(f"{flag} {path}: {problem.strerror}; give the path of a file with a table") from None
    except (TypeError, ValueError, RuntimeError, AttributeError) as problem:
        raise UserError(f"{flag} {path}: not such a table: {problem}") from None


@cache
def _parsed(path: str, changed: int, understand: Callable[[Any], Tensor]) -> Tensor:
    text = Path(path).read_text("utf-8")
    if path.endswith(".tsv"):
        table = understand([[float(number) for number in line.split()] for line in text.splitlines()])
    else:
        table = understand(json.loads(text))
    if not (table.isfinite() & (table >= 0)).all() or not table.sum() > 0:
        raise ValueError("its numbers have to be 0 or more, and not all of them 0")
    return table


def _layer_numbers(found: Any) -> Tensor:
    table = torch.tensor(found, dtype=torch.float64)
    if table.dim() != 1:
        raise ValueError("it has to be a list with one number a layer")
    return table


def _head_scores(found: Any) -> Tensor:
    if isinstance(found, list):
        table = torch.tensor(found, dtype=torch.float64)
        if table.dim() != 2:
            raise ValueError("it has to be a list with one list of numbers a layer")
        return table
    means = {
        tuple(map(int, name.split("-"))): torch.tensor(each, dtype=torch.float64).mean() for name, each in found.items()
    }
    layers, heads = (1 + max(place[axis] for place in means) for axis in (0, 1))
    missing = next((f"{x}-{y}" for x in range(layers) for y in range(heads) if (x, y) not in means), None)
    if missing:
        raise ValueError(f"it has no head {missing}")
    return torch.stack([torch.stack([means[layer, head] for head in range(heads)]) for layer in range(layers)])


def fit_heads(table: Tensor, heads: int, layers: int, flag: str = "--head_table") -> Tensor:
    """A table [layers, heads of the table] for stored heads, [layers, heads]: means of groups, or a KV head's own repeated.

    Raises UserError for a table of another model.
    """
    rows, columns = table.shape
    require(
        rows == layers and (columns % heads == 0 or heads % columns == 0),
        f"{flag} is of a model with {rows} layers of {columns} heads; this one stores {layers} layers of {heads}",
    )
    if columns >= heads:
        return table.unflatten(1, (heads, -1)).mean(2)
    return table.repeat_interleave(heads // columns, 1)


def head_budgets(importance: Tensor, base: int, beta: float, temperature: float = 1.0) -> Tensor:
    """HeadKV's capacities, one for each entry of `importance`, which may have any shape; whole numbers, float64.

    Each head is sure of `base - base // beta`; what all heads give up is shared in proportion to importance. A larger
    beta therefore means a smaller pool and more equal heads.
    """
    weights = (importance / importance.sum()) ** temperature
    pool = base // beta
    return torch.round(weights / weights.sum() * pool * importance.numel() + base - pool)


@dataclass(frozen=True, kw_only=True)
class HeadTable(BudgetAllocator):
    """Every head its own share, from a table of how important heads are (HeadKV, arXiv 2410.19258).

    The table covers all heads of all layers, and so does the budget that it splits, up to roundings; what a head gets
    beyond the prompt's length is lost. Without a table a layer's own heads share its budget by what the scores they gave
    to this prompt add up to. That is no measure of retrieval, and it moves nothing between layers: it is what can be had
    without a table. scripts/score_heads.py measures one.
    """

    head_table: str | None = None
    """File with the importance of each head; without it, what a prompt's own scores add up to, layer by layer."""
    beta: float = 1.01
    """Share of the budget that no head is sure of: 1 / beta. At 1 the table decides all, larger is more uniform."""
    table_temperature: float = 1.0
    """Exponent of the importance: 0 makes all heads equal, above 1 widens their differences."""

    def __post_init__(self) -> None:
        at_least(self, beta=1, table_temperature=0)
        if self.head_table is not None:
            read_head_table(self.head_table)

    @property
    def weighs_scores(self) -> bool:
        return self.head_table is None

    @property
    def notice(self) -> str | None:
        if self.head_table is not None:
            return None
        return (
            "without --head_table the heads of a layer share its budget by their scores on each prompt, and by no measure "
            "of retrieval; scripts/score_heads.py makes a table"
        )

    def counts(self, scores: Tensor, *, budget: int, protected: int, layer_index: int, num_layers: int) -> list[int]:
        heads, competing = scores.shape
        base = budget - protected
        if self.head_table is None:
            importance = scores.double().sum(-1).cpu() + torch.finfo(torch.float32).tiny
            counts = head_budgets(importance, base, self.beta, self.table_temperature)
        else:
            capacities = head_budgets(read_head_table(self.head_table), base, self.beta, self.table_temperature)
            counts = torch.round(fit_heads(capacities, heads, num_layers))[layer_index]
        return [min(int(count), competing) for count in counts.tolist()]


@dataclass(frozen=True, kw_only=True)
class LayerTable(BudgetAllocator):
    """Every layer its own share, in proportion to the numbers of a table; the mean over layers is the budget.

    A layer keeps what its method protects even where its share is less, and no more than the prompt has where it is more.
    """

    layer_table: str | None = None
    """File with a list of numbers, one a layer: budgets, or anything in proportion to them."""

    def __post_init__(self) -> None:
        require(
            self.layer_table is not None, "the allocator layer-table splits a budget by a table; give --layer_table"
        )
        read_layer_table(str(self.layer_table))

    def counts(self, scores: Tensor, *, budget: int, protected: int, layer_index: int, num_layers: int) -> list[int]:
        heads, competing = scores.shape
        table = read_layer_table(str(self.layer_table))
        require(
            len(table) == num_layers,
            f"--layer_table {self.layer_table} has {len(table)} numbers; this model has {num_layers} layers",
        )
        total = budget * num_layers
        shares = whole_shares((table / table.sum() * total).tolist(), total)
        return [max(0, min(shares[layer_index] - protected, competing))] * heads
