"""Every constant that depends on the device: how much goes through a model together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eapcore.kernels.tiling import RECEIVER_TILE


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one kind of device.

    share: of the free memory that a batch may take. record_share: the same for what exact patching keeps of a batch's
    runs, and for what its copies send.

    batch_tokens: pairs are batched up to so many tokens: on a CPU larger batches leave the cache and gain nothing, a
    GPU wants more. one_more_batch: what one batch more costs, in tokens of the batches: reading the weights once more,
    and launches. step_tokens: steps of an integral go through the model together up to so many tokens: by then products
    have enough rows to be fast, and launches cost little.

    workspace: bytes of one layer's receivers that are made at a time: on a CPU they should stay in a cache until they
    are contracted, but each call turns the weights round once; a GPU wants long calls. exact_numbers: of attention
    patterns, or of residual streams, that exact patterns hold at once.

    receivers: those of several layers that are made before they are contracted together, at most; 0 contracts each
    layer's as they are made, and within a workspace.

    positions_first: the dense buffer and the receivers' gradients lie in memory as [B, T, S, D]: what a GPU contracts
    together then lies together, and is read from memory fewer times. A CPU's ops want [S, B, T, D].

    copy_tokens: tokens of all copies of a batch that go through a layer together in exact patching: more leave the
    cache of a CPU and gain nothing. copy_work: multiply-adds of one [tokens, D] × [D, D] product of all copies, with
    which a batch is worth its own launches.
    """

    batch_tokens: int
    one_more_batch: int
    step_tokens: int
    workspace: int
    receivers: int
    exact_numbers: int
    copy_tokens: int
    copy_work: int
    positions_first: bool
    share: float = 0.5
    record_share: float = 0.25


# one_more_batch: on a CPU measured by bench/bench_pipeline.py; of a GPU not measured. receivers: three tiles of the
# contraction on a GPU, by the count of bench_pipeline.py --plan: more would hold more and hardly save any reading.
# workspace: of a GPU three layers of GPT-2 small at 20,480 tokens.
TABLE = {
    "cpu": Limits(512, 32, 1024, 20 << 20, 0, 1 << 20, 4096, 1 << 31, False),
    "cuda": Limits(8192, 4096, 8192, 1 << 32, 3 * RECEIVER_TILE, 1 << 26, 131072, 1 << 36, True),
}
PREFIX_SHARE = 0.25  # a shared prefix goes through one forward, what is behind it through two, a backward and the rest
LEAST_CHUNK = 16  # token rows: for fewer a head's weights are read that are four times what is made
LOGITS = 1 << 24  # logits, in float64, that are held at once
EVALUATED = 1 << 18  # of which a metric is made at once
PINNED = 1 << 26  # bytes of a result up to which it lies in pinned memory
GRAPH_SHAPES = 16  # shapes of batches that are recorded as CUDA graphs: each keeps its results
# Batches of one shape from which on recording is worth it. On one H200 (bfloat16, torch 2.11, 2026-11-27) whole calls
# of 4 and of 6 batches, recorded from the second on, took 137 and 160 ms for GPT-2 small at 5,120 tokens (not recorded
# 127 and 180), 764 and 762 for XL (829 and 1,281), 529 and 759 for a 13B (503 and 923).
GRAPH_WORTH = 5
# Multiply-adds of one [B·T, D] × [D, D] product up to which that holds. Beyond it the device needs longer than the host
# takes to launch: at 1.2e10 (GPT-2 small, 20,480 tokens) a batch took 53 ms with and without, at 4.2e9 (the 13B) 49 and
# 104.
GRAPH_WORK = 1 << 33


def limits(device: torch.device | str) -> Limits:
    """Those of a device; a kind that is not in the table has a CPU's."""
    return TABLE.get(torch.device(device).type, TABLE["cpu"])
