"""Files with random faults: whatever is in them, a command does its work, or says one sentence and exits with 2.

`python tests/support/fuzz.py 3000 [first seed]` tries many by hand, with eapcore installed or on PYTHONPATH; a test
tries a few. A seed names a file: its kind, and what was done to it.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pyarrow.parquet
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from eapcore.cli import main
from eapcore.graph.scores import EdgeScores
from eapcore.interop.eap_ig.files import GraphFile

SECONDS = 20  # of one command; more is a hang
ODD: list[Any] = [None, True, -1, 0, 1e308, 10**9, 2**63, 0.5, "", "x", "\x1b[31m", "é" * 50, [], {}, [[]], [1, "a"],
    {"a": 1}, "x" * 10**4, [0] * 10**3, float("nan"), "[1, 2]", "673"]  # fmt: skip

# of the files with faults, one of which a refusal has to name
NAMES = (
    "t.jsonl",
    "t.csv",
    "t.TSV",
    "t.json",
    "t.parquet",
    "broken",
    "s.safetensors",
    "c.json",
    "g.json",
    "sweep.toml",
)


def of_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one value in it replaced, left out, renamed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        what = rng.randrange(4)
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            return {rng.choice([k + "s", k.upper(), k[1:], " " + k]) if k == key else k: v for k, v in value.items()}
        return {k: of_json(v, rng) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], *([of_json(value[at], rng)] * rng.randrange(3)), *value[at + 1 :]]
    return rng.choice(ODD)


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, repeated or put in, at the beginning, where formats have their sizes, more often."""
    for _ in range(rng.randint(1, 4)):
        reach = len(content) if rng.random() < 0.5 else min(len(content), 200)
        at, length = rng.randrange(max(1, reach)), rng.choice([1, 1, 2, 8, 64])
        piece = content[at : at + length]
        put = rng.choice(
            [b"", piece * 2, rng.randbytes(length), b"\xff" * length, b"\0" * length, b'"', b"{", b",", b"\n"]
        )
        content = content[:at] + put + content[at + len(piece) :]
        if rng.random() < 0.15:
            content = content[: rng.randrange(len(content) + 1)]
    return content


