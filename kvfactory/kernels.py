"""Attention itself, for each `attn_implementation`: pure functions of queries, keys and values.

A prefill repeats the stock model's arithmetic term by term, so that FullKV's prefill is the stock model's bit for bit. A
decode step folds the query heads that share a KV head into the query axis, so that no key is ever copied to be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .compiled import has_numba
from .context import LayerContext
from .stores import Reading

if TYPE_CHECKING:
    from .stacks import Stack


Newest = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Watched = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """One attention implementation."""

    prefill: Callable[[Tensor, Tensor, Tensor, Tensor | None, int | None], tuple[Tensor, Tensor | None]]
    """(query [batch, query_heads, tokens, dim], key and value [batch, kv_heads, tokens, dim], mask, sliding window) ->
    output shaped like the query, and the logarithm of each query's sum of exponentials, [batch, query_heads, tokens],
    float32, or None where it is not told. The mask is what the stock model hands its attention layers, or None."""
    decode: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """(query [rows, heads, queries, dim], keys and values [rows, heads, length, dim], allowed bool [rows, heads, queries,
    length], each of its first three perhaps 1, or None) -> output shaped like the query."""
    newest: Newest
    """`decode` of tokens that see all there is: of lengths [rows, heads], int64, or all that there is room for if None."""
    watched: Watched
    """`newest`, with the weights [rows, heads, queries, length] in float32 beside the output; 0 behind a head's entries."""
    ragged: Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]
    """(query [query_heads, 1, dim], keys and values [length, dim] of each stored head) -> output shaped like the query."""
    step_together: Callable[[Tensor, Tensor, Tensor, Any, Stack, Any, Tensor], Tensor | None]
    """(query, key and value [batch, heads, 1, dim], rows of them, a stack, the slots of these rows, output shaped like the
    query, without gaps): append the newest tokens of rows to what is in slots, and attend; the output of other rows stays.
    Rows and slots are arrays [count], int64. Returns weights [count, stored heads, queries, length], float32, if the stack
    is watched."""
    room_alone: int = -1
    """What a row by itself may take, in entries of room behind its shorter heads, to step by `step_together` too."""
    masks: bool = True
    """Whether lengths that differ are its own business; else they go to another kernel."""
    call: int = 1024
    """What a call costs, in entries of room behind shorter heads that cost as much; measured on a CPU."""


FUSED_ON_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What torch's fused attention calls on a CPU: (query, key, value, dropout, causal) -> output, log sums. A private name."""
Attended = TypeVar("Attended", Tensor, tuple[Tensor, Tensor])
COMPILED_DTYPES = (torch.bfloat16, torch.float32)
COMPILED_CALL = 16384
"""`Kernel.call` where room costs memory alone."""


@runtime_checkable
class PromptAttention(Protocol):
    """A method with an attention of its own over its prompt: a `Method` that has this too gets a prefill of its own."""

    def prefill_attention(self, layer: LayerContext) -> Tensor | None:
        """The attention of one prompt to itself in one layer, which is given to `compress` afterwards.

        The output is shaped like `layer.queries`; None leaves this prompt to the model's own kernel. That runs too where a
        sliding window is shorter than the prompt: nobody asks here then.
        """


def repeat_heads(kv: Tensor, groups: int) -> Tensor:
    """[batch, kv_heads, tokens, dim] -> [batch, kv_heads * groups, tokens, dim]."""
    if groups == 1:
        return kv
    batch, heads, tokens, dim = kv.shape
    return kv[:, :, None].expand(batch, heads, groups, tokens, dim).reshape(batch, heads * groups, tokens, dim)


def eager_prefill(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None
) -> tuple[Tensor, None]:
    """Plain matrix products; the softmax is in float32, the weights in the model's dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    logits = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits + mask[:, :, :, : key.shape[-2]]
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value), None


def sdpa_prefill(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """torch's fused attention."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    if mask is not None:
        mask = mask[:, :, :, : key.shape[-2]]
        if query.is_cuda:  # the memory-efficient backend needs contiguous inputs beside a mask
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    causal = mask is None and query.shape[2] > 1
    if causal and query.device.type == "cpu" and FUSED_ON_CPU is not None:
        output, log_sums = FUSED_ON_CPU(query, key, value, 0.0, True)
        return output, log_sums
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal), None


