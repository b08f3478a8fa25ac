"""Chat templates and the tokens at which an answer ends, decided from the tokenizer and never from how a path is spelt.

ids = chat_ids(tokenizer, "Which is the longest river?", answer_prefix="It is the")
stop = stop_ids(model, tokenizer) | {newline_id(tokenizer)}      # where the answer is one line
"""

from __future__ import annotations

import re

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvfactory.errors import UserError

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

END_TOKENS = ("<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str, answer_prefix: str = "") -> list[int]:
    """Token ids of `text` as a user's turn, the assistant's header and `answer_prefix`, joined with nothing between.

    A tokenizer without a chat template (a base model's) gives the plain text with its special tokens.
    """
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    elif form := _family_form(tokenizer):
        prompt = form.replace("{bos}", tokenizer.bos_token or "").replace("{text}", text)
    else:
        return list(tokenizer.encode(text + answer_prefix))
    return list(tokenizer.encode(prompt + answer_prefix, add_special_tokens=False))  # the template wrote BOS itself


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


def max_prompt_tokens(config: PretrainedConfig) -> int:
    """Prompt tokens that leave room for the template and the answer in the context window.

    LongBench's own figures for every window: 3500 of 4096, 7500 of 8192, 31500 of 32768; half of a window below 1k.
    """
    window = getattr(config, "max_position_embeddings", None)
    if not window:
        raise UserError(
            f"the config of a '{config.model_type}' model names no context window; give the prompt's length"
        )
    return max(window * 1000 // 1024 - 500, window // 2)


def _family_form(tokenizer: PreTrainedTokenizerBase) -> str | None:
    for token, form in FORMS_BY_TOKEN.items():
        if _token_id(tokenizer, token) is not None:
            return form
    return FORMS_BY_TOKEN["[INST]"] if INST_NAMES.search(tokenizer.name_or_path) else None


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a whole token, or None where the vocabulary lacks it; asking there and back sees through unk."""
    index = tokenizer.convert_tokens_to_ids(token)
    return index if index is not None and tokenizer.convert_ids_to_tokens(index) == token else None
