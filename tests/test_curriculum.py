"""The entropy-gated length curriculum: the rule by itself, then in real runs: decisions, rollback, resume."""

import json
import math
import os
import random
import re

import pytest
import torch
from conftest import STOPS
from safetensors.torch import load_file

import grade
import train_distill
import utils
from engine import HFEngine, Sampling
from train_distill import gate

LADDER = ("configs/toy_opd.py", "--horizons=(6, 12, 24)", "--steps_per_horizon=2", "--gate_prompts=12", "--save_every=1")
CLOSES = ("--entropy_floor=1.0",)                        # entropy falls from rung to rung here: later tokens are surer


def weights(folder):
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def horizons(rows):
    return [row["horizon"] for row in rows if "loss" in row]


def gates(rows):
    return [(row["step"], row["gate"], row["horizon"], row["next_horizon"]) for row in rows if "gate" in row]


# ------------------------------------------------------------------------------------------------------------------ the rule

@pytest.mark.parametrize("history, floor, unit, expected", [
    ([], 0.5, "first_rung", (False, None)),              # nothing measured, nothing opens
    ([], 0.5, "nats", (False, None)),
    ([0.4], 0.5, "first_rung", (True, 0.2)),             # half of itself: the first always opens
    ([0.4, 0.2], 0.5, "first_rung", (True, 0.2)),        # equal is enough
    ([0.4, 0.19], 0.5, "first_rung", (False, 0.2)),
    ([0.4, 0.19, 0.9], 0.5, "first_rung", (False, 0.2)),             # once closed it stays closed
    ([0.4, 0.9, 0.3], 0.5, "first_rung", (True, 0.2)),               # relative to the first, not to the largest or the last
    ([0.4], 0.5, "nats", (False, 0.5)),
    ([0.6, 0.5], 0.5, "nats", (True, 0.5)),
    ([0.6, 0.5, 0.49], 0.5, "nats", (False, 0.5)),
    ([0.0, 0.0], 0.0, "nats", (True, 0.0))])
def test_rule(history, floor, unit, expected):
    assert gate(history, floor, unit) == expected


@pytest.mark.parametrize("unit", ["nats", "first_rung"])
def test_closed_stays_closed(unit):
    rng = random.Random(0)
    for _ in range(300):
        history = [rng.random() for _ in range(6)]
        opens = [gate(history[:n], 0.5, unit)[0] for n in range(1, 7)]
        assert opens == sorted(opens, reverse=True)      # True ... True False ... False


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_rule_refuses_what_is_not_finite(broken):
    with pytest.raises(ValueError, match="not finite"):
        gate([0.3, broken], 0.5, "first_rung")


# ------------------------------------------------------------------------------------------------------------------ in a run

def own_entropy(checkpoint, tokenizer):
    """(mean entropy in nats per token, mean length) of 12 responses of at most 6 tokens at T = 1, in fp64."""
    model = utils.load_model(str(checkpoint), torch.float32)
    problems = utils.load_problems("data/toy/middle.jsonl")[:12]
    prompts = [utils.encode_prompt(tokenizer, problem["problem"]) for problem in problems]
    rollouts = HFEngine(model).generate(prompts, Sampling(6, STOPS, vocab_size=272),
                                              [utils.derive_seed(42, "eval", i, 0) for i in range(12)])
    model.double()
    total, count = 0.0, 0
    for prompt, (tokens, _, _) in zip(prompts, rollouts):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        total, count = total - (logps.exp() * logps).sum().item(), count + len(tokens)
    return total / count, count / 12


def test_opens(train):
    """A rung every two steps, the rest at the last; responses fill the rung and no more; a line a decision."""
    rows, run = train(*LADDER, "--max_steps=7", "--entropy_floor=0.1")
    assert horizons(rows) == [6, 6, 12, 12, 24, 24, 24]
    assert gates(rows) == [(2, "open", 6, 12), (4, "open", 12, 24)]
    assert [row["max_length"] for row in rows if "loss" in row][:4] == [6, 6, 12, 12]
    assert [rows.index(row) for row in rows if "gate" in row] == [2, 5]              # between the steps
    assert os.readlink(run / "stable") == "step_000004"


