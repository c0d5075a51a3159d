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
from peers.plain import floor
from torch import Tensor

from eapcore.attribution.attribute import attribute
from eapcore.attribution.plan import dense_bytes
from eapcore.graph.graph import Graph
from eapcore.models.config import ModelConfig
from eapcore.models.families.names import assemble
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs

BENCH = Path(__file__).resolve().parents[1]
RIGHT, WRONG = 5, 7
MIB = 2**20
PUBLISHED = ("transformer-lens", "transformer-lens, frozen", "auto-circuit")
Run = Callable[[], Tensor | None]


class Unhashed(Model):
    """Hashing all weights is not part of scoring."""

    content_hash = "random"


@dataclass(frozen=True)
class Work:
    """A model's dimensions and a batch of prompt pairs, by DESIGN's letters; V vocabulary, P the first difference.

    G: key and value heads of a model of Llama's architecture, with M units in each MLP; 0 for one of GPT-2's, which has
    4·D of them. biased: its q, k and v have biases, which makes it Qwen2's. dtype: of its weights.
    """

    L: int
    H: int
    D: int
    V: int
    B: int
    T: int
    P: int = 0
    G: int = 0
    M: int = 0
    biased: bool = False
    dtype: str = "float32"

    @property
    def config(self) -> ModelConfig:
        D, H, K = self.D, self.H, self.D // self.H
        if not self.G:
            return ModelConfig(self.L, H, D, K, 4 * D, self.V, 1024, "gelu_new", K**0.5)
        return ModelConfig(
            self.L, H, D, K, self.M, self.V, 1024, "silu", K**0.5, "rmsnorm", 1e-6, n_key_value_heads=self.G,
            gated=True, rotary_frequencies=tuple(1e6 ** (-i / K) for i in range(0, K, 2)),
        )  # fmt: skip

    @property
    def graph(self) -> Graph:
        return Graph(self.L, self.H, True)

    def sender_buffer(self) -> int:
        """Bytes of the dense sender buffer in float32."""
        return self.graph.n_senders * self.B * self.T * self.D * 4

    def model(self, *, dtype: torch.dtype | None = None, device: str = "cpu", drawn_on: str | None = None) -> Model:
        """A model with random weights in its checkpoints' own layout, drawn in float32 where it says."""
        dtype = dtype or getattr(torch, self.dtype)
        generator = torch.Generator(drawn_on or device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=generator.device) * 0.02).to(device, dtype)

        return self._model(draw)

    def without_memory(self, dtype: torch.dtype) -> Model:
        """The same on the meta device, with three tokens in its vocabulary: as many as a metric may read of a pair."""
        return replace(self, V=3)._model(lambda *shape: torch.empty(shape, dtype=dtype, device="meta"))

    def _model(self, draw: Callable[..., Tensor]) -> Model:
        if self.G:
            return self._grouped(draw)
        D, H, K, M = self.D, self.H, self.D // self.H, 4 * self.D
        shapes = {"b_qkv": (3 * H, K), "w_o": (H, K, D), "b_o": (D,)}
        shapes |= {"w_in": (D, M), "b_in": (M,), "w_out": (M, D), "b_out": (D,)}
        tensors: dict[str, Tensor] = {}
        for at in (f"layers.{index}." for index in range(self.L)):
            tensors[f"{at}w_qkv.0"] = draw(D, 3 * H, K).permute(1, 0, 2)
            tensors |= {at + name: draw(*shape) for name, shape in shapes.items()}
        tensors |= {"w_e": draw(self.V, D), "w_pos": draw(1024, D)}
        tensors["w_u"] = tensors["w_e"].T
        # Every norm has γ = 1 and β = 0.
        return Unhashed(self.config, assemble(self.config, tensors, folded=True), "random")

    def _grouped(self, draw: Callable[..., Tensor]) -> Model:
        D, H, G, K, M = self.D, self.H, self.G, self.D // self.H, self.M
        tensors: dict[str, Tensor] = {"w_e": draw(self.V, D), "ln_final.0": draw(D) + 1}
        tensors["w_u"] = tensors["w_e"].T
        for at in (f"layers.{index}." for index in range(self.L)):
            for place, heads in enumerate((H, G, G)):
                tensors[f"{at}w_qkv.{place}"] = draw(heads * K, D).view(heads, K, D).transpose(1, 2)
            tensors |= {at + name: draw(D) + 1 for name in ("ln1.0", "ln2.0")}
            tensors |= {at + name: draw(M, D).T for name in ("w_in", "w_up")}
            tensors[f"{at}w_out"] = draw(D, M).T
            tensors |= {f"{at}b_qkv": draw(H + 2 * G, K)} if self.biased else {}
            tensors[f"{at}w_o"] = draw(D, H * K).T.unflatten(0, (H, K))
        return Unhashed(self.config, assemble(self.config, tensors), "random")

    def pairs(self, batches: int = 1) -> PromptPairs:
        generator = torch.Generator().manual_seed(1)
        shape = (batches * self.B, self.T)
        clean, corrupt = (torch.randint(0, self.V, shape, generator=generator) for _ in range(2))
        corrupt[:, : self.P] = clean[:, : self.P]
        corrupt[:, self.P] = (clean[:, self.P] + 1) % self.V
        return PromptPairs.from_lists(clean.tolist(), corrupt.tolist(), [RIGHT] * len(clean), [WRONG] * len(clean))


