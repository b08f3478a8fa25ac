"""MiniCache: what a pair of layers shares, what stays exact, and what it costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from kvfactory_plugins.minicache import MiniCache, PairedStore, beyond_range, farthest, merge, unit
from test_golden_methods import Golden
from torch import Tensor

from kvfactory import DenseStore, Engine, Method, Store, UserError, compress
from kvfactory.growing import Rows
from kvfactory.testing import MethodContract, generate, tiny_model, tiny_prompts

HEADS, TOKENS, DIM = 2, 40, 8


def entries(tokens: int = TOKENS, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layers(count: int = 2, tokens: int = TOKENS, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Store]:
    """Full stores of random layers that are somewhat alike, as neighbours are."""
    common = entries(tokens, seed), entries(tokens, seed + 1)
    made: list[Store] = []
    for layer in range(count):
        own = [entries(tokens, seed + 10 + 2 * layer + side) for side in (0, 1)]
        made.append(DenseStore(*((shared + 0.5 * each).to(dtype) for shared, each in zip(common, own, strict=True))))
    return made


def finish(stores: list[Store], **settings: Any) -> list[Store]:
    return MiniCache(**settings).finish(stores, cast(Any, SimpleNamespace(ids=[])))


def held(store: Store) -> tuple[Tensor, Tensor]:
    return torch.stack(store.keys()), torch.stack(store.values())


def step(stores: list[Store], new: list[tuple[Tensor, Tensor]], position: int) -> None:
    """One pass of the model: each layer appends, reads and observes in turn."""
    for store, (keys, values) in zip(stores, new, strict=True):
        store.append(keys, values, position)
        reading = store.read(torch.zeros(HEADS, keys.shape[1], DIM))
        assert torch.equal(cast(Tensor, reading.keys)[:, -keys.shape[1] :], keys), (
            "a step attends to its own tokens exactly"
        )
        assert torch.equal(cast(Tensor, reading.values)[:, -keys.shape[1] :], values)
        store.observe(None)


def tensors(thing: Any, found: dict[int, Tensor] | None = None) -> dict[int, Tensor]:
    """Every tensor that is reached from here, by its storage."""
    found = {} if found is None else found
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing
    elif isinstance(thing, (list, tuple)):
        for each in thing:
            tensors(each, found)
    elif type(thing).__module__ in (MiniCache.__module__, Rows.__module__):
        tensors(list(vars(thing).values()), found)
    return found


@pytest.mark.parametrize("case", ["t0.6_r0.1", "t0.5_r0.0", "t0.3_r0.25"])
def test_as_kvcache_factory_computes(shared: Path, case: str) -> None:
    golden = Golden(shared, f"minicache__kvf_{case}")
    lower, upper = golden["in_prev"][0], golden["in_cur"][0]
    t, ratio = golden.params["interpolation_t"], golden.params["retention_ratio"]
    merged = merge(lower, upper, t)
    retained, _ = farthest(merged.distance, ratio)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(merged.direction, golden["out_direction"][0], **close)
    torch.testing.assert_close(merged.distance, golden["out_angular_distance"][0], **close)
    expected = golden["out_retained"][0].long().sort().values
    assert torch.equal(torch.stack([head.nonzero()[:, 0] for head in retained]), expected)
    pair = finish([DenseStore(lower, upper), DenseStore(upper, lower)], interpolation=t, retention_ratio=ratio)
    torch.testing.assert_close(held(pair[0])[0], golden["out_restored_prev"][0], **close)
    torch.testing.assert_close(held(pair[1])[0], golden["out_restored_cur"][0], **close)


def test_the_ends_of_the_arc_are_the_layers_own_directions() -> None:
    lower, upper = entries(seed=3), entries(seed=4)
    torch.testing.assert_close(merge(lower, upper, 0).direction, unit(lower))
    torch.testing.assert_close(merge(lower, upper, 1).direction, unit(upper))


def test_the_direction_turns_evenly() -> None:
    east, north = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    merged = merge(east, north, 1 / 3)
    torch.testing.assert_close(merged.direction, torch.tensor([[0.75**0.5, 0.5]]))  # 30 of 90 degrees
    torch.testing.assert_close(merged.distance, torch.tensor([0.5]))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_where_no_direction_lies_between_one_is_chosen(t: float) -> None:
    x = torch.tensor([3.0, 4.0])
    nothing = torch.zeros(2)
    for lower, upper in ((x, nothing), (nothing, x), (x, x), (x, 2 * x)):
        merged = merge(lower, upper, t)
        torch.testing.assert_close(merged.direction * merged.norms[0], lower)
        torch.testing.assert_close(merged.direction * merged.norms[1], upper)
    torch.testing.assert_close(merge(x, -x, t).direction, unit(x) if t <= 0.5 else -unit(x))
    assert torch.equal(merge(nothing, nothing, t).direction, nothing)


def test_retention_by_ratio_rounds_up_and_by_threshold_takes_the_far_end_of_the_range() -> None:
    distance = torch.tensor([[0.1, 0.5, 0.3, 0.5, 0.2], [0.4, 0.0, 0.1, 0.2, 0.3]])
    retained, limit = farthest(distance, 0.3)
    assert retained.int().tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    torch.testing.assert_close(limit, torch.tensor([0.5, 0.3]))
    retained, limit = beyond_range(distance, 0.6)
    assert retained.int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 1, 1]]
    torch.testing.assert_close(limit, torch.tensor([0.26, 0.16]))
    assert farthest(torch.rand(1, 30), 0.1)[0].sum() == 3


def test_identical_layers_restore() -> None:
    layer = layers(1)[0]
    for store in finish([layer, layer.fork()], retention_ratio=0.0):
        for restored, original in zip(held(store), held(layer), strict=True):
            torch.testing.assert_close(restored, original)


@pytest.mark.parametrize("retention", ["ratio", "threshold"])
def test_norms_are_kept_and_what_is_far_is_exact(retention: str) -> None:
    full = layers()
    pair = finish(full, **{"ratio": {"retention_ratio": 0.2}, "threshold": {"retention_threshold": 0.3}}[retention])
    for side, (store, original) in enumerate(zip(pair, full, strict=True)):
        for part, (restored, whole) in enumerate(zip(held(store), held(original), strict=True)):
            torch.testing.assert_close(restored.norm(dim=-1), whole.norm(dim=-1))
            distance = merge(held(full[0])[part], held(full[1])[part], 0.6).distance
            retained = farthest(distance, 0.2)[0] if retention == "ratio" else beyond_range(distance, 0.3)[0]
            exact = (restored == whole).all(-1)
            assert torch.equal(exact, retained), f"side {side}"
            assert 0 < retained.sum() < retained.numel()


@pytest.mark.parametrize("settings", [{"retention_ratio": 1.0}, {"start_layer": 3}, {"start_layer": 40}])
def test_without_anything_to_merge_it_is_the_stock_model(settings: dict[str, Any]) -> None:
    model = tiny_model()
    ids, mask = tiny_prompts(60, 43)
    stock = generate(model, ids, mask)
    with compress(model, MiniCache(**settings)):
        assert torch.equal(generate(model, ids, mask), stock)


def test_which_layers_pair() -> None:
    def paired(count: int, **settings: Any) -> list[int]:
        stores = finish(layers(count), **settings)
        return [layer for layer, store in enumerate(stores) if isinstance(store, PairedStore)]

    assert paired(8) == [3, 4, 5, 6]
    assert paired(7) == [2, 3, 4, 5]
    assert paired(8, start_layer=1) == list(range(8))
    assert paired(8, start_layer=7) == [6, 7]
    assert paired(8, start_layer=8) == []
    assert paired(1) == []
    assert paired(2) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_pair(dtype: torch.dtype) -> None:
    full = layers(tokens=100, dtype=dtype)
    pair = finish(full, retention_ratio=0.05)
    number = dtype.itemsize
    shared = HEADS * 100 * (DIM + 2) * number
    retained = HEADS * 5 * (2 * DIM * number + 4)
    limit = HEADS * 4
    assert sum(store.nbytes() for store in pair) == 2 * (shared + retained + limit)
    assert sum(store.nbytes() for store in pair) < 0.8 * sum(store.nbytes() for store in full)


def test_every_tensor_counts_once() -> None:
    pair = finish(layers(), retention_ratio=0.2)
    for position in range(TOKENS, TOKENS + 40):
        assert sum(each.untyped_storage().nbytes() for each in tensors(pair).values()) == sum(s.nbytes() for s in pair)
        step(pair, [held(each) for each in layers(tokens=1, seed=position)], position)
    pair[0].append(entries(1), entries(1), TOKENS + 40)
    assert sum(each.nbytes for each in tensors(pair).values()) <= sum(store.nbytes() for store in pair)
    room = 2 * 2 * HEADS * (2 * DIM + 2) * 20 * 4
    assert sum(store.nbytes() for store in pair) < sum(store.nbytes() for store in layers(tokens=TOKENS + 40)) + room


@pytest.mark.parametrize("settings", [{"retention_ratio": 0.2}, {"retention_threshold": 0.3}])
def test_decoding_is_a_slow_obvious_loop(settings: dict[str, Any]) -> None:
    full = layers()
    pair = finish(full, **settings)
    whole = [[tensor.clone() for tensor in held(store)] for store in full]
    expected = [[tensor.clone() for tensor in held(store)] for store in pair]
    limits = []
    for part in (0, 1):
        distance = torch.stack([angles(*both) for both in zip(whole[0][part], whole[1][part], strict=True)])
        if "retention_threshold" in settings:
            limits.append([max(head) - 0.3 * (max(head) - min(head)) for head in distance.tolist()])
        else:
            limits.append([sorted(head)[-8] for head in distance.tolist()])
    position, kinds = TOKENS, set()
    for tokens in (1, 1, 5, 1, 30, 1):  # questions of several tokens come in between
        new = [held(each) for each in layers(tokens=tokens, seed=100 + position)]
        step(pair, new, position)
        for part in (0, 1):
            sides = [new[side][part].clone() for side in (0, 1)]
            for head in range(HEADS):
                for token in range(tokens):
                    low, up = (side[head, token].clone() for side in sides)
                    angle = torch.acos((low @ up) / low.norm() / up.norm())
                    kinds.add(retained := bool(angle > limits[part][head]))
                    if not retained:
                        e = torch.sin(0.4 * angle) * low / low.norm() + torch.sin(0.6 * angle) * up / up.norm()
                        e /= e.norm()
                        sides[0][head, token], sides[1][head, token] = e * low.norm(), e * up.norm()
            for side in (0, 1):
                expected[side][part] = torch.cat([expected[side][part], sides[side]], 1)
        position += tokens
        for store, both in zip(pair, expected, strict=True):
            assert store.lengths() == [position] * HEADS
            for got, wanted in zip(held(store), both, strict=True):
                torch.testing.assert_close(got, wanted)
    assert kinds == {True, False}


def angles(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.acos((lower * upper).sum(-1) / lower.norm(dim=-1) / upper.norm(dim=-1))


def test_the_lower_layer_waits_for_the_upper() -> None:
    pair = finish(layers(), retention_ratio=0.0)
    keys, values = entries(1, seed=5), entries(1, seed=6)
    pair[0].append(keys, values, TOKENS)
    pair[0].observe(None)
    assert torch.equal(held(pair[0])[0][:, -1:], keys)
    assert [store.lengths()[0] for store in pair] == [TOKENS + 1, TOKENS]
    pair[1].append(-keys.roll(1, -1), values, TOKENS)
    pair[1].observe(None)
    assert not torch.equal(held(pair[0])[0][:, -1:], keys)


def test_forks_are_pairs_of_their_own() -> None:
    trunk = finish(layers(), retention_ratio=0.2)
    step(trunk, [held(each) for each in layers(tokens=3, seed=50)], TOKENS)
    before = [[x.clone() for x in held(store)] for store in trunk]
    branches = [[store.fork() for store in trunk] for _ in range(3)]
    grandchild = [store.fork() for store in branches[0]]
    new = [[held(each) for each in layers(tokens=2, seed=60 + number)] for number in range(5)]
    alone = finish(layers(), retention_ratio=0.2)
    step(alone, [held(each) for each in layers(tokens=3, seed=50)], TOKENS)
    for number, branch in enumerate([*branches, grandchild]):
        step(branch, new[number], TOKENS + 3)
    for store, both in zip(trunk, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(held(store), both, strict=True))
    step(trunk, new[4], TOKENS + 3)
    for number, branch in enumerate([*branches, grandchild, trunk]):
        fresh = [store.fork() for store in alone]
        step(fresh, new[number], TOKENS + 3)
        for store, other in zip(branch, fresh, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(held(store), held(other), strict=True))


def test_a_fork_while_the_lower_layer_waits() -> None:
    trunk = finish(layers())
    trunk[0].append(entries(1, seed=5), entries(1, seed=6), TOKENS)
    branch = [store.fork() for store in trunk]
    branch[1].append(entries(1, seed=7), entries(1, seed=8), TOKENS)
    branch[1].observe(None)
    assert [store.lengths()[0] for store in (*trunk, *branch)] == [TOKENS + 1, TOKENS, TOKENS + 1, TOKENS + 1]


def test_a_question_of_several_tokens_decodes() -> None:
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(60)
    sequence = engine.prefill(ids[0], [MiniCache()])[0]
    engine.decode([engine.extend(sequence, ids[0, :9].tolist())], 5)
    assert {length for store in sequence.cache.stores for length in store.lengths()} == {sequence.cache.seen}


@pytest.mark.parametrize(
    "settings",
    [
        {"interpolation": 1.1},
        {"retention_ratio": 0.1, "retention_threshold": 0.1},
        {"retention_ratio": -0.1},
        {"retention_threshold": 2.0},
        {"start_layer": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        MiniCache(**settings)


class TestMiniCacheContract(MethodContract):
    evicts = False

    def make(self, budget: int) -> Method:
        return MiniCache(retention_ratio=1.0 if budget >= 500 else budget / 200)


class TestMiniCacheByThreshold(MethodContract):
    evicts = False

    def make(self, budget: int) -> Method:
        return MiniCache(retention_ratio=1.0) if budget >= 500 else MiniCache(retention_threshold=0.05)
