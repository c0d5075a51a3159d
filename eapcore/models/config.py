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
    of each head that are turned, see `rotary.Rotary`; local_frequencies: in layers with a window, where they are
    others. gated: the MLPs' units are gated. n_key_value_heads: fewer than n_heads where queries are grouped;
    kv_grouped: a group's heads have one k and one v receiver. qk_norm: q and k are normalised, each head's own; with
    qk_norm_joint those of all heads together. windows: for each layer how many positions a query sees, None for all.
    attn_softcap, logits_softcap: s becomes cap · tanh(s / cap). embed_scale: of the tokens' embedding. post_norms:
    heads and MLPs have a norm behind them. pre_norms: they read through one. rotary_adjacent: the rotation's pairs
    are neighbours. d_vocab_out: tokens that the logits are of, where they are not all d_vocab that are read.
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
    local_frequencies: tuple[float, ...] = ()
    n_key_value_heads: int | None = None
    kv_grouped: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    attn_softcap: float | None = None
    logits_softcap: float | None = None
    embed_scale: float = 1.0
    post_norms: bool = False
    qk_norm_joint: bool = False
    pre_norms: bool = True
    rotary_adjacent: bool = False
    d_vocab_out: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.d_vocab_out is not None and self.d_vocab_out < 1:
            raise ValueError(f"d_vocab_out must be a positive integer, got {self.d_vocab_out!r}")
        if (self.d_mlp is None) != (self.act_fn is None):
            raise ValueError(f"d_mlp and act_fn go together, got d_mlp={self.d_mlp!r}, act_fn={self.act_fn!r}")
        if self.act_fn is not None and self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn must be one of {', '.join(ACTIVATIONS)}, got {self.act_fn!r}")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be 'layernorm', 'rmsnorm' or None, got {self.normalization!r}")
        if self.n_kv < 1 or self.n_heads % self.n_kv:
            raise ValueError(f"n_key_value_heads must divide n_heads {self.n_heads}, got {self.n_key_value_heads!r}")

    @property
    def n_logits(self) -> int:
        """Tokens that the logits are of."""
        return self.d_vocab if self.d_vocab_out is None else self.d_vocab_out

    @property
    def attn_only(self) -> bool:
        return self.d_mlp is None

    @property
    def n_kv(self) -> int:
        """Key and value heads of a layer."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def graph(self) -> Graph:
        """The senders, receivers and edges of a model of these dimensions."""
        n_kv = self.n_kv if self.kv_grouped and self.n_kv < self.n_heads else None
        return Graph(self.n_layers, self.n_heads, not self.attn_only, self.parallel, n_kv)

    @property
    def heads_coupled(self) -> bool:
        """Whether the heads of a layer share a norm, so that what one of them reads changes what all of them send."""
        return self.post_norms or self.qk_norm_joint

    def window(self, layer: int) -> int | None:
        """How many positions a query of a layer sees."""
        return self.windows[layer] if self.windows else None

    def score_scale(self, layer: int) -> float:
        """What multiplies q·k in a layer."""
        return 1.0 / (self.attn_scale * (layer + 1 if self.scale_attn_by_inverse_layer_idx else 1))

    def rotary(self, layer: int) -> Rotary | None:
        """What turns the queries and keys of a layer."""
        local = self.local_frequencies if self.window(layer) is not None else ()
        frequencies = local or self.rotary_frequencies
        if not frequencies:
            return None
        return Rotary(torch.tensor(frequencies, dtype=torch.float64, device="cpu"), self.rotary_adjacent)
