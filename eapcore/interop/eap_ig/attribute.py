"""EAP-IG's `attribute`: the same arguments and the same numbers, by this package's own passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import eapcore.kernels as kernels
from eapcore.attribution.dense import DenseStore
from eapcore.attribution.methods import Options, Pass, Recipe
from eapcore.attribution.methods import recipe as recipe_of
from eapcore.attribution.score_batch import score_batch
from eapcore.attribution.sums import Sums
from eapcore.execution.ablation import Values, means, zeros
from eapcore.execution.batch import Batch
from eapcore.execution.experiment import result_dtype
from eapcore.graph.scores import EdgeScores
from eapcore.interop.eap_ig.names import in_their_order, their_shape
from eapcore.interop.sign import check_sign, sign_of_metric, signed, turned
from eapcore.interop.transformer_lens import from_hooked_transformer
from eapcore.kernels.checks import one_of
from eapcore.models.forward import check_tokens, embed_tokens, forward, run_with_senders
from eapcore.models.model import Model
from eapcore.tasks.metrics import MetricBatch
from eapcore.tasks.pairs import PromptPairs

METHODS = ("EAP", "EAP-IG-inputs", "clean-corrupted", "EAP-IG-activations")
_WITH_INTERVENTION = ("EAP", "EAP-IG-activations")
_ABLATIONS = {"patching": "corrupt"}  # their names that are not ours
INTERVENTIONS = ("patching", "zero", "mean", "mean-positional")
AGGREGATIONS = ("sum", "mean")
_MEAN_LENGTH = 512  # the package cuts prompts to this many tokens before it averages
_FORMS = "a tensor of tokens int64 [B, T] or a list of B strings"

Logits = Annotated[Tensor, "B T V"]
Metric = Callable[[Logits, Logits, Annotated[Tensor, "int64 B"], Any], Annotated[Tensor, "() | B"]]
Prompts = Annotated[Tensor, "int64 B T"] | Sequence[str]
PromptBatch = tuple[Prompts, Prompts, Any]


@torch.no_grad()
def attribute(
    model: nn.Module | Model,
    graph: Any,
    dataloader: Iterable[PromptBatch],
    metric: Metric,
    method: str,
    intervention: str = "patching",
    aggregation: str = "sum",
    ig_steps: int | None = None,
    intervention_dataloader: Iterable[Any] | None = None,
    quiet: bool = False,
    optimal_ablation_path: str | None = None,
    *,
    sign: str | None = None,
    verbatim: bool = False,
    impl: str = "auto",
) -> EdgeScores:
    """EAP-IG's `attribute`: score every edge and write the scores into `graph.scores`.

        score[s, r] = mean over pairs of Σ_t ⟨e_other[s, t] − e_clean[s, t], Σ_k w_k ∂metric/∂v[r, t] at point α_k⟩

    "EAP": the gradient of the clean run. "EAP-IG-inputs": its average over corrupt + (k/m)(clean − corrupt) for
    k = 0…m−1. "clean-corrupted": the mean of those of the clean and the corrupt run. "EAP-IG-activations": the mean
    over components (the embedding, all heads of a layer, an MLP) and k = 1…m of the gradient of the clean run with that
    component's output at other + (k/m)(clean − other). e_other is the corrupt run, or for "EAP" and
    "EAP-IG-activations" zero or a mean over other prompts.

    The metric is called as the package calls it, metric(logits [B, T, V], clean_logits, input_lengths [B], label), and
    returns the mean over its batch. The package divides its gradient by the number of pairs once more, so that there
    scores shrink as batches grow, and a short last batch weighs more; here each pair counts the same, whatever the
    batches are. A metric may also return one value a pair, [B].

    Another difference is "mean": here each sender's mean over prompts and positions; there one vector for all, the
    mean over senders of what they send at a prompt's last token, divided by its length. A third one is in
    "EAP-IG-activations" of models without a position embedding: there the receivers that read the embedding alone get
    no gradient while it is on the way. `verbatim` takes all of it back.

    `graph.scores` gets the numbers as the package makes them, of a metric or of a loss, whichever was given. What is
    returned has our sign where it is known which of them it was: the keyword `loss` of the metric, as in
    partial(metric, loss=True), says it, or else `sign`.

    Where a metric reads one position of each pair, which is asked of it with random logits, no other logits are made;
    the dataloader's batches are taken as they come.

    Args:
        model: a HookedTransformer, or a Model where the dataloader yields tokens.
        graph: the package's Graph, or anything with its `cfg` (n_layers, n_heads, …) and `scores`
            [1 + L(H+1), L(3H+1) + 1], which is overwritten in place, in its own dtype.
        dataloader: yields (clean, corrupt, label); prompts are a list of strings, which `model.to_tokens` tokenizes
            with a BOS and pads on the right, or tokens int64 [B, T] without padding. The metric gets label as it is.
        metric: as the package takes it.
        method: out of METHODS. The package's other methods are no first-order scores of edges: use its own function.
        intervention: out of INTERVENTIONS; other than "patching" for "EAP" and "EAP-IG-activations" alone. The senders
            are the package's, so that zero and mean replace the token embedding and leave the position embedding.
        aggregation: "sum" over d_model, or "mean".
        ig_steps: m, for "EAP-IG-inputs" and "EAP-IG-activations".
        intervention_dataloader: the prompts that are averaged; yields them alone or as the first of a tuple.
        quiet: no progress bar.
        optimal_ablation_path: MIB's; must be None.
        sign: "metric" if more of it is better, "loss" if less is; None where the metric's keyword `loss` says it, or
            where nothing needs it: what is returned then refuses a signed ranking.
        verbatim: the package's numbers to the letter (but for what its means add to MLPs that a model has not).
        impl: the kernels' implementation, see `kernels`.

    Returns:
        The scores that were written, in our order, sign (see above) and the model's full precision.

    Raises:
        ValueError: an option, a model, a graph of another model, prompts or a metric that do not fit.

    Source: Hanna, Pezzelle, Belinkov 2024, section 3; repository hannamw/EAP-IG, version 2.0.0.
    """
    own = model if isinstance(model, Model) else from_hooked_transformer(model)
    check_sign(sign)
    passes = _passes(own, method, ig_steps, intervention, intervention_dataloader, optimal_ablation_path, verbatim)
    one_of("aggregation", aggregation, AGGREGATIONS)
    one_of("impl", impl, kernels.IMPLS)
    _check_graph(graph, own)
    if verbatim and own.config.post_norms:
        raise ValueError(
            "verbatim does not suit a model with norms behind its heads: the package takes what heads make in front of "
            "the norm for what they send, which does not add up to what the layer adds"
        )
    values = None
    if intervention != "patching":
        if verbatim and method != "EAP" and intervention.startswith("mean"):
            raise ValueError(
                f"verbatim does not suit {method} with a mean: its gradients are then taken on the way to zero, "
                "its differences from the mean"
            )
        values = _values(own, model, intervention, intervention_dataloader, verbatim)
    recipe, lost = Recipe(passes, {}), Recipe(_lost(own, method, passes) if verbatim else (), {})
    alone = own.graph.edge_mask().sum(0).eq(1).to(own.device)  # receivers that read the embedding and nothing else
    total = torch.zeros(own.graph.n_senders, own.graph.n_receivers, dtype=torch.float64, device=own.device)
    count = 0
    for clean, corrupt, label in _progress(dataloader, quiet):
        pairs = _read(own, model, clean, corrupt)
        if count == 0:
            sign = sign_of_metric(metric, sign, partial(_on_random_logits, own, pairs, label))
        count += len(pairs)
        total += _score(own, pairs, metric, label, recipe, values, verbatim, impl)
        if lost.passes:
            total -= alone * _score(own, pairs, metric, label, lost, values, verbatim, impl)
    if count == 0:
        raise ValueError("the dataloader is empty: at least one pair is needed")
    scores = total / count
    if aggregation == "mean":
        scores /= own.config.d_model
    if not bool(scores.isfinite().all()):
        raise ValueError(f"the scores are NaN or infinite in {own.dtype}: use a wider dtype, or look at the metric")
    graph.scores[:] = in_their_order(own.graph, scores).to(graph.scores.device)
    ablation: dict[str, Any] = {"name": _ABLATIONS.get(intervention, intervention)}
    if intervention != "patching" and own.weights.w_pos is not None:
        ablation["embedding"] = "of the tokens alone"
    if intervention.startswith("mean"):
        ablation["prompts"] = "intervention_dataloader"
    meta = {
        "model": {"name": own.name, "content_hash": own.content_hash},
        "task": {"n_pairs": count},
        "metric": {"name": _name_of(metric), "source": "EAP-IG"},
        "method": {"name": method, "source": "EAP-IG", "ig_steps": ig_steps, "ablation": ablation},
        "dtype": str(own.dtype).removeprefix("torch."),
    }
    own_sign = turned(scores, sign).to(result_dtype(own.dtype)).cpu()
    return EdgeScores(own_sign, own.graph, signed(sign, meta))


def _name_of(metric: Any) -> str:
    """The name of a metric, of its function where some of its arguments are given."""
    while isinstance(metric, partial):
        metric = metric.func
    return getattr(metric, "__name__", type(metric).__name__)


def _passes(
    model: Model,
    method: str,
    ig_steps: int | None,
    intervention: str,
    intervention_dataloader: Iterable[Any] | None,
    optimal_ablation_path: str | None,
    verbatim: bool,
) -> tuple[Pass, ...]:
    """The backward passes of a method, once the options are known to fit."""
    one_of("method", method, METHODS)
    if intervention == "optimal" or optimal_ablation_path is not None:
        raise ValueError("optimal ablations are not supported here: intervention is patching, zero or a mean")
    one_of("intervention", intervention, INTERVENTIONS)
    if intervention != "patching" and method not in _WITH_INTERVENTION:
        raise ValueError(f"intervention must be 'patching' for {method}, got {intervention!r}")
    if intervention.startswith("mean") and intervention_dataloader is None:
        raise ValueError(f"intervention {intervention!r} averages prompts: give intervention_dataloader")
    if method == "EAP":
        return (Pass(1.0, 1.0),)
    if method == "clean-corrupted":
        return Pass(1.0, 0.5), Pass(0.0, 0.5)
    if not isinstance(ig_steps, int) or isinstance(ig_steps, bool) or ig_steps < 1:
        raise ValueError(f"{method} needs ig_steps, a positive integer, got {ig_steps!r}")
    if method == "EAP-IG-activations":
        passes = recipe_of("eap-ig-activations", model.graph, Options(steps=ig_steps, points="right")).passes
        if verbatim and model.config.attn_only:  # it also counts the clean run for each of the MLPs that are not there
            share = model.config.n_layers / (1 + 2 * model.config.n_layers)
            passes = (Pass(1.0, share), *(replace(step, weight=step.weight * (1 - share)) for step in passes))
        return passes
    return tuple(Pass(k / ig_steps, 1 / ig_steps) for k in range(ig_steps))


def _lost(model: Model, method: str, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """The passes in which the package's receivers that read the embedding alone get no gradient.

    Its interpolated embedding is a constant to autograd, and so is what they read if no position embedding, a
    parameter, is added to it.
    """
    if method != "EAP-IG-activations" or model.weights.w_pos is not None:
        return ()
    own = passes[1:] if model.config.attn_only else passes  # but for the clean run, see `_passes`
    return tuple(step for step in own if step.component == "embed")


def _check_graph(graph: Any, model: Model) -> None:
    cfg, scores = getattr(graph, "cfg", None), getattr(graph, "scores", None)
    if cfg is None or not isinstance(scores, Tensor):
        raise ValueError(f"graph must be EAP-IG's Graph, with cfg and scores, got a {type(graph).__name__}")
    config = model.config
    if model.graph.n_kv is not None:
        raise ValueError("the package has a k and a v input for each query head: load the model with kv='each'")
    expected = {"n_layers": config.n_layers, "n_heads": config.n_heads, "d_model": config.d_model}
    expected["parallel_attn_mlp"] = config.parallel
    fields = cfg if isinstance(cfg, Mapping) else vars(cfg)
    got = {name: fields.get(name) for name in expected if fields.get(name) is not None}
    if any(got[name] != expected[name] for name in got) or scores.shape != their_shape(model.graph):
        raise ValueError(
            f"the graph is of another model: expected {expected} and scores {list(their_shape(model.graph))}, "
            f"got {got} and {list(scores.shape)}"
        )


def _progress(dataloader: Iterable[PromptBatch], quiet: bool) -> Iterable[PromptBatch]:
    if quiet:
        return dataloader
    from tqdm import tqdm

    return tqdm(dataloader)


def _read(own: Model, model: nn.Module | Model, clean: Prompts, corrupt: Prompts) -> PromptPairs:
    """A batch of the dataloader as pairs; answers are the metric's own affair."""
    tokens, lengths = tokenize(own, model, clean, "clean prompts")
    other, _ = tokenize(own, model, corrupt, "corrupt prompts")
    if tokens.shape != other.shape:
        raise ValueError(
            f"clean and corrupt prompts of a batch must have the same number and length, got {list(tokens.shape)} and "
            f"{list(other.shape)} tokens"
        )
    nothing = lengths.new_full((len(tokens), 1), -1)
    return PromptPairs(tokens, other, lengths, lengths - 1, nothing, nothing[:, :0])


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


