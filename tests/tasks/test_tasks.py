"""Prompt pairs and task files: what they make of good input, and the sentence that bad input gets."""

from __future__ import annotations

import csv
import itertools
import json
import re

import pytest
import torch
from models import SHARED, lists
from refusal import refused

from eapcore.tasks import TASKS, PromptPairs, find_pairs, sort
from eapcore.tasks.files import read_pairs

WORDS = {"the": 1, "cat": 2, "dog": 3, "sat": 4, "ran": 5, ".": 6}


def encode(line):
    return [WORDS[word] for word in line.split()]


# Prompt pairs


def test_prompts_of_different_lengths_are_padded_on_the_right():
    pairs = PromptPairs.from_lists([[5, 6, 7], [8]], [[5, 6, 9], [4]], [[1, 2], 3], [[4], [5, 6]], name="n", seed=3)
    assert pairs.clean.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert pairs.corrupt.tolist() == [[5, 6, 9], [4, 0, 0]]
    assert pairs.lengths.tolist() == [3, 1]
    assert pairs.positions.tolist() == [2, 0]
    assert pairs.answers.tolist() == [[1, 2], [3, -1]]
    assert pairs.wrong.tolist() == [[4, -1], [5, 6]]
    assert {t.dtype for t in (pairs.clean, pairs.corrupt, pairs.lengths, pairs.positions, pairs.wrong)} == {torch.int64}
    assert (len(pairs), pairs.name, pairs.seed, pairs.vocab) == (2, "n", 3, None)


def test_wrong_answers_may_be_left_out():
    assert PromptPairs.from_lists([[1]], [[2]], [3]).wrong.shape == (1, 0)
    assert PromptPairs.from_lists([[1]], [[2]], [3], [[]]).wrong.shape == (1, 0)


def test_corrupt_prompts_may_be_left_out():
    pairs = PromptPairs.from_lists(clean=[[1, 2], [3]], answers=[3, 4])
    assert torch.equal(pairs.corrupt, pairs.clean) and pairs.positions.tolist() == [1, 0]
    assert lists(PromptPairs.from_lists([[1, 2], [3]], None, [3, 4])) == lists(pairs)


