"""Syed, Rager, Conmy 2023 redone: every step of it on a model, beside the published numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eapcore.attribution.attribute import attribute
from eapcore.evaluation.faithfulness import MIB_FRACTIONS, measure_mib
from eapcore.evaluation.inside import WITH_INSIDE, Inside, inside_effects, inside_scores, summed_inside
from eapcore.evaluation.kept_steps import KEPT_IN, KeptSteps, Starting
from eapcore.evaluation.published import ALL, COARSE, EVERY, Judged, Row, judge, rates, table, unit_of
from eapcore.evaluation.roc import RULES, roc, roc_of_circuits
from eapcore.evaluation.sampled import verify_sample
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, digest, result_dtype
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import write_json
from eapcore.graph.graph import Graph
from eapcore.graph.scores import UNKNOWN_SIGN, EdgeScores
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.patching.interpolate import follow_edge
from eapcore.patching.record import Recordings
from eapcore.search.acdc import acdc
from eapcore.search.smallest import run_until, selections
from eapcore.search.subnetwork_probing import STEPS, subnetwork_probing
from eapcore.tasks import TASKS
from eapcore.tasks.metrics import find_metric
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.published import Published
from eapcore.tasks.truth import Truth

FILES = ("scores.safetensors", "evaluation.json", "verification.json", "circuit.json", "reproduction.json")
THRESHOLDS = (0.003, 0.03, 0.3)  # of ACDC
MORE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of a small graph, all of which is searched
FACTORS = (0.25, 1.0, 4.0)  # of the published threshold, where searches start
SAMPLE, CURVES = 100, 4  # edges patched where not all are; of the outlying ones those that are followed
SMALL = 5_000  # edges that are all patched, and all searched
KEPT = 0.8  # of the behaviour, by the smallest circuit
HEADS = 15  # senders of the largest scores that are listed


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of a reproduction, and what `reproduction.json` holds.

    rows: the published numbers beside ours. unit: of scores in this object, in units of the metric: the published one.
    judged: against the published circuit. exact: edges patched, beside their scores. curves: edges on their way from
    clean to corrupt. searches: EAP followed by ACDC, with Youden's J. methods: the ROC's area of the other baselines,
    HISP and subnetwork probing. subnetworks: the edges above the published threshold, and as many as the circuit has.
    heads: the largest scores of whole heads and MLPs. circuits: of several sizes, up to the first that keeps KEPT.
    areas: CPR and CMD, see `faithfulness`. left_out: sentences. published: what is known of the paper's run. None or
    empty where it was left out.
    """

    __repr__ = short

    task: str
    unit: float
    rows: list[Row]
    judged: Judged | None = None
    exact: Mapping[str, Any] | None = None
    curves: Sequence[Mapping[str, Any]] = ()
    searches: Sequence[Mapping[str, Any]] = ()
    methods: Sequence[Mapping[str, Any]] = ()
    subnetworks: Sequence[Mapping[str, Any]] = ()
    heads: Sequence[Mapping[str, Any]] = ()
    circuits: Sequence[Mapping[str, Any]] = ()
    areas: Mapping[str, float] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    published: Published | None = None
    command: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "reproduction", self)


@dataclass(frozen=True, slots=True)
class Plan:
    """What of the long steps is done.

    sample: edges that are patched exactly; None is all of a graph of at most SMALL edges, else SAMPLE. curves: how many
    edges are followed. top_n, score_thresholds: where searches start, the latter in the published unit; both None:
    FACTORS of the published threshold, as many edges as the circuit has, and all of a small graph. thresholds: of ACDC;
    none at all leaves the searches out, None is THRESHOLDS, or MORE. search_metric: what ACDC keeps, "kl" or the task's
    metric. probe_steps: of subnetwork probing; 0 leaves it out.
    """

    sample: int | None = None
    curves: int = CURVES
    top_n: Sequence[int] | None = None
    score_thresholds: Sequence[float] | None = None
    thresholds: Sequence[float] | None = None
    search_metric: str = "kl"
    probe_steps: int = STEPS
    seed: int = 0


