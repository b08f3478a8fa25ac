"""kvfactory: which KV-cache compression method to trust, at which budget, on which task, at what cost."""

from __future__ import annotations

from . import metrics
from .attention import Family, compress
from .budget import BudgetAllocator
from .context import LayerContext, pool, reduce_groups
from .engine import Engine, Sequence
from .errors import UserError, require
from .hookspecs import hookimpl
from .method import AttentionScoredMethod, EvictionMethod, Method
from .models import load_model
from .registry import load_method
from .stores import DenseStore, RaggedStore, Reading, Store

__all__ = [
    "AttentionScoredMethod",
    "BudgetAllocator",
    "DenseStore",
    "Engine",
    "EvictionMethod",
    "Family",
    "LayerContext",
    "Method",
    "RaggedStore",
    "Reading",
    "Sequence",
    "Store",
    "UserError",
    "compress",
    "hookimpl",
    "load_method",
    "load_model",
    "metrics",
    "pool",
    "reduce_groups",
    "require",
]
