"""train_distill.py for real steps, with numbers: cells, invariances, seams, resume, mistakes."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from conftest import SHORT, STOPS, same, saved, steps_of, weights, without_times
from safetensors.torch import load_file, save_file
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint as run_again_in_backward
from transformers import AutoModelForCausalLM, AutoTokenizer

import grade
import train_distill
import utils
from data.problems import deal, encode_prompt, load_problems
from engine import HFEngine, Sampling
from kernels import linear_kl
from models import lm_head, load_model, response_hidden
from utils import UserError, log_evaluation, read_lines, write_lines

OPD = "configs/toy_opd.py"
EVALUATED = ("--eval_every=2", "--eval_prompts=4", "--eval_samples=2", "--eval_max_new_tokens=24",
             "--eval_teacher=False")


def losses(rows):
    return [row["loss"] for row in steps_of(rows)]


def logged_steps(rows):
    return [row["step"] for row in steps_of(rows)]


def response_logps(model, prompt, response):
    """Log-probs (n,) of the response tokens, from one plain forward."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1, :272]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)


# ------------------------------------------------------------------------------------------- cells

@pytest.mark.parametrize("name, prefix, lam", [
    ("toy_sft", "teacher", 0.0), ("toy_offline", "teacher", 1.0), ("toy_dagger", "student", 0.0),
    ("toy_opd", "student", 1.0), ("toy_mix", "student", 0.2)])
