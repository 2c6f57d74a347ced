"""
Curves and a table from any set of runs.

    python plot.py out/toy_opd                           # writes out/toy_opd/curves.png
    python plot.py out/toy_opd out/toy_sft --y accuracy entropy length --x tflops --out compare.png
    python plot.py out/a out/b --row out/c out/d         # two rows of panels
    python plot.py --eval out/eval_a out/eval_b          # bars and a Markdown table of evaluations
    python plot.py --compare out/eval_a out/eval_b       # their paired differences, with intervals

Each run folder holds metrics.jsonl. Its evaluations have accuracy (Avg@k), pass, entropy,
entropy_before_box, entropy_after_box, length, truncated and tokens_after_box; the teacher's is a
dotted line. Any other name is a key of the training lines: loss, forward_kl, grad_norm, horizon.
The gates of a curriculum are triangles (open) and crosses (closed) among the entropies.

The table shows the base student, each run's last evaluation with the TFLOPs and seconds of its
training so far (without evaluations), and the teacher. A run that begins where an earlier one ended
needs no row for its beginning.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

EVAL_KEYS = {                                            # names here: keys of an evaluation
    "accuracy": "avg_at_k",
    "pass": "pass_at_k",
    "entropy": "entropy",
    "entropy_before_box": "entropy_before_box",
    "entropy_after_box": "entropy_after_box",
    "length": "length",
    "truncated": "truncated",
    "tokens_after_box": "tokens_after_box"}
UNITS = {
    "accuracy": "Avg@k",
    "pass": "Pass@k",
    "entropy": "entropy (nats per token)",
    "length": "response length (tokens)",
    "entropy_before_box": "entropy up to the first box",
    "entropy_after_box": "entropy after the first box",
    "tokens_after_box": "tokens after the first box",
    "truncated": "share without a stop",
    "loss": "loss (nats per token)",
    "tflops": "TFLOPs"}


def read_run(folder):
    """{"steps": training lines, "student", "teacher": evaluations, "gates": of the curriculum}."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"error: no {path}; give run folders, for example out/toy_opd")
    run = {"steps": [], "student": [], "teacher": [], "gates": []}
    spent = {"tflops": 0.0, "seconds": 0.0}      # an evaluation has those of the steps so far
    for line in path.read_text().split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:                     # the run is being written, or was cut
            break
        if "loss" in row:
            kind = "steps"
            spent = {"tflops": row["tflops"], "seconds": spent["seconds"] + row.get("seconds", 0)}
        else:
            kind = "gates" if "gate" in row else row["model"]
        run[kind].append(spent | row)
    return run


def draw(rows, names, out, x="step"):
    """
    rows: {title: {label: run}}, a row of panels each; names: what is drawn, a panel each. Training
    curves are drawn raw and as means of 10 steps.
    """
    check_names(names, [run for runs in rows.values() for run in runs.values()])
    size = (4 * len(names), 3.2 * len(rows))
    figure, axes = plt.subplots(
        len(rows), len(names), figsize=size, layout="constrained", squeeze=False)
    for (title, runs), panels in zip(rows.items(), axes):
        for axis, name in zip(panels, names):
            draw_panel(axis, runs, name, x)
        panels[0].set_ylabel(title)
        panels[0].legend(fontsize=8)
    for axis, name in zip(axes[0], names):
        axis.set_title(UNITS.get(name, name))
    figure.savefig(out, dpi=120)
    plt.close(figure)


def check_names(names, runs):
    """Exit where no run has what is to be drawn."""
    keys = set()
    for run in runs:
        keys |= set().union(*run["steps"][:1])
    evaluated = any(run["student"] for run in runs)
    for name in names:
        if not (evaluated if name in EVAL_KEYS else name in keys):
            known = ", ".join(sorted({*EVAL_KEYS, *keys}))
            sys.exit(f"error: no run has {name!r}; known here: {known}")


