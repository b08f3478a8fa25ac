"""The prompt that a picture is about: flags that say which, and its token ids.

    text = read_prompt(flags, default="The text to take where no flag names another.")
    engine = load_engine(flags)
    ids = prompt_ids(engine, text, flags)

`flags` are the values of `prompt_options`, by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from kvfactory.chat import chat_ids, check_window
from kvfactory.cli import sweep_options
from kvfactory.engine import Engine
from kvfactory.errors import UserError, require
from kvfactory.inference import for_inference
from kvfactory.models import load_model, prepare_process
from kvfactory.runner import CHAT_TEMPLATE, chat_template

SHARED = ("model_path", "dtype", "device", "plugin")
"""Flags that are those of every run."""


def prompt_options(output: str) -> list[click.Option]:
    """Flags of a command that draws one prompt under one model; `output` is its folder by default."""
    return [
        click.Option(["--prompt"], metavar="TEXT", help="The prompt.  [default: a passage and a question]"),
        click.Option(["--prompt_file"], type=click.Path(path_type=Path), help="A text file that holds the prompt."),
        CHAT_TEMPLATE,
        *(option for option in sweep_options() if option.name in SHARED),
        click.Option(["--output"], type=click.Path(path_type=Path), default=output, show_default=True),
    ]


def read_prompt(flags: Mapping[str, Any], default: str) -> str:
    """The prompt that the flags give, or the default; UserError for two of them, an empty one or a file that is no text."""
    prompt, path = flags["prompt"], flags["prompt_file"]
    require(prompt is None or path is None, "--prompt and --prompt_file both give a prompt; leave one out")
    try:
        text = path.read_text("utf-8") if path else default if prompt is None else prompt
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--prompt_file {path}: no text file in UTF-8 that can be read") from None
    require(bool(text.strip()), f"{_flag(flags)}: the prompt is empty")
    return text


def load_engine(flags: Mapping[str, Any]) -> Engine:
    """The model that the flags name."""
    prepare_process()
    model, tokenizer = load_model(flags["model_path"], dtype=flags["dtype"], device=flags["device"])
    return Engine(for_inference(model), tokenizer)


def prompt_ids(engine: Engine, text: str, flags: Mapping[str, Any]) -> list[int]:
    """Token ids of the text, inside the chat template unless the flags say otherwise.

    Raises UserError where the model's window is too small for them.
    """
    assert engine.tokenizer is not None
    ids = chat_ids(engine.tokenizer, text, template=chat_template(engine.tokenizer, dict(flags))[0])
    check_window(engine.model.config, len(ids), _flag(flags))
    return ids


def _flag(flags: Mapping[str, Any]) -> str:
    """Where the prompt is from."""
    return f"--prompt_file {flags['prompt_file']}" if flags["prompt_file"] else "--prompt"


def passage(path: Path, paragraphs: int, question: int) -> str:
    """The first paragraphs of the first passage of a file such as scripts/passages.json, and one of its questions."""
    first = json.loads(path.read_text("utf-8"))[0]
    return "\n\n".join([*first["text"].split("\n\n")[:paragraphs], first["questions"][question]["question"]])
