"""Chat wrapping and stop tokens, on byte-level tokenizers that carry the special tokens of each family."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from kvfactory.chat import (
    chat_ids,
    check_window,
    context_window,
    has_chat_template,
    max_prompt_tokens,
    newline_id,
    next_turn_ids,
    split_chat_ids,
    stop_ids,
)
from kvfactory.errors import UserError

LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3_TEMPLATE = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role']"
    " + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
INST_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN2_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

REFUSE = "{{ raise_exception('roles must alternate') }}"
STRICT_TEMPLATE = (  # as Mistral's: the user and the assistant in turn, nobody else
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    + REFUSE
    + "{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}" + REFUSE + "{% endif %}{% endfor %}"
)
LLAMA2_TEMPLATE = (  # as Llama 2's: the system has a place in the first turn of the user
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    + REFUSE
    + "{% endif %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}{% endfor %}"
)
DEAF_TEMPLATE = (  # as Phi 3's: says nothing of what the system said
    "{{ bos_token }}{% for m in messages if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)


def build(special, bos=None, eos=None, unk=None, template=None, name=""):
    """A tokenizer of single bytes, so that decoding shows exactly what was encoded; it adds BOS if it has one."""
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        chat_template=template,
        name_or_path=name,
        clean_up_tokenization_spaces=False,
    )


def llama3(template=None, name=""):
    return build(LLAMA3_TOKENS, bos="<|begin_of_text|>", eos="<|end_of_text|>", template=template, name=name)


def inst(template=None, name="", extra=()):
    return build(["<unk>", "<s>", "</s>", *extra], bos="<s>", eos="</s>", unk="<unk>", template=template, name=name)


def qwen2(template=None):
    return build(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", template=template)


LLAMA3_TURN = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
QWEN2_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN2_TURN = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"

WRAPPED = {
    "llama-3": (llama3(LLAMA3_TEMPLATE), LLAMA3_TURN),
    "llama-3 without a template": (llama3(), LLAMA3_TURN),
    "llama-3 by any path": (llama3(name="/models/my finetune"), LLAMA3_TURN),
    "mistral": (inst(INST_TEMPLATE), "<s>[INST] Who? [/INST]"),
    "llama-2 by name": (inst(name="meta-llama/Llama-2-7b-chat-hf"), "<s>[INST] Who? [/INST]"),
    "llama2 by name": (inst(name="/models/llama2-7b-chat-4k"), "<s>[INST] Who? [/INST]"),
    "mistral by name": (inst(name="mistralai/Mistral-7B-Instruct-v0.2"), "<s>[INST] Who? [/INST]"),
    "mistral by token": (inst(extra=["[INST]", "[/INST]"]), "<s>[INST] Who? [/INST]"),
    "qwen2": (qwen2(QWEN2_TEMPLATE), QWEN2_SYSTEM + QWEN2_TURN),
    "qwen2 without a template": (qwen2(), QWEN2_TURN),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_turn_is_wrapped_as_published_and_the_prefix_follows_the_header(case):
    tokenizer, expected = WRAPPED[case]
    assert has_chat_template(tokenizer)
    assert tokenizer.decode(chat_ids(tokenizer, "Who?")) == expected
    assert tokenizer.decode(chat_ids(tokenizer, "Who?", answer_prefix="It is")) == expected + "It is"


EARLIER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "It rained."}]
ALL_IN_ONE = "Be brief.\n\nIt rained.\n\nWho?"
CONVERSATIONS = {
    "llama-3": (
        llama3(LLAMA3_TEMPLATE),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIt rained.<|eot_id|>"
        + LLAMA3_TURN.removeprefix("<|begin_of_text|>"),
    ),
    "qwen2": (
        qwen2(QWEN2_TEMPLATE),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIt rained.<|im_end|>\n" + QWEN2_TURN,
    ),
    "a system's turn is refused": (inst(STRICT_TEMPLATE), f"<s>[INST] {ALL_IN_ONE} [/INST]"),
    "two users in a row are refused": (
        inst(LLAMA2_TEMPLATE),
        "<s>[INST] <<SYS>>Be brief.<</SYS>>It rained.\n\nWho? [/INST]",
    ),
    "a system's turn is dropped": (inst(DEAF_TEMPLATE), f"<s>[INST] {ALL_IN_ONE} [/INST]"),
    "llama-3 without a template": (llama3(), LLAMA3_TURN.replace("Who?", ALL_IN_ONE)),
    "a base model": (inst(), f"<s>{ALL_IN_ONE}"),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_earlier_turns_stand_apart_where_the_template_has_a_place_for_them(case):
    tokenizer, expected = CONVERSATIONS[case]
    assert tokenizer.decode(chat_ids(tokenizer, "Who?", earlier=EARLIER)) == expected
    assert tokenizer.decode(chat_ids(tokenizer, "Who?", "Ann", EARLIER)) == expected + "Ann"


@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=20), min_size=3, max_size=3), case=st.sampled_from(sorted(CONVERSATIONS)))
def test_no_text_of_a_conversation_is_lost(texts, case):
    tokenizer, _ = CONVERSATIONS[case]
    earlier = [{**turn, "content": text} for turn, text in zip(EARLIER, texts[:2], strict=True)]
    written = tokenizer.decode(chat_ids(tokenizer, texts[2], earlier=earlier))
    place = 0
    for text in texts:
        place = written.index(text.strip(), place) + len(text.strip())


def test_a_template_that_refuses_everything_is_told():
    with pytest.raises(UserError, match=r"refuses a user's turn \(roles must alternate\); use --chat_template none"):
        chat_ids(inst(REFUSE), "Who?")


def test_markers_become_their_own_tokens():
    tokenizer = llama3(LLAMA3_TEMPLATE)
    ids = chat_ids(tokenizer, "Who?")
    assert [index for index in ids if index < len(LLAMA3_TOKENS)] == [0, 2, 3, 4, 2, 3]


@settings(deadline=None)
@given(text=st.text(max_size=30), prefix=st.text(max_size=8), case=st.sampled_from(sorted(WRAPPED)))
def test_bos_is_there_once_and_the_text_is_whole(text, prefix, case):
    tokenizer, expected = WRAPPED[case]
    ids = chat_ids(tokenizer, text, prefix)
    content = text.strip() if tokenizer.chat_template == LLAMA3_TEMPLATE else text
    assert tokenizer.decode(ids) == expected.replace("Who?", content) + prefix
    assert ids.count(tokenizer.bos_token_id) == (1 if tokenizer.bos_token else 0)


def test_braces_in_a_text_are_only_text():
    assert "{bos} {text} {{ x }}" in llama3().decode(chat_ids(llama3(), "{bos} {text} {{ x }}"))


@pytest.mark.parametrize("name", ["", "mistralai/Mistral-7B-v0.1", "TinyLlama-1.1B", "meta-llama/Llama-3.2-1B"])
def test_a_base_model_gets_the_plain_text_with_its_special_tokens(name):
    tokenizer = inst(name=name)
    assert not has_chat_template(tokenizer)
    assert tokenizer.decode(chat_ids(tokenizer, "Once", " upon")) == "<s>Once upon"


@pytest.mark.parametrize(
    ("configured", "expected"), [(4, {1, 4}), ([0, 4], {0, 1, 4}), (None, {1, 4})], ids=["one", "several", "none"]
)
def test_stop_ids_join_config_eos_and_ends_of_turn(configured, expected):
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=configured))
    assert stop_ids(model, llama3()) == expected  # 1 is the eos <|end_of_text|>, 4 is <|eot_id|>


def test_stop_ids_leave_out_what_the_vocabulary_lacks():
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=2))
    assert stop_ids(model, inst()) == {2}  # <|eot_id|> and the like map to <unk>, id 0
    assert stop_ids(SimpleNamespace(generation_config=None), qwen2()) == {0, 2}


def test_an_unk_token_that_ends_texts_is_still_a_stop():
    tokenizer = build(["<|endoftext|>", "<|im_end|>"], eos="<|im_end|>", unk="<|endoftext|>")
    assert stop_ids(SimpleNamespace(generation_config=None), tokenizer) == {0, 1}


def test_newline_is_the_last_token_of_a_line_and_never_bos():
    tokenizer = llama3()
    assert tokenizer.convert_ids_to_tokens(newline_id(tokenizer)) == "Ċ"


@pytest.mark.parametrize(
    ("window", "prompt"),
    [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500), (131072, 127500), (2048, 1500), (512, 256)],
)
def test_prompts_are_as_long_as_longbench_has_them(window, prompt):
    assert max_prompt_tokens(LlamaConfig(max_position_embeddings=window)) == prompt
    assert max_prompt_tokens(Qwen2Config(max_position_embeddings=window)) == prompt
    assert max_prompt_tokens(GPT2Config(n_positions=window)) == prompt


def test_a_config_without_a_window_is_refused():
    with pytest.raises(UserError, match="'odd' model names no context window"):
        max_prompt_tokens(SimpleNamespace(model_type="odd"))


@pytest.mark.parametrize(
    ("scaling", "window"),
    [
        (None, 4096),
        ({"type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "llama3", "factor": 8.0}, 4096),
    ],
)
def test_a_window_is_what_stretched_angles_make_of_it(scaling: dict[str, Any] | None, window: int) -> None:
    config: Any = SimpleNamespace(max_position_embeddings=4096, rope_scaling=scaling)
    assert context_window(config) == window
    check_window(config, window, "--lengths")
    with pytest.raises(UserError, match=f"--lengths: {window + 1} tokens, and the model's window is {window}"):
        check_window(config, window + 1, "--lengths")


def test_a_config_without_a_window_is_not_checked() -> None:
    config: Any = SimpleNamespace()
    assert context_window(config) is None
    check_window(config, 10**9, "--lengths")


@pytest.mark.parametrize("name", WRAPPED)
def test_a_prompt_in_two_parts_is_the_same_text(name: str) -> None:
    tokenizer, _ = WRAPPED[name]
    context, question = split_chat_ids(tokenizer, "It rained all day.\n\n", "Who was there?", " It was")
    assert context + question == chat_ids(tokenizer, "It rained all day.\n\nWho was there?", " It was")
    assert tokenizer.decode(context).endswith("It rained all day.\n\n")


@pytest.mark.parametrize("name", WRAPPED)
def test_without_a_template_the_parts_are_plain_text(name: str) -> None:
    tokenizer, _ = WRAPPED[name]
    context, question = split_chat_ids(tokenizer, "Rain.\n", "Who?", " I", template=False)
    assert context == tokenizer.encode("Rain.\n") and tokenizer.decode(question) == "Who? I"
    assert tokenizer.decode(next_turn_ids(tokenizer, "Who?", " I", template=False)) == "\n\nWho? I"


NEXT_TURNS = {
    "llama-3": LLAMA3_TURN.replace("<|begin_of_text|>", "<|eot_id|>"),
    "llama-3 without a template": LLAMA3_TURN.replace("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": "</s>[INST] Who? [/INST]",
    "mistral by token": " </s>[INST] Who? [/INST]",
    "qwen2": f"<|im_end|>\n{QWEN2_TURN}",
}


@pytest.mark.parametrize("name", NEXT_TURNS)
def test_the_next_turn_ends_the_answer_before_it(name: str) -> None:
    tokenizer, _ = WRAPPED[name]
    assert tokenizer.decode(next_turn_ids(tokenizer, "Who?", " I")) == f"{NEXT_TURNS[name]} I"
