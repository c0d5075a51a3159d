"""One self-contained HTML page of one run, or of two side by side."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapcore.graph.files import finite, replacing
from eapcore.graph.scores import EDGE_SIGN, ENOUGH, FEWEST, EdgeScores
from eapcore.report.compare import correlations, jaccard, sizes
from eapcore.report.draw import Picture
from eapcore.report.layout import layout
from eapcore.report.reproduction import reproduced, shown
from eapcore.report.run_folder import PARTS, Run

MOST = 60_000  # edges that a page holds: 8 bytes each, 16 with their uncertainty
_HERE = Path(__file__).parent
_ROWS = 24  # prompt pairs that a page shows
_BINS, _DECADES = 24, 6  # of the histogram, to either side of 0


def write_page(runs: Sequence[Run], path: str | Path, *, command: str | None = None) -> None:
    """Write the page of one run, or of two side by side, as one HTML file that needs no network.

    Args:
        runs: one, or two of the same graph.
        path: the file to write.
        command: that made this page.

    Raises:
        RuntimeError: the package jinja2 is not installed.
        ValueError: two graphs; scores that are NaN; a part's file that is not as its command writes it.
        OSError: the page cannot be written.
    """
    text = render(runs, command=command)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def render(runs: Sequence[Run], *, command: str | None = None) -> str:
    """The page as text; see `write_page`."""
    check_jinja()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    data: dict[str, Any] = {"runs": [_run_data(run) for run in runs], "layout": _layout_data(runs[0].scores)}
    if len(runs) == 2:
        counts = sizes(runs[0].scores.graph.n_edges)
        a, b = (run.scores for run in runs)
        data["compare"] = {"sizes": counts, "jaccard": jaccard(a, b, counts), "agreement": correlations(a, b)}
    elif len(runs) != 1:
        raise ValueError(f"a page shows one run or two side by side, got {len(runs)}")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        runs=[_run_text(run, command) for run in runs],
        data=_script(data),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


def check_jinja() -> None:
    """RuntimeError where the package that fills in the page is not installed."""
    if find_spec("jinja2") is None:
        raise RuntimeError("a report needs the package jinja2: pip install 'eapcore[report]'")


def _script(data: Any) -> str:
    """JSON that can stand in a script element, whatever text is in it."""
    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _packed(values: Tensor) -> str:
    """A tensor's bytes, little-endian, in base64."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def _layout_data(scores: EdgeScores) -> dict[str, Any]:
    graph, places = scores.graph, layout(scores.graph)
    return {
        "graph": graph.as_dict(),
        "columns": places.columns,
        "rows": places.rows,
        "senders": [[name, *place] for name, place in zip(graph.sender_names, places.senders, strict=True)],
        "receivers": [[name, *place] for name, place in zip(graph.receiver_names, places.receivers, strict=True)],
        "behind": [list(graph.senders_behind(r)) for r in range(graph.n_receivers)],
        "before": [graph.senders_before(r) for r in range(graph.n_receivers)],
        "n_edges": graph.n_edges,
    }


def _run_data(run: Run) -> dict[str, Any]:
    """What the page's script draws of a run."""
    scores = run.scores
    flat, _ = scores.ranking()
    held = flat[:MOST]
    values = scores.scores.flatten()[held]
    in_circuit = None if run.circuit is None else run.circuit.mask.flatten()[held].nonzero().flatten().int()
    return {
        "name": run.name,
        "signed": "negative = needed" in scores.meta.get("sign", EDGE_SIGN),
        "unit": unit(scores),
        "edges": _packed(held.int()),
        "scores": _packed(values.float()),
        "beside": {
            name: _packed(x.flatten()[held].float())
            for name, x in (("standard error", scores.standard_error), ("same sign", scores.sign_consistency))
            if x is not None
        },
        "circuit": None if in_circuit is None else _packed(in_circuit),
        "histogram": histogram(run),
        **parts(run),
    }


def unit(scores: EdgeScores) -> str:
    """What scores are measured in: the metric's name, "" where nobody said it."""
    return str((scores.meta.get("metric") or {}).get("name") or "")


def parts(run: Run) -> dict[str, Any]:
    """What is drawn of a run's parts: `curves` of faithfulness, `rocs`, `exact` effects, sums by `positions`,
    and `agreement` of exact effects and scores in words."""
    return {
        "positions": _positions(run.scores),
        "curves": _part(run, "run", _run_curve) + _part(run, "evaluation", _evaluation_curves),
        "rocs": _part(run, "evaluation", lambda _, content: _rocs(content["rocs"]))
        + _part(run, "reproduction", lambda _, content: _rocs((content["judged"] or {}).get("curves", []))),
        "exact": _part(run, "verification", _exact),
        "agreement": _part(run, "verification", _agreement),
    }


