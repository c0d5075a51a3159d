"""Whatever is wrong with the input, one sentence says what was expected and what came, in Python and in a shell."""

from __future__ import annotations

import json
import math

import pytest
import refusal
import torch
from models import random_model, random_pairs, save_checkpoint, with_weights

from eapcore.attribution.attribute import attribute
from eapcore.cli import main
from eapcore.graph.circuit import Circuit
from eapcore.patching.circuits import metric_on
from eapcore.tasks import PromptPairs


@pytest.fixture(scope="module")
def model():
    return random_model(n_heads=2, d_model=16)


@pytest.fixture(scope="module")
def pairs(model):
    return random_pairs(model, [4, 6, 3])


# Tokens


def tokens(*rows):
    return torch.tensor(rows)


TOKENS = {
    "different lengths": ((tokens([1, 2, 3]), tokens([1, 2])),
        r"clean and corrupt must both be tokens \[N, T\], got \[1, 3\] and \[1, 2\]"),
    "different numbers": ((tokens([1, 2], [3, 4]), tokens([1, 3])),
        r"clean and corrupt must both be tokens \[N, T\], got \[2, 2\] and \[1, 2\]"),
    "one dimension": ((torch.tensor([1, 2]), torch.tensor([1, 3])),
        r"must both be tokens \[N, T\], got \[2\] and \[2\]"),
    "not integers": ((torch.zeros(1, 3), torch.ones(1, 3)),
        r"clean must be an int64 tensor \[N, T\].*, got torch.float32 \[1, 3\]"),
    "empty task": ((torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)),
        r"clean prompts must be int64 \[B, T\] with at least one token, got torch.int64 \[0, 3\]"),
    "out of the vocabulary": ((tokens([1, 29]), tokens([1, 2])),
        r"clean prompts have the token id 29, but the vocabulary of random is 0\.\.28: was another .*\(pair 0\)"),
    "negative": ((tokens([1, 2], [1, 2]), tokens([1, 3], [1, -4])),
        r"corrupt prompts have the token id -4, but the vocabulary of random is 0\.\.28.*\(pair 1\)"),
    "longer than the context": ((tokens(range(17)), tokens(range(1, 18))),
        r"clean prompts have 17 positions, but the context of random is 16 \(pair 0\)"),
    "identical": ((tokens([1, 2], [3, 4]), tokens([1, 3], [3, 4])), "clean and corrupt of pair 1 are identical"),
}  # fmt: skip


@pytest.mark.parametrize(("prompts", "message"), TOKENS.values(), ids=TOKENS)
def test_tokens_that_do_not_fit_are_refused(model, prompts, message):
    refusal.refused(message, attribute, model, prompts, lambda logits: logits[:, 0])


@pytest.mark.parametrize("task", ["toy-ioi", None, [1, 2, 3], (tokens([1]),)])
def test_a_task_that_is_none_is_refused(model, task):
    with pytest.raises(ValueError, match=r"task must be PromptPairs or \(clean, corrupt\) tokens, got"):
        attribute(model, task, lambda logits: logits[:, 0])


def test_answers_outside_the_vocabulary_are_refused(model):
    for answers, wrong, what in (([28, 29], [1, 2], "answer"), ([1, 2], [3, 29], "wrong answer")):
        pairs = PromptPairs.from_lists([[1], [2]], [[2], [3]], answers, wrong)
        message = rf"pair 1 has the {what} 29, but the vocabulary of random is 0\.\.28"
        refusal.refused(message, attribute, model, pairs)
        refusal.refused(message, metric_on, model, pairs, "logit_diff", [Circuit(model.graph.edge_mask(), model.graph)])


def test_tokens_without_answers_need_a_metric_that_needs_none(model):
    prompts = (tokens([1, 2], [3, 4]), tokens([1, 3], [3, 5]))
    for metric, what in (("logit_diff", "wrong answers"), ("nll", "answers")):
        refusal.refused(f"the metric {metric} needs {what}, but pair 0 has none", attribute, model, prompts, metric)
    assert attribute(model, prompts, lambda logits: logits[:, 3]).scores.abs().max() > 0


# Options


