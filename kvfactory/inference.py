"""A model that is run and never trained: its weights in the order in which a CPU reads them, and its norms in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .compiled import has_numba

ROWS = 32
"""Rows that weights are laid out for: those of a decode step. The layout is as good for the thousands of a prompt."""
NORM_RUN = 64
"""A norm has a multiple of so many numbers to be compiled, which works on so many together."""


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's own layout, which plain layers put their weights in anew at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return output


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
        if weight.dim() != 1 or len(weight) % NORM_RUN:
            return False
        some = torch.linspace(-3, 5, len(weight)).to(weight.dtype)[None, None]
        return torch.allclose(cls(module)(some).float(), module(some).float(), rtol=2**-7)


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its linear layers packed if it is on a CPU and in bfloat16; elsewhere as it came.

    What it computes of a prompt stays the same, bit for bit, and of a single token but for what `StepNorm` says. It can be
    neither trained nor copied nor saved any more. Weights that the input and output embeddings share are there twice.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return model
    with torch.no_grad():
        for parent in [*model.modules()]:
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, PackedLinear(child))
                elif has_numba(model.device) and StepNorm.fits(child):
                    setattr(parent, name, StepNorm(child))
    return model