def draw_panel(axis, runs, name, x):
    teacher_label = "teacher"
    for i, (label, run) in enumerate(runs.items()):
        color = f"C{i % 10}"
        if name in EVAL_KEYS:
            key = EVAL_KEYS[name]
            points = [(e[x], e[key]) for e in run["student"] if e[key] is not None]
            xs, ys = zip(*points) if points else ((), ())
            axis.plot(xs, ys, "o-", ms=4, color=color, label=label)
            for e in run["teacher"]:
                if e[key] is not None:
                    axis.axhline(e[key], ls=":", color="gray", label=teacher_label)
                    teacher_label = "_teacher"           # matplotlib leaves out what begins with _
            for gate in run["gates"] if name == "entropy" else ():
                marker = "^" if gate["gate"] == "open" else "X"
                axis.plot(gate[x], gate["entropy"], marker, ms=8, color=color, mec="black")
        else:
            rows = [row for row in run["steps"] if row.get(name) is not None]
            xs = [row[x] for row in rows]
            values = [row[name] for row in rows]
            means = []
            for end in range(1, len(values) + 1):
                window = values[max(0, end - 10):end]
                means.append(sum(window) / len(window))
            axis.plot(xs, values, color=color, alpha=0.25, lw=1)
            axis.plot(xs, means, color=color, label=label)
    axis.set_xlabel(UNITS.get(x, x))
    axis.grid(alpha=0.3)
    if name in ("accuracy", "pass", "truncated"):
        axis.set_ylim(-0.02, 1.02)


def table(runs):
    """
    Lines of a table in 80 columns. Equal rows (the same base student in several runs) are printed
    once.
    """
    rows = table_rows(runs)
    return table_lines(rows) if rows else []


def table_lines(rows):
    """Lines of a table in 80 columns, of [(name, evaluation)]."""
    ks = {e["k"] for _, e in rows}
    k = ks.pop() if len(ks) == 1 else "k"
    lines = [f"{'':<18}{f'Avg@{k}':>8}{f'Pass@{k}':>8}{'length':>8}{'entropy':>9}"
             f"{'truncated':>11}{'TFLOPs':>9}{'seconds':>9}"]
    for name, e in rows:
        accuracies = ""
        for key in ("avg_at_k", "pass_at_k"):
            accuracies += f"{'-':>8}" if e[key] is None else f"{e[key]:>8.3f}"
        lines.append(
            f"{name[-18:]:<18}{accuracies}{e['length']:>8.1f}{e['entropy']:>9.3f}"
            f"{e['truncated']:>11.1%}{e['tflops']:>9.3g}{e['seconds']:>9.0f}")
    return lines


def table_rows(runs):
    """[(name, evaluation)]: each run's first and last, then the teachers'."""
    kinds = {}
    for label, run in runs.items():
        after_rl = any("reward_mean" in row for row in run["steps"])
        kinds[label] = "after RL" if after_rl else "distilled student"

    rows = []
    seen = set()                                         # how a row is told from an equal one
    for label, run in runs.items():
        if not run["student"]:
            continue
        first, last = run["student"][0], run["student"][-1]
        if (first["avg_at_k"], first["length"]) not in seen:
            rows.append(("before RL" if kinds[label] == "after RL" else "base student", first))
            seen.add((first["avg_at_k"], first["length"]))
        if last["step"] > first["step"]:
            alone = list(kinds.values()).count(kinds[label]) == 1
            rows.append((kinds[label] if alone else label, last))
            seen.add((last["avg_at_k"], last["length"]))

    teachers = {}
    for run in runs.values():
        for e in run["teacher"][-1:]:
            teachers.setdefault((e["avg_at_k"], e["length"]), ("teacher", e))
    return rows + list(teachers.values())


def read_reports(folders):
    """{folder: results.json of eval_math.py}."""
    reports = {}
    for folder in folders:
        path = Path(folder) / "results.json"
        if not path.is_file():
            sys.exit(f"error: no {path}; give folders that eval_math.py has written to the end")
        reports[str(folder)] = json.loads(path.read_text())
    return reports


def evaluation_table(reports):
    """Markdown lines: a row for each folder and benchmark, and what they were measured with."""
    lines = ["| | problems | k | Avg@k (95 %) | Pass@k | length | entropy | cut | ungraded |",
             "|---|---|---|---|---|---|---|---|---|"]
    notes = {}                                          # {text: folders}
    for folder, report in reports.items():
        label = Path(folder).name
        for name, row in report["results"].items():
            accuracy = "-"
            if row["avg_at_k"] is not None:
                low, high = row["avg_interval"]
                accuracy = f"{row['avg_at_k']:.3f} ({low:.3f} - {high:.3f})"
            passed = "-" if row["pass_at_k"] is None else f"{row['pass_at_k']:.3f}"
            where = name if len(reports) == 1 else f"`{label}` on {name}"
            lines.append(f"| {where} | {row['problems']} | {row['k']} | {accuracy} "
                         f"| {passed} | {row['length']:.1f} | {row['entropy']:.3f} "
                         f"| {row['truncated']:.1%} | {row['ungraded']} |")
        note = ("T = {temperature}, top-p {top_p}, top-k {top_k}, at most {max_new_tokens} tokens, "
                "seed {seed}, {dtype} on ").format(**report["settings"])
        note += f"{report['device']}, torch {report['versions']['torch']}"
        notes.setdefault(note, []).append(label)
    for note, labels in notes.items():
        lines += ["", note + (f" ({', '.join(labels)})" if len(notes) > 1 else "") + "."]
    return lines


