"""The plan of a model whose layers lie on several devices: what each needs, and what travels between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

import eapcore.kernels as kernels
from eapcore.attribution.methods import Passes
from eapcore.attribution.plan import ONE_GRADIENT, Plan, most_that_fits
from eapcore.execution.devices import bytes_on, find_devices, lay, spread, weight_bytes
from eapcore.execution.limits import limits
from eapcore.execution.memory import budget, free_bytes
from eapcore.execution.streaming import held_bytes, streamed
from eapcore.graph.graph import Graph
from eapcore.models.config import ModelConfig
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype
from eapcore.tasks.pairs import PromptPairs

_PROMPT = 32  # tokens, where the number of devices is chosen before the prompts are known


class SpreadPlan:
    """`Plan` for layers on several devices: a batch fits where each device has room for what its own layers keep.

    A device with n layers needs what a model of n + 1 layers needs: in such a model's last layer little is kept. The
    first one has all scores besides.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        layers: Sequence[tuple[torch.device, int]],
        impl: str = "auto",
        groups: int = 1,
        passes: Callable[[Graph], Passes] = lambda graph: ONE_GRADIENT,
        within: Sequence[int] | None = None,
    ) -> None:
        """layers: how many lie on each device. passes: a method's, of a model with such a graph. within: bytes that a
        batch may take on each device; None for a share of what is free."""
        self.within = [budget(device) for device, _ in layers] if within is None else list(within)
        self.whole = Plan(config, dtype, torch.device(layers[0][0].type), impl, groups, passes(config.graph))
        self.parts = []
        for device, count in layers:
            small = replace(config, n_layers=min(count + 1, config.n_layers))
            kind = torch.device(device.type)  # devices with as many layers need the same: it is counted once
            self.parts.append(Plan(small, dtype, kind, impl, groups, passes(small.graph)))

    def needs(self, batch: int, tokens: int, storage: str = "dense", together: int = 1) -> list[int]:
        """Peak bytes of a batch on each device, the weights not counted."""
        found = [part.peak(batch, tokens, storage, together) for part in self.parts]
        found[0] += self.whole.scores_bytes(batch, tokens)
        if len(found) > 1 and storage == "dense":
            chosen = self.whole.impl
            if chosen == "auto":
                chosen = kernels.choose("edge_scores", device=self.whole.device, dtype=self.whole.dtype)
            if chosen != "triton":  # which contracts zeros in the place of others' senders
                config = self.whole.config
                rows = 2 * config.graph.n_senders * batch * tokens * config.d_model * self.whole.dtype.itemsize
                found = [need + rows for need in found]
        return found

    def batch_size(self, pairs: PromptPairs, storage: str = "dense") -> int:
        """As `Plan.batch_size`, of what every device has room for."""
        tokens, most = int(pairs.lengths.max()), max(self.within)
        sizes = min(self.whole.useful(int(pairs.lengths.max())), len(pairs))

        def needed(n: int) -> int:
            found = zip(self.needs(n, tokens, storage), self.within, strict=True)
            return max(0, *(need + most - within for need, within in found))

        return max(1, most_that_fits(needed, sizes, most))

    def fits(self, batch: int, tokens: int) -> bool:
        """Whether every device has room for a batch."""
        needs = self.needs(batch, tokens)
        return all(need <= within for need, within in zip(needs, self.within, strict=True))

    def steps_together(self, batch: int, tokens: int, steps: int, budget: int) -> int:
        """As `Plan.steps_together`; the budget is that of each device."""
        useful = limits(self.whole.device).step_tokens // (batch * tokens)
        most = min(useful, steps)
        if useful < 4 or most <= 1:
            return 1

        def needed(n: int) -> int:
            found = zip(self.needs(batch, tokens, together=n), self.within, strict=True)
            return max(0, *(need + max(self.within) - within for need, within in found))

        return max(1, most_that_fits(needed, most, max(self.within)))

    def chunk(self, batch: int, tokens: int, budget: int) -> int:
        """As `Plan.chunk`."""
        return self.whole.chunk(batch, tokens, budget)

    def storage(self, pairs: PromptPairs) -> str:
        """Dense: the buffer is shared by the devices."""
        return "dense"


