"""Any method with any allocator and any merge, held while decoding or not: each runs, or is refused with a reason."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from calibrations import tiny_weights

from kvfactory import Engine, UserError
from kvfactory.eviction import EvictionMethod
from kvfactory.method import Method
from kvfactory.registry import get_registry
from kvfactory.testing import tiny_model, tiny_prompts

REGISTRY = get_registry()
METHODS = sorted(name for name, entry in REGISTRY.methods.items() if entry.plugin.distribution == "kvfactory")
ALLOCATORS, MERGES = (sorted(REGISTRY.parts[kind]) for kind in ("allocator", "merge"))
BUDGET, TOKENS, STEPS = 24, 60, 5


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files for allocators and methods that go by one, of the tiny models' shape, by the setting that names them."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "layers.json").write_text("[3, 2, 1]")
    (folder / "heads.json").write_text(json.dumps([[layer + head + 1 for head in range(8)] for layer in range(3)]))
    files = {"layer_table": str(folder / "layers.json"), "head_table": str(folder / "heads.json")}
    return files | {"weights": tiny_weights(3, 2, 8)}


def load(name: str, allocator: str, merge: str, decode: str | None, tables: dict[str, str]) -> Method:
    parts = {"allocator": allocator, "merge": merge}
    known = REGISTRY.settings(name, parts)
    files = {setting: path for setting, path in tables.items() if setting in known}
    return REGISTRY.load_method(name, BUDGET, **parts, **files, decode_budget=decode)


@pytest.mark.parametrize("name", METHODS)
def test_every_combination_runs_or_is_refused_in_one_line(name: str, tables: dict[str, str]) -> None:
    """All that run share one prefill and one batch, which is what a sweep over them would do."""
    combinations = list(product(ALLOCATORS, [*MERGES, "none"], ["none", "same"]))
    if "allocator" not in REGISTRY.kinds_of_parts(name):
        for allocator, merge, _ in combinations:
            with pytest.raises(UserError, match=f"'{name}'"):
                REGISTRY.load_method(name, allocator=allocator, merge=merge)
        return
    methods, refused = {}, {}
    for combination in combinations:
        try:
            methods[combination] = load(name, *combination, tables)
        except UserError as error:
            refused[combination] = str(error)
    assert ("uniform", "none", "none") in methods or ("uniform", "none", "same") in methods
    assert not [reason for reason in refused.values() if "\n" in reason or len(reason) < 30]
    ids, _ = tiny_prompts(TOKENS)
    engine = Engine(tiny_model())
    sequences = engine.prefill(ids[0], list(methods.values()))
    after_prompt = [sequence.cache.kept() for sequence in sequences]
    tokens = engine.decode(sequences, STEPS)
    for combination, method, kept, sequence, generated in zip(
        methods, methods.values(), after_prompt, sequences, tokens, strict=True
    ):
        assert isinstance(method, EvictionMethod)
        assert len(generated) == STEPS
        grown = 0 if combination[2] == "same" and method.decode_budget else STEPS - 1
        for store, entries in zip(sequence.cache.stores, kept, strict=True):
            lengths = store.lengths()
            held = max(entries, method.least_budget()) + grown  # no head holds less than its method always keeps
            assert sum(lengths) / len(lengths) <= held + 1e-6 or max(lengths) >= TOKENS, combination
            assert all(torch.isfinite(each).all() for each in (*store.keys(), *store.values())), combination


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_no_allocator_spends_more_than_the_budget(allocator: str, tables: dict[str, str]) -> None:
    """Over all heads and layers; head-adaptive and head-table round each head's count and may be off by half an entry."""
    ids, _ = tiny_prompts(TOKENS)
    method = load("snapkv", allocator, "none", "none", tables)
    kept = Engine(tiny_model()).prefill(ids[0], [method])[0].cache.kept()
    assert BUDGET - 2 <= sum(kept) / len(kept) <= BUDGET + 0.5
    if allocator in ("uniform", "pyramid", "layer-table"):
        assert sum(kept) == BUDGET * len(kept)