def test_cells(train, name, prefix, lam):
    """
    Each corner trains on its own prefixes and direction: its loss is
    lam reverse KL + (1 - lam) forward KL on the same tokens.
    """
    rows, run = train(f"configs/{name}.py", "--max_steps=2", "--trajectories=None")
    config = json.loads((run / "run_config.json").read_text())
    assert (config["prefix"], config["reverse_weight"]) == (prefix, lam)
    assert logged_steps(rows) == [1, 2]
    for row in steps_of(rows):
        expected = lam * row["reverse_kl"] + (1 - lam) * row["forward_kl"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert 0.01 < row["forward_kl"] < 2 and 0.01 < row["reverse_kl"] < 2
        assert row["student_entropy"] > row["teacher_entropy"] > 0.05
        assert row["max_length"] <= 24


def test_prefixes_are_of_the_model_that_is_named(train, monkeypatch, teacher, student):
    """Who wrote the responses gives them the higher log-probs."""
    written = []

    def spy(model, sequences, dtype):
        if torch.is_grad_enabled():  # the student's forward for the loss
            written.extend(sequences)
        return response_hidden(model, sequences, dtype)

    def advantage_of_teacher(config):
        written.clear()
        train(config, "--max_steps=1", "--batch_size=32", "--max_new_tokens=64",
              "--trajectories=None")
        assert len(written) == 32
        difference = 0.0
        with torch.no_grad():
            for prompt, response, *_ in written:
                difference += response_logps(teacher, prompt, response).sum().item()
                difference -= response_logps(student, prompt, response).sum().item()
        return difference

    monkeypatch.setattr(train_distill, "response_hidden", spy)
    assert advantage_of_teacher("configs/toy_sft.py") > 0 > advantage_of_teacher(OPD)


def test_held_out_kl(train, student, teacher, tokenizer):
    """eval_kl: both KLs on the responses that the evaluation has saved, recomputed in fp64."""
    options = ("--max_steps=0", "--eval_every=1", "--eval_prompts=3", "--eval_samples=2",
               "--eval_max_new_tokens=20", "--eval_kl")
    rows, out = train(OPD, *options)
    held_out = load_problems("data/toy/middle.jsonl")
    total, tokens = torch.zeros(2, dtype=torch.float64), 0
    for record in read_lines(out / "samples_student_000000.jsonl"):
        prompt = encode_prompt(tokenizer, held_out[record["index"]]["problem"])
        ids, n = torch.tensor([prompt + record["tokens"]]), len(record["tokens"])
        log_q, log_p = (model.double()(ids).logits[0, -n - 1:-1, :272].log_softmax(-1)
                        for model in (student, teacher))
        total[0] += (log_p.exp() * (log_p - log_q)).sum()
        total[1] += (log_q.exp() * (log_q - log_p)).sum()
        tokens += n
    expected = (total / tokens).tolist()
    assert [rows[-1]["forward_kl"], rows[-1]["reverse_kl"]] == pytest.approx(expected, rel=1e-5)
    assert "forward_kl" not in train(OPD, *options[:-1])[0][-1]


def test_hard_labels(train, student, tokenizer):
    """
    teacher=None: cross-entropy on the file's solutions. Loss and gradient are recomputed here from
    logits.
    """
    rows, _ = train("configs/toy_hard_sft.py", "--max_steps=1", "--max_new_tokens=200",
                    "--trajectories=None")
    problems, parts = load_problems("data/toy/train.jsonl"), []
    for _, i, _ in deal(3000, 0, 8, seed=42):
        prompt = encode_prompt(tokenizer, problems[i]["problem"])
        solution = tokenizer.encode(problems[i]["solution"], add_special_tokens=False)
        parts.append(response_logps(student, prompt, [*solution, STOPS[0]]))
    logps = torch.cat(parts)
    (-logps.mean()).backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    assert rows[0]["loss"] == pytest.approx(-logps.mean().item(), abs=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(get_total_norm(gradients).item(), rel=1e-4)
    assert rows[0]["tokens"] == len(logps)


def test_loss_does_not_depend_on_microbatches(train):
    """Sums over 8 micro-batches, some of them, or one: the same losses, gradients and weights."""
    options = ("--max_steps=3", "--max_new_tokens=96")
    first_rows, first = train(OPD, *options, "--max_tokens_per_microbatch=40")
    for budget in (200, 9999):
        rows, run = train(OPD, *options, f"--max_tokens_per_microbatch={budget}")
        assert losses(rows) == pytest.approx(losses(first_rows), abs=1e-6)
        for row, other in zip(steps_of(rows), steps_of(first_rows), strict=True):
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert same(weights(run / "last"), weights(first / "last"), 2e-6)


def test_bf16_compute(train):
    """
    bf16 compute over fp32 masters: the same step within bf16's rounding, and weights that are not
    bf16 numbers.
    """
    options = ("--max_steps=2", "--trajectories=None", "--learning_rate=1e-5")
    exact, _ = train("configs/toy_sft.py", *options)
    rounded, run = train("configs/toy_sft.py", "--dtype=bfloat16", *options)
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.15)
    assert rounded[0]["loss"] != exact[0]["loss"]
    tensors = weights(run / "last").values()
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in tensors)


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_loss_norm(train, monkeypatch, norm):
    """"token": a mean over the step's tokens. "sequence": a mean of the means of sequences."""
    parts = []  # reverse KL of each response

    def spy(h_q, W_q, h_p, W_p, weight, lam):
        loss, forward, reverse, *entropies = linear_kl(h_q, W_q, h_p, W_p, weight, lam)
        parts.extend(reverse.split(lengths.pop(0)))
        return loss, forward, reverse, *entropies

    def spy_on_lengths(model, sequences, dtype):
        if torch.is_grad_enabled():  # the student's forward, not the teacher's
            lengths.append([len(response.tokens) for response in sequences])
        return response_hidden(model, sequences, dtype)

    lengths = []
    monkeypatch.setattr(train_distill, "linear_kl", spy)
    monkeypatch.setattr(train_distill, "response_hidden", spy_on_lengths)
    rows, _ = train(OPD, "--max_steps=1", "--max_new_tokens=64", f"--loss_norm={norm}")
    assert len(parts) == 8 and len({len(part) for part in parts}) > 1
    expected = torch.cat(parts).mean()
    if norm == "sequence":
        expected = torch.stack([part.mean() for part in parts]).mean()
    assert rows[0]["loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_learns(train, student, teacher, prompts):
    """
    20 steps of on-policy distillation: reverse KL on held-out student rollouts falls by 12 % at
    least (18 % was seen).
    """
    def held_out_reverse_kl(model):
        engine = HFEngine(model, vocab_size=272)
        rollouts = engine.generate(prompts, Sampling(48, STOPS), list(range(len(prompts))))
        batch = [(prompt, tokens) for prompt, (tokens, _, _) in zip(prompts, rollouts)]
        with torch.no_grad():
            h_q, h_p = response_hidden(model, batch), response_hidden(teacher, batch)
            weight = torch.full((len(h_q),), 1 / len(h_q))
            return linear_kl(h_q, lm_head(model), h_p, lm_head(teacher), weight, 1.0)[0].item()

    _, run = train(OPD, "--max_steps=20", "--batch_size=32", "--max_new_tokens=48",
                   "--warmup_steps=2", "--learning_rate=6e-4")
    before = held_out_reverse_kl(student)
    after = held_out_reverse_kl(load_model(str(run / "last"), torch.float32))
    assert after < 0.88 * before, (before, after)


def test_real_problems(train, tmp_path):
    """GSM8K's format, byte by byte: toy models cannot solve it, and the pipeline does not care."""
    path = tmp_path / "gsm8k.jsonl"
    write_lines(path, [
        {"question": f"Ann has {i} pens — “blue” ones, and buys {i} more. How many pens?",
         "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i} pens\n#### {2 * i}"} for i in range(9)])
    rows, _ = train(OPD, f"--prompts={path}", f"--eval_data={path}", "--max_steps=2", *EVALUATED)
    assert len(steps_of(rows)) == 2 and min(losses(rows)) > 0
    rows, _ = train("configs/toy_hard_sft.py", f"--prompts={path}", "--max_steps=1",
                    "--max_new_tokens=100", "--trajectories=None")
    assert rows[0]["tokens"] > 8 * 20


# ------------------------------------------------------------------- a step, and what can go wrong

def test_keys_reach_the_sampler(train, monkeypatch):
    """
    Every sampling key arrives; stop="student" drops the teacher's stop id, but not for what the
    teacher itself writes.
    """
    calls, generate = [], HFEngine.generate

    def spy(engine, prompts, sampling, seeds):
        calls.append((engine.max_rows, engine.vocab_size, sampling))
        return generate(engine, prompts, sampling, seeds)

    monkeypatch.setattr(HFEngine, "generate", spy)
    options = ("--max_steps=1", "--temperature=0.9", "--top_p=0.8", "--top_k=7", "--stop=student",
               "--rollout_rows=5", "--eval_every=1", "--eval_prompts=2", "--eval_samples=1",
               "--eval_max_new_tokens=9", "--eval_temperature=0.5", "--eval_top_p=0.7")
    train(OPD, *options)
    teacher, before, step, after = calls
    assert step == (5, 272, Sampling(24, [257], 0.9, 0.8, 7))
    assert before == after == (5, 272, Sampling(9, [257], 0.5, 0.7, 0))
    assert teacher == (5, 272, Sampling(9, [257, 260], 0.5, 0.7, 0))
    calls.clear()
    train("configs/toy_sft.py", *options, "--eval_every=0", "--trajectories=None")
    assert calls == [(5, 272, Sampling(24, [257, 260], 0.9, 0.8, 7))]


def test_warmup_and_sync(train, monkeypatch):
    """
    The learning rate rises linearly, then stays; before every rollout the engine's bf16 copy equals
    the masters of that step.
    """
    gaps, generate = [], HFEngine.generate

    def spy(engine, *args):
        pairs = zip(engine.decoder.parameters(), engine.model.parameters())
        gaps.append(max((copy - master.bfloat16()).abs().max().item() for copy, master in pairs))
        return generate(engine, *args)

    monkeypatch.setattr(HFEngine, "generate", spy)
    rows, _ = train(OPD, "--max_steps=4", "--dtype=bfloat16", "--warmup_steps=3",
                    "--learning_rate=3e-3")
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])
    assert gaps == [0.0] * 4


