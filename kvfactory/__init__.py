"""kvfactory: which KV-cache compression method to trust, at which budget, on which task, at what cost.

Names are imported when they are asked for: most come with torch, which takes longer than all that a command's help needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazily

if TYPE_CHECKING:
    from . import metrics
    from .attention import Family, compress
    from .budget import BudgetAllocator, Share
    from .context import LayerContext, pool, reduce_groups
    from .decoding import BoundedStore, SlidingStore, TrackingStore
    from .engine import Engine, Sequence
    from .errors import UserError, at_least, require
    from .eviction import EvictionMethod
    from .hookspecs import hookimpl
    from .merge import Merge
    from .method import Method, StoringMethod
    from .models import load_model
    from .ragged import HeadwiseStore, RaggedStore
    from .registry import load_method
    from .scoring import AttentionScoredMethod, TrackingMethod, WindowMethod
    from .stores import DenseStore, Reading, Store

__all__ = [
    "AttentionScoredMethod",
    "BoundedStore",
    "BudgetAllocator",
    "DenseStore",
    "Engine",
    "EvictionMethod",
    "Family",
    "HeadwiseStore",
    "LayerContext",
    "Merge",
    "Method",
    "RaggedStore",
    "Reading",
    "Sequence",
    "Share",
    "SlidingStore",
    "Store",
    "StoringMethod",
    "TrackingMethod",
    "TrackingStore",
    "UserError",
    "WindowMethod",
    "at_least",
    "compress",
    "hookimpl",
    "load_method",
    "load_model",
    "metrics",
    "pool",
    "reduce_groups",
    "require",
]

_NAMES = {
    "metrics": ["metrics"],
    "attention": ["Family", "compress"],
    "budget": ["BudgetAllocator", "Share"],
    "context": ["LayerContext", "pool", "reduce_groups"],
    "decoding": ["BoundedStore", "SlidingStore", "TrackingStore"],
    "engine": ["Engine", "Sequence"],
    "errors": ["UserError", "at_least", "require"],
    "hookspecs": ["hookimpl"],
    "merge": ["Merge"],
    "eviction": ["EvictionMethod"],
    "method": ["Method", "StoringMethod"],
    "models": ["load_model"],
    "ragged": ["HeadwiseStore", "RaggedStore"],
    "registry": ["load_method"],
    "scoring": ["AttentionScoredMethod", "TrackingMethod", "WindowMethod"],
    "stores": ["DenseStore", "Reading", "Store"],
}
"""Modules, and what is theirs."""

if not TYPE_CHECKING:
    __getattr__ = lazily(__name__, {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
