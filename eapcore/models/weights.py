"""A model's weights in the one layout that the forward and the backward read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from torch import Tensor

_HASH_BYTES = 1 << 24  # a strided view of a large matrix is copied this much at a time


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights; any of them may be a strided view of a checkpoint's own tensor.

    w_qkv: channel groups [C_i, D, K] that together are the q heads, the k heads and the v heads in that order: one
    group where a checkpoint stores them as one matrix, three where it stores three. b_qkv: [3H, K]. w_o: [H, K, D].
    b_o: [D]. ln1, ln2: (γ, β), each [D], None without LayerNorm. w_in: [D, M]. b_in: [M]. w_out: [M, D]. b_out: [D].
    """

    w_qkv: tuple[Annotated[Tensor, "C' D K"], ...]
    b_qkv: Annotated[Tensor, "3H K"]
    w_o: Annotated[Tensor, "H K D"]
    b_o: Annotated[Tensor, "D"]
    ln1: tuple[Annotated[Tensor, "D"], Annotated[Tensor, "D"]] | None = None
    ln2: tuple[Annotated[Tensor, "D"], Annotated[Tensor, "D"]] | None = None
    w_in: Annotated[Tensor, "D M"] | None = None
    b_in: Annotated[Tensor, "M"] | None = None
    w_out: Annotated[Tensor, "M D"] | None = None
    b_out: Annotated[Tensor, "D"] | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model. w_e: [V, D]. w_pos: [n_ctx, D]. w_u: [D, V], a view of w_e where the head is tied.

    b_u: [V] or None. ln_final: (γ, β), None without LayerNorm.
    """

    w_e: Annotated[Tensor, "V D"]
    w_pos: Annotated[Tensor, "n_ctx D"]
    layers: tuple[LayerWeights, ...]
    w_u: Annotated[Tensor, "D V"]
    b_u: Annotated[Tensor, "V"] | None = None
    ln_final: tuple[Annotated[Tensor, "D"], Annotated[Tensor, "D"]] | None = None

    def named(self) -> Iterator[tuple[str, Annotated[Tensor, "..."]]]:
        """Every tensor with its name here, in a fixed order."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "layers":
                yield from _named(field.name, value)
                continue
            for index, layer in enumerate(self.layers):
                for inner in fields(layer):
                    yield from _named(f"layers.{index}.{inner.name}", getattr(layer, inner.name))

    def content_hash(self) -> str:
        """SHA-256 over names, shapes, dtypes and values, as 16 hex digits.

        It does not depend on a checkpoint's layout: channel groups are hashed as one [3H, D, K] tensor, and a tied head
        by the fact that it is tied.
        """
        digest = hashlib.sha256()
        for name, tensor in self.named():
            if name == "w_u" and tensor.data_ptr() == self.w_e.data_ptr():
                digest.update(b"w_u tied")
                continue
            group, _, index = name.partition(".w_qkv.")
            if index in ("", "0"):
                digest.update(f"{group} {tensor.dtype} {list(tensor.shape[1:])}".encode())
            for part in tensor.detach().split(max(1, _HASH_BYTES * len(tensor) // max(1, tensor.nbytes))):
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _named(name: str, value: Tensor | tuple[Tensor, ...] | None) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif value is not None:
        for index, tensor in enumerate(value):
            yield f"{name}.{index}", tensor
