"""
Where may a response end? What causes the collapse, by an intervention.

    python stops.py --seeds 42 43 44         # make stops: 108 runs on the toy world, about an hour
    python stops.py --world smollm --seeds 42 43 44     # a real language model, after make real

Student and teacher end a response with different ids. Six conditions, in which all else is equal:

    union            either id ends a student's response (stop = "union")
    student          only its own does (stop = "student"): the strictest convention
    exchanged        as `student`, but before step 0 the rows of the two ids have changed places in
                     the student's embedding and LM head (exchange_stops = True), so that it ends as
                     the teacher does. `union` would be the same run, for the ids are the same then
    *_mask           each of these with terminal = "mask": the stop id that ends a response is not
                     in the loss

docs/stops.md says what this shows and what it does not. Runs are folders as those of cells.py, in
the same place, and shared with it: what is finished is not run again. The figure stops.png, the
table stops_table.md and the paired differences stops_differences.md come there too. Intervals are
95 %, by a bootstrap over seeds and problems.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np

import cells

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

CONDITIONS = {
    "union": ["--stop=union"],
    "student": ["--stop=student"],
    "exchanged": ["--stop=student", "--exchange_stops"],
}
CONDITIONS |= {f"{name}_mask": [*argv, "--terminal=mask"] for name, argv in CONDITIONS.items()}

COLUMNS = {                     # key: (heading, digits)
    "avg_at_k": ("Avg@k", 3),
    "length": ("length", 1),
    "truncated": ("cut", 2),
    "entropy": ("entropy", 3),
    "entropy_before_box": ("before box", 3),
    "entropy_after_box": ("after box", 3),
}


TITLES = {                      # of the figure's panels
    "length": "response length (tokens)",
    "entropy_before_box": "entropy up to the first box",
    "entropy_after_box": "entropy after the first box",
    "avg_at_k": "accuracy (Avg@k)",
}


def toy_runs(world):
    """{(run, condition): (folder's name, arguments of train_distill.py)}."""
    kinds = {}
    for horizon in (world.long, world.short):
        for kl, lam in (("reverse KL", 1), ("lam = 0.2", 0.2), ("forward KL", 0)):
            if lam in (0, 1) or horizon == world.long:
                kinds[f"{kl}, horizon {horizon}"] = (
                    f"student_{lam}_{horizon}",
                    [*world.cells, f"--reverse_weight={lam}", f"--max_new_tokens={horizon}"])
    kinds["curriculum"] = "curriculum", world.curriculum
    return {
        (kind, condition): (f"{name}_{condition}", [*argv, *options])
        for kind, (name, argv) in kinds.items() for condition, options in CONDITIONS.items()}


def real_runs():
    """
    As `toy_runs`. The student is its teacher but for the id that ends a response, or that without
    six layers.
    """
    same, pruned = "data/smollm/other_end", "data/smollm/pruned_other_end"
    cases = [
        ("reverse KL", "student", same, ["--reverse_weight=1"]),
        ("reverse KL", "union", same, ["--reverse_weight=1"]),
        ("reverse KL", "exchanged", same, ["--reverse_weight=1"]),
        ("forward KL", "student", same, ["--reverse_weight=0"]),
        ("teacher prefixes, reverse KL", "student", same,
         ["--reverse_weight=1", "--prefix=teacher"]),
        ("pruned, reverse KL", "student", pruned, ["--reverse_weight=1"]),
        ("pruned, reverse KL", "exchanged", pruned, ["--reverse_weight=1"]),
    ]
    runs = {}
    for kind, condition, student, argv in cases:
        name = f"stops_{kind.replace(', ', '_').replace(' ', '_')}_{condition}"
        runs[kind, condition] = name, [
            "configs/smollm_stops.py", f"--student={student}", *argv, *CONDITIONS[condition]]
    return runs


# ----------------------------------------------------------------------------------------- numbers

def last_evaluation(folder):
    return cells.measured(max(Path(folder).glob("samples_student_*.jsonl")))


def resampled(arrays):
    """
    Ratios (1 + resamples,) of sums over seeds and problems, both drawn anew each time; the first
    is that of the sample itself. arrays: (2, problems) for each seed, as `cells.measured` has them.
    """
    problems = cells.draws(arrays[0].shape[1])
    top, bottom = (
        cells.over_seeds([problems @ of_seed[part] for of_seed in arrays]) for part in (0, 1))
    with np.errstate(invalid="ignore"):                     # 0 / 0 where no response has a box
        return top / bottom


def with_interval(ratios, digits, sign=""):
    """The value of the sample and its 95 % interval, as text; "-" where there is none."""
    if np.isnan(ratios[0]):
        return "-"
    low, high = np.nanpercentile(ratios[1:], [2.5, 97.5])
    return f"{ratios[0]:{sign}.{digits}f} ({low:{sign}.{digits}f} .. {high:{sign}.{digits}f})"


def table(results):
    """Markdown lines: a row for each run and condition, with intervals."""
    headings = " | ".join(heading for heading, _ in COLUMNS.values())
    lines = [f"| run | condition | {headings} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for (kind, condition), seeds in results.items():
        row = [with_interval(resampled([arrays[key] for arrays in seeds]), digits)
               for key, (_, digits) in COLUMNS.items()]
        lines.append(f"| {kind} | `{condition}` | {' | '.join(row)} |")
    return lines


def differences(results):
    """Markdown lines: what a condition changes in a run, each against the strictest, paired."""
    headings = " | ".join(heading for heading, _ in COLUMNS.values())
    lines = [f"| run | less `student` | {headings} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for (kind, condition), seeds in results.items():
        strictest = results.get((kind, "student"))
        if condition == "student" or not strictest:
            continue
        row = []
        for key, (_, digits) in COLUMNS.items():
            one, other = (resampled([arrays[key] for arrays in x]) for x in (seeds, strictest))
            row.append(with_interval(one - other, digits, "+"))
        lines.append(f"| {kind} | `{condition}` | {' | '.join(row)} |")
    return lines


def draw(results, out):
    """A point for each condition and run, a panel for each column, with intervals over seeds."""
    kinds = list(dict.fromkeys(kind for kind, _ in results))
    conditions = [name for name in CONDITIONS if any(name == c for _, c in results)]
    names = ["length", "entropy_before_box", "entropy_after_box", "avg_at_k"]
    names = [name for name in names if any(
        seeds[0][name][1].sum() for seeds in results.values())]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 4.2), layout="constrained", sharey=True)
    for axis, name in zip(axes, names):
        for k, kind in enumerate(kinds):
            for c, condition in enumerate(conditions):
                if (kind, condition) not in results:
                    continue
                ratios = resampled([arrays[name] for arrays in results[kind, condition]])
                low, high = np.nanpercentile(ratios[1:], [2.5, 97.5])
                y = -c - (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
                axis.plot([low, high], [y, y], color=f"C{k}", lw=1.5)
                axis.plot(ratios[0], y, "o", ms=4, color=f"C{k}",
                          label=kind if c == 0 or kind not in axis.get_legend_handles_labels()[1]
                          else None)
        axis.set_title(TITLES[name], fontsize=10)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
        for c in range(1, len(conditions)):
            axis.axhline(0.5 - c, color="0.8", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([-c for c in range(len(conditions))], conditions)
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--jobs", type=int, default=cells.cores(), help="runs at a time")
    parser.add_argument("--world", choices=["toy", "smollm"], default="toy")
    args = parser.parse_args()
    world = cells.small_world(args.world)
    out = world.out
    cells.check_inputs(world)
    runs = toy_runs(world) if args.world == "toy" else real_runs()
    cells.execute([
        cells.Job("train_distill.py", out / str(seed) / name, [*argv, f"--seed={seed}"])
        for seed in args.seeds for name, argv in runs.values()], [""] * args.jobs)
    results = {
        key: [last_evaluation(out / str(seed) / name) for seed in args.seeds]
        for key, (name, _) in runs.items()}
    draw(results, out / "stops.png")
    for name, make in (("stops_table", table), ("stops_differences", differences)):
        text = "\n".join(make(results)) + "\n"
        (out / f"{name}.md").write_text(text)
        print(text)
    print(f"in {out}: stops.png, stops_table.md, stops_differences.md")


if __name__ == "__main__":
    main()