@dataclass(frozen=True, slots=True)
class _Metric:
    """The package's form of metric as one of ours, on logits at several positions of each pair.

    reads: int64 [B, Q], the positions whose logits are given. base: [B, T, V] the other logits, NaN where nobody reads
    them. clean: those of the clean run.
    """

    metric: Metric
    pairs: PromptPairs
    label: Any
    reads: Tensor
    base: Tensor
    verbatim: bool
    several_positions = True

    def __call__(self, logits: Annotated[Tensor, "B Q V"], reference: MetricBatch) -> Annotated[Tensor, "B"]:
        both = (self._all(logits), self._all(reference.clean_logits))
        value = self.metric(*both, self.pairs.lengths, self.label)
        pairs = len(self.pairs)
        if not isinstance(value, Tensor) or value.shape not in ((), (1,), (pairs,)):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the metric must return its mean over the batch, or one value a pair, got {got}")
        if not bool(value.isfinite().all()):
            raise ValueError("the metric is NaN or infinite: it must be finite on every batch")
        return (value.mean() / (pairs if self.verbatim else 1)).expand(pairs)

    def _all(self, logits: Tensor) -> Logits:
        full, rows = self.base.clone(), torch.arange(len(self.reads), device=self.reads.device)[:, None]
        full[rows, self.reads] = logits.to(full.dtype)
        return full


