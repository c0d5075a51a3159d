"""The memory that a batch will need, before anything is allocated, and the sizes of batch and chunk that follow."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

import eapcore.kernels as kernels
from eapcore.execution.limits import LEAST_CHUNK, limits
from eapcore.execution.memory import budget
from eapcore.graph.graph import Graph
from eapcore.models.config import ModelConfig
from eapcore.tasks.pairs import PromptPairs


@dataclass(frozen=True, slots=True)
class Passes:
    """What the memory of a batch depends on in a method, besides its prompts.

    origins: for each backward pass the run that it starts from, clean 1 or corrupt 0, whose activations are kept until
    then; None if it makes all of its own. interpolated: some make a part of a run anew. exact_softmax: q and k edges
    are scored so. reduce: "pair" and "position" keep sums for each; absolute: for each pair, and those of a pass apart.
    metric: float64 [B, V] that the metric holds besides its logits and their gradient.
    """

    origins: tuple[float | None, ...] = (1.0,)
    interpolated: bool = False
    exact_softmax: bool = False
    reduce: str = "all"
    absolute: bool = False
    metric: int = 0

    def alike(self, done: int) -> int:
        """How many of the passes behind the first `done` make all of their own activations, up to one that does not."""
        behind = self.origins[done:]
        return next((n for n, origin in enumerate(behind) if origin is not None), len(behind))

    def phases(self, together: int) -> set[tuple[int, int, bool]]:
        """(runs kept from before, runs made, whether other passes follow) of each pass, some of which run together."""
        found, done = set(), 0
        while done < len(self.origins):
            made = min(together, self.alike(done))
            kept = len({origin for origin in self.origins[done:] if origin is not None})
            done += max(1, made)
            found.add((kept, made or int(self.interpolated), done < len(self.origins)))
        return found


ONE_GRADIENT = Passes()


def workspace_pairs(
    config: ModelConfig, pairs: int, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> int:
    """How many of a batch's pairs have one layer's receivers, [3H + 1, B, T, D], in memory at a time, evenly."""
    one = (3 * config.n_heads + (not config.attn_only)) * tokens * config.d_model * dtype.itemsize
    at_once = max(1, limits(device).workspace // one)
    return -(-pairs // -(-pairs // at_once))


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

    What is there all the time, with S' = 1 + (L−1)(H+1) the senders before the last layer (1 + (L−1)H without MLPs):

        S'·B·T·D + S·B·D             the sender buffer
        (L−1)·B·T·(2D + 3HK + M)     what the backward pass needs of every layer; the last is read at one position alone

    and the largest of what comes and goes:

        2·B·T·(4D + 4HK + M)         the layer at hand, the clean and the corrupt run as one batch
        5·B·V                        the logits at the answer positions and their gradients, in float64, and what the
                                     metric makes of them (`passes.metric`)
        B'·T·(3H + 1)·D              one layer's receivers, of B' pairs at a time (`workspace_pairs`), and the most of
            4·B·H·T²                 its attention pattern and its gradients, in float32 at least
            2·B·T·M                  its hidden units' gradients
            its workspace            what `kernels.workspace_bytes` says of making and contracting it, in turn; C++ for
                                     each of torch's threads. Of a third of it where a checkpoint stores q, k and v
                                     apart, which is `groups` = 3

    passes: of another method than one gradient at the clean run; `together` of them run as one batch. The first forward
    keeps what passes start from. Every pass that makes its own activations holds them beside what later ones need, and
    the layer at hand of one run; while it goes back, the logits stay if others follow. Within 10 % for gradients at
    interpolated inputs; for methods that interpolate activations, score exact patterns or drop gradients an eighth is
    added, and the most that a chunk of exact patterns takes: an upper estimate.

    Prompts are taken to differ from their first token on. Scores of every pair that are the result, [N, S, R], are not
    a batch's and not counted.
    """
    graph = config.graph
    sizes, width = _sizes(config, batch, tokens, dtype), dtype.itemsize
    buffer = (graph.heads(config.n_layers - 1).start * tokens + graph.n_senders) * batch * config.d_model * width
    buffer += _sum_bytes(graph, batch, tokens, passes)
    one = sizes.kept - sizes.stream
    peak = len(set(passes.origins) - {None}) * one + sizes.forward
    for kept, made, more in passes.phases(together):
        rows = max(1, made) * batch
        here = _sizes(config, rows, tokens, dtype)
        back = _back_bytes(config, rows, tokens, dtype, device, impl, groups, _summed_over(passes))
        if passes.exact_softmax:
            back += _exact_bytes(config, rows, tokens, dtype, torch.device(device))
        ends, plain = (2 * batch * config.d_vocab * size for size in (8, width))  # the clean and the corrupt logits
        later = ends + plain if more else 0
        logits = here.logits - (max(1, made) - 1) * ends + (plain if more else 0)
        logits += passes.metric * rows * config.d_vocab * 8
        now = max(logits, later + back, later + here.forward // 2 + here.stream if made else 0)
        peak = max(peak, (kept + made) * one + now)
    total = buffer + sizes.stream + peak
    return total * 9 // 8 if passes.interpolated or passes.exact_softmax or passes.absolute else total


def _back_bytes(
    config: ModelConfig,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    impl: str,
    groups: int,
    reduce: str,
) -> int:
    """Bytes that come and go while gradients go back and are contracted with the sender buffer."""
    graph = config.graph
    sizes, width, several = _sizes(config, batch, tokens, dtype), dtype.itemsize, config.n_layers > 1
    senders = graph.heads(max(config.n_layers - 2, 0)).start
    at_once = workspace_pairs(config, batch, tokens, dtype, device)
    made = _receiver_bytes(config, at_once, tokens, dtype, senders, device, impl, groups, reduce)
    if not several:  # the queries of the last layer, here the only one, have a gradient at one position alone
        made = made * 2 // 3
    receivers = made + 3 * sizes.heads + (3 if config.normalization is not None else 1) * sizes.wide_stream
    units = 2 * batch * tokens * (config.d_mlp or 0) * width + 3 * sizes.wide_stream if several else 0
    workspace = (3 * config.n_heads + (not config.attn_only)) * at_once * tokens * config.d_model * width
    return workspace + max(sizes.attention if several else 0, units, receivers)


def _summed_over(passes: Passes) -> str:
    """What a batch's scores are summed over: `reduce` of the kernels."""
    return "pair" if passes.absolute else passes.reduce


def _scores(graph: Graph, batch: int, tokens: int, passes: Passes) -> int:
    """How many scores a batch has."""
    each = {"all": 1, "pair": batch, "position": tokens}[_summed_over(passes)]
    return each * graph.n_senders * graph.n_receivers


def _sum_bytes(graph: Graph, batch: int, tokens: int, passes: Passes) -> int:
    """Bytes of a batch's scores in float64."""
    # Absolute ones keep a pass apart from the sum, and take its absolute value; a block is summed before it is added.
    return (3 if passes.absolute else 1) * _scores(graph, batch, tokens, passes) * 8


def _exact_bytes(config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """At most the bytes that exact patterns take: of as many senders at a time as `softmax` makes."""
    wide, stream = max(dtype.itemsize, 4), batch * tokens * config.d_model
    pattern, heads = batch * config.n_heads * tokens**2, batch * tokens * config.n_heads * config.d_head
    graph = config.graph
    at_once = min(graph.n_senders, max(1, limits(device).exact_numbers // max(pattern, stream)))
    inputs = (2 if wide == dtype.itemsize else 4) * stream + 2 * heads
    each = at_once * max(inputs, 3 * heads + 3 * pattern)
    return (each + 3 * pattern + 2 * batch * graph.n_senders * config.n_heads) * wide


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of what both storages need. stream: B·T·D, and wide_stream the same in the dtype of sums. heads: B·T·HK.

    layer: what the backward pass needs of one. kept: of all of them, with the corrupt embedding. forward, attention,
    logits: what comes and goes, see `dense_bytes`.
    """

    stream: int
    wide_stream: int
    heads: int
    layer: int
    kept: int
    forward: int
    attention: int
    logits: int


def _sizes(config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype) -> _Sizes:
    width, wide, norms = dtype.itemsize, max(dtype.itemsize, 4), config.normalization is not None
    rows, whole, mlps = batch * tokens, config.n_layers - 1, not config.attn_only
    heads, hidden = rows * config.n_heads * config.d_head * width, rows * (config.d_mlp or 0) * width
    stream, wide_stream = rows * config.d_model * width, rows * config.d_model * wide
    layer = (1 + mlps) * stream + 3 * heads + hidden + norms * 2 * (1 + mlps) * rows * wide
    last = stream + 2 * heads
    wider = norms * 4 * wide_stream if wide > width else 0  # LayerNorm reads and writes the wider dtype
    sent = 2 * (heads + mlps * stream + stream)
    at_hand = max(2 * layer + sent, layer + 2 * heads + 4 * stream + 2 * hidden) if whole else 6 * stream + 10 * heads
    at_hand += wider
    if whole and wide > width:  # the heads' mixtures, and the hidden units before and behind the activation function
        at_hand = max(at_hand, 2 * (layer + stream) + 2 * wide // width * (heads + 2 * hidden))
    return _Sizes(
        stream,
        wide_stream,
        heads,
        layer,
        kept=(whole * layer if whole else last) + stream,
        forward=at_hand,
        attention=rows * (4 * config.n_heads * wide + 1) * tokens + 3 * heads + wide_stream + stream,
        logits=(last if whole else 0) + batch * config.d_vocab * (5 * 8 + width),
    )


def _receiver_bytes(
    config: ModelConfig,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    senders: int,
    device: torch.device | str,
    impl: str,
    groups: int,
    reduce: str,
) -> int:
    """Peak bytes besides one layer's receivers, 3H·B·T·D, while they are made, contracted and added up."""
    wide, channels = max(dtype.itemsize, 4), 3 * config.n_heads
    of_layer = partial(kernels.Sizes, batch, tokens, config.d_model)
    workspace = partial(kernels.workspace_bytes, dtype=dtype, device=device, impl=impl)
    normed = config.normalization is not None
    made = of_layer(channels=channels // groups, d_head=config.d_head, normed=normed)
    contracted = of_layer(senders=senders, receivers=channels + (not config.attn_only))
    # A sum over half precision converts all of it first.
    added = channels * batch * tokens * config.d_model * wide if wide > dtype.itemsize else 0
    return max(workspace("receiver_grads", made), workspace("edge_scores", contracted, reduce=reduce), added)


def factored_bytes(
    config: ModelConfig,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    impl: str = "auto",
    passes: Passes = ONE_GRADIENT,
    chunk: int | None = None,
) -> int:
    """About the most bytes that `attribute` allocates for one batch in factored mode, the model's weights not counted.

        L·B·T·(HK + D) + B·T·D       what the senders' differences are made of

    and the largest of what the forwards need, as in dense mode, and of

        L·B·T·(6HK + 2D)             q, k, v and their gradients, x̂, the MLPs' gradients, with
            4·B·H·T²                 an attention pattern and its gradients in float32 at least, or
            B·T·(3HK + 5D)           the sum of a layer's receivers in the making, at the first or last layer of the
                                     way back, when what the others kept may still be there, or with
            its workspace            what `kernels.workspace_bytes` says of contracting it in chunks of `chunk` token
                                     rows, None for as many as are fast; and the scores, S·R in float32 at least

    and for other passes than one gradient at the clean run, as in dense mode, the activations that they keep and make.
    """
    rest, before = _factored_bytes(config, batch, tokens, dtype, passes)
    return max(rest, before + _chunk_bytes(config, batch, tokens, dtype, device, impl, passes, chunk))


def _factored_bytes(
    config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype, passes: Passes
) -> tuple[int, int]:
    """Peak bytes of factored mode up to the contraction, and those that are still there when it begins."""
    graph = config.graph
    sizes, mlps, norms = _sizes(config, batch, tokens, dtype), not config.attn_only, config.normalization is not None
    differences = config.n_layers * (sizes.heads + mlps * sizes.stream) + sizes.stream
    differences += _sum_bytes(graph, batch, tokens, passes)
    kept = max(kept + made for kept, made, _ in passes.phases(1))
    if len(passes.origins) > 1:
        differences += (kept - 1) * (sizes.kept - sizes.stream)
        differences += 2 * batch * config.d_vocab * (8 + dtype.itemsize)  # the clean and the corrupt logits
    forwards = sizes.kept + max(sizes.forward, sizes.logits + passes.metric * batch * config.d_vocab * 8)
    layer, made = 6 * sizes.heads + norms * sizes.stream, 3 * sizes.heads + norms * sizes.stream
    # The MLPs' gradients have their memory from the beginning on; the last layer's k and v are held twice.
    held = 2 * sizes.heads + mlps * config.n_layers * (sizes.stream + batch * config.d_model * dtype.itemsize)
    making = made + norms * (3 + mlps) * sizes.stream
    # The only layer's queries are read at one position, and its k and v are in `kept`.
    making = max(making, sizes.attention) if config.n_layers > 1 else sizes.heads + norms * sizes.stream
    going_back = held + max(sizes.kept + layer, config.n_layers * layer - made) + making
    going_back += 2 * sizes.wide_stream + sizes.stream
    return differences + max(forwards, going_back), differences + held + config.n_layers * layer + 2 * sizes.stream


def _factored_sizes(config: ModelConfig, batch: int, tokens: int) -> kernels.Sizes:
    return kernels.Sizes(
        batch,
        tokens,
        config.d_model,
        channels=3 * config.n_heads,
        d_head=config.d_head,
        layers=config.n_layers,
        heads=config.n_heads,
        mlps=not config.attn_only,
    )


def _chunk_bytes(
    config: ModelConfig,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    impl: str,
    passes: Passes,
    chunk: int | None,
) -> int:
    """What contracting in chunks takes besides the factors: its workspace and the scores."""
    graph = config.graph
    # Nearly all edges are contracted at all positions, the rest at one.
    workspace = max(
        kernels.workspace_bytes(
            "edge_scores_factored",
            _factored_sizes(config, batch, positions),
            dtype=dtype,
            device=device,
            mask=mask,
            reduce=_summed_over(passes),
            chunk=chunk,
            impl=impl,
        )
        for positions, mask in zip((tokens, 1), _edge_masks(graph), strict=True)
    )
    return workspace + _scores(graph, batch, tokens, passes) * max(dtype.itemsize, 4)


@lru_cache(maxsize=1)
def _edge_masks(graph: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    return graph.edge_masks()


def fitting_chunk(
    config: ModelConfig,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,
    *,
    impl: str = "auto",
    passes: Passes = ONE_GRADIENT,
) -> int:
    """Token rows a chunk of factored mode's contraction: as many as are fast, or fewer to keep a batch within budget.

    A chunk reads all weights once, so it is halved only as long as the plan is over the budget and the workspace is the
    larger part of it, a chunk of half the size saves a quarter of the workspace, and 16 rows are left. Beyond that a
    smaller batch saves more for the time that it costs: see `batch_size`.
    """
    sizes = _factored_sizes(config, batch, tokens)
    fast = kernels.fast_chunk(sizes, dtype=dtype, device=device, impl=impl)
    _, before = _factored_bytes(config, batch, tokens, dtype, passes)
    needed = partial(_chunk_bytes, config, batch, tokens, dtype, device, impl, passes)
    rows = min(fast, max(1, batch * tokens))
    workspace = needed(rows)
    while before + workspace > budget and workspace > before and rows >= 2 * LEAST_CHUNK:
        half = needed(rows // 2)
        if 4 * half > 3 * workspace:
            break
        rows, workspace = rows // 2, half
    return rows


def choose_storage(
    config: ModelConfig,
    pairs: PromptPairs,
    dtype: torch.dtype,
    device: torch.device,
    *,
    groups: int = 1,
    passes: Passes = ONE_GRADIENT,
) -> str:
    """ "dense" where a quarter of the batch that is useful fits, or "factored" saves nothing, else "factored"."""
    if kernels.choose("edge_scores_factored", device=device, dtype=dtype) == "reference":
        return "dense"
    tokens = int(pairs.lengths.max())
    wanted = max(1, min(_useful(tokens, device), len(pairs)) // 4)
    needed = dense_bytes(config, wanted, tokens, dtype, device=device, groups=groups, passes=passes)
    return "dense" if needed <= budget(device) else "factored"


def fitting_batch_size(
    config: ModelConfig,
    pairs: PromptPairs,
    dtype: torch.dtype,
    device: torch.device,
    storage: str = "dense",
    *,
    groups: int = 1,
    passes: Passes = ONE_GRADIENT,
) -> int:
    """Pairs a batch: enough tokens to be fast, within half of the free memory, at least one.

    In factored mode a batch that is over that with a workspace larger than all else takes a smaller `chunk` before it
    is made smaller itself.
    """
    tokens, within = int(pairs.lengths.max()), budget(device)
    sizes = range(1, min(_useful(tokens, device), len(pairs)) + 1)

    def key(n: int) -> int:
        if storage == "dense":
            return dense_bytes(config, n, tokens, dtype, device=device, groups=groups, passes=passes)
        rows = fitting_chunk(config, n, tokens, dtype, device, within, passes=passes)
        return factored_bytes(config, n, tokens, dtype, device=device, passes=passes, chunk=rows)

    return max(1, bisect_right(sizes, within, key=key))


def _useful(tokens: int, device: torch.device) -> int:
    return max(1, limits(device).batch_tokens // tokens)


def steps_together(
    config: ModelConfig,
    batch: int,
    tokens: int,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,
    passes: Passes = ONE_GRADIENT,
) -> int:
    """How many of some steps run as one batch of so many times its pairs: few tokens, and no more bytes than budget."""
    useful = limits(device).step_tokens // (batch * tokens)
    if useful < 4:  # each alone has tokens enough
        return 1
    needed = partial(dense_bytes, config, batch, tokens, dtype, device=device, passes=passes)
    return 1 + bisect_right(range(2, min(useful, steps) + 1), budget, key=lambda n: needed(together=n))