def test_gate_measures_the_students_own_entropy(train, tokenizer):
    """The logged H_m, recomputed in fp64 from the checkpoint's own responses at T = 1, cut at the rung's horizon."""
    rows, run = train(*LADDER, "--max_steps=3", "--keep=9")
    row = next(row for row in rows if "gate" in row)
    entropy, length = own_entropy(run / "step_000002", tokenizer)
    assert row["entropy"] == pytest.approx(entropy, abs=1e-6) and row["entropies"] == [row["entropy"]]
    assert row["entropy_floor"] == row["entropy"] / 2 and row["problems"] == 12 and row["length"] == length
    assert len(utils.read_lines(run / "samples_gate_000002.jsonl")) == 12


def test_gate_ignores_length(train, monkeypatch):
    """The same run with every measured length a thousand times longer takes the same decisions."""
    plain, plain_rows = grade.summarise, train(*LADDER, "--max_steps=5")[0]
    monkeypatch.setattr(grade, "summarise", lambda records: plain(records) | {"length": 1e6, "truncated": 1.0})
    rows, _ = train(*LADDER, "--max_steps=5")
    assert gates(rows) == gates(plain_rows) and [row["length"] for row in rows if "gate" in row] == [1e6, 1e6]


def test_hold(train):
    rows, run = train(*LADDER, *CLOSES, "--max_steps=9", "--keep=9")
    assert horizons(rows) == [6, 6, 12, 12, 12, 12, 12, 12, 12]
    assert gates(rows) == [(2, "open", 6, 12), (4, "closed", 12, 12)]                # looked at once, and never again
    assert not same(weights(run / "step_000004"), weights(run / "step_000002"))


def test_stop(train):
    """The run ends at the closed gate, evaluated and saved; another choice goes on from there."""
    options = (*LADDER, *CLOSES, "--eval_every=3", "--eval_prompts=2", "--eval_samples=1", "--eval_max_new_tokens=8",
               "--eval_teacher=False")
    rows, run = train(*options, "--max_steps=9", "--on_gate_closed=stop")
    assert horizons(rows) == [6, 6, 12, 12] and os.readlink(run / "last") == "step_000004"
    assert rows[-1]["step"] == 4 and "avg_at_k" in rows[-1]
    before = (run / "metrics.jsonl").read_text()
    train(*options, "--max_steps=9", "--on_gate_closed=stop", "--resume", out=run)
    assert (run / "metrics.jsonl").read_text() == before                             # nothing more to do
    rows, _ = train(*options, "--max_steps=6", "--on_gate_closed=hold", "--resume", out=run)
    assert horizons(rows) == [6, 6, 12, 12, 12, 12]


def test_rollback(train):
    """Weights and optimiser are those of the last gate that opened, bit for bit; then its rung; and they move again."""
    rows, run = train(*LADDER, *CLOSES, "--max_steps=6", "--on_gate_closed=rollback", "--keep=9")
    assert horizons(rows) == [6, 6, 12, 12, 6, 6] and gates(rows)[-1] == (4, "closed", 12, 6)
    passing, moved, back, after = (weights(run / f"step_00000{step}") for step in (2, 3, 4, 5))
    assert same(passing, back) and not same(moved, back) and not same(after, back)


def test_rollback_reaches_the_sampler(train):
    """In bf16 the sampler has its own copy of the weights: after a rollback it evaluates what the last open gate saw."""
    options = ("--dtype=bfloat16", "--eval_every=2", "--eval_prompts=8", "--eval_samples=2", "--eval_max_new_tokens=24",
               "--eval_teacher=False", "--learning_rate=1e-3")
    rows, _ = train(*LADDER, *CLOSES, "--max_steps=4", "--on_gate_closed=rollback", *options)
    strip = [{key: row[key] for key in ("entropy", "length", "avg_at_k")} for row in rows if row.get("model") == "student"]
    assert strip[1] == strip[2] != strip[0]


