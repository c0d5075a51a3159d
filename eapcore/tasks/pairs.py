"""Prompt pairs: what every task is once its text has become tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.graph.given import ByValue
from eapcore.graph.show import card
from eapcore.kernels.checks import short_repr
from eapcore.text.tokenizer import Tokenizer, one_token, tokenizer_of


@dataclass(frozen=True, slots=True, eq=False)
class PromptPairs(ByValue):
    """N clean prompts, each with a corrupt one of the same length, and what counts as right and wrong behind them.

    clean, corrupt: int64 [N, T], padded on the right with 0; the same where nothing but an ablation with zero or a mean
    is to be run. lengths: int64 [N]. positions: int64 [N], where the metric
    reads the logits (the last token by default). answers, wrong: int64 [N, A], [N, W] token ids, padded with −1; W may
    be 0. name says which task this is, seed how it was drawn (None where nothing was), vocab names the ids, details say
    what else one must know of it, such as what prompts begin with. places: int64 [N] for each position that has a name,
    such as where a word is that the corrupt prompt changes; −1 in a pair that has none.
    """

    clean: Annotated[Tensor, "int64 N T"]
    corrupt: Annotated[Tensor, "int64 N T"]
    lengths: Annotated[Tensor, "int64 N"]
    positions: Annotated[Tensor, "int64 N"]
    answers: Annotated[Tensor, "int64 N A"]
    wrong: Annotated[Tensor, "int64 N W"]
    name: str = "unnamed"
    seed: int | None = None
    vocab: tuple[str, ...] | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Annotated[Tensor, "int64 N"]] = field(default_factory=dict)

    @staticmethod
    def from_lists(
        clean: Sequence[Sequence[int]],
        corrupt: Sequence[Sequence[int]] | None = None,
        answers: Sequence[Sequence[int] | int] = (),
        wrong: Sequence[Sequence[int] | int] | None = None,
        *,
        positions: Sequence[int] | None = None,
        name: str = "unnamed",
        seed: int | None = None,
        vocab: Sequence[str] | None = None,
        details: Mapping[str, str] | None = None,
        places: Mapping[str, Sequence[int]] | None = None,
        names: Sequence[str] | None = None,
    ) -> PromptPairs:
        """Build the pairs from lists, arrays or tensors of token ids, one entry a pair; corrupt=None where there are no
        corrupt prompts.

        names: what an error calls each pair, "pair 0" and so on by default.

        Raises:
            ValueError: nothing given; lists of different numbers of entries; a pair whose prompts differ in length or
                are empty; a pair without an answer, with one twice, or with one that is wrong too; a position outside
                its prompt. The pair is named.
        """
        clean = _entries(clean, "clean")
        corrupt = clean if corrupt is None else _entries(corrupt, "corrupt")
        if not clean:
            raise ValueError(f"the task {name!r} is empty: at least one prompt pair is needed")
        answers, wrong = (
            _entries(answers, "answers"),
            [[] for _ in clean] if wrong is None else _entries(wrong, "wrong"),
        )
        if positions is not None:
            positions = [_ids(at, "positions", i, one=True)[0] for i, at in enumerate(_entries(positions, "positions"))]
        counts = {"clean": len(clean), "corrupt": len(corrupt), "answers": len(answers), "wrong": len(wrong)}
        if positions is not None:
            counts["positions"] = len(positions)
        if len(set(counts.values())) > 1:
            raise ValueError(f"every pair needs one entry in each list, got {counts}")
        clean = [_ids(ids, "clean", i) for i, ids in enumerate(clean)]
        corrupt = [_ids(ids, "corrupt", i) for i, ids in enumerate(corrupt)]
        right = [_ids(ids, "answers", i, one=True) for i, ids in enumerate(answers)]
        others = [_ids(ids, "wrong", i, one=True) for i, ids in enumerate(wrong)]
        for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)):
            pair = f"pair {i}" if names is None else names[i]
            if len(a) != len(b):
                raise ValueError(
                    f"clean and corrupt must have the same number of tokens, but {pair} has {len(a)} and {len(b)}: "
                    "positions are compared one by one"
                )
            if not a:
                raise ValueError(f"a prompt needs at least one token, but {pair} has none")
            if not right[i]:
                raise ValueError(f"{pair} has no answer: at least one token id is needed")
            if min(*right[i], *others[i], 0) < 0:
                raise ValueError(f"an answer is a token id of at least 0, but {pair} has {min(*right[i], *others[i])}")
            if fault := _fault(right[i], others[i]):
                raise ValueError(f"{pair} has {fault}")
            if positions is not None and not 0 <= positions[i] < len(a):
                raise ValueError(f"the position {positions[i]} of {pair} is outside its prompt of {len(a)} tokens")
        lengths = torch.tensor([len(a) for a in clean], device="cpu")
        named = {place: torch.tensor(list(at), device="cpu") for place, at in (places or {}).items()}
        return PromptPairs(
            clean=_padded(clean, 0),
            corrupt=_padded(corrupt, 0),
            lengths=lengths,
            positions=lengths - 1 if positions is None else torch.tensor(list(positions), device="cpu"),
            answers=_padded(right, -1),
            wrong=_padded(others, -1),
            name=name,
            seed=seed,
            vocab=None if vocab is None else tuple(vocab),
            details=dict(details or {}),
            places=named,
        )

    @staticmethod
    def from_text(
        source: Any,
        clean: Sequence[str],
        corrupt: Sequence[str] | None = None,
        answers: Sequence[str | Sequence[str]] = (),
        wrong: Sequence[str | Sequence[str]] | None = None,
        *,
        bos: str | None = None,
        positions: Sequence[int] | None = None,
        name: str = "unnamed",
    ) -> PromptPairs:
        """Build the pairs from texts, one entry a pair; corrupt=None where there are no corrupt prompts.

        Args:
            source: a model that carries a tokenizer, or a tokenizer: `model.tokenizer`, or one of the packages
                tokenizers and transformers.
            clean, corrupt: prompts; those of a pair must have equally many tokens. A chat template is not applied.
            answers, wrong: the texts that may follow, one or several a pair, each one token. A text is taken as it
                stands: behind "… is" the answer is " Paris", with its space.
            bos: what prompts begin with: "auto" what the tokenizer's own rule puts there, "yes" its
                beginning-of-sequence token, "no" nothing; None is the tokenizer's `bos`, "auto" if nobody changed it.
            positions: which token the metric reads, counting what prompts begin with; None is the last.
            name: of the task.

        Raises:
            ValueError: an answer of several tokens, with its pair and its pieces; prompts of different numbers of
                tokens; a model without a tokenizer; or what `from_lists` refuses.
            RuntimeError, OSError: a tokenizer that cannot be made here, see `Tokenizer`.
        """
        tokenizer = tokenizer_of(source) if bos is None else tokenizer_of(source).with_bos(bos)

        def prompts(texts: Sequence[str], what: str) -> list[list[int]]:
            return [tokenizer.prompt(text) for text in _texts(texts, what)]

        def ids(entries: Sequence[str | Sequence[str]], what: str) -> list[list[int]]:
            sets = [entry if isinstance(entry, list | tuple) else [entry] for entry in _listed(entries, what)]
            return [
                [one_token(tokenizer, text, f"{what} of pair {i}") for text in _texts(texts, f"{what} of pair {i}")]
                for i, texts in enumerate(sets)
            ]

        ours = prompts(clean, "clean")
        theirs = None if corrupt is None else prompts(corrupt, "corrupt")
        for i, (a, b) in enumerate(zip(ours, theirs or (), strict=False)):
            if len(a) != len(b):
                raise ValueError(_parted(tokenizer, i, a, b))
        others = None if wrong is None else ids(wrong, "the wrong answer")
        details = {"bos": tokenizer.begins_with}
        return PromptPairs.from_lists(
            ours, theirs, ids(answers, "the answer"), others, positions=positions, name=name, details=details
        )

    def __repr__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        least, most = int(self.lengths.min()), int(self.lengths.max())
        lengths = f"{least} tokens" if least == most else f"{least} to {most} tokens"
        return f"PromptPairs({self.name!r}: {len(self)} pairs of {lengths}{seed})"

    def _repr_html_(self) -> str:
        rows = []
        for pair in self.as_tokens(5):
            shown = [" ".join(pair[what]) for what in ("clean", "corrupt", "answers", "wrong")]
            rows.append((*shown[:2], pair["position"], *shown[2:]))
        return card(repr(self), [], ("clean", "corrupt", "read at", "right", "wrong"), rows)

    def as_tokens(self, n: int, text: Callable[[int], str] | None = None) -> list[dict[str, Any]]:
        """The first n pairs for people: of each `clean`, `corrupt`, `answers` and `wrong` as a list of texts, one a
        token, the `position` that is read, and `named`, the positions that have a name.

        text: of a token id; None is what `vocab` says, or the id where it says nothing.
        """
        words = self.vocab or ()
        own = text or (lambda i: words[i] if 0 <= i < len(words) else str(i))
        pairs = []
        for i in range(min(n, len(self))):
            length = int(self.lengths[i])
            prompts = {"clean": self.clean[i, :length], "corrupt": self.corrupt[i, :length]}
            ids = {**prompts, "answers": self.answers[i], "wrong": self.wrong[i]}
            shown: dict[str, Any] = {what: [own(t) for t in row.tolist() if t >= 0] for what, row in ids.items()}
            named = {place: int(at[i]) for place, at in self.places.items() if int(at[i]) >= 0}
            pairs.append({**shown, "position": int(self.positions[i]), "named": named})
        return pairs

    def __len__(self) -> int:
        return self.clean.shape[0]

    def select(self, index: Annotated[Tensor, "int64 B"]) -> PromptPairs:
        """The pairs at these indices, cut to the longest prompt among them."""
        longest = int(self.lengths[index].max())
        return replace(
            self,
            clean=self.clean[index, :longest],
            corrupt=self.corrupt[index, :longest],
            lengths=self.lengths[index],
            positions=self.positions[index],
            answers=self.answers[index],
            wrong=self.wrong[index],
            places={place: at[index] for place, at in self.places.items()},
        )

    def first_difference(self) -> Annotated[Tensor, "int64 N"]:
        """int64 [N], the first position at which clean and corrupt differ."""
        return (self.clean != self.corrupt).int().argmax(1)

    def batches(self, size: int) -> Iterator[PromptPairs]:
        """All pairs in order, `size` at a time, the last batch as short as it must be."""
        for indices in torch.arange(len(self), device="cpu").split(size):
            yield self.select(indices)

    def to(self, device: torch.device | str) -> PromptPairs:
        """The same pairs on another device."""
        names = ("clean", "corrupt", "lengths", "positions", "answers", "wrong")
        places = {place: at.to(device) for place, at in self.places.items()}
        return replace(self, **{name: getattr(self, name).to(device) for name in names}, places=places)

    def check_shapes(self) -> None:
        """Raise ValueError if a field is no tensor of integers, or not of as many pairs as the others."""
        sizes: dict[str, int] = {}
        for name, letters in _SHAPES.items():
            x, axes = getattr(self, name), letters.split()
            got = type(x).__name__
            if isinstance(x, Tensor):
                got = f"{x.dtype} {list(x.shape)} on {x.device}"
                whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool or x.is_meta)
                fits = len(axes) == x.ndim and all(
                    sizes.setdefault(axis, size) == size for axis, size in zip(axes, x.shape, strict=True)
                )
                if whole and fits:
                    continue
            known = "".join(f", {axis} = {size}" for axis, size in sizes.items() if axis in axes)
            raise ValueError(
                f"{name} must be an int64 tensor [{', '.join(axes)}]{known}, got {got}: from_lists makes it"
            )

    def check_positions(self) -> None:
        """Raise ValueError if a prompt is longer than its row, or the metric reads a position outside a prompt."""
        beyond = ((self.lengths < 1) | (self.lengths > self.clean.shape[1])).nonzero()
        if len(beyond):
            pair = int(beyond[0])
            raise ValueError(
                f"lengths must be from 1 to the {self.clean.shape[1]} tokens of a row, but pair {pair} has "
                f"{int(self.lengths[pair])}"
            )
        outside = ((self.positions < 0) | (self.positions >= self.lengths)).nonzero()
        if len(outside):
            pair = int(outside[0])
            raise ValueError(
                f"the position {int(self.positions[pair])} of pair {pair} is outside its prompt of "
                f"{int(self.lengths[pair])} tokens"
            )

    def check_corrupt(self) -> None:
        """Raise ValueError if a corrupt prompt is the clean one as far as the metric reads."""
        read = torch.arange(self.clean.shape[1], device=self.clean.device) <= self.positions[:, None]
        same = ((self.clean != self.corrupt) & read).any(1).logical_not().nonzero()
        if len(same):
            pair = int(same[0])
            whole = bool((self.clean[pair] == self.corrupt[pair]).all())
            where = "" if whole else f" up to position {int(self.positions[pair])}, where the metric reads"
            raise ValueError(
                f"clean and corrupt of pair {pair} are identical{where}: every score would be zero; without corrupt "
                "prompts choose the ablation zero, mean, mean-positional or optimal"
            )

    def check_answers(self) -> None:
        """Raise ValueError if a pair has an answer twice, or one that is wrong too."""
        some = torch.cat([self.answers, self.wrong], 1).sort(1).values
        again = ((some[:, 1:] == some[:, :-1]) & (some[:, 1:] >= 0)).any(1).nonzero()
        if len(again):
            pair = int(again[0])
            right, wrong = ([int(i) for i in ids[pair].tolist() if i >= 0] for ids in (self.answers, self.wrong))
            raise ValueError(f"pair {pair} has {_fault(right, wrong)}")

    def check_words(self, tokenizer: Tokenizer | None, model: str) -> None:
        """Raise ValueError if token ids that have names stand for other words by a model's tokenizer, where there is
        one at hand."""
        if self.vocab is None or tokenizer is None or not tokenizer.at_hand:
            return
        used = torch.cat([x.flatten() for x in (self.clean, self.answers)]).unique().tolist()
        for i in (i for i in used if 0 < i < len(self.vocab)):
            try:
                word = tokenizer.pieces([i])[0].strip()
            except (ValueError, OverflowError):
                word = "nothing"
            except (RuntimeError, OSError):  # which cannot be read here, and is not needed
                return
            if word != self.vocab[i]:
                raise ValueError(
                    f"the task {self.name} is another model's: its token {i} is {self.vocab[i]!r}, and that of {model} "
                    f"{word!r}"
                )

    def check_vocabulary(self, d_vocab: int, model: str) -> None:
        """Raise ValueError if an answer or a wrong token id is not in the vocabulary of a model."""
        for what, ids in (("answer", self.answers), ("wrong answer", self.wrong)):
            bad = ((ids < -1) | (ids >= d_vocab)).nonzero()
            if len(bad):
                pair = int(bad[0, 0])
                value = int(ids[tuple(bad[0])])
                raise ValueError(
                    f"pair {pair} has the {what} {value}, but the vocabulary of {model} is 0..{d_vocab - 1}"
                )


def _fault(right: Sequence[int], wrong: Sequence[int]) -> str | None:
    """What makes nonsense of a pair's answers."""
    for what, ids in (("the answer", right), ("the wrong answer", wrong)):
        if len(set(ids)) < len(ids):
            return f"{what} {next(i for i in ids if list(ids).count(i) > 1)} twice"
    if both := set(right) & set(wrong):
        return f"the answer {min(both)} among its wrong answers too: nothing would tell them apart"
    return None


