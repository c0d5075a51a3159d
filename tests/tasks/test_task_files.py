"""What is read from a task file is what its fields say, or one sentence says why not.

Kinds of faults here, and how many members each is tried with: a value that could be text or ids (AMBIGUOUS), a field
that nothing reads (UNREAD), files as their publishers make them (PUBLISHED, and first rows of the real ones), and what
those may have wrong (UNFIT).
"""

from __future__ import annotations

import json
import re

import pytest
from models import SHARED, lists
from refusal import refused

from eapcore.tasks.files import read_pairs
from eapcore.tasks.pairs import PromptPairs
from eapcore.text.folder import find_tokenizer

WORDS = {"the": 1, "cat": 2, "dog": 3, "sat": 4, "ran": 5, " cat": 6, " dog": 7, "A": 8, "B": 9, "+17": 10, "1732": 11,
    "1701": 12, "673": 13, "[1,": 14, "2]": 15}  # fmt: skip
YEARS = {f"{year:02d}": 100 + year for year in range(100)}


def encode(line):
    return [WORDS[line]] if line in WORDS else [WORDS[word] if word in WORDS else YEARS[word] for word in line.split()]


def read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_pairs(path, encode, **options)


AMBIGUOUS = {
    "a number among texts": ("clean,corrupt,answer\nthe cat,the dog,673\n", "answer '673'"),
    "with spaces around": ("clean,corrupt,answer\nthe cat,the dog, 673 \n", "answer ' 673 '"),
    "as tables keep missing ones": ("clean,corrupt,answer\nthe cat,the dog,673.0\n", "answer '673.0'"),
    "signed": ("clean,corrupt,answer\nthe cat,the dog,+673\n", r"answer '\+673'"),
    "a wrong one": ("clean,corrupt,answer,wrong\nthe cat,the dog,ran,673\n", "wrong '673'"),
    "numpy's": ("clean,corrupt,answer\n[ 464 3139  286],[ 464 3139  287],ran\n", "clean '.*464"),
    "numpy's in one line": ("clean,corrupt,answer\n[464 3139],[464 3140],[5]\n", "clean '.464 3139.'"),
    "torch's": ('clean,corrupt,answer\n"tensor([464, 3139])","tensor([464, 3140])",ran\n', "clean 'tensor"),
    "torch's with its dtype": ('clean,answer\n"tensor([4], dtype=torch.int32)",ran\n', "clean 'tensor"),
    "array": ('clean,corrupt,answer\n"array([464, 3139])","array([464, 3140])",ran\n', "clean 'array"),
    "a tuple": ('clean,corrupt,answer\n"(464, 3139)","(464, 3140)",ran\n', "clean '.464, 3139.'"),
    "without brackets": ("clean,corrupt,answer\n464 3139,464 3140,ran\n", "clean '464 3139'"),
    "with commas alone": ('clean,corrupt,answer\n"464,3139","464,3140",ran\n', "clean '464,3139'"),
    "one prompt of ids among texts": ('clean,corrupt,answer\n"[1, 2]","[1, 3]",ran\nthe cat,the dog,ran\n', "clean"),
    "one text among prompts of ids": ('clean,answer\nthe cat,ran\n"[1, 2]",ran\n', "clean"),
    "an id alone among texts": ('clean,corrupt,answer\nthe cat,the dog,ran\nthe cat,the dog,[673]\n', "answer"),
    "an empty list": ("clean,corrupt,answer\nthe cat,the dog,[]\n", r"answer '\[\]'"),
    "a list as Python prints it": ("clean,corrupt,answer\nthe cat,the dog,['ran']\n", "answer"),
    "text that looks like a list": ("clean,corrupt,answer\nthe cat,the dog,[ran]\n", "answer"),
    "printed into JSON": ({"clean": "[464, 3139]", "corrupt": "[464, 3140]", "answer": "ran"}, "clean '.464, 3139.'"),
    "numpy's printed into JSON": ({"clean": "the cat", "corrupt": "the dog", "answer": "[ 673]"}, "answer '. 673.'"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_could_be_text_or_ids_is_refused_with_both_readings(tmp_path, content, message):
    name = "t.csv" if isinstance(content, str) else "t.jsonl"
    said = refused(message + ".* may be (a )?text or", read, tmp_path, name, content)
    assert re.search(r"line \d of t\.", said)


def test_a_field_that_says_what_it_is_settles_it(tmp_path):
    content = "clean_text,corrupt_text,answer_text,wrong_ids\n673 the,673 cat,673,673\n"
    with pytest.raises(ValueError, match="the answer 13 among its wrong answers"):
        read(tmp_path, "t.csv", content.replace(",673\n", ",13\n"))
    pairs = lists(read(tmp_path, "t.csv", content))
    assert (pairs["clean"], pairs["answers"], pairs["wrong"]) == ([[13, 1]], [[13]], [[673]])
    ids = lists(read(tmp_path, "t.csv", "clean_ids,corrupt_ids,answer_ids\n[ 464 3139],[464  3140],673\n"))
    assert (ids["clean"], ids["corrupt"], ids["answers"]) == ([[464, 3139]], [[464, 3140]], [[673]])
    text_of_digits = {"clean": "673 the", "corrupt": "673 cat", "answer": "673"}  # JSON says itself that it is text
    assert lists(read(tmp_path, "t.jsonl", text_of_digits))["answers"] == [[13]]
    brackets = {"clean_text": "[1, 2]", "corrupt_text": "[1, 673", "answer_ids": 673}
    assert lists(read(tmp_path, "t.jsonl", brackets))["clean"] == [[14, 15]]


UNREAD = {
    **{f"{name} for position": ({name: 0}, f"'{name}' .is position meant")
        for name in ("postion", "positions", "pos", "Position", "POSITION", " position", "positon")},
    **{f"{name} for {meant}": ({name: "ran"}, f"'{name}' .is {meant} meant") for name, meant in (
        ("answers", "answer"), ("Answer", "answer"), ("corrupted", "corrupt"), ("wrong_answers", "wrong"),
        ("wrong_answer", "wrong"), ("Corrupt", "corrupt"), ("cleen", "clean"), ("wrog", "wrong"),
        ("target", "answer"))},
    "something else": ({"note": "x"}, "'note'; .*, where answer, clean, corrupt, position, wrong are read"),
    "no name": ({"": "x"}, "reads: ''"),
    "two names of one field": ({"answer_ids": 3}, "has answer and answer_ids: which one counts"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "message"), UNREAD.values(), ids=UNREAD)
def test_a_field_that_nothing_reads_is_refused_with_the_nearest_that_is(tmp_path, more, message):
    entry = {"clean": "the cat", "corrupt": "the dog", "answer": "ran"} | more
    said = refused(message, read, tmp_path, "t.jsonl", entry)
    table = ",".join(map(str, entry)) + "\n" + ",".join(map(str, entry.values())) + "\n"
    assert re.search(message, refused("t.csv has", read, tmp_path, "t.csv", table))
    assert "which one counts" in said or "its fields are clean, corrupt, answer" in said


def test_cells_columns_and_keys_too_many_or_too_few_are_refused(tmp_path):
    faults = (
        ("t.csv", "clean,corrupt,answer\nthe cat, sat,the dog,ran\n", "line 2 of t.csv has 4 cells, .* names 3"),
        ("t.csv", "clean,corrupt,answer\nthe cat,the dog\n", "line 2 of t.csv has 2 cells, .* names 3"),
        ("t.csv", "clean,corrupt,answer\nthe cat,the dog,ran,\n", "line 2 of t.csv has 4 cells"),
        ("t.csv", "clean,corrupt,answer,answer\nthe cat,the dog,ran,sat\n", "has the column answer twice"),
        ("t.csv", ",clean,answer\nx,the cat,ran\n", "a first column without a name that holds no row numbers"),
        ("t.jsonl", '{"clean": "the cat", "answer": "ran", "answer": "sat"}', "line 1 .*'answer' occurs twice"),
        ("t.json", {"prompts": [], "other": 1}, "t.json has other beside its prompts"),
        ("t.json", "[" * 100_000, "t.json is nested too deeply"),
        ("t.jsonl", '{"clean": ' + "[" * 100_000, "line 1 of t.jsonl is nested too deeply"),
        ("t.jsonl", '{"clean": [' + "9" * 5000 + "]}", "line 1 of t.jsonl is not JSON"),
        ("t.jsonl", {"clean": [10**30], "answer": 1}, "clean of line 1 of t.jsonl must be text or a list of token ids"),
        ("t.csv", "clean_ids,answer_ids\n1," + "9" * 5000 + "\n", "token ids, integers from 0 on"),
        ("t.csv", "clean_ids,answer_ids,position\n1,2," + "9" * 5000 + "\n", "position .* must be an integer"),
        ("t.json", {"clean": {"0": "the cat"}}, "must hold a list of entries"),
        ("t.json", [["clean"]], "entry 0 of t.json is not a JSON object"),
    )  # fmt: skip
    for name, content, message in faults:
        assert len(refused(message, read, tmp_path, name, content)) < 500


def test_row_numbers_that_pandas_writes_are_left_aside(tmp_path):
    pairs = read(tmp_path, "t.csv", ",clean,corrupt,answer\n0,the cat,the dog,ran\n")
    assert lists(pairs)["answers"] == [[5]] and pairs.details["fields"].endswith("not read: row numbers")


MIB_IOI = {"prompt": "the cat sat", "template": "x", "metadata": {"subject": "dog"}, "choices": ["dog", "cat"],
    "answerKey": 1, "abc_counterfactual": {"prompt": "the dog ran", "choices": ["a", "b"], "answerKey": 0},
    "s2_io_flip_counterfactual": {"prompt": "the dog sat", "choices": ["dog", "cat"], "answerKey": 0}}  # fmt: skip
MIB_LABELS = {"prompt": "the cat sat", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": 0,
    "symbol_counterfactual": {"prompt": "the dog sat", "choices": {"label": ["A", "B"]}, "answerKey": 1}}  # fmt: skip
PROMPTS = "the cat sat,the dog sat"
PUBLISHED = {
    "EAP-IG": ("t.csv", f"clean,corrupted,correct_idx,incorrect_idx\n{PROMPTS},673,14\n", [673], [14]),
    "EAP-IG with semicolons": ("t.csv", "clean;corrupted;correct_idx;incorrect_idx\nthe cat sat;the dog sat;5;4\n",
        [5], [4]),
    "EAP-IG's bias": ("t.csv", f"clean,corrupted,clean_answer_idx,corrupted_answer_idx,label\n{PROMPTS},1,2,0\n",
        [1], [2]),
    "EAP-IG's facts": ("t.csv", "clean,capital,country,country_idx,corrupted,corrupted_capital,corrupted_country,"
        "corrupted_country_idx\nthe cat sat,Rome,Italy,8,the dog sat,Bern,Switzerland,9\n", [8], [9]),
    "EAP-IG's sets": ("t.csv", "clean,h1,hypernym,answers,answers_idx,corrupted,c1,corrupted_answers,"
        "corrupted_answers_idx\nthe cat sat,x,y,\"['gem', 'gems']\",\"[7, 8]\",the dog sat,z,['bug'],[9]\n",
        [7, 8], [9]),
    "EAP-IG's years": ("t.csv", "clean,corrupted,label\nthe 1732 17,the 1701 17,32\n",
        [100 + x for x in range(33, 100)], [100 + x for x in range(33)]),
    "auto-circuit": ("t.json", {"prompts": [{"clean": "the cat sat", "corrupt": "the dog sat", "answers": ["ran",
        "cat"], "wrong_answers": ["673"]}], "seq_labels": []}, [5, 2], [13]),
    "MIB's names": ("t.jsonl", MIB_IOI, [6], [7]),
    "MIB's labels": ("t.json", [MIB_LABELS], [8], [9]),
    "MIB's arithmetic": ("t.jsonl", {"prompt": "the cat sat", "label": "+17", "operator": "+", "operands": [1, 2],
        "random_counterfactual": {"prompt": "the dog sat", "label": "673"}}, [10], [13]),
    "PEAP's": ("t.csv", "prompt,correct_token,wrong_token,split,length,S1,IO,top_answer\nthe cat sat,ran,sat,eval,3,0,"
        "1,ran\n", [5], [4]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "answers", "wrong"), PUBLISHED.values(), ids=PUBLISHED)
def test_files_are_read_as_they_are_published(tmp_path, name, content, answers, wrong):
    pairs = read(tmp_path, name, content)
    assert (lists(pairs)["answers"], lists(pairs)["wrong"]) == ([answers], [wrong])
    if "1732" not in str(content):
        assert lists(pairs)["clean"] == [[1, 2, 4]]
        assert lists(pairs)["corrupt"] == [[1, 2, 4] if "correct_token" in content else [1, 3, 4]]
    assert "answer" in pairs.details["fields"]


def test_a_corruption_is_chosen_by_its_name(tmp_path):
    table = f"clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n{PROMPTS},the ran sat,673,14\n"
    assert lists(read(tmp_path, "t.csv", table))["corrupt"] == [[1, 3, 4]]
    hard = read(tmp_path, "t.csv", table, corruption="corrupted_hard")
    assert lists(hard)["corrupt"] == [[1, 5, 4]] and "corrupted_hard (not corrupted)" in hard.details["fields"]
    assert lists(read(tmp_path, "t.jsonl", MIB_IOI, corruption="abc_counterfactual"))["corrupt"] == [[1, 3, 5]]
    refused("no corrupt prompts called 'hard': it has corrupted", read, tmp_path, "t.csv", table, corruption="hard")
    other = {key: value for key, value in MIB_IOI.items() if key != "s2_io_flip_counterfactual"}
    other["my_counterfactual"] = other["abc_counterfactual"]
    refused("several corrupt prompts, abc_counterfactual, my_", read, tmp_path, "t.jsonl", other)


def test_peap_keeps_its_counterfactuals_in_a_second_file(tmp_path):
    (tmp_path / "counter.csv").write_text("prompt,correct_token,wrong_token,split\nthe dog sat,ran,sat,eval\n")
    table = PUBLISHED["PEAP's"][1]
    assert lists(read(tmp_path, "t.csv", table, corruption=str(tmp_path / "counter.csv")))["corrupt"] == [[1, 3, 4]]
    refused("a second file", read, tmp_path, "t.csv", table, corruption="counter")
    twice = table + table.splitlines()[1] + "\n"
    refused("in 2 rows", read, tmp_path, "t.csv", twice, corruption=str(tmp_path / "counter.csv"))


UNFIT = {
    "a year that is none": ("t.csv", "clean,corrupted,label\nthe cat,the dog,32\n", "label 32 of line 2 .* may be"),
    "an id where a year stands": ("t.csv", "clean,corrupted,correct_idx\nthe 1732 17,the 1701 17,673\n",
        "may be a token"),
    "the last year": ("t.csv", "clean,corrupted,label\nthe 1799 17,the 1701 17,99\n", "no two digits are right"),
    "agreement": ("t.csv", "clean,corrupted,group,plural\nthe cat,the dog,g,1\n", "not which tokens are right"),
    "text where ids are": ("t.csv", f"clean,corrupted,correct_idx,incorrect_idx\n{PROMPTS},cat,14\n",
        "correct_idx of .* ids"),
    "a float id": ("t.csv", f"clean,corrupted,correct_idx,incorrect_idx\n{PROMPTS},673.0,14\n",
        "correct_idx of line 2"),
    "a negative id": ("t.csv", f"clean,corrupted,correct_idx,incorrect_idx\n{PROMPTS},-3,14\n",
        "correct_idx of line 2"),
    "a typo": ("t.csv", f"clean,corrupted,correct_idx,incorect_idx\n{PROMPTS},1,2\n",
        "'incorect_idx' .is incorrect_idx"),
    "no corruption": ("t.csv", "clean,correct_idx,incorrect_idx\nthe cat,1,2\n", "has no corrupt prompts"),
    "both kinds": ("t.csv", f"clean,corrupted,correct_idx,incorrect_idx,answer\n{PROMPTS},1,2,ran\n", "'answer'"),
    "the same id twice": ("t.csv", f"clean,corrupted,correct_idx,incorrect_idx\n{PROMPTS},5,5\n",
        "line 2 of t.csv has the answer 5 among its wrong"),
    "an answer missing": ("t.csv", f"clean,corrupted,correct_idx,incorrect_idx\n{PROMPTS},,5\n",
        "line 2 .* has no correct_idx"),
    "answerKey outside": ("t.jsonl", MIB_IOI | {"answerKey": 2}, "answerKey of line 1 .* one of its 2 choices, got 2"),
    "answerKey as a letter": ("t.jsonl", MIB_IOI | {"answerKey": "B"}, "answerKey of line 1"),
    "no counterfactual": ("t.jsonl", MIB_IOI | {"s2_io_flip_counterfactual": None}, "has no s2_io_flip_counterfactual"),
    "choices of no texts": ("t.jsonl", MIB_IOI | {"choices": [1, 2]}, "choices of line 1"),
    "activations, not tokens": ("t.json", {"prompts": [{"clean": [[3.0]], "corrupt": [[-3.0]], "answers": [0],
        "wrong_answers": [1]}]}, "clean of entry 0 of t.json must be text"),
    "lengths": ("t.jsonl", {"clean": "the cat", "corrupt": "the", "answer": "ran"}, "line 1 of t.jsonl has 2 and 1"),
    "a position outside": ("t.jsonl", {"clean": "the", "answer": "ran", "position": 1},
        "position 1 of line 1 of t.jsonl"),
    "an answer twice": ("t.jsonl", {"clean": "the", "answer": ["ran", "ran"]},
        "line 1 of t.jsonl has the answer 5 twice"),
    "a wrong one twice": ("t.jsonl", {"clean": "the", "answer": "ran", "wrong": [3, 3]}, "the wrong answer 3 twice"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), UNFIT.values(), ids=UNFIT)
def test_what_a_published_file_has_wrong_is_said_with_its_line(tmp_path, name, content, message):
    refused(message, read, tmp_path, name, content)


def test_pairs_without_anything_to_tell_apart_are_refused_as_lists_too():
    refused("pair 1 has the answer 4 among", PromptPairs.from_lists, [[1], [2]], [[2], [3]], [3, [4, 5]], [1, [6, 4]])


@pytest.mark.skipif(not (SHARED / "task-files").is_dir(), reason="first rows of published task files are not here")
@pytest.mark.parametrize("name", ["eapig_gt.csv", "faith_greater-than-price.csv", "faith_gender-bias.csv",
    "faith_ioi.csv", "eapig_ioi_llama.csv", "ac_ioi.json", "ac_gt.json", "ac_docstring.json"])  # fmt: skip
def test_the_first_rows_of_published_files_are_read(name):
    pytest.importorskip("tokenizers")
    gpt2 = find_tokenizer(SHARED / "gpt2-tokenizer")
    pairs = read_pairs(SHARED / "task-files" / name, gpt2)
    assert len(pairs) >= 8 and (pairs.clean != pairs.corrupt).any(1).all()
    if name in ("ac_gt.json", "eapig_gt.csv", "faith_greater-than-price.csv"):
        tokens = [*pairs.answers[pairs.answers >= 0].tolist(), *pairs.wrong[pairs.wrong >= 0].tolist()]
        assert all(re.fullmatch(r"\d\d", gpt2.decode([token])) for token in tokens)
        assert ((pairs.answers >= 0).sum(1) + (pairs.wrong >= 0).sum(1)).tolist() == [100] * len(pairs)
    elif name == "ac_ioi.json":
        assert [gpt2.decode(ids) for ids in pairs.answers.tolist()][:2] == [" Victoria", " Rose"]
    elif name == "faith_gender-bias.csv":
        assert gpt2.decode(pairs.answers[0].tolist()) == " she"