def _random_logits(like: Tensor) -> tuple[Logits, Logits]:
    """Logits and clean logits to ask a metric with, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(like.shape, generator=generator, device="cpu").to(like) for _ in range(2))
    return one, other


def _on_random_logits(model: Model, pairs: PromptPairs, label: Any, metric: Metric) -> Tensor:
    like = torch.empty((), dtype=model.dtype, device=model.device).expand(*pairs.clean.shape, model.config.d_vocab)
    return metric(*_random_logits(like), pairs.lengths, label)


def _reads(metric: Metric, pairs: PromptPairs, label: Any, like: Tensor) -> Tensor | None:
    """int64 [B, Q], where a metric reads logits, by asking it with random ones, like [B, T, V]; None is everywhere.

    What it has a gradient at with random logits is all that it reads if the others may as well be NaN.
    """
    logits, clean = _random_logits(like)
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        value = metric(leaf, clean, pairs.lengths, label)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ValueError("the metric has no gradient: it must be computed from the logits by torch operations")
        if not bool(value.isfinite().all()):
            return None
        (grad,) = torch.autograd.grad(value.sum(), leaf)
    active = grad.ne(0).any(-1)  # [B, T]
    padding = torch.arange(like.shape[1], device=like.device) >= pairs.lengths[:, None]
    if bool((active & padding).any()):
        raise ValueError("the metric reads logits behind the end of a prompt, where padding is: use input_lengths")
    counts = active.sum(1)
    if int(counts.min()) != int(counts.max()) or int(counts.min()) == 0:
        return None
    unread = ~active[..., None]
    hidden, hidden_clean = (x.detach().masked_fill(unread, torch.nan) for x in (logits, clean))
    with torch.no_grad():
        if not torch.equal(metric(hidden, hidden_clean, pairs.lengths, label), value):
            return None
    return active.nonzero()[:, 1].view(len(pairs), -1)


def _score(
    model: Model,
    pairs: PromptPairs,
    metric: Metric,
    label: Any,
    recipe: Recipe,
    values: _Ablated | None,
    verbatim: bool,
    impl: str,
) -> Tensor:
    """Σ over a batch's pairs of their scores, float64 [S, R]."""
    tokens = pairs.clean.shape[1]
    if values is not None and (averaged := len(values.each.embed)) not in (1, tokens):
        raise ValueError(
            f"mean-positional needs prompts as long as those that were averaged, {averaged} tokens, got {tokens}"
        )
    # Before the first difference clean and corrupt are one run: every Δ is zero there, and needs no gradient.
    start = int(pairs.first_difference().min()) if values is None else 0
    if values is None and not bool((pairs.clean != pairs.corrupt).any()):
        return torch.zeros(model.graph.n_senders, model.graph.n_receivers, dtype=torch.float64, device=model.device)
    base = torch.full((*pairs.clean.shape, model.config.n_logits), torch.nan, dtype=model.dtype, device=model.device)
    reads = _reads(metric, pairs, label, base)
    if reads is None or int(reads.min()) < start:
        reads = torch.arange(start, tokens, device=model.device).expand(len(pairs), -1)
        base = forward(model, pairs.clean)
    stop = int(reads.max()) + 1
    index = torch.arange(len(pairs), device=model.device)
    batch = Batch(pairs, index, start, stop, reads)
    own = _Metric(metric, pairs, label, reads, base, verbatim)

    def run(values: Values | None) -> Tensor:
        sums = Sums({"scores": (model.graph.n_senders, model.graph.n_receivers)}, batch, "all", impl)
        planned = recipe.planned("corrupt" if values is None else "zero", "all")
        store = DenseStore(model, batch, DenseStore.room(model, batch))
        score_batch(model, batch, own, store, sums, planned, [1] * len(recipe.passes), values=values)
        return sums.result()["scores"]

    if values is None or values.one is None:
        return run(None if values is None else values.each)
    # What every sender sends alike adds the same to all rows of a receiver: what it adds to the embedding's.
    zero = run(values.each)
    alike = run(replace(values.each, embed=values.one[None]))[0] - zero[0]
    return zero + alike * model.graph.edge_mask().to(model.device)