def flash_prefill(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None
) -> tuple[Tensor, None]:
    """flash-attn, called as transformers calls it; the mask is the 2-D one."""
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    heads_last = (each.transpose(1, 2) for each in (query, key, value))
    output = _flash_attention_forward(*heads_last, mask, query.shape[2], is_causal=True, sliding_window=window)
    return output.transpose(1, 2), None


def attend_with_weights(
    query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `Kernel.decode`, with the weights [rows, heads, queries, length] in float32 beside the output."""
    logits = torch.matmul(query, keys.transpose(2, 3)) / math.sqrt(query.shape[-1])
    if allowed is not None:
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return torch.matmul(weights.to(values.dtype), values), weights


def eager_decode(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """Plain matrix products."""
    return attend_with_weights(query, keys, values, allowed)[0]


def sdpa_decode(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """torch's fused attention, which on a CPU in bfloat16 takes twice as long for one query as for two."""
    lonely = query.shape[2] == 1 and query.dtype == torch.bfloat16 and not query.is_cuda
    queries = query.expand(-1, -1, 2, -1) if lonely else query
    return scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)[:, :, : query.shape[2]]


def flash_decode(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """flash-attn; a chunk of new tokens or a sliding window takes a mask, and so the other fused kernel."""
    if allowed is not None:  # flash-attn takes no mask by position; the other kernel computes the same thing
        return sdpa_decode(query, keys, values, allowed)
    from flash_attn import flash_attn_func

    heads_last = (each.transpose(1, 2) for each in (query, keys, values))
    return flash_attn_func(*heads_last).transpose(1, 2)


def by_mask(
    decode: Callable[[Tensor, Tensor, Tensor, Tensor | None], Attended],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
) -> Attended:
    """As `Kernel.newest`, by a `Kernel.decode`; or with weights, by what gives them."""
    if lengths is None:
        return decode(query, keys, values, None)
    own = torch.arange(keys.shape[2], device=keys.device) < lengths[..., None]
    return decode(query, keys, values, own[:, :, None])


def stacked_step(
    newest: Newest,
    watched: Watched,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Any,
    stack: Stack,
    slots: Any,
    output: Tensor,
) -> Tensor | None:
    """As `Kernel.step_together`, by its `newest` and `watched`."""
    heads, capacity, dim = stack.keys.shape[1:]
    starts = np.arange(stack.lengths.size).reshape(stack.lengths.shape) * capacity
    of_rows, of_slots, ends = (
        torch.from_numpy(each).to(query.device) for each in (rows, slots, (starts + stack.lengths)[slots].ravel())
    )
    for entries, new in ((stack.keys, key), (stack.values, value)):
        of_heads = new[of_rows].repeat_interleave(heads // new.shape[1], 1)
        entries.view(-1, dim).index_copy_(0, ends, of_heads.flatten(0, 2))
    stack.lengths[slots] += 1
    shortest, longest = stack.lengths.min(), int(stack.lengths.max())
    everyone = query.new_zeros(stack.slots, heads, query.shape[1] // heads, dim)  # those who left ask for nothing
    everyone[of_slots] = query[of_rows].view(-1, *everyone.shape[1:])
    seen = stack.keys[:, :, :longest], stack.values[:, :, :longest]
    lengths = None if shortest == longest else torch.from_numpy(stack.lengths).to(query.device)
    if stack.watched:
        attended, weights = watched(everyone, *seen, lengths)
    else:
        attended, weights = newest(everyone, *seen, lengths), None
    output[of_rows] = attended[of_slots].view(-1, *output.shape[1:])
    return None if weights is None else weights[of_slots]


def head_by_head(
    decode: Callable[[Tensor, Tensor, Tensor, None], Tensor], query: Tensor, keys: list[Tensor], values: list[Tensor]
) -> Tensor:
    """As `Kernel.ragged`: one call for each stored head."""
    outputs = [
        decode(part.reshape(1, 1, -1, part.shape[-1]), key[None, None], value[None, None], None)
        for part, key, value in zip(query.split(len(query) // len(keys)), keys, values, strict=True)
    ]
    return torch.cat(outputs, 2).view_as(query)


def flash_ragged(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """flash-attn with lengths: each stored head is a sequence of its own, of one query token."""
    from flash_attn import flash_attn_varlen_func

    lengths = [len(each) for each in keys]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
    starts = torch.arange(len(keys) + 1, dtype=torch.int32, device=query.device)
    folded = query.view(len(keys), -1, query.shape[-1])
    flat = torch.cat(keys)[:, None], torch.cat(values)[:, None]
    return flash_attn_varlen_func(folded, *flat, starts, ends, 1, max(lengths)).view_as(query)


def in_torch(prefill: Callable[..., tuple[Tensor, Tensor | None]], decode: Callable[..., Tensor]) -> Kernel:
    """A kernel made of two functions."""
    newest, watched = partial(by_mask, decode), partial(by_mask, attend_with_weights)
    ragged, together = partial(head_by_head, decode), partial(stacked_step, newest, watched)
    return Kernel(prefill, decode, newest, watched, ragged, together)


KERNELS = {
    "eager": in_torch(eager_prefill, eager_decode),
    "sdpa": in_torch(sdpa_prefill, sdpa_decode),
    "flash_attention_2": replace(in_torch(flash_prefill, flash_decode), ragged=flash_ragged, masks=False),
}
"""By `attn_implementation`."""


def kernel_of(name: str, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of an `attn_implementation`; torch's fused one has compiled steps on a CPU where Numba is installed."""
    if name != "sdpa" or dtype not in COMPILED_DTYPES or not has_numba(device):
        return KERNELS[name]
    from . import numba_kernels  # late: nobody else waits for its import

    return replace(
        KERNELS[name],
        newest=numba_kernels.newest,
        watched=numba_kernels.watched,
        ragged=numba_kernels.ragged,
        step_together=numba_kernels.step_together,
        room_alone=COMPILED_CALL // 16,
        call=COMPILED_CALL,
    )


def visible(positions: Tensor, at: Tensor, window: int | None, group: int) -> Tensor:
    """Which entries the folded queries may see, bool [heads or 1, group * tokens, length].

    `positions` [heads or 1, length] are the entries' own, `at` [tokens] the queries'. One rule covers causality inside a
    chunk of new tokens and sliding windows: an entry is seen if it is not later than the query and not out of its window.
    """
    allowed = positions[:, None] <= at[:, None]
    if window is not None:
        allowed = allowed & (positions[:, None] > at[:, None] - window)
    return allowed.repeat(1, group, 1)


def decode_attention(
    kernel: Kernel, query: Tensor, reading: Reading, first: int, window: int | None, with_weights: bool
) -> tuple[Tensor, list[Tensor]]:
    """Attention of query [query_heads, tokens, dim], the newest tokens from position `first` on, over what a store gave.

    Returns the output, shaped like the query, and if asked for the weights [query_heads, tokens, length] in float32:
    one tensor, or one for each head of a ragged store.
    """
    tokens = query.shape[1]
    if isinstance(reading.keys, list) and tokens == 1 and window is None and not with_weights:
        assert isinstance(reading.values, list)
        return kernel.ragged(query, reading.keys, reading.values), []
    pieces = reading.pieces(query)
    masks: list[Tensor | None] = [None] * len(pieces)
    if tokens > 1 or window is not None:  # else a single newest token, which sees all there is
        at = torch.arange(first, first + tokens, device=query.device)
        masks = [
            visible(positions, at, window, len(part) // len(keys))
            for (part, keys, _), positions in zip(pieces, reading.positions_by_piece(), strict=True)
        ]
    outputs, weights = [], []
    for (part, keys, values), allowed in zip(pieces, masks, strict=True):
        folded = part.reshape(1, len(keys), -1, part.shape[-1])  # the queries of a stored head side by side
        allowed = None if allowed is None else allowed[None]
        if with_weights:
            seen = (keys[None], values[None])
            attended, each = (
                kernel.watched(folded, *seen, None) if allowed is None else attend_with_weights(folded, *seen, allowed)
            )
            weights.append(each.reshape(len(part), tokens, -1))
        elif allowed is None:
            attended = kernel.newest(folded, keys[None], values[None], None)
        else:
            attended = kernel.decode(folded, keys[None], values[None], allowed)
        outputs.append(attended.reshape(part.shape))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), weights
