"""What a plugin writes: a `Method`, or far more often an `eviction.EvictionMethod`, which only has to score tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from .budget import Share
from .context import LayerContext, Prompt
from .errors import UserError
from .parts import Part
from .settings import row_value, settings_of
from .storage import KeyPruning, Quantisation, Retrieval
from .stores import Store


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A policy: looks at one layer after its prefill and answers with what that layer keeps.

    Stateless. Its dataclass fields are its settings: they become command-line flags and are written in every result row.
    """

    reads: ClassVar[str] = "nothing"
    """Whose attention it looks at, in a few words for tables."""
    prefill: ClassVar[str] = "shared"
    """How it comes by its prompt, in a few words for tables. One that has a `kernels.PromptAttention` is not shared."""
    aliases: ClassVar[dict[str, str]] = {}
    """Names that other programs use for a setting, and this one's."""

    @abstractmethod
    def compress(self, layer: LayerContext) -> Store:
        """What the layer keeps; its full keys and values are dropped afterwards."""

    def finish(self, stores: list[Store], prompt: Prompt) -> list[Store]:
        """Called when the prompt has passed through all layers: their stores as they go into decoding, one a layer."""
        return stores

    @property
    def whole_prompt(self) -> str | None:
        """Why it needs its prompt at once, in a few words for an error; None if chunks of it will do (`chunks`)."""
        return "it looks at the whole prompt at once"

    @property
    def memory(self) -> Literal["physical", "nominal"]:
        """`nominal` where it masks entries and holds all of them."""
        return "physical"

    def row_fields(self, stores: list[Store]) -> dict[str, Any]:
        """What a result row says of a sequence's stores beyond what all rows say; values that JSON knows."""
        return {}

    def parts(self) -> list[Part]:
        """What it is composed with."""
        held = (getattr(self, each.name) for each in fields(self))
        return [part for part in held if isinstance(part, Part)]

    def for_prompt(self, tokens: int) -> Self:
        """This method for a prompt of so many tokens: one whose budget is a share of it has it in entries."""
        return self

    def settings(self) -> dict[str, Any]:
        """All settings by name, those of its parts among them."""
        return {name: str(value) if isinstance(value, Share) else value for name, value, _ in self._settings()}

    def row_settings(self) -> dict[str, Any]:
        """`settings` as rows have them, each with one type in every row: what may be a word or a share is text."""
        return {name: row_value(value, kind) for name, value, kind in self._settings()}

    def _settings(self) -> Iterator[tuple[str, Any, Any]]:
        """Name, value and type."""
        for setting in settings_of(type(self)).values():
            value = getattr(self, setting.name)
            if isinstance(value, Part):
                yield setting.name, value.name, str
                yield from (
                    (each.name, getattr(value, each.name), each.type) for each in settings_of(type(value)).values()
                )
            else:
                yield setting.name, value, setting.type


@dataclass(frozen=True, kw_only=True)
class StoringMethod(Method):
    """A method whose stores may hold and read what they keep in other ways."""

    quant_method: Quantisation | None = None
    """How entries are stored in few bits, if they are."""
    key_pruning: KeyPruning | None = None
    """Which channels of keys are stored, if not all of them."""
    retrieval: Retrieval | None = None
    """Which entries a step reads, if not all of them."""

    def __post_init__(self) -> None:
        if self.quant_method and self.key_pruning:
            raise UserError(
                f"--quant_method {self.quant_method.name} and --key_pruning {self.key_pruning.name} each hold keys in "
                "their own way; give one of them"
            )

    def stored(self, store: Store, layer: LayerContext) -> Store:
        """The store that was made of a layer, holding and reading its entries as the settings say."""
        for part in (self.quant_method, self.key_pruning, self.retrieval):
            if part is not None:
                store = part.stored(store, layer)
        return store
