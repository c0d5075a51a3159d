"""What bench_kernels.py times: the shapes, and for each op the ways to compute it, what is right, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import eapcore.kernels as kernels
import torch
from eapcore.kernels import FactoredReceivers, FactoredSenders, Norm, reference
from torch import Tensor

from eapcore.graph.graph import Graph

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model, by DESIGN's letters."""

    name: str
    L: int
    H: int
    D: int

    @property
    def K(self) -> int:
        return self.D // self.H

    @property
    def graph(self) -> Graph:
        return Graph(self.L, self.H, True)

    @property
    def S(self) -> int:
        return self.graph.n_senders

    @property
    def R(self) -> int:
        return self.graph.n_receivers

    def mask(self) -> Tensor:
        """bool [S, R]: a sender in front of a receiver."""
        return self.graph.edge_mask()


TINY = Model("tiny", 2, 2, 32)
SMALL = Model("GPT-2 small", 12, 12, 768)
MEDIUM = Model("GPT-2 medium", 24, 16, 1024)
XL = Model("GPT-2 XL", 48, 25, 1600)
B13 = Model("13B", 40, 40, 5120)


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one shape.

    receivers: how many of the model's are in one call; 0 stands for all of them at once. asked: a figure that this
    case is there for, ("of_matmul" or "of_copy", the least share).
    """

    op: str
    model: Model
    receivers: int
    batch: int
    tokens: int
    dtype: torch.dtype
    asked: tuple[str, float] | None = None

    @property
    def name(self) -> str:
        m = self.model
        if self.op == "receiver_grads":
            return f"{m.name} C={3 * m.H} K={m.K} D={m.D} B·T={self.batch * self.tokens}"
        return f"{m.name} S={m.S} R={self.receivers or m.R} D={m.D} B·T={self.batch * self.tokens}"


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The list; one layer's receivers are 3H + 1, and R = 1 is the logits alone."""
    f32, bf16 = torch.float32, torch.bfloat16
    if quick:
        for dtype in (f32, bf16):
            yield Case("edge_scores", TINY, 7, 2, 5, dtype, ("of_copy", 0.8))
            yield Case("edge_scores", TINY, 0, 2, 5, dtype, ("of_matmul", 0.75))
            yield Case("receiver_grads", TINY, 7, 2, 5, dtype)
            yield Case("edge_scores_factored", TINY, 0, 2, 5, dtype)
        return
    if device == "cpu":
        for dtype in (f32, bf16):
            for batch in (8, 32):
                for receivers in (1, 37):
                    yield Case("edge_scores", SMALL, receivers, batch, 20, dtype)
            yield Case("edge_scores", SMALL, 0, 8, 20, dtype)
            for batch in (8, 32):
                yield Case("edge_scores", SMALL, SMALL.R, batch, 20, dtype)  # every pair, as if all were edges
            yield Case("edge_scores", MEDIUM, 49, 8, 20, dtype)
            yield Case("edge_scores", XL, 76, 1, 16, dtype)
            yield Case("edge_scores", XL, 0, 1, 8, dtype)
            yield Case("edge_scores", B13, 121, 1, 8, dtype)
            for model, batch, tokens in ((SMALL, 8, 20), (MEDIUM, 8, 20), (XL, 1, 20), (B13, 1, 8)):
                yield Case("receiver_grads", model, 0, batch, tokens, dtype)
            # So many tokens that all rounds of a case take about a minute at most, the definition in torch among them.
            for model, batch, tokens in ((SMALL, 8, 20), (MEDIUM, 4, 20), (B13, 1, 4)):
                yield Case("edge_scores_factored", model, 0, batch, tokens, dtype)
        return
    yield Case("edge_scores", SMALL, 37, 32, 64, bf16, ("of_copy", 0.8))
    yield Case("edge_scores", XL, 0, 16, 64, bf16, ("of_matmul", 0.75))
    yield Case("edge_scores", B13, 0, 8, 64, bf16, ("of_matmul", 0.75))
    yield Case("edge_scores", SMALL, 37, 32, 64, f32, ("of_copy", 0.8))
    for dtype in (bf16, f32):
        for model, tokens in ((SMALL, 2048), (MEDIUM, 2048), (XL, 1024), (B13, 512)):
            if model is not SMALL:
                yield Case("edge_scores", model, 3 * model.H + 1, tokens // 64, 64, dtype)
            if model in (SMALL, MEDIUM):
                yield Case("edge_scores", model, 0, tokens // 64, 64, dtype)
            yield Case("receiver_grads", model, 0, tokens // 64, 64, dtype)
        if dtype == f32:  # as many tokens as the layout of hook-based tools leaves memory for beside ours
            yield Case("edge_scores", XL, 0, 8, 64, dtype)
            yield Case("edge_scores", B13, 0, 2, 64, dtype)
        yield Case("edge_scores_factored", SMALL, 0, 32, 64, dtype)
        yield Case("edge_scores_factored", XL, 0, 2, 64, dtype)


@dataclass(frozen=True, slots=True)
class Work:
    """A case made real: the ways to compute it, what is right, and what it costs.

    providers: name -> call; names without "torch" are eapcore's and must be right. check(result) gives the relative
    error in the norm against float64. limit: the error allowed. operations, bytes: counted, see the module's docstring.
    tile_operations: those of all real pairs in tiles with an edge, where that is known.
    """

    providers: dict[str, Run]
    check: Callable[[Tensor], float]
    limit: float
    operations: int
    bytes: int
    tile_operations: int | None = None


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def fast_implementation(kind: str) -> str:
    reasons = kernels.available()
    fast = "cpp" if kind == "cpu" else "triton"
    if reasons[fast]:
        raise RuntimeError(f"{fast} cannot run here: {reasons[fast]}")
    return fast


def edge_tile_pairs(mask: Tensor, block_s: int, block_r: int) -> int:
    """How many pairs lie in tiles of block_s × block_r that hold an edge; what pads the last tiles is no pair."""
    tiles = torch.nn.functional.max_pool2d(mask[None].float(), (block_s, block_r), ceil_mode=True)[0]
    padded = tiles.repeat_interleave(block_s, 0).repeat_interleave(block_r, 1)
    return int(padded[: mask.shape[0], : mask.shape[1]].sum(dtype=torch.float64))


def allowed_error(dtype: torch.dtype, chain: int, arch: int) -> float:
    """1e-5, or twice what tensor cores lose that add up a chain of so many elements of half precision.

    They cut every sum off, 16 products at a time from sm_90 on and 8 before: see kernels/triton_edge_scores.py.
    """
    return 1e-5 if dtype == torch.float32 else max(1e-5, 5e-8 * chain / (16 if arch >= 90 else 8))


def edge_scores_work(case: Case, device: str, fast: str, compiled: bool) -> Work:
    model, dtype = case.model, case.dtype
    receivers = case.receivers or model.R
    shape = (case.batch, case.tokens, model.D)
    delta = torch.randn(model.S, *shape, dtype=dtype, device=device)
    grads = torch.randn(receivers, *shape, dtype=dtype, device=device)
    mask = model.mask().to(device) if case.receivers == 0 else None
    # Hook-based tools keep [batch, position, component, d_model].
    delta_hooks = delta.permute(1, 2, 0, 3).contiguous()
    grads_hooks = grads.permute(1, 2, 0, 3).contiguous()

    def hooks(d: Tensor, g: Tensor) -> Tensor:
        return torch.einsum("bpsd,bprd->sr", d, g)

    def run(precision: str) -> Run:
        return lambda: kernels.edge_scores(delta, grads, mask=mask, precision=precision, impl=fast)

    providers = {fast: run("auto")}
    if fast == "triton" and dtype == torch.float32:
        providers["triton, ieee"] = run("ieee")
    keep = 1 if mask is None else mask  # hook-based tools compute every pair, then drop those that are no edges
    providers["torch.matmul"] = lambda: (delta.flatten(1) @ grads.flatten(1).T) * keep
    providers["torch.einsum, hooks"] = lambda: hooks(delta_hooks, grads_hooks) * keep
    if compiled:
        fused = torch.compile(hooks, dynamic=False)
        providers["torch.compile, hooks"] = lambda: fused(delta_hooks, grads_hooks) * keep

    some_s = torch.randperm(model.S)[:32].to(device)
    some_r = torch.randperm(receivers)[:32].to(device)
    sample = torch.einsum("sbtd,rbtd->sr", delta[some_s].double(), grads[some_r].double())
    edges = torch.ones_like(sample, dtype=torch.bool) if mask is None else mask[some_s][:, some_r]

    def check(got: Tensor) -> float:
        if mask is not None and bool((got[~mask] != 0).any()):
            return float("inf")
        return relative(got[some_s][:, some_r] * edges, sample * edges)

    n_edges = model.S * receivers if mask is None else int(mask.sum())
    inner = case.batch * case.tokens * model.D
    moved = size_of(delta, grads) + model.S * receivers * 4
    limit, tile_operations = 1e-5, None
    if fast == "triton":
        from eapcore.kernels import triton_common, triton_edge_scores

        plan = triton_edge_scores.plan_of(triton_edge_scores.layout(delta, grads, "all", None), mask is not None)
        limit = allowed_error(dtype, plan.chain, triton_common.target(delta.device).arch)
        if mask is not None:
            tile_operations = 2 * edge_tile_pairs(mask, plan.config.block_s, plan.config.block_r) * inner
    return Work(providers, check, limit, 2 * n_edges * inner, moved, tile_operations)


def doubled(x: Any) -> Any:
    """The same in float64: a tensor, or a list or a dataclass with tensors in it."""
    if isinstance(x, Tensor):
        return x.double()
    if is_dataclass(x):
        return replace(x, **{field.name: doubled(getattr(x, field.name)) for field in fields(x)})
    return [doubled(part) for part in x] if isinstance(x, list | tuple) else x


Layer = tuple[Tensor, Tensor, Tensor, Norm, Tensor, Tensor]


def layer_tensors(
    channels: int, batch: int, tokens: int, d_head: int, d_model: int, dtype: torch.dtype, device: str,
    kind: str = "layernorm",
) -> Layer:  # fmt: skip
    """Arguments of receiver_grads that belong together, made in float32 and rounded once."""
    x_hat = torch.randn(batch, tokens, d_model, device=device)
    if kind == "layernorm":
        x_hat = x_hat - x_hat.mean(-1, keepdim=True)
    x_hat = x_hat / x_hat.square().mean(-1, keepdim=True).sqrt()
    weight = torch.randn(channels, d_model, d_head, device=device) / d_model**0.5
    gamma, beta = torch.rand(d_model, device=device) + 0.5, torch.randn(d_model, device=device)
    bias = torch.randn(channels, d_head, device=device)
    g = torch.randn(channels, batch, tokens, d_head, device=device)
    n = x_hat if kind == "none" else x_hat * gamma + (beta if kind == "layernorm" else 0)
    act = torch.einsum("btd,cdk->cbtk", n, weight) + bias[:, None, None]
    w_gamma, offset = kernels.receiver_constants(weight, bias, gamma, beta if kind == "layernorm" else None)
    rstd = torch.rand(batch, tokens, device=device) + 0.5
    norm = Norm("none") if kind == "none" else Norm(kind, x_hat.to(dtype), rstd, gamma.to(dtype))
    return g.to(dtype), act.to(dtype), weight.to(dtype), norm, w_gamma.to(dtype), offset.to(dtype)


def case_layer(case: Case, device: str) -> Layer:
    model = case.model
    return layer_tensors(3 * model.H, case.batch, case.tokens, model.K, model.D, case.dtype, device)


def receiver_grads_work(case: Case, device: str, fast: str, compiled: bool) -> Work:
    g, act, weight, norm, w_gamma, offset = case_layer(case, device)
    assert norm.x_hat is not None and norm.rstd is not None and norm.gamma is not None
    model, channels = case.model, g.shape[0]

    def closed(
        g: Tensor, act: Tensor, weight: Tensor, x_hat: Tensor, rstd: Tensor, gamma: Tensor, w_gamma: Tensor,
        offset: Tensor,
    ) -> Tensor:  # fmt: skip
        c1 = (g * w_gamma[:, None, None]).sum(-1, keepdim=True) / model.D
        c2 = (g * (act - offset[:, None, None])).sum(-1, keepdim=True) / model.D
        product = (g.flatten(1, 2) @ weight.transpose(1, 2)).view(channels, *x_hat.shape)
        return (rstd[..., None] * (gamma * product - c1 - c2 * x_hat)).to(g.dtype)

    args = (g, act, weight, norm.x_hat, norm.rstd, norm.gamma, w_gamma, offset)

    def run(impl: str) -> Run:
        return lambda: kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, impl=impl)

    providers = {fast: run(fast)}
    providers["torch, definition"] = run("reference")
    providers["torch, closed form"] = lambda: closed(*args)
    if compiled:
        fused = torch.compile(closed, dynamic=False)
        providers["torch.compile, closed form"] = lambda: fused(*args)

    some = torch.randperm(channels)[:4].to(device)
    exact = reference.receiver_grads(*doubled([g[some], weight[some], norm]))
    limit = 1e-5 if case.dtype == torch.float32 else 2.0**-8
    rows = case.batch * case.tokens
    moved = size_of(g, act, weight, norm.x_hat) + channels * rows * model.D * g.element_size()
    return Work(
        providers, lambda got: relative(got[some], exact), limit, 2 * channels * rows * model.K * model.D, moved
    )


# Above so many bytes of weights all layers have those of one, of which no cache holds a fraction either.
SHARED_WEIGHTS = 4 << 30


def factored_tensors(case: Case, layers: list[Layer], device: str) -> tuple[FactoredSenders, FactoredReceivers]:
    """The factors of a model with these layers."""
    model, dtype = case.model, case.dtype
    stream = (case.batch, case.tokens, model.D)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def output() -> Tensor:
        return (torch.randn(model.H, model.K, model.D, device=device) / model.K**0.5).to(dtype)

    shared = layers[0] is layers[-1]
    senders = FactoredSenders(
        embed=random(*stream),
        dz=random(model.L, case.batch, case.tokens, model.H, model.K),
        w_o=[output()] * model.L if shared else [output() for _ in layers],
        mlp=random(model.L, *stream),
    )
    receivers = FactoredReceivers(
        g=torch.stack([layer[0] for layer in layers]),
        act=torch.stack([layer[1] for layer in layers]),
        weight=[[layer[2]] for layer in layers],
        norms=[layer[3] for layer in layers],
        w_gamma=torch.stack([layer[4] for layer in layers]),
        offset=torch.stack([layer[5] for layer in layers]),
        logits=random(*stream),
        mlp=random(model.L, *stream),
    )
    return senders, receivers


def exact_sender(model: Model, senders: FactoredSenders, sender: int) -> Tensor:
    """[B, T, D] Δ of one sender in float64."""
    if sender == 0:
        return senders.embed.double()
    layer, place = divmod(sender - 1, model.H + 1)
    if place == model.H:
        assert senders.mlp is not None
        return senders.mlp[layer].double()
    return senders.dz[layer, :, :, place].double() @ senders.w_o[layer][place].double()


def exact_receiver(model: Model, receivers: FactoredReceivers, receiver: int) -> Tensor:
    """[B, T, D] gradient of one receiver in float64, by the definition."""
    if receiver == model.R - 1:
        return receivers.logits.double()
    layer, place = divmod(receiver, 3 * model.H + 1)
    if place == 3 * model.H:
        assert receivers.mlp is not None
        return receivers.mlp[layer].double()
    g, weight = (x[place : place + 1] for x in (receivers.g[layer], receivers.weight[layer][0]))
    return reference.receiver_grads(*doubled([g, weight, receivers.norms[layer]]))[0]


def factored_work(case: Case, device: str, fast: str, compiled: bool) -> Work:
    model, dtype = case.model, case.dtype
    weight_bytes = 4 * model.L * model.D**2 * dtype.itemsize
    if weight_bytes > SHARED_WEIGHTS and device == "cpu":
        layers = [case_layer(case, device)] * model.L
    else:
        layers = [case_layer(case, device) for _ in range(model.L)]
    senders, receivers = factored_tensors(case, layers, device)
    mask = model.mask().to(device)

    def two_steps(impl: str) -> Tensor:
        parts = []
        for i, (g, act, weight, norm, w_gamma, offset) in enumerate(layers):
            parts.append(kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, impl=impl))
            parts.append(receivers.mlp[i : i + 1])  # type: ignore[index]
        grads = torch.cat([*parts, receivers.logits[None]])
        return kernels.edge_scores(reference.sender_deltas(senders), grads, mask=mask, impl=impl)

    def run(impl: str) -> Run:
        return lambda: kernels.edge_scores_factored(senders, receivers, mask=mask, impl=impl)

    providers: dict[str, Run] = {fast: run(fast), f"{fast}, made in memory": lambda: two_steps(fast)}
    providers["torch, definition"] = run("reference")

    some_s = torch.randperm(model.S)[:32].to(device)
    some_r = torch.randperm(model.R)[:32].to(device)
    delta = torch.stack([exact_sender(model, senders, s) for s in some_s.tolist()])
    grads = torch.stack([exact_receiver(model, receivers, r) for r in some_r.tolist()])
    exact = torch.einsum("sbtd,rbtd->sr", delta, grads) * mask[some_s][:, some_r]
    # Triton and torch round what they make to bfloat16: one rounding of each factor.
    limit = 1e-5 if dtype == torch.float32 else 2.0**-7
    inner = case.batch * case.tokens * model.D
    make = 2 * model.L * 4 * model.H * model.K * inner
    moved = size_of(senders.embed, senders.dz, *senders.w_o, receivers.g, receivers.act, receivers.logits)
    moved += sum(size_of(w) for groups in receivers.weight for w in groups)
    moved += 3 * model.L * inner * senders.dz.element_size() + mask.numel() * 4  # both MLP sides and x̂
    return Work(
        providers,
        lambda got: relative(got[some_s][:, some_r], exact),
        limit,
        2 * int(mask.sum()) * inner + make,
        moved,
    )


WORK = {
    "edge_scores": edge_scores_work,
    "receiver_grads": receiver_grads_work,
    "edge_scores_factored": factored_work,
}
