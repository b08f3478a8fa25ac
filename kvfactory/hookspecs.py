"""The doors a plugin may open. Each hook is handed a `register` function and calls it once for each thing it brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import click
import pluggy

if TYPE_CHECKING:  # torch comes with most, and a runner knows the registry, which knows the hooks
    from .attention import Family
    from .budget import BudgetAllocator
    from .merge import Merge
    from .method import Method
    from .runner import Runner
    from .storage import KeyPruning, Quantisation, Retrieval

hookspec = pluggy.HookspecMarker("kvfactory")
hookimpl = pluggy.HookimplMarker("kvfactory")


class RegisterMethod(Protocol):
    """What a plugin calls for each method."""

    def __call__(
        self,
        name: str,
        *,
        attention: type[Method],
        allocator: str = "uniform",
        merge: str | None = None,
        quant_method: str | None = None,
        key_pruning: str | None = None,
        retrieval: str | None = None,
    ) -> None: ...


class RegisterAllocator(Protocol):
    """What a plugin calls for each allocator."""

    def __call__(self, name: str, allocator: type[BudgetAllocator]) -> None: ...


class RegisterMerge(Protocol):
    """What a plugin calls for each merge."""

    def __call__(self, name: str, merge: type[Merge]) -> None: ...


class RegisterQuantisation(Protocol):
    """What a plugin calls for each way to quantise."""

    def __call__(self, name: str, quantisation: type[Quantisation]) -> None: ...


class RegisterKeyPruning(Protocol):
    """What a plugin calls for each way to prune keys."""

    def __call__(self, name: str, key_pruning: type[KeyPruning]) -> None: ...


class RegisterRetrieval(Protocol):
    """What a plugin calls for each way to read some of what is held."""

    def __call__(self, name: str, retrieval: type[Retrieval]) -> None: ...


class RegisterFamily(Protocol):
    """What a plugin calls for each model family."""

    def __call__(self, model_type: str, family: Family) -> None: ...


class RegisterBenchmark(Protocol):
    """What a plugin calls for each benchmark."""

    def __call__(self, name: str, runner: Runner) -> None: ...


class RegisterCommand(Protocol):
    """What a plugin calls for each command of its own."""

    def __call__(self, name: str, command: click.Command) -> None: ...


@hookspec
def kvfactory_register_methods(register: RegisterMethod) -> None:
    """Call `register(name, attention=MethodClass)` for each method, with the names of its parts if it has any."""


@hookspec
def kvfactory_register_allocators(register: RegisterAllocator) -> None:
    """Call `register(name, AllocatorClass)` for each way to split a budget over layers and heads."""


@hookspec
def kvfactory_register_merges(register: RegisterMerge) -> None:
    """Call `register(name, MergeClass)` for each way to keep something of what is evicted."""


@hookspec
def kvfactory_register_quantisations(register: RegisterQuantisation) -> None:
    """Call `register(name, QuantisationClass)` for each way to store entries in few bits."""


@hookspec
def kvfactory_register_key_prunings(register: RegisterKeyPruning) -> None:
    """Call `register(name, KeyPruningClass)` for each way to store some channels of keys."""


@hookspec
def kvfactory_register_retrievals(register: RegisterRetrieval) -> None:
    """Call `register(name, RetrievalClass)` for each way to read some of what is held."""


@hookspec
def kvfactory_register_families(register: RegisterFamily) -> None:
    """Call `register(model_type, family)` to teach the attention patch another model architecture."""


@hookspec
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    """Call `register(name, Runner(...))` for each benchmark that `kvfactory run` should know."""


@hookspec
def kvfactory_register_commands(register: RegisterCommand) -> None:
    """Call `register(name, command)` for each command that `kvfactory` should have, to train or measure what is needed."""
