"""EAP-IG: its `attribute` with the same arguments and the same numbers, its graph files, and MIB's circuit files.

The package's order of senders and receivers is ours, but it says `input` where we say `embed`, and it keeps rows and
columns for the MLPs of a model without any; they are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import eapcore.kernels as kernels
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.interop.eap_ig.names import in_their_order, their_shape
from eapcore.interop.transformer_lens import from_hooked_transformer
from eapcore.kernels.checks import one_of
from eapcore.models.activations import LayerRun, LayerSaved, NormInput, accumulate_dtype, at_positions
from eapcore.models.attention import head_outputs
from eapcore.models.backward import Channels, Sink, backward, logits_grad
from eapcore.models.forward import check_tokens, embed, run_layers, run_with_senders, unembed
from eapcore.models.model import Model

METHODS = ("EAP", "EAP-IG-inputs", "clean-corrupted")
INTERVENTIONS = ("patching", "zero", "mean", "mean-positional")
AGGREGATIONS = ("sum", "mean")
_MEAN_LENGTH = 512  # the package cuts prompts to this many tokens before it averages
_FORMS = "a tensor of tokens int64 [B, T] or a list of B strings"
Logits = Annotated[Tensor, "B T V"]
Metric = Callable[[Logits, Logits, Annotated[Tensor, "int64 B"], Any], Annotated[Tensor, "() | B"]]
Prompts = Annotated[Tensor, "int64 B T"] | Sequence[str]
Batch = tuple[Prompts, Prompts, Any]


# Scoring


@torch.no_grad()
def attribute(
    model: nn.Module | Model,
    graph: Any,
    dataloader: Iterable[Batch],
    metric: Metric,
    method: str,
    intervention: str = "patching",
    aggregation: str = "sum",
    ig_steps: int | None = None,
    intervention_dataloader: Iterable[Any] | None = None,
    quiet: bool = False,
    optimal_ablation_path: str | None = None,
    *,
    verbatim: bool = False,
    impl: str = "auto",
) -> EdgeScores:
    """EAP-IG's `attribute`: score every edge and write the scores into `graph.scores`.

        score[s, r] = mean over pairs of Σ_t ⟨e_other[s, t] − e_clean[s, t], Σ_k w_k ∂metric/∂v[r, t] at point α_k⟩

    "EAP": the gradient of the clean run. "EAP-IG-inputs": its average over corrupt + (k/m)(clean − corrupt) for
    k = 0…m−1. "clean-corrupted": the mean of those of the clean and the corrupt run. e_other is the corrupt run, or for
    "EAP" zero or a mean over other prompts.

    The metric is called as the package calls it, metric(logits [B, T, V], clean_logits, input_lengths [B], label), and
    returns the mean over its batch. The package divides its gradient by the number of pairs once more, so that there
    scores shrink as batches grow, and a short last batch weighs more; here each pair counts the same, whatever the
    batches are. A metric may also return one value a pair, [B].

    The other difference is "mean": here each sender's mean over prompts and positions; there one vector for all, the
    mean over senders of what they send at a prompt's last token, divided by its length. `verbatim` takes both back.

    Memory: the sender buffer [S, B, T, D] from the first difference on, one full set of logits, and what the backward
    pass needs; the dataloader's batches are taken as they come.

    Args:
        model: a HookedTransformer, or a Model where the dataloader yields tokens.
        graph: the package's Graph, or anything with its `cfg` (n_layers, n_heads, …) and `scores`
            [1 + L(H+1), L(3H+1) + 1], which is overwritten in place, in its own dtype.
        dataloader: yields (clean, corrupt, label); prompts are a list of strings, which `model.to_tokens` tokenizes
            with a BOS and pads on the right, or tokens int64 [B, T] without padding. The metric gets label as it is.
        metric: higher is better, for scores by our sign.
        method: out of METHODS. The package's other methods are no first-order scores of edges: use its own function.
        intervention: out of INTERVENTIONS; other than "patching" for "EAP" alone. The senders are the package's, so
            that zero and mean replace the token embedding and leave the position embedding.
        aggregation: "sum" over d_model, or "mean".
        ig_steps: m, for "EAP-IG-inputs".
        intervention_dataloader: the prompts that are averaged; yields them alone or as the first of a tuple.
        quiet: no progress bar.
        optimal_ablation_path: MIB's; must be None.
        verbatim: the package's numbers to the letter (but for what its means add to MLPs that a model has not).
        impl: the kernels' implementation, see `kernels`.

    Returns:
        The scores that were written, in our order and the model's full precision.

    Raises:
        ValueError: an option, a model, a graph of another model, prompts or a metric that do not fit.

    Source: Hanna, Pezzelle, Belinkov 2024, section 3; repository hannamw/EAP-IG, version 2.0.0.
    """
    own = model if isinstance(model, Model) else from_hooked_transformer(model)
    points = _points(method, ig_steps, intervention, intervention_dataloader, optimal_ablation_path)
    one_of("aggregation", aggregation, AGGREGATIONS)
    one_of("impl", impl, kernels.IMPLS)
    _check_graph(graph, own)
    other = None
    if intervention != "patching":
        other = _ablation(own, model, intervention, intervention_dataloader, verbatim)
    total = torch.zeros(own.graph.n_senders, own.graph.n_receivers, dtype=torch.float64, device=own.device)
    pairs = 0
    for clean, corrupt, label in _progress(dataloader, quiet):
        batch = _read(own, model, clean, corrupt, label)
        pairs += len(batch.lengths)
        total += _score(own, batch, _Metric(metric, batch, verbatim), points, other, impl)
    if pairs == 0:
        raise ValueError("the dataloader is empty: at least one pair is needed")
    scores = total / pairs
    if aggregation == "mean":
        scores /= own.config.d_model
    if not bool(scores.isfinite().all()):
        raise ValueError(f"the scores are NaN or infinite in {own.dtype}: use a wider dtype, or look at the metric")
    graph.scores[:] = in_their_order(own.graph, scores).to(graph.scores.device)
    meta = {"method": {"name": method, "source": "EAP-IG", "points": [list(p) for p in points]}}
    keep = torch.float64 if own.dtype == torch.float64 else torch.float32
    return EdgeScores(scores.to(keep).cpu(), own.graph, {"model": {"name": own.name}, **meta})


def _points(
    method: str,
    ig_steps: int | None,
    intervention: str,
    intervention_dataloader: Iterable[Any] | None,
    optimal_ablation_path: str | None,
) -> list[tuple[float, float]]:
    """The (α, weight) at which gradients are taken, 1 being the clean run, once the options are known to fit."""
    one_of("method", method, METHODS)
    if intervention == "optimal" or optimal_ablation_path is not None:
        raise ValueError("optimal ablations are not supported here: intervention is patching, zero or a mean")
    one_of("intervention", intervention, INTERVENTIONS)
    if intervention != "patching" and method != "EAP":
        raise ValueError(f"intervention must be 'patching' for {method}, got {intervention!r}")
    if intervention.startswith("mean") and intervention_dataloader is None:
        raise ValueError(f"intervention {intervention!r} averages prompts: give intervention_dataloader")
    if method == "EAP":
        return [(1.0, 1.0)]
    if method == "clean-corrupted":
        return [(1.0, 0.5), (0.0, 0.5)]
    if not isinstance(ig_steps, int) or isinstance(ig_steps, bool) or ig_steps < 1:
        raise ValueError(f"EAP-IG-inputs needs ig_steps, a positive integer, got {ig_steps!r}")
    return [(k / ig_steps, 1 / ig_steps) for k in range(ig_steps)]


def _check_graph(graph: Any, model: Model) -> None:
    cfg, scores = getattr(graph, "cfg", None), getattr(graph, "scores", None)
    if cfg is None or not isinstance(scores, Tensor):
        raise ValueError(f"graph must be EAP-IG's Graph, with cfg and scores, got a {type(graph).__name__}")
    config = model.config
    expected = {"n_layers": config.n_layers, "n_heads": config.n_heads, "d_model": config.d_model}
    fields = cfg if isinstance(cfg, Mapping) else vars(cfg)
    got = {name: fields.get(name) for name in expected if fields.get(name) is not None}
    if fields.get("parallel_attn_mlp"):
        raise ValueError("a graph of parallel attention and MLP blocks is not supported here")
    if any(got[name] != expected[name] for name in got) or scores.shape != their_shape(model.graph):
        raise ValueError(
            f"the graph is of another model: expected {expected} and scores {list(their_shape(model.graph))}, "
            f"got {got} and {list(scores.shape)}"
        )


def _progress(dataloader: Iterable[Batch], quiet: bool) -> Iterable[Batch]:
    if quiet:
        return dataloader
    from tqdm import tqdm

    return tqdm(dataloader)


@dataclass(frozen=True, slots=True)
class _Batch:
    """clean, corrupt: int64 [B, T]. lengths: int64 [B], of the clean prompts without padding. label: the metric's."""

    clean: Tensor
    corrupt: Tensor
    lengths: Tensor
    label: Any

    def first_difference(self) -> int:
        different = (self.clean != self.corrupt).any(0).nonzero()
        return int(different[0]) if len(different) else self.clean.shape[1] - 1


