"""AdaKV: SnapKV's score, with a layer's budget shared by its heads as their scores deserve (arXiv 2407.11550).

Heads store as many entries as they won, in one ragged store, so that memory follows the sum of the budgets. The authors
average over the window where SnapKV sums; shares and ranks are the same either way. How kvpress guards weak heads differs;
see `floor_rule` of the `head-adaptive` allocator, whose default is the authors' rule.

One deviation: a prompt no longer than the budget is kept whole in every variant.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfactory import hookimpl
from kvfactory.hookspecs import RegisterMethod

from .snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV under budgets that adapt to the heads of a layer."""


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("adakv", attention=AdaKV, allocator="head-adaptive")
