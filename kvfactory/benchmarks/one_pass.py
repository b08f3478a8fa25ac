"""How a method takes part in the one pass of a text that is scored itself.

A prompt attends to itself before anything of it is compressed, so that nothing a method does would show in what its own
tokens cost. Here each layer is compressed first, and its queries attend to what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from kvfactory.context import LayerContext
from kvfactory.errors import require
from kvfactory.kernels import KERNELS, PromptAttention, decode_attention
from kvfactory.method import Method
from kvfactory.parts import Part
from kvfactory.stores import Reading, Store, consecutive, spread

MaskBy = Literal["position", "index"]
"""What says whether a query sees an entry: by position, that it is no later token; by index, that the n-th query sees the
first n entries, whatever those are."""


@dataclass(frozen=True, kw_only=True)
class AttendToKept(Method):
    """A method whose prompt attends to what the method keeps of it, in a pass of its own.

    Where everything is kept as it came, that is the model's own attention.
    """

    method: Method
    mask_by: MaskBy
    """A query sees entries of no later position. By index, the n-th query sees the first n entries, whatever those are."""

    def compress(self, layer: LayerContext) -> Store:
        return self._kept(layer).fork()

    def _kept(self, layer: LayerContext) -> Store:
        return layer.shared((type(self), self.method), lambda: self.method.compress(layer))

    def prefill_attention(self, layer: LayerContext) -> Tensor | None:
        """See `kvfactory.kernels.PromptAttention`; raises `UserError` where a query would see nothing."""
        store = self._kept(layer)
        keys, values, positions = store.keys(), store.values(), store.positions()
        heads = len(keys)
        if all(map(torch.equal, [*keys, *values], [*spread(layer.keys, heads), *spread(layer.values, heads)])):
            return None
        if self.mask_by == "index":
            positions = [consecutive(0, len(each), each.device) for each in positions]
        require(
            all(len(each) > 0 and int(each[0]) == 0 for each in positions),
            f"{type(self.method).__name__} leaves a head of layer {layer.layer_index} nothing that the first token may see; "
            "in one pass that means nothing, so feed the text token by token",
        )
        reading = Reading(keys, values, lambda: positions)
        return decode_attention(KERNELS["sdpa"], layer.queries, reading, 0, None, False)[0]

    @property
    def memory(self) -> Literal["physical", "nominal"]:
        return self.method.memory

    def row_fields(self, stores: list[Store]) -> dict[str, Any]:
        return self.method.row_fields(stores)

    def parts(self) -> list[Part]:
        return self.method.parts()

    def for_prompt(self, tokens: int) -> Self:
        return replace(self, method=self.method.for_prompt(tokens))

    def settings(self) -> dict[str, Any]:
        return self.method.settings()

    def row_settings(self) -> dict[str, Any]:
        return self.method.row_settings()


def acts_in_one_pass(method: Method) -> bool:
    """Whether what a method does can show in its prompt's own pass, rather than behind its end or while decoding."""
    return type(method).finish is Method.finish and getattr(method, "retrieval", None) is None


def attending(method: Method, mask_by: MaskBy) -> Method:
    """The method as it is in one pass: one that attends to its prompt in a way of its own goes on doing so."""
    return method if isinstance(method, PromptAttention) else AttendToKept(method=method, mask_by=mask_by)