def _read(own: Model, model: nn.Module | Model, clean: Prompts, corrupt: Prompts, label: Any) -> _Batch:
    tokens, lengths = tokenize(own, model, clean, "clean prompts")
    other, _ = tokenize(own, model, corrupt, "corrupt prompts")
    if tokens.shape != other.shape:
        raise ValueError(
            f"clean and corrupt prompts of a batch must have the same number and length, got {list(tokens.shape)} and "
            f"{list(other.shape)} tokens"
        )
    return _Batch(tokens, other, lengths, label)


def tokenize(
    own: Model, model: nn.Module | Model, prompts: Prompts, what: str
) -> tuple[Annotated[Tensor, "int64 B T"], Annotated[Tensor, "int64 B"]]:
    """Tokens [B, T] and lengths [B] without padding, as the package makes them from text.

    A BOS in front, padding on the right; all of a prompt's trailing pad tokens count as padding, also those that its
    text spells out. Causal attention makes an attention mask needless: no prompt sees what stands behind it.

    Raises:
        ValueError: neither text nor tokens; text without a tokenizer; a tokenizer that pads on the left; tokens that do
            not fit the model.
    """
    if isinstance(prompts, Tensor):
        check_tokens(own, prompts, what)
        return prompts.to(own.device), torch.full((len(prompts),), prompts.shape[1], device=own.device)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what} must be {_FORMS}, got {type(prompts).__name__}")
    to_tokens, tokenizer = getattr(model, "to_tokens", None), getattr(model, "tokenizer", None)
    if to_tokens is None or tokenizer is None:
        raise ValueError(f"{what} are text, but the model has no tokenizer: give tokens int64 [B, T]")
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"the tokenizer pads on the {tokenizer.padding_side}, which makes that package take padding for prompt: "
            "set model.tokenizer.padding_side = 'right'"
        )
    tokens = to_tokens(texts, prepend_bos=True, padding_side="right", truncate=False)
    check_tokens(own, tokens, what)
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    lengths = (place * (tokens != tokenizer.pad_token_id)).amax(1)
    if not bool(lengths.all()):
        raise ValueError(f"prompt {int(lengths.argmin())} of the {what} is nothing but padding: a prompt needs text")
    return tokens.to(own.device), lengths.to(own.device)


