"""eapcore info: what runs here, and a model's dimensions and the memory that it needs."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

from eapcore.cli.inputs import load_model
from eapcore.cli.options import Command, add_placement, positive
from eapcore.cli.output import mib, table

if TYPE_CHECKING:
    import torch

    from eapcore.models.model import Model
    from eapcore.tasks.pairs import PromptPairs


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("info", run, "Print what runs here, and a model's dimensions and the memory that it needs.")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model, as for --model of run (default: none)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="B", help="pairs a batch, for the memory")
    parser.add_argument("--tokens", type=positive, default=20, metavar="T", help="tokens a prompt, for the memory")
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="GIB",
        help="of the device that is planned for, which need not be here (default: what is free here); says whether the "
        "weights would be streamed",
    )
    add_placement(parser)


def run(args: argparse.Namespace) -> None:
    """What runs here, and a model's sizes."""
    import torch

    import eapcore.kernels as kernels
    from eapcore import __version__
    from eapcore.execution.memory import default_device, device_names
    from eapcore.models.load import usable
    from eapcore.models.matmul import large_by

    if args.devices is not None and (args.device is not None or args.memory is not None):
        raise ValueError("--devices says how much memory each has, as 8x80GiB: leave --device and --memory away")
    planned = args.device or ("cuda" if args.devices is not None else default_device())
    if args.devices is not None:
        args.memory = 1  # nothing is asked of a device that need not be here
    device = torch.device(planned) if args.memory is not None else usable(planned)
    assert device is not None
    model = None if args.model is None else load_model(args, args.model, "meta")  # its configuration alone
    print(f"eapcore  {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"devices  {', '.join(device_names())}")
    for impl, reason in kernels.available().items():
        print(f"kernels  {impl:<10}{'available' if not reason else f'absent: {reason}'}")
    print(f"products large float32 ones on the CPU by {large_by()}")
    if model is None:
        return
    config, graph = model.config, model.graph
    mlp = "no MLPs" if config.attn_only else f"d_mlp {config.d_mlp} ({config.act_fn})"
    print(f"\nmodel    {model.name}, {str(model.dtype).removeprefix('torch.')} on {device}")
    print(
        f"         {config.n_layers} layers × {_heads(model)}, d_model {config.d_model}, d_head {config.d_head}"
        f", {mlp}, vocabulary {config.d_vocab}, context {config.n_ctx}"
    )
    stored = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in model.weights.named()}
    size = sum(stored.values())
    print(f"         {size // model.dtype.itemsize:,} parameters, {mib(size)}")
    print(f"graph    {graph.n_senders} senders × {graph.n_receivers} receivers, {graph.n_edges:,} edges")
    print(f"kernels  auto takes {kernels.choose('edge_scores', device=device, dtype=model.dtype)}")
    if args.devices is not None:
        _print_spread(model, args)
    else:
        _print_plan(model, device, args, size)


def _heads(model: Model) -> str:
    config = model.config
    shared = "" if config.n_key_value_heads is None else f" ({config.n_kv} of keys and values)"
    return f"{config.n_heads} heads{shared}"


