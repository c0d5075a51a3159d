"""The toy models: what they claim, what they were trained on, how they are trained, and that they have circuits."""

from __future__ import annotations

import json
import random

import pytest
import torch
from refusal import refused

import eapcore.toys as toy
from eapcore.attribution.attribute import attribute
from eapcore.graph.circuit import Circuit
from eapcore.models.load import load
from eapcore.patching.circuits import run_circuit
from eapcore.tasks import toy_induction, toy_ioi
from eapcore.toys import train

TASKS = {"ioi": toy_ioi, "induction": toy_induction}
NAMED = 3  # how many heads are removed
both = pytest.mark.parametrize("name", toy.NAMES)


@pytest.fixture(scope="module")
def models():
    return {name: load(f"toy-{name}") for name in toy.NAMES}


def settings(name):
    return json.loads((toy.folder(name) / "config.json").read_text(encoding="utf-8"))


def prompts(tokens, lengths):
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


# What is stored


@both
def test_the_recorded_accuracy_is_the_measured_one(models, name):
    about = settings(name)["eapcore"]
    held_out = TASKS[name].generate(about["held_out_prompts"], about["held_out_seed"])
    assert about["held_out_accuracy"] >= 0.99
    # One prompt of slack: a near tie may fall otherwise with another machine's matrix products.
    assert abs(train.accuracy(models[name], held_out) - about["held_out_accuracy"]) <= 1.5 / len(held_out)


@both
def test_the_recorded_command_is_the_recipe(name):
    about, recipe = settings(name)["eapcore"], train.RECIPES[name]
    assert about["command"] == f"python -m eapcore.toys.train {name} --seed {about['seed']} --steps {about['steps']}"
    assert about["steps"] == recipe.steps
    assert {key: value for key, value in settings(name).items() if key != "eapcore"} == recipe.raw
    assert about["versions"].keys() == {"python", "torch"}


@both
def test_the_stored_vocabulary_is_the_tasks(models, name):
    words = json.loads((toy.folder(name) / "vocab.json").read_text(encoding="utf-8"))
    assert tuple(words) == TASKS[name].VOCAB
    assert list(words.values()) == list(range(models[name].config.d_vocab))


def test_the_stored_models_are_small_and_float32(models):
    files = [path for name in toy.NAMES for path in toy.folder(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 6e6
    assert {tensor.dtype for model in models.values() for _, tensor in model.weights.named()} == {torch.float32}
    assert [models[name].config.attn_only for name in toy.NAMES] == [False, True]


def test_an_unknown_toy_is_refused():
    refused("one of ioi, induction, got 'sorting'", toy.folder, "sorting")
    refused("one of ioi, induction, got 'sorting'", train.train, "sorting")
    refused("steps must be at least 1, got 0", train.train, "ioi", steps=0)


# The prompts


@both
def test_prompts_depend_on_the_seed_alone(name):
    generate = TASKS[name].generate
    first = generate(50, 3)
    random.seed(5)
    torch.manual_seed(5)
    again, other = generate(50, 3), generate(50, 4)
    assert torch.equal(first.clean, again.clean) and torch.equal(first.corrupt, again.corrupt)
    assert not torch.equal(first.clean[:, :12], other.clean[:, :12])
    assert (first.seed, first.name, first.vocab) == (3, f"toy-{name}", TASKS[name].VOCAB)
    states = random.getstate(), torch.get_rng_state()
    generate(50, 3)
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())


@both
def test_text_and_ids_are_each_others_inverse(name):
    task = TASKS[name]
    pairs = task.generate(100, 6)
    for prompt in prompts(pairs.clean, pairs.lengths):
        assert task.encode(task.decode(prompt)) == prompt
    refused(r"word 1 .*'zebrafish', is not among the \d+ words of toy-", task.encode, f"{task.VOCAB[1]} zebrafish")
    refused(r"token id 999 is outside the vocabulary of toy-", task.decode, [999])


@both
def test_a_bad_split_or_number_is_refused(name):
    refused("split must be one of train, test, got 'validation'", TASKS[name].generate, 3, 0, split="validation")
    refused("n must be at least 1, got 0", TASKS[name].generate, 0, 0)


def test_ioi_prompts_repeat_one_name_and_ask_for_the_other():
    pairs = toy_ioi.generate(400, 8)
    orders = set()
    for i, (clean, corrupt) in enumerate(
        zip(*(prompts(p, pairs.lengths) for p in (pairs.clean, pairs.corrupt)), strict=True)
    ):
        words, others = ([toy_ioi.VOCAB[token] for token in prompt] for prompt in (clean, corrupt))
        names = [word for word in words if word in toy_ioi.NAMES]
        answer, wrong = (toy_ioi.VOCAB[int(ids[i, 0])] for ids in (pairs.answers, pairs.wrong))
        assert sorted(names) == sorted([answer, wrong, wrong])
        orders.add(tuple("IO" if word == answer else "S" for word in names))
        replaced = [word for word in others if word in toy_ioi.NAMES]
        assert len(set(replaced)) == 3 and not set(replaced) & set(names)
        assert [w for w in words if w not in names] == [w for w in others if w not in replaced]
    assert orders == {("IO", "S", "S"), ("S", "IO", "S"), ("S", "S", "IO")}
    assert len(pairs.lengths.unique()) > 3


def test_ioi_knows_the_papers_example():
    assert toy_ioi.decode(toy_ioi.encode("When Mary and John went to the store, John gave a drink to")).endswith(
        "drink to"
    )


def test_induction_prompts_differ_in_what_follows_the_earlier_word():
    pairs = toy_induction.generate(400, 8)
    for i, (clean, corrupt) in enumerate(
        zip(*(prompts(p, pairs.lengths) for p in (pairs.clean, pairs.corrupt)), strict=True)
    ):
        answer, wrong = int(pairs.answers[i, 0]), int(pairs.wrong[i, 0])
        for prompt, follows in ((clean, answer), (corrupt, wrong)):
            assert len(set(prompt)) == len(prompt) - 1
            assert prompt[prompt.index(prompt[-1]) + 1] == follows
        assert sorted(clean) == sorted(corrupt) and sum(a != b for a, b in zip(clean, corrupt, strict=True)) == 2


def test_held_out_pairs_are_never_trained_on():
    test, trained = (toy_ioi.generate(n, 9, split=split) for n, split in ((400, "test"), (8000, "train")))
    seen, held_out = ({frozenset(p) for p in torch.cat([s.answers, s.wrong], 1).tolist()} for s in (trained, test))
    assert len(held_out) > 200 and len(seen) > 2500 and not seen & held_out
    test, trained = (toy_induction.generate(n, 9, split=split) for n, split in ((400, "test"), (8000, "train")))
    last = [[(int(s.clean[i, s.positions[i]]), int(s.answers[i, 0])) for i in range(len(s))] for s in (trained, test)]
    assert len(set(last[1])) > 150 and len(set(last[0])) > 1200 and not set(last[0]) & set(last[1])


# Training


@both
def test_training_lowers_the_loss_and_repeats_bit_for_bit(name):
    first, again = (train.train(name, steps=10) for _ in range(2))
    assert sum(first.losses[-3:]) < 0.95 * sum(first.losses[:3])
    assert first.losses == again.losses
    assert all(torch.equal(first.params[key], again.params[key]) for key in first.params)
    assert train.train(name, seed=1, steps=1).losses != first.losses[:1]


def test_the_command_writes_a_model_that_loads(tmp_path, capsys):
    assert train.main(["induction", "--out", str(tmp_path / "new"), "--steps", "2", "--seed", "3"]) == 0
    assert "held-out accuracy 0." in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.json",
    ]
    about = json.loads((tmp_path / "new" / "config.json").read_text())["eapcore"]
    assert about["command"].endswith("train induction --seed 3 --steps 2")
    loaded = load(tmp_path / "new")
    trained = train.train("induction", seed=3, steps=2).model
    assert loaded.content_hash == trained.content_hash


