"""Checkpoints → Model, whatever form the model comes in."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eapcore.kernels.checks import one_of
from eapcore.models.checkpoint import (
    Stored,
    fetch_config,
    fetch_tokenizer,
    fetch_weights,
    find_weights,
    hub_id,
    read_config,
    read_weights,
    refuse_adapter,
    stored,
    stored_config,
)
from eapcore.models.config import DTYPES, ModelConfig
from eapcore.models.families import layout_of
from eapcore.models.families.gguf import PACKAGED, find_gguf, gguf_model
from eapcore.models.families.names import Layout, build_weights
from eapcore.models.links import Links
from eapcore.models.model import Model
from eapcore.models.modules import check_module
from eapcore.models.weights import Weights
from eapcore.models.wrappers import unwrapped
from eapcore.text.folder import fetched_tokenizer, find_tokenizer
from eapcore.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
TORCH = (".pt", ".pth", ".bin", ".ckpt")
TOYS = {f"toy-{name}": Path(__file__).parents[1] / "toys" / name for name in ("ioi", "induction")}


def load(
    source: str | Path | torch.nn.Module | Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    kv: str = "each",
) -> Model:
    """Load a model: a built-in toy by name, or whatever `load_weights` takes.

    Args:
        source: "toy-ioi" or "toy-induction"; a folder; a GGUF file or "smollm2-135m" (see the README); a Hub id such
            as "gpt2"; a transformers causal language model of a family that `families.FAMILIES` has, or a
            HookedTransformer, also inside a TransformerBridge, an nnsight model, a PatchableModel or a compiled module,
            unless these change it; or a state dict with its `config`.
        config: the configuration of a state dict, or instead of a folder's config.json.
        revision: of a Hub id.
        dtype: float64, float32, bfloat16 or float16; None keeps the checkpoint's.
        device: e.g. "cuda"; None keeps a model's own, and is the CPU for files. With "meta" weights are shapes without
            memory, for planning: of a folder or a Hub id config.json alone is read.
        kv: with grouped queries, "each" has one k and one v receiver for each query head, `a3.h5<k>`, as other tools
            have it; "grouped" one for each key and value head, `a3.kv1<k>`, whose scores are the sums of the others.

    Raises:
        ValueError: a damaged checkpoint or an unsupported architecture, by name.
        OSError: files that are missing, or neither cached nor reachable.
    """
    toy = TOYS.get(source) if isinstance(source, str) else None
    one_of("kv", kv, ("each", "grouped"))
    inside = None if isinstance(source, str | Path | Mapping) else unwrapped(source)
    if inside is not None:
        source, config = inside.source, inside.config if config is None else config
    loaded = load_weights(toy or source, config=config, revision=revision, dtype=dtype, device=device, kv=kv)
    name = source if toy is not None and isinstance(source, str) else loaded.model_id
    model = Model(loaded.config, loaded.weights, name, loaded.folder, loaded.family, loaded.tokenizer, loaded.links)
    if inside is not None:
        inside.check(model)
    return model


@dataclass(frozen=True)
class Loaded:
    """A loaded model. folder: where its files lie, a GGUF file itself; it and tokenizer are None for one that came from
    memory. links: to the module whose weights these are; None where there is none."""

    config: ModelConfig
    weights: Weights
    model_id: str
    folder: Path | None
    family: str
    tokenizer: Tokenizer | None
    links: Links | None = None


def load_weights(
    source: str | Path | nn.Module | Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    cache_dir: str | Path | None = None,
    kv: str = "each",
) -> Loaded:
    """Load a model from wherever it is.

    Files are memory-mapped and tensors that need no conversion stay views of them, so that no second copy is made: do
    not overwrite the files while the model is in use. The weights of a model or a state dict in memory are shared with
    it in the same way.

    Args:
        source: a folder with config.json and its weights, or nanoGPT's ckpt.pt or its folder; a model's id on the Hub,
            of which `gpt2`, `gpt2-medium`, `gpt2-large` and `gpt2-xl` need no owner; a transformers causal language
            model, a HookedTransformer; or a state dict.
        config: fields of a transformers or TransformerLens configuration, in place of the source's own; a state dict
            needs it.
        revision: of the Hub: a branch, tag or commit. None is a pinned commit for GPT-2, `main` for others.
        dtype: float64, float32, bfloat16 or float16; None keeps the checkpoint's.
        device: None keeps the device of a model or a state dict, and is the CPU for files; see `load` for "meta".
        cache_dir: the Hub's cache; None is huggingface_hub's own.

    Raises:
        ValueError: a checkpoint that is damaged, or of a model that is not supported.
        FileNotFoundError, ConnectionError, PermissionError: files that are not there or cannot be fetched.
        RuntimeError: a device that is not there.
    """
    folder, own, where = None, None, usable(device)
    tokenizer: Tokenizer | None = None
    found = find_gguf(source) if isinstance(source, str | Path) else None
    if found is not None:
        if config is not None or revision is not None:
            raise ValueError(f"{found[1]} has a configuration of its own and no revisions: give neither of them")
        model_id, folder = found
        file = gguf_model(folder, _dtype(dtype))
        layout, tensors, own, tokenizer = file.layout, file.tensors, file.dtype, file.tokenizer
    elif isinstance(source, str | Path):
        shapes_alone = where is not None and where.type == "meta"
        model_id, folder, path = _locate(source, revision, cache_dir, shapes_alone)
        refuse_adapter(folder)
        raw = _config(folder, path) if config is None else config
        tokenizer = find_tokenizer(folder) or _tokenizer_on_the_hub(source, model_id, folder, raw)
        with _named(folder if config is None else "config"):
            layout = layout_of(raw)  # refused before the weights are opened
        if raw.get("auto_map"):
            _log.warning("code that comes with the model is not run, it is taken for a %s: %s", layout.family, folder)
        tensors = _without_memory(layout, raw) if shapes_alone else read_weights(path or find_weights(folder))
    else:
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for models on the Hub, not for one in memory")
        model_id, raw, tensors = _in_memory(source, config)
        layout = layout_of(raw)
        if isinstance(source, nn.Module):
            check_module(source, layout.config, among_others=layout.among_others)
    if kv == "grouped":
        layout = replace(layout, config=replace(layout.config, kv_grouped=True))
    links = Links(weakref.ref(source)) if isinstance(source, nn.Module) else None
    with _named(folder):
        weights = build_weights(layout, tensors, dtype=_dtype(dtype) or own, device=where, links=links)
    return Loaded(layout.config, weights, model_id, folder, layout.family, tokenizer, links)


@contextmanager
def _named(place: Path | str | None) -> Iterator[None]:
    """A ValueError that says which files it is about."""
    try:
        yield
    except ValueError as error:
        if place is None or str(place) in str(error):
            raise
        raise ValueError(f"{place}: {error}") from error


def _locate(
    source: str | Path, revision: str | None, cache_dir: str | Path | None, config_alone: bool
) -> tuple[str, Path, Path | None]:
    """(model id, its folder, its weights file where the Hub said which)."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for models on the Hub, but {source} is a folder here")
        return folder.resolve().name, folder, None
    if folder.is_file() and folder.suffix in TORCH:
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for models on the Hub, but {source} is a file here")
        return folder.stem, folder.parent, folder
    check_source(source)
    if isinstance(source, Path) or folder.exists():
        raise _not_there(source, "a file")
    repo = hub_id(source, [*TOYS, *PACKAGED])
    if config_alone:
        return repo, fetch_config(repo, revision=revision, cache_dir=cache_dir).parent, None
    path = fetch_weights(repo, revision=revision, cache_dir=cache_dir)
    return repo, path.parent, path


