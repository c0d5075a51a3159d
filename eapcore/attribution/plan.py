"""The memory that a batch will need, before anything is allocated, and the sizes of batch and chunk that follow.

The plan is a dry run: `score_batch` itself, on tensors of the meta device, which have shapes and no memory, while what
it allocates and frees is added up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eapcore.kernels as kernels
from eapcore.attribution.dense import DenseStore
from eapcore.attribution.factored import FactoredStore, factored_sizes, senders_before
from eapcore.attribution.methods import Passes
from eapcore.attribution.score_batch import score_batch
from eapcore.attribution.statistics import ARRAYS
from eapcore.attribution.sums import Store, Sums
from eapcore.execution.batch import Batch
from eapcore.execution.limits import LEAST_CHUNK, limits
from eapcore.execution.memory import budget
from eapcore.graph.graph import Graph
from eapcore.kernels.checks import FLOATS, short_repr
from eapcore.kernels.dry_run import dry_run
from eapcore.models.config import ModelConfig
from eapcore.models.families.names import assemble
from eapcore.models.model import Model
from eapcore.tasks.metrics import MetricBatch
from eapcore.tasks.pairs import PromptPairs

ONE_GRADIENT = Passes()


class _Memory(TorchDispatchMode):
    """What is allocated and not yet freed, and the most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known: set[int] = set()
        self.now = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, so that torch need not keep its compiler out at every call."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _made(func, args)
        if out is None:
            out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key in self.held and self.held[key][0].expired():  # the address is used again
                    self.now -= self.held.pop(key)[1]
                if key not in self.held and key not in self.known:
                    self.held[key] = (StorageWeakRef(storage), storage.nbytes())
                    self.now += storage.nbytes()
        wide = (kwargs or {}).get("dtype")
        inside = 0  # a sum in another dtype converts all of it first
        if func is torch.ops.aten.sum.dim_IntList and wide is not None and wide != args[0].dtype:
            inside = args[0].numel() * wide.itemsize
        if self.now + inside > self.peak:  # unless something was freed since
            self.sweep()
            self.peak = max(self.peak, self.now + inside)
        return out

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """What is there before."""
        self.known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def sweep(self) -> None:
        """Forget what was freed."""
        for key in [key for key, (storage, _) in self.held.items() if storage.expired()]:
            self.now -= self.held.pop(key)[1]


def _broadcast(x: torch.Size, y: torch.Size) -> list[int] | torch.Size:
    if x == y:
        return x
    long, short = (x, y) if len(x) >= len(y) else (y, x)
    start = len(long) - len(short)
    return [*long[:start], *(b if a == 1 else a for a, b in zip(long[start:], short, strict=True))]


def _layer_norm(x: Tensor, shape: list[int], *_: Any) -> tuple[Tensor, ...]:
    statistics = [x.new_empty((*x.shape[: -len(shape)], *[1] * len(shape))) for _ in range(2)]
    return x.new_empty(x.shape), *statistics


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    *_, wanted = rest
    return tuple(
        grad.new_empty(size) if want else None for want, size in zip(wanted, (x.shape, shape, shape), strict=True)
    )


_aten = torch.ops.aten
_MADE: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.gelu.default, _aten.silu.default), lambda x: x.new_empty(x.shape)),
    **dict.fromkeys(
        (_aten.gelu_backward.default, _aten.silu_backward.default, _aten._softmax_backward_data.default),
        lambda grad, x, *_: grad.new_empty(x.shape),
    ),
    **dict.fromkeys(
        (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor),
        lambda x, y: x.new_empty(_broadcast(x.shape, y.shape) if isinstance(y, Tensor) else x.shape),
    ),
    _aten.addmm.default: lambda bias, x, y: x.new_empty((len(x), y.shape[1])),
    _aten.bmm.default: lambda x, y: x.new_empty((len(x), x.shape[1], y.shape[2])),
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
}


