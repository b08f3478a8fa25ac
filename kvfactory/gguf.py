"""GGUF files as Hugging Face folders: `convert()` turns one into safetensors, config and tokenizer, once.

A GGUF file holds weights (mostly quantised), the model's numbers and its vocabulary. transformers reads only some of
the quantisation types, so the file is dequantised here with the `gguf` package and written as float32 into a cache
folder that `from_pretrained` loads like any other. Families: llama and qwen2, with a byte-level BPE vocabulary.
Whatever is not understood, a tensor included, is refused: nothing of a file is left out in silence.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from kvfactory.errors import UserError

VERSION = "1"  # of what is written; a change of it makes new folders
MARKER = "converted.json"
DIGEST_LENGTH = 64  # characters; a note that was cut off is shorter

CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}

PLAIN = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert(source: Path, cache: Path, sha256: str | None = None) -> Path:
    """The Hugging Face folder made of the GGUF file `source`, below `cache`; written at the first call, then reused.

    Raises UserError where the file is not what `sha256` says, is not a GGUF file, or holds what is not understood.
    """
    digest = _digest(source, cache)
    if sha256 is not None and digest != sha256:
        raise UserError(f"{source} is damaged or of another version (sha256 {digest}, not {sha256}); install it again")
    target = cache / f"{source.stem}-{digest[:12]}-{VERSION}"
    if _whole(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _whole(target):  # another process may have converted it while we waited
                _write(source, digest, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the converted model: {error}; set KVFACTORY_CACHE to another folder") from error
    return target


def _digest(source: Path, cache: Path) -> str:
    """The file's sha256: read once for the very same file (path, size, time), then known from a note in the cache."""
    status = source.stat()
    identity = json.dumps([str(source.resolve()), status.st_size, status.st_mtime_ns])
    note = cache / f"{hashlib.sha256(identity.encode()).hexdigest()}.sha256"
    with suppress(OSError):
        if len(known := note.read_text()) == DIGEST_LENGTH:
            return known
    digest = _sha256(source)
    with suppress(OSError):  # a cache that cannot be written costs a reading at each start, and no more
        cache.mkdir(parents=True, exist_ok=True)
        note.write_text(digest)
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marker(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / MARKER).read_text()))
    except (OSError, ValueError):
        return {}


def _whole(folder: Path) -> bool:
    """Whether the marker is there and every file it lists has its size; reading 500 MB at every start would be slow."""
    files = _marker(folder).get("files", {})
    return bool(files) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == known["size"] for name, known in files.items()
    )


def _write(source: Path, digest: str, target: Path) -> None:
    """Convert into a folder beside `target` and move it there in one step; the marker is its last file."""
    draft = target.with_name(f"{target.name}.tmp")
    for leftover in (draft, target):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    try:
        _convert(source, draft)
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(draft.iterdir())}
        (draft / MARKER).write_text(json.dumps({"sha256": digest, "files": files}, indent=1))
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _convert(source: Path, folder: Path) -> None:
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise UserError(f"{source} cannot be read as a GGUF file: {error}") from error
    meta = {name: field.contents() for name, field in reader.fields.items()}
    family = meta.get("general.architecture")
    if family not in CONFIGS:
        raise UserError(
            f"{source.name} holds a model of architecture '{family}'; GGUF files are read for: {', '.join(CONFIGS)}"
        )
    try:
        tokenizer = _tokenizer(meta, source.name)
        tensors = _tensors(reader, meta, family, source.name)
        config = _config(meta, family, tensors, source.name)
    except KeyError as error:
        raise UserError(f"{source.name} lacks {error}") from error
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors hides it from others; a cache may be shared
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)


def _config(meta: dict[str, Any], family: str, tensors: dict[str, np.ndarray], name: str) -> PretrainedConfig:
    hidden, heads = meta[f"{family}.embedding_length"], meta[f"{family}.attention.head_count"]
    if meta.get(f"{family}.rope.scaling.type", "none") != "none":
        raise UserError(f"{name} scales its rotary positions, which is not read from GGUF; use the Hugging Face folder")
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if meta.get(f"{family}.{key}", hidden // heads) != hidden // heads:
            raise UserError(f"{name} sets {family}.{key} to other than {hidden} / {heads}, which is not read from GGUF")
    biases = {"attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors} if family == "llama" else {}
    return CONFIGS[family](
        architectures=[f"{family.capitalize()}ForCausalLM"],
        torch_dtype="float32",
        vocab_size=len(tensors["model.embed_tokens.weight"]),
        hidden_size=hidden,
        intermediate_size=meta[f"{family}.feed_forward_length"],
        num_hidden_layers=meta[f"{family}.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=meta.get(f"{family}.attention.head_count_kv", heads),
        max_position_embeddings=meta[f"{family}.context_length"],
        rms_norm_eps=float(f"{meta[f'{family}.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        rope_theta=float(meta.get(f"{family}.rope.freq_base", 10000.0)),
        tie_word_embeddings="lm_head.weight" not in tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
        **biases,
    )


def _tensors(reader: gguf.GGUFReader, meta: dict[str, Any], family: str, name: str) -> dict[str, np.ndarray]:
    """All weights in float32 under their Hugging Face names."""
    heads = meta[f"{family}.attention.head_count"]
    rows = {"q_proj": heads, "k_proj": meta.get(f"{family}.attention.head_count_kv", heads)}
    weights = {}
    for tensor in reader.tensors:
        target = _hf_name(tensor.name)
        if target is None:
            raise UserError(f"{name} holds a tensor '{tensor.name}', which no {family} model of transformers has")
        try:
            weight = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{name}: tensor '{tensor.name}' is quantised as {kind}, which is not known") from error
        projection = target.split(".")[-2]
        if family == "llama" and projection in rows:
            weight = _unpermute(weight, rows[projection])
        weights[target] = np.ascontiguousarray(weight)
    return weights


def _hf_name(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in PLAIN:
        return f"{PLAIN[stem]}.{kind}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{LAYER[rest]}.{kind}" if block.isdigit() and rest in LAYER else None


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of Llama's queries and keys: a GGUF file interleaves the halves of a head, transformers does not."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(meta: dict[str, Any], name: str) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer, from the file's tokens, merges and named pre-tokenizer."""
    model, words = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model != "gpt2" or words not in ("smollm", "qwen2"):
        raise UserError(f"{name} has a '{model}' tokenizer of type '{words}'; GGUF is read with gpt2: smollm, qwen2")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type", [gguf.TokenType.NORMAL] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {
        token: index
        for index, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ != gguf.TokenType.UNUSED  # padding of the embedding matrix
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    if words == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    for add, kind in (
        (tokenizer.add_special_tokens, gguf.TokenType.CONTROL),
        (tokenizer.add_tokens, gguf.TokenType.USER_DEFINED),
    ):
        add([AddedToken(token, normalized=False) for token, type_ in zip(tokens, types, strict=True) if type_ == kind])
    named = {}
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        named[f"{role}_token"] = None if index is None else tokens[index]
    named["pad_token"] = named["pad_token"] or named["eos_token"]
    if meta.get("tokenizer.ggml.add_bos_token"):
        bos = (named["bos_token"], meta["tokenizer.ggml.bos_token_id"])
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta.get("tokenizer.chat_template"),
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=meta[f"{meta['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
