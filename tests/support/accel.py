"""A device "accel" for tests without a GPU: it computes on hidden CPU tensors, and is as strict as CUDA.

Every tensor on it is an `AccelTensor`. An op that gets tensors of two devices raises, but for numbers and for indices,
as on CUDA; what makes the host wait for a device is counted by name. `on_accel` is to be active whenever ops run.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self):
        return False  # to all that looks for an accelerator by itself, in other tests of this process


class _Module(backend_registration._DummyBackendModule):
    def is_available(self):
        return False


backend_registration._setup_privateuseone_for_python_backend("accel", backend_module=_Module(), hook=_Hook())
DEVICE = torch.device("accel", 0)
aten = torch.ops.aten

MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# How large their result is, or what it is, has to be known on the host.
WAITS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


class AccelTensor(torch.Tensor):
    """A tensor on the device. raw: the CPU tensor with its numbers; a view of the one is a view of the other."""

    @staticmethod
    def __new__(cls, raw):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
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


class on_accel(TorchDispatchMode):
    """While it is active the device is there. waits: how often the host waited for it, by op."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, AccelTensor)]
        device = kwargs.get("device")
        if func is aten.copy_.default:
            stays = isinstance(args[0], AccelTensor)
        else:
            stays = bool(here) if device is None else torch.device(device).type == DEVICE.type
        if not here and not stays:
            return func(*args, **kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # the attention that is made of other ops
        mixed = [args[0], *args[2:]] if func in INDEXED else tensors
        away = [x for x in mixed if isinstance(x, torch.Tensor) and not isinstance(x, AccelTensor) and x.ndim]
        if here and away and func not in MOVES:
            raise RuntimeError(f"{func} got tensors on {DEVICE} and {list(away[0].shape)} on {away[0].device}")
        masks = func in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITS or masks or (func in MOVES and here and not stays):
            self.waits[str(func)] += 1
        raw, own = tree_map_only(AccelTensor, lambda x: x.raw, (args, kwargs)), {id(x.raw): x for x in here}
        result = func(*raw[0], **(raw[1] | ({} if device is None else {"device": "cpu"})))
        if not stays:
            return result
        return tree_map_only(torch.Tensor, lambda x: own[id(x)] if id(x) in own else AccelTensor(x), result)


# Below the dispatch mode: the index that torch itself makes of a list of Python numbers.
_below = torch.library.Library("aten", "IMPL")
_below.impl(
    "empty_strided",
    lambda size, stride, dtype=None, **options: AccelTensor(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)
_below.impl("copy_", lambda to, source, non_blocking=False: (to.raw.copy_(source), to)[1], "PrivateUse1")
