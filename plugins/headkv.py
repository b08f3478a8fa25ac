"""HeadKV: SnapKV's score, with a budget for each head from a table of how well heads retrieve (arXiv 2410.19258).

The table is measured once for a model, and the budget of the whole model is split by it: see the `head-table` allocator.
Every head is sure of a base, `1 - 1 / beta` of the budget, and what all heads give up is shared in proportion to the
table. So a larger beta makes a smaller pool and more equal heads; the authors' README says the opposite of their code.

The authors publish tables for two models. scripts/score_heads.py measures one for any other by their rule, and
docs/heads has that of the embedded model. Without `head_table` the heads of a layer share its budget by the mass of their
own scores on this prompt, which is not HeadKV but what is possible without a measurement.

References differ: KVCache-Factory splits the whole budget by the table and keeps the window besides, so that it stores
a window more than the budget; here as in the authors' code the window is part of it. Both store a head for each query
head (`kv_cache_granularity=query_head`); for KV heads the budgets of a group are averaged, as KVCache-Factory does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfactory import hookimpl
from kvfactory.hookspecs import RegisterMethod

from .snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class HeadKV(SnapKV):
    """SnapKV under budgets that heads have from a table."""

    aliases: ClassVar[dict[str, str]] = {"head_beta": "beta"}


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("headkv", attention=HeadKV, allocator="head-table")
