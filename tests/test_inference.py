"""Models arranged for inference: what they compute, and that every way of computing it agrees."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from kvfactory import Engine, compiled, load_method
from kvfactory.inference import FEW, MANY, SideBySide, StepFeedForward, StepLinear, StepNorm, for_inference
from kvfactory.testing import tiny_model, tiny_prompts

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("threads")
with_numba = pytest.mark.skipif(not compiled.is_installed(), reason="numba is not installed")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "mixtral"])
def test_a_model_for_inference_computes_what_it_did_before(family: str) -> None:
    (ids,), _ = tiny_prompts(40)
    for dtype in DTYPES:
        model = deepcopy(tiny_model(family, dtype=dtype))
        with torch.no_grad():
            before = model(ids[None]).logits
            assert for_inference(model) is model
            assert torch.equal(model(ids[None]).logits, before)
        arranged = [type(each) for each in model.modules()]
        assert (StepLinear in arranged) == (dtype == torch.bfloat16)
        assert (StepFeedForward in arranged) == (dtype == torch.bfloat16 and family != "mixtral")
        assert len(Engine(model).decode(Engine(model).prefill(ids, [load_method("fullkv")]), 3)[0]) == 3


@given(
    tokens=st.sampled_from([1, 2, FEW, FEW + 1, 40, MANY]),
    inputs=st.sampled_from([32, 96, 40]),
    outputs=st.lists(st.sampled_from([4, 21, 1]), min_size=1, max_size=3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers_side_by_side_give_what_each_gives(
    tokens: int, inputs: int, outputs: list[int], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linears = [nn.Linear(inputs, each, bias=bias).bfloat16() for each in outputs]
    x = torch.randn(tokens, 1, inputs).bfloat16()
    with torch.no_grad():
        before = [each(x) for each in linears]
        exact = [nn.functional.linear(x.double(), each.weight.double(), None) for each in linears]
        if bias:
            exact = [each + linear.bias.double() for each, linear in zip(exact, linears, strict=True)]
        ours = SideBySide(*linears)(x)
        for each, linear, same, right in zip(ours, linears, before, exact, strict=True):
            assert torch.equal(linear(x), same), "its weight is the same in another place"
            assert tokens <= FEW or torch.equal(each, same)
            torch.testing.assert_close(each.double(), right, rtol=2**-8, atol=1e-6)


@with_numba
def test_what_is_no_number_stays_none_and_what_is_infinite_stays_so() -> None:
    linear, x = nn.Linear(32, 4, bias=False).bfloat16(), torch.ones(2, 1, 32).bfloat16()
    x[0, 0, 3], x[1, 0, 3] = torch.nan, torch.inf
    linear.weight.data[:, 3] = torch.tensor([1.0, 2.0, -1.0, -2.0])
    assert SideBySide(linear).few is not None
    (ours,) = SideBySide(linear)(x)
    assert ours[0].isnan().all()
    assert ours[1, 0].tolist() == [torch.inf, torch.inf, -torch.inf, -torch.inf]


@with_numba
@pytest.mark.parametrize("kind", [LlamaMLP, MistralMLP, Qwen2MLP])
def test_a_feed_forward_of_few_tokens_is_the_models_own(kind: type[Any]) -> None:
    own = kind(feed_forward_config("silu")).bfloat16()
    assert StepFeedForward.fits(own)
    step = StepFeedForward(own)
    with torch.no_grad():
        for scale in (0.1, 3, 300):  # of the last, sigmoids are 0 and 1
            x = (scale * torch.randn(FEW, 1, 64)).bfloat16()
            ours, theirs = step(x), own(x)
            assert (ours != theirs).float().mean() < 0.2, "another order of sums is not often seen"
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-8 * float(theirs.abs().max()))
            many = (scale * torch.randn(FEW + 1, 1, 64)).bfloat16()
            assert torch.equal(step(many), own(many)), "of more tokens it is the same to the bit"


def feed_forward_config(activation: str, **changes: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=64, intermediate_size=160, hidden_act=activation, **changes)


def test_what_is_no_such_feed_forward_is_left_as_it_is() -> None:
    other = LlamaMLP(feed_forward_config("gelu"))
    biased = LlamaMLP(feed_forward_config("silu", mlp_bias=True))
    assert not any(StepFeedForward.fits(each.bfloat16()) for each in (other, biased, nn.Linear(4, 4)))


def test_weights_are_there_once_until_many_rows_step_together() -> None:
    """And those of queries, keys and values are parts of one."""
    (ids,), _ = tiny_prompts(MANY)
    engine = Engine(for_inference(deepcopy(tiny_model(dtype=torch.bfloat16))))
    sides = [each for each in engine.model.modules() if isinstance(each, SideBySide)]
    methods = [load_method("fullkv")] * (FEW + 1)
    rows = engine.prefill(ids, methods)
    engine.decode(rows[:1], 3)
    assert any(each.holds_twice for each in sides) != compiled.is_installed()
    engine.decode(rows, 3)
    assert any(each.holds_twice for each in sides)
    attention = engine.model.model.layers[0].self_attn
    weight = attention.query_key_value.weight
    assert attention.q_proj.linear.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(weight[-len(attention.v_proj.linear.weight) :], attention.v_proj.linear.weight)


@with_numba
@pytest.mark.parametrize("norm", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, MixtralRMSNorm])
@pytest.mark.parametrize("size", [64, 576])
def test_norms_of_single_tokens_are_the_models_own(norm: type[Any], size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    own = norm(size, eps=1e-5).to(torch.bfloat16)
    own.weight.data = torch.randn(size, generator=generator).to(torch.bfloat16)
    assert StepNorm.fits(own)
    step, x = StepNorm(own), (3 * torch.randn(500, 1, size, generator=generator)).to(torch.bfloat16)
    x[0], x[1, 0, 3] = 0, torch.nan
    ours, theirs = step(x), own(x)
    assert (ours != theirs)[2:].float().mean() < 1e-3, "another order of sums is seldom seen"
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0, equal_nan=True)
    assert torch.equal(step(x[2:].transpose(0, 1)), own(x[2:].transpose(0, 1))), "prompts get the model's own"


def test_what_is_no_such_norm_is_left_as_it_is() -> None:
    others = [CohereLayerNorm(64), LlamaRMSNorm(63), torch.nn.LayerNorm(64), LlamaRMSNorm(64)]
    assert not any(StepNorm.fits(each.to(torch.bfloat16)) for each in others[:-1])
    assert not StepNorm.fits(others[-1].float())
