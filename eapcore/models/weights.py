"""A model's weights, as layers of stages of components: what every loop over a model goes through."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.graph.show import short
from eapcore.models.attention import Attention
from eapcore.models.links import tensors_state
from eapcore.models.mlp import Mlp
from eapcore.models.norm import NO_NORM, Norm

_HASH_BYTES = 1 << 24  # a strided view of a large matrix is copied this much at a time

Component = Attention | Mlp
Layer = tuple[tuple[Component, ...], ...]
"""Stages one after the other; the components of a stage read the same stream, and what they send is added behind it:
GPT-2's and Llama's ((attention,), (mlp,)), GPT-NeoX's parallel ((attention, mlp),), attention-only's
((attention,),)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model; any of them may be a strided view of a checkpoint's own tensor.

    w_e: [V, D]. w_pos: [n_ctx, D], None for other positions. w_u: [D, V], a view of w_e where the head is tied. b_u:
    [V] or None. ln_final: what the logits read through.
    """

    __repr__ = short

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in another process too, is tied where this is: its hash says so."""
        w_u = None if self._tied else self.w_u
        return _restored, (self.w_e, self.w_pos, self.layers, w_u, self.b_u, self.ln_final)

    w_e: Annotated[Tensor, "V D"]
    w_pos: Annotated[Tensor, "n_ctx D"] | None
    layers: tuple[Layer, ...]
    w_u: Annotated[Tensor, "D V"]
    b_u: Annotated[Tensor, "V"] | None = None
    ln_final: Norm = NO_NORM

    def named(self) -> Iterator[tuple[str, Annotated[Tensor, "..."]]]:
        """Every tensor with its name here, in a fixed order."""
        for name, value in self._named():
            if value is not None:
                yield name, value

    def _named(self) -> Iterator[tuple[str, Tensor | None]]:
        yield from (("w_e", self.w_e), ("w_pos", self.w_pos))
        for index, layer in enumerate(self.layers):
            at, components = f"layers.{index}", [component for stage in layer for component in stage]
            own = [list(component.named()) for component in components]
            yield from ((f"{at}.{name}", value) for name, value in own[0])
            for number, component in enumerate(components, 1):
                yield from _of_norm(f"{at}.ln{number}", component.norm)
            yield from ((f"{at}.{name}", value) for part in own[1:] for name, value in part)
        yield from (("w_u", self.w_u), ("b_u", self.b_u))
        yield from _of_norm("ln_final", self.ln_final)

    @property
    def _tied(self) -> bool:
        return self.w_u.data_ptr() == self.w_e.data_ptr()

    def state(self) -> tuple[Any, ...]:
        """What tells whether somebody wrote into the weights, see `tensors_state`."""
        return tensors_state(tensor for _, tensor in self.named())

    def content_hash(self) -> str:
        """SHA-256 over names, shapes, dtypes and values, as 16 hex digits.

        It does not depend on a checkpoint's layout: channel groups are hashed as one [3H, D, K] tensor, and a tied head
        by the fact that it is tied.
        """
        digest = hashlib.sha256()
        for name, tensor in self.named():
            if name == "w_u" and self._tied:
                digest.update(b"w_u tied")
                continue
            group, _, index = name.partition(".w_qkv.")
            if index in ("", "0"):
                digest.update(f"{group} {tensor.dtype} {list(tensor.shape[1:])}".encode())
            for part in tensor.detach().split(max(1, _HASH_BYTES * len(tensor) // max(1, tensor.nbytes))):
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _restored(w_e: Tensor, w_pos: Tensor | None, layers: tuple[Layer, ...], w_u: Tensor | None, *rest: Any) -> Weights:
    return Weights(w_e, w_pos, layers, w_e.T if w_u is None else w_u, *rest)


def _of_norm(name: str, norm: Norm) -> Iterator[tuple[str, Tensor | None]]:
    yield from ((f"{name}.0", norm.gamma), (f"{name}.1", norm.beta))
