"""What compute-sanitizer would look for on a GPU, looked for in Triton's interpreter, where no GPU is needed.

`Sanitizer` runs every launch, and raises a `Fault` where a kernel

* loads or stores outside of the argument whose pointer it started from: beyond its memory, or in it but between the
  elements of the view that it was given (memcheck; the interpreter reads whatever is there);
* stores to an argument that is no output;
* stores where another program of the launch stores or loads, loads where another stores, loads what it has stored
  itself, stores over what another of its threads has loaded, or stores twice to one place at once (racecheck): no
  program waits for another, and a program's threads wait for one another at no load or store;
* loads what nobody wrote (initcheck): what is allocated without a value holds one that nothing computes, as does what a
  mask hides from a load that says nothing in its place;
* adds atomically, in an order that no two runs share;
* describes a tensor to TMA as the hardware does not take it;
* claims an alignment that is not there, or makes a number that its type does not hold.

Programs run in any order that is wanted: results have the same bits in all of them. `tl.maximum` and `tl.minimum` of
NaN and a number are the number, as on a GPU.

`Virtual` runs of each launch a few programs, and of each loop a few rounds, on tensors without memory: the same checks
of addresses and numbers, at sizes that no memory here would hold.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import operator
import pkgutil
import random
import zlib
from dataclasses import dataclass
from typing import Any
from unittest import mock

import eapcore.kernels
import numpy as np
import torch
import triton.language as tl
from eapcore.kernels import triton_common as common
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

# The arguments that each kernel writes; all others it reads.
WRITES = {
    "partial_scores": {"out"},
    "sum_splits": {"out"},
    "zero_non_edges": {"out"},
    "channel_grads": {"out"},
    "tile_grads": {"out"},
    "channel_sums": {"sums"},
    "attend_rows": {"z"},
    "query_grads": {"dq", "dk", "dv", "rows_made", "receiver_sums"},
    "key_grads": {"dk", "dv", "receiver_sums"},
    "normalise_rows": {"n", "mean", "rstd"},
    "standardise_rows": {"out"},
    "normalise_grad_rows": {"out", "summed", "narrow"},
    "unit_rows": {"units"},
    "gated_grads": {"of_hidden", "of_up"},
    "turn_rows": {"out"},
    "sum_rows": {"out", "kept", "n", "mean", "rstd"},
}
# What is allocated without a value is filled with: NaN where there is one, and nothing that arithmetic gives.
POISON = {
    torch.float16: 0x7DA5,
    torch.bfloat16: 0x7FA5,
    torch.float32: 0x7FA5A5A5,
    torch.float64: 0x7FF5A5A5A5A5A5A5,
    torch.int32: 0x7FA5A5A5,
    torch.int64: 0x7FF5A5A5A5A5A5A5,
}
_PATTERN = {str(getattr(tl, str(dtype).removeprefix("torch."))): value for dtype, value in POISON.items()}
NOBODY, SEVERAL = -1, -2
# What a GPU's grid may have along its first axis; kernels here have no other.
MOST_PROGRAMS = 2**31 - 1


class Fault(AssertionError):
    """What a kernel does that a GPU would not forgive, in one sentence."""


class Memory:
    """A storage of a launch's arguments: who loaded and who stored each of its units, as numbers of programs."""

    def __init__(self, storage: Any, base: int, nbytes: int):
        self.storage, self.base, self.nbytes, self.unit, self.written = storage, base, nbytes, 16, False
        self.loaded = self.lanes = self.stored = np.empty(0, np.int32)

    def watch(self) -> None:
        """Follow what is loaded and stored here, which one argument at least is written to."""
        count = self.nbytes // self.unit
        self.loaded, self.lanes, self.stored = (np.full(count, NOBODY, np.int32) for _ in range(3))
        self.written = True


