"""Folders outside of runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where kvfactory keeps what it converts or makes once: `KVFACTORY_CACHE`, or ~/.cache/kvfactory."""
    return Path(os.environ.get("KVFACTORY_CACHE") or "~/.cache/kvfactory").expanduser()


def can_be_written(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
