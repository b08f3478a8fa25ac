"""GGUF conversion: against the model a file was made from, against transformers' tokenizers, and the cache it keeps."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from kvfactory import gguf as conversion
from kvfactory import models
from kvfactory.errors import UserError
from kvfactory.models import load_model, load_tokenizer, resolve

KIND = gguf.TokenType
SPECIAL = {"<|endoftext|>": KIND.CONTROL, "<|im_end|>": KIND.CONTROL, "<tool>": KIND.USER_DEFINED}
MERGES = ["h e", "l l", "he ll", "Ġ hell", "1 2", "' s", "Ċ Ċ", "Ġ Ġ", "Ã ©"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
ROWS = len(TOKENS) + 4  # some rows of the embedding matrix have no token
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"

NAMES = {  # of llama.cpp's own table, for the tiny files written here
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def interleave(weight, heads):
    """A llama file's order of rows: row i of a head's first half, then row i of its second half."""
    rows = []
    for head in np.split(weight, heads):
        first, second = np.split(head, 2)
        rows += [row for pair in zip(first, second, strict=True) for row in pair]
    return np.stack(rows)


def tiny(family, tied=False, bias=False):
    torch.manual_seed(0)
    shape = {
        "vocab_size": ROWS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 20000.0,
        "tie_word_embeddings": tied,
    }
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, attention_bias=bias))
    for parameter in model.parameters():  # norms of one and biases of zero would hide a mistake
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.eval()


def write_gguf(path, model, family, kind="F32", metadata=None, drop=(), extra_tensor=None, **tokenizer):
    """`model` as a GGUF file; matrices are quantised as `kind`, and the model's own become what the file then holds."""
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    for name, value in fields.items():
        if name not in drop:
            writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{family}.rope.freq_base", config.rope_theta)
    for name, value in (metadata or {}).items():
        writer.add_key_value(name, *value)
    writer.add_tokenizer_model(tokenizer.get("vocabulary", "gpt2"))
    writer.add_tokenizer_pre(tokenizer.get("pre", "qwen2" if family == "qwen2" else "smollm"))
    padding = ROWS - len(TOKENS)
    writer.add_token_list([*TOKENS, *(f"[PAD{index}]" for index in range(padding))])
    kinds = [SPECIAL.get(token, KIND.NORMAL) for token in TOKENS]
    writer.add_token_types([*kinds, *[KIND.UNUSED] * padding])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(tokenizer.get("add_bos", False))
    writer.add_chat_template(TEMPLATE)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        if name in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        weight, type_ = parameter.numpy().copy(), gguf.GGMLQuantizationType[kind]
        if family == "llama" and name.split(".")[-2] in heads:
            weight = interleave(weight, heads[name.split(".")[-2]])
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), weight)
            continue
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, type_), raw_dtype=type_)
        stored = gguf.quants.quantize(parameter.numpy(), type_)  # by rows: their order is of no account
        parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, type_)))
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of the test's own."""
    monkeypatch.setenv("KVFACTORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def llama_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny("llama"), "llama")


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize(
    ("family", "tied", "bias"), [("llama", False, False), ("llama", True, True), ("qwen2", False, True)]
)
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path, family, tied, bias, kind):
    original = tiny(family, tied, bias)
    path = write_gguf(tmp_path / "tiny.gguf", original, family, kind)
    model, tokenizer = load_model(path, dtype="float32")
    assert model.config.model_type == family
    assert model.config.tie_word_embeddings == tied
    assert not model.training
    ids = torch.randint(ROWS, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer.model_max_length == 256
    assert model.generation_config.eos_token_id == 1


def test_the_qwen2_tokenizer_is_that_of_transformers(tmp_path):
    converted = load_tokenizer(write_gguf(tmp_path / "tiny.gguf", tiny("qwen2"), "qwen2"))
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    reference = Qwen2Tokenizer(
        tmp_path / "vocab.json", tmp_path / "merges.txt", additional_special_tokens=list(SPECIAL)
    )

    @settings(deadline=None)
    @given(st.text(alphabet=st.one_of(st.sampled_from("hel '\n\t1290sS!?é"), st.characters(codec="utf-8"))))
    @example("hel<|im_end|> <tool>l")
    def same(text):
        ids = converted.encode(text)
        assert ids == reference.encode(text)
        assert converted.decode(ids) == unicodedata.normalize("NFC", text)

    same()
    assert converted.encode("e\u0301") == converted.encode("é") == [TOKENS.index("Ã©")]


def test_the_smollm_tokenizer_splits_digits_and_keeps_the_text(llama_file):
    tokenizer = load_tokenizer(llama_file)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hell hell 12")) == ["hell", "Ġhell", "Ġ", "1", "2"]

    @settings(deadline=None)
    @given(st.text())
    def round_trip(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    round_trip()
    assert tokenizer.encode("e\u0301") != tokenizer.encode("é")  # no normalisation


def test_a_tokenizer_has_its_special_tokens_padding_and_template(llama_file):
    tokenizer = load_tokenizer(llama_file)
    ids = tokenizer("he<|im_end|><tool>")
    assert set(ids) == {"input_ids", "attention_mask"}
    assert ids["input_ids"] == [TOKENS.index("he"), 1, 2]
    assert tokenizer.decode(ids["input_ids"], skip_special_tokens=True) == "he<tool>"
    assert "[PAD0]" not in tokenizer.get_vocab()
    assert tokenizer.padding_side == "left"
    assert tokenizer(["he", "hell he"], padding=True)["attention_mask"][0] == [0, 0, 1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert tokenizer.chat_template == TEMPLATE


def test_bos_is_added_only_where_the_file_says_so(tmp_path, llama_file):
    told = load_tokenizer(write_gguf(tmp_path / "bos.gguf", tiny("llama"), "llama", add_bos=True))
    assert told.encode("he") == [0, TOKENS.index("he")]
    assert load_tokenizer(llama_file).encode("he") == [TOKENS.index("he")]


STRING, UINT32 = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32


@pytest.mark.parametrize(
    ("family", "what", "message"),
    [
        ("gemma", {}, "architecture 'gemma'.*llama, qwen2"),
        ("llama", {"vocabulary": "llama", "pre": "default"}, "a 'llama' tokenizer of type 'default'"),
        ("llama", {"extra_tensor": "rope_freqs.weight"}, "tensor 'rope_freqs.weight'"),
        ("llama", {"extra_tensor": "blk.0.ffn_gate_exps.weight"}, "tensor 'blk.0.ffn_gate_exps.weight'"),
        ("llama", {"metadata": {"llama.rope.scaling.type": ("yarn", STRING)}}, "scales its rotary positions"),
        ("llama", {"metadata": {"llama.rope.dimension_count": (8, UINT32)}}, "llama.rope.dimension_count"),
        ("llama", {"drop": ["feed_forward_length"]}, "lacks 'llama.feed_forward_length'"),
        ("llama", {"drop": ["model.layers.1.mlp.up_proj.weight"]}, "model.layers.1.mlp.up_proj.weight is missing"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(tmp_path, family, what, message):
    path = write_gguf(tmp_path / "odd.gguf", tiny("llama"), family, **what)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no model", lambda data: data[: len(data) // 2]])
def test_a_damaged_gguf_file_is_refused(llama_file, damage):
    llama_file.write_bytes(damage(llama_file.read_bytes()))
    with pytest.raises(UserError, match=r"tiny\.gguf cannot be read as a GGUF file"):
        resolve(llama_file)


# ---------------------------------------------------------------- the cache


def test_a_file_is_converted_once_and_not_read_again(llama_file, cache, monkeypatch):
    folder = resolve(llama_file)
    digest = hashlib.sha256(llama_file.read_bytes()).hexdigest()
    assert folder.parent == cache
    assert folder.name.startswith(f"tiny-{digest[:12]}-")
    files = json.loads((folder / "converted.json").read_text())["files"]
    weights = (folder / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    monkeypatch.setattr(conversion, "_sha256", None)  # would fail if called
    assert resolve(str(llama_file)) == folder


def test_a_copy_of_a_file_is_read_once_and_not_converted(llama_file, tmp_path, monkeypatch):
    folder = resolve(llama_file)
    copy = tmp_path / "elsewhere" / llama_file.name
    copy.parent.mkdir()
    copy.write_bytes(llama_file.read_bytes())
    monkeypatch.setattr(conversion, "_write", None)  # would fail if called
    assert resolve(copy) == folder
    monkeypatch.setattr(conversion, "_sha256", None)
    assert resolve(copy) == resolve(llama_file) == folder


def test_a_note_of_a_digest_that_was_cut_off_is_written_again(llama_file, cache):
    folder = resolve(llama_file)
    (note,) = cache.glob("*.sha256")
    whole = note.read_text()
    note.write_text(whole[:10])
    assert resolve(llama_file) == folder and note.read_text() == whole


def test_another_content_under_the_same_name_is_another_model(tmp_path):
    first = resolve(write_gguf(tmp_path / "tiny.gguf", tiny("llama"), "llama"))
    second = resolve(write_gguf(tmp_path / "tiny.gguf", tiny("llama"), "llama", add_bos=True))
    assert first != second
    assert load_tokenizer(second).encode("he")[0] == 0


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("converted.json", Path.unlink),
        ("converted.json", truncate),
        ("model.safetensors", truncate),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_a_damaged_cache_is_built_again(llama_file, file, harm):
    folder = resolve(llama_file)
    whole = (folder / file).read_bytes()
    harm(folder / file)
    assert resolve(llama_file) == folder
    assert (folder / file).read_bytes() == whole


def test_what_a_killed_conversion_left_is_swept_away(llama_file, cache, tmp_path):
    folder = resolve(llama_file)
    left = folder.rename(folder.with_name(f"{folder.name}.tmp"))
    (left / "converted.json").unlink()
    (left / "junk").touch()
    assert resolve(llama_file) == folder
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]
    assert not (folder / "junk").exists()


def test_a_failed_conversion_leaves_nothing(tmp_path, cache):
    path = write_gguf(tmp_path / "odd.gguf", tiny("llama"), "llama", extra_tensor="odd.weight")
    with pytest.raises(UserError):
        resolve(path)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


TOGETHER = """
import sys, time
from pathlib import Path
from kvfactory import gguf, models

write = gguf._write
def slowly(*args):
    print("converting")
    time.sleep(0.5)
    write(*args)
gguf._write = slowly

me, other, source = sys.argv[1:]
Path(me).touch()
while not Path(other).exists():
    time.sleep(0.01)
print(models.resolve(source))
"""


def test_two_processes_starting_at_once_convert_once(llama_file, tmp_path):
    signs = [tmp_path / "a", tmp_path / "b"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, me, other, llama_file],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(models.__file__).parents[1])},
        )
        for me, other in (signs, reversed(signs))
    ]
    printed = [run.communicate(timeout=60)[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("converting" in lines for lines in printed) == 1
    assert printed[0][-1] == printed[1][-1] == str(resolve(llama_file))


def test_a_cache_that_cannot_be_written_is_named(llama_file, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVFACTORY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write the converted model: .*set KVFACTORY_CACHE"):
        resolve(llama_file)
