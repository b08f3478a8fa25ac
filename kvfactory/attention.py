"""The attention monkeypatch: one forward for every model family, kernel and method, and `compress` for `generate()`.

Layers are patched one by one and unpatched on exit; no class, and no other model in the process, is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .cache import CompressedCache, LayerBatch, SequenceCache
from .compiled import has_vectors
from .errors import UserError, unknown
from .kernels import kernel_of
from .method import Method
from .stores import Store

Rotary = Callable[[Any, Tensor, Tensor, tuple[Tensor, Tensor] | None, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """What differs between the architectures that share the one forward."""

    rotary: Rotary
    """(attention module, values, position_ids [batch, tokens], tables the model made or None, tokens seen so far and now)
    -> cos and sin [batch, tokens, head_dim]."""
    sliding_window: Callable[[Any], int | None] = lambda config: None
    """The window, in tokens, that the stock attention of a model with this config honours."""


def tables_of_the_model(
    module: Any,
    value: Tensor,
    position_ids: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    seen: int,
) -> tuple[Tensor, Tensor]:
    """Llama: the model makes cos and sin once for all layers."""
    return tables if tables is not None else module.rotary_emb(value, position_ids)


def tables_by_position(
    module: Any,
    value: Tensor,
    position_ids: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    seen: int,
) -> tuple[Tensor, Tensor]:
    """Mistral: each layer makes cos and sin of the positions it is given."""
    return module.rotary_emb(value, position_ids)


def tables_by_length(
    module: Any,
    value: Tensor,
    position_ids: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    seen: int,
) -> tuple[Tensor, Tensor]:
    """Qwen2 and Mixtral: each layer has tables of all positions up to a length, to be indexed."""
    cos, sin = module.rotary_emb(value, seq_len=seen)
    return cos[position_ids], sin[position_ids]


def window_under_flash(config: Any) -> int | None:
    """Outside Mistral, transformers 4.44.2 honours a sliding window under flash_attention_2 alone."""
    honoured = config._attn_implementation == "flash_attention_2" and getattr(config, "use_sliding_window", True)
    return config.sliding_window if honoured else None


BUILT_IN_FAMILIES = {
    "llama": Family(tables_of_the_model),
    "mistral": Family(tables_by_position, lambda config: config.sliding_window),
    "qwen2": Family(tables_by_length, window_under_flash),
    "mixtral": Family(tables_by_length, window_under_flash),
}


def rotate_half(x: Tensor) -> Tensor:
    """Each pair (left, right) of the two halves of the last dimension as (-right, left)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key [batch, heads, tokens, head_dim] turned as the stock model turns them, to the bit.

    Cos and sin are [batch or 1, 1, tokens, head_dim], twice half of it.
    """
    is_step = query.shape[2] == 1 and query.dtype == cos.dtype == torch.bfloat16
    if is_step and has_vectors(query.device, query.shape[-1]):
        from . import numba_rotary  # late: nobody else waits for its import

        return numba_rotary.rotate(query, key, cos, sin)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def project(module: Any, hidden: Tensor) -> SequenceOf[Tensor]:
    """Queries, keys and values of hidden states [batch, tokens, hidden_size], heads side by side."""
    together = getattr(module, "query_key_value", None)  # `for_inference` puts it there
    return together(hidden) if together else [module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)]


def attention_forward(
    module: Any,
    family: Family,
    stock: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Any = None,
    past_key_value: Cache | None = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    cache_position: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Cache | None]:
    """Project, rotate, hand over to the cache, project back. Without a `CompressedCache` the stock forward runs."""
    if not isinstance(past_key_value, CompressedCache):
        tables = {} if position_embeddings is None else {"position_embeddings": position_embeddings}
        return stock(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            cache_position=cache_position,
            **tables,
            **kwargs,
        )
    if output_attentions:
        raise ValueError("output_attentions is not available under compression: an evicted key has no column")
    cache = past_key_value
    batch, tokens, _ = hidden_states.shape

    def split(projected: Tensor, heads: int) -> Tensor:
        return projected.view(batch, tokens, heads, module.head_dim).transpose(1, 2)

    projected = project(module, hidden_states)
    counts = module.num_heads, module.num_key_value_heads, module.num_key_value_heads
    query, key, value = (split(each, heads) for each, heads in zip(projected, counts, strict=True))
    cos, sin = family.rotary(module, value, position_ids, position_embeddings, cache.get_seq_length() + tokens)
    query, key = rotate(query, key, cos[:, None], sin[:, None])
    layer = LayerBatch(module.layer_idx, module.config.num_hidden_layers, query, key, value, hidden_states)
    output = cache.attend(layer, attention_mask)
    output = output.transpose(1, 2).contiguous().reshape(batch, tokens, -1)
    return module.o_proj(output), None, cache


def causal_mask(
    stock: Callable[..., Tensor | None], mask: Any, inputs: Any, cache_position: Any, cache: Any, *rest: Any
) -> Any:
    """The base model's mask of queries by all tokens seen, but for passes in which stores say what a query may see."""
    later = isinstance(cache, CompressedCache) and not cache.is_empty
    return None if later else stock(mask, inputs, cache_position, cache, *rest)


