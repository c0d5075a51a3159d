"""Weights of a module in memory: whether they are its own still, and what was converted or gathered from them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALL = 1 << 16  # numbers of a tensor that is made anew every time, rather than when its state is another


@dataclass(slots=True)
class _Link:
    """A tensor of ours and the module's tensors that it is a view of, or that `make` makes it of; state: theirs."""

    ours: Tensor
    names: Sequence[str]
    make: Callable[..., Tensor]
    shared: bool
    state: tuple[Any, ...]


@dataclass(slots=True)
class Links:
    """What a model's weights have to do with the module that they were loaded from."""

    module: weakref.ref[nn.Module]
    links: list[_Link] = field(default_factory=list)

    def add(self, ours: Tensor, names: Sequence[str], parts: Sequence[Tensor], make: Callable[..., Tensor]) -> None:
        """ours: what `make` makes of the module's tensors of these names, a view of them or a copy."""
        found = [self._find(name) for name in names]
        if all(x is not None and x.data_ptr() == part.data_ptr() for x, part in zip(found, parts, strict=True)):
            shared = _storage(ours) == _storage(parts[0])
            self.links.append(_Link(ours, tuple(names), make, shared, () if shared else tensors_state(parts)))

    def _find(self, name: str) -> Tensor | None:
        found = reduce(lambda at, part: getattr(at, part, None), name.split("."), self.module())
        return found.detach() if isinstance(found, Tensor) else None

    def __reduce__(self) -> tuple[Callable[..., None], tuple[()]]:
        """In another process there is no such module: None."""
        return _no_links, ()

    def follow(self) -> None:
        """Make what was copied as the module's tensors are now.

        Raises:
            ValueError: the module has other tensors now than those that the model shares.
        """
        if self.module() is None:  # nobody changes its weights any more, but through our own tensors
            return
        for link in self.links:
            parts = [self._find(name) for name in link.names]
            there = [part for part in parts if part is not None]
            if len(there) < len(parts) or (link.shared and _storage(there[0]) != _storage(link.ours)):
                raise ValueError(
                    f"{link.names[0]} is another tensor now than when the model was loaded, as after .to(), .half() or "
                    "load_state_dict(assign=True): load the model again, or write into the tensors in place"
                )
            if link.shared:
                continue
            state = tensors_state(there)
            if state != link.state or link.ours.numel() < _SMALL:
                with torch.inference_mode(link.ours.is_inference()), torch.no_grad():
                    made = link.make(*there)
                    if not torch.equal(made, link.ours):
                        link.ours.copy_(made)
                link.state = state


def _no_links() -> None:
    return None


def tensors_state(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """What tells whether somebody wrote into tensors: their addresses, versions, and what the bits of each add up to
    along each row, as a write through `.data`, numpy or another library changes no version."""
    found: list[Any] = []
    sums: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in tensors:
        found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
        bits = tensor.detach().view(_BITS[tensor.itemsize])
        if bits.ndim:
            bits = bits.sum(min(range(bits.ndim), key=bits.stride), dtype=bits.dtype)
        sums.setdefault((bits.device, bits.dtype), []).append(bits.flatten())
    return (*found, *(hash(torch.cat(each).cpu().numpy().tobytes()) for each in sums.values()))  # one wait for all


def _storage(tensor: Tensor) -> int:
    return tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size()
