"""Tokenizers: those of files, models and other packages read text alike, prompts begin as their own rule says or as was
asked for, and pairs are made from text."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
from models import SHARED, lists, random_model, save_checkpoint
from refusal import refused

import eapcore
from eapcore.cli import main
from eapcore.models.load import load
from eapcore.tasks import PromptPairs, find_pairs, toy_induction
from eapcore.tasks.files import read_pairs
from eapcore.text import Tokenizer
from eapcore.text.folder import find_tokenizer

tokenizers = pytest.importorskip("tokenizers")
needs_gpt2 = pytest.mark.skipif(not (SHARED / "gpt2-tokenizer").is_dir(), reason="GPT-2's tokenizer files are not here")
LETTERS = {"a": 0, "b": 1, "Ġ": 2, "Ġa": 3, "<s>": 4, "Ċ": 5}


def byte_level(folder, **beside):
    """A folder with a tokenizer of single bytes and one merge, as GPT-2 stores it, and JSON files by their stems."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(LETTERS))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ a\n", encoding="utf-8")
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def whole(folder, begins=False, **beside):
    """The same as tokenizer.json, whose post-processor puts <s> first and a second one last, or nothing."""
    byte_level(folder, **beside)
    made = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    if begins:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 4)])
    made.save(str(folder / "tokenizer.json"))
    return folder


