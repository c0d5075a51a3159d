"""Information flow routes are the literal ones: what a threshold extracts, and shares that add up to one."""

from __future__ import annotations

import oracle
import pytest
import torch
from models import KINDS, lists, random_model, random_pairs, with_weights
from refusal import refused

import eapcore
from eapcore.attribution.flow_routes import flow_routes
from eapcore.graph.scores import NO_SIGN
from eapcore.tasks import PromptPairs

LENGTHS = [6, 3, 5]


def shares(whole, parts):
    whole, parts = whole.detach(), [part.detach() for part in parts]
    near = [max(0.0, float(whole.abs().sum() - (whole - part).abs().sum())) for part in parts]
    return [x / sum(near) if sum(near) else 0.0 for x in near]


class Literal:
    """One prompt's parts, one position and one part at a time."""

    def __init__(self, model, tokens, position):
        self.graph, self.model, self.position = model.graph, model, position
        made = oracle.run(model, tokens)
        self.made, self.layers = made, oracle.layers_of(model.weights)
        self.known = {}

    def senders(self, r, t):
        """(sender, share) of what a receiver reads at a position."""
        if (r, t) not in self.known:
            stop = self.graph.senders_before(r)
            parts = [self.made.senders[s][t] for s in range(stop)]
            self.known[r, t] = list(enumerate(shares(self.made.receivers[r][t], parts)))
        return self.known[r, t]

    def behind(self, s, u):
        """(receiver, position, share) of what a sender at a position is made of."""
        name = self.graph.sender_names[s]
        if name == "embed":
            return []
        if name[0] == "m":
            return [(self.graph.receiver(name), u, 1.0)]
        layer, h = (int(x[1:]) for x in name.split("."))
        r = self.graph.receiver(f"{name}<v>")
        sent = self.made.inner[r] @ self.layers[layer][0].w_o[h]
        parts = [self.made.patterns[layer, h][u, t] * sent[t] for t in range(u + 1)]
        return [(r, t, share) for t, share in enumerate(shares(sum(parts), parts))]

    def extracted(self, threshold):
        """The edges of the graph that is walked from the logits along parts above a threshold."""
        found, seen, stack = set(), set(), [(self.graph.logits, self.position)]
        while stack:
            r, t = stack.pop()
            if (r, t) in seen:
                continue
            seen.add((r, t))
            for s, share in self.senders(r, t):
                if share > threshold:
                    found.add((s, r))
                    stack += [(r2, t2) for r2, t2, share2 in self.behind(s, t) if share2 > threshold]
        return found

    def flow(self):
        scores = torch.zeros(self.graph.n_senders, self.graph.n_receivers, dtype=torch.float64)
        reached = {(self.graph.logits, self.position): 1.0}
        for r in reversed(range(self.graph.n_receivers)):
            for t in range(self.position + 1):
                for s, share in self.senders(r, t) if reached.get((r, t)) else ():
                    scores[s, r] += reached[r, t] * share
                    for r2, t2, share2 in self.behind(s, t):
                        reached[r2, t2] = reached.get((r2, t2), 0.0) + reached[r, t] * share * share2
        return scores


@pytest.mark.parametrize("kind", ["gpt2", "attention-only", "no LayerNorm"])
def test_they_are_the_literal_routes(kind):
    model = random_model(**KINDS[kind] | {"n_heads": 2, "d_model": 16, "n_layers": 2})
    pairs = random_pairs(model, LENGTHS)
    routes = flow_routes(model, pairs, reduce="pair", batch_size=2)
    flow = flow_routes(model, pairs, routes="flow", reduce="pair", batch_size=2)
    for i in range(len(pairs)):
        tokens, _, position, _, _ = oracle.pair_at(pairs, i)
        literal = Literal(model, tokens, position)
        torch.testing.assert_close(flow.per_pair[i], literal.flow(), rtol=0, atol=1e-10)
        seen = set()
        for threshold in (0.02, 0.05, 0.1, 0.2, 0.3):
            edges = literal.extracted(threshold)
            assert {tuple(edge) for edge in (routes.per_pair[i] > threshold).nonzero().tolist()} == edges
            seen.add(len(edges))
        assert len(seen) > 2
    for scores in (routes, flow):
        torch.testing.assert_close(scores.per_pair.mean(0), scores.scores, rtol=0, atol=1e-12)
        assert scores.meta["metric"] == {"name": "none"} and NO_SIGN in scores.meta["sign"]
        assert float(scores.scores[:, model.graph.logits].sum()) == pytest.approx(1) or scores is routes
    measured = flow_routes(model, pairs, "nll", batch_size=2).meta["metric"]
    assert measured["clean"] == pytest.approx(eapcore.attribute(model, pairs, "nll").meta["metric"]["clean"], abs=1e-12)
    embedded = sum(x for name, x in flow.top(model.graph.n_edges) if name.startswith("embed->"))
    assert embedded == pytest.approx(1)  # everything comes from the tokens in the end


def test_they_need_no_corrupt_prompt_no_answer_and_no_size_of_batches(tmp_path):
    model = random_model(dtype=torch.float32)
    pairs = random_pairs(model, LENGTHS)
    alone = PromptPairs.from_lists(**lists(pairs) | {"corrupt": None})
    for method, routes in (("flow-routes", "threshold"), ("flow-sum", "flow")):
        seen = []
        found = eapcore.attribute(model, alone, method=method, batch_size=1, progress=lambda *x, s=seen: s.append(x))
        assert seen[-1] == (3, 3) and found.meta["method"] == {"name": "flow-routes", "routes": routes, "level": "edge"}
        torch.testing.assert_close(found.scores, flow_routes(model, pairs, routes=routes).scores, rtol=0, atol=1e-6)
        found.save(tmp_path / "scores.safetensors")
        assert torch.equal(eapcore.EdgeScores.load(tmp_path / "scores.safetensors").scores, found.scores)
    tokens = (pairs.clean[:, :3], pairs.clean[:, :3])
    assert float(eapcore.attribute(model, tokens, method="flow-routes").scores.max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_comes_near(dtype):
    narrow = random_model(scale=0.2, dtype=dtype)
    pairs = random_pairs(narrow, LENGTHS)
    for routes in ("threshold", "flow"):
        exact, found = (
            flow_routes(m, pairs, routes=routes).scores.double()
            for m in (with_weights(narrow, torch.Tensor.double), narrow)
        )
        assert float((found - exact).norm() / exact.norm()) <= {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]


def test_what_is_refused():
    model = random_model()
    pairs = random_pairs(model, LENGTHS)
    for how, message in [
        ({"ablation": "zero"}, "flow-routes ablates nothing"),
        ({"level": "node"}, "takes no level: 'node'"),
        ({"steps": 3}, "takes no steps: 3"),
        ({"budget": 2.0}, "takes no budget: 2.0"),
        ({"reduce": "position"}, "all, pair, got 'position'"),
    ]:
        refused(message, eapcore.attribute, model, pairs, method="flow-routes", **how)
    refused("threshold, flow, got 'all'", flow_routes, model, pairs, routes="all")
