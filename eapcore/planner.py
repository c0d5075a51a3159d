"""The memory that a batch will need, before anything is allocated, and the batch size that follows from it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from eapcore import kernels
from eapcore.config import ModelConfig
from eapcore.graph import Graph
from eapcore.tasks import PromptPairs

# Pairs are batched up to this many tokens: on a CPU larger batches leave the cache and gain nothing, a GPU wants more.
_TOKENS = {"cpu": 512, "cuda": 8192}
_SHARE = 0.5  # of the free memory that a batch may take
# One layer's receivers at a time: on a CPU they should stay in a cache until they are contracted, but each call turns
# the weights round once (8 MiB cost 3 % more time than 20 at GPT-2 small's size); a GPU wants long calls.
_WORKSPACE = {"cpu": 20 << 20, "cuda": 1 << 30}


def workspace_pairs(
    config: ModelConfig, pairs: int, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> int:
    """How many of a batch's pairs have one layer's receivers, [3H + 1, B, T, D], in memory at a time, evenly."""
    one = (3 * config.n_heads + (not config.attn_only)) * tokens * config.d_model * dtype.itemsize
    at_once = max(1, _WORKSPACE.get(torch.device(device).type, _WORKSPACE["cpu"]) // one)
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
) -> int:
    """Peak bytes that `attribute` allocates for one batch in dense mode, the model's own weights not counted.

    What is there all the time, with S' = 1 + (L−1)(H+1) the senders before the last layer (1 + (L−1)H without MLPs):

        S'·B·T·D + S·B·D             the sender buffer
        (L−1)·B·T·(2D + 3HK + M)     what the backward pass needs of every layer; the last is read at one position alone

    and the largest of what comes and goes:

        2·B·T·(4D + 4HK + M)         the layer at hand, the clean and the corrupt run as one batch
        5·B·V                        the logits at the answer positions and their gradients, in float64
        B'·T·(3H + 1)·D              one layer's receivers, of B' pairs at a time (`workspace_pairs`), and the most of
            4·B·H·T²                 its attention pattern and its gradients, in float32 at least
            2·B·T·M                  its hidden units' gradients
            5·B'·T·3H·D              what the reference makes receivers with, in float32 at least; a third of that where
                                     a checkpoint stores q, k and v apart, which is `groups` = 3

    Prompts are taken to differ from their first token on.
    """
    graph = Graph(config.n_layers, config.n_heads, not config.attn_only)
    sizes, width = _sizes(config, batch, tokens, dtype), dtype.itemsize
    several = config.n_layers > 1
    buffer = (graph.heads(config.n_layers - 1).start * tokens + graph.n_senders) * batch * config.d_model * width
    senders = graph.heads(max(config.n_layers - 2, 0)).start
    at_once = workspace_pairs(config, batch, tokens, dtype, device)
    made = _receiver_bytes(config, at_once * tokens, dtype, senders, device, impl, groups)
    if not several:  # the queries of the last layer, here the only one, have a gradient at one position alone
        made = made * 2 // 3
    receivers = made + 3 * sizes.heads + (3 if config.normalization is not None else 1) * sizes.wide_stream
    units = 2 * batch * tokens * (config.d_mlp or 0) * width + 3 * sizes.wide_stream if several else 0
    workspace = (3 * config.n_heads + (not config.attn_only)) * at_once * tokens * config.d_model * width
    going_back = workspace + max(sizes.attention if several else 0, units, receivers)
    return buffer + sizes.kept + max(sizes.forward, going_back, sizes.logits)


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
    return _Sizes(
        stream,
        wide_stream,
        heads,
        layer,
        kept=(whole * layer if whole else last) + stream,
        forward=at_hand + wider,
        attention=rows * (4 * config.n_heads * wide + 1) * tokens + 3 * heads + wide_stream + stream,
        logits=(last if whole else 0) + batch * config.d_vocab * (5 * 8 + width),
    )


def _receiver_bytes(
    config: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    senders: int,
    device: torch.device | str,
    impl: str,
    groups: int,
) -> int:
    """Peak bytes besides one layer's receivers, 3H·B·T·D, while they are made, contracted and added up."""
    width, wide = dtype.itemsize, max(dtype.itemsize, 4)
    channels, stream = 3 * config.n_heads, rows * config.d_model
    made, contracted = (
        kernels.choose(op, device=device, dtype=dtype) if impl == "auto" else impl
        for op in ("receiver_grads", "edge_scores")
    )
    grads = channels * stream
    used = grads * wide if wide > width else 0  # a sum over half precision converts all of it first
    if contracted == "reference":  # einsum orders both its operands anew, after the conversion to the wider dtype
        used = max(used, (grads + senders * stream) * wide * (2 if wide > width else 1))
    if made != "reference":
        return used
    heads = channels * config.d_head
    copies = heads * rows * wide if config.normalization is None or wide > width else 0
    if wide > width:
        copies += heads * config.d_model * wide
    at_once = ((5 if config.normalization is not None else 1) * grads * wide + copies) // groups
    return max(at_once, used)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 << 30  # where the system does not say: what a small laptop has left