def test_step_without_a_token(train, monkeypatch):
    """Nothing to learn from: logged, no update, not even of AdamW's moments."""
    def silent(engine, prompts, sampling, seeds):
        return [([], [], "length") for _ in prompts]

    monkeypatch.setattr(HFEngine, "generate", silent)
    rows, run = train(OPD, "--max_steps=2")
    assert [(row["loss"], row["tokens"], row["grad_norm"]) for row in rows] == [(0, 0, 0)] * 2
    start = load_file("data/toy/student/model.safetensors")
    assert same(saved(run / "last"), {name: start[name].float() for name in start})


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_stops(train, monkeypatch, tmp_path, where):
    """
    A NaN in step 3: the step is named, and the checkpoint of step 2 still loads and goes on.
    """
    calls = []

    def broken(*args):
        loss, *stats = linear_kl(*args)
        calls.append(1)
        if len(calls) == 3:
            if where == "loss":
                loss = loss * math.nan
            else:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, *stats

    out = tmp_path / "run"
    options = (OPD, "--max_steps=4", "--save_every=2", "--max_tokens_per_microbatch=9999")
    message = {"loss": "step 3: loss nan, gradient norm nan: not finite, so no update was made",
               "gradient": r"step 3: loss 0\.\d+, gradient norm (nan|inf): not finite"}[where]
    with monkeypatch.context() as patched:
        patched.setattr(train_distill, "linear_kl", broken)
        with pytest.raises(UserError, match=message):
            train(*options, out=out)
    rows, _ = train(*options, "--resume", out=out)
    assert logged_steps(rows) == [1, 2, 3, 4] and min(losses(rows)) > 0


# ------------------------------------------------------------------- what somebody who copies edits

def own_kl(h_q, W_q, h_p, W_p, weight, lam):
    """`linear_kl` without a kernel: 32 tokens at a time, whose logits the backward makes again."""
    def kls(h_q, h_p):
        words = min(len(W_q), len(W_p))
        log_q = (h_q @ W_q[:words].T).log_softmax(-1)
        log_p = (h_p @ W_p[:words].T).log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        parts = p * (log_p - log_q), q * (log_q - log_p), -q * log_q, -p * log_p
        return torch.stack([part.sum(-1) for part in parts])

    chunks = [run_again_in_backward(kls, *pair, use_reentrant=False)
              for pair in zip(h_q.split(32), h_p.split(32))]
    forward, reverse, *entropies = torch.cat(chunks, 1)
    loss = (weight * (lam * reverse + (1 - lam) * forward)).sum()
    return loss, forward.detach(), reverse.detach(), *(part.detach() for part in entropies)