def _print_plan(model: Model, device: torch.device, args: argparse.Namespace, size: int) -> None:
    """What a batch needs, and what `attribute` would take by itself beside weights of `size` bytes."""
    from eapcore.attribution.plan import Plan
    from eapcore.attribution.spread import streams
    from eapcore.execution.limits import limits
    from eapcore.execution.memory import free_bytes

    plan = Plan(model.config, model.dtype, device, groups=model.groups)
    tokens, memory = min(args.tokens, model.config.n_ctx), args.memory and args.memory << 30
    total = free_bytes(device) if memory is None else memory
    of = f"{mib(total)} {'are free' if memory is None else 'in all'}"
    if streams(model, device, total):
        _print_streamed(model, device, total, of, tokens)
        return
    left = total - size
    if left <= 0:
        print(f"memory   {of}: the weights alone do not fit")
        return
    within = int(limits(device).share * left)
    dense = plan.dense(args.batch_size, tokens)
    factored = plan.factored(args.batch_size, tokens, plan.chunk(args.batch_size, tokens, within))
    print(
        f"memory   a batch of {args.batch_size} pairs × {tokens} tokens needs {mib(dense)} dense, "
        f"{mib(factored)} factored; {of}, {mib(left)} without the weights"
    )
    many = max(1, limits(device).batch_tokens // tokens)
    pairs = _pairs(many, tokens)
    storage = plan.storage(pairs, within)
    taken = plan.batch_size(pairs, storage, within)
    print(f"         by itself attribute takes {storage}, {taken} pairs at a time, within {mib(within)}")


def _print_streamed(model: Model, device: torch.device, total: int, of: str, tokens: int) -> None:
    """What `attribute` would do with weights that a device has no room for."""
    from eapcore.attribution.spread import streamed_plan
    from eapcore.execution.limits import limits
    from eapcore.execution.streaming import held_bytes

    plan, many = streamed_plan(model, device, total), max(1, limits(device).batch_tokens // tokens)
    taken, held = plan.batch_size(_pairs(many, tokens)), held_bytes(model)
    print(f"memory   {of}, no room for the weights: the layers stay on the host, and are streamed two ahead")
    print(
        f"         {mib(held)} of weights at a time; by itself attribute takes dense, {taken} pairs × {tokens} tokens, "
        f"{mib(plan.needs(taken, tokens)[0])}"
    )


def _pairs(many: int, tokens: int) -> PromptPairs:
    """So many prompt pairs without memory."""
    import torch

    from eapcore.tasks.pairs import PromptPairs

    with torch.device("meta"):
        ids = torch.empty(many, 1, dtype=torch.int64)
    prompts, ends = ids.expand(many, tokens), torch.full((many,), tokens - 1)
    return PromptPairs(prompts, prompts, ends + 1, ends, ids, ids[:, :0])


def _print_spread(model: Model, args: argparse.Namespace) -> None:
    """Which layers lie on which of several devices, what each needs, and what travels between them."""
    from eapcore.attribution.spread import Travel, laid_plan
    from eapcore.execution.devices import lay, weight_bytes
    from eapcore.execution.limits import limits

    devices, memory = _sizes(args.devices)
    (sizes, rest), tokens = weight_bytes(model), min(args.tokens, model.config.n_ctx)
    layers = lay(sizes, rest, memory)
    plan = laid_plan(model, devices, layers, memory)
    batch = plan.batch_size(_pairs(max(1, limits(devices[0]).batch_tokens // tokens), tokens))
    needs, first = plan.needs(batch, tokens), 0
    rows: list[tuple[str | float, ...]] = []
    for number, (count, need, total) in enumerate(zip(layers, needs, memory, strict=True)):
        weights = sum(sizes[first : first + count]) + (rest if number == 0 else 0)
        more = " and all else" if number == 0 else ""
        rows.append((number, f"{first}–{first + count - 1}{more}", mib(weights), mib(need), mib(total)))
        first += count
    print(table(["device", "layers", "weights", f"{batch} pairs × {tokens} tokens", "of"], rows))
    if not plan.fits(batch, tokens):
        print(f"memory   not even {batch} pair fits beside the weights within a share of {limits(devices[0]).share:g}")
    travel = Travel.of(model.config, layers, batch, tokens, model.dtype)
    print(
        f"travels  {mib(travel.total)} for such a batch and one gradient: forward {mib(travel.forward)}, backward "
        f"{mib(travel.backward)}, receivers {mib(travel.receivers)} (in {travel.as_gradients} layers as gradients, in "
        f"{sum(layers[1:]) - travel.as_gradients} as what they are made of), scores {mib(travel.scores)}"
    )


_MOST = 4096  # devices that are planned for: more layers there are not


def _sizes(text: str) -> tuple[list[torch.device], list[int]]:
    """The devices of --devices with the memory of each: 8x80GiB, or names of some that are here."""
    import torch

    from eapcore.execution.devices import find_devices
    from eapcore.execution.memory import free_bytes

    found: list[int] = []
    for part in text.split(","):
        size = re.fullmatch(r"(\d{1,9})x(\d{1,9}(?:\.\d{1,9})?)([MGT])iB", part.strip())
        if size is None:
            here = find_devices(text)
            return here, [free_bytes(device) for device in here]
        count = len(found) + int(size[1])
        if not 0 < count <= _MOST:
            raise ValueError(f"--devices must be names, or 1 to {_MOST} as 8x80GiB, got {text!r}")
        found += int(size[1]) * [int(float(size[2]) * 2 ** {"M": 20, "G": 30, "T": 40}[size[3]])]
    return [torch.device("cuda", number) for number in range(len(found))], found