@reported
def reproduce(
    model: Model,
    task: str,
    pairs: PromptPairs,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    batch_size: int | str = "auto",
    progress: Starting = lambda name, unit: None,
    command: str | None = None,
    distributed: bool = False,
) -> Reproduction:
    """Redo the paper's experiments with a task on a model, and write scores, circuit, curves and table into a folder.

    Steps: EAP; its ROC in both edge sets by every rule; how scores are distributed in and out of the circuit and by
    sender; exact patching of all or a sample of the edges; edges followed from clean to corrupt; EAP followed by ACDC;
    the subnetworks at the published threshold; faithfulness. On a model of another graph than the published circuit's,
    whatever needs the circuit is left out, and the result says so. A step that is done is read from the folder, and one
    that was interrupted goes on where it was.

    Args:
        model, pairs: any model, and the task's pairs for it.
        task: a name out of TASKS that has a published circuit.
        folder: where everything is written; of one model, task and draw.
        plan: how much of the long steps is done.
        batch_size: pairs at a time.
        progress: called with each step's name and what it counts; returns what is called with (done, in all).
        command: that the file names.
        distributed: share each step's work among the processes of this run, as `attribute`; the first alone reads and
            writes what is kept in the folder, but for what a step that is under way has done.

    Raises:
        ValueError: an unknown task, a plan or a folder that does not fit, or pairs that do not fit the model.

    Source: Syed, Rager, Conmy 2023 (arXiv 2310.10348).
    """
    truth, published = known(task)
    plan = Plan() if plan is None else plan
    metric, folder = TASKS[task].metric, Path(folder)
    _check(plan, model.graph)
    experiment = Experiment.of(model, pairs, metric, distributed=distributed)
    leads = experiment.ranks.leads
    experiment.ranks.agree(task=task, plan=asdict(plan))
    find_metric(plan.search_metric, pairs.answers, pairs.wrong)
    steps = KeptSteps(folder, experiment, progress)
    work = _Work(experiment, truth, published, plan, steps, batch_size)
    scores = work.scores()
    unit = unit_of(published, scores.meta)
    left_out = []
    if unit is None:
        raise ValueError(f"the metric {metric} is the same on clean and corrupt prompts: there is nothing to reproduce")
    inside = work.inside().tied(scores)
    judged = None
    if truth.circuit.graph == model.graph:
        judged = judge(scores, truth, inside, published, unit)
    else:
        left_out.append(
            f"the published circuit is one of {truth.model}, {_size(truth.circuit.graph)}, but {model.name} has "
            f"{_size(model.graph)}: ROC, distributions in and out of the circuit and by role, Youden's J and the other "
            "baselines are left out"
        )
    rows = [] if judged is None else table(published, judged)
    exact, more = work.exact(scores, unit, judged is not None)
    rows += more
    curves = work.curves(scores, unit, exact)
    searches, more = work.searches(scores, unit, judged is not None)
    rows += more
    empty = [name for name, start in work.starts(scores, unit) if not start.n_edges]
    if empty and (plan.thresholds is None or len(plan.thresholds)):
        left_out.append(f"no edge has {' or '.join(empty)}: no search starts there")
    methods, more = ([], []) if judged is None else work.methods()
    rows += more
    subnetworks, chosen = work.subnetworks(scores, unit, judged is not None)
    if chosen is None:
        left_out.append(
            f"no |score| reaches the published threshold {published.threshold:g}: its subnetwork is empty, and "
            "circuit.json not written"
        )
    heads = _heads(model.graph, truth if judged is not None else None, inside, unit)
    circuits = work.circuits(scores)
    mib = work.faithfulness(scores)
    areas = {name: mib[name] for name in ("cpr", "cmd")}
    meta = {**experiment.describe(), "unit": _unit_text(published, metric), "metric": dict(scores.meta["metric"])}
    found = Reproduction(
        task, unit, rows, judged, exact, curves, searches, methods, subnetworks, heads, circuits, areas, left_out,
        published, command, meta,
    )  # fmt: skip
    if not leads:
        return found
    if chosen is not None:
        chosen.save(folder / "circuit.json")
    write_json(folder / "evaluation.json", "evaluation", {"mib": mib, "rocs": [], "command": command})
    measured = {key: [x * unit for x in exact[key]] for key in ("estimates", "effects")} | {"edges": exact["edges"]}
    write_json(
        folder / "verification.json",
        "verification",
        {**measured, "meta": {"scores": dict(scores.meta)}, "command": command},
    )
    found.save(folder / "reproduction.json")
    return found