def test_own_divergence(train, monkeypatch):
    """One function of plain autograd in the place of `linear_kl`: the same run to 1e-5."""
    options = ("configs/toy_mix.py", "--max_steps=3", "--max_new_tokens=64", "--warmup_steps=0")
    rows, run = train(*options)
    monkeypatch.setattr(train_distill, "linear_kl", own_kl)
    own_rows, own_run = train(*options)
    assert losses(own_rows) == pytest.approx(losses(rows), abs=1e-5)
    assert losses(own_rows) != losses(rows)  # so it was called
    for key in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "grad_norm"):
        for row, own_row in zip(rows, own_rows, strict=True):
            assert own_row[key] == pytest.approx(row[key], rel=1e-4), key
    assert same(weights(own_run / "last"), weights(run / "last"), 1e-5)


def test_a_prefix_source_without_its_branch(train, monkeypatch):
    """A third name for `prefix` alone is an error, and no silent run on the teacher's prefixes."""
    class Config(train_distill.Config):
        prefix: Literal["teacher", "student", "mixed"] = "student"

    monkeypatch.setattr(train_distill, "Config", Config)
    with pytest.raises(KeyError, match="mixed"):
        train(OPD, "--prefix=mixed", "--max_steps=1")


def test_a_copied_script_has_its_own_name(train, tmp_path, monkeypatch):
    """A copy does not go on from the original's checkpoints, nor the other way round."""
    path = tmp_path / "my_distill.py"
    shutil.copy("train_distill.py", path)
    spec = importlib.util.spec_from_file_location("my_distill", path)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_distill", copy)
    spec.loader.exec_module(copy)

    _, run = train(OPD, "--max_steps=1")
    again = [OPD, *SHORT, "--max_steps=2", "--resume"]
    refused = "step_000001 was made with script='train_distill', not 'my_distill'"
    with pytest.raises(UserError, match=refused):
        copy.main([*again, f"--out_dir={run}"])
    copy.main([OPD, *SHORT, "--max_steps=1", f"--out_dir={tmp_path / 'own'}"])
    refused = "step_000001 was made with script='my_distill', not 'train_distill'"
    with pytest.raises(UserError, match=refused):
        train_distill.main([*again, f"--out_dir={tmp_path / 'own'}"])


# --------------------------------------------------------------------------- resume, checkpoints

def test_the_start_may_be_the_best(tmp_path):
    """An evaluation that is worse than step 0's is not `best`; a better one is."""
    cfg = SimpleNamespace(out_dir=str(tmp_path))
    state = {"best_score": -1.0, "best_step": 0}
    metrics = {"pass_at_k": 1.0, "k": 1, "length": 5.0, "entropy": 0.1, "truncated": 0.0}
    found = []
    for step, score in enumerate((0.5, 0.4, 0.5, None, 0.6, 0.55)):
        state["step"] = step
        found.append(log_evaluation(cfg, state, "student", metrics | {"avg_at_k": score}, []))
    assert found == [True, False, False, False, True, False]
    assert (state["best_score"], state["best_step"]) == (0.6, 4)
    assert not log_evaluation(cfg, state, "teacher", metrics | {"avg_at_k": 1.0}, [])


def test_resume_is_exact(train):
    """
    6 steps = 4 + 2 after a resume, bit for bit: weights, optimiser, metrics. The evaluation of step
    4 is not repeated, and rows after the checkpoint are dropped.
    """
    rows, whole = train(OPD, "--max_steps=6", *EVALUATED)
    _, run = train(OPD, "--max_steps=4", *EVALUATED)
    with open(run / "metrics.jsonl", "a") as file:  # a crash left a step and half a line behind
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    resumed, _ = train(OPD, "--max_steps=6", "--resume", *EVALUATED, out=run)
    assert same(saved(whole / "last"), saved(run / "last"))
    assert [row["step"] for row in resumed if "loss" not in row] == [0, 2, 4, 6]
    assert without_times(resumed) == without_times(rows)


def test_checkpoints(train, monkeypatch):
    given, real = iter((0.2, 0.1, 0.5, 0.4, 0.3, 0.1)), grade.summarise
    monkeypatch.setattr(grade, "summarise", lambda records: real(records) | {
        "avg_at_k": next(given)})
    _, run = train(OPD, "--max_steps=5", "--save_every=1", "--keep=2", "--eval_every=1",
                      "--eval_prompts=4", "--eval_samples=2", "--eval_max_new_tokens=40",
                      "--eval_teacher=False")
    assert os.readlink(run / "last") == "step_000005"
    assert os.readlink(run / "best") == "step_000002"
    assert {path.name for path in run.glob("step_*")} == {
        "step_000002", "step_000004", "step_000005"}
    assert not list(run.glob(".*tmp"))

    model = AutoModelForCausalLM.from_pretrained(run / "last")
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [257, 260]
    tokenizer = AutoTokenizer.from_pretrained(run / "last")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1+2?"}], tokenize=False,
                                         add_generation_prompt=True)
    assert text == "<|user|>1+2?<|assistant|>"
    samples = read_lines(run / "samples_student_000005.jsonl")
    assert len(samples) == 8
    keys = {"problem", "response", "correct", "stop", "tokens_after_box"}
    assert keys <= samples[0].keys()


