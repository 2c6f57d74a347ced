"""The entropy-gated length curriculum: its rule alone, then real runs: gates, rollback, resume."""

import json
import math
import os
import random
import re

import pytest
import torch
from conftest import STOPS, same, saved, steps_of, without_times

import grade
import sample
import train_distill
from data.problems import encode_prompt, load_problems, load_tokenizer
from engine import HFEngine, Sampling
from models import load_model
from train_distill import gate
from utils import UserError, derive_seed, open_run, read_lines, write_lines

LADDER = ("configs/toy_opd.py", "--horizons=(6, 12, 24)", "--steps_per_horizon=2",
          "--eval_prompts=12", "--save_every=1")
CLOSES = ("--entropy_floor=1.0",)  # later tokens are surer, so entropy falls from rung to rung
ROLLBACK = (*CLOSES, "--on_gate_closed=rollback")


def horizons(rows):
    return [row["horizon"] for row in steps_of(rows)]


def longest_responses(rows):
    return [row["max_length"] for row in steps_of(rows)]


def gate_rows(rows):
    return [row for row in rows if "gate" in row]


def gates(rows):
    keys = "step", "gate", "horizon", "next_horizon"
    return [tuple(row[key] for key in keys) for row in gate_rows(rows)]


# ---------------------------------------------------------------------------------------- the rule

@pytest.mark.parametrize("entropies, floor, unit, expected", [
    ([0.4], 0.5, "first_rung", (True, 0.2)),  # half of itself: the first always opens
    ([0.4, 0.2], 0.5, "first_rung", (True, 0.2)),  # equal is enough
    ([0.4, 0.19], 0.5, "first_rung", (False, 0.2)),
    ([0.4, 0.19, 0.9], 0.5, "first_rung", (False, 0.2)),  # once closed it stays closed
    ([0.4, 0.9, 0.3], 0.5, "first_rung", (True, 0.2)),  # the first counts, not largest or last
    ([0.4], 0.5, "nats", (False, 0.5)),
    ([0.6, 0.5], 0.5, "nats", (True, 0.5)),
    ([0.6, 0.5, 0.49], 0.5, "nats", (False, 0.5)),
    ([0.0, 0.0], 0.0, "nats", (True, 0.0))])
def test_rule(entropies, floor, unit, expected):
    assert gate(entropies, floor, unit) == expected


@pytest.mark.parametrize("unit", ["nats", "first_rung"])
def test_closed_stays_closed(unit):
    rng = random.Random(0)
    for _ in range(300):
        entropies = [rng.random() for _ in range(6)]
        opens = [gate(entropies[:n], 0.5, unit)[0] for n in range(1, 7)]
        assert opens == sorted(opens, reverse=True)  # True ... True False ... False


def test_what_is_not_a_number_opens_nothing():
    for entropies in ([0.3, math.nan], [math.nan, 0.3], [math.nan]):
        assert not gate(entropies, 0.5, "nats")[0] and not gate(entropies, 0.5, "first_rung")[0]


# ---------------------------------------------------------------------------------------- in a run

def own_entropy(checkpoint, tokenizer):
    """
    (mean entropy in nats per token, mean length) of 12 responses of at most 6 tokens at T = 1, with
    the logits in fp64.
    """
    model = load_model(str(checkpoint), torch.float32)
    problems = load_problems("data/toy/middle.jsonl")[:12]
    prompts = [encode_prompt(tokenizer, problem["problem"]) for problem in problems]
    seeds = [derive_seed(42, "eval", i, 0) for i in range(12)]
    rollouts = HFEngine(model, vocab_size=272).generate(prompts, Sampling(6, STOPS), seeds)
    model.double()
    total, count = 0.0, 0
    for prompt, (tokens, _, _) in zip(prompts, rollouts):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
        logps = logits.log_softmax(-1)
        total -= (logps.exp() * logps).sum().item()
        count += len(tokens)
    return total / count, count / 12


