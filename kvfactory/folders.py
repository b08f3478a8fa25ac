"""Folders outside of runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where kvfactory keeps what it converts or makes once: `KVFACTORY_CACHE`, or ~/.cache/kvfactory."""
    return Path(os.environ.get("KVFACTORY_CACHE") or "~/.cache/kvfactory").expanduser()
