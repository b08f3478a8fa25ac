"""PyramidKV: SnapKV's score, with more of the budget for the first layers than for the last (arXiv 2406.02069).

The references agree on the score and differ in the schedule; see the `pyramid` allocator, whose `pyramid_schedule` names
them. The default is KVCache-Factory's, the authors' own code, which can spend more than the budget: results show the
tokens that were really kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfactory import hookimpl
from kvfactory.hookspecs import RegisterMethod

from .snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV under a pyramid of layer budgets."""


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("pyramidkv", attention=PyramidKV, allocator="pyramid")
