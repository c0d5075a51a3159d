"""The MLP: forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eapcore.models.activations import LayerSaved, accumulate_dtype
from eapcore.models.backward_rules import GRADIENT, Rules
from eapcore.models.config import ModelConfig
from eapcore.models.matmul import product
from eapcore.models.model import Model
from eapcore.models.norm import norm_grad
from eapcore.models.weights import LayerWeights

APPROXIMATE = {"gelu_new": "tanh", "gelu": "none"}


def activation(name: str, hidden: Tensor) -> Tensor:
    return F.relu(hidden) if name == "relu" else F.gelu(hidden, approximate=APPROXIMATE[name])


def run_mlp(config: ModelConfig, layer: LayerWeights, n: Tensor) -> tuple[Tensor, Tensor]:
    """What the MLP sends [B, T, D] and its hidden units before the activation function [B, T, M]."""
    assert layer.w_in is not None and layer.b_in is not None and config.act_fn is not None
    assert layer.w_out is not None and layer.b_out is not None
    hidden = product(n, layer.w_in, layer.b_in)
    return product(activation(config.act_fn, hidden), layer.w_out, layer.b_out), hidden


def activation_grad(name: str, grad: Tensor, hidden: Tensor, rule: str = "gradient") -> Tensor:
    """grad = ∂metric/∂act(hidden) taken through the activation function to ∂metric/∂hidden."""
    if name == "relu":
        return grad * (hidden > 0)  # relu(h)/h and its derivative are the same
    if rule == "gradient":
        return torch.ops.aten.gelu_backward(grad, hidden, approximate=APPROXIMATE[name])
    wide = hidden.to(accumulate_dtype(hidden.dtype))
    # act(h)/h without the division, which has no value at h = 0.
    if APPROXIMATE[name] == "none":
        share = torch.special.ndtr(wide)
    else:
        share = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    return grad * share.to(grad.dtype)


def units_grad(layer: LayerWeights, total: Tensor) -> Tensor:
    """The gradient [B, Q, M] of the MLP's hidden units behind the activation, from that behind the layer [B, Q, D]."""
    assert layer.w_out is not None
    return product(total, layer.w_out.T)


def mlp_receiver_grad(model: Model, index: int, run: LayerSaved, units: Tensor, rules: Rules = GRADIENT) -> Tensor:
    """The residual-stream gradient of a layer's MLP receiver, [B, Q, D], from that of its hidden units [B, Q, M]."""
    layer, act_fn = model.weights.layers[index], model.config.act_fn
    assert layer.w_in is not None and act_fn is not None
    assert run.hidden is not None and run.mlp_in is not None
    d_hidden = activation_grad(act_fn, units, run.hidden, rules.activation)
    return norm_grad(product(d_hidden, layer.w_in.T), layer.ln2, run.mlp_in, rules.norm)