def _listed(entries: Any, what: str) -> Sequence[Any]:
    if not isinstance(entries, list | tuple):
        raise ValueError(f"{what} must be a list with one entry for each pair, got {entries!r}")
    return entries


def _texts(entries: Any, what: str) -> Sequence[str]:
    for entry in _listed(entries, what):
        if not isinstance(entry, str):
            raise ValueError(f"{what} must be text, got {entry!r}: from_lists takes token ids")
    return entries


def _parted(tokenizer: Tokenizer, pair: int, clean: list[int], corrupt: list[int]) -> str:
    """Where the prompts of a pair part, whose numbers of tokens differ."""
    same = [a == b for a, b in zip(clean, corrupt, strict=False)]
    at = (*same, False).index(False)
    behind = [" + ".join(map(repr, tokenizer.pieces(ids[at : at + 4]))) or "its end" for ids in (clean, corrupt)]
    return (
        f"clean and corrupt must have the same number of tokens, but pair {pair} has {len(clean)} and {len(corrupt)}: "
        f"behind the first {at}, which are the same, clean has {behind[0]}, corrupt {behind[1]}"
    )


def _entries(entries: Any, what: str) -> list[Any]:
    """One entry a pair, of a list, an array or a tensor."""
    if isinstance(entries, str) or not hasattr(entries, "__iter__"):
        raise ValueError(f"{what} must be a list with one entry a pair, got {short_repr(entries)}")
    return list(entries.tolist() if hasattr(entries, "tolist") else entries)