class _Metric:
    """The package's form of metric, and what its gradient has to be multiplied by."""

    def __init__(self, metric: Metric, batch: _Batch, verbatim: bool) -> None:
        self.metric, self.batch, self.verbatim = metric, batch, verbatim
        self.clean_logits: Tensor | None = None

    def grad(self, logits: Tensor) -> Tensor:
        """∂(Σ metric)/∂logits, [B, T, V] in the logits' dtype."""
        lengths, pairs = self.batch.lengths, len(self.batch.lengths)
        if self.clean_logits is None:
            self.clean_logits = logits
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            value = self.metric(leaf, self.clean_logits, lengths, self.batch.label)
            if not isinstance(value, Tensor) or value.shape not in ((), (1,), (pairs,)):
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the metric must return its mean over the batch, or one value a pair, got {got}")
            if not value.requires_grad:
                raise ValueError("the metric has no gradient: it must be computed from the logits by torch operations")
            if not bool(value.isfinite().all()):
                raise ValueError("the metric is NaN or infinite: it must be finite on every batch")
            mean = value.mean()
            (d_logits,) = torch.autograd.grad(mean if self.verbatim else mean * pairs, leaf)
        padding = torch.arange(logits.shape[1], device=logits.device) >= lengths[:, None]
        if bool((d_logits.ne(0).any(-1) & padding).any()):
            raise ValueError("the metric reads logits behind the end of a prompt, where padding is: use input_lengths")
        return d_logits