def test_opens(train):
    """
    A rung every two steps, the rest at the last one; responses fill the rung and no more; one row
    for each decision, between the steps.
    """
    rows, run = train(*LADDER, "--max_steps=7", "--entropy_floor=0.1")
    assert horizons(rows) == [6, 6, 12, 12, 24, 24, 24]
    assert longest_responses(rows)[:4] == [6, 6, 12, 12]
    assert gates(rows) == [(2, "open", 6, 12), (4, "open", 12, 24)]
    assert [rows.index(row) for row in gate_rows(rows)] == [2, 5]
    assert os.readlink(run / "stable") == "step_000004"


def test_gate_measures_the_students_own_entropy(train, tokenizer):
    """The logged H_m, recomputed from the checkpoint's own responses, cut at the rung's horizon."""
    rows, run = train(*LADDER, "--max_steps=3", "--keep=9")
    row = gate_rows(rows)[0]
    entropy, length = own_entropy(run / "step_000002", tokenizer)
    assert row["entropy"] == pytest.approx(entropy, abs=1e-6)
    assert row["entropies"] == [row["entropy"]]
    assert row["entropy_floor"] == row["entropy"] / 2
    assert row["problems"] == 12 and row["length"] == length
    assert len(read_lines(run / "samples_gate_000002.jsonl")) == 12


def test_gate_ignores_length(train, monkeypatch):
    """The same run in which all responses are said to be long and cut takes the same decisions."""
    real, (rows, _) = grade.summarise, train(*LADDER, "--max_steps=5")
    lie = {"length": 1e6, "truncated": 1.0}
    monkeypatch.setattr(grade, "summarise", lambda records: real(records) | lie)
    other_rows, _ = train(*LADDER, "--max_steps=5")
    assert [row["length"] for row in gate_rows(other_rows)] == [1e6, 1e6]
    assert gates(other_rows) == gates(rows)


def test_hold(train):
    rows, run = train(*LADDER, *CLOSES, "--max_steps=9", "--keep=9")
    assert horizons(rows) == [6, 6, 12, 12, 12, 12, 12, 12, 12]
    assert gates(rows) == [(2, "open", 6, 12), (4, "closed", 12, 12)]  # looked at once, not again
    assert not same(saved(run / "step_000004"), saved(run / "step_000002"))


def test_stop(train, capsys):
    """The run ends at the closed gate, evaluated and saved; another choice goes on from there."""
    options = (*LADDER, *CLOSES, "--eval_every=3", "--eval_prompts=2", "--eval_samples=1",
               "--eval_max_new_tokens=8", "--eval_teacher=False")
    rows, run = train(*options, "--max_steps=9", "--on_gate_closed=stop")
    assert "done at step 4, horizon 12: " in capsys.readouterr().out
    assert horizons(rows) == [6, 6, 12, 12] and os.readlink(run / "last") == "step_000004"
    assert rows[-1]["step"] == 4 and "avg_at_k" in rows[-1]

    before = (run / "metrics.jsonl").read_text()
    train(*options, "--max_steps=9", "--on_gate_closed=stop", "--resume", out=run)
    assert (run / "metrics.jsonl").read_text() == before  # nothing more to do
    rows, _ = train(*options, "--max_steps=6", "--on_gate_closed=hold", "--resume", out=run)
    assert horizons(rows) == [6, 6, 12, 12, 12, 12]


def test_rollback(train):
    """
    Weights and optimiser are those of the last gate that opened, bit for bit; the horizon is its
    rung's; and the weights move again.
    """
    rows, run = train(*LADDER, *ROLLBACK, "--max_steps=6", "--keep=9")
    assert horizons(rows) == [6, 6, 12, 12, 6, 6]
    assert gates(rows)[-1] == (4, "closed", 12, 6)
    passing, moved, back, after = (saved(run / f"step_00000{step}") for step in (2, 3, 4, 5))
    assert same(passing, back)
    assert not same(moved, back) and not same(after, back)


