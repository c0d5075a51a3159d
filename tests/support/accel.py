"""Devices "accel:0", "accel:1", … for tests without a GPU: they compute on hidden CPU tensors, as strict as CUDA.

Every tensor on one is an `AccelTensor`. An op that gets tensors of two devices raises, but for numbers and for indices,
as on CUDA; what makes the host wait for a device is counted by name, and what travels from one to another in bytes.
`on_accel` is to be active whenever ops run.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self):
        return False  # to all that looks for an accelerator by itself, in other tests of this process


class _Module(backend_registration._DummyBackendModule):
    def is_available(self):
        return False


HERE = not torch.cuda.is_available()  # with a GPU torch would look for its pinned memory here
if HERE:
    backend_registration._setup_privateuseone_for_python_backend("accel", backend_module=_Module(), hook=_Hook())
CPU = torch.device("cpu")
DEVICE = torch.device("accel", 0) if HERE else CPU
aten = torch.ops.aten

MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# How large their result is, or what it is, has to be known on the host.
WAITS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


class AccelTensor(torch.Tensor):
    """A tensor on a device. raw: the CPU tensor with its numbers; a view of the one is a view of the other."""

    @staticmethod
    def __new__(cls, raw, device=DEVICE):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )
        tensor.raw = raw
        return tensor

    def data_ptr(self):
        return self.raw.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran on {DEVICE} outside on_accel")


def raw(x, here, others):
    """An op's argument as the hidden tensors that it stands for; tensors of a device join `here`, all else `others`."""
    if isinstance(x, AccelTensor):
        here.append(x)
        return x.raw
    if isinstance(x, torch.Tensor):
        others.append(x)
    elif type(x) in (list, tuple):
        return type(x)(raw(part, here, others) for part in x)
    return x


class on_accel(TorchDispatchMode):
    """While it is active the devices are there. waits: how often the host waited for one, by op. travelled: bytes that
    went from one to another, by (from, to). given: bytes that came from the host, by device's number. watch: also the
    most bytes that each held of what was made meanwhile, peaks, by its number."""

    def __init__(self, *, watch=False):
        if not HERE:
            pytest.skip("stands in for a GPU where there is none")
        super().__init__()
        self.waits, self.travelled, self.given, self.watch = Counter(), Counter(), Counter(), watch
        self.held, self.now, self.peaks = {}, Counter(), Counter()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled

    def made(self, raw, device):
        """A tensor on a device."""
        if self.watch:
            for key in [key for key, (storage, _, _) in self.held.items() if storage.expired()]:
                _, size, at = self.held.pop(key)
                self.now[at] -= size
            storage = raw.untyped_storage()
            if storage._cdata not in self.held:
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), device.index
                self.now[device.index] += storage.nbytes()
                self.peaks[device.index] = max(self.peaks[device.index], self.now[device.index])
        return AccelTensor(raw, device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here, others = [], []
        inside = raw(args, here, others), {name: raw(x, here, others) for name, x in kwargs.items()}
        device = kwargs.get("device")
        if func is aten.copy_.default:
            target = args[0].device
        elif device is None:
            target = here[0].device if here else CPU
        else:
            target = torch.device(device)
        stays = target.type == DEVICE.type
        if not here and not stays:
            return func(*args, **kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # the attention that is made of other ops
        if func in INDEXED:  # an index may lie on the CPU
            others = [x for x in (args[0], *args[2:]) if isinstance(x, torch.Tensor) and not isinstance(x, AccelTensor)]
        if here and func not in MOVES:
            apart = [x for x in here if x.device != here[0].device] + [x for x in others if x.ndim]
            if apart:
                raise RuntimeError(
                    f"{func} got tensors on {here[0].device} and {list(apart[0].shape)} on {apart[0].device}"
                )
        masks = func in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITS or masks or (func in MOVES and here and not stays):
            self.waits[str(func)] += 1
        if func in MOVES and stays:
            source = args[1] if func is aten.copy_.default else args[0]
            if isinstance(source, AccelTensor) and source.device.index != (target.index or 0):
                self.travelled[source.device.index, target.index or 0] += source.numel() * source.itemsize
            elif not isinstance(source, AccelTensor):
                self.given[target.index or 0] += source.numel() * source.itemsize
        result = func(*inside[0], **(inside[1] | ({} if device is None else {"device": "cpu"})))
        if not stays:
            return result
        return self.result(result, here, torch.device(DEVICE.type, target.index or 0))

    def result(self, x, here, device):
        """What an op returned, as tensors of a device; here: those that it was given, some of which it may return."""
        if isinstance(x, list | tuple):
            return type(x)(self.result(part, here, device) for part in x)
        if not isinstance(x, torch.Tensor):
            return x
        own = [given for given in here if given.raw is x]
        return own[0] if own else self.made(x, device)


# Below the dispatch mode: the index that torch itself makes of a list of Python numbers.
_below = torch.library.Library("aten", "IMPL")
_below.impl(
    "empty_strided",
    lambda size, stride, dtype=None, device=DEVICE, **options: AccelTensor(
        torch.empty_strided(size, stride, dtype=dtype), device
    ),
    "PrivateUse1",
)
_below.impl("copy_", lambda to, source, non_blocking=False: (to.raw.copy_(source), to)[1], "PrivateUse1")