def family_of(model: PreTrainedModel, families: dict[str, Family]) -> Family:
    """The family of the model, by its `model_type`.

    Raises `UserError` for an architecture that no plugin knows.
    """
    if model.config.model_type not in families:
        raise unknown("model family", model.config.model_type, families)
    return families[model.config.model_type]


def slot_of(attention: nn.Module) -> str:
    """The attribute that holds a module's own forward: accelerate puts its wrapper in place of `forward`."""
    return "_old_forward" if "_old_forward" in vars(attention) else "forward"


def prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the base model was called with: token ids [batch, tokens], or embeddings [batch, tokens, hidden_size]."""
    given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    return next(each for each in given if each is not None)


class Patch:
    """The patch on one model: a context manager that may be entered again and again.

    On a model that is patched already it does nothing: the forward is the same one, and what differs is in the cache.
    """

    def __init__(self, model: PreTrainedModel, families: dict[str, Family]) -> None:
        self.model = model
        self.family = family_of(model, families)
        self._undo: list[Callable[[], None]] = []

    def new_cache(self, rows: list[list[SequenceCache]]) -> CompressedCache:
        config = self.model.config
        kernel = kernel_of(config._attn_implementation, self.model.dtype, self.model.device)
        cache = CompressedCache(rows, kernel, self.family.sliding_window(config))
        cache.inverse_frequencies = self._inverse_frequencies()
        return cache

    def _inverse_frequencies(self) -> Tensor | None:
        base = self.model.model
        rotary = getattr(base, "rotary_emb", None) or getattr(base.layers[0].self_attn, "rotary_emb", None)
        return getattr(rotary, "inv_freq", None)

    @property
    def is_in_place(self) -> bool:
        """Whether this or another patch is on the model."""
        attention = self.model.model.layers[0].self_attn
        return getattr(vars(attention).get(slot_of(attention)), "func", None) is attention_forward

    def __enter__(self) -> Patch:
        if self.is_in_place:
            return self
        for layer in self.model.model.layers:
            self._patch(layer.self_attn)
        base = self.model.model
        if make_mask := getattr(base, "_update_causal_mask", None):
            base._update_causal_mask = partial(causal_mask, make_mask)
            self._undo.append(partial(delattr, base, "_update_causal_mask"))
        hooks = (
            self.model.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.model.register_forward_hook(self._after, with_kwargs=True),
        )
        self._undo += [hook.remove for hook in hooks]
        return self

    def __exit__(self, *exception: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _patch(self, attention: nn.Module) -> None:
        slot = slot_of(attention)
        own = vars(attention).get(slot)
        setattr(attention, slot, partial(attention_forward, attention, self.family, getattr(attention, slot)))
        self._undo.append(partial(setattr, attention, slot, own) if own else partial(delattr, attention, slot))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, CompressedCache):
            cache.begin(kwargs.get("attention_mask"), prompt_of(args, kwargs).shape[1])
            if not cache.is_empty:  # stores know what a stored token may be seen by
                kwargs["attention_mask"] = None
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, CompressedCache):
            was_prefill = cache.is_empty
            cache.end(output[0].shape[1])
            if was_prefill:
                cache.finish(prompt_of(args, kwargs), self._feed)

    def _feed(self, method: Method, seen: int, stores: list[Store], ids: list[int]) -> None:
        """Pass tokens through the model over stores that hold what came before."""
        device = self.model.get_input_embeddings().weight.device
        cache = self.new_cache([[SequenceCache(method, stores, seen)]])
        positions = torch.arange(seen, seen + len(ids), device=device)[None]
        tokens = torch.tensor([ids], device=device)
        self.model.model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)


class Compression:
    """What `compress` gives: `cache` is that of the latest prompt, for a look at what was kept."""

    def __init__(self, patch: Patch, method: Method) -> None:
        self.cache: CompressedCache | None = None
        self._patch = patch
        self._method = method

    def hand_over(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Puts a compressing cache in the place of the empty one that a new prompt starts with."""
        given = kwargs.get("past_key_values")
        empty = given is None or (isinstance(given, Cache) and given.get_seq_length() == 0)
        wanted = kwargs.get("use_cache")
        if empty and not isinstance(given, CompressedCache) and (wanted or wanted is None):
            rows = [[SequenceCache(self._method)] for _ in range(len(prompt_of(args, kwargs)))]
            self.cache = kwargs["past_key_values"] = self._patch.new_cache(rows)
        return args, kwargs


@contextmanager
def compress(model: PreTrainedModel, method: Method) -> Iterator[Compression]:
    """Inside it, `model.generate()` and `model(...)` keep of each prompt what the method keeps; afterwards all is as before.

    Batches are padded on the left. Sampling, streamers and beam search work as ever. Raises `UserError` for a model of an
    unknown family and for one that is under compression already.
    """
    from .registry import get_registry

    patch = Patch(model, get_registry().families)
    if patch.is_in_place:
        raise UserError("this model is under compression already; leave that context before entering another")
    compression = Compression(patch, method)
    hook = model.model.register_forward_pre_hook(compression.hand_over, with_kwargs=True)
    try:
        with patch:
            yield compression
    finally:
        hook.remove()
