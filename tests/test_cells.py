"""cells.py: the paper's inequalities on numbers for which they hold, and with the sides exchanged."""

import cells
from cells import LAMS, LONG, RUNGS, SHORT, STOPS, claims, name_of


def world(reverse=1, student=1, long=1):
    """Runs in which each claim holds; -1 exchanges forward and reverse KL, student and teacher prefixes, long and short."""
    def run(prefix, lam, horizon):
        r = lam if reverse == 1 else 1 - lam
        s = (prefix == "student") == (student == 1)
        is_long = (horizon == LONG) == (long == 1)
        last = {"avg_at_k": 0.3 + 0.15 * (r > 0) - 0.01 * (0 < r < 1), "pass_at_k": 0.8, "entropy": 0.3 - 0.2 * r ** 2,
                "length": 80.0, "entropy_before_box": None, "entropy_after_box": None, "tokens_after_box": None,
                "truncated": 0.0, "step": 200, "tflops": 2.0 if prefix == "student" else 1.0}
        if is_long:
            last["avg_at_k"] += 0.15 + 0.05 * (r == 0) + 0.1 * s
            last["pass_at_k"] += 0.08 * (r == 0) + 0.06 * s
            last["length"] = 255.0 if s and r > 0.2 else 100.0
        first = last | {"avg_at_k": 0.2, "step": 0, "tflops": 0.0}
        return {"student": [first, last]}
    runs = {name_of(p, lam, h, stop): run(p, lam, h) for p in ("teacher", "student") for lam in LAMS for h in RUNGS
            for stop in STOPS}
    best = runs[name_of("student", 1, LONG, "union")]["student"][-1]
    better = best | {"avg_at_k": best["avg_at_k"] + 0.1, "pass_at_k": best["pass_at_k"] + 0.1, "length": 90.0}
    runs |= {f"curriculum_{stop}": {"student": [better]} for stop in STOPS}
    for prefix in ("teacher", "student"):
        for lam in (0, 1):
            for horizon in (SHORT, LONG):
                begin = runs[name_of(prefix, lam, horizon, "union")]["student"][-1]
                r = lam if reverse == 1 else 1 - lam
                runs[f"grpo_{prefix}_{lam}_{horizon}"] = {"student": [
                    begin, begin | {"avg_at_k": begin["avg_at_k"] + (0.1 if r == 0 else -0.1)}]}
    return runs


def failed(runs):
    return {number for number, _, _, _, verdict in claims(runs, "union", rl=True) if verdict != "holds"}


def test_each_claim_holds_where_it_should():
    assert [row for row in claims(world(), "union", rl=True) if row[4] != "holds"] == []
    assert {row[0] for row in claims(world(), "union", rl=True)} == set(range(2, 14))
    assert {10, 11} & {row[0] for row in claims(world(), "student", rl=True)} == set()       # GRPO starts from union only


def test_each_claim_fails_with_the_sides_exchanged():
    assert {2, 3, 4, 10, 11, 12} <= failed(world(reverse=-1))
    assert {6, 9} <= failed(world(student=-1))
    assert {2, 5, 8} <= failed(world(long=-1))
    worse = world()
    worse["curriculum_union"] = {"student": [worse[name_of("student", 1, LONG, "union")]["student"][-1] | {"length": 256.0}]}
    assert failed(worse) == {13}
    far = world()                                        # prefix source moves the entropy more than direction does
    for name, run in far.items():
        if name.startswith("teacher"):
            run["student"][-1]["entropy"] += 1
    assert failed(far) == {7}


def test_table_and_report_over_seeds():
    """Means, ranges and counts of verdicts over two seeds."""
    results = {1: world(), 2: world(reverse=-1)}
    rows = [line for line in cells.table(results, [1, 2]) if line.startswith(f"| `{name_of('student', 0, SHORT, 'union')}`")]
    assert rows[0].split(" | ")[1] == "0.375 (0.300 - 0.450)"
    line = next(line for line in cells.report(results, [1, 2], False) if "A(R) > A(F), short" in line)
    assert "**fails** 1, holds 1" in line and "0.375, 0.375" in line