@dataclass(frozen=True, slots=True)
class _Cut:
    """The positions start…stop−1 of a run, and inside them the one of each pair that the metric reads, if it is one."""

    start: int
    stop: int
    read: Tensor | None

    def norm(self, norm: NormInput) -> NormInput:
        # torch.native_layer_norm_backward reads its statistics as contiguous, whatever their strides.
        mean, rstd = (None if s is None else self(s).contiguous() for s in (norm.mean, norm.rstd))
        return NormInput(self(norm.x), mean, rstd)

    def __call__(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]

    def saved(self, runs: list[LayerRun]) -> list[LayerSaved]:
        """What the backward pass needs of these positions; of the last layer what is read alone."""
        cut = []
        for run in runs:
            one = run.saved
            mlp_in = None if one.mlp_in is None else self.norm(one.mlp_in)
            hidden = None if one.hidden is None else self(one.hidden)
            cut.append(LayerSaved(self.norm(one.attn_in), (self(one.qkv[0]),), mlp_in, hidden))
        if self.read is not None:
            last = cut[-1]
            cut[-1] = replace(
                last,
                qkv=(at_positions(last.q, self.read), last.kv),
                mlp_in=None if last.mlp_in is None else last.mlp_in.at(self.read),
                hidden=None if last.hidden is None else at_positions(last.hidden, self.read),
            )
        return cut

    def grad(self, model: Model, d_logits: Tensor, norm_in: NormInput) -> Tensor:
        """The gradient of the logits' receiver."""
        d_logits, norm_in = self(d_logits), self.norm(norm_in)
        if self.read is not None:
            d_logits, norm_in = at_positions(d_logits, self.read), norm_in.at(self.read)
        return logits_grad(model, d_logits, norm_in)


class _Contraction(Sink):
    """Contracts the senders' differences with the receivers' gradients as they come.

    delta: [S, B, T, D]; delta_at_read: [S, B, 1, D] where the last layer has a gradient at one position a pair alone.
    """

    def __init__(
        self, graph: Graph, scores: Tensor, delta: Tensor, delta_at_read: Tensor | None, weight: float, impl: str
    ) -> None:
        self.graph, self.scores, self.delta, self.delta_at_read = graph, scores, delta, delta_at_read
        self.weight, self.impl = weight, impl

    def receiver(self, receiver: int, grad: Tensor, at_read: bool) -> None:
        self._add(grad[None], slice(receiver, receiver + 1), at_read)

    def channels(self, part: Channels) -> Tensor:
        grads = part.grads(self.impl)
        self._add(grads, part.receivers, part.at_read)
        return grads.sum(0, dtype=accumulate_dtype(grads.dtype))

    def _add(self, grads: Tensor, receivers: slice, at_read: bool) -> None:
        delta = self.delta_at_read if at_read and self.delta_at_read is not None else self.delta
        senders = self.graph.senders_before(receivers.start)
        block = kernels.edge_scores(delta[:senders], grads, impl=self.impl)
        self.scores[:senders, receivers].add_(block, alpha=self.weight)