def _made(func: Any, args: tuple[Any, ...]) -> Any:
    """What an operation makes of contiguous tensors of one dtype, without torch's own finding it: that is written in
    Python for these and would take most of the dry run's time. None for any other operation or kind of tensors."""
    make = _MADE.get(func)
    if make is None:
        return None
    dtype = args[0].dtype
    if dtype not in (torch.float32, torch.float64):
        return None
    for x in args:
        if isinstance(x, Tensor) and not (x.dtype == dtype and x.is_contiguous()):
            return None
    return make(*args)


class _Attention(TorchFunctionMode):
    """Scaled dot-product attention makes its result alone: no device's kernel keeps the pattern."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def dense_bytes(
    config: ModelConfig,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    impl: str = "auto",
    groups: int = 1,
    passes: Passes = ONE_GRADIENT,
    together: int = 1,
) -> int:
    """Peak bytes that `attribute` allocates for one batch in dense mode, the model's own weights not counted.

        S'·B·T·D + S·B·D             the sender buffer, S' the senders before the last layer
        (L−1)·B·T·(2D + 3HK + M)     what the backward pass needs of every layer; the last is read at one position alone

    and the largest of what comes and goes: the layer at hand, the logits, one layer's receivers of some pairs at a time
    and the kernels' workspace (`kernels.workspace_bytes`). It is counted by running the same code without memory.
    Prompts are taken to differ from their first token on. Scores of every pair that are the result, [N, S, R], are not
    a batch's and not counted.

    Args:
        config: the model's sizes, with as many tokens in the vocabulary as the metric reads for a pair.
        batch, tokens, dtype, device, impl: of the batch and where it runs; C++ takes memory for each of torch's
            threads.
        groups: channel groups of a layer: 3 where a checkpoint stores q, k and v apart, 0 where each head as well.
        passes: of another method than one gradient at the clean run; `together` of them run as one batch.

    Raises:
        ValueError: sizes that are no positive integers, or another dtype than float64, float32, bfloat16 and float16.
        RuntimeError: the named implementation cannot run here.
    """
    if not isinstance(config, ModelConfig):
        raise ValueError(f"config must be a ModelConfig, as model.config is, got a {type(config).__name__}")
    for name, size in (("batch", batch), ("tokens", tokens), ("together", together)):
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= _MOST:
            raise ValueError(f"{name} must be an integer from 1 to {_MOST}, got {short_repr(size)}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {short_repr(dtype)}")
    return Plan(config, dtype, torch.device(device), impl, groups, passes).dense(batch, tokens, together)


_MOST = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What the memory of batches depends on besides their size.

    config: the model's sizes, with as many tokens in the vocabulary as the metric reads for a pair. groups: channel
    groups of a layer. passes: a method's.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    impl: str = "auto"
    groups: int = 1
    passes: Passes = ONE_GRADIENT

    def dense(self, batch: int, tokens: int, together: int = 1) -> int:
        """Peak bytes of a dense batch; see `dense_bytes`."""
        return self._dry_run(batch, tokens, "dense", together)[0] + self._throughout(tokens)

    def factored(self, batch: int, tokens: int, chunk: int | None = None) -> int:
        """Peak bytes of a factored batch: about 10·L·B·T·D numbers, and the workspace of contracting them in chunks of
        so many token rows, None for as many as are fast."""
        rest, before = self._dry_run(batch, tokens, "factored")
        return max(rest, before + self._chunk_bytes(batch, tokens, chunk)) + self._throughout(tokens)

    def peak(self, batch: int, tokens: int, storage: str, together: int = 1) -> int:
        """Peak bytes of a batch without what is there throughout, nor the contraction of factors."""
        return self._dry_run(batch, tokens, storage, together)[0]

    def scores_bytes(self, batch: int, tokens: int) -> int:
        """Bytes of a batch's scores, and of what is there throughout."""
        return 8 * self._scores(batch, tokens) + self._throughout(tokens)

    def storage(self, pairs: PromptPairs, within: int | None = None) -> str:
        """ "dense" where a quarter of the batch that is useful fits, or "factored" saves nothing, else "factored".

        within: bytes, None for a share of those that are free.
        """
        if kernels.choose("edge_scores_factored", device=self.device, dtype=self.dtype) == "reference":
            return "dense"
        tokens, within = int(pairs.lengths.max()), budget(self.device) if within is None else within
        wanted = max(1, min(self.useful(tokens), len(pairs)) // 4)
        fits = self._surely_fits(wanted, tokens, within) or self.dense(wanted, tokens) <= within
        return "dense" if fits else "factored"

    def batch_size(self, pairs: PromptPairs, storage: str = "dense", within: int | None = None) -> int:
        """Pairs a batch: enough tokens to be fast, within a share of the free memory or so many bytes, at least one.

        In factored mode a batch that is over that with a workspace larger than all else takes a smaller `chunk` before
        it is made smaller itself.
        """
        tokens, within = int(pairs.lengths.max()), budget(self.device) if within is None else within
        sizes = range(1, min(self.useful(tokens), len(pairs)) + 1)
        if self._surely_fits(sizes[-1], tokens, within):
            return sizes[-1]

        def needed(n: int) -> int:
            if storage == "dense":
                return self.dense(n, tokens)
            return self.factored(n, tokens, self.chunk(n, tokens, within))

        return max(1, most_that_fits(needed, sizes[-1], within))

    def chunk(self, batch: int, tokens: int, budget: int) -> int:
        """Token rows a chunk of the contraction of factors: as many as are fast, or fewer to keep within a budget.

        A chunk reads all weights once, so it is halved only as long as the plan is over the budget and the workspace is
        the larger part of it, a chunk of half the size saves a quarter of the workspace, and 16 rows are left. Beyond
        that a smaller batch saves more for the time that it costs.
        """
        where: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "impl": self.impl}
        rows = min(kernels.fast_chunk(factored_sizes(self.config, batch, tokens), **where), max(1, batch * tokens))
        if self._surely_fits(batch, tokens, budget):
            return rows
        before = self._dry_run(batch, tokens, "factored")[1] + self._throughout(tokens)
        workspace = self._chunk_bytes(batch, tokens, rows)
        while before + workspace > budget and workspace > before and rows >= 2 * LEAST_CHUNK:
            half = self._chunk_bytes(batch, tokens, rows // 2)
            if 4 * half > 3 * workspace:
                break
            rows, workspace = rows // 2, half
        return rows

    def steps_together(self, batch: int, tokens: int, steps: int, budget: int) -> int:
        """How many of some steps run as one batch of so many times its pairs: few tokens, and within a budget."""
        useful = limits(self.device).step_tokens // (batch * tokens)
        most = min(useful, steps)
        if useful < 4 or most <= 1:  # each alone has tokens enough
            return 1
        if self._surely_fits(most * batch, tokens, budget):
            return most
        return 1 + bisect_right(range(2, most + 1), budget, key=lambda n: self.dense(batch, tokens, n))

    def useful(self, tokens: int) -> int:
        """Pairs of a batch that is large enough to be fast."""
        return max(1, limits(self.device).batch_tokens // tokens)

    def _surely_fits(self, batch: int, tokens: int, budget: int) -> bool:
        """Whether a bound that is several times too large is within budget, so that nobody needs to look closer."""
        c, graph, rows = self.config, self.config.graph, batch * tokens
        layer = 12 * c.d_model + 12 * c.n_heads * c.d_head + 8 * (c.d_mlp or 0)
        numbers = rows * (2 * graph.n_senders * c.d_model + (2 + len(self.passes.passes)) * c.n_layers * layer)
        numbers += batch * (64 * c.n_logits + 16 * c.n_heads * tokens**2) + 6 * self._scores(batch, tokens)
        return 8 * numbers + (1 << 29) <= budget  # with what the ops take besides

    def _throughout(self, tokens: int) -> int:
        """What is there from the first batch to the last: the sum over batches, float64, and the masks of the edges."""
        graph = self.config.graph
        each = {"all": 1, "pair": 0, "position": tokens}[self._reduce]
        each += 1 + ARRAYS if self.passes.statistics else 0
        return (8 * each + 2) * graph.n_senders * graph.n_receivers

    def _scores(self, batch: int, tokens: int) -> int:
        """How many scores a batch has."""
        each = {"all": 1, "pair": batch, "position": tokens}[self._reduce]
        each += batch if self.passes.statistics and self._reduce == "position" else 0
        return each * self.config.graph.n_senders * self.config.graph.n_receivers

    @property
    def _reduce(self) -> str:
        return "pair" if self.passes.absolute else self.passes.reduce

    def _chunk_bytes(self, batch: int, tokens: int, chunk: int | None) -> int:
        """What contracting in chunks takes besides the factors: its workspace and the scores."""
        how: dict[str, Any] = {
            "dtype": self.dtype,
            "device": self.device,
            "impl": self.impl,
        }
        # Nearly all edges are contracted at all positions, the rest at one.
        sizes = [factored_sizes(self.config, batch, positions) for positions in (tokens, 1)]
        how["chunk"] = chunk or kernels.fast_chunk(sizes[0], **how)
        masks = _edge_masks(self.config.graph)
        befores = [senders_before(self.config.graph, at_read) for at_read in (False, True)]
        workspaces = [
            kernels.workspace_bytes("edge_scores_factored", size, mask=mask, before=before, reduce=reduce, **how)
            for size, mask, before in zip(sizes, masks, befores, strict=True)
            for reduce in {self._reduce, "pair" if self.passes.statistics else self._reduce}
        ]
        return max(workspaces) + self._scores(batch, tokens) * max(self.dtype.itemsize, 4)

    def _dry_run(self, batch: int, tokens: int, storage: str, together: int = 1) -> tuple[int, int]:
        """Peak bytes of a batch without the contraction of factors, and those that are there when it begins."""
        return _run_dry(self, batch, tokens, storage, together, torch.get_num_threads())


def most_that_fits(needed: Callable[[int], int], most: int, within: int) -> int:
    """The largest number up to `most` for which what is needed, which grows with it and nearly as it, is within bounds;
    0 for none. Each is asked along the line between those that are known, every third in their middle."""
    low, at_low, high, at_high = 0, 0, most, needed(most)
    if at_high <= within:
        return most
    tries = 0
    while high - low > 1:
        tries += 1
        guess = low + (within - at_low) * (high - low) // (at_high - at_low) if tries % 3 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        found = needed(guess)
        if found <= within:
            low, at_low = guess, found
        else:
            high, at_high = guess, found
    return low


@lru_cache(maxsize=4096)
def _run_dry(plan: Plan, batch: int, tokens: int, storage: str, together: int, threads: int) -> tuple[int, int]:
    """`Plan._dry_run`; threads: which the ops' workspace depends on."""
    model, memory, contracting = model_without_memory(plan.config, plan.dtype, plan.groups), _Memory(), [0]

    def begins() -> None:
        memory.sweep()
        contracting.append(memory.now)

    memory.ignore([tensor for _, tensor in model.weights.named()])
    memory.ignore([tensor for pair in model.closed_forms for tensor in pair])
    with _Attention():
        run_dry(plan, model, batch, tokens, storage, together, memory, begins)
    return memory.peak, max(contracting)


def run_dry(
    plan: Plan,
    model: Model,
    batch: int,
    tokens: int,
    storage: str,
    together: int,
    watch: TorchDispatchMode,
    begins: Callable[[], None] = lambda: None,
    ran: Callable[..., None] = lambda op, *tensors: None,
) -> None:
    """Score a batch of a model without memory, in which `watch` sees every operation of torch.

    begins: called where the contraction of factors makes its workspace. ran: called with the name of one of the
    kernels' ops and the tensors that it would read and write.
    """
    with torch.device("meta"):
        prompts, ids = torch.empty(batch, tokens, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
        answers = torch.empty(batch, 1, dtype=torch.int64)
    what = Batch(PromptPairs(prompts, prompts, ids, ids, answers, answers), ids, 0, tokens)

    def metric(logits: Tensor, batch: MetricBatch) -> Tensor:
        return logits.sum(-1) if plan.passes.metric is None else plan.passes.metric(logits, batch)

    count = plan.passes.grouped(lambda alike: max(1, min(together, alike)))
    with dry_run(plan.device, begins, ran), watch:
        shapes = {"scores": (model.graph.n_senders, model.graph.n_receivers)}
        passes = replace(plan.passes, exact=_one_of_each(model, plan.passes.exact))
        if passes.spread:
            shapes["spread"] = shapes["scores"]
        apart = {"absolute": passes.absolute, "by_sender": passes.by_sender}
        apart["pairs"] = passes.statistics and passes.reduce == "position"
        sums = Sums(shapes, what, passes.reduce, plan.impl, **apart)
        store: Store
        if storage == "dense":
            kept = any(step.exact_softmax for step in passes.passes)
            store = DenseStore(model, what, DenseStore.room(model, what), plan.device, apart=kept)
        else:
            store = FactoredStore(model, what)
        score_batch(model, what, metric, store, sums, passes, count)


@lru_cache(maxsize=16)
def model_without_memory(config: ModelConfig, dtype: torch.dtype, groups: int) -> Model:
    """A model of these sizes without memory."""
    return Model(config, assemble(config, dict(_shapes(config, dtype, groups))))


def _one_of_each(model: Model, receivers: tuple[int, ...]) -> tuple[int, ...]:
    """One of the exact receivers of each kind: the others take no more memory."""
    names = model.graph.receiver_names
    return tuple({names[r][-3:] if "<" in names[r] else names[r]: r for r in receivers}.values())


def _shapes(config: ModelConfig, dtype: torch.dtype, groups: int) -> Iterator[tuple[str, Tensor]]:
    D, H, K, M, V = config.d_model, config.n_heads, config.d_head, config.d_mlp or 0, config.d_vocab
    each, make = H + 2 * config.n_kv, partial(torch.empty, dtype=dtype, device="meta")
    yield from (
        ("w_e", make(V, D)),
        ("w_pos", make(config.n_ctx, D)),
        ("w_u", make(D, config.n_logits)),
        ("ln_final.0", make(D)),
    )
    yield "ln_final.1", make(D)
    for index in range(config.n_layers):
        at = f"layers.{index}."
        parts = [each] if groups == 1 else [H, config.n_kv, config.n_kv]
        for part, count in enumerate(parts):
            places = {0: ((count, D, K), (0, 1, 2)), 1: ((D, count, K), (1, 0, 2)), 3: ((count, K, D), (0, 2, 1))}
            shape, order = places[groups]
            yield f"{at}w_qkv.{part}", make(*shape).permute(order)
        yield from ((at + "b_qkv", make(each, K)), (at + "w_o", make(H, K, D)), (at + "b_o", make(D)))
        normed = (H * K, config.n_kv * K) if config.qk_norm_joint else (K, K)
        yield from ((f"{at}{x}_norm.0", make(size)) for x, size in zip("qk", normed, strict=True))
        for ln in ("ln1", "ln2"):
            yield from ((f"{at}{ln}.0", make(D)), (f"{at}{ln}.1", make(D)))
        yield from (
            (at + "w_in", make(D, M)),
            (at + "b_in", make(M)),
            (at + "w_out", make(M, D)),
            (at + "b_out", make(D)),
        )
        if config.post_norms:
            yield from ((at + "post_a.0", make(D)), (at + "post_m.0", make(D)))
        if config.gated:
            yield at + "w_up", make(D, M)


@lru_cache(maxsize=1)
def _edge_masks(graph: Graph) -> tuple[Tensor, Tensor]:
    return graph.edge_masks()