@pytest.mark.parametrize(("options", "message"), [
    ({"impl": "cuda"}, "impl must be one of auto, reference, triton, cpp, got 'cuda'"),
    ({"metric": "accuracy"}, "metric must be one of logit_diff, prob_diff, logit_margin, nll, kl or a callable, got"),
    *(({"batch_size": size}, f"batch_size must be 'auto' or a positive integer, got {size!r}")
        for size in (0, -2, 1.5, True, "many")),
])  # fmt: skip
def test_an_unknown_option_lists_the_valid_ones(model, pairs, options, message):
    refusal.refused(message, attribute, model, pairs, **options)


def test_an_impl_that_cannot_run_here_says_why(model, pairs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: no GPU is visible to torch"):
        attribute(model, pairs, impl="triton")


# Activations


def damaged(model, name, index, value):
    """The model with one weight replaced."""
    tensor = dict(model.weights.named())[name].clone()
    tensor[index] = value
    return with_weights(model, {name: tensor})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "index", "where"), [
    ("w_e", 1, "the embedding"), ("w_pos", 2, "the embedding"), ("layers.0.ln1.0", 3, "the attention of layer 0"),
    ("layers.0.w_qkv.0", 5, "the attention of layer 0"), ("layers.1.w_qkv.0", 5, "the attention of layer 1"),
    ("layers.0.b_o", 0, "the attention of layer 0"), ("layers.1.w_o", 0, "the attention of layer 1"),
    ("layers.0.w_in", 4, "the MLP of layer 0"), ("layers.1.b_out", 4, "the MLP of layer 1"),
    ("ln_final.0", 4, "the logits"), ("w_u", 4, "the logits"),
])  # fmt: skip
def test_activations_that_are_not_finite_name_the_layer_and_the_pair(model, name, index, where, value):
    pairs = PromptPairs.from_lists([[3, 5], [1, 2, 4]], [[3, 6], [1, 2, 5]], [1, 2], [3, 4])
    pair = 1 if name in ("w_e", "w_pos") else 0  # only the second pair has the token 1 and a position 2
    with pytest.raises(ValueError, match=f"{where} has NaN or infinite activations on pair {pair}"):
        attribute(damaged(model, name, index, value), pairs)


def test_activations_that_are_not_finite_in_the_corrupt_run_alone_are_found(model):
    pairs = PromptPairs.from_lists([[3, 5], [1, 2]], [[3, 6], [1, 7]], [1, 2], [3, 4])
    with pytest.raises(ValueError, match="the embedding has NaN or infinite activations on pair 1"):
        attribute(damaged(model, "w_e", 7, math.nan), pairs)


def test_activations_too_large_for_the_dtype_say_so():
    model = random_model(dtype=torch.float16)
    model = with_weights(model, {"layers.1.w_in": dict(model.weights.named())["layers.1.w_in"] * 2e4})
    with pytest.raises(ValueError, match=r"the MLP of layer 1 has NaN .* or is torch.float16 too narrow for it"):
        attribute(model, random_pairs(model, [4, 6]))