def _score(
    model: Model,
    batch: _Batch,
    metric: _Metric,
    points: list[tuple[float, float]],
    other: Callable[[int, Tensor], Tensor] | None,
    impl: str,
) -> Tensor:
    """Σ over a batch's pairs of their scores, float64 [S, R].

    other: (sender, tokens) → what it sends when it is ablated, to be broadcast to [., B, T, D]; None: the corrupt run.
    """
    config, graph = model.config, model.graph
    clean = list(run_layers(model, embed(model, batch.clean)))
    clean_logits, clean_norm = unembed(model, clean[-1].out)
    d_clean = metric.grad(clean_logits)
    # Before the first difference clean and corrupt are one run: every Δ is zero there, and needs no gradient.
    start = batch.first_difference() if other is None else 0
    past = [run.saved.kv[:, :start] for run in clean] if start else None
    tokens = batch.clean.shape[1]
    delta = torch.empty(
        graph.n_senders, len(batch.lengths), tokens - start, config.d_model, dtype=model.dtype, device=model.device
    )
    ends = {1.0: (clean, clean_logits, clean_norm, d_clean, start)}
    if other is None:
        x = {1.0: embed(model, batch.clean[:, start:], start), 0.0: embed(model, batch.corrupt[:, start:], start)}
        delta[0] = x[0.0] - x[1.0]
        keep = any(alpha == 0.0 for alpha, _ in points)
        corrupt: list[LayerRun] = []
        for index, (a, b) in enumerate(zip(clean, run_layers(model, x[0.0], past=past), strict=True)):
            w_o = model.weights.layers[index].w_o
            # Subtracted before the projection: the difference of two nearly equal outputs would cancel after rounding.
            head_outputs(b.z - a.z[:, start:], w_o, out=delta[graph.heads(index)])
            if a.mlp is not None and b.mlp is not None:
                delta[graph.mlp(index)] = b.mlp - a.mlp[:, start:]
            if keep:
                corrupt.append(b)
    else:
        delta[0] = other(0, batch.clean) - model.weights.w_e[batch.clean]
        for index, run in enumerate(clean):
            heads = graph.heads(index)
            head_outputs(run.z, model.weights.layers[index].w_o, out=delta[heads])
            for s in range(heads.start, heads.stop):
                torch.sub(other(s, batch.clean), delta[s], out=delta[s])
            if run.mlp is not None:
                delta[graph.mlp(index)] = other(graph.mlp(index), batch.clean) - run.mlp
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64, device=model.device)
    for alpha, weight in points:
        if alpha in ends:
            runs, _, norm_in, d_logits, first = ends.pop(alpha)
        else:
            runs = corrupt if alpha == 0.0 else list(run_layers(model, torch.lerp(x[0.0], x[1.0], alpha), past=past))
            logits, norm_in = unembed(model, runs[-1].out)
            d_logits = metric.grad(torch.cat([clean_logits[:, :start], logits], 1))[:, start:]
            first = 0
        active = d_logits[:, first:].ne(0).any(-1)  # [B, T']
        reads = active.any(0).nonzero()
        if not len(reads):
            continue
        length = int(reads[-1]) + 1  # behind the last position that the metric reads every gradient is zero
        read = active[:, :length].int().argmax(1, keepdim=True) if int(active.sum(1).max()) == 1 else None
        cut = _Cut(first, first + length, read)
        seen = delta[:, :, :length]
        at_read = None if read is None else seen[:, torch.arange(len(read), device=read.device)[:, None], read]
        grad = cut.grad(model, d_logits, norm_in)
        sink = _Contraction(model.graph, scores, seen, at_read, weight, impl)
        backward(model, cut.saved(runs), grad, sink, past=past, read=read)
    return scores


def _ablation(
    own: Model, model: nn.Module | Model, intervention: str, prompts: Iterable[Any] | None, verbatim: bool
) -> Callable[[int, Tensor], Tensor]:
    """(sender, tokens) → what the sender sends instead."""
    zero = torch.zeros((), dtype=own.dtype, device=own.device)
    if intervention == "zero" or prompts is None:
        return lambda sender, tokens: zero
    positional = intervention == "mean-positional"
    total: Tensor | None = None
    count = 0
    for batch in prompts:
        given = batch[0] if isinstance(batch, tuple | list) and not isinstance(batch[0], str) else batch
        tokens, lengths = tokenize(own, model, given, "prompts of intervention_dataloader")
        count += len(tokens)
        if tokens.shape[1] > _MEAN_LENGTH:
            raise ValueError(
                f"a prompt that is averaged has {tokens.shape[1]} tokens: that package cuts it to {_MEAN_LENGTH}, cut "
                "it yourself"
            )
        senders = run_with_senders(own, tokens)[1]
        senders[0] = own.weights.w_e[tokens]
        wide = senders.double()
        if positional:
            if int(lengths.min()) != tokens.shape[1]:
                raise ValueError(
                    "mean-positional over prompts of different lengths would average padding: give them one length"
                )
            here = wide.sum(1)  # [S, T, D]
        else:
            weight = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [B, T]
            if verbatim:
                weight &= torch.arange(tokens.shape[1], device=tokens.device) == lengths[:, None] - 1
            here = torch.einsum("sbtd,bt->sd", wide, weight / lengths[:, None].double())
        if total is not None and total.shape != here.shape:
            raise ValueError(
                f"mean-positional needs prompts of one length, got {total.shape[1]} and {here.shape[1]} tokens"
            )
        total = here if total is None else total + here
    if total is None:
        raise ValueError("intervention_dataloader is empty: at least one prompt is needed")
    mean = (total / count).to(own.dtype)
    if not positional:
        if verbatim:
            one = mean.sum(0) / their_shape(own.graph)[0]
            return lambda sender, tokens: one
        return lambda sender, tokens: mean[sender]

    def at_each_position(sender: int, tokens: Tensor) -> Tensor:
        if tokens.shape[1] != mean.shape[1]:
            raise ValueError(
                f"mean-positional needs prompts as long as those that were averaged, {mean.shape[1]} tokens, got "
                f"{tokens.shape[1]}"
            )
        return mean[sender]

    return at_each_position
