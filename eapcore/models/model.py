"""A configuration with its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

import eapcore.kernels as kernels
from eapcore.graph.graph import Graph
from eapcore.models.config import ModelConfig
from eapcore.models.weights import Weights


@dataclass(frozen=True)
class Model:
    """A configuration with its weights, on one device, in one dtype.

    name says where they came from, folder where their files lie (None for weights from memory).
    """

    config: ModelConfig
    weights: Weights
    name: str = "unnamed"
    folder: Path | None = None

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.config.n_layers, self.config.n_heads, not self.config.attn_only)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.w_e.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.w_e.device

    @cached_property
    def edge_masks(self) -> tuple[Annotated[Tensor, "bool S R"], Annotated[Tensor, "bool S R"]]:
        """`Graph.edge_masks` on the model's device, copied there once."""
        everywhere, at_read = self.graph.edge_masks()
        return everywhere.to(self.device), at_read.to(self.device)

    @cached_property
    def content_hash(self) -> str:
        """The weights' hash together with what changes the numbers beside them, as 16 hex digits."""
        c = self.config
        beside = f"{c.act_fn} {c.attn_scale:.9g} {c.scale_attn_by_inverse_layer_idx} {c.eps:.9g}"
        return hashlib.sha256(f"{self.weights.content_hash()} {beside}".encode()).hexdigest()[:16]

    @cached_property
    def _constants(self) -> list[tuple[Tensor, Tensor]]:
        """(Wᵀγ, b + Wᵀβ), each [3H, K], of each layer: constants of the weights in the receivers' gradients."""
        constants = []
        for layer in self.weights.layers:
            gamma, beta = layer.ln1 or (None, None)
            biases = layer.b_qkv.split([w.shape[0] for w in layer.w_qkv])
            groups = [kernels.receiver_constants(w, b, gamma, beta) for w, b in zip(layer.w_qkv, biases, strict=True)]
            constants.append((torch.cat([g for g, _ in groups]), torch.cat([o for _, o in groups])))
        return constants

    def closed_form(self, index: int, channels: slice) -> tuple[Annotated[Tensor, "C K"], Annotated[Tensor, "C K"]]:
        """(Wᵀγ, b + Wᵀβ), each [C, K], for some of a layer's q, k and v channels."""
        w_gamma, offset = self._constants[index]
        return w_gamma[channels], offset[channels]
