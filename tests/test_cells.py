"""cells.py: the paper's inequalities on numbers for which they hold, and with sides exchanged."""

from pathlib import Path

import cells
import rl_grpo
import train_distill
import utils
from cells import DIRECTIONS, LAMS, LONG, PREFIXES, RUNGS, SHORT, STOPS, claims, name_of


def world(reverse=1, student=1, long=1):
    """
    Runs in which each claim holds. -1 exchanges forward and reverse KL, student and teacher
    prefixes, long and short.
    """
    def amount_of_reverse(lam):
        return lam if reverse == 1 else 1 - lam

    def run(prefix, lam, horizon):
        r = amount_of_reverse(lam)
        is_student = (prefix == "student") == (student == 1)
        is_long = (horizon == LONG) == (long == 1)
        last = {
            "avg_at_k": 0.3 + 0.15 * (r > 0) - 0.01 * (0 < r < 1), "pass_at_k": 0.8,
            "entropy": 0.3 - 0.2 * r ** 2, "length": 80.0, "entropy_before_box": None,
            "entropy_after_box": None, "tokens_after_box": None, "truncated": 0.0, "k": 8,
            "step": 200, "tflops": 2.0 if prefix == "student" else 1.0}
        if is_long:
            last["avg_at_k"] += 0.15 + 0.05 * (r == 0) + 0.1 * is_student
            last["pass_at_k"] += 0.08 * (r == 0) + 0.06 * is_student
            last["length"] = 255.0 if is_student and r > 0.2 else 100.0
        first = last | {"avg_at_k": 0.2, "step": 0, "tflops": 0.0}
        return {"student": [first, last]}

    runs = {
        name_of(prefix, lam, horizon, stop): run(prefix, lam, horizon)
        for prefix in PREFIXES for lam in LAMS for horizon in RUNGS for stop in STOPS}
    best = runs[name_of("student", 1, LONG, "union")]["student"][-1]
    better = best | {
        "avg_at_k": best["avg_at_k"] + 0.1, "pass_at_k": best["pass_at_k"] + 0.1, "length": 90.0}
    for stop in STOPS:
        runs[f"curriculum_{stop}"] = {"student": [better]}
    for prefix in PREFIXES:
        for _, lam in DIRECTIONS:
            for horizon in (SHORT, LONG):
                begin = runs[name_of(prefix, lam, horizon, "union")]["student"][-1]
                gain = 0.1 if amount_of_reverse(lam) == 0 else -0.1
                end = begin | {"avg_at_k": begin["avg_at_k"] + gain}
                runs[f"grpo_{prefix}_{lam}_{horizon}"] = {"student": [begin, end]}
    return runs


def failed(runs):
    """The numbers of the claims that do not hold."""
    return {row[0] for row in claims(runs, "union", rl=True) if row[4] != "holds"}


def test_each_claim_holds_where_it_should():
    assert failed(world()) == set()
    assert {row[0] for row in claims(world(), "union", rl=True)} == set(range(2, 14))
    # GRPO starts from the runs with stop = union only.
    assert {10, 11} & {row[0] for row in claims(world(), "student", rl=True)} == set()


def test_each_claim_fails_with_the_sides_exchanged():
    assert {2, 3, 4, 10, 11, 12} <= failed(world(reverse=-1))
    assert {6, 9} <= failed(world(student=-1))
    assert {2, 5, 8} <= failed(world(long=-1))

    worse = world()
    reverse_kl = worse[name_of("student", 1, LONG, "union")]["student"][-1]
    worse["curriculum_union"] = {"student": [reverse_kl | {"length": 256.0}]}
    assert failed(worse) == {13}

    far = world()                                        # the prefix source moves H more than KL
    for name, run in far.items():
        if name.startswith("teacher"):
            run["student"][-1]["entropy"] += 1
    assert failed(far) == {7}


def test_table_and_report_over_seeds():
    """Means, ranges and counts of verdicts over two seeds."""
    results = {1: world(), 2: world(reverse=-1)}
    start = f"| `{name_of('student', 0, SHORT, 'union')}`"
    row = next(line for line in cells.table(results, [1, 2]) if line.startswith(start))
    assert row.split(" | ")[1] == "0.375 (0.300 - 0.450)"
    lines = cells.report(results, [1, 2], False)
    line = next(line for line in lines if "A(R) > A(F), short" in line)
    assert "**fails** 1, holds 1" in line and "0.375, 0.375" in line


def test_the_world_of_the_real_model(monkeypatch):
    """Its runs have valid configs; its verdicts come beside the toy's, claim by claim."""
    for name in ("CONFIGS", "PARENT", "OUT", "RUNGS", "SHORT", "LONG", "LIMIT", "LAMS", "STOPS",
                 "HARD", "GRPO"):
        monkeypatch.setattr(cells, name, getattr(cells, name))
    cells.use_world("smollm")
    runs = cells.distillation_runs()
    assert len(runs) == 16 and "hard_64_union" in runs
    for argv in runs.values():
        cfg = utils.load_config(train_distill.Config, argv)
        train_distill.validate(cfg, 1)
    for argv in cells.grpo_runs(cells.OUT).values():
        cfg = utils.load_config(rl_grpo.Config, argv)
        rl_grpo.validate(cfg, 1)

    lines = ["| claim | left, right side | stop = union |", "|---|---|---|",
             "| 2 | A(R) > A(F), long | 0.7, 0.6: holds |"]
    joined = cells.beside_the_toy(lines)
    toy = Path("docs/claims.md").read_text().strip().split("\n")
    assert joined[0] == toy[0] + " a real language model |" and joined[1] == toy[1] + "---|"
    added = [line.removeprefix(old) for old, line in zip(toy[2:], joined[2:], strict=True)]
    assert added.count(" 0.7, 0.6: holds |") == 1 and set(added) == {" 0.7, 0.6: holds |", " - |"}