def test_a_bad_command_ends_in_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(["ioi", "--steps", "0", "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "python -m eapcore.toys.train: steps must be at least 1, got 0\n"
    assert train.main(["ioi", "--steps", "1", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.count("\n") == 1


# The circuits


def ranked_heads(model, scores):
    """The heads as senders, from the largest sum of |score| over their outgoing edges to the smallest."""
    heads = torch.tensor([i for i, sender in enumerate(model.graph.sender_names) if ".h" in sender])
    order = scores.scores.abs().sum(1)[heads].argsort(descending=True)
    return heads[order].tolist()


def accuracies_without(model, pairs, removed, **ablation):
    """The accuracy without each of these sets of heads."""
    circuits = []
    for heads in removed:
        mask = model.graph.edge_mask()
        mask[heads] = False
        circuits.append(Circuit(mask, model.graph))
    logits = run_circuit(model, pairs, circuits, **ablation)  # [C, B, V]
    return (logits.argmax(-1) == pairs.answers[:, 0]).double().mean(1)


@both
def test_the_behaviour_hangs_on_the_heads_that_the_scores_name(models, name):
    model, generate = models[name], TASKS[name].generate
    heads = ranked_heads(model, attribute(model, generate(64, 41)))  # other prompts than those it is judged on
    pairs, named, others = generate(64, 42), heads[:NAMED], heads[NAMED:]
    draws = [random.Random(i).sample(others, NAMED) for i in range(4)]
    whole, without_named, without_least, *without_drawn = accuracies_without(
        model, pairs, [[], named, heads[-NAMED:], *draws]
    )
    assert whole >= 0.99
    assert without_named <= 0.3
    assert without_least >= 0.97
    assert torch.stack(without_drawn).mean() >= 0.75  # other heads that take part among them
    mean = {"ablation": "mean-positional", "reference": generate(256, 43)}
    assert accuracies_without(model, pairs, [named], **mean)[0] <= 0.5


def test_induction_composes_across_layers(models):
    model = models["induction"]
    scores = attribute(model, toy_induction.generate(64, 44))
    between = [(edge, score) for edge, score in scores.top(60) if edge.startswith("a0") and "->a1" in edge]
    assert between[0][0].endswith("<k>") and between[0][1] < 0
