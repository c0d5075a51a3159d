"""What the pipeline's benchmarks share: models, prompts, the floor, every implementation, and memory measured apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eapcore.attribution.attribute import attribute
from eapcore.graph.graph import Graph
from eapcore.models.config import ModelConfig
from eapcore.models.mlp import APPROXIMATE
from eapcore.models.model import Model
from eapcore.models.weights import LayerWeights, Weights
from eapcore.tasks import PromptPairs

HERE = Path(__file__).resolve().parent
RIGHT, WRONG = 5, 7
MIB = 2**20
PUBLISHED = ("transformer-lens", "transformer-lens, frozen", "auto-circuit")
Run = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Work:
    """A model's dimensions and a batch of prompt pairs, by DESIGN's letters; V vocabulary, P the first difference."""

    L: int
    H: int
    D: int
    V: int
    B: int
    T: int
    P: int = 0

    @property
    def graph(self) -> Graph:
        return Graph(self.L, self.H, True)

    def sender_buffer(self) -> int:
        """Bytes of the dense sender buffer in float32."""
        return self.graph.n_senders * self.B * self.T * self.D * 4

    def model(self, *, dtype: torch.dtype = torch.float32, device: str = "cpu", drawn_on: str | None = None) -> Model:
        """A GPT-2-architecture model with random weights in GPT-2's own layout, drawn in float32 where it says."""
        generator = torch.Generator(drawn_on or device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=generator.device) * 0.02).to(device, dtype)

        def ln() -> tuple[Tensor, Tensor]:
            ones = torch.ones(self.D, device=device, dtype=dtype)
            return ones, torch.zeros_like(ones)

        d_head, d_mlp = self.D // self.H, 4 * self.D
        layers = []
        for _ in range(self.L):
            w_qkv = draw(self.D, 3 * self.H, d_head).permute(1, 0, 2)
            attention = ((w_qkv,), draw(3 * self.H, d_head), draw(self.H, d_head, self.D), draw(self.D), ln())
            mlp = (draw(self.D, d_mlp), draw(d_mlp), draw(d_mlp, self.D), draw(self.D))
            layers.append(LayerWeights(*attention, ln(), *mlp))
        w_e = draw(self.V, self.D)
        weights = Weights(w_e, draw(1024, self.D), tuple(layers), w_e.T, None, ln())
        config = ModelConfig(self.L, self.H, self.D, d_head, d_mlp, self.V, 1024, "gelu_new", d_head**0.5)
        model = Model(config, weights, "random")
        model.__dict__["content_hash"] = "random"  # hashing the weights is not part of scoring
        return model

    def pairs(self, batches: int = 1) -> PromptPairs:
        generator = torch.Generator().manual_seed(1)
        shape = (batches * self.B, self.T)
        clean, corrupt = (torch.randint(0, self.V, shape, generator=generator) for _ in range(2))
        corrupt[:, : self.P] = clean[:, : self.P]
        corrupt[:, self.P] = (clean[:, self.P] + 1) % self.V
        return PromptPairs.from_lists(clean.tolist(), corrupt.tolist(), [RIGHT] * len(clean), [WRONG] * len(clean))


def plain_forward(model: Model, x: Tensor) -> Tensor:
    """Logits [B, V] at the last position, in plain PyTorch, from the embedding [B, T, D]."""
    config, weights = model.config, model.weights
    batch, tokens, width = x.shape
    for index, layer in enumerate(weights.layers):
        n = F.layer_norm(x, (width,), *layer.ln1, config.eps)
        qkv = n @ layer.w_qkv[0].permute(1, 0, 2).reshape(width, -1) + layer.b_qkv.flatten()
        q, k, v = qkv.view(batch, tokens, 3, config.n_heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=config.score_scale(index))
        x = x + z.transpose(1, 2).flatten(2) @ layer.w_o.flatten(0, 1) + layer.b_o
        n = F.layer_norm(x, (width,), *layer.ln2, config.eps)
        x = x + F.gelu(n @ layer.w_in + layer.b_in, approximate=APPROXIMATE[config.act_fn]) @ layer.w_out + layer.b_out
    return F.layer_norm(x[:, -1], (width,), *weights.ln_final, config.eps) @ weights.w_u


def floor(model: Model, pairs: PromptPairs) -> None:
    """Two forwards and an activation-only backward of one batch."""
    weights = model.weights
    start = [weights.w_e[t] + weights.w_pos[: t.shape[1]] for t in (pairs.corrupt, pairs.clean)]
    with torch.no_grad():
        plain_forward(model, start[0])
    start[1].requires_grad_()
    logits = plain_forward(model, start[1])
    torch.autograd.grad((logits[:, RIGHT] - logits[:, WRONG]).sum(), start[1])