GOOD = {"clean": [[1, 2], [3, 4, 5]], "corrupt": [[1, 3], [3, 4, 6]], "answers": [[7], [8]], "wrong": [[9], [10]]}
FAULTS = {
    "empty": ({"clean": [], "corrupt": [], "answers": [], "wrong": []},
        "the task 'n' is empty: at least one prompt pair is needed"),
    "fewer corrupt": ({"corrupt": [[1, 3]]}, "one entry in each list, got {'clean': 2, 'corrupt': 1, 'answers': 2"),
    "fewer answers": ({"answers": [[7]]}, "one entry in each list, got {'clean': 2, 'corrupt': 2, 'answers': 1"),
    "more wrong": ({"wrong": [[7]] * 3}, "'wrong': 3}"),
    "fewer positions": ({"positions": [0]}, "'positions': 1}"),
    "lengths": ({"corrupt": [[1, 3], [3, 4]]},
        "clean and corrupt must have the same number of tokens, but pair 1 has 3 and 2"),
    "no tokens": ({"clean": [[], [3, 4, 5]], "corrupt": [[], [3, 4, 6]]}, "at least one token, but pair 0 has none"),
    "no answer": ({"answers": [[7], []]}, "pair 1 has no answer: at least one token id is needed"),
    "a negative answer": ({"answers": [[7], [-1]]}, "a token id of at least 0, but pair 1 has -1"),
    "a negative wrong answer": ({"wrong": [[2, -3], [1]]}, "a token id of at least 0, but pair 0 has -3"),
    "position behind": ({"positions": [1, 3]}, "the position 3 of pair 1 is outside its prompt of 3 tokens"),
    "position before": ({"positions": [-1, 2]}, "the position -1 of pair 0 is outside its prompt of 2 tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_pairs_that_do_not_fit_are_refused_by_number(changes, message):
    assert len(PromptPairs.from_lists(**GOOD, name="n")) == 2
    refused(re.escape(message), PromptPairs.from_lists, **GOOD | changes, name="n")


def test_select_keeps_the_pairs_and_cuts_to_the_longest_among_them():
    pairs = PromptPairs.from_lists([[1], [2, 3, 4], [5, 6]], [[2], [2, 3, 5], [5, 7]], [1, 2, 3], positions=[0, 2, 1])
    some = pairs.select(torch.tensor([2, 0]))
    assert some.clean.tolist() == [[5, 6], [1, 0]]
    assert lists(some) == {
        "clean": [[5, 6], [1]], "corrupt": [[5, 7], [2]], "answers": [[3], [1]], "wrong": [[], []], "positions": [1, 0]
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
def test_batches_hold_every_pair_once_and_in_order(size):
    pairs = sort.generate(7, 0)
    batches = list(pairs.batches(size))
    assert [len(b) for b in batches] == [size] * (7 // size) + ([7 % size] if 7 % size else [])
    for name, expected in lists(pairs).items():
        assert list(itertools.chain(*(lists(b)[name] for b in batches))) == expected


# Task files

ENTRIES = [
    {"clean": "the cat sat", "corrupt": "the dog sat", "answer": "ran", "wrong": ["sat", "."]},
    {"clean": [1, 2], "corrupt": [1, 3], "answer": 5},
    {"clean": "cat ran the dog", "corrupt": "dog ran the dog", "answer": ["cat", 4], "wrong": 3, "position": 2},
]
READ = {
    "clean": [[1, 2, 4], [1, 2], [2, 5, 1, 3]],
    "corrupt": [[1, 3, 4], [1, 3], [3, 5, 1, 3]],
    "answers": [[5], [5], [2, 4]],
    "wrong": [[4, 6], [], [3]],
    "positions": [2, 1, 2],
}


def write_jsonl(path, entries):
    path.write_text("\n".join(json.dumps(e) for e in entries) + "\n\n", encoding="utf-8")
    return path


def write_csv(path, entries, delimiter=","):
    fields = list(dict.fromkeys(field for entry in entries for field in entry))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, delimiter=delimiter)
        writer.writeheader()
        for entry in entries:
            writer.writerow({k: v if isinstance(v, str | int) else json.dumps(v) for k, v in entry.items()})
    return path


@pytest.fixture(params=[write_jsonl, write_csv], ids=["jsonl", "csv"])
def write(request, tmp_path):
    path = tmp_path / ("task.csv" if request.param is write_csv else "task.jsonl")
    return lambda entries: request.param(path, entries)


TEXTS = [
    {"clean": "the cat sat", "corrupt": "the dog sat", "answer": "ran", "wrong": ["sat", "."], "position": ""},
    {"clean": "cat ran the dog", "corrupt": "dog ran the dog", "answer": ["cat"], "wrong": "the", "position": 2},
]
IDS = [
    {"clean": [1, 2, 4], "corrupt": [1, 3, 4], "answer": 5, "wrong": [4, 6], "position": ""},
    {"clean": [2, 5, 1, 3], "corrupt": [3, 5, 1, 3], "answer": [2], "wrong": 1, "position": 2},
]
SAME = {"clean": [[1, 2, 4], [2, 5, 1, 3]], "corrupt": [[1, 3, 4], [3, 5, 1, 3]], "answers": [[5], [2]],
    "wrong": [[4, 6], [1]], "positions": [2, 2]}  # fmt: skip


def test_json_values_are_text_or_ids_by_their_type(tmp_path):
    path = write_jsonl(tmp_path / "task.jsonl", ENTRIES)
    pairs = read_pairs(path, encode)
    assert lists(pairs) == READ
    assert (pairs.name, pairs.seed) == (path.name, None)
    assert lists(find_pairs(path, n=None, seed=0, encode=encode)) == READ
    assert "clean text and token ids" in pairs.details["fields"]


def test_a_task_reads_the_same_from_every_kind_of_file(tmp_path):
    for entries in (TEXTS, IDS):
        found = [read_pairs(write_jsonl(tmp_path / "t.jsonl", entries), encode)]
        for name, delimiter in (("t.csv", ","), ("semicolons.CSV", ";"), ("tabs.csv", "\t"), ("t.Tsv", "\t")):
            found.append(read_pairs(write_csv(tmp_path / name, entries, delimiter), encode))
        (tmp_path / "t.JSON").write_text(json.dumps(entries))
        found.append(read_pairs(tmp_path / "t.JSON", encode))
        assert all(lists(pairs) == SAME for pairs in found)
        kind = "text" if entries is TEXTS else "token ids"
        for pairs in found:
            assert re.sub("_(ids|text)", "", pairs.details["fields"]) == (
                f"clean {kind}, corrupt {kind}, answer {kind}, wrong {kind}, position (position)"
            )


def test_a_file_may_leave_out_corrupt_prompts(write):
    entries = [{key: value for key, value in entry.items() if key != "corrupt"} for entry in TEXTS]
    assert lists(read_pairs(write(entries), encode)) == SAME | {"corrupt": SAME["clean"]}
    assert lists(read_pairs(write([TEXTS[0], *entries[1:]]), encode))["corrupt"] == [
        SAME["corrupt"][0], *SAME["clean"][1:]
    ]  # fmt: skip


def test_n_takes_the_first_pairs_of_a_file(write):
    assert lists(read_pairs(write(TEXTS), encode, n=1)) == {k: v[:1] for k, v in SAME.items()}


def test_ids_need_no_tokenizer_and_text_does(write):
    assert lists(read_pairs(write(IDS)))["clean"] == SAME["clean"]
    with pytest.raises(ValueError, match=r"clean of line [12] of task\.\w+ is text, .* --tokenizer FOLDER"):
        read_pairs(write(TEXTS))


def line(path, number):
    """How an error calls an entry: CSV's first line is its header."""
    return f"line {number + (path.suffix == '.csv')} of {path.name}"


ENTRY_FAULTS = {
    "no clean": ({"clean": ""}, "{} has no clean: an entry is"),
    "no clean, no answer": ({"clean": "", "answer": ""}, "{} has no clean and no answer: an entry is"),
    "answer of two tokens": ({"answer": "cat ran"},
        "the answer of {} must be one token, but 'cat ran' is 2 tokens [2, 5]"),
    "answer of no token": ({"answer": " "}, "the answer of {} must be one token, but ' ' is 0 tokens []"),
    "one of the wrong of two tokens": ({"wrong": ["sat", "the cat"]},
        "the wrong answer of {} must be one token, but 'the cat' is 2 tokens [1, 2]"),
    "a position in words": ({"position": "last"}, "the position of {} must be an integer, got 'last'"),
    "a position with two signs": ({"position": "--1"}, "the position of {} must be an integer, got '--1'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ENTRY_FAULTS.values(), ids=ENTRY_FAULTS)
def test_an_entry_that_is_none_is_refused_by_its_line(write, changes, message):
    path = write([TEXTS[1], TEXTS[0] | changes])
    refused(re.escape(message.replace("{}", line(path, 2))), read_pairs, path, encode)


MALFORMED = {
    "t.jsonl": [('{"clean": [1], "corrupt": [2], "answer": 3}\n{"clean": [1',
        r"line 2 of t\.jsonl is not JSON \(.*an entry is"),
        ("[1, 2]\n", r"line 1 of t\.jsonl is not a JSON object, but \[1, 2\]: an entry is"),
        ('\n\n{"clean": [1], "corrupt": [2]}', r"line 3 of t\.jsonl has no answer"),
        ('{"clean": [1], "corrupt": [true], "answer": 3}', r"corrupt of line 1 of t\.jsonl must be text or a list"),
        ('{"clean": [1], "corrupt": [2.0], "answer": 3}', r"corrupt of line 1 of t\.jsonl must be text or a list"),
        ('{"clean": [1], "corrupt": [2], "answer": 3.0}', r"the answer of line 1 of t\.jsonl must be text, a token id"),
        ('{"clean": ["the", "cat"], "answer": "ran"}', r"clean of line 1 .* must be text or a list of token ids"),
        ('{"clean": [1], "answer": [[1], 2]}', "the answer of line 1 of t.jsonl must be text, a token id, or a list"),
        ('{"clean": [1], "corrupt": [2], "answer": 3, "position": 0.5}', "must be an integer, got 0.5"),
        ("", r"the task 't\.jsonl' is empty")],
    "t.csv": [("", r"the task 't\.csv' is empty"), ("clean,corrupt,answer\n", r"the task 't\.csv' is empty"),
        ("prompt,other\n[1],[2]\n", r"t\.csv has fields that nothing reads: 'prompt' \(is clean meant\?\), 'other'"),
        ("clean,corrupt,answer\n[1],[2],[3]\n[1],[2]\n", r"line 3 of t\.csv has 2 cells, but the header names 3"),
        ('clean,corrupt,answer\n"the cat"x,the dog,ran\n', r"line 2 of t\.csv is not CSV"),
        ('clean,corrupt,answer\n"the cat,the dog,ran\n', r"line 2 of t\.csv is not CSV")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *fault) for name, faults in MALFORMED.items() for fault in faults]
)
def test_a_malformed_file_is_refused_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    refused(message, read_pairs, tmp_path / name, encode)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_a_file_that_is_not_text_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02\xff\xfe")
    refused(f"{name} must be UTF-8 text", read_pairs, tmp_path / name, encode)


def test_a_byte_order_mark_and_line_separators_inside_text_do_no_harm(tmp_path):
    entry = '{"clean": "a\u2028b", "corrupt": "c", "answer": "d"}'
    seen = []
    for name, content in (("t.jsonl", entry), ("t.csv", "clean,corrupt,answer\r\na\u2028b,c,d\r\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        read_pairs(tmp_path / name, lambda line: seen.append(line) or [len(seen)])
    assert seen == ["a\u2028b", "c", "d"] * 2


def test_a_file_of_another_format_or_a_missing_one_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("{}")
    refused(
        r"a task file must end in \.jsonl, \.json, \.csv, \.tsv or \.parquet, got 't\.txt'",
        read_pairs,
        tmp_path / "t.txt",
    )
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "t.jsonl")
    with pytest.raises(
        ValueError, match=r"capitals or a \.jsonl, \.json, \.csv, \.tsv or \.parquet file, got .*nothing\.csv"
    ):
        find_pairs(tmp_path / "nothing.csv", n=None, seed=0)


@pytest.mark.parametrize("task", ["iio", "", "Sort", "."])
def test_an_unknown_task_lists_the_valid_ones(task):
    with pytest.raises(
        ValueError, match=r"must be one of toy-ioi, .*, capitals or a \.jsonl, \.json, \.csv, \.tsv or \.parquet file"
    ) as e:
        find_pairs(task, n=None, seed=0)
    assert repr(task) in str(e.value)


@pytest.mark.parametrize("n", [0, -3])
@pytest.mark.parametrize("task", ["sort", "toy-ioi", "some.jsonl"])
def test_fewer_than_one_pair_is_refused(task, n):
    refused(f"n must be at least 1 pair, got {n}", find_pairs, task, n=n, seed=0)


# Built-in tasks


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.corruptions])
def test_a_built_in_task_draws_the_same_pairs_from_the_same_seed(task):
    one, again, other = (find_pairs(task, n=20, seed=seed) for seed in (1, 1, 2))
    assert lists(one) == lists(again)
    assert lists(one) != lists(other)
    assert (len(one), one.seed, one.name) == (20, 1, task)
    assert len(find_pairs(task, n=None, seed=0)) == 64


def test_the_sort_task_asks_for_the_next_sorted_digit():
    pairs = lists(sort.generate(500, 0))
    lengths = set()
    for clean, corrupt, answers, wrong, position in zip(*pairs.values(), strict=True):
        digits, done = clean[:6], clean[6:]
        assert len(digits) == 6 and set(clean) <= {0, 1, 2}
        assert done == sorted(digits)[: len(done)] == corrupt[6:]
        assert answers == [sorted(digits)[len(done)]]
        assert wrong == [sorted(corrupt[:6])[len(done)]] != answers
        assert sum(a != b for a, b in zip(clean, corrupt, strict=True)) == 1
        assert position == len(clean) - 1
        lengths.add(len(clean))
    assert lengths == set(range(6, 12))


@pytest.mark.skipif(not (SHARED / "gpt-nano-sort").is_dir(), reason="the checkpoint gpt-nano-sort is not here")
def test_the_sorting_model_gives_the_answers_of_the_sort_task():
    from eapcore.models.forward import forward
    from eapcore.models.load import load

    model = load(SHARED / "gpt-nano-sort")
    pairs = sort.generate(500, 1)
    with torch.no_grad():
        for prompts, expected in ((pairs.clean, pairs.answers), (pairs.corrupt, pairs.wrong)):
            predicted = forward(model, prompts)[torch.arange(len(pairs)), pairs.positions].argmax(-1)
            assert float((predicted == expected[:, 0]).double().mean()) >= 0.99