def _part(run: Run, part: str, build: Callable[[Run, Any], Any]) -> Any:
    """What is drawn of a part; [] where its file is not there."""
    content = getattr(run, part)
    if content is None:
        return []
    try:
        return build(run, content)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        name, reason = run.files.get(part, PARTS[part][0]), str(error) if type(error) is ValueError else repr(error)
        raise ValueError(f"{name} of {run.name} is not as eapcore writes it: {reason}") from error


def _run_curve(run: Run, content: Any) -> list[dict[str, Any]]:
    return [_curve("run: top edges by |score|, connected", content["curve"])]


def _evaluation_curves(run: Run, content: Any) -> list[dict[str, Any]]:
    mib = content["mib"]
    names = {"absolute": f"by |score|, CMD {_number(mib['cmd'])}", "signed": f"by −score, CPR {_number(mib['cpr'])}"}
    return [_curve(name, mib[ranking]) for ranking, name in names.items()]


def _curve(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "sizes": [int(n) for n in content["sizes"]],
        "kept": [None if f is None else float(f) for f in content["faithfulness"]],
        "intervals": content.get("intervals"),
    }


def _rocs(rocs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"AUC {_number(found['auc'])} ({found['rule']}), {found['edge_set']['n_true']} true of "
            f"{found['edge_set']['n_edges']} edges",
            "fpr": _thinned(found["fpr"]),
            "tpr": _thinned(found["tpr"]),
        }
        for found in rocs
    ]


