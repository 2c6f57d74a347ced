"""
Curves and a table from any set of runs.

    python plot.py out/toy_opd                                          # writes out/toy_opd/curves.png
    python plot.py out/toy_opd out/toy_sft --y accuracy entropy length --x tflops --out compare.png
    python plot.py out/a out/b --row out/c out/d                        # two rows of panels
    python plot.py --eval out/eval_a out/eval_b                         # bars, from eval_math.py's folders

Each run folder holds metrics.jsonl. accuracy (Avg@k), pass, entropy, entropy_before_box, entropy_after_box, length, truncated
and tokens_after_box come from evaluations (the teacher's is a dotted line); any other name is a key of the training lines:
loss, forward_kl, grad_norm, horizon, ... A curriculum's gates are triangles (open) and crosses (closed) among the entropies.
The table shows the base student, each run's last evaluation with its training TFLOPs so far, and the teacher; a run that begins
where an earlier one ended needs no row for that.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

EVAL_KEYS = {"accuracy": "avg_at_k", "pass": "pass_at_k"} | {key: key for key in (
    "entropy", "entropy_before_box", "entropy_after_box", "length", "truncated", "tokens_after_box")}
UNITS = {"accuracy": "Avg@k", "pass": "Pass@k", "entropy": "entropy (nats per token)", "length": "response length (tokens)",
         "entropy_before_box": "entropy up to the first box", "entropy_after_box": "entropy after the first box",
         "tokens_after_box": "tokens after the first box", "truncated": "share without a stop", "loss": "loss (nats per token)",
         "tflops": "TFLOPs"}


def read_run(folder):
    """{"steps": training lines, "student" and "teacher": their evaluations, "gates": the curriculum's decisions}."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"error: no {path}; give run folders, for example out/toy_opd")
    run, tflops = {"steps": [], "student": [], "teacher": [], "gates": []}, 0.0
    for line in path.read_text().split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break                                        # a run that is being written, or was cut short
        if "loss" in row:
            tflops = row["tflops"]
        run["steps" if "loss" in row else "gates" if "gate" in row else row["model"]].append({"tflops": tflops} | row)
    return run


def draw(rows, names, out, x="step"):
    """rows: {title: {label: run}}, a row of panels each, a panel a name; training curves raw and as means of 10 steps."""
    size = (4 * len(names), 3.2 * len(rows))
    fig, axes = plt.subplots(len(rows), len(names), figsize=size, layout="constrained", squeeze=False)
    for name in names:
        if not any(run["student"] if name in EVAL_KEYS else any(name in row for row in run["steps"][:1])
                   for runs in rows.values() for run in runs.values()):
            known = sorted({*EVAL_KEYS, *(key for runs in rows.values() for run in runs.values() for row in run["steps"][:1]
                                          for key in row)})
            sys.exit(f"error: no run has {name!r}; known here: {', '.join(known)}")
    for (title, runs), panels in zip(rows.items(), axes):
        for axis, name in zip(panels, names):
            draw_panel(axis, runs, name, x)
        panels[0].set_ylabel(title)
        panels[0].legend(fontsize=8)
    for axis, name in zip(axes[0], names):
        axis.set_title(UNITS.get(name, name))
    fig.savefig(out, dpi=120)
    plt.close(fig)


def draw_panel(axis, runs, name, x):
    named = False
    for i, (label, run) in enumerate(runs.items()):
        color = f"C{i % 10}"
        if name in EVAL_KEYS:
            points = [(e[x], e[EVAL_KEYS[name]]) for e in run["student"] if e[EVAL_KEYS[name]] is not None]
            axis.plot(*zip(*points) if points else ([], []), "o-", ms=4, color=color, label=label)
            for e in run["teacher"]:
                if e[EVAL_KEYS[name]] is not None:
                    axis.axhline(e[EVAL_KEYS[name]], ls=":", color="gray", label="_" * named + "teacher")
                    named = True                         # matplotlib leaves labels out that begin with _
            for g in run["gates"] if name == "entropy" else ():
                axis.plot(g[x], g["entropy"], "^" if g["gate"] == "open" else "X", ms=8, color=color, mec="black")
        else:
            points = [(row[x], row[name]) for row in run["steps"] if row.get(name) is not None]
            values = [y for _, y in points]
            means = [sum(values[max(0, j - 9):j + 1]) / len(values[max(0, j - 9):j + 1]) for j in range(len(values))]
            axis.plot([x for x, _ in points], values, color=color, alpha=0.25, lw=1)
            axis.plot([x for x, _ in points], means, color=color, label=label)
    axis.set_xlabel(UNITS.get(x, x))
    axis.grid(alpha=0.3)
    if name in ("accuracy", "pass", "truncated"):
        axis.set_ylim(-0.02, 1.02)


def table(runs):
    """Lines of a table in 80 columns; equal rows (the same base student in several runs) are printed once."""
    rows = {}
    kinds = {label: "after RL" if any("reward_mean" in row for row in run["steps"]) else "distilled student"
             for label, run in runs.items()}
    for label, run in runs.items():
        if run["student"]:
            first, last = run["student"][0], run["student"][-1]
            name = "before RL" if kinds[label] == "after RL" else "base student"
            if (first["avg_at_k"], first["length"]) not in [(e["avg_at_k"], e["length"]) for _, e in rows.values()]:
                rows[name, first["length"]] = (name, first)      # what an earlier run ended with is there already
            if last["step"] > first["step"]:
                rows[label] = (kinds[label] if list(kinds.values()).count(kinds[label]) == 1 else label, last)
    for run in runs.values():
        for e in run["teacher"][-1:]:
            rows.setdefault(("teacher", e["avg_at_k"], e["length"]), ("teacher", e))
    if not rows:
        return []
    ks = {e["k"] for _, e in rows.values()}
    k = ks.pop() if len(ks) == 1 else "k"
    lines = [f"{'':<20}{f'Avg@{k}':>9}{f'Pass@{k}':>9}{'length':>9}{'entropy':>9}{'truncated':>11}{'TFLOPs':>10}"]
    for name, e in rows.values():
        cells = [f"{'-':>9}" if e[key] is None else f"{e[key]:>9.3f}" for key in ("avg_at_k", "pass_at_k")]
        lines.append(f"{name[-20:]:<20}{''.join(cells)}{e['length']:>9.1f}{e['entropy']:>9.3f}{e['truncated']:>11.1%}"
                     f"{e['tflops']:>10.3g}")
    return lines


def draw_evaluations(folders):
    """
    Bars of accuracy and response length from the results.json of eval_math.py's folders, a group
    for each folder and benchmark. Written to results.png in the first folder.
    """
    labels = []
    rows = []
    for folder in folders:
        path = Path(folder) / "results.json"
        if not path.is_file():
            sys.exit(f"error: no {path}; give folders that eval_math.py has written to the end")
        for name, row in json.loads(path.read_text())["results"].items():
            labels.append(f"{Path(folder).name}\n{name}, k = {row['k']}")
            rows.append(row)

    def column(key):
        return np.array([row[key] for row in rows], float)      # None is NaN: a bar left out

    averages = column("avg_at_k")
    intervals = np.array([row["avg_interval"] or (None, None) for row in rows], float)
    reach = np.abs(intervals.T - averages)              # (2, rows): below and above the average
    x = np.arange(len(rows))
    size = (max(8, 3 * len(rows)), 3)
    figure, (accuracy, length) = plt.subplots(1, 2, figsize=size, layout="constrained")
    accuracy.bar(x - 0.2, averages, 0.4, yerr=reach, color="C0", ecolor="0.2", capsize=3,
                 label="Avg@k, 95 % interval")
    accuracy.bar(x + 0.2, column("pass_at_k"), 0.4, color="C1", label="Pass@k")
    length.bar(x - 0.2, column("length"), 0.4, color="C2", label="mean")
    length.bar(x + 0.2, column("median_length"), 0.4, color="C3", label="median")

    accuracy.set_ylim(0, 1.25)                          # room for the legend
    accuracy.set_yticks(np.arange(0, 1.01, 0.2))
    length.set_ylim(0, 1.25 * length.get_ylim()[1])
    for axis, title in ((accuracy, "accuracy"), (length, "response length (tokens)")):
        axis.set_xticks(x, labels, fontsize=8)
        axis.set_xlim(-1, len(rows))
        axis.set_title(title, fontsize=10)
        axis.legend(frameon=False, ncols=2, loc="upper center", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    out = Path(folders[0]) / "results.png"
    figure.savefig(out, dpi=120)
    plt.close(figure)
    print(f"wrote {out}")


def main():
    if sys.argv[1:2] == ["--eval"] and sys.argv[2:]:
        return draw_evaluations(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--row", nargs="+", action="append", default=[], help="run folders for one more row of panels")
    parser.add_argument("--y", nargs="+", help="what to draw, a panel each; default accuracy entropy length loss")
    parser.add_argument("--x", choices=["step", "tflops"], default="step", help="updates, or TFLOPs as the paper counts them")
    parser.add_argument("--out", help="PNG to write; default curves.png in the run's folder, or in the current one for several")
    args = parser.parse_args()
    rows = [{str(Path(folder)): read_run(folder) for folder in folders} for folders in (args.runs, *args.row)]
    runs = {label: run for row in rows for label, run in row.items()}
    out = args.out or str(Path(args.runs[0]) / "curves.png" if len(runs) == 1 else Path("curves.png"))
    evaluated = any(e["avg_at_k"] is not None for run in runs.values() for e in run["student"])
    # the rows of the command line have no titles; spaces keep them apart
    draw({" " * i: row for i, row in enumerate(rows)}, args.y or (["accuracy", "entropy", "length", "loss"] if evaluated
                                                                  else ["loss"]), out, args.x)
    print(f"wrote {out}")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
