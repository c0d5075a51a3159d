"""eapcore info: what runs here, and a model's dimensions and the memory that it needs."""

from __future__ import annotations

import argparse
import sys

from eapcore.cli.inputs import load_model
from eapcore.cli.options import Command, add_placement, positive
from eapcore.cli.output import mib


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("info", run, "Print what runs here, and a model's dimensions and the memory that it needs.")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model, as for --model of run (default: none)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="B", help="pairs a batch, for the memory")
    parser.add_argument("--tokens", type=positive, default=20, metavar="T", help="tokens a prompt, for the memory")
    add_placement(parser)


def run(args: argparse.Namespace) -> None:
    """What runs here, and a model's sizes."""
    import torch

    import eapcore.kernels as kernels
    from eapcore import __version__
    from eapcore.attribution.plan import dense_bytes
    from eapcore.execution.memory import device_names, free_bytes
    from eapcore.models.matmul import large_by

    model = None if args.model is None else load_model(args, args.model)
    print(f"eapcore  {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"devices  {', '.join(device_names())}")
    for impl, reason in kernels.available().items():
        print(f"kernels  {impl:<10}{'available' if not reason else f'absent: {reason}'}")
    print(f"products large float32 ones on the CPU by {large_by()}")
    if model is None:
        return
    config, graph = model.config, model.graph
    mlp = "no MLPs" if config.attn_only else f"d_mlp {config.d_mlp} ({config.act_fn})"
    print(f"\nmodel    {model.name}, {str(model.dtype).removeprefix('torch.')} on {model.device}")
    print(
        f"         {config.n_layers} layers × {config.n_heads} heads, d_model {config.d_model}, d_head {config.d_head}"
        f", {mlp}, vocabulary {config.d_vocab}, context {config.n_ctx}"
    )
    parameters = {t.data_ptr(): t.numel() for _, t in model.weights.named()}
    size = sum(parameters.values())
    print(f"         {size:,} parameters, {mib(size * model.dtype.itemsize)}")
    print(f"graph    {graph.n_senders} senders × {graph.n_receivers} receivers, {graph.n_edges:,} edges")
    chosen = kernels.choose("edge_scores", device=model.device, dtype=model.dtype)
    print(f"kernels  auto takes {chosen}")
    tokens = min(args.tokens, config.n_ctx)
    groups = len(model.attentions[0].w_qkv)
    needed = dense_bytes(config, args.batch_size, tokens, model.dtype, device=model.device, groups=groups)
    free = free_bytes(model.device)
    print(f"memory   a batch of {args.batch_size} pairs × {tokens} tokens needs {mib(needed)}; {mib(free)} are free")