def check_source(source: str | Path) -> None:
    """FileNotFoundError for a path at which nothing lies; what lies elsewhere may be the Hub's."""
    folder = Path(source).expanduser()
    path = isinstance(source, Path) or folder.is_absolute() or source.startswith((".", "~"))
    if path and not folder.exists():
        raise _not_there(source, "nothing")


def _not_there(source: str | Path, found: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"expected a folder with config.json and a weights file at {source}, or a GGUF or nanoGPT file, found {found} "
        "there"
    )


def _tokenizer_on_the_hub(source: str | Path, model_id: str, folder: Path, raw: Mapping[str, Any]) -> Tokenizer | None:
    """That of a Hub model, or the one that TransformerLens's configurations name; fetched when it is asked for."""
    named = raw.get("tokenizer_name")
    if isinstance(named, str) and named:
        return fetched_tokenizer(named, partial(fetch_tokenizer, named, None))
    if Path(source).expanduser().exists():
        return None
    return fetched_tokenizer(model_id, partial(fetch_tokenizer, model_id, folder.name))


def _config(folder: Path, path: Path | None) -> Mapping[str, Any]:
    """The configuration of a folder: config.json, or what its only weights file says itself."""
    alone = path
    if alone is None and not (folder / "config.json").exists():
        with suppress(FileNotFoundError):
            alone = find_weights(folder)
    own = stored_config(alone) if alone is not None and alone.suffix in TORCH else None
    return read_config(folder) if own is None else own