def _ids(entry: Any, what: str, pair: int, *, one: bool = False) -> list[int]:
    """The token ids of an entry, a list, an array or a tensor of integers, or where there may be one alone, an
    integer."""
    ids = entry.tolist() if hasattr(entry, "tolist") else entry
    if isinstance(ids, str):
        raise ValueError(
            f"{what} of pair {pair} is text, {short_repr(ids)}, but from_lists takes token ids: from_text takes text, "
            "with a model that has a tokenizer"
        )
    if not isinstance(ids, list | tuple):
        if not one:
            raise ValueError(f"{what} of pair {pair} must be a list of token ids, got {short_repr(entry)}")
        ids = [ids]
    if set(map(type, ids)) - {int}:
        ids = [id.item() if hasattr(id, "item") and not getattr(id, "ndim", 0) else id for id in ids]
        for id in ids:
            if not isinstance(id, int) or isinstance(id, bool):
                hint = ": from_text takes text" if isinstance(id, str) else ""
                raise ValueError(f"{what} of pair {pair} must be integers, got {short_repr(id)}{hint}")
    if ids and not -_LARGEST < min(ids) <= max(ids) < _LARGEST:
        raise ValueError(f"{what} of pair {pair} has {short_repr(max(ids, key=abs))}, which is no token id")
    return list(ids)


_LARGEST = 1 << 62
_SHAPES = {"clean": "N T", "corrupt": "N T", "lengths": "N", "positions": "N", "answers": "N A", "wrong": "N W"}


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor(
        [list(row) + [fill] * (width - len(row)) for row in rows], dtype=torch.int64, device="cpu"
    ).view(len(rows), width)