@functools.lru_cache(maxsize=4096)
def _axes(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], int]:
    """Strides and sizes by which an element's offset is told from that of none, and the last element's offset.

    No axes where every offset up to the last is an element's, or where elements share memory.
    """
    if 0 in shape:
        return (), -1
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    merged: list[tuple[int, int]] = []
    for step, n in sorted((step, n) for n, step in zip(shape, stride, strict=True) if n > 1 and step > 0):
        if merged and merged[-1][0] * merged[-1][1] == step:
            merged[-1] = merged[-1][0], merged[-1][1] * n
        elif merged and step < merged[-1][0] * merged[-1][1]:
            return (), last
        else:
            merged.append((step, n))
    dense = not merged or (len(merged) == 1 and merged[0][0] == 1)
    return () if dense else tuple(reversed(merged)), last


@dataclass(eq=False, slots=True)
class View:
    """An argument of a launch."""

    name: str
    address: int
    itemsize: int
    described: str
    axes: tuple[tuple[int, int], ...]
    last: int
    writable: bool
    memory: Memory


class Traced(tl.pointer_type):
    """A pointer's type that knows the argument that it began at: the interpreter hands it on to what is made of it."""

    def __init__(self, like: tl.pointer_type, view: View):
        super().__init__(like.element_ty, like.address_space, like.const)
        self.view = view