def test_rollback_reaches_the_sampler(train):
    """In bf16 the sampler has a copy: after a rollback it scores as at the last open gate."""
    options = ("--dtype=bfloat16", "--eval_every=2", "--eval_prompts=8", "--eval_samples=2",
               "--eval_max_new_tokens=24", "--eval_teacher=False", "--learning_rate=1e-3")
    rows, _ = train(*LADDER, *ROLLBACK, "--max_steps=4", *options)
    rows = [row for row in rows if row.get("model") == "student"]
    before, opened, back = ([row[key] for key in ("entropy", "length", "avg_at_k")] for row in rows)
    assert opened == back != before


def test_rollback_keeps_what_it_needs(train):
    """keep=1 and many checkpoints since: the one to go back to is still there."""
    rows, run = train(*LADDER, *ROLLBACK, "--steps_per_horizon=4", "--max_steps=9", "--keep=1")
    assert gates(rows)[-1] == (8, "closed", 12, 6)
    assert os.readlink(run / "stable") == "step_000004"


@pytest.mark.parametrize("choice", ["hold", "rollback"])
def test_first_gate_closes(train, choice):
    """A floor in nats that nothing reaches: the first rung to the end, nothing to go back to."""
    rows, run = train(*LADDER, "--max_steps=4", "--entropy_floor=9", "--floor_unit=nats",
                      f"--on_gate_closed={choice}")
    assert horizons(rows) == [6, 6, 6, 6]
    assert gates(rows) == [(2, "closed", 6, 6)]
    assert not (run / "stable").exists() and gate_rows(rows)[0]["entropy_floor"] == 9


@pytest.mark.parametrize("cut, options", [
    pytest.param(3, (), id="mid-rung"),
    pytest.param(2, (), id="at a gate"),
    pytest.param(4, CLOSES, id="at a closed gate"),
    pytest.param(3, ROLLBACK, id="before a rollback"),
    pytest.param(4, ROLLBACK, id="right after one"),
    pytest.param(5, ROLLBACK, id="later")])
def test_resume_is_exact(train, cut, options, capsys):
    rows, whole = train(*LADDER, *options, "--max_steps=7")
    _, run = train(*LADDER, *options, f"--max_steps={cut}")
    resumed, _ = train(*LADDER, *options, "--max_steps=7", "--resume", out=run)
    assert same(saved(whole / "last"), saved(run / "last"))
    assert without_times(rows) == without_times(resumed)
    state = json.loads((run / "last" / "train_state.json").read_text())
    assert state["entropies"] == [row["entropy"] for row in gate_rows(rows)]


def test_changed_keys_do_not_rewrite_the_past(train):
    """A closed gate stays closed, and a held horizon held, whatever the keys say at a resume."""
    _, run = train(*LADDER, *CLOSES, "--max_steps=5")
    for changed in ("--entropy_floor=0.1", "--on_gate_closed=rollback", "--steps_per_horizon=1"):
        rows, _ = train(*LADDER, *CLOSES, "--max_steps=7", changed, "--resume", out=run)
    assert horizons(rows) == [6, 6, 12, 12, 12, 12, 12] and len(gates(rows)) == 2