def implementation(name: str, model: Model, pairs: PromptPairs, batch: int) -> Run:
    """A call that runs one implementation batch by batch, and gives its scores [S, R] (None for the floor)."""
    if name in ("dense", "factored", "dense, no graphs", "dense, in halves"):
        storage, _, how = name.partition(", ")
        size = max(1, batch // 2) if how == "in halves" else batch
        graphs = False if how == "no graphs" else "auto"
        return lambda: attribute(model, pairs, storage=storage, batch_size=size, graphs=graphs).scores
    if name in PUBLISHED:
        import published

        return published.implementation(name, model, pairs, batch)
    batches = [part.to(model.device) for part in pairs.batches(batch)]
    if name == "floor":

        def run_floor() -> None:
            for part in batches:
                floor(model, part)

        return run_floor
    if name == "hooked":
        import hooked

        module = hooked.Hooked(model)

        def run_hooked() -> Tensor:
            parts = [hooked.eap(module, p.clean, p.corrupt, RIGHT, WRONG) * len(p) for p in batches]
            return torch.stack(parts).sum(0) / len(pairs)

        return run_hooked
    raise ValueError(f"implementation must be floor, dense, factored, hooked or {', '.join(PUBLISHED)}, got {name!r}")


def disagreement(work: Work, names: list[str], dtype: torch.dtype = torch.float32) -> float:
    """The largest difference between the scores of implementations, relative to the largest score: two batches of two.

    Raises:
        RuntimeError: it is no rounding; such implementations must not be timed.
    """
    work = replace(work, B=2)
    model, pairs = work.model(dtype=dtype), work.pairs(2)
    scores = {name: implementation(name, model, pairs, 2)() for name in names}
    scores = {name: found.double() for name, found in scores.items() if found is not None}
    largest = max(float(found.abs().max()) for found in scores.values())
    first = next(iter(scores.values()))
    worst = max(float((found - first).abs().max()) for found in scores.values()) / largest
    if not worst < (1e-10 if dtype == torch.float64 else 1e-3):
        raise RuntimeError(f"{', '.join(scores)} disagree by {worst:.1e} of the largest score: nothing is timed")
    return worst


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_memory(work: Work, name: str) -> int:
    """Bytes above loading at the high-water mark of one batch, in this process: run it in one of its own."""
    # Program code and the threads' own buffers, which a first run brings in, are not what a batch needs.
    for small in (Work(2, 2, 16, 16, B=2, T=4), Work(2, 4, 256, 16, B=4, T=20)):
        implementation(name, small.model(), small.pairs(), small.B)()
    run = implementation(name, work.model(), work.pairs(), work.B)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def serve_memory(jobs: list[tuple[dict[str, int], str]], threads: int) -> None:
    """Print the peak memory of every job, each measured in a fork of this process, which has run nothing itself."""
    for fields, name in jobs:
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            status = 1
            try:
                torch.set_num_threads(threads)
                print("peak", peak_memory(Work(**fields), name), flush=True)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(f"{name} did not run on {fields}")


def memories(jobs: list[tuple[Work, str]]) -> list[int]:
    """Peak bytes above the loaded model of implementations, each in a process of its own."""
    # glibc would else keep some freed memory for later, now more and now less of it.
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = [[asdict(work), name] for work, name in jobs], torch.get_num_threads()
    return [int(words[1]) for words in _served("serve_memory", arguments, gives_back) if words[0] == "peak"]


def serve_seconds(fields: dict[str, int], names: list[str], batches: int, repeats: int, threads: int) -> None:
    """Print the CPU seconds that each implementation takes for some batches, in turn, warm."""
    torch.set_num_threads(threads)
    work = Work(**fields)
    model, pairs = work.model(), work.pairs(batches)
    runs = [implementation(name, model, pairs, work.B) for name in names]
    for repeat in range(repeats + 1):
        for which, run in enumerate(runs):
            start = time.process_time()
            run()
            if repeat:
                print("seconds", which, time.process_time() - start, flush=True)


def seconds(work: Work, names: Sequence[str], batches: int, repeats: int) -> list[list[float]]:
    """CPU seconds of implementations for some batches, interleaved, of each `repeats` times.

    In a process that has run nothing else: what the allocator was left with by other work, how much freed memory it
    keeps, moves an implementation with many large intermediate tensors by a quarter.
    """
    found: list[list[float]] = [[] for _ in names]
    arguments = asdict(work), names, batches, repeats, torch.get_num_threads()
    for words in _served("serve_seconds", arguments, {}):
        if words[0] == "seconds":
            found[int(words[1])].append(float(words[2]))
    return found


def _served(function: str, arguments: Any, environment: dict[str, str]) -> list[list[str]]:
    """The lines, as words, that a function of this file prints in a process of its own."""
    switch = "" if torch.backends.mkldnn.enabled else "import torch; torch.backends.mkldnn.set_flags(False); "
    code = f"{switch}import json, pipeline_work as w; w.{function}(*json.loads({json.dumps(arguments)!r}))"
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    environment = os.environ | environment | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{function} failed: {done.stderr.strip()}")
    return [line.split() for line in done.stdout.splitlines() if line]
