"""A model that is run and never trained: what a CPU takes less time for than for the modules as they came, same results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from .compiled import has_numba

FEW = 4
"""Tokens for which reading a weight takes longer than multiplying: compiled loops read it once, where it lies."""
MANY = 1024
"""Tokens for which putting a weight into another order is little beside multiplying."""
ROWS = 32
"""Rows that weights are laid out for: those of a decode step. The layout is as good for hundreds of tokens."""
NORM_RUN = 64
"""A norm has a multiple of so many numbers to be compiled, which works on so many together."""
INPUTS, OUTPUTS = 32, 4
"""A weight has a multiple of so many inputs, and so many outputs at least, to be multiplied by compiled loops."""
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
"""What attention modules call the layers that read what is attended from."""


class SideBySide(nn.Module):
    """Linear layers that read the same numbers, as one of all their outputs where that takes less time than one by one."""

    def __init__(self, *linears: nn.Linear) -> None:
        """Either all have a bias or none has; their weights become parts of one."""
        super().__init__()
        self._linears = linears  # a tuple, whose modules belong to others
        self.sizes = [each.out_features for each in linears]
        self.weight = _joined([each.weight for each in linears])
        self.bias = None if linears[0].bias is None else _joined([each.bias for each in linears])
        self.few = None
        if has_loops(self.weight):
            from .numba_linear import Multiplier  # late: nobody else waits for its import

            self.few = Multiplier(self.weight, self.bias)
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """[..., in_features] -> [..., out_features] of each."""
        tokens = x.shape[:-1].numel()
        if tokens >= MANY:
            return [each(x) for each in self._linears]
        if tokens <= FEW and self.few is not None:
            whole = self.few(x)
        else:
            whole = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return [whole] if len(self.sizes) == 1 else whole.split_with_sizes(self.sizes, -1)

    @property
    def holds_twice(self) -> bool:
        """Whether its weight is there once more, as `packed`."""
        return self._packed is not None

    @property
    def packed(self) -> Tensor:
        """The weight in the order in which plain layers put it at every call; made when it is first asked for."""
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)
        return self._packed


def _joined(parts: list[Tensor]) -> Tensor:
    """Parameters [outputs of each, ...] behind each other, of which each becomes a part."""
    whole = parts[0].detach() if len(parts) == 1 else torch.cat([each.detach() for each in parts])
    for own, part in zip(parts, whole.split([len(each) for each in parts]), strict=True):
        own.data = part
    return whole


def has_loops(weight: Tensor) -> bool:
    """Whether compiled loops multiply by such a weight [outputs, inputs]."""
    outputs, inputs = weight.shape
    return has_numba(weight.device) and outputs >= OUTPUTS and inputs % INPUTS == 0


class StepLinear(nn.Module):
    """A linear layer, see `SideBySide`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.side = linear, SideBySide(linear)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.side(x)[0]


class StepFeedForward(nn.Module):
    """The gated feed-forward of a layer, which is one call for a few tokens and two products for a step of many rows."""

    def __init__(self, module: Any) -> None:
        """A module that `fits`."""
        super().__init__()
        self.own = module
        self.gate_and_up, self.down = SideBySide(module.gate_proj, module.up_proj), SideBySide(module.down_proj)
        self.few = None
        if self.gate_and_up.few is not None and self.down.few is not None:
            from .numba_linear import GatedMultiplier

            self.few = GatedMultiplier(module.gate_proj.weight, module.up_proj.weight, self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size], shaped and typed alike."""
        tokens = x.shape[:-1].numel()
        if tokens <= FEW and self.few is not None:
            return self.few(x)
        if tokens < MANY:
            gate, up = self.gate_and_up(x)
            return self.down(silu(gate) * up)[0]
        return self.own(x)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module is such a feed-forward without biases: it is asked what it makes of some numbers."""
        linears: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if any(type(each) is not nn.Linear or each.bias is not None for each in linears):
            return False
        gate, up, down = linears
        some = torch.linspace(-3, 5, gate.in_features).to(gate.weight.dtype)[None]
        return torch.equal(down(silu(gate(some)) * up(some)), module(some))


class StepNorm(nn.Module):
    """A root mean square norm that is one call where each row is a single token; prompts get the model's own.

    A step's squares are summed in another order than the model's, which in bfloat16 is seldom seen in the last bit.
    """

    def __init__(self, norm: Any) -> None:
        """A module with `weight` [hidden_size] and `variance_epsilon`."""
        from .numba_norms import Normaliser  # late: nobody else waits for its import

        super().__init__()
        self.norm = norm
        self.of_tokens = Normaliser(norm.weight.detach(), norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, tokens, hidden_size], shaped and typed alike."""
        output: Tensor = self.of_tokens(x) if x.shape[-2] == 1 else self.norm(x)
        return output

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module is such a norm, in bfloat16: it is asked what it makes of some numbers."""
        weight = getattr(module, "weight", None)
        if not hasattr(module, "variance_epsilon") or weight is None or weight.dtype != torch.bfloat16:
            return False
        if weight.dim() != 1 or len(weight) % NORM_RUN or not has_numba(weight.device):
            return False
        some = torch.linspace(-3, 5, len(weight)).to(weight.dtype)[None, None]
        return torch.allclose(cls(module)(some).float(), module(some).float(), rtol=2**-7)


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, arranged for steps if it is on a CPU and in bfloat16; elsewhere as it came.

    What it computes of a prompt of more than `FEW` tokens stays the same, bit for bit; sums of fewer have another order. It
    is not to be trained or copied any more. Once it has had between `FEW` and `MANY` tokens, its weights are there twice.
    """
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        with torch.no_grad():
            _arrange(model)
    return model


def _arrange(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        projections: list[Any] = [getattr(child, each, None) for each in QUERY_KEY_VALUE]
        if all(
            type(each) is nn.Linear and (each.bias is None) == (projections[0].bias is None) for each in projections
        ):
            child.query_key_value = SideBySide(*projections)
        if type(child) is nn.Linear:
            setattr(parent, name, StepLinear(child))
        elif StepFeedForward.fits(child):
            setattr(parent, name, StepFeedForward(child))
        elif StepNorm.fits(child):
            setattr(parent, name, StepNorm(child))
        else:
            _arrange(child)