def _without_memory(layout: Layout, raw: Mapping[str, Any]) -> list[Stored]:
    """The tensors that a checkpoint must hold, on the meta device, in the dtype that its configuration names."""
    named = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    named = named if named in DTYPES else "float32"
    empty = partial(torch.empty, dtype=DTYPES[named], device="meta")
    return [Stored(name, shape, named, partial(empty, shape)) for name, shape in layout.shapes().items()]


def _in_memory(
    source: nn.Module | Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> tuple[str, Mapping[str, Any], list[Stored]]:
    if not isinstance(source, nn.Module | Mapping):
        raise ValueError(
            f"expected a folder, a Hub id, a transformers model or a state dict, got a {type(source).__name__}"
        )
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("a state dict does not say what it is of: give config=, e.g. TransformerLens's cfg fields")
        model_id = str(config.get("model_name") or "state_dict")
        return model_id, config, [stored(key, tensor, "the state dict") for key, tensor in source.items()]
    own: Any = getattr(source, "config", None)
    name = type(source).__name__
    state = source.state_dict()
    cfg = getattr(source, "cfg", None)
    if config is None and own is None and hasattr(cfg, "d_model"):
        fields = vars(cfg)
        return (
            str(fields.get("model_name") or name),
            fields,
            [stored(key, tensor, name) for key, tensor in state.items()],
        )
    if config is None and not hasattr(own, "to_dict"):
        raise ValueError(
            f"expected a transformers model or a HookedTransformer, got a {name} without config: give its state_dict() "
            "and config="
        )
    raw: dict[str, Any] = dict(own.to_dict() if config is None else config)
    ends = [getattr(source, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    embedding, head = (getattr(end, "weight", None) for end in ends)
    # What it computes with counts, not what its configuration says.
    if isinstance(head, Tensor) and isinstance(embedding, Tensor):
        raw["tie_word_embeddings"] = head.data_ptr() == embedding.data_ptr()
    return getattr(own, "name_or_path", "") or name, raw, [stored(key, tensor, name) for key, tensor in state.items()]


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def usable(device: torch.device | str | None) -> torch.device | None:
    """The device that is meant; RuntimeError where it cannot be used here, or sums no scores in float64, as MPS."""
    if device is None:
        return None
    try:
        return torch.empty(0, dtype=torch.float64, device=device).device
    except Exception as error:  # torch raises many kinds of errors for devices that it lacks
        why = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise RuntimeError(f"device {str(device)[:40]!r} cannot be used here: {why[:160]}") from error
