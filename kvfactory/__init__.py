"""kvfactory: which KV-cache compression method to trust, at which budget, on which task, at what cost."""

from __future__ import annotations

from . import metrics
from .attention import Family, compress
from .budget import BudgetAllocator, Share
from .context import LayerContext, pool, reduce_groups
from .decoding import BoundedStore, SlidingStore, TrackingStore
from .engine import Engine, Sequence
from .errors import UserError, at_least, require
from .hookspecs import hookimpl
from .merge import Merge
from .method import EvictionMethod, Method, StoringMethod
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
