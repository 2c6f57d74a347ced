"""
Where may a response end, and is that what makes responses long and sure? An intervention.

    python stops.py --seeds 42 43 44         # make stops: 108 runs on the demo's world, hours
    python stops.py --world smollm --seeds 42 43 44     # make real-stops: a real language model
    python stops.py --seeds 42 43 44 --report           # of what is finished; runs nothing

Student and teacher end a response with different ids. Six conditions, in which all else is equal:

    union            either id ends a student's response (stop = "union")
    student          only its own does (stop = "student"): the strictest convention
    exchanged        as `student`, but before step 0 the rows of the two ids have changed places in
                     the student's embedding and LM head (exchange_stops = True), so that it ends as
                     the teacher does. `union` would be the same run, for the ids are the same then
    *_mask           each of these with terminal = "mask": the stop id that ends a response is not
                     in the loss

docs/stops.md says what this shows and what it does not. Runs, the figure stops.png, the table
stops_table.md and the paired differences stops_differences.md are in out/stops (out/stops_smollm);
what is finished is not run again. Intervals are 95 %, by a bootstrap over problems and seeds.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import cells
from plot import plt

CONDITIONS = {
    "union": ["--stop=union"],
    "student": ["--stop=student"],
    "exchanged": ["--stop=student", "--exchange_stops"],
}
CONDITIONS |= {f"{name}_mask": [*argv, "--terminal=mask"] for name, argv in CONDITIONS.items()}

COLUMNS = {                     # of the tables, {key of an evaluation: (heading, digits)}
    "avg_at_k": ("Avg@k", 3),
    "length": ("length", 1),
    "truncated": ("cut", 2),
    "entropy": ("entropy", 3),
    "entropy_before_box": ("before box", 3),
    "entropy_after_box": ("after box", 3),
}
PANELS = {                      # of the figure, {key: title}
    "length": "response length (tokens)",
    "entropy_before_box": "entropy up to the first box",
    "entropy_after_box": "entropy after the first box",
    "avg_at_k": "accuracy (Avg@k)",
}


def toy_world():
    """The demo's models and problems; its runs are those of `toy_runs`."""
    world = cells.small_world("toy")
    world.out = Path("out/stops")
    world.sample = world.grpo = []
    return world


def toy_runs(world):
    """{(run, condition): (folder's name, arguments of train_distill.py)}."""
    kinds = {
        f"{kl}, horizon {horizon}": ("student", lam, horizon)
        for kl, lam, horizon in (
            ("reverse KL", 1, world.long), ("lam = 0.2", 0.2, world.long),
            ("forward KL", 0, world.long), ("reverse KL", 1, world.short),
            ("forward KL", 0, world.short))}
    runs = {}
    once = f"--eval_every={world.base['max_steps']}"        # only the last evaluation is used
    for condition, options in CONDITIONS.items():
        for kind, (prefix, lam, horizon) in kinds.items():
            name = cells.name_of(prefix, lam, horizon, condition)
            argv = [*world.distil, f"--reverse_weight={lam}", f"--max_new_tokens={horizon}"]
            runs[kind, condition] = name, [*argv, *options, once]
        name = f"curriculum_{condition}"
        runs["curriculum", condition] = name, [*world.curriculum, *options, once]
    return runs


def real_world():
    """The real model's models and config; its runs are those of `real_runs`."""
    world = cells.small_world("smollm")
    world.out = Path("out/stops_smollm")
    world.distil = ["configs/smollm_stops.py"]
    world.curriculum = world.sample = world.grpo = []
    return world


SAME, PRUNED = "data/smollm/other_end", "data/smollm/pruned_other_end"


def real_runs(world):
    """
    As `toy_runs`. The student is its own teacher but for the id that ends a response (SAME); or it
    also lacks six of the teacher's layers (PRUNED).
    """
    reverse, forward = "--reverse_weight=1", "--reverse_weight=0"
    cases = [
        ("reverse KL", "student", SAME, [reverse]),
        ("reverse KL", "union", SAME, [reverse]),
        ("reverse KL", "exchanged", SAME, [reverse]),
        ("forward KL", "student", SAME, [forward]),
        ("teacher prefixes, reverse KL", "student", SAME, [reverse, "--prefix=teacher"]),
        ("pruned, reverse KL", "student", PRUNED, [reverse]),
        ("pruned, reverse KL", "exchanged", PRUNED, [reverse]),
    ]
    runs = {}
    for kind, condition, student, argv in cases:
        name = f"{kind} {condition}".replace(",", "").replace(" ", "_")
        options = [f"--student={student}", *argv, *CONDITIONS[condition]]
        runs[kind, condition] = name, [*world.distil, *options]
    return runs


# ----------------------------------------------------------------------------------------- numbers

def last_evaluation(folder):
    return cells.measured(max(Path(folder).glob("samples_student_*.jsonl")))