def with_a_space_before():
    """A tokenizer that puts a space before a text, as Llama 2's does."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5, "\n": 6}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    normalizers = tokenizers.normalizers
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    return made


# What a prompt begins with


def test_a_prompt_begins_as_the_tokenizer_s_own_rule_says_or_as_was_asked_for(tmp_path):
    named = {"tokenizer_config": {"bos_token": "<s>"}}
    rules = {
        "nothing": (byte_level(tmp_path / "0"), []),
        "named": (byte_level(tmp_path / "1", **named), []),
        "asked for": (byte_level(tmp_path / "2", tokenizer_config={"bos_token": "<s>", "add_bos_token": True}), [4]),
        "as an object": (
            byte_level(tmp_path / "3", tokenizer_config={"bos_token": {"content": "<s>"}, "add_bos_token": True}), [4]),
        "declined": (byte_level(tmp_path / "4", tokenizer_config={"bos_token": "<s>", "add_bos_token": False}), []),
        "post-processor": (whole(tmp_path / "5", True), [4]),
        "post-processor, named": (whole(tmp_path / "6", True, **named), [4]),
        "no post-processor": (whole(tmp_path / "7", False, **named), []),
        "special_tokens_map.json": (whole(tmp_path / "8", False, special_tokens_map={"bos_token": "<s>"}), []),
        "the model's configuration": (byte_level(tmp_path / "9", config={"bos_token_id": 4}), []),
    }  # fmt: skip
    for name, (folder, begins) in rules.items():
        found = find_tokenizer(folder)
        assert found.prompt("ab a") == [*begins, 0, 1, 3], name
        assert (found("ab a"), found.begins_with) == ([0, 1, 3], "<s>" if begins else "none"), name
        assert found.with_bos("no").prompt("ab a") == [0, 1, 3], name
        if name != "nothing":
            assert found.with_bos("yes").prompt("ab a") == [4, 0, 1, 3], name
    assert find_tokenizer(rules["post-processor"][0]).prompt("<s>a") == [4, 0]  # the text has it already
    sentence = r"tokenizer of .* names no beginning-of-sequence token"
    refused(sentence, find_tokenizer(rules["nothing"][0]).with_bos("yes").prompt, "a")
    refused("bos must be one of auto, yes, no, got 'maybe'", find_tokenizer(tmp_path / "0").with_bos, "maybe")
    missing = byte_level(tmp_path / "10", tokenizer_config={"bos_token": "<x>", "add_bos_token": True})
    refused("asks for a bos_token that the vocabulary lacks", find_tokenizer(missing).prompt, "a")


def test_the_beginning_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    rules = ({}, {"add_bos_token": True}, {"add_bos_token": False})
    found = []
    for at, says in enumerate(rules):
        for make, begins in ((byte_level, None), (whole, False), (whole, True)):
            folder = tmp_path / f"{at} {make.__name__} {begins}"
            make(folder, *(() if begins is None else (begins,)), tokenizer_config={"bos_token": "<s>", **says})
            theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
            expected = [*theirs("ab a").input_ids]
            expected = expected[:-1] if expected[-1] == 4 else expected  # what follows a prompt is left out
            assert find_tokenizer(folder).prompt("ab a") == expected, folder
            assert PromptPairs.from_text(theirs, ["ab a"], answers=["b"]).clean.tolist() == [expected]
            found.append(len(expected))
    assert found == [3, 3, 4, 4, 3, 4, 3, 3, 4]


BYTES = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256)), *map(chr, range(256, 324))]
MERGES = [
    ("Ġ", "M"),
    ("a", "r"),
    ("ar", "y"),
    ("ĠM", "ary"),
    ("M", "ary"),
    ("h", "e"),
    ("2", "0"),
    ("Ċ", "Ċ"),
    ("l", "l"),
]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁aehlrtyM20", "▁a", "he", "▁M", "▁▁"]
TEXTS = ("Mary he", " Mary", "a  b\n\nc\t", "<|endoftext|>he<|endoftext|> x", "a <extra> b<pad>!", "<s>hi</s> a",
    "2020 it's", "I'LL", "ÜNÏ ﬁ Å", "", " ", "he <mask> x")  # fmt: skip


def two_files(folder, edit=None, **beside):
    """All bytes and a few merges as vocab.json and merges.txt, with JSON files by their stems."""
    folder.mkdir()
    tokens = [*BYTES, *("".join(merge) for merge in MERGES), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, [("#version:", "0.2"), *MERGES])), encoding="utf-8")
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def one_file(folder, edit=None, **beside):
    """The same as tokenizer.json; edit: what changes it before it is saved."""
    two_files(folder, **beside)
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(*(str(folder / n) for n in ("vocab.json", "merges.txt")))
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|endoftext|>"])
    if edit is not None:
        edit(made)
    made.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def pieces(folder, edit, **beside):
    """Sentence pieces as tokenizer.json."""
    two_files(folder, **beside)
    merges = [("▁", "a"), ("h", "e"), ("▁", "M"), ("▁", "▁")]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({p: i for i, p in enumerate(PIECES)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    made.add_special_tokens(PIECES[:3])
    edit(made)
    made.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def changed(**parts):
    """What sets some parts of a tokenizer."""
    return lambda made: [setattr(made, part, value) for part, value in parts.items()]


def cut_and_padded(made):
    made.enable_truncation(2)
    made.enable_padding(length=8)


def with_more_tokens(made):
    made.add_tokens(["<extra>"])
    made.add_special_tokens(["<pad>"])


def kind(name, **more):
    """A tokenizer_config.json."""
    return {"tokenizer_config": {"tokenizer_class": name, **more}}


def added(content, **flags):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


PRE, NORM = tokenizers.pre_tokenizers, tokenizers.normalizers
SPACED = NORM.Sequence([NORM.Prepend("▁"), NORM.Replace(" ", "▁")])
META = PRE.Metaspace(replacement="▁", prepend_scheme="first", split=False)
DIGITS = PRE.Sequence([PRE.Digits(individual_digits=True), PRE.ByteLevel(add_prefix_space=False)])
GPT2, FILE, NEOX, QWEN = "GPT2Tokenizer", "PreTrainedTokenizerFast", "GPTNeoXTokenizerFast", "Qwen2Tokenizer"
# How a folder is made, and whether it is read as transformers reads it (else a text at least is refused).
SETTINGS = {
    "two files": (two_files, None, kind(GPT2), True),
    "of a model": (two_files, None, {"config": {"model_type": "gpt2"}}, True),
    "a space before": (two_files, None, kind(GPT2, add_prefix_space=True), True),
    "added_tokens.json": (two_files, None, {**kind(GPT2), "added_tokens": {"<extra>": 266, "<pad>": 267},
        "special_tokens_map": {"pad_token": "<pad>"}}, True),
    "a map of special tokens": (two_files, None, {**kind(GPT2), "special_tokens_map": {
        "mask_token": {**added("<mask>", lstrip=True)}, "bos_token": "<s>"}}, True),
    "added_tokens_decoder": (two_files, None, kind(GPT2, pad_token="<pad>", added_tokens_decoder={
        "265": added("<|endoftext|>"), "266": added("<pad>"), "267": added("<extra>", special=False)}), True),
    "additional ones": (two_files, None, kind(GPT2, additional_special_tokens=["<extra>", "<pad>"]), True),
    "special tokens as text": (two_files, None, kind(GPT2, split_special_tokens=True), True),
    "BOS": (two_files, None, kind(GPT2, add_bos_token=True), True),
    "Qwen2": (two_files, None, kind(QWEN, additional_special_tokens=["<extra>"]), True),
    "NeoX": (two_files, None, kind(NEOX), True),
    "another class": (two_files, None, kind("RobertaTokenizer"), False),
    "another model": (two_files, None, {"config": {"model_type": "llama"}}, False),
    "one file": (one_file, None, kind(GPT2), True),
    "by its file alone": (one_file, None, kind(FILE), True),
    "cut and padded": (one_file, cut_and_padded, kind(GPT2), True),
    "cut and padded, by its file": (one_file, cut_and_padded, kind(FILE), True),
    "its space taken away": (one_file, changed(pre_tokenizer=PRE.ByteLevel(add_prefix_space=True)), kind(GPT2), True),
    "its space": (one_file, changed(pre_tokenizer=PRE.ByteLevel(add_prefix_space=True)), kind(FILE), True),
    "a space beside it": (one_file, None, kind(FILE, add_prefix_space=True), True),
    "normalised": (one_file, changed(normalizer=NORM.Sequence([NORM.NFKC(), NORM.Lowercase()])), kind(FILE), True),
    "normalised, unlike its class": (one_file, changed(normalizer=NORM.Lowercase()), kind(GPT2), False),
    "digits": (one_file, changed(pre_tokenizer=DIGITS), kind(FILE), True),
    "digits, unlike its class": (one_file, changed(pre_tokenizer=DIGITS), kind(GPT2), False),
    "more tokens": (one_file, with_more_tokens, kind(FILE), True),
    "more tokens beside it": (one_file, None, kind(FILE, pad_token="<pad>", added_tokens_decoder={
        "265": added("<|endoftext|>"), "266": added("<pad>"), "267": added("<extra>", special=False)}), True),
    "a token elsewhere": (one_file, None, kind(FILE, added_tokens_decoder={"300": added("<pad>")}), False),
    "BOS declined": (one_file, changed(post_processor=tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 265)])), kind(FILE, add_bos_token=False), True),
    "NeoX in one file": (one_file, changed(normalizer=NORM.NFC()), kind(NEOX), True),
    "Llama 3": (one_file, None, {**kind("LlamaTokenizerFast"), "config": {"model_type": "llama"}}, True),
    "Llama": (pieces, changed(pre_tokenizer=META), kind("LlamaTokenizer", legacy=False), True),
    "Llama, as once written": (pieces, changed(normalizer=SPACED), kind("LlamaTokenizer"), False),
    "CodeLlama, as once written": (pieces, changed(normalizer=SPACED), kind("CodeLlamaTokenizer"), False),
    "Llama by its file": (pieces, changed(normalizer=SPACED), kind(FILE), True),
    "Gemma": (pieces, changed(normalizer=NORM.Replace(" ", "▁")), kind("GemmaTokenizer"), True),
}  # fmt: skip


def test_folders_are_read_as_transformers_reads_them_or_a_text_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    for name, (make, edit, beside, same) in SETTINGS.items():
        make(tmp_path / name, edit, **beside)
        ours, refusals = find_tokenizer(tmp_path / name), 0
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        except ValueError:
            assert not same, name
        for text in TEXTS:
            try:
                found = ours.made.encode(text)
            except ValueError as error:
                refusals += 1
                assert "write a tokenizer.json" in str(error) or "remove tokenizer_class" in str(error), name
            else:
                assert found == theirs.encode(text, add_special_tokens=False), (name, text)
        assert (refusals == 0) is same, name
        if same:
            assert ours.prompt("Mary") == theirs("Mary").input_ids, name


def test_what_a_text_goes_on_with_is_not_split_like_a_beginning():
    made = with_a_space_before()
    found = PromptPairs.from_text(made, ["a b"], ["b b"], [" a"], [["b", " b"]])
    assert lists(found) == {
        "clean": [[4, 5]],
        "corrupt": [[5, 5]],
        "answers": [[4]],
        "wrong": [[3, 5]],
        "positions": [1],
    }
    assert refused(
        r"the answer of pair 0 must be one token, but 'ab'", PromptPairs.from_text, made, ["a"], None, ["ab"]
    )


# Pairs


def test_pairs_are_made_from_text_by_a_model_or_a_tokenizer(tmp_path):
    folder = save_checkpoint(random_model(), whole(tmp_path / "m", True))
    model = load(folder)
    assert isinstance(model.tokenizer, Tokenizer) and "made" not in vars(model.tokenizer)  # cheap until it is asked for
    args = (["ab a", "b"], ["bb a", "a"], [" a", ["b", "a"]], ["b", " a"])
    expected = {
        "clean": [[4, 0, 1, 3], [4, 1]], "corrupt": [[4, 1, 1, 3], [4, 0]], "answers": [[3], [1, 0]],
        "wrong": [[1], [3]], "positions": [3, 1],
    }  # fmt: skip
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for source in (model, model.tokenizer, theirs, pickle.loads(pickle.dumps(model.tokenizer))):
        pairs = eapcore.PromptPairs.from_text(source, *args, name="t")
        assert (lists(pairs), pairs.name, pairs.details) == (expected, "t", {"bos": "<s>"})
    plain = eapcore.PromptPairs.from_text(model, *args, bos="no", positions=[1, 0])
    assert lists(plain)["clean"] == [[0, 1, 3], [1]] and plain.details == {"bos": "none"}
    assert lists(plain)["positions"] == [1, 0]
    without = eapcore.PromptPairs.from_text(model, ["ab"], answers=["a"])
    assert lists(without)["corrupt"] == [[4, 0, 1]] and lists(without)["wrong"] == [[]]


def test_text_that_makes_no_pairs_is_refused_by_its_pair(tmp_path):
    source = find_tokenizer(whole(tmp_path / "t"))
    good = {"clean": ["a", "ab"], "corrupt": ["b", "bb"], "answers": ["a", "b"], "wrong": ["b", "a"]}
    bad = {
        r"the answer of pair 1 must be one token, but 'ab' is 2 tokens \[0, 1\], 'a' \+ 'b': begin it with a space": {
            "answers": ["a", "ab"]},
        r"the wrong answer of pair 0 must be one token, but ' b' is 2 tokens .*, ' ' \+ 'b': choose another word": {
            "wrong": [["a", " b"], "a"]},
        r"the answer of pair 0 must be one token, but '' is 0 tokens": {"answers": ["", "b"]},
        r"but pair 1 has 2 and 3: behind the first 1, .* clean has 'b', corrupt ' ' \+ 'b'": {"corrupt": ["b", "a b"]},
        r"but pair 1 has 2 and 1: .* clean has 'b', corrupt its end": {"corrupt": ["b", "a"]},
        r"clean must be a list with one entry for each pair, got 'a'": {"clean": "a"},
        r"corrupt must be text, got \[1\]: from_lists takes token ids": {"corrupt": [[1], [2]]},
        r"the answer of pair 0 must be text, got 7": {"answers": [7, "b"]},
        r"every pair needs one entry in each list, got .*'answers': 1": {"answers": ["a"]},
        r"pair 1 has no answer": {"answers": ["a", []]},
        r"bos must be one of auto, yes, no, got True": {"bos": True},
    }  # fmt: skip
    for sentence, changes in bad.items():
        refused(sentence, PromptPairs.from_text, source, **(good | changes))
    refused("random carries no tokenizer: give a tokenizer in its place", PromptPairs.from_text, random_model(), ["a"])
    refused("must be a model that carries a tokenizer, or a tokenizer, got a int", PromptPairs.from_text, 3, ["a"])


def test_toys_read_their_own_words(tmp_path):
    pairs = eapcore.PromptPairs.from_text(
        load("toy-induction"), ["river stone river"], ["river stone cloud"], ["stone"], ["cloud"]
    )
    river, stone, cloud = (toy_induction.VOCAB.index(word) for word in ("river", "stone", "cloud"))
    expected = {"clean": [[river, stone, river]], "corrupt": [[river, stone, cloud]], "positions": [2]}
    assert lists(pairs) == expected | {"answers": [[stone]], "wrong": [[cloud]]}
    model = load("toy-ioi")
    assert model.tokenizer.decode(model.tokenizer("John gave Mary a drink ,")) == "John gave Mary a drink,"
    refused("'zebra', is not among the 180 words of toy-ioi", model.tokenizer.prompt, "zebra")
    refused("names no beginning-of-sequence token", model.tokenizer.with_bos("yes").prompt, "Mary")


def test_a_folder_that_names_a_tokenizer_on_the_hub_has_it_when_it_is_asked_for(tmp_path, monkeypatch):
    folder, cached, asked = save_checkpoint(random_model(), tmp_path / "m"), whole(tmp_path / "cached"), []

    def fetch(repo, file, commit, cache_dir):
        asked.append((repo, file, commit))
        return cached / file if (cached / file).is_file() else None

    monkeypatch.setattr("eapcore.models.checkpoint._fetch", fetch)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tokenizer_name": "someone/words"}))
    tokenizer = load(folder).tokenizer
    assert (tokenizer.at_hand, asked) == (False, [])
    assert tokenizer("ab a") == [0, 1, 3] and asked[0] == ("someone/words", "tokenizer.json", None)
    (cached / "tokenizer.json").unlink()
    assert load(folder).tokenizer("ab a") == [0, 1, 3]
    (cached / "merges.txt").unlink()
    refused("someone/words on the Hub has no tokenizer.json or vocab.json and merges.txt", load(folder).tokenizer, "a")
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).tokenizer is None


# Commands


def test_the_commands_print_what_prompts_begin_with_and_take_it(tmp_path, capsys):
    folder = save_checkpoint(random_model(), whole(tmp_path / "m", True))
    entry = {"clean": "ab a", "corrupt": "bb a", "answer": " a", "wrong": "b"}
    task = tmp_path / "t.jsonl"
    task.write_text(json.dumps(entry))
    kept = {}
    for bos, begins in {"auto": "<s>", "yes": "<s>", "no": "none"}.items():
        out = tmp_path / bos
        argv = ["attribute", "--model", folder, "--task", task, "--bos", bos, "--out", out]
        assert main([*map(str, argv)]) == 0
        assert f"t.jsonl: 1 prompt pairs, bos {begins}; metric logit_diff" in capsys.readouterr().out
        kept[bos] = eapcore.EdgeScores.load(out)
        assert kept[bos].meta["task"]["bos"] == begins
    assert kept["auto"].scores.equal(kept["yes"].scores) and not kept["auto"].scores.equal(kept["no"].scores)
    task.write_text(json.dumps({"clean": [1, 2], "corrupt": [2, 2], "answer": 1, "wrong": 2}))
    assert main(["attribute", "--model", str(folder), "--task", str(task), "--bos", "yes", "--out", str(out)]) == 2
    assert "bos is for prompts as text, but those of t.jsonl are token ids" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").unlink()
    assert main(["run", "--model", str(folder), "--task", str(task), "--bos", "no"]) == 2
    assert "--bos is for prompts as text, but m has no tokenizer here" in capsys.readouterr().err


# Files


def test_text_files_work_with_a_toy_tokenizer(tmp_path):
    entry = {"clean": "river stone river", "corrupt": "river stone cloud", "answer": "stone"}
    (tmp_path / "t.jsonl").write_text(json.dumps(entry))
    pairs = find_pairs(tmp_path / "t.jsonl", n=None, seed=0, encode=toy_induction.encode)
    ids = [toy_induction.VOCAB.index(word) for word in ("river", "stone", "cloud")]
    assert lists(pairs)["clean"] == [[ids[0], ids[1], ids[0]]]
    assert lists(pairs)["corrupt"] == [ids] and lists(pairs)["answers"] == [[ids[1]]]


@needs_gpt2
def test_gpt2_text_is_encoded_as_gpt2_does(tmp_path):
    encode_gpt2 = find_tokenizer(SHARED / "gpt2-tokenizer")
    assert [encode_gpt2(word) for word in (" John", " Mary", " the")] == [[1757], [5335], [262]]
    prompt = "When Mary and John went to the store, John gave a drink to"
    assert encode_gpt2.prompt(prompt) == [2215, 5335, 290, 1757, 1816, 284, 262, 3650, 11, 1757, 2921, 257, 4144, 284]
    corrupt = prompt.replace("John gave", "Mary gave")
    entry = {"clean": prompt, "corrupt": corrupt, "answer": " Mary", "wrong": [" John"]}
    task = tmp_path / "t.jsonl"
    task.write_text(json.dumps(entry))
    pairs = read_pairs(task, encode_gpt2)
    assert (pairs.answers.tolist(), pairs.wrong.tolist()) == ([[5335]], [[1757]])
    task.write_text(json.dumps(entry | {"answer": " Mary Anne"}))
    refused(r"must be one token, but ' Mary Anne' is 2 tokens \[5335, 15397\], ' Mary' \+ ' Anne': choose another word",
        read_pairs, task, encode_gpt2)  # fmt: skip


def test_a_folder_with_vocab_and_merges_or_tokenizer_json_encodes_alike(tmp_path):
    for make in (byte_level, whole):
        assert find_tokenizer(make(tmp_path / make.__name__))("ab a b") == [0, 1, 3, 2, 1]


def test_a_folder_without_a_tokenizer_has_none_and_a_damaged_one_is_refused(tmp_path):
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{not json")
    assert str(tmp_path) in refused(r"the tokenizer files in .* cannot be read", find_tokenizer(tmp_path), "a")
    folder = byte_level(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text("{not json")
    assert refused(r"tokenizer_config.json must be valid JSON", find_tokenizer(folder), "a")


def test_without_the_package_tokenizers_text_gets_a_sentence_that_says_what_to_do(tmp_path, monkeypatch):
    found = find_tokenizer(byte_level(tmp_path))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(r"pip install 'eapcore\[tokenizers\]', or give token ids", found, "a", error=RuntimeError)
