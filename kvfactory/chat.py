"""Chat templates and the tokens at which an answer ends, decided from the tokenizer and never from how a path is spelt.

ids = chat_ids(tokenizer, "Which is the longest river?", answer_prefix="It is the")
stop = stop_ids(model, tokenizer) | {newline_id(tokenizer)}      # where the answer is one line
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvfactory.errors import UserError, require

# For tokenizers that carry no template: the published form of the family, by a token of its vocabulary ...
FORMS_BY_TOKEN = {
    "<|start_header_id|>": (
        "{bos}<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "<|im_start|>": "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    "[INST]": "{bos}[INST] {text} [/INST]",
}
# ... or by name, where the family has no token of its own.
INST_NAMES = re.compile(r"llama[-_ ]?2(?![.\d])|(mistral|mixtral).*instruct", re.IGNORECASE)

FORM_ENDS = {"<|start_header_id|>": "<|eot_id|>", "<|im_start|>": "<|im_end|>\n", "[INST]": " {eos}"}
"""What ends an answer in those forms, before the next turn."""
MARK = "\ue000 what follows is read later \ue001"
"""Stands in a template where it is to be cut in two: no text has it."""

END_TOKENS = ("<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")


Message = dict[str, str]
"""A turn as transformers has it: its `role` (system, user or assistant) and its `content`."""


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answer_prefix: str = "",
    earlier: Sequence[Message] = (),
    template: bool = True,
) -> list[int]:
    """Token ids of `text` as a user's turn, the assistant's header and `answer_prefix`, joined with nothing between.

    `earlier` turns come before it, joined to it where the template has no place for them: many refuse a system's turn or
    two of the user's in a row. Without `template`, and by a tokenizer that has none (a base model's), the text is plain,
    with its special tokens. Raises UserError where the template refuses a lone user's turn.
    """
    turns = [*earlier, {"role": "user", "content": text}]
    if template and tokenizer.chat_template:
        prompt = _by_template(tokenizer, turns)
    elif template and (form := _family_form(tokenizer)):
        prompt = form.replace("{bos}", tokenizer.bos_token or "").replace("{text}", joined(turns))
    else:
        return list(tokenizer.encode(joined(turns) + answer_prefix, verbose=False))
    return _plain_ids(tokenizer, prompt + answer_prefix)  # the template wrote BOS itself


def joined(turns: Sequence[Message]) -> str:
    """The texts of all turns as one, with an empty line between them."""
    return "\n\n".join(turn["content"] for turn in turns)


def split_chat_ids(
    tokenizer: PreTrainedTokenizerBase, context: str, question: str, answer_prefix: str = "", template: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of `chat_ids(context + question)` in two parts, for a context that is read before the question is known.

    A token that would span both is two here. Without `template` the text is plain.
    """
    form = _family_form(tokenizer)
    if not template or not (tokenizer.chat_template or form):
        after = tokenizer.encode(question + answer_prefix, add_special_tokens=False, verbose=False)
        return list(tokenizer.encode(context, verbose=False)), list(after)
    turn: Message = {"role": "user", "content": f"{context}{MARK}{question}"}
    if tokenizer.chat_template:
        prompt = _by_template(tokenizer, [turn])
    else:
        prompt = str(form).replace("{bos}", tokenizer.bos_token or "").replace("{text}", turn["content"])
    before, _, after = prompt.partition(MARK)  # the template wrote BOS itself
    return _plain_ids(tokenizer, before), _plain_ids(tokenizer, after + answer_prefix)


def next_turn_ids(
    tokenizer: PreTrainedTokenizerBase, question: str, answer_prefix: str = "", template: bool = True
) -> list[int]:
    """Token ids from the end of an answer, whose stop token is left out, to the beginning of the answer to `question`."""
    form = _family_form(tokenizer)
    if not template or not (tokenizer.chat_template or form):
        return _plain_ids(tokenizer, f"\n\n{question}{answer_prefix}")
    if tokenizer.chat_template:
        turns = [("user", "?"), ("assistant", MARK), ("user", question)]
        prompt = _by_template(tokenizer, [{"role": role, "content": text} for role, text in turns])
        after = prompt.partition(MARK)[2]
    else:
        end = next(end for token, end in FORM_ENDS.items() if form == FORMS_BY_TOKEN[token])
        after = (
            f"{end}{form}".replace("{bos}", "").replace("{eos}", tokenizer.eos_token or "").replace("{text}", question)
        )
    return _plain_ids(tokenizer, after + answer_prefix)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `chat_ids` wraps the text: by the tokenizer's own template, or by the published form of its family."""
    return bool(tokenizer.chat_template) or _family_form(tokenizer) is not None


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the model's generation config's, the tokenizer's eos, and known ends of a turn."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    ids = [*ids, tokenizer.eos_token_id, *(_token_id(tokenizer, token) for token in END_TOKENS)]
    return frozenset(int(index) for index in ids if index is not None)


def newline_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a line: the last one of an encoded newline."""
    return int(tokenizer.encode("\n", add_special_tokens=False)[-1])


def context_window(config: PretrainedConfig) -> int | None:
    """Tokens that the model was made to read, stretched rotary angles included; None where its config does not say."""
    window = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_scaling", None) or {}
    if not window or scaling.get("type", scaling.get("rope_type")) not in ("linear", "dynamic", "yarn"):
        return window or None
    return max(window, int(scaling["factor"] * scaling.get("original_max_position_embeddings", window)))


def check_window(config: PretrainedConfig, tokens: int, where: str) -> None:
    """UserError where the model cannot read so many tokens; `where` names the flag, or the file and line, they are from."""
    window = context_window(config)
    require(window is None or tokens <= window, f"{where}: {tokens} tokens, and the model's window is {window}")


def max_prompt_tokens(config: PretrainedConfig) -> int:
    """Prompt tokens that leave room for the template and the answer in the context window.

    LongBench's own figures for every window: 3500 of 4096, 7500 of 8192, 31500 of 32768; half of a window below 1k.
    """
    window = context_window(config)
    if not window:
        raise UserError(
            f"the config of a '{config.model_type}' model names no context window; give the prompt's length"
        )
    return max(window * 1000 // 1024 - 500, window // 2)


def _by_template(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> str:
    """The turns in the tokenizer's template: apart, else a role's neighbours as one turn, else all as one user's turn."""

    def written(messages: list[Message]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    neighbours = [
        {"role": role, "content": joined([*same])} for role, same in groupby(turns, lambda turn: turn["role"])
    ]
    for messages in ([*turns], neighbours) if len(turns) > 1 else ():
        try:
            prompt = written(messages)
        except TemplateError:
            continue
        if _in_order(prompt, turns):  # some templates leave a role out and say nothing
            return prompt
    try:
        return written([{"role": "user", "content": joined(turns)}])
    except TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template refuses a user's turn ({error}); use --chat_template none"
        ) from error


def _in_order(prompt: str, turns: Sequence[Message]) -> bool:
    place = 0
    for text in (turn["content"].strip() for turn in turns):
        found = prompt.find(text, place)
        if found < 0:
            return False
        place = found + len(text)
    return True


def _family_form(tokenizer: PreTrainedTokenizerBase) -> str | None:
    for token, form in FORMS_BY_TOKEN.items():
        if _token_id(tokenizer, token) is not None:
            return form
    return FORMS_BY_TOKEN["[INST]"] if INST_NAMES.search(tokenizer.name_or_path) else None


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a whole token, or None where the vocabulary lacks it; asking there and back sees through unk."""
    index = tokenizer.convert_tokens_to_ids(token)
    return index if index is not None and tokenizer.convert_ids_to_tokens(index) == token else None