def resampled(seeds, key):
    """
    The mean over seeds of a number of an evaluation, (1 + resamples,): that of the sample, then
    those of resamples. seeds: what `cells.measured` returns, one for each seed.
    """
    return cells.over_seeds([cells.ratios(numbers[key]) for numbers in seeds])


def with_interval(ratios, digits, sign=""):
    """The value of the sample and its 95 % interval, as text; "-" where there is none."""
    if np.isnan(ratios[0]):
        return "-"
    low, high = np.nanpercentile(ratios[1:], [2.5, 97.5])
    return f"{ratios[0]:{sign}.{digits}f} ({low:{sign}.{digits}f} .. {high:{sign}.{digits}f})"


def table(results):
    """Markdown lines: a row for each run and condition, with intervals."""
    headings = " | ".join(heading for heading, _ in COLUMNS.values())
    lines = [f"| run | condition | seeds | {headings} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for (kind, condition), of_seeds in results.items():
        row = [with_interval(resampled(of_seeds.values(), key), digits)
               for key, (_, digits) in COLUMNS.items()]
        lines.append(f"| {kind} | `{condition}` | {len(of_seeds)} | {' | '.join(row)} |")
    return lines


def differences(results):
    """
    Markdown lines: each condition minus the strictest one, and `exchanged` minus `union`, paired by
    problems and by the seeds that both have.
    """
    headings = " | ".join(heading for heading, _ in COLUMNS.values())
    lines = [f"| run | difference | seeds | {headings} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for kind, condition in results:
        others = ["student"] if condition != "student" else []
        others += ["union"] if condition == "exchanged" else []
        for other in others:
            ours, theirs = results[kind, condition], results.get((kind, other), {})
            both = [seed for seed in ours if seed in theirs]
            if not both:
                continue
            row = []
            for key, (_, digits) in COLUMNS.items():
                sides = (resampled([side[seed] for seed in both], key) for side in (ours, theirs))
                row.append(with_interval(np.subtract(*sides), digits, "+"))
            lines.append(f"| {kind} | `{condition}` minus `{other}` | {len(both)} "
                         f"| {' | '.join(row)} |")
    return lines


def draw(results, out):
    """A point with its interval for each condition and run, in a panel for each number."""
    kinds = list(dict.fromkeys(kind for kind, _ in results))
    conditions = [name for name in CONDITIONS if any(name == c for _, c in results)]
    keys = [key for key in PANELS if any(
        arrays[key][1].sum() for of_seeds in results.values() for arrays in of_seeds.values())]
    figure, axes = plt.subplots(
        1, len(keys), figsize=(3.6 * len(keys), 1.2 + 0.65 * len(conditions)),
        layout="constrained", sharey=True)
    for axis, key in zip(axes, keys):
        for (kind, condition), of_seeds in results.items():
            ratios = resampled(of_seeds.values(), key)
            low, high = np.nanpercentile(ratios[1:], [2.5, 97.5])
            k = kinds.index(kind)
            y = -conditions.index(condition) - (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
            axis.plot([low, high], [y, y], color=f"C{k}", lw=1.5)
            axis.plot(ratios[0], y, "o", ms=4, color=f"C{k}", label=kind)
        for c in range(1, len(conditions)):
            axis.axhline(0.5 - c, color="0.8", lw=0.8)
        axis.set_title(PANELS[key], fontsize=10)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([-c for c in range(len(conditions))], conditions)
    handles, labels = axes[0].get_legend_handles_labels()
    once = dict(zip(labels, handles))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--jobs", type=int, default=cells.cores(), help="runs at a time")
    parser.add_argument("--world", choices=["toy", "smollm"], default="toy")
    parser.add_argument("--report", action="store_true",
                        help="run nothing: the tables and the figure of what is finished")
    args = parser.parse_args(argv)
    if args.world == "toy":
        world = toy_world()
        runs, models = toy_runs(world), []
    else:
        world = real_world()
        runs, models = real_runs(world), [PRUNED]
    if not args.report:
        cells.check_inputs(world, models)
        cells.execute([
            cells.Job("train_distill.py", world.out / str(seed) / name, [*argv, f"--seed={seed}"])
            for seed in args.seeds for name, argv in runs.values()], [""] * args.jobs)
    results = {}                                            # {(run, condition): {seed: arrays}}
    for kind in dict.fromkeys(kind for kind, _ in runs):
        for key in (key for key in runs if key[0] == kind):
            folders = {seed: world.out / str(seed) / runs[key][0] for seed in args.seeds}
            of_seeds = {seed: last_evaluation(folder) for seed, folder in folders.items()
                        if cells.is_finished(folder)}
            if of_seeds:
                results[key] = of_seeds
    if not results:
        sys.exit(f"error: no run in {world.out} is finished")
    draw(results, world.out / "stops.png")
    for name, make in (("stops_table", table), ("stops_differences", differences)):
        text = "\n".join(make(results)) + "\n"
        (world.out / f"{name}.md").write_text(text)
        print(text)
    print(f"in {world.out}: stops.png, stops_table.md, stops_differences.md")


if __name__ == "__main__":
    main()