@dataclass(frozen=True, slots=True)
class _Ablated:
    """What each sender sends instead; with `one` [D] all of them send this besides."""

    each: Values
    one: Tensor | None = None


def _values(
    own: Model, model: nn.Module | Model, intervention: str, prompts: Iterable[Any] | None, verbatim: bool
) -> _Ablated:
    """What senders send instead: the package's embedding is that of the tokens alone."""
    if intervention == "zero" or prompts is None:
        return _Ablated(replace(zeros(own), of_tokens=True))
    tokens, lengths = _prompts_of(own, model, prompts)
    if intervention == "mean" and verbatim:
        total = torch.zeros(own.config.d_model, dtype=torch.float64, device=own.device)
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            senders = run_with_senders(own, row[None, :length])[1][:, 0, -1].double()  # [S, D]
            senders[0] = embed_tokens(own, row[None, length - 1 : length])[0, 0]
            total += senders.sum(0) / length
        one = (total / len(tokens)).to(own.dtype) / their_shape(own.graph)[0]
        return _Ablated(replace(zeros(own), of_tokens=True), one)
    positional = intervention == "mean-positional"
    if positional and int(lengths.min()) != tokens.shape[1]:
        raise ValueError(
            "mean-positional over prompts of different lengths would average padding: give them one length"
        )
    nothing = lengths.new_full((len(tokens), 1), -1)
    reference = PromptPairs(tokens, tokens, lengths, lengths - 1, nothing, nothing)
    found = means(own, reference.to("cpu"), per_position=positional)
    of_tokens = embed_tokens(own, tokens).double()  # [N, T, D]
    if positional:
        embedding = of_tokens.mean(0)
    else:
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        embedding = torch.einsum("btd,bt->d", of_tokens, inside / lengths[:, None].double())[None] / len(tokens)
    return _Ablated(replace(found, embed=embedding.to(own.dtype), of_tokens=True))


def _prompts_of(own: Model, model: nn.Module | Model, prompts: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """All prompts of a dataloader, int64 [N, T] padded on the right, and their lengths."""
    found: list[tuple[Tensor, Tensor]] = []
    for batch in prompts:
        given = batch[0] if isinstance(batch, tuple | list) and not isinstance(batch[0], str) else batch
        found.append(tokenize(own, model, given, "prompts of intervention_dataloader"))
        if (length := found[-1][0].shape[1]) > _MEAN_LENGTH:
            raise ValueError(
                f"a prompt that is averaged has {length} tokens: that package cuts it to {_MEAN_LENGTH}, cut it "
                "yourself"
            )
    if not found:
        raise ValueError("intervention_dataloader is empty: at least one prompt is needed")
    longest = max(tokens.shape[1] for tokens, _ in found)
    padded = [nn.functional.pad(tokens, (0, longest - tokens.shape[1])) for tokens, _ in found]
    return torch.cat(padded), torch.cat([lengths for _, lengths in found])