def reproduce_scores(task: str, scores: EdgeScores, folder: str | Path, *, command: str | None = None) -> Reproduction:
    """The part that needs no model: scores from elsewhere beside the published circuit and numbers.

    Of the edges inside components scores say what `inside.summed_inside` makes of them.

    Raises:
        ValueError: an unknown task, scores of another one or of another graph than the published circuit's, or that are
            NaN; a folder that holds a reproduction on a model.
    """
    truth, published = known(task)
    if scores.graph != truth.circuit.graph:
        raise ValueError(
            f"the published circuit of {task} is one of {truth.circuit.graph}, but the scores are of {scores.graph}"
        )
    made = (scores.meta.get("task") or {}).get("name")
    if made in TASKS and made != task:
        raise ValueError(f"the scores are of the task {made}, but {task} is to be reproduced")
    folder, left_out, inside = Path(folder), list[str](), summed_inside(scores)
    if (folder / KEPT_IN).exists():
        raise ValueError(f"{folder} holds a reproduction on a model: give --out another folder, or delete it")
    if scores.meta.get("sign") == UNKNOWN_SIGN:
        left_out.append(
            "the scores do not say whether they are of a metric or of a loss: the ranking by −score is left out, and "
            "signs may be the other way round (--sign says it)"
        )
    unit = unit_of(published, scores.meta)
    if unit is None:
        left_out.append(
            "the scores do not say the metric's clean and corrupt values, in whose difference published scores are: "
            "they are taken as they stand, and moments, bounds and thresholds are not comparable"
        )
    left_out.append(
        "what needs a model is left out: exact patching, interpolation, ACDC, faithfulness; edges inside components "
        "have the sum of the edges' scores, which for q, k and v takes LayerNorm for linear"
    )
    judged = judge(scores, truth, inside, published, unit or 1.0)
    rows = table(published, judged)
    if unit is None:  # areas have no unit, but for those of a curve at published thresholds
        areas = [row for row in judged.areas if row["thresholds"] == EVERY]
        judged = replace(judged, areas=areas, beyond=None)
        rows = [row for row in rows if row.what.startswith("AUC") and COARSE not in row.what]
    graph, unit = scores.graph, unit or 1.0
    kept = scores.top_n(truth.circuit.n_edges)
    subnetworks = [{"selection": f"top {kept.n_edges}", **_described(kept), **rates(kept, truth)}]
    heads = _heads(graph, truth, inside, unit)
    found = Reproduction(
        task, unit, rows, judged, subnetworks=subnetworks, heads=heads, left_out=left_out, published=published,
        command=command, meta={"scores": dict(scores.meta)},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    scores.save(folder / "scores.safetensors")
    kept.save(folder / "circuit.json")
    found.save(folder / "reproduction.json")
    return found


def known(task: str) -> tuple[Truth, Published]:
    """A task's published circuit and numbers; ValueError for a task that has none."""
    found = TASKS.get(task)
    if found is None or found.truth is None or found.published is None:
        names = [name for name, each in TASKS.items() if each.published is not None]
        raise ValueError(f"task must be one with published numbers, {', '.join(names)}, got {task!r}")
    return found.truth(), found.published


def _size(graph: Graph) -> str:
    return f"{graph.n_layers} layers × {graph.n_heads} heads{'' if graph.has_mlp else ' without MLPs'}"


def _unit_text(published: Published, metric: str) -> str:
    return f"{metric}(clean) − {metric}(corrupt)" if published.normalised else metric


def _check(plan: Plan, graph: Graph) -> None:
    """ValueError for a plan that does not fit."""
    for n in plan.top_n or ():
        if not 1 <= n <= graph.n_edges:
            raise ValueError(f"searches start from between 1 and the {graph.n_edges} edges of this graph, got {n}")
    for name in ("curves", "probe_steps"):
        if getattr(plan, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(plan, name)}")
    for threshold in (*(plan.thresholds or ()), *(plan.score_thresholds or ())):
        if not 0 < threshold < math.inf:
            raise ValueError(f"thresholds must be positive and finite, got {threshold:g}")
    if plan.sample is not None and not 14 <= plan.sample <= graph.n_edges:
        raise ValueError(
            f"a sample must have between 14 and the {graph.n_edges} edges of this graph, got {plan.sample}"
        )


@dataclass(frozen=True, slots=True)
class _Work:
    """The steps on a model."""

    experiment: Experiment
    truth: Truth
    published: Published
    plan: Plan
    steps: KeptSteps
    batch_size: int | str

    @property
    def graph(self) -> Graph:
        return self.experiment.model.graph

    def scores(self) -> EdgeScores:
        """EAP's scores, written into the folder."""
        return self._scored("scores", self.steps.folder.parent / "scores.safetensors", {}, "eap")

    def _scored(self, name: str, path: Path, asked: Mapping[str, Any], method: str) -> EdgeScores:
        """Scores by a first-order method, or by training masks of nodes, kept in a file."""
        experiment, steps, ranks = self.experiment, self.steps, self.experiment.ranks
        options: dict[str, Any] = {"batch_size": self.batch_size, "distributed": ranks.distributed}

        def make() -> str | None:
            model, pairs = experiment.model, experiment.pairs
            if method == "subnetwork-probing":
                options["progress"] = steps.progress("training masks", "step × pair")
                found = subnetwork_probing(model, pairs, "kl", level="node", steps=self.plan.probe_steps, **options)
            else:
                options["progress"] = steps.progress(f"scoring by {method}", "pair")
                options["resume"] = steps.begun(name)
                found = attribute(model, pairs, experiment.metric_name, method=method, **options)
            if not ranks.leads:
                return None
            found.save(path)
            steps.ended(name)
            return digest(EdgeScores.load(path).scores)

        if ranks.leads and not path.exists():
            steps.forget(name)
        made, found = steps(name, asked, make), None
        if ranks.leads:
            found = EdgeScores.load(path, content_hash=experiment.model.content_hash)
            if digest(found.scores) != made:
                raise ValueError(f"{path} holds other scores than this reproduction made: give --out another folder")
        return _in_all(experiment, found)

    def methods(self) -> tuple[list[dict[str, Any]], list[Row]]:
        """The area under the ROC of the paper's other baselines, among edges between components."""
        asked: dict[str, tuple[str, dict[str, Any]]] = {"HISP": ("hisp", {})}
        if self.plan.probe_steps:
            steps = {"steps": self.plan.probe_steps}
            asked["subnetwork probing, nodes by KL"] = ("subnetwork-probing", steps)
        found, rows = [], []
        for name, (method, options) in asked.items():
            scores = self._scored(method, self.steps.folder / f"{method}.safetensors", options, method)
            whole = roc(scores, self.truth.circuit)
            found += [{"method": name, "edge_set": ALL, "rule": rule, "auc": whole.by(rule).auc} for rule in RULES]
            rows.append(Row.of(f"AUC, {name}: {ALL} alone", self.published.auc.get(method), whole.auc))
        return found, rows

    def inside(self) -> Inside:
        """Scores of the edges inside components."""

        def make() -> dict[str, Any]:
            progress = self.steps.progress("scoring inside components", "pair")
            found = inside_scores(self.experiment, batch_size=self.batch_size, progress=progress)
            return {"inputs": found.inputs.tolist(), "sent": found.sent.tolist()}

        return _inside(self.graph, self.steps("inside", {}, make))

    def exact(self, scores: EdgeScores, unit: float, of_circuit: bool) -> tuple[dict[str, Any], list[Row]]:
        """Exact patching of all edges, or of a sample, beside their scores."""
        n = self.plan.sample
        n = (self.graph.n_edges if self.graph.n_edges <= SMALL else SAMPLE) if n is None else n
        every = n == self.graph.n_edges

        def make() -> dict[str, Any]:
            model, pairs, metric = self.experiment.model, self.experiment.pairs, self.experiment.metric_name
            progress = self.steps.progress("patching edges", "edge × pair")
            options: dict[str, Any] = {"seed": self.plan.seed, "batch_size": self.batch_size, "progress": progress}
            options["distributed"] = self.experiment.ranks.distributed
            found = verify_sample(model, pairs, metric, scores, n, resume=self.steps.begun("exact"), **options)
            self.steps.ended("exact")
            names = ("edges", "estimates", "effects", "weights", "r2", "slope", "r2_interval", "slope_interval")
            return {name: getattr(found, name) for name in names}

        made = self.steps("exact", {"n": n, "seed": self.plan.seed}, make)
        x, y, w = (
            torch.tensor(made[name], dtype=torch.float64, device="cpu") for name in ("estimates", "effects", "weights")
        )
        intercept = float((w * (y - float(made["slope"] or 0) * x)).sum() / w.sum())
        exact = {
            **made,
            "which": "all edges" if every else f"{n} of {self.graph.n_edges} edges, drawn in strata by |score|",
            "estimates": (x / unit).tolist(),
            "effects": (y / unit).tolist(),
            "intercept": intercept / unit,
        }
        rows = []
        if self.published.fit is not None or every:
            fit = self.published.fit or (None, None, None)
            which = "" if every else ", from a sample"
            for what, value, key in zip(
                ("slope of exact on EAP", "intercept", "R²"), fit, ("slope", "intercept", "r2"), strict=True
            ):
                rows.append(Row.of(f"exact patching against EAP{which}: {what}", value, exact[key]))
        if of_circuit and every:
            effects = torch.zeros_like(scores.scores, dtype=torch.float64)
            for edge, effect in zip(made["edges"], made["effects"], strict=True):
                effects[self.graph.edge(edge)] = effect
            patched = EdgeScores(effects, self.graph, {"sign": scores.meta["sign"]})
            inside = _inside(self.graph, self.steps("exact-inside", {}, self._inside_effects))
            others = inside.tied(patched, exact=True).against(self.truth)
            areas = [roc(patched, self.truth.circuit, others=more).auc for more in (others, None)]
            exact["auc"] = {WITH_INSIDE: areas[0], ALL: areas[1]}
            rows.append(
                Row.of(f"AUC, activation patching: |effect|, {WITH_INSIDE}", self.published.auc.get("patch"), areas[0])
            )
            rows.append(Row.of(f"AUC, activation patching: |effect|, {ALL} alone", None, areas[1]))
        return exact, rows

    def _inside_effects(self) -> dict[str, Any]:
        progress = self.steps.progress("patching inside components", "run × pair")
        found = inside_effects(self.experiment, batch_size=self.batch_size, progress=progress)
        return {"inputs": found.inputs.tolist(), "sent": found.sent.tolist()}

    def curves(self, scores: EdgeScores, unit: float, exact: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The edges where score and effect differ most, and those that were published, from clean to corrupt."""
        rows = sorted(
            zip(exact["edges"], exact["estimates"], exact["effects"], strict=True), key=lambda r: -abs(r[1] - r[2])
        )
        edges = list(self.published.bent) if self.truth.circuit.graph == self.graph else []
        edges = list(dict.fromkeys([*edges, *(row[0] for row in rows[: self.plan.curves])]))

        def make() -> list[dict[str, Any]]:
            progress, found = self.steps.progress("following edges", "edge"), []
            for done, edge in enumerate(edges, 1):
                found.append(follow_edge(self.experiment, edge, score=scores[edge], batch_size=self.batch_size))
                if progress is not None:
                    progress(done, len(edges))
            return [{"edge": each.edge, "points": each.points, "effects": each.effects} for each in found]

        made = self.steps("curves", {"edges": edges}, make)
        return [
            {**each, "effects": [x / unit for x in each["effects"]], "estimate": scores[each["edge"]] / unit,
             "published": each["edge"] in self.published.bent}
            for each in made
        ]  # fmt: skip

    def starts(self, scores: EdgeScores, unit: float) -> list[tuple[str, Circuit]]:
        """Where searches start, each by name; some may be empty."""
        sizes, levels = list(self.plan.top_n or ()), list(self.plan.score_thresholds or ())
        if self.plan.top_n is None and self.plan.score_thresholds is None:
            levels = [factor * self.published.threshold for factor in FACTORS]
            sizes = [min(self.truth.circuit.n_edges, self.graph.n_edges)]
            sizes += [self.graph.n_edges] if self.graph.n_edges <= SMALL else []
        found = [(f"|score| ≥ {level:g}", scores.threshold(level * abs(unit))) for level in levels]
        found += [(f"top {n}" if n < self.graph.n_edges else "all edges", scores.top_n(n)) for n in sizes]
        return found

    def searches(self, scores: EdgeScores, unit: float, of_circuit: bool) -> tuple[list[dict[str, Any]], list[Row]]:
        """EAP followed by ACDC: each start with each threshold."""
        starts = self.starts(scores, unit)
        thresholds = self.plan.thresholds
        if thresholds is None:
            thresholds = MORE if self.graph.n_edges <= SMALL else THRESHOLDS
        found, whole = [], []
        for name, start in starts:
            for threshold in thresholds if start.n_edges else ():
                made = self.steps(
                    f"search-{digest(start.mask)}-{threshold:g}-{self.plan.search_metric}", {},
                    partial(self._search, name, start, threshold, unit),
                )  # fmt: skip
                circuit = Circuit.from_edges(self.graph, made.pop("circuit"))
                row = {
                    "start": name,
                    "start_edges": start.n_edges,
                    "threshold": threshold,
                    **_described(circuit),
                    **made,
                }
                if of_circuit:
                    row |= rates(circuit, self.truth) | {"start_j": rates(start, self.truth)["j"]}
                found.append(row)
                if start.n_edges == self.graph.n_edges:
                    whole.append(circuit)
        rows = []
        if of_circuit and whole:
            metric = self.plan.search_metric
            names = {"kl": "acdc kl", self.experiment.metric_name: "acdc"}
            value = self.published.auc.get(names.get(metric, ""))
            by = "KL" if metric == "kl" else f"the metric {metric}"
            what = f"AUC, ACDC by {by}: {ALL}, {len(whole)} thresholds, Pareto, lower steps"
            rows.append(Row.of(what, value, roc_of_circuits(whole, self.truth.circuit).auc))
        return found, rows

    def _search(self, name: str, start: Circuit, threshold: float, unit: float) -> dict[str, Any]:
        experiment, metric = self.experiment, self.plan.search_metric
        of_task = metric == experiment.metric_name
        found = acdc(
            experiment.model,
            experiment.pairs,
            metric,
            threshold=threshold * (abs(unit) if of_task else 1),
            start=start,
            batch_size=self.batch_size,
            progress=self.steps.progress(f"searching from {name} at {threshold:g}", "edge"),
            distributed=experiment.ranks.distributed,
        )
        values = found.meta["metric"]
        return {"metric": metric, "value": values["circuit"], "decided": found.meta["forwards"]["decided"],
                "circuit": found.edges}  # fmt: skip

    def subnetworks(
        self, scores: EdgeScores, unit: float, of_circuit: bool
    ) -> tuple[list[dict[str, Any]], Circuit | None]:
        """The edges above the published threshold, and as many as the published circuit has, run."""
        threshold = self.published.threshold
        at = scores.threshold(threshold * abs(unit))
        chosen = [(f"|score| ≥ {threshold:g}", at)] if at.n_edges else []
        n = min(self.truth.circuit.n_edges, self.graph.n_edges)
        chosen.append((f"top {n}", scores.top_n(n)))
        if of_circuit:
            chosen.append(("the published circuit", self.truth.circuit))

        def make() -> list[float]:
            progress = self.steps.progress("running subnetworks", "circuit")
            circuits = [circuit for _, circuit in chosen]
            recordings = Recordings(self.experiment, self.batch_size)
            return [
                each.faithfulness for each in run_until(self.experiment, recordings, circuits, progress=progress)[0]
            ]

        kept = self.steps("subnetworks", {"masks": [digest(circuit.mask) for _, circuit in chosen]}, make)
        found = []
        for (name, circuit), f in zip(chosen, kept, strict=True):
            row = {"selection": name, **_described(circuit), "faithfulness": f}
            found.append(row | (rates(circuit, self.truth) if of_circuit else {}))
        return found, at if at.n_edges else None

    def circuits(self, scores: EdgeScores) -> list[dict[str, Any]]:
        """Circuits of several sizes by |score|, up to the first that keeps KEPT of the behaviour."""

        def make() -> list[dict[str, Any]]:
            progress, recordings = self.steps.progress("running circuits", "circuit"), self._recordings()
            tried = run_until(self.experiment, recordings, selections(scores), KEPT, progress=progress)[0]
            names = ("value", "faithfulness", "interval")
            return [
                {"edges": each.selected.n_edges, "connected": each.circuit.n_edges}
                | {name: getattr(each, name) for name in names}
                for each in tried
            ]

        return list(self.steps("circuits", {"kept": KEPT}, make))

    def faithfulness(self, scores: EdgeScores) -> Any:
        """Faithfulness over MIB's sizes, with CPR and CMD."""

        def make() -> dict[str, Any]:
            progress = self.steps.progress("running circuits of ten sizes", "circuit × pair")
            found = measure_mib(self.experiment, self._recordings(), scores, progress=progress)
            return {"cpr": found.cpr, "cmd": found.cmd} | {
                name: _curve(getattr(found, name)) for name in ("signed", "absolute")
            }

        return self.steps("faithfulness", {"sizes": MIB_FRACTIONS}, make)

    def _recordings(self) -> Recordings:
        return Recordings(self.experiment, self.batch_size)


def _in_all(experiment: Experiment, scores: EdgeScores | None) -> EdgeScores:
    """The first process's scores in every one; None in the others."""
    model, ranks = experiment.model, experiment.ranks
    values = model.graph.edge_mask().double() if scores is None else scores.scores.double()
    whole, meta = ranks.sum([values], 1), ranks.first(None if scores is None else dict(scores.meta))
    return scores or EdgeScores(whole.to(result_dtype(model.dtype)), model.graph, meta)


def _curve(curve: Any) -> dict[str, Any]:
    names = ("fractions", "sizes", "values", "faithfulness", "clean", "ablated", "cpr", "cmd", "meta", "intervals")
    return {name: getattr(curve, name) for name in names}


def _inside(graph: Graph, made: Mapping[str, Any]) -> Inside:
    inputs, sent = (torch.tensor(made[name], dtype=torch.float64, device="cpu") for name in ("inputs", "sent"))
    return Inside(graph, inputs, sent)


def _described(circuit: Circuit) -> dict[str, int]:
    return {"edges": circuit.n_edges, "connected": circuit.prune().n_edges}


def _heads(graph: Graph, truth: Truth | None, inside: Inside, unit: float) -> list[dict[str, Any]]:
    """The senders with the largest |score| of all that they send, but for the embedding."""
    order = sorted(range(1, graph.n_senders), key=lambda s: -abs(float(inside.sent[s])))[:HEADS]
    names = graph.sender_names
    return [
        {
            "sender": names[s],
            "score": float(inside.sent[s]) / unit,
            "role": None if truth is None else truth.role(names[s]),
        }
        for s in order
    ]