def factored_bytes(
    config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype, *, device: torch.device | str = "cpu"
) -> int:
    """About the most bytes that `attribute` allocates for one batch in factored mode, the model's weights not counted.

        L·B·T·(HK + D)               what the senders' differences are made of

    and the largest of what the forwards need, as in dense mode, and of

        L·B·T·(6HK + 2D)             q, k, v and their gradients, x̂, the MLPs' gradients, with
            4·B·H·T²                 an attention pattern and its gradients in float32 at least, at the first or last
                                     layer of the way back, when what the others kept may still be there, or with
            L·B·T·6HK                q, k, v and their gradients stacked, on a GPU, or with
            2·(S + R)·B·T·D          all senders and receivers, in float32 at least, which the reference makes at once
    """
    graph = Graph(config.n_layers, config.n_heads, not config.attn_only)
    sizes, mlps, norms = _sizes(config, batch, tokens, dtype), not config.attn_only, config.normalization is not None
    differences = config.n_layers * (sizes.heads + mlps * sizes.stream)
    forwards = sizes.kept + max(sizes.forward, sizes.logits)
    chosen = kernels.choose("edge_scores_factored", device=device, dtype=dtype)
    layer = 6 * sizes.heads + (norms + mlps) * sizes.stream
    going_back = max(sizes.kept + layer, config.n_layers * layer) + sizes.attention + 3 * sizes.stream
    contracted = config.n_layers * layer
    if chosen == "triton":
        contracted += config.n_layers * 6 * sizes.heads
    if chosen == "reference":
        contracted += 2 * (graph.n_senders + graph.n_receivers) * sizes.wide_stream
    return differences + max(forwards, going_back, contracted)


def storage(
    config: ModelConfig, pairs: PromptPairs, dtype: torch.dtype, device: torch.device, *, groups: int = 1
) -> str:
    """ "dense" where a quarter of the batch that is useful fits, or "factored" saves nothing, else "factored"."""
    if kernels.choose("edge_scores_factored", device=device, dtype=dtype) == "reference":
        return "dense"
    tokens = int(pairs.lengths.max())
    wanted = max(1, min(_useful(tokens, device), len(pairs)) // 4)
    needed = dense_bytes(config, wanted, tokens, dtype, device=device, groups=groups)
    return "dense" if needed <= _SHARE * free_bytes(device) else "factored"


def batch_size(
    config: ModelConfig,
    pairs: PromptPairs,
    dtype: torch.dtype,
    device: torch.device,
    storage: str = "dense",
    *,
    groups: int = 1,
) -> int:
    """Pairs a batch: enough tokens to be fast, within half of the free memory, at least one."""
    tokens = int(pairs.lengths.max())
    needed = partial(dense_bytes, groups=groups) if storage == "dense" else factored_bytes
    sizes = range(1, min(_useful(tokens, device), len(pairs)) + 1)
    budget = _SHARE * free_bytes(device)
    return max(1, bisect_right(sizes, budget, key=lambda n: needed(config, n, tokens, dtype, device=device)))


def _useful(tokens: int, device: torch.device) -> int:
    return max(1, _TOKENS.get(device.type, 512) // tokens)