SMALL = Work(12, 12, 768, 50257, B=16, T=20)  # GPT-2 small
XL = Work(48, 25, 1600, 50257, B=32, T=20)  # GPT-2 XL
B13 = Work(40, 40, 5120, 50257, B=8, T=20)  # 13 billion parameters
LLAMA8 = Work(32, 32, 4096, 128256, B=32, T=20, G=8, M=14336)  # Llama-3.1-8B
LLAMA = Work(16, 32, 2048, 128256, B=4, T=20, G=8, M=8192, dtype="bfloat16")  # Llama-3.2-1B
QWEN = Work(24, 14, 896, 151936, B=8, T=20, G=2, M=4864, biased=True)  # Qwen2.5-0.5B


def implementation(name: str, model: Model, pairs: PromptPairs, batch: int) -> Run:
    """A call that runs one implementation batch by batch, and gives its scores [S, R] (None for the floor)."""
    storage, _, how = name.partition(", ")
    if storage in ("dense", "factored") and how in ("", "graphs", "no graphs", "in halves"):
        size = max(1, batch // 2) if how == "in halves" else batch
        graphs = {"graphs": True, "no graphs": False}.get(how, "auto")
        return lambda: attribute(model, pairs, storage=storage, batch_size=size, graphs=graphs).scores
    if name in PUBLISHED:
        from peers import published

        return published.implementation(name, model, pairs, batch)
    batches = [part.to(model.device) for part in pairs.batches(batch)]
    if name == "floor":

        def run_floor() -> None:
            for part in batches:
                floor(model, part, RIGHT, WRONG)

        return run_floor
    if name == "hooked":
        from peers import hooked

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


def peak_of(run: Callable[[], object]) -> int:
    """Bytes at the high-water mark of a call above what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def peak_memory(work: Work, name: str) -> int:
    """Bytes above loading at the high-water mark of one batch, in this process: run it in one of its own."""
    # Program code and the threads' own buffers, which a first run brings in, are not what a batch needs.
    kind = {"dtype": work.dtype, "G": min(work.G, 1), "M": 24}
    for small in (Work(2, 2, 16, 16, B=2, T=4, **kind), Work(2, 4, 256, 16, B=4, T=20, **kind)):
        implementation(name, small.model(), small.pairs(), small.B)()
    return peak_of(implementation(name, work.model(), work.pairs(), work.B))


def serve_memory(jobs: list[tuple[dict[str, Any], str]], threads: int) -> None:
    """Print the peak memory of every job, each measured in a fork of this process, which has run no model itself."""
    # What torch imports when a plan first runs dry is no batch's either.
    dense_bytes(Work(2, 2, 16, 16, B=2, T=4).config, 2, 4, torch.float32)
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


def serve_seconds(fields: dict[str, Any], names: list[str], batches: int, repeats: int, threads: int) -> None:
    """Print the CPU seconds that each implementation takes for some batches, in turn, warm."""
    torch.set_num_threads(threads)
    work = Work(**fields)
    model, pairs = work.model(), work.pairs(batches)
    runs = [implementation(name, model, pairs, work.B) for name in names]
    for which, found in enumerate(in_turns(runs, repeats)):
        print("seconds", which, *found)


def in_turns(runs: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """CPU seconds of each of some calls, one after the other, again and again after a warm-up."""
    found: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, times in zip(runs, found, strict=True):
            start = time.process_time()
            run()
            if repeat:
                times.append(time.process_time() - start)
    return found


def seconds(work: Work, names: Sequence[str], batches: int, repeats: int) -> list[list[float]]:
    """CPU seconds of implementations for some batches, interleaved, of each `repeats` times.

    In a process that has run nothing else: what the allocator was left with by other work, how much freed memory it
    keeps, moves an implementation with many large intermediate tensors by a quarter.
    """
    arguments = asdict(work), names, batches, repeats, torch.get_num_threads()
    lines = _served("serve_seconds", arguments, {})
    return [[float(word) for word in words[2:]] for words in lines if words[0] == "seconds"]


def _served(function: str, arguments: Any, environment: dict[str, str]) -> list[list[str]]:
    """The lines, as words, that a function of this file prints in a process of its own."""
    switch = "" if torch.backends.mkldnn.enabled else "import torch; torch.backends.mkldnn.set_flags(False); "
    code = f"{switch}import json, pipeline.work as w; w.{function}(*json.loads({json.dumps(arguments)!r}))"
    path = os.pathsep.join([str(BENCH), *filter(None, sys.path)])
    environment = os.environ | environment | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{function} failed: {done.stderr.strip()}")
    return [line.split() for line in done.stdout.splitlines() if line]