class Sanitizer:
    """See the module.

    order: of programs, "natural", "reversed" or "random". writes: `WRITES` of further kernels. on: a GPU whose tilings
    and splits are taken; none for those of the interpreter. digests: after each launch that of what it may write is
    appended. launches: kernels' names and how many programs they had.
    """

    def __init__(
        self, order: str = "natural", *, writes: dict[str, set[str]] | None = None, on: common.Target | None = None,
        digests: list[int] | None = None,
    ):  # fmt: skip
        self.order, self.writes, self.on, self.digests = order, WRITES | (writes or {}), on, digests
        self.launches: list[tuple[str, int]] = []
        self.kernel, self.converting = "", None
        self.programs, self.random = 0, random.Random(0)
        self.views: list[View] = []

    def __enter__(self) -> Sanitizer:
        builder, this, inner = interpreter.InterpreterBuilder, self, contextlib.ExitStack()
        load, store, cast = builder.create_masked_load, builder.create_masked_store, builder.cast_impl
        describe, set_attr = builder.create_make_tensor_descriptor, interpreter.TensorHandle.set_attr

        class Executor(interpreter.GridExecutor):
            def __call__(self, *args: Any, **named: Any) -> None:
                this.launch(self, args, named)

        def create_masked_load(builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **more: Any) -> Any:
            this.touch("load", ptrs, mask)
            # The interpreter takes a zero in the place of one element for nothing.
            said_nothing = other is None and np.size(ptrs.data) > 1
            beside = hidden(ptrs) if said_nothing else other
            return this.loaded(ptrs, mask, lambda: load(builder, ptrs, mask, beside, *rest, **more))

        def create_masked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
            this.touch("store", ptrs, mask)
            this.keep(lambda: store(builder, ptrs, value, mask, *rest))

        def create_atomic(builder: Any, *args: Any) -> None:
            this.say("adds atomically, in an order that no two runs share")

        def cast_impl(builder: Any, src: Any, dst_type: Any) -> Any:
            made = cast(builder, src, dst_type)
            this.held(src, dst_type.scalar, made)
            return made

        def create_make_tensor_descriptor(
            builder: Any, base: Any, shape: Any, strides: Any, block: Any, *rest: Any
        ) -> Any:
            view = getattr(base.dtype, "view", this.converting)
            sizes, steps = ([int(np.asarray(x.data).item()) for x in xs] for xs in (shape, strides))
            this.describable(view, int(np.asarray(base.data).item()), sizes, steps, list(block))
            return describe(builder, pointer(view, base.dtype), shape, strides, block, *rest)

        def attribute(handle: Any, name: str, values: Any) -> None:
            if name == "tt.divisibility" and np.size(handle.data) == 1 and int(np.max(handle.data)) % max(values):
                this.say(f"claims that {int(np.max(handle.data))} is a multiple of {max(values)}")
            set_attr(handle, name, values)

        def fmax(builder: Any, a: Any, b: Any) -> Any:
            return builder.binary_op(a, b, np.fmax)

        def fmin(builder: Any, a: Any, b: Any) -> Any:
            return builder.binary_op(a, b, np.fmin)

        for owner, name, new in (
            (interpreter, "GridExecutor", Executor),
            (builder, "create_maxnumf", fmax),
            (builder, "create_minnumf", fmin),
            (builder, "create_masked_load", create_masked_load),
            (builder, "create_masked_store", create_masked_store),
            (builder, "create_atomic_rmw", create_atomic),
            (builder, "create_atomic_cas", create_atomic),
            (builder, "cast_impl", cast_impl),
            (builder, "create_make_tensor_descriptor", create_make_tensor_descriptor),
            (interpreter.TensorHandle, "set_attr", attribute),
        ):
            inner.enter_context(mock.patch.object(owner, name, new))
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
            for name in names:
                inner.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name))))
        if self.on is not None:
            for name, new in (("target", lambda device: self.on), ("interpreted", lambda: False), ("launch", _launch)):
                inner.enter_context(mock.patch.object(common, name, new))
        self.inner = inner
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.close()

    def say(self, what: str) -> None:
        place = interpreter.interpreter_builder.grid_idx[0]
        raise Fault(f"{self.kernel}, program {place} of {self.programs}: {what}")

    def launch(self, executor: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """One launch in the interpreter, on the tensors themselves."""
        fn, builder = executor.fn, interpreter.interpreter_builder
        names = set(executor.arg_names)
        bound = inspect.getcallargs(fn, *args, **{k: v for k, v in named.items() if k in names})
        (self.programs,) = executor.grid
        self.kernel = fn.__name__
        self.launches.append((self.kernel, self.programs))
        builder.set_grid_dim(self.programs, 1, 1)
        builder.grid_idx = (0, 0, 0)
        if not 0 < self.programs <= MOST_PROGRAMS:
            self.say("is launched with a number of programs that no grid has")
        self.memories: dict[int, Memory] = {}
        self.views = []
        given = {k: v if k in executor.constexprs else self.convert(k, v) for k, v in bound.items()}
        for view in self.views:
            view.memory.unit = math.gcd(view.memory.unit, view.itemsize)
        for view in self.views:
            if view.writable and not view.memory.written:
                self.watch(view.memory)
        scope = interpreter._patch_lang(fn)
        try:
            for program in self.chosen(self.programs):
                builder.set_grid_idx(program, 0, 0)
                fn(**given)
            if self.digests is not None:
                of_bytes = [memory.storage for memory in self.memories.values() if memory.written]
                self.digests += [zlib.crc32(torch.tensor([], dtype=torch.uint8).set_(x).numpy()) for x in of_bytes]
        except Exception as error:
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            if isinstance(root, Fault):
                raise root from None
            if isinstance(root, OverflowError | AssertionError):
                raise Fault(f"{self.kernel}, program {builder.grid_idx[0]} of {self.programs}: {root}") from error
            raise
        finally:
            scope.restore()

    def chosen(self, programs: int) -> list[int]:
        """Which programs run, in which order."""
        order = list(range(programs))
        if self.order == "random":
            self.random.shuffle(order)
        return order[::-1] if self.order == "reversed" else order

    def place(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        """Addresses of a tensor and of its storage, and the storage's bytes."""
        storage = tensor.untyped_storage()
        return tensor.data_ptr(), storage.data_ptr(), storage.nbytes()

    def watch(self, memory: Memory) -> None:
        memory.watch()

    def convert(self, name: str, value: Any) -> Any:
        """An argument as the kernel takes it."""
        described = isinstance(value, TensorDescriptor)
        tensor = value.base if described else value
        if not isinstance(tensor, torch.Tensor):
            return interpreter._implicit_cvt(value)
        address, base, nbytes = self.place(tensor)
        memory = self.memories.setdefault(base, Memory(tensor.untyped_storage(), base, nbytes))
        text = f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        view = View(
            name, address, tensor.itemsize, text, *_axes(tuple(tensor.shape), tensor.stride()),
            name in self.writes.get(self.kernel, ()), memory,
        )  # fmt: skip
        self.views.append(view)
        self.converting = view
        made = interpreter._implicit_cvt(value)
        if not described:
            made.handle = pointer(view, made.handle.dtype)
        return made

    def touch(self, does: str, ptrs: Any, mask: Any) -> None:
        """Check one load or store, and remember it where others could meet it."""
        view: View | None = getattr(ptrs.dtype, "view", None)
        if view is None:
            self.say(f"{does}s through a pointer that is no argument's")
        assert view is not None
        lanes = np.flatnonzero(mask.data)
        if not lanes.size:
            return
        whole = lanes.size == np.size(mask.data)
        addresses = np.ravel(ptrs.data) if whole else np.ravel(ptrs.data)[lanes]
        offset = (addresses - np.uint64(view.address)).astype(np.int64)
        at = offset // view.itemsize
        if does == "store" and not view.writable:
            self.say(f"stores to {view.described}, which is no output of its")
        if (at * view.itemsize != offset).any():
            self.say(f"{does}s between the first bytes of two elements of {view.described}")
        if at.min() < 0 or at.max() > view.last:
            self.outside(does, view, at[(at < 0) | (at > view.last)])
        rest = at
        for step, size in view.axes:
            rest = rest - np.minimum(rest // step, size - 1) * step
        if view.axes and rest.any():
            self.outside(does, view, at[rest > 0])
        if view.memory.written:
            self.meet(does, view, offset, lanes, np.shape(mask.data))

    def outside(self, does: str, view: View, at: Any) -> None:
        """Name the first offset that is no element's."""
        first = int(at[0])
        address = view.address + first * view.itemsize
        beyond = not view.memory.base <= address < view.memory.base + view.memory.nbytes
        where = "beyond its memory" if beyond else "in its memory, but no element of what it was given"
        self.say(f"{does}s {first} elements behind the first of {view.described}, {where}")

    def meet(self, does: str, view: View, offset: Any, lanes: Any, shape: tuple[int, ...]) -> None:
        """Other programs, and other threads of this one, at the same places of memory that is written."""
        memory, program = view.memory, interpreter.interpreter_builder.grid_idx[0]
        at = (offset + (view.address - memory.base)) // memory.unit
        parts = view.itemsize // memory.unit
        # Equal numbers of elements in blocks of different shapes are not the same threads'.
        lanes = (lanes * 61 + hash(shape) % 61).astype(np.int32)
        if parts > 1:
            at, lanes = (at[:, None] + np.arange(parts)).ravel(), np.repeat(lanes, parts)
        stored = memory.stored[at]
        if does == "load":
            if ((stored != NOBODY) & (stored != program)).any():
                other = stored[(stored != NOBODY) & (stored != program)][0]
                self.say(f"loads of {view.described} what program {other} stores in the same launch")
            if (stored == program).any():
                self.say(f"loads of {view.described} what it has stored itself, which its threads do not wait for")
            loaded, before = memory.loaded[at], memory.lanes[at]
            here = loaded == program
            memory.loaded[at] = np.where(here | (loaded == NOBODY), program, SEVERAL)
            memory.lanes[at] = np.where(here & (before != lanes), SEVERAL, lanes)
            memory.lanes[at[memory.lanes[at] != lanes]] = SEVERAL  # of a place that is named twice the last remains
            return
        if ((stored != NOBODY) & (stored != program)).any():
            other = stored[(stored != NOBODY) & (stored != program)][0]
            self.say(f"stores to {view.described} where program {other} stores too")
        loaded = memory.loaded[at]
        if ((loaded != NOBODY) & (loaded != program)).any():
            self.say(f"stores to {view.described} what another program loads in the same launch")
        if ((loaded == program) & (memory.lanes[at] != lanes)).any():
            self.say(f"stores to {view.described} over what another of its threads has loaded")
        memory.stored[at], memory.lanes[at] = program, lanes
        if (memory.lanes[at] != lanes).any():
            self.say(f"stores twice to one place of {view.described} at once")

    def loaded(self, ptrs: Any, mask: Any, load: Any) -> Any:
        """What a load gives."""
        made = load()
        pattern = _PATTERN.get(str(ptrs.get_element_ty()))
        if pattern is not None:
            found = (made.data.view(f"u{made.data.itemsize}") == pattern) & mask.data
            if found.any():
                self.say(f"loads of {ptrs.dtype.view.described} what nobody has written")
        return made

    def keep(self, store: Any) -> None:
        store()

    def held(self, src: Any, to: Any, made: Any) -> None:
        """Whether a number is the same in an integer type that is shorter, or that floats are cut to."""
        source = src.dtype.scalar
        if not to.is_int() or to.int_bitwidth == 1 or isinstance(source, tl.pointer_type):
            return
        if source.is_int():
            lost = source.int_bitwidth > to.int_bitwidth and (made.data != src.data).any()
        else:
            wide = np.asarray(src.data, np.float64)
            lost = not (np.abs(wide) < 2.0 ** (to.int_bitwidth - 1)).all()
        if lost:
            self.say(f"casts to {to} what it does not hold")

    def describable(self, view: View, address: int, shape: list[int], strides: list[int], block: list[int]) -> None:
        """What cuda.h asks of cuTensorMapEncodeTiled, and that what is described is there."""
        size, text = view.itemsize, f"describes {view.described} to TMA"
        if not 1 <= len(shape) <= 5:
            self.say(f"{text} with {len(shape)} axes, of which there may be 1 to 5")
        if address % 16:
            self.say(f"{text}, which starts at no multiple of 16 bytes")
        if any(n * size % 16 or not 0 <= n * size < 2**40 for n in strides[:-1]) or strides[-1] != 1:
            self.say(
                f"{text} with strides {strides}, which must be multiples of 16 bytes, 1 the last, below 2^40 bytes"
            )
        if not all(0 < n < 2**31 for n in shape):
            self.say(f"{text} with sizes {shape}, of which none may be 0 or need more than 31 bits")
        if not all(0 < n <= 256 for n in block):
            self.say(f"{text} in blocks {block}, of which none may pass 256")
        if block[-1] * size % 16:
            self.say(f"{text} in rows of {block[-1] * size} bytes, which must be multiples of 16")
        axes, last = _axes(tuple(shape), tuple(strides))
        end = view.memory.base + view.memory.nbytes
        if address + (last + 1) * size > end:
            self.say(f"{text} as {shape} with strides {strides}, which end beyond its memory")
        if (axes, last) != (view.axes, view.last):
            self.say(f"{text} as {shape} with strides {strides}, which are not its elements")


class Virtual(Sanitizer):
    """Launches of which nothing is computed, on tensors of device "meta".

    values: what loads from arguments of some names give, 0 from all others.
    """

    def __init__(self, values: dict[str, int] | None = None, **how: Any):
        super().__init__(**how)
        self.values = values or {}
        self.storages: dict[int, tuple[Any, int]] = {}

    def __enter__(self) -> Virtual:
        super().__enter__()
        builder = interpreter.InterpreterBuilder
        for name, new in (
            ("create_dot", lambda builder, a, b, d, *rest: d),
            ("create_exp", lambda builder, x: x),
            ("create_log", lambda builder, x: x),
            ("create_erf", lambda builder, x: x),
        ):
            self.inner.enter_context(mock.patch.object(builder, name, new))
        return self

    def launch(self, executor: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        around = executor.fn.__globals__
        around["range"] = few
        try:
            with np.errstate(all="ignore"):
                super().launch(executor, args, named)
        finally:
            del around["range"]

    def chosen(self, programs: int) -> list[int]:
        return sorted({0, programs - 1, *(self.random.randrange(programs) for _ in range(2))})

    def place(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        storage = tensor.untyped_storage()
        # Addresses of their own, as far apart as no storage is large; the storage is kept, so that its number is.
        _, base = self.storages.setdefault(storage._cdata, (storage, (1 + len(self.storages)) << 50))
        return base + tensor.storage_offset() * tensor.itemsize, base, storage.nbytes()

    def watch(self, memory: Memory) -> None:
        """The programs that run are too few to meet."""

    def loaded(self, ptrs: Any, mask: Any, load: Any) -> Any:
        kind = interpreter._get_np_dtype(ptrs.get_element_ty())
        value = np.full(np.shape(ptrs.data), self.values.get(ptrs.dtype.view.name, 0), kind)
        return interpreter.TensorHandle(value, ptrs.get_element_ty())

    def keep(self, store: Any) -> None:
        """Nothing is there to keep it."""


def few(*bounds: Any) -> Any:
    """`range`, the first and the last number of it, as numbers of the kernel's: its addresses lie between."""
    every = range(*map(operator.index, bounds))
    some = every if len(every) < 3 else (every[0], every[-1])
    return [interpreter.interpreter_semantic.to_tensor(n) for n in some]


def _launch(kernel: Any, programs: int, *args: Any, device: torch.device, **meta: Any) -> None:
    kernel[(programs,)](*args, **meta)


def pointer(view: View, like: Any) -> Any:
    """A pointer to an argument's first element."""
    return interpreter.TensorHandle(np.array([view.address], np.uint64), Traced(like, view))


def hidden(ptrs: Any) -> Any:
    """What a load gives where it is masked and nothing else is said: on a GPU, anything."""
    kind = interpreter._get_np_dtype(ptrs.get_element_ty())
    pattern = _PATTERN.get(str(ptrs.get_element_ty()), 0xA5)
    made = np.full(np.shape(ptrs.data), pattern, f"u{kind.itemsize}").view(kind)
    return interpreter.TensorHandle(made, ptrs.get_element_ty())


def _poisoned(allocate: Any) -> Any:
    """An allocation without a value, of which it shows that nobody wrote one."""

    @functools.wraps(allocate)
    def allocated(*args: Any, **named: Any) -> Any:
        made = allocate(*args, **named)
        if type(made) is torch.Tensor and made.device.type == "cpu" and made.dtype in POISON and made.numel():
            kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[made.itemsize]
            torch.tensor([], dtype=kind).set_(made.untyped_storage()).fill_(POISON[made.dtype])
        return made

    return allocated


def written(*tensors: torch.Tensor) -> None:
    """Raise a Fault if an element of a result is as it was allocated."""
    for tensor in tensors:
        pattern = POISON[tensor.dtype]
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
        left = int((tensor.contiguous().view(kind) == pattern).sum())
        if left:
            raise Fault(f"{left} of {tensor.numel()} elements of a result were never written")


def kernels() -> dict[str, Any]:
    """All kernels of kernels/ by name: those functions of Triton's that no other of them calls."""
    found = [module.name for module in pkgutil.iter_modules(eapcore.kernels.__path__) if "triton_" in module.name]
    made = {
        name: value
        for module in found
        for name, value in vars(importlib.import_module(f"eapcore.kernels.{module}")).items()
        if isinstance(value, interpreter.InterpretedFunction)
    }
    called = {name for value in made.values() for name in value.fn.__code__.co_names}
    return {name: value for name, value in made.items() if name not in called}
