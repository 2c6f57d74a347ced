"""
Curves and a table from any set of runs.

    python plot.py out/toy_opd                                          # writes out/toy_opd/curves.png
    python plot.py out/toy_opd out/toy_sft --y accuracy entropy length --out compare.png

Each run folder holds metrics.jsonl. accuracy (Avg@k), pass, entropy, length and truncated come from evaluations (the teacher's
is a dotted line); any other name is a key of the training lines: loss, forward_kl, grad_norm, ... The table shows the base
student, each run's last evaluation, and the teacher; a run that begins where an earlier one ended needs no row for that.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

EVAL_KEYS = {"accuracy": "avg_at_k", "pass": "pass_at_k", "entropy": "entropy", "length": "length", "truncated": "truncated",
             "tokens_after_box": "tokens_after_box"}
UNITS = {"accuracy": "Avg@k", "pass": "Pass@k", "entropy": "entropy (nats per token)", "length": "response length (tokens)",
         "truncated": "share without a stop", "loss": "loss (nats per token)"}


def read_run(folder):
    """(training lines, student evaluations, teacher evaluations) of a run folder."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"error: no {path}; give run folders, for example out/toy_opd")
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break                                        # a run that is being written, or was cut short
    evals = [row for row in rows if "avg_at_k" in row]
    return ([row for row in rows if "loss" in row], [e for e in evals if e["model"] == "student"],
            [e for e in evals if e["model"] == "teacher"])


def draw(runs, names, out):
    """One panel a name, one line a run; training curves are drawn raw and, over them, as a running mean of 10 steps."""
    fig, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.2), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names):
        drawn = False
        for i, (label, (steps, student, teacher)) in enumerate(runs.items()):
            color = f"C{i % 10}"
            if name in EVAL_KEYS:
                points = [(e["step"], e[EVAL_KEYS[name]]) for e in student if e[EVAL_KEYS[name]] is not None]
                axis.plot(*zip(*points) if points else ([], []), "o-", ms=4, color=color, label=label)
                for e in teacher:
                    if e[EVAL_KEYS[name]] is not None:
                        axis.axhline(e[EVAL_KEYS[name]], ls=":", color=color, label=f"{label}: teacher")
            else:
                points = [(row["step"], row[name]) for row in steps if row.get(name) is not None]
                values = [y for _, y in points]
                means = [sum(values[max(0, j - 9):j + 1]) / len(values[max(0, j - 9):j + 1]) for j in range(len(values))]
                axis.plot([x for x, _ in points], values, color=color, alpha=0.25, lw=1)
                axis.plot([x for x, _ in points], means, color=color, label=label)
            drawn |= bool(points)
        if not drawn:
            known = sorted({*EVAL_KEYS, *(key for steps, _, _ in runs.values() for key in (steps or [{}])[0])})
            sys.exit(f"error: no run has {name!r}; known here: {', '.join(known)}")
        axis.set(xlabel="step", title=UNITS.get(name, name))
        axis.grid(alpha=0.3)
        if name in ("accuracy", "pass", "truncated"):
            axis.set_ylim(-0.02, 1.02)
    axes[0][0].legend(fontsize=8)
    fig.savefig(out, dpi=120)


def table(runs):
    """Lines of a table in 80 columns; equal rows (the same base student in several runs) are printed once."""
    rows = {}
    kinds = {label: "after RL" if any("reward_mean" in row for row in steps) else "distilled student"
             for label, (steps, _, _) in runs.items()}
    for label, (_, student, _) in runs.items():
        if student:
            first, last = student[0], student[-1]
            name = "before RL" if kinds[label] == "after RL" else "base student"
            if (first["avg_at_k"], first["length"]) not in [(e["avg_at_k"], e["length"]) for _, e in rows.values()]:
                rows[name, first["length"]] = (name, first)      # what an earlier run ended with is there already
            if last["step"] > first["step"]:
                rows[label] = (kinds[label] if list(kinds.values()).count(kinds[label]) == 1 else label, last)
    for _, _, teacher in runs.values():
        for e in teacher[-1:]:
            rows.setdefault(("teacher", e["avg_at_k"], e["length"]), ("teacher", e))
    if not rows:
        return []
    ks = {e["k"] for _, e in rows.values()}
    k = ks.pop() if len(ks) == 1 else "k"
    lines = [f"{'':<22}{f'Avg@{k}':>9}{f'Pass@{k}':>9}{'length':>9}{'entropy':>9}{'truncated':>11}"]
    for name, e in rows.values():
        cells = [f"{'-':>9}" if e[key] is None else f"{e[key]:>9.3f}" for key in ("avg_at_k", "pass_at_k")]
        lines.append(f"{name[-22:]:<22}{''.join(cells)}{e['length']:>9.1f}{e['entropy']:>9.3f}{e['truncated']:>11.1%}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--y", nargs="+", help="what to draw, a panel each; default accuracy entropy length loss")
    parser.add_argument("--out", help="PNG to write; default curves.png in the run's folder, or in the current one for several")
    args = parser.parse_args()
    runs = {str(Path(folder)): read_run(folder) for folder in args.runs}
    out = args.out or str(Path(args.runs[0]) / "curves.png" if len(runs) == 1 else Path("curves.png"))
    evaluated = any(e["avg_at_k"] is not None for _, student, _ in runs.values() for e in student)
    draw(runs, args.y or (["accuracy", "entropy", "length", "loss"] if evaluated else ["loss"]), out)
    print(f"wrote {out}")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