def _thinned(values: Sequence[float]) -> list[float]:
    """At most about 1,000 of a curve's points, with both ends."""
    step = max(1, len(values) // 1000)
    kept = [float(x) for x in values[::step]]
    return kept if (len(values) - 1) % step == 0 else [*kept, float(values[-1])]


def _exact(run: Run, content: Any) -> list[list[Any]]:
    """(edge, estimate, effect) of each edge that was patched; ValueError for a name that is no edge."""
    rows = list(zip(content["edges"], content["estimates"], content["effects"], strict=True))
    return [[*run.scores.graph.edge(edge), float(estimate), float(effect)] for edge, estimate, effect in rows]


def _agreement(run: Run, content: Any) -> list[str]:
    """How far the scores of the edges that were patched are right; [] where the file does not say."""
    found = content.get("agreement")
    if found is None:
        return []
    slope, intercept = (_number(found[key]) for key in ("slope", "intercept"))
    line = f"exact = {slope} · score {'−' if intercept.startswith('-') else '+'} {intercept.lstrip('-')}"
    signs = None if found["signs"] is None else 100 * found["signs"]
    return [line, f"R² {_number(found['r2'])}, Spearman {_number(found['spearman'])}, same sign {_number(signs)} %"]


def histogram(run: Run) -> dict[str, Any]:
    """Counts of edges by score, in and outside the circuit, on a logarithmic axis to both sides of 0.

    ends: [bins + 1], where each bin begins and the last ends; the middle one is what lies within 10^−6 of the largest
    |score|.
    """
    scores = run.scores
    values = scores.scores[scores.mask].double()
    finite_ones = values[values.isfinite()].abs()
    most = (float(finite_ones.max()) if len(finite_ones) else 0.0) or 1.0
    side = [most * 10 ** (_DECADES * (i / _BINS - 1)) for i in range(_BINS + 1)]
    ends = torch.tensor([-x for x in reversed(side)] + side, dtype=torch.float64, device="cpu")
    inside = (
        torch.zeros(len(values), dtype=torch.bool, device="cpu")
        if run.circuit is None
        else run.circuit.mask[scores.mask]
    )
    places = torch.bucketize(values.clamp(-most, most), ends[1:-1], right=True)
    counts = [places[chosen].bincount(minlength=len(ends) - 1).tolist() for chosen in (inside, ~inside)]
    return {"ends": ends.tolist(), "inside": counts[0], "outside": counts[1], "circuit": run.circuit is not None}


def _positions(scores: EdgeScores) -> dict[str, Any] | None:
    """Sums at each position of the scores of the edges into each layer's heads, its MLP, and the logits: [.][T]."""
    if scores.per_position is None:
        return None
    graph = scores.graph
    into = scores.per_position.double().sum(1)  # [T, R]
    rows, names = [], []
    for layer in range(graph.n_layers):
        rows.append(into[:, graph.qkv(layer)].sum(1))
        names.append(f"a{layer}")
        if graph.has_mlp:
            rows.append(into[:, graph.mlp_receiver(layer)])
            names.append(f"m{layer}")
    return {"names": [*names, "logits"], "values": torch.stack([*rows, into[:, graph.logits]]).tolist()}


def _number(value: Any) -> str:
    return "–" if value is None else f"{float(value):.4g}"


def _run_text(run: Run, command: str | None) -> dict[str, Any]:
    """What the page's template writes of a run."""
    meta = run.scores.meta
    return {
        "name": run.name,
        "facts": facts(run),
        "sign": meta.get("sign", EDGE_SIGN),
        "prompts": _part(run, "prompts", _prompt_rows) or None,
        "commands": _commands(run, command),
        "missing": run.missing,
        "files": dict(run.files),
        "made": [(str(key), _plain(value)) for key, value in meta.items()],
        "reproduction": _part(run, "reproduction", lambda _, content: shown(content)) or None,
    }


def of_reproduction(run: Run) -> dict[str, Picture]:
    """The pictures of a reproduction; none where the run is none."""
    return dict(_part(run, "reproduction", lambda _, content: reproduced(content)) or {})


def _plain(value: Any) -> str:
    """A value of a file's header for people."""
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _commands(run: Run, command: str | None) -> list[str]:
    """The commands that made a run's files, in order, each once, with where its results are; and the page's own."""
    found: dict[str, str] = {}
    for part in ("run", "reproduction", "prompts", "evaluation", "verification"):
        content = getattr(run, part)
        if content is not None and content.get("command"):
            file = f"/{run.files.get(part, PARTS[part][0])}" if part in ("evaluation", "verification") else ""
            found.setdefault(str(content["command"]), shlex.join(["--out", f"{run.name}{file}"]))
    lines = [f"{made} {out}" for made, out in found.items()]
    return [*lines, command] if lines and command is not None and command not in found else lines


def facts(run: Run) -> list[tuple[str, str]]:
    """What scores are of, for people: (what, text)."""
    meta, graph = run.scores.meta, run.scores.graph
    model, task, metric, method = (meta.get(key) or {} for key in ("model", "task", "metric", "method"))
    heads = f"{graph.n_layers} layers × {graph.n_heads} heads" + ("" if graph.has_mlp else ", no MLPs")
    rows = [("model", f"{model.get('name', 'unnamed')}: {heads}")]
    seed = "" if task.get("seed") is None else f", seed {task['seed']}"
    if task:
        rows.append(("task", f"{task.get('name', 'unnamed')}: {task.get('n_pairs', '?')} prompt pairs{seed}"))
    if metric:
        ends = [f"{end} {_number(metric[end])}" for end in ("clean", "corrupt") if metric.get(end) is not None]
        rows.append(("metric", f"{metric.get('name', 'unnamed')}" + (f": {', '.join(ends)}" if ends else "")))
    if method:
        rows.append(("method", str(method.get("name", "unnamed"))))
    rows.append(("edges", f"{graph.n_edges:,} ({graph.n_senders} senders × {graph.n_receivers} receivers)"))
    if run.circuit is not None:
        rows.append(("circuit", f"{run.circuit.n_edges:,} edge{'s' * (run.circuit.n_edges != 1)}"))
    if run.scores.jaccard is not None:
        circuit = [min(50, graph.n_edges) if run.circuit is None else run.circuit.n_edges]
        # Of the edges that were selected some may lie on no path, and are not in the circuit.
        n = max(1, *(_part(run, "run", lambda _, content: content["curve"]["sizes"][-1:]) or circuit))
        text = f"Jaccard index {_number(run.scores.jaccard[n - 1])} of the top {n:,} edges of two draws of the pairs"
        few = task.get("n_pairs", FEWEST) < FEWEST
        rows.append(("prompts", f"{text}; " + ("too few to judge by" if few else f"{ENOUGH:g} is enough")))
    if meta.get("dtype"):
        rows.append(("dtype", str(meta["dtype"])))
    return rows


def _prompt_rows(run: Run, content: Any) -> dict[str, Any]:
    """The prompt pairs as tokens: each with whether it differs, is read, and which position it is by name."""
    pairs = []
    for pair in content["pairs"][:_ROWS]:
        named = {int(place): str(name) for name, place in (pair.get("named") or {}).items()}
        clean, corrupt, read = pair["clean"], pair["corrupt"], int(pair["position"])
        rows = [
            [
                {"text": str(token), "at": at, "changed": token != other, "read": at == read, "name": named.get(at)}
                for at, (token, other) in enumerate(zip(tokens, others, strict=True))
            ]
            for tokens, others in ((clean, corrupt), (corrupt, clean))
        ]
        pairs.append({"clean": rows[0], "corrupt": rows[1], "answers": pair["answers"], "wrong": pair["wrong"]})
    return {"pairs": pairs, "n_pairs": content["n_pairs"]}