def chosen_devices(model: Model, devices: str | Sequence[str | torch.device]) -> list[torch.device]:
    """The devices that are named; of "auto" as few as have room for a quarter of a useful batch, else all of them.

    Raises:
        ValueError, RuntimeError: as `find_devices`.
    """
    found = find_devices(devices)
    if devices != "auto" or len(found) == 1:
        return found
    free, sizes = [free_bytes(device) for device in found], weight_bytes(model)
    batch = max(1, limits(found[0]).batch_tokens // _PROMPT // 4)
    for count in range(1, min(len(found), model.config.n_layers) + 1):
        try:
            layers = lay(*sizes, free[:count])
        except ValueError:
            continue
        if laid_plan(model, found[:count], layers, free[:count]).fits(batch, min(_PROMPT, model.config.n_ctx)):
            return found[:count]
    return found[: model.config.n_layers]


def laid_plan(
    model: Model, devices: Sequence[torch.device], layers: Sequence[int], memory: Sequence[int]
) -> SpreadPlan:
    """The plan of so many layers on each of some devices, whose memory the weights share."""
    sizes, rest = weight_bytes(model)
    left, at = [], 0
    for count in layers:
        left.append(sum(sizes[at : at + count]))
        at += count
    left[0] += rest
    within = [
        int(limits(device).share * (free - weights))
        for device, free, weights in zip(devices, memory, left, strict=True)
    ]
    where = list(zip(devices, layers, strict=True))
    return SpreadPlan(model.config, model.dtype, where, groups=model.groups, within=within)


def spread_over(model: Model, devices: str | Sequence[str | torch.device]) -> Model:
    """The model with its layers on several devices, see `chosen_devices` and `execution.devices.spread`; on one that
    has no room for them, streamed from the host's memory, see `streams`."""
    found = chosen_devices(model, devices)
    if model.stream is None and len(found) == 1 and streams(model, found[0]):
        return streamed(model, found[0])
    return spread(model, found)


def streams(model: Model, device: torch.device, memory: int | None = None) -> bool:
    """Whether a device has no room for a model's weights and a short pair of prompts, but for those of three layers at
    a time.

    memory: bytes that it has, None for what is free there.

    Raises:
        ValueError: not even for these.
    """
    if device.type == "cpu":
        return False
    memory = free_bytes(device) + bytes_on(model, device) if memory is None else memory
    tokens = min(_PROMPT, model.config.n_ctx)
    sizes, rest = weight_bytes(model)
    weights = sum(sizes) + rest
    if 2 * weights <= memory:  # half of the memory is enough for a short pair, which need not be counted
        return False
    plan = Plan(model.config, model.dtype, device, groups=model.groups)
    if min(plan.dense(1, tokens), plan.factored(1, tokens)) <= limits(device).share * (memory - weights):
        return False
    if not streamed_plan(model, device, memory).fits(1, tokens):
        raise ValueError(
            f"{model.name} does not fit: {device} has {memory / 2**30:.1f} GiB, and the embedding with three layers "
            f"at a time takes {held_bytes(model) / 2**30:.1f}; take a narrower dtype, or several devices"
        )
    return True


def streamed_plan(model: Model, device: torch.device, memory: int) -> SpreadPlan:
    """The plan of a model whose layers are streamed to a device with so many bytes."""
    within = int(limits(device).share * (memory - held_bytes(model)))
    where = [(device, model.config.n_layers)]
    return SpreadPlan(model.config, model.dtype, where, groups=model.groups, within=[within])


@dataclass(frozen=True, slots=True)
class Travel:
    """Bytes that go from one device to another for a batch with one gradient at the clean run.

    forward: the residual stream of clean and corrupt prompts. backward: its gradient. receivers: those of q, k, v and
    MLPs to the devices of the senders before them, as gradients or as what these are made of, whichever is fewer.
    as_gradients: in how many of all layers it is the gradients. scores: to the first device.
    """

    forward: int
    backward: int
    receivers: int
    as_gradients: int
    scores: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.receivers + self.scores

    @staticmethod
    def of(config: ModelConfig, layers: Sequence[int], batch: int, tokens: int, dtype: torch.dtype) -> Travel:
        """Of so many layers on each device, of a batch whose prompts differ from the first token on."""
        graph, size, wide = config.graph, dtype.itemsize, accumulate_dtype(dtype).itemsize
        rows, width, each = batch * tokens, config.d_model, config.d_head
        boundaries = len(layers) - 1
        if not boundaries:
            return Travel(0, 0, 0, 0, 0)
        stream, last_stream = rows * width, batch * width
        forward = (boundaries * 2 * stream + 2 * last_stream) * size
        backward = boundaries * stream * wide + last_stream * size
        weights = (config.n_heads + 2 * config.n_kv) * width * each * size
        bounds = [0, *accumulate(layers)]
        elsewhere = graph.heads(bounds[1]).start  # the first sender that does not lie on the first device
        receivers = as_gradients = scores = 0
        for number, (first, stop) in enumerate(pairwise(bounds)):
            for layer in range(first, stop):
                last = graph.is_last(layer)
                channels = graph.qkv(layer).stop - graph.qkv(layer).start
                at_read = config.n_heads if last else 0  # the last layer's q, at the positions that are read
                parts = [(here, n) for here, n in ((batch, at_read), (rows, channels - at_read)) if n]
                found, fewer = 0, 0
                for here, count in parts:
                    gradients = here * count * width * size
                    statistics = 0 if config.normalization is None else (1 if config.normalization == "rmsnorm" else 2)
                    factors = 2 * here * count * each * size + here * (width * size + statistics * wide) + weights
                    fewer += gradients <= factors
                    found += min(gradients, factors)
                found += (batch if last else rows) * width * size * (not config.attn_only)
                receivers += number * found
                as_gradients += bool(fewer) and number > 0
                own = max(0, graph.heads(layer).start - elsewhere)
                scores += own * (channels + (not config.attn_only)) * wide
        receivers += boundaries * last_stream * size  # of the logits
        scores += (graph.n_senders - elsewhere) * wide
        return Travel(forward, backward, receivers, as_gradients, scores)