def draw_evaluations(reports, out):
    """
    Bars of accuracy and response length to `out`, a group for each folder and benchmark of
    `reports`, as `read_reports` returns them.
    """
    labels = []
    rows = []
    for folder, report in reports.items():
        for name, row in report["results"].items():
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
    figure.savefig(out, dpi=120)
    plt.close(figure)


def by_problem(folder):
    """
    {(benchmark, the problem's text): (share of right responses, mean length)}, of the problems with
    graded responses.
    """
    verdicts = {}
    lengths = {}
    for line in (Path(folder) / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        key = record["benchmark"], record["problem"]
        lengths.setdefault(key, []).append(record["length"])
        if record["correct"] is not None:
            verdicts.setdefault(key, []).append(record["correct"])
    return {key: (np.mean(verdicts[key]), np.mean(lengths[key])) for key in verdicts}


def compare(first, second):
    """Print paired differences, second - first, over the problems both have, with intervals."""
    there, here = read_reports([first, second]).values()
    for key, value in there["settings"].items():
        other = here["settings"].get(key)
        if key not in ("revision", "problems", "benchmarks") and other != value:
            print(f"warning: {key} is {value!r} there and {other!r} here")

    before, after = by_problem(first), by_problem(second)
    shared = sorted(before.keys() & after.keys())
    if not shared:
        sys.exit(f"error: {first} and {second} have no problem in common: "
                 f"{', '.join(there['results'])} and {', '.join(here['results'])}")
    print(f"{second} - {first}\n"
          f"{'':<11}{'problems':>9}{'Avg':>8} {'95 % interval':<18}"
          f"{'length':>8} {'95 % interval':<16}")
    for name in there["results"]:
        differences = [np.subtract(after[key], before[key]) for key in shared if key[0] == name]
        if differences:
            shares, lengths = zip(*differences)
            share = difference(shares, "+.3f")
            length = difference(lengths, "+.0f")
            print(f"{name[:10]:<11}{len(shares):>9}{share:<27}{length:<25}")


def interval(values, seed, resamples=10000):
    """95 % interval of the mean over problems, by the percentile bootstrap; None of no values."""
    if not values:
        return None
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (resamples, len(values))).mean(1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def difference(values, form):
    """The mean of differences and its interval, as text."""
    low, high = interval(values, 0)
    mean = format(np.mean(values), form)
    return f"{mean:>8} {low:{form}} .. {high:{form}}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--row", nargs="+", action="append", default=[],
                        help="run folders for one more row of panels")
    parser.add_argument("--y", nargs="+",
                        help="what to draw, a panel each; default accuracy entropy length loss")
    parser.add_argument("--x", choices=["step", "tflops"], default="step",
                        help="updates, or TFLOPs as the paper counts them")
    parser.add_argument("--out", help="PNG to write; default curves.png in the run's folder, or "
                                      "in the current one for several")
    parser.add_argument("--eval", action="store_true",
                        help="the folders are eval_math.py's: bars in results.png, and a table")
    parser.add_argument("--compare", action="store_true",
                        help="two folders of eval_math.py: differences, second - first")
    args = parser.parse_args()
    if args.compare:
        if len(args.runs) != 2:
            parser.error(f"--compare takes two folders, {len(args.runs)} were given")
        return compare(*args.runs)
    if args.eval:
        reports = read_reports(args.runs)
        out = args.out or str(Path(args.runs[0]) / "results.png")
        draw_evaluations(reports, out)
        print(f"wrote {out}")
        return print("\n".join(evaluation_table(reports)))

    rows = {}
    for i, folders in enumerate([args.runs, *args.row]):
        title = " " * i                                  # rows have no titles, but these differ
        rows[title] = {str(Path(folder)): read_run(folder) for folder in folders}
    runs = {label: run for row in rows.values() for label, run in row.items()}

    names = args.y
    if not names:
        evaluations = [e for run in runs.values() for e in run["student"]]
        evaluated = any(e["avg_at_k"] is not None for e in evaluations)
        names = ["accuracy", "entropy", "length", "loss"] if evaluated else ["loss"]
    folder = Path(args.runs[0]) if len(runs) == 1 else Path()
    out = args.out or str(folder / "curves.png")
    draw(rows, names, out, args.x)
    print(f"wrote {out}")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
