"""A model that is run and never trained: its weights in the order in which a CPU reads them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS = 32
"""Rows that weights are laid out for: those of a decode step. The layout is as good for the thousands of a prompt."""


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


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its linear layers packed if it is on a CPU and in bfloat16; elsewhere as it came.

    What it computes stays the same, bit for bit, but it can be neither trained nor copied nor saved any more. Weights that
    the input and output embeddings share are there twice.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return model
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    return model
