"""What a model is: its dimensions and conventions, by TransformerLens's names."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eapcore.graph.graph import Graph
from eapcore.models.rotary import Rotary

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
NORMALIZATIONS = ("layernorm", "rmsnorm", None)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Dimensions and conventions of a decoder-only transformer, by TransformerLens's names.

    d_mlp and act_fn are None for an attention-only model. normalization is "layernorm", "rmsnorm" or None (absent);
    attn_scale divides the attention scores, in layer l also by l + 1 with scale_attn_by_inverse_layer_idx. parallel: a
    layer's MLP reads the stream that its heads read. rotary_frequencies: radians a position of the pairs of dimensions
    of each head that are turned, see `rotary.Rotary`.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    n_ctx: int
    act_fn: str | None
    attn_scale: float
    normalization: str | None = "layernorm"
    eps: float = 1e-5
    scale_attn_by_inverse_layer_idx: bool = False
    parallel: bool = False
    rotary_frequencies: tuple[float, ...] = ()
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if (self.d_mlp is None) != (self.act_fn is None):
            raise ValueError(f"d_mlp and act_fn go together, got d_mlp={self.d_mlp!r}, act_fn={self.act_fn!r}")
        if self.act_fn is not None and self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn must be one of {', '.join(ACTIVATIONS)}, got {self.act_fn!r}")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be 'layernorm', 'rmsnorm' or None, got {self.normalization!r}")

    @property
    def attn_only(self) -> bool:
        return self.d_mlp is None

    @property
    def graph(self) -> Graph:
        """The senders, receivers and edges of a model of these dimensions."""
        return Graph(self.n_layers, self.n_heads, not self.attn_only, self.parallel)

    def score_scale(self, layer: int) -> float:
        """What multiplies q·k in a layer."""
        return 1.0 / (self.attn_scale * (layer + 1 if self.scale_attn_by_inverse_layer_idx else 1))

    def rotary(self) -> Rotary | None:
        """What turns queries and keys."""
        if not self.rotary_frequencies:
            return None
        return Rotary(torch.tensor(self.rotary_frequencies, dtype=torch.float64, device="cpu"))