def test_rollback_keeps_what_it_needs(train):
    """keep=1 and many checkpoints since: the one to go back to is still there."""
    rows, run = train(*LADDER, *CLOSES, "--steps_per_horizon=4", "--max_steps=9", "--on_gate_closed=rollback", "--keep=1")
    assert gates(rows)[-1] == (8, "closed", 12, 6) and os.readlink(run / "stable") == "step_000004"


@pytest.mark.parametrize("choice", ["hold", "rollback"])
def test_first_gate_closes(train, choice):
    """A floor in nats that nothing reaches: the first rung to the end, and nothing before it to go back to."""
    rows, run = train(*LADDER, "--max_steps=4", "--entropy_floor=9", "--floor_unit=nats", f"--on_gate_closed={choice}")
    assert horizons(rows) == [6, 6, 6, 6] and gates(rows) == [(2, "closed", 6, 6)]
    assert not (run / "stable").exists() and rows[2]["entropy_floor"] == 9


ROLLBACK = (*CLOSES, "--on_gate_closed=rollback")


@pytest.mark.parametrize("cut, options", [(3, ()), (2, ()), (4, CLOSES), (3, ROLLBACK), (4, ROLLBACK), (5, ROLLBACK)],
                         ids=["mid-rung", "at a gate", "at a closed gate", "before a rollback", "right after one", "later"])
def test_resume_is_exact(train, cut, options, capsys):
    whole, a = train(*LADDER, *options, "--max_steps=7")
    _, b = train(*LADDER, *options, f"--max_steps={cut}")
    resumed, _ = train(*LADDER, *options, "--max_steps=7", "--resume", out=b)
    assert same(weights(a / "last"), weights(b / "last"))
    timing = re.compile("seconds|per_second|logprob_gap|_gb")
    first, second = ([{k: v for k, v in row.items() if not timing.search(k)} for row in rows] for rows in (whole, resumed))
    assert first == second
    state = json.loads((b / "last" / "train_state.json").read_text())
    assert state["entropies"] == [row["entropy"] for row in whole if "gate" in row]
    assert "when the checkpoint was written" not in capsys.readouterr().out          # no key was changed


def test_changed_keys_do_not_rewrite_the_past(train):
    """A closed gate stays closed, and a held horizon held, whatever the keys say at a later resume."""
    _, run = train(*LADDER, *CLOSES, "--max_steps=5")
    for changed in ("--entropy_floor=0.1", "--on_gate_closed=rollback", "--steps_per_horizon=1"):
        rows, _ = train(*LADDER, *CLOSES, "--max_steps=7", changed, "--resume", out=run)
    assert horizons(rows) == [6, 6, 12, 12, 12, 12, 12] and len(gates(rows)) == 2


@pytest.mark.parametrize("looked, closed, kept", [(False, False, 2), (False, True, 3), (True, True, 4)])
def test_rows_of_the_step_that_is_resumed(tmp_path, looked, closed, kept):
    """What the checkpoint knows stays: a decision of the gate that is in it, but no evaluation that is to come again."""
    rows = [{"step": 3, "loss": 1.0}, {"step": 4, "loss": 1.0}, {"step": 4, "model": "gate", "gate": "closed"},
            {"step": 4, "model": "student", "entropy": 1.0}, {"step": 5, "loss": 1.0}]
    utils.write_lines(tmp_path / "metrics.jsonl", rows)
    state = {"step": 4, "looked": looked, "closed": closed, "rung_began": 2, "links": ["best", "last"]}
    utils.open_run(train_distill.Config(out_dir=str(tmp_path)), {"out_dir": "here"}, state, 0, 1)
    assert utils.read_lines(tmp_path / "metrics.jsonl") == rows[:kept]
    assert os.readlink(tmp_path / "best") == os.readlink(tmp_path / "last") == "step_000004"     # killed before they were made