def damage(path, how):
    if how == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-10])


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run with checkpoints of its steps 2 and 3."""
    out = tmp_path_factory.mktemp("three") / "run"
    train_distill.main([OPD, *SHORT, "--save_every=1", "--max_steps=3", f"--out_dir={out}"])
    return out


@pytest.mark.parametrize("name, how", [
    ("optimizer.pt", "cut"), ("model.safetensors", "cut"), ("train_state.json", "cut"),
    ("config.json", "cut"), ("optimizer.pt", "missing"), ("model.safetensors", "missing"),
    ("train_state.json", "missing"), ("config.json", "missing")])
def test_damaged_checkpoints(three_steps, train, tmp_path, capsys, name, how):
    """A file cut short or missing: it is named, and the run goes on from the one before."""
    run = tmp_path / "run"
    shutil.copytree(three_steps, run, symlinks=True)
    damage(run / "step_000003" / name, how)
    rows, _ = train(OPD, "--save_every=1", "--max_steps=3", "--resume", out=run)
    printed = capsys.readouterr().out
    warning = rf"warning: {run}/step_000003 is damaged \(.+\), and passed over\n"
    assert re.search(warning, printed) and "from step 2\n" in printed
    assert logged_steps(rows) == [1, 2, 3]
    assert same(saved(run / "last"), saved(three_steps / "last"))

    for step in (2, 3):
        damage(run / f"step_00000{step}" / name, how)
    message = f"no checkpoint in {run} loads; start anew with --overwrite"
    with pytest.raises(UserError, match=message) as caught:
        train(OPD, "--max_steps=4", "--resume", out=run)
    assert "\n" not in str(caught.value)


def test_killed_in_the_middle_of_a_save(three_steps, train, tmp_path, capsys):
    """
    `last` is not asked, for a kill may come before it is moved; what is left of a save is
    overwritten; without any checkpoint the run begins again.
    """
    options = (OPD, "--save_every=1")
    run = tmp_path / "run"
    shutil.copytree(three_steps, run, symlinks=True)
    shutil.rmtree(run / "step_000003")
    (run / "last").unlink()
    os.symlink("step_000001", run / "last")
    (run / ".step_000003.tmp").mkdir()
    (run / ".step_000003.tmp" / "half").write_bytes(b"of a file")
    rows, _ = train(*options, "--max_steps=3", "--resume", out=run)
    assert "from step 2\n" in capsys.readouterr().out
    assert os.readlink(run / "last") == "step_000003" and not list(run.glob(".step*"))
    assert not (run / "step_000003" / "half").exists()
    assert same(saved(run / "last"), saved(three_steps / "last"))

    for folder in run.glob("step_*"):
        shutil.rmtree(folder)
    rows, _ = train(*options, "--max_steps=3", "--resume", out=run)
    assert f"no checkpoint in {run} yet: from the start" in capsys.readouterr().out
    assert logged_steps(rows) == [1, 2, 3]
    assert same(saved(run / "last"), saved(three_steps / "last"))


def test_checkpoints_beside_other_things(train, monkeypatch):
    """
    Copies and folders of the user's own do not count; a full disk that the tokenizer meets leaves
    nothing half-written.
    """
    options = (OPD, "--save_every=1")
    _, run = train(*options, "--max_steps=1")
    shutil.copytree(run / "step_000001", run / "step_000009_backup")
    (run / "step_000001" / "eval").mkdir()
    (run / "step_000001" / "eval" / "results.json").write_text("{}")
    train(*options, "--max_steps=2", "--keep=1", "--resume", out=run)
    assert {path.name for path in run.glob("step_*")} == {"step_000002", "step_000009_backup"}

    def full(*args, **options):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    message = "cannot save .*trial: No space left .*; mend that, then --resume"
    with pytest.raises(UserError, match=message):           # before the first step
        train(*options, "--max_steps=3", "--resume", out=run)
    assert not list(run.glob("*.tmp")) and not (run / "step_000003").exists()
    assert os.readlink(run / "last") == "step_000002"


# ---------------------------------------------------------------------------------------- mistakes

@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder of things that are wrong."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty.jsonl").write_text("\n")
    (root / "bad.jsonl").write_text('{"problem": "1+2?", "answer": "3"}\n{"problem": \n')
    (root / "nokey.jsonl").write_text('{"text": "1+2?"}\n')
    (root / "latin.jsonl").write_bytes(b'{"problem": "caf\xe9"}\n')
    (root / "long.jsonl").write_text('{"problem": "%s2?", "answer": "3"}\n' % ("1+" * 1500))
    (root / "unsolved.jsonl").write_text('{"problem": "1+2?", "answer": "3", "solution": " "}\n')
    (root / "nothing").mkdir()
    (root / "used").mkdir()
    (root / "used" / "thesis.txt").write_text("years of work")

    shutil.copytree("data/toy/teacher", root / "other_tokenizer")
    path = root / "other_tokenizer" / "tokenizer.json"
    text = path.read_text().replace('"3": 51', '"3": 52').replace('"4": 52', '"4": 51')
    path.write_text(text)
    shutil.copytree("data/toy/teacher", root / "untemplated")
    (root / "untemplated" / "chat_template.jinja").unlink()

    shutil.copytree("data/toy/student", root / "cut")
    damage(root / "cut" / "model.safetensors", "cut")
    shutil.copytree("data/toy/student", root / "lacking")
    path = root / "lacking" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    return root


SOLUTIONS = "--teacher=None --prefix=teacher --reverse_weight=0 --eval_teacher=False"


@pytest.mark.parametrize("options, message", [
    ("--student=data/toy/studnt", "no model folder data/toy/studnt"),
    ("--student={root}/nothing", "nothing: it has no config.json; give a folder, or a hub name"),
    ("--student={root}/cut", "cannot load a model in {root}/cut"),
    ("--student={root}/lacking", "cannot load a model in {root}/lacking: it lacks "
                                 "model.norm.weight, which would be random"),
    ("--teacher={root}/untemplated", "has no chat template"),
    ("--teacher=", "teacher='': SFT on hard labels needs"),
    (f"{SOLUTIONS} --prompts={{root}}/unsolved.jsonl",
     "problem '1+2?' has no solution; add one, name a teacher"),
    ("--teacher={root}/other_tokenizer",
     "incompatible tokenizers: id 51 is '3' for the student and '4' for the teacher"),
    ("--prompts={root}/none.jsonl",
     "no prompt file {root}/none.jsonl: `python data/benchmarks.py none` makes"),
    ("--prompts={root}/empty.jsonl", "{root}/empty.jsonl holds no problems"),
    ("--prompts={root}/bad.jsonl", "{root}/bad.jsonl, line 2: "),
    ("--prompts={root}/nokey.jsonl",
     "nokey.jsonl, line 1: no \"problem\" or \"question\" text; found the keys ['text']"),
    ("--prompts={root}/latin.jsonl", "unpack or convert it: 'utf-8' codec can't decode byte 0xe9"),
    ("--prompts={root}/long.jsonl",
     "no usable prompt: 3004 tokens and more pass max_position_embeddings="),
    ("--max_new_tokens=2048",
     "pass max_position_embeddings=2048 with 2048 new tokens; lower max_new_tokens"),
    ("--reverse_weight=1.5", "reverse_weight=1.5: must be in [0, 1]"),
    ("--reverse_weight=half",
     "command line: reverse_weight='half' is a str; reverse_weight must be float"),
    ("--prefix=techer", "prefix='techer' is a str; prefix must be one of ['teacher', 'student']"),
    ("--teacher=None", 'teacher=None: SFT on hard labels needs prefix="teacher", reverse_weight=0'),
    (f"{SOLUTIONS} --reverse_weight=1", "teacher=None: SFT on hard labels needs"),
    (f"{SOLUTIONS} --eval_teacher=True", "teacher=None: SFT on hard labels needs"),
    ("--trajectories={root}", "trajectories='{root}': what is on disk was not written by"),
    ("--learning_rat=1", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    ("--lr=1", "unknown key 'lr'; --help lists the keys"),
    ("--fsdp", "fsdp=True: one process has nothing to shard; start several with torchrun"),
    ("--batch_size=0", "batch_size=0: must be at least 1"),
    ("--top_p=0", "top_p=0.0: must be in (0, 1]"),
    ("--out_dir={root}/used", "no run to resume or to overwrite"),
    ("--out_dir={root}/used --overwrite", "no run to resume or to overwrite"),
    ("--out_dir={root}/used --resume", "no run to resume or to overwrite"),
    ("--out_dir={root}/used/thesis.txt", "no run to resume or to overwrite"),
    ("--resume --overwrite", "overwrite=True: give --resume or this, not both"),
    ("configs/toy_odp.py", "no config file configs/toy_odp.py"),
])
def test_mistakes(broken, options, message, tmp_path):
    """One clear line, before anything is written."""
    before = sorted(broken.rglob("*"))
    options = options.format(root=broken).split()
    with pytest.raises(UserError, match=re.escape(message.format(root=broken))) as caught:
        train_distill.main([OPD, *SHORT, f"--out_dir={tmp_path}/run", *options])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() and sorted(broken.rglob("*")) == before


def test_overwrite_through_a_link(train, tmp_path):
    """Where out_dir links to another disk the run there is replaced, and the link stays."""
    _, run = train(OPD, "--max_steps=1")
    link = tmp_path / "link"
    link.symlink_to(run)
    rows, _ = train(OPD, "--max_steps=2", "--overwrite", out=link)
    assert link.is_symlink() and len(steps_of(rows)) == 2
    assert (run / "step_000002").is_dir() and not (run / "step_000001").exists()


def test_mistakes_at_a_resume(train):
    _, run = train(OPD, "--max_steps=1")
    (run / "metrics.jsonl").write_text("")
    for options, message in [
        (["--resume", "--student=data/toy/teacher"],
         "step_000001 was made with student="),
        (["--resume", "--teacher=data/toy/student"],
         "step_000001 was made with teacher="),
        (["--overwrite", f"--student={run}"],
         f"--overwrite would delete {run}, which this run reads"),
        (["--overwrite", f"--student={run}/step_000001"],
         f"--overwrite would delete {run}/step_000001, which this run reads"),
        (["--resume", "--max_steps=0"], "max_steps=0: "),
        ([], "exists: --resume goes on with that run, --overwrite deletes it"),
        (["--resume", f"--out_dir={run.parent}"],
         "is no run to resume or to overwrite, for it has no run_config.json"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            train(OPD, "--max_steps=2", *options, out=run)
    assert (run / "metrics.jsonl").read_text() == ""
    train(OPD, "--max_steps=1", "--overwrite", out=run)
    assert len(read_lines(run / "metrics.jsonl")) == 1


def test_a_resume_knows_contents_not_paths(train, tmp_path):
    """Folders may move; an edited prompt file, and other weights under the old name, may not."""
    prompts, student = tmp_path / "prompts.jsonl", tmp_path / "student"
    shutil.copy("data/toy/train.jsonl", prompts)
    shutil.copytree("data/toy/student", student)
    paths = [f"--prompts={prompts}", f"--student={student}"]
    _, run = train(OPD, "--max_steps=1", *paths)
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(UserError, match="made with prompts='[0-9a-f]{16}', not"):
        train(OPD, "--max_steps=2", "--resume", *paths, out=run)
    shutil.copytree("data/toy/teacher", student, dirs_exist_ok=True)
    with pytest.raises(UserError, match="made with student='[0-9a-f]{16}', not"):
        train(OPD, "--max_steps=2", "--resume", f"--student={student}", out=run)
    rows, _ = train(OPD, "--max_steps=2", "--resume", out=run)     # the same by their old paths
    assert len(steps_of(rows)) == 2


@pytest.mark.parametrize("file, content, kept", [
    ("generation_config.json", {"temperature": 0.7, "top_p": 0.8, "eos_token_id": [257, 3]}, True),
    ("generation_config.json", {"pad_token_id": -1, "eos_token_id": [257, 3]}, True),
    ("generation_config.json", {"do_sample": True, "top_k": 20, "eos_token_id": [257, 3]}, False),
    ("config.json", {"temperature": 0.6, "top_k": 5, "eos_token_id": [257, 3]}, True),
])
def test_a_student_that_could_not_be_saved(train, tmp_path, capsys, file, content, kept):
    """Settings of generation that transformers refuses to write are left out, and it is said."""
    student = shutil.copytree("data/toy/student", tmp_path / "student")
    if file == "config.json":
        (student / "generation_config.json").unlink()
        content = json.loads((student / file).read_text()) | content
    (student / file).write_text(json.dumps(content))
    _, run = train(OPD, "--max_steps=1", f"--student={student}", "--stop=student")
    printed = capsys.readouterr().out
    said = re.search("only the stop ids stay: .*(temperature|pad_token_id)", printed)
    assert bool(said) == kept
    assert load_model(run / "last", torch.float32).generation_config.eos_token_id == [257, 3]


def test_a_step_is_saved_again(tmp_path, student, tokenizer):
    """Also where a kill came while what was there before was removed: nothing of it stays."""
    path = tmp_path / "step_000001"
    for step in (1, 2, 3):
        utils._write_checkpoint(path, student, tokenizer, {}, {}, {"step": step})
        assert json.loads((path / "train_state.json").read_text()) == {"step": step}
        assert [entry.name for entry in tmp_path.iterdir()] == ["step_000001"]
        assert not (path / "old").exists()
        (path / "old").mkdir()
        (path / "old" / "optimizer.pt").write_bytes(b"half removed")


def test_a_save_is_tried_before_the_first_step(train, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise TypeError("not JSON serializable")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fails)
    with pytest.raises(UserError, match="cannot save .*trial: not JSON serializable"):
        train(OPD, "--max_steps=1", out=tmp_path / "run")
    assert (tmp_path / "run").is_dir() and not list((tmp_path / "run").glob("*step*"))


def test_the_folder_of_a_run_is_its_newest_checkpoint(train, tmp_path):
    _, run = train(OPD, "--max_steps=2", "--save_every=1")
    assert utils.model_folder(run) == str(run / "step_000002")
    assert utils.model_folder(run / "last") != str(run)
    rows, again = train(OPD, "--max_steps=1", f"--student={run}", f"--teacher={run}")
    assert steps_of(rows)[0]["reverse_kl"] == pytest.approx(0, abs=1e-5)
    (run / "step_000002").rename(tmp_path / "apart")
    with pytest.raises(UserError, match="was made with student="):
        train(OPD, "--max_steps=2", f"--student={run}", f"--teacher={run}", "--resume", out=again)


def test_without_links(train, tmp_path, monkeypatch):
    """A disk that has none, and a run that was copied with cp -rL: saves and resumes go on."""
    _, run = train(OPD, "--max_steps=1")
    copied = tmp_path / "copied"
    shutil.copytree(run, copied, symlinks=False)
    assert not (copied / "last").is_symlink()
    train(OPD, "--max_steps=2", "--resume", out=copied)
    assert os.readlink(copied / "last") == "step_000002"

    def refuses(*args, **options):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuses)
    _, bare = train(OPD, "--max_steps=1")
    assert {path.name for path in bare.iterdir() if path.is_dir()} == {"step_000001"}
    train(OPD, "--max_steps=2", "--resume", out=bare)
    assert utils.model_folder(bare).endswith("step_000002")


def test_two_runs_in_one_folder(train, tmp_path):
    """The second is told who is at work there, with --overwrite too; it may begin after the end."""
    _, run = train(OPD, "--max_steps=1")
    utils._held.clear()                                     # as the end of this process would
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import utils; utils.lock({str(run)!r}); print('held'); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": "."})
    assert holder.stdout.readline() == "held\n"
    for option in ("--resume", "--overwrite"):
        with pytest.raises(UserError, match=f"process {holder.pid} on .* writes there"):
            train(OPD, "--max_steps=2", option, out=run)
    assert (run / "step_000001").is_dir()
    holder.communicate("\n")
    train(OPD, "--max_steps=2", "--resume", out=run)


def test_an_adapter_is_not_ignored(tmp_path):
    folder = shutil.copytree("data/toy/student", tmp_path / "student")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_config.json would not be read; merge it"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("config", [
    {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
    {"model_type": "of_tomorrow"},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "awq", "bits": 4}},
])
def test_models_that_are_not_supported(tmp_path, config):
    """Whatever a library raises is one line that begins with the folder."""
    folder = shutil.copytree("data/toy/student", tmp_path / "student")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError, match=f"cannot load a model in {folder}: .") as caught:
        load_model(folder, torch.float32)
    assert "\n" not in str(caught.value)


def test_the_docs_recipe_for_wandb(train, tmp_path, monkeypatch):
    """The script of docs/running.md logs every row of metrics.jsonl, under the name of the run."""
    docs = Path("docs/running.md").read_text()
    script = docs[docs.index("import json, sys, wandb"):].split("```")[0]
    begun, logged = {}, []
    module = SimpleNamespace(
        init=lambda **options: begun.update(options),
        log=lambda row, step: logged.append((step, row)))
    rows, _ = train(OPD, "--max_steps=2", *EVALUATED, out=tmp_path / "name")
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(sys, "argv", ["to_wandb.py", str(tmp_path / "name")])
    exec(script, {})
    assert begun["name"] == begun["config"]["out_dir"] == str(tmp_path / "name")
    assert [step for step, _ in logged] == [row["step"] for row in rows]
    assert logged[0][1]["student/avg_at_k"] == rows[0]["avg_at_k"]
    assert logged[1][1]["train/loss"] == rows[1]["loss"]


def test_processes_without_torchrun():
    """WORLD_SIZE alone, as some schedulers set it, is no group of processes."""
    done = subprocess.run(
        [sys.executable, "train_distill.py", OPD], capture_output=True, text=True,
        env=os.environ | {"WORLD_SIZE": "2"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot join the other processes; start them with torchrun: " in done.stderr


def test_command_line():
    """As a user meets it: --help, and a mistake as one line on stderr with exit code 1."""
    command = [sys.executable, "train_distill.py"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "KL(q||p)" in shown.stdout and "reverse_weight: float" in shown.stdout
    failed = subprocess.run([*command, "configs/toy_odp.py"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == ("error: no config file configs/toy_odp.py; those of this repository "
                             "are in configs/\n")


@pytest.mark.parametrize("options, kinds", [
    ((), {"student": "vllm"}), (("--eval_teacher",), {"student": "vllm", "teacher": "hf"}),
    (("--prefix=teacher", "--eval_teacher"), {"student": "hf", "teacher": "vllm"})])
def test_who_has_an_engine(monkeypatch, options, kinds):
    """A model that never writes has none, so none is announced."""
    monkeypatch.setattr(train_distill, "make_engine", lambda kind, *_: kind)
    cfg = utils.load_config(train_distill.Config, ["--engine=vllm", *options])
    models = train_distill.Models("student", "teacher", *[None] * 7)
    data = train_distill.Data([], [[1, 2]])
    assert train_distill.make_engines(cfg, models, data) == kinds