# The command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = random_model(n_heads=2, d_model=16, dtype=torch.float32)
    return save_checkpoint(model, tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch, checkpoint):
    """Run a command that must end with status 2, one line on stderr, no output and no file; returns the line."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, command="run", model=True, task=True):
        argv = [command, *map(str, argv)]
        argv += ["--model", str(checkpoint)] if model else []
        argv += ["--task", "sort"] if task else []
        before = sorted(tmp_path.rglob("*"))
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.endswith("\n") and len(err.splitlines()) == 1
        assert "Traceback" not in err and err.startswith("eapcore")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


OPTIONS = {
    "--n 0": "argument --n-pairs/--n: must be an integer of at least 1, got '0'",
    "--n -1": "argument --n-pairs/--n: must be an integer of at least 1, got '-1'",
    "--n many": "argument --n-pairs/--n: must be an integer of at least 1, got 'many'",
    "--batch-size 0": "argument --batch-size: must be auto or an integer of at least 1, got '0'",
    "--batch-size -4": "argument --batch-size: must be auto or an integer of at least 1, got '-4'",
    "--batch-size big": "argument --batch-size: must be auto or an integer of at least 1, got 'big'",
    "--top-n -1": "argument --top-n: must be an integer of at least 0, got '-1'",
    "--top-n 47": "--top-n must be at most the 46 edges of small, got 47",
    "--threshold nan": "argument --threshold: must be a finite number, got 'nan'",
    "--threshold inf": "argument --threshold: must be a finite number, got 'inf'",
    "--threshold high": "argument --threshold: must be a finite number, got 'high'",
    "--top-n 3 --threshold 0.1": "argument --threshold: not allowed with argument --top-n",
    "--seed one": "argument --seed: must be an integer, got 'one'",
    "--metric accuracy": "metric must be one of logit_diff, prob_diff, logit_margin, nll, kl",
    "--method guess": "method must be one of eap",
    "--impl cuda": "impl must be one of auto, reference, triton, cpp, got 'cuda'",
    "--dtype int8": "dtype must be one of float64, float32, bfloat16, float16, got 'int8'",
    "--device abacus": "device 'abacus' cannot be used here",
    "--metric kl --method eap": "the gradient of the metric kl is zero on every pair",
    "--colour red": "unrecognized arguments: --colour red",
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.items(), ids=OPTIONS)
@pytest.mark.parametrize("command", ["run", "attribute"])
def test_a_bad_option_ends_with_status_2_and_one_line(refused, command, options, message):
    assert message in refused(*options.split(), command=command)


def test_a_bad_number_of_edges_to_show_is_refused(refused):
    assert "argument --show: must be an integer of at least 0, got '-1'" in refused("--show", "-1")


@pytest.mark.parametrize("option", ["--batch-size", "--tokens"])
def test_info_refuses_bad_numbers(refused, option):
    line = refused(option, "0", command="info", model=False, task=False)
    assert f"argument {option}: must be an integer of at least 1, got '0'" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(refused):
    assert "device 'cuda' cannot be used here" in refused("--device", "cuda")


def test_no_command_and_an_unknown_one_list_the_commands(refused, capsys):
    for argv in ([], ["score"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and len(err.splitlines()) == 1
        assert all(command in err for command in ("run", "attribute", "info"))


def test_an_unknown_model_is_refused_by_name(refused, tmp_path):
    assert str(tmp_path / "nothing") in refused("--model", tmp_path / "nothing", model=False)
    assert "no-such-owner/no-such-model" in refused("--model", "no-such-owner/no-such-model", model=False)
    line = refused("no-such-owner/no-such-model", command="info", model=False, task=False)
    assert "no-such-owner/no-such-model" in line


def test_an_unknown_task_and_a_missing_one_list_the_valid_ones(refused, tmp_path):
    for argv in (["--task", "iio"], ["--task", tmp_path / "nothing.jsonl"], []):
        line = refused(*argv, task=False)
        assert "one of toy-ioi, toy-induction, sort" in line and ".csv, .tsv or .parquet file" in line


GOOD_LINE = {"clean": [1, 2, 3], "corrupt": [1, 4, 3], "answer": 5, "wrong": 6}
FILES = {
    "different lengths": ([GOOD_LINE, GOOD_LINE | {"corrupt": [1, 4]}],
        "the same number of tokens, but line 2 of task.jsonl has 3 and 2"),
    "out of the vocabulary": ([GOOD_LINE | {"clean": [1, 2, 29]}],
        "the token id 29, but the vocabulary of small is 0..28"),
    "longer than the context": ([GOOD_LINE | {"clean": [1] * 17, "corrupt": [2] * 17}],
        "17 positions, but the context of small is 16"),
    "empty": ([], "the task 'task.jsonl' is empty"),
    "identical": ([GOOD_LINE, GOOD_LINE | {"corrupt": [1, 2, 3]}],
        "clean and corrupt of pair 1 of task.jsonl are identical"),
    "an answer of several ids": ([GOOD_LINE | {"answer": [[1, 2]]}], "the answer of line 1 of task.jsonl must be text"),
    "text without a tokenizer": ([GOOD_LINE | {"answer": "Mary"}], "this model has no tokenizer here: give token ids"),
    "an answer out of the vocabulary": ([GOOD_LINE | {"answer": 29}], "the vocabulary of small is 0..28"),
    "no wrong answers": ([GOOD_LINE, GOOD_LINE | {"wrong": []}],
        "needs wrong answers, but pair 1 of task.jsonl has none"),
    "not an object": ([GOOD_LINE, [1, 2]], "line 2 of task.jsonl is not a JSON object"),
    "no answer": ([{"clean": [1], "corrupt": [2]}], "line 1 of task.jsonl has no answer"),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "message"), FILES.values(), ids=FILES)
def test_a_task_file_that_does_not_fit_is_refused(refused, tmp_path, entries, message):
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert message in refused("--task", tmp_path / "task.jsonl", task=False)


def test_an_answer_of_several_tokens_is_refused_by_its_line(refused, tmp_path, checkpoint):
    pytest.importorskip("tokenizers")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "Ġ": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "task.jsonl").write_text(json.dumps({"clean": "a b", "corrupt": "b b", "answer": "ab", "wrong": "b"}))
    line = refused("--task", tmp_path / "task.jsonl", "--tokenizer", folder, task=False)
    assert "the answer of line 1 of task.jsonl must be one token, but 'ab' is 2 tokens [0, 1]" in line
    line = refused("--task", tmp_path / "task.jsonl", "--tokenizer", tmp_path / "nothing", task=False)
    assert "--tokenizer must be a folder with tokenizer.json or vocab.json and merges.txt" in line


def test_malformed_and_foreign_task_files_are_refused(refused, tmp_path):
    (tmp_path / "task.jsonl").write_text('{"clean": [1, 2')
    assert "line 1 of task.jsonl is not JSON" in refused("--task", tmp_path / "task.jsonl", task=False)
    (tmp_path / "task.csv").write_text("a,b\n1,2\n")
    assert "task.csv has fields that nothing reads: 'a', 'b'; its fields are a, b" in refused(
        "--task", tmp_path / "task.csv", task=False
    )
    (tmp_path / "task.txt").write_text("Mary")
    assert "must end in .jsonl, .json, .csv, .tsv or .parquet, got 'task.txt'" in refused(
        "--task", tmp_path / "task.txt", task=False
    )


def test_damaged_weights_name_the_layer(refused, tmp_path):
    model = damaged(random_model(n_heads=2, d_model=16, dtype=torch.float32), "layers.1.w_in", 3, math.nan)
    folder = save_checkpoint(model, tmp_path / "damaged")
    line = refused("--model", folder, "--n", "3", model=False)
    assert "the MLP of layer 1 has NaN or infinite activations on pair 0" in line


@pytest.mark.parametrize("command", ["run", "attribute"])
def test_an_output_folder_that_cannot_be_written_to_is_refused_before_the_work(refused, tmp_path, monkeypatch, command):
    monkeypatch.setattr("eapcore.models.load.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("in the way")
    line = refused("--out", tmp_path / "file" / "below", command=command)
    assert f"cannot be written: {tmp_path / 'file'} is a file; choose another place" in line
    monkeypatch.setattr("os.access", lambda path, mode: False)
    line = refused("--out", tmp_path / "closed", command=command)
    assert f"cannot be written: nothing can be written in the folder {tmp_path}; choose another place" in line


def test_a_folder_in_the_place_of_the_score_file_is_refused(refused, tmp_path):
    line = refused("--out", tmp_path, command="attribute")
    assert f"--out: {tmp_path} cannot be written: it is a folder; choose another place" in line


def test_a_device_in_the_place_of_the_score_file_is_refused_before_the_work(refused, monkeypatch):
    monkeypatch.setattr("eapcore.models.load.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    line = refused("--out", "/dev/null", command="attribute")
    assert "--out: /dev/null cannot be written: it is no regular file; choose another place" in line


def test_a_disk_that_fills_up_while_writing_is_one_line(refused, tmp_path, monkeypatch):
    def full(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "No space left on device" in refused("--n", "3", "--out", tmp_path / "s", command="attribute")


def test_debug_shows_the_traceback_of_bad_input(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="task must be one of"):
        main(["run", "--model", str(checkpoint), "--task", "iio", "--out", str(tmp_path), "--debug"])


def test_an_error_of_our_own_is_told_from_bad_input(checkpoint, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise KeyError("a bug\nin two lines")

    monkeypatch.setattr("eapcore.tasks.find_pairs", broken)
    argv = ["run", "--model", str(checkpoint), "--task", "sort", "--out", str(tmp_path)]
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eapcore: internal error, KeyError: ") and "--debug shows where" in line
    with pytest.raises(KeyError):
        main([*argv, "--debug"])