def test_planted_collapse_closes_the_gate(train, tmp_path):
    """A teacher at a temperature near 0 (its logits x 20) takes the student's entropy with it, and the gate sees it."""
    sharp = utils.load_model("data/toy/teacher", torch.float32)
    sharp.model.norm.weight.data *= 20
    sharp.save_pretrained(tmp_path / "sharp")
    utils.load_tokenizer("data/toy/teacher").save_pretrained(tmp_path / "sharp")
    options = ("--horizons=(12, 16, 24)", "--steps_per_horizon=25", "--max_steps=51", "--batch_size=32", "--gate_prompts=50",
               "--learning_rate=2e-3")
    for path, expected in (("data/toy/teacher", ["open", "open"]), (tmp_path / "sharp", ["closed"])):
        rows, _ = train("configs/toy_opd.py", f"--teacher={path}", "--entropy_floor=0.24", "--floor_unit=nats", *options)
        assert [row["gate"] for row in rows if "gate" in row] == expected


# --------------------------------------------------------------------------------------------------- with everything else

def test_fixed_horizon_is_a_ladder_of_one(train):
    a, run_a = train("configs/toy_opd.py", "--max_steps=3", "--max_new_tokens=20")
    b, run_b = train("configs/toy_opd.py", "--max_steps=3", "--horizons=(20,)", "--steps_per_horizon=1")
    assert same(weights(run_a / "last"), weights(run_b / "last")) and horizons(a) == horizons(b) == [20] * 3 and not gates(b)


@pytest.mark.parametrize("options", [("--reverse_weight=0.3",), ("--prefix=teacher", "--reverse_weight=1"),
                                     ("--prefix=teacher", "--reverse_weight=0", "--teacher=None")],
                         ids=["mix", "teacher prefixes", "hard labels"])
def test_any_prefix_and_direction(train, tokenizer, options):
    """The ladder cuts whatever is written; the gate is always about the student's own responses."""
    rows, run = train(*LADDER, "--max_steps=5", "--entropy_floor=0.1", "--eval_teacher=False", "--keep=9", *options)
    row = next(row for row in rows if "gate" in row)
    assert row["entropy"] == pytest.approx(own_entropy(run / "step_000002", tokenizer)[0], abs=1e-6)
    assert horizons(rows) == [6, 6, 12, 12, 24] and [row["max_length"] for row in rows if "loss" in row] == [6, 6, 12, 12, 24]


def test_cached_trajectories_follow_the_ladder(train, tmp_path):
    """From disk, with hidden states: longer rungs take more of the same responses."""
    import sample
    sample.main(["configs/toy_sample.py", "--num_prompts=16", "--cache_hidden=True", f"--out_dir={tmp_path / 'cache'}"])
    rows, _ = train(LADDER[0], *LADDER[1:], "--prefix=teacher", f"--trajectories={tmp_path / 'cache'}", "--max_steps=5",
                    "--entropy_floor=0.1", "--eval_teacher=False")
    assert [row["max_length"] for row in rows if "loss" in row] == [6, 6, 12, 12, 24]


@pytest.mark.parametrize("options, message", [
    (["--horizons=(16, 8)"], "horizons=(16, 8): must be positive and grow"),
    (["--horizons=(8, 8)"], "horizons=(8, 8): must be positive and grow"),
    (["--horizons=(0, 8)"], "horizons=(0, 8): must be positive and grow"),
    (["--entropy_floor=1.5"], "entropy_floor=1.5: above 1 x"),
    (["--entropy_floor=-1"], "entropy_floor=-1.0: must not be negative"),
    (["--steps_per_horizon=0"], "steps_per_horizon=0: must be at least 1"),
    (["--horizons=(8, 4096)"], "4096 new tokens")])
def test_mistakes(train, options, message):
    with pytest.raises(utils.UserError, match=re.escape(message)):
        train("configs/toy_opd.py", *options)


def test_broken_weights_stop_the_run(train, monkeypatch):
    plain = grade.summarise
    monkeypatch.setattr(grade, "summarise", lambda records: plain(records) | {"entropy": float("nan")})
    with pytest.raises(utils.UserError, match="not finite"):
        train(*LADDER, "--max_steps=3")


def test_too_few_steps_for_the_ladder(train, capsys):
    train(*LADDER, "--max_steps=4")
    assert "max_steps=4: horizon 24 opens after 4 steps at the earliest" in capsys.readouterr().out