class Files:
    """Good files of each kind, in a folder, and how each is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw = torch.Generator().manual_seed(0)
        V, T, D = 7, 8, 4
        config = {"model_type": "gpt2", "n_embd": D, "n_head": 2, "n_layer": 1, "n_positions": T, "vocab_size": V,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}  # fmt: skip
        shapes = {"wte.weight": (V, D), "wpe.weight": (T, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
        for name, shape in {"ln_1.weight": (D,), "ln_1.bias": (D,), "attn.c_attn.weight": (D, 3 * D), "ln_2.bias": (D,),
            "attn.c_attn.bias": (3 * D,), "attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,), "ln_2.weight": (D,),
            "mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,), "mlp.c_proj.weight": (4 * D, D),
            "mlp.c_proj.bias": (D,)}.items():  # fmt: skip
            shapes[f"h.0.{name}"] = shape
        tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(config))
        save_file(tensors, self.model / "model.safetensors")
        self.torch = folder / "torch"
        self.torch.mkdir()
        (self.torch / "config.json").write_text(json.dumps(config))
        torch.save(load_file(self.model / "model.safetensors"), self.torch / "pytorch_model.bin")
        self.entries = [{"clean": [1, 2, 3], "corrupt": [1, 4, 3], "answer": 5, "wrong": [6], "position": 2},
            {"clean": [1, 2], "corrupt": [3, 2], "answer": [4], "wrong": 2, "position": 1}]  # fmt: skip
        self.table = 'clean,corrupt,answer,wrong,position\n"[1, 2, 3]","[1, 4, 3]",5,[6],2\n"[1, 2]","[3, 2]",[4],2,\n'
        self.task = folder / "good.jsonl"
        self.task.write_text("\n".join(map(json.dumps, self.entries)))
        self._write_texts()
        self.scores, self.circuit = folder / "good.safetensors", folder / "run" / "circuit.json"
        assert main(self.attribute(self.model, self.task, self.scores)) == 0
        run = [
            "run",
            "--model",
            self.model,
            "--task",
            self.task,
            "--out",
            folder / "run",
            "--top-n",
            "9",
            "--show",
            "0",
        ]
        assert main([str(part) for part in run]) == 0
        self.resumed = [*self.attribute(self.model, self.task, folder / "out.safetensors"), "--resume"]
        assert main([*self.resumed, str(folder / "kept")]) == 0
        scores = EdgeScores.load(self.scores)
        self.graph_file = folder / "graph.json"
        GraphFile.of(scores, d_model=4).save(self.graph_file, sign="loss")
        self.parquet = folder / "good.parquet"
        rows = [{"clean": [1, 2], "corrupt": [3, 2], "answer": 4, "wrong": 2}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), self.parquet)

    def _write_texts(self) -> None:
        """A task in text, and two models with tokenizers: a folder in two shards, and a GGUF file."""
        self.texts = self.folder / "texts.jsonl"
        self.texts.write_text(json.dumps({"clean": "acab", "corrupt": "adab", "answer": "a", "wrong": "b"}))
        vocabulary = {"<s>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "ab": 5, "Ġ": 6}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens(["<s>"])
        self.shards = self.folder / "shards"
        self.shards.mkdir()
        made.save(str(self.shards / "tokenizer.json"))
        beside = {"bos_token": "<s>", "add_bos_token": False, "tokenizer_class": "GPT2Tokenizer"}
        beside["added_tokens_decoder"] = {"0": {"content": "<s>", "special": True}}
        (self.shards / "tokenizer_config.json").write_text(json.dumps(beside))
        (self.shards / "config.json").write_bytes((self.model / "config.json").read_bytes())
        tensors = load_file(self.model / "model.safetensors")
        halves = [dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])]
        names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            save_file(half, self.shards / name)
        where = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
        index = {"metadata": {"total_size": 4 * sum(x.numel() for x in tensors.values())}, "weight_map": where}
        (self.shards / "model.safetensors.index.json").write_text(json.dumps(index))
        self.gguf = self.folder / "good.gguf"
        self._write_gguf(self.gguf, vocabulary)

    @staticmethod
    def _write_gguf(path: Path, vocabulary: dict[str, int]) -> None:
        """A Llama of one layer, with a tokenizer."""
        D, F, V = 8, 12, len(vocabulary)
        writer, draw = gguf.GGUFWriter(path, "llama"), torch.Generator().manual_seed(0)
        for key, number in {"block_count": 1, "context_length": 16, "embedding_length": D, "feed_forward_length": F,
            "attention.head_count": 2, "attention.head_count_kv": 1}.items():  # fmt: skip
            writer.add_uint32(f"llama.{key}", number)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_float32("llama.rope.freq_base", 10000.0)
        writer.add_string("tokenizer.ggml.model", "gpt2")
        writer.add_string("tokenizer.ggml.pre", "gpt-2")
        writer.add_array("tokenizer.ggml.tokens", list(vocabulary))
        writer.add_array("tokenizer.ggml.merges", ["a b"])
        writer.add_array("tokenizer.ggml.token_type", [3] + [1] * (V - 1))
        writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
        shapes = {"token_embd": (V, D), "output": (V, D), "output_norm": (D,), "blk.0.attn_norm": (D,)}
        shapes |= {"blk.0.ffn_norm": (D,), "blk.0.attn_q": (D, D), "blk.0.attn_output": (D, D)}
        shapes |= {"blk.0.attn_k": (D // 2, D), "blk.0.attn_v": (D // 2, D)}
        shapes |= {"blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F)}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=draw).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @staticmethod
    def attribute(model: Path, task: Path, out: Path) -> list[str]:
        return [str(x) for x in ("attribute", "--model", model, "--task", task, "--device", "cpu", "--out", out)]

    def made(self, rng: random.Random) -> tuple[str, list[str]]:
        """A kind of file, and the command that reads one with a fault."""
        kinds: list[Callable[[random.Random], list[str]]]
        kinds = [self.a_task, self.a_table, self.a_config, self.safetensors, self.torch_file, self.a_score_file]
        kinds += [
            self.a_circuit,
            self.nested_tasks,
            self.a_gguf_file,
            self.a_tokenizer,
            self.an_index,
            self.a_graph_file,
        ]
        kinds += [self.a_parquet_file, self.a_resume_folder, self.a_sweep]
        kind = rng.choice(kinds)
        return kind.__name__, kind(rng)

    def _try_task(self, name: str, content: bytes) -> list[str]:
        path = self.folder / name
        path.write_bytes(content)
        return self.attribute(self.model, path, self.folder / "out.safetensors")

    def a_task(self, rng: random.Random) -> list[str]:
        rows = [of_json(dict(row), rng) if rng.random() < 0.7 else row for row in self.entries]
        content = "\n".join(map(json.dumps, rows)).encode()
        return self._try_task("t.jsonl", of_bytes(content, rng) if rng.random() < 0.4 else content)

    def a_table(self, rng: random.Random) -> list[str]:
        lines = [line.split(",") for line in self.table.splitlines()]
        line = rng.choice(lines)
        line[rng.randrange(len(line))] = str(rng.choice([*ODD, "a,b", '"', "clean", "[1 2]"]))
        content = "\n".join(map(",".join, lines)).encode("utf-8", "replace")
        return self._try_task(rng.choice(["t.csv", "t.TSV"]), of_bytes(content, rng) if rng.random() < 0.5 else content)

    def nested_tasks(self, rng: random.Random) -> list[str]:
        prompts = [{"clean": "a", "corrupt": "b", "answers": ["a"], "wrong_answers": ["b"]}]
        content = rng.choice([{"prompts": prompts}, self.entries, {"prompts": prompts, "seq_labels": []}])
        return self._try_task("t.json", json.dumps(of_json(of_json(content, rng), rng)).encode())

    def a_parquet_file(self, rng: random.Random) -> list[str]:
        if rng.random() < 0.5:
            return self._try_task("t.parquet", of_bytes(self.parquet.read_bytes(), rng))
        row = of_json({"clean": [1, 2], "corrupt": [3, 2], "answer": 4, "wrong": 2, "position": 1}, rng)
        try:
            table = pyarrow.Table.from_pylist([row if isinstance(row, dict) else {"clean": row}])
            pyarrow.parquet.write_table(table, self.folder / "t.parquet")
        except (pyarrow.ArrowException, OverflowError):  # what Arrow cannot say is in no such file
            (self.folder / "t.parquet").write_bytes(b"PAR1")
        return self.attribute(self.model, self.folder / "t.parquet", self.folder / "out.safetensors")

    def a_gguf_file(self, rng: random.Random) -> list[str]:
        path = self.folder / "broken.gguf"
        path.write_bytes(of_bytes(self.gguf.read_bytes(), rng))
        return self.attribute(path, self.texts, self.folder / "out.safetensors")

    def _try_shards(self, name: str, rng: random.Random) -> list[str]:
        content = (self.shards / name).read_bytes()
        if rng.random() < 0.7:
            content = json.dumps(of_json(of_json(json.loads(content), rng), rng)).encode()
        content = of_bytes(content, rng) if rng.random() < 0.3 else content
        return self._try_model(self.shards, name, content, self.texts)

    def a_tokenizer(self, rng: random.Random) -> list[str]:
        return self._try_shards(rng.choice(["tokenizer.json", "tokenizer_config.json"]), rng)

    def an_index(self, rng: random.Random) -> list[str]:
        return self._try_shards("model.safetensors.index.json", rng)

    def a_resume_folder(self, rng: random.Random) -> list[str]:
        kept = self.folder / "broken-kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.folder / "kept", kept)
        file = rng.choice(sorted(path for path in kept.rglob("*") if path.is_file()))
        file.write_bytes(of_bytes(file.read_bytes(), rng))
        return [*self.resumed, str(kept)]

    def a_sweep(self, rng: random.Random) -> list[str]:
        lines = ["[defaults]", f"task = {json.dumps(str(self.task))}", 'device = "cpu"', "[[entry]]", 'name = "a"',
            f"model = {json.dumps(str(self.model))}"]  # fmt: skip
        at = rng.randrange(len(lines))
        key = lines[at].split(" = ")[0]
        lines[at] = rng.choice(
            [f"{key} = {json.dumps(rng.choice(ODD))}", f"{key}s = 1", "", lines[at] * 2, "[[entry]]"]
        )
        path = self.folder / "sweep.toml"
        content = "\n".join(lines).encode("utf-8", "replace")
        path.write_bytes(of_bytes(content, rng) if rng.random() < 0.3 else content)
        shutil.rmtree(self.folder / "sweep", ignore_errors=True)
        return ["sweep", str(path), "--out", str(self.folder / "sweep")]

    def a_graph_file(self, rng: random.Random) -> list[str]:
        content = json.dumps(of_json(json.loads(self.graph_file.read_bytes()), rng)).encode()
        content = of_bytes(content, rng) if rng.random() < 0.4 else content
        return [*self._try_result("--scores", self.folder / "g.json", content), "--sign", "loss"]

    def _try_model(self, folder: Path, name: str, content: bytes, task: Path | None = None) -> list[str]:
        good = (folder / name).read_bytes()
        broken = self.folder / "broken"
        broken.mkdir(exist_ok=True)
        for file in broken.iterdir():
            file.unlink()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(content if file.name == name else file.read_bytes())
        assert good
        return self.attribute(broken, task or self.task, self.folder / "out.safetensors")

    def a_config(self, rng: random.Random) -> list[str]:
        config = json.loads((self.model / "config.json").read_text())
        more = {"tie_word_embeddings": True, "scale_attn_weights": True, "n_inner": None, "dtype": "float32"}
        content = json.dumps(of_json(config | more, rng)).encode()
        return self._try_model(self.model, "config.json", of_bytes(content, rng) if rng.random() < 0.4 else content)

    def safetensors(self, rng: random.Random) -> list[str]:
        content = (self.model / "model.safetensors").read_bytes()
        return self._try_model(self.model, "model.safetensors", of_bytes(content, rng))

    def torch_file(self, rng: random.Random) -> list[str]:
        content = (self.torch / "pytorch_model.bin").read_bytes()
        return self._try_model(self.torch, "pytorch_model.bin", of_bytes(content, rng))

    def _try_result(self, option: str, path: Path, content: bytes) -> list[str]:
        path.write_bytes(content)
        model = ("--model", self.model, "--task", self.task, "--device", "cpu", "--out", self.folder / "out.json")
        return [str(x) for x in ("evaluate", option, path, *model)]

    def a_score_file(self, rng: random.Random) -> list[str]:
        content = self.scores.read_bytes()
        if rng.random() < 0.5:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            about = json.loads(header["__metadata__"]["eapcore"])
            header["__metadata__"]["eapcore"] = json.dumps(of_json(about, rng))
            header = of_json(header, rng) if rng.random() < 0.3 else header
            text = json.dumps(header).encode()
            return self._try_result("--scores", self.folder / "s.safetensors",
                len(text).to_bytes(8, "little") + text + content[8 + size :])  # fmt: skip
        return self._try_result("--scores", self.folder / "s.safetensors", of_bytes(content, rng))

    def a_circuit(self, rng: random.Random) -> list[str]:
        content = self.circuit.read_bytes()
        if rng.random() < 0.6:
            content = json.dumps(of_json(json.loads(content), rng)).encode()
        return self._try_result("--circuit", self.folder / "c.json",
            of_bytes(content, rng) if rng.random() < 0.5 else content)  # fmt: skip


class Late(BaseException):
    """A command that takes too long."""


def outcome(argv: list[str]) -> tuple[str, str]:
    """What a command came to: "read" or "refused", or what is wrong with how it ended; and what it printed."""

    def late(*_: object) -> None:
        raise Late

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status: object = main(argv)
    except SystemExit as error:
        status = error.code
    except Late:
        return "hangs", err.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = err.getvalue()
    if time.process_time() - start > 4:
        return "slow", said
    if any(not (c.isprintable() or c == "\n") for c in out.getvalue() + said):
        return "prints control characters", said
    if status == 0:
        return "read", said
    lines = said.count("\n")
    if status != 2:
        return f"exits with {status}", said
    return (
        ("refused", said) if lines == 1 and len(said) < 1200 else (f"says {lines} lines, {len(said)} characters", said)
    )


def tried(seeds: range, folder: Path) -> Iterator[tuple[int, str, str, str]]:
    """(seed, kind of file, outcome, what was printed) of each."""
    with contextlib.redirect_stdout(io.StringIO()):
        files = Files(folder)
    for seed in seeds:
        kind, argv = files.made(random.Random(seed))
        how, said = outcome(argv)
        if how == "refused" and not any(name in said for name in NAMES):
            how = "does not name the file"
        yield seed, kind, how, said


if __name__ == "__main__":
    count, first = (int(text) for text in [*sys.argv[1:], *["300", "0"][len(sys.argv) - 1 :]])
    totals: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        for seed, kind, how, said in tried(range(first, first + count), Path(temporary)):
            totals[kind, how] += 1
            if how not in ("read", "refused"):
                print(seed, kind, how, said[:300].replace("\n", " "), flush=True)
    for (kind, how), number in sorted(totals.items()):
        print(f"{kind:<14}{how:<28}{number:>6}")