@pytest.mark.parametrize("step, looked, kept", [(4, 3, 2), (4, 4, 4), (3, 3, 1), (0, -1, 0)])
def test_rows_that_come_again_are_dropped(tmp_path, student, tokenizer, step, looked, kept):
    """
    A resumed run's log begins with what its checkpoint knows: steps up to `step`, evaluations and
    gates up to `looked`, the last step at which they were made.
    """
    rows = [{"step": 3, "loss": 1.0}, {"step": 4, "loss": 1.0},
            {"step": 4, "model": "gate", "gate": "closed"},
            {"step": 4, "model": "student", "entropy": 1.0}, {"step": 5, "loss": 1.0}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # the crash came in the middle of a line
    cfg = train_distill.Config(out_dir=str(tmp_path))
    open_run(cfg, student, tokenizer, {"step": step, "last_eval_step": looked})
    assert read_lines(tmp_path / "metrics.jsonl") == rows[:kept]


def test_planted_collapse_closes_the_gate(train, tmp_path):
    """
    A teacher at a temperature near 0 (its logits x 20) takes the student's entropy with it, and the
    gate sees it.
    """
    sharp = load_model("data/toy/teacher", torch.float32)
    sharp.model.norm.weight.data *= 20
    sharp.save_pretrained(tmp_path / "sharp")
    load_tokenizer("data/toy/teacher").save_pretrained(tmp_path / "sharp")
    options = ("--horizons=(12, 16, 24)", "--steps_per_horizon=25", "--max_steps=51",
               "--batch_size=32", "--eval_prompts=50", "--learning_rate=2e-3",
               "--entropy_floor=0.24", "--floor_unit=nats")
    rows, _ = train("configs/toy_opd.py", *options)
    assert [row["gate"] for row in gate_rows(rows)] == ["open", "open"]
    rows, _ = train("configs/toy_opd.py", *options, f"--teacher={tmp_path / 'sharp'}")
    assert [row["gate"] for row in gate_rows(rows)] == ["closed"]


# --------------------------------------------------------------------------- with everything else

def test_fixed_horizon_is_a_ladder_of_one(train):
    rows, run = train("configs/toy_opd.py", "--max_steps=3", "--max_new_tokens=20")
    ladder_rows, ladder_run = train("configs/toy_opd.py", "--max_steps=3", "--horizons=(20,)",
                                    "--steps_per_horizon=1")
    assert same(saved(run / "last"), saved(ladder_run / "last"))
    assert horizons(rows) == horizons(ladder_rows) == [20] * 3
    assert not gates(ladder_rows)


@pytest.mark.parametrize("options", [
    pytest.param(("--reverse_weight=0.3",), id="mix"),
    pytest.param(("--prefix=teacher", "--reverse_weight=1"), id="teacher prefixes"),
    pytest.param(("--prefix=teacher", "--reverse_weight=0", "--teacher=None"), id="hard labels")])
def test_any_prefix_and_direction(train, tokenizer, options):
    """The ladder cuts whatever is written; the gate is about the student's own responses."""
    rows, run = train(*LADDER, "--max_steps=5", "--entropy_floor=0.1", "--eval_teacher=False",
                      "--keep=9", *options)
    entropy, _ = own_entropy(run / "step_000002", tokenizer)
    assert gate_rows(rows)[0]["entropy"] == pytest.approx(entropy, abs=1e-6)
    assert horizons(rows) == longest_responses(rows) == [6, 6, 12, 12, 24]


def test_cached_trajectories_follow_the_ladder(train, tmp_path):
    """From disk, with hidden states: longer rungs take more of the same responses."""
    folder = tmp_path / "cache"
    sample.main(["configs/toy_sample.py", "--num_prompts=16", "--cache_hidden=True",
                 f"--out_dir={folder}"])
    rows, _ = train(*LADDER, "--prefix=teacher", f"--trajectories={folder}", "--max_steps=5",
                    "--entropy_floor=0.1", "--eval_teacher=False")
    assert longest_responses(rows) == [6, 6, 12, 12, 24]


@pytest.mark.parametrize("option, message", [
    ("--horizons=(16, 8)", "horizons=(16, 8): must be positive and grow"),
    ("--horizons=(8, 8)", "horizons=(8, 8): must be positive and grow"),
    ("--horizons=(0, 8)", "horizons=(0, 8): must be positive and grow"),
    ("--entropy_floor=1.5", "entropy_floor=1.5: above 1 x"),
    ("--entropy_floor=-1", "entropy_floor=-1.0: must not be negative"),
    ("--steps_per_horizon=0", "steps_per_horizon=0: must be at least 1"),
    ("--eval_prompts=0", "eval_prompts=0: must be at least 1"),
    ("--horizons=(8, 4096)", "4096 new tokens")])
def test_mistakes(train, option, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train("configs/toy_opd.py", option)
