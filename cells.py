"""
The paper's comparisons in miniature: prefix source, KL direction, mixing, horizon, curriculum, for both stop conventions.

    python cells.py                                      # make cells: 36 runs on the toy world, half an hour on 2 cores
    python cells.py --rl --seeds 42 43 44                # make paper-toy: and GRPO from eight end points, three seeds; hours

Each run is a folder out/cells/SEED/NAME: prefix_lam_horizon_stop; curriculum_stop; strict_stop, a curriculum with a higher
floor that rolls back; grpo_prefix_lam_horizon. What is finished is not run again, what was cut short goes on from its last
checkpoint; to have a run again, delete its folder (and GRPO's after it). Then come figures, table.md and claims.md (the paper's
inequalities with our numbers), in out/cells too.

A = Avg@8, P = Pass@8, H = entropy (nats per token of the model's own responses, full softmax at T = 1), l = length (tokens),
of the last evaluation; R / F = reverse / forward KL (lam = 1 / 0), S / T = student / teacher prefixes.
"""

import argparse
import fcntl
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import plot
from configs.toy_curriculum import eval_max_new_tokens as LIMIT
from configs.toy_curriculum import horizons as RUNGS  # each is a fixed horizon too; the ends are "short" and "long"

SHORT, LONG = RUNGS[0], RUNGS[-1]
LAMS = (0, 0.2, 0.5, 0.8, 1)
STOPS = ("union", "student")
# what is no difference: 512 responses have a standard error of about 0.02 in A
TIE = {"A": 0.02, "P": 0.02, "H": 0.005, "l": 5}


def name_of(prefix, lam, horizon, stop):
    return f"{prefix}_{lam:g}_{horizon}_{stop}"


def distillation_runs():
    """{name: arguments of train_distill.py}; the order is that of the work."""
    runs = {}
    for stop in STOPS:
        for horizon in (LONG, SHORT, *RUNGS[1:-1]):
            for prefix, lam in [("teacher", 0), ("teacher", 1), *(("student", lam) for lam in reversed(LAMS))]:
                if horizon in (SHORT, LONG) or (prefix, lam) == ("student", 1):          # the rungs between: controls only
                    runs[name_of(prefix, lam, horizon, stop)] = [
                        "configs/toy_cells.py", f"--prefix={prefix}", f"--reverse_weight={lam}", f"--max_new_tokens={horizon}",
                        f"--stop={stop}", *(["--trajectories=out/cells/trajectories"] if prefix == "teacher" else [])]
        runs[f"curriculum_{stop}"] = ["configs/toy_curriculum.py", f"--stop={stop}"]
        runs[f"strict_{stop}"] = [*runs[f"curriculum_{stop}"], "--entropy_floor=0.85", "--on_gate_closed=rollback"]
    runs[name_of("student", 1, LONG, "union")].append("--eval_teacher=True")               # once, for the figures
    return runs


def grpo_runs(folder):
    """{name: arguments of rl_grpo.py}: from each corner, short and long."""
    return {f"grpo_{prefix}_{lam}_{horizon}": [
        "configs/toy_grpo.py", f"--student={folder}/{name_of(prefix, lam, horizon, 'union')}/last",
        "--eval_data=data/toy/hard.jsonl", "--eval_every=25"]
        for prefix in ("teacher", "student") for lam in (0, 1) for horizon in (SHORT, LONG)}


def check_inputs(out):
    """Exit where the runs in `out` were made from other configs or checkpoints than there are now."""
    files = sorted([*Path("configs").glob("toy_*.py"), *(path for path in Path("data/toy").rglob("*.*") if path.is_file())])
    inputs = "".join(f"{file} {zlib.crc32(file.read_bytes())}\n" for file in files)
    record = out / "inputs.txt"
    if record.exists() and record.read_text() != inputs:
        sys.exit(f"error: {out} was made with other configs or toy models than there are now; delete it, or move it away")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(inputs)


def execute(jobs, work):
    """Run (script, folder, arguments) commands, `jobs` at a time on one thread each. Exits when one of them fails."""
    todo = [job for job in work if not (job[1] / "finished").exists()]
    print(f"{len(work)} runs, {len(work) - len(todo)} finished before", flush=True)

    def one(number, job):
        (script, folder, argv), started = job, time.time()
        go_on = [] if script == "sample.py" else ["--resume"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log:
            try:                                         # held by the run itself, should this script be killed before it
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: another process is running it", flush=True)
                return 1
            code = subprocess.run([sys.executable, script, *argv, f"--out_dir={folder}", *go_on], stdout=log, stderr=log,
                                  env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}).returncode
        if code == 0:
            (folder / "finished").touch()
        failed = f": failed, see {folder}.log" if code else ""
        print(f"[{number:>3}/{len(todo)}] {folder} {time.time() - started:.0f} s{failed}", flush=True)
        return code
    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(one, range(1, len(todo) + 1), todo))
        except KeyboardInterrupt:                        # the runs got it too
            pool.shutdown(cancel_futures=True)
            sys.exit("interrupted; the same command goes on")
    if any(codes):
        sys.exit("error: some runs failed; mend the cause and give the same command: the others are kept")


# --------------------------------------------------------------------------------------------------------------- figures

def draw(folder, out, rl):
    """The figures, from the runs of one seed."""
    def runs(pairs):
        return {label: plot.read_run(folder / name) for label, name in pairs.items()}

    def corners(horizon, stop):
        return runs({f"{prefix} prefixes, {kl} KL": name_of(prefix, lam, horizon, stop)
                     for prefix in ("teacher", "student") for kl, lam in (("forward", 0), ("reverse", 1))})

    def mixes(horizon, stop):
        return runs({f"lam = {lam:g}": name_of("student", lam, horizon, stop) for lam in LAMS})

    def ladder(stop):
        return runs({f"horizon {rung}": name_of("student", 1, rung, stop) for rung in RUNGS}
                    | {"curriculum": f"curriculum_{stop}", "strict curriculum": f"strict_{stop}"})
    names = ["accuracy", "entropy", "length"]
    each = [(f"horizon {horizon}", horizon, stop) for stop in STOPS for horizon in (SHORT, LONG)]
    for file, make in (("cells.png", corners), ("mixing.png", mixes)):
        plot.draw({f"{title}, stop = {stop}": make(horizon, stop) for title, horizon, stop in each}, names, out / file)
    plot.draw({f"stop = {stop}": ladder(stop) for stop in STOPS}, [*names, "horizon"], out / "curriculum.png")
    both = {"reverse KL": (1, LONG), "lam = 0.2": (0.2, LONG), "forward KL": (0, LONG)}
    plot.draw({f"stop = {stop}": runs({label: name_of("student", *key, stop) for label, key in both.items()} | {
        "curriculum": f"curriculum_{stop}"}) for stop in STOPS},
        ["accuracy", "entropy", "entropy_before_box", "entropy_after_box", "length"], out / "stops.png")
    plot.draw({f"horizon {horizon}": corners(horizon, "union") for horizon in (SHORT, LONG)}, names, out / "tflops.png",
              x="tflops")
    if rl:
        plot.draw({f"GRPO after horizon {horizon}": runs({
            f"from {prefix} prefixes, {kl} KL": f"grpo_{prefix}_{lam}_{horizon}"
            for prefix in ("teacher", "student") for kl, lam in (("forward", 0), ("reverse", 1))})
            for horizon in (SHORT, LONG)}, names, out / "grpo.png")


# ------------------------------------------------------------------------------------------------- table and claims

def table(results, seeds):
    """Lines of a markdown table: the last evaluation of each run, over seeds the mean (and the range)."""
    def cell(values, digits):
        values = [v for v in values if v is not None]
        if not values:
            return "-"
        text = f"{sum(values) / len(values):.{digits}f}"
        return text if len(seeds) == 1 else f"{text} ({min(values):.{digits}f} - {max(values):.{digits}f})"
    lines = ["| run | Avg@8 | Pass@8 | length | entropy | before box | after box | after box, tokens | truncated | TFLOPs |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for name in results[seeds[0]]:
        last = [results[seed][name]["student"][-1] for seed in seeds]
        lines.append(f"| `{name}` | " + " | ".join(cell([e[key] for e in last], digits) for key, digits in (
            ("avg_at_k", 3), ("pass_at_k", 3), ("length", 1), ("entropy", 3), ("entropy_before_box", 3),
            ("entropy_after_box", 3), ("tokens_after_box", 1), ("truncated", 3), ("tflops", 2))) + " |")
    return lines


def claims(runs, stop, rl):
    """The paper's inequalities on one seed: (number of the claim, what is compared, left side, right side, verdict)."""
    rows = []

    def last(prefix, lam, horizon, key):
        return runs[name_of(prefix, lam, horizon, stop)]["student"][-1][key]

    def mean(key, horizon, prefix=None, lam=None):       # over what is not named
        values = [last(p, x, horizon, key) for p in ("teacher", "student") for x in (0, 1)
                  if prefix in (None, p) and lam in (None, x)]
        return sum(values) / len(values)

    def at(run, tflops):                                 # accuracy, linear between evaluations
        return float(np.interp(tflops, [e["tflops"] for e in run], [e["avg_at_k"] for e in run]))

    def more(claim, text, left, right):                  # the quantity is the first letter in the text
        tie = next(TIE[c] for c in text if c in TIE)
        rows.append((claim, text, left, right, "tie" if abs(left - right) <= tie else "holds" if left > right else "**fails**"))

    def about(claim, text, left, right):
        rows.append((claim, text, left, right, "holds" if abs(left - right) <= 2 * TIE[text[0]] else "**fails**"))
    A, P, H, L = "avg_at_k", "pass_at_k", "entropy", "length"
    gaps = {h: mean(A, h, lam=1) - mean(A, h, lam=0) for h in (SHORT, LONG)}
    gains = {lam: mean(A, LONG, lam=lam) - mean(A, SHORT, lam=lam) for lam in (0, 1)}
    more(2, "A(R) > A(F), short", mean(A, SHORT, lam=1), mean(A, SHORT, lam=0))
    more(2, "A(R) > A(F), long", mean(A, LONG, lam=1), mean(A, LONG, lam=0))
    more(2, "A(R) - A(F): short > long", gaps[SHORT], gaps[LONG])
    about(3, "P(R) about P(F), short", mean(P, SHORT, lam=1), mean(P, SHORT, lam=0))
    more(3, "P(F) > P(R), long", mean(P, LONG, lam=0), mean(P, LONG, lam=1))
    for prefix in ("teacher", "student"):
        for horizon, text in ((SHORT, "short"), (LONG, "long")):
            more(4, f"H(F) > H(R), {prefix} prefixes, {text}", last(prefix, 0, horizon, H), last(prefix, 1, horizon, H))
    more(4, "H(S-F) > 2 H(S-R), long: collapse", last("student", 0, LONG, H), 2 * last("student", 1, LONG, H))
    more(5, "l(S-R, long) > 0.9 of the limit", last("student", 1, LONG, L), 0.9 * LIMIT)
    more(5, "l: 0.9 of the limit > l(S-R, short)", 0.9 * LIMIT, last("student", 1, SHORT, L))
    more(6, "A(S) > A(T), long", mean(A, LONG, prefix="student"), mean(A, LONG, prefix="teacher"))
    about(6, "A(S) about A(T), short", mean(A, SHORT, prefix="student"), mean(A, SHORT, prefix="teacher"))
    more(6, "P(S) > P(T), long", mean(P, LONG, prefix="student"), mean(P, LONG, prefix="teacher"))
    for horizon, text in ((SHORT, "short"), (LONG, "long")):
        more(7, f"H moves more with direction than with prefix, {text}", abs(mean(H, horizon, lam=0) - mean(H, horizon, lam=1)),
             abs(mean(H, horizon, prefix="student") - mean(H, horizon, prefix="teacher")))
    more(8, "A(long) > A(short), R", mean(A, LONG, lam=1), mean(A, SHORT, lam=1))
    more(8, "A(long) > A(short), F", mean(A, LONG, lam=0), mean(A, SHORT, lam=0))
    more(8, "A(long) - A(short): F > R", gains[0], gains[1])
    for lam, kl in ((0, "F"), (1, "R")):
        teacher, student = (runs[name_of(prefix, lam, LONG, stop)]["student"] for prefix in ("teacher", "student"))
        for part, text in ((0.5, "half of"), (1, "all of")):
            spent = part * teacher[-1]["tflops"]
            more(9, f"A(T) > A(S), {kl}, long, with {text} T's TFLOPs", at(teacher, spent), at(student, spent))
        more(9, f"A(S) > A(T), {kl}, long, at the last step", student[-1][A], teacher[-1][A])
    if rl and stop == "union":
        gained, began = {}, {}
        for lam in (0, 1):
            parts = [runs[f"grpo_{prefix}_{lam}_{h}"]["student"] for prefix in ("teacher", "student") for h in (SHORT, LONG)]
            gained[lam] = sum(run[-1][A] - run[0][A] for run in parts) / len(parts)
            began[lam] = sum(run[0][H] for run in parts) / len(parts)
        more(10, "A gained by GRPO: from F > from R", gained[0], gained[1])
        more(10, "A gained by GRPO: 0 > from R", 0, gained[1])
        more(11, "H at GRPO's step 0: F > R", began[0], began[1])
    about(12, "A(0.2) about A(1)", last("student", 0.2, LONG, A), last("student", 1, LONG, A))
    more(12, "A(0.2) > A(0)", last("student", 0.2, LONG, A), last("student", 0, LONG, A))
    more(12, "H(0.2) > H(1)", last("student", 0.2, LONG, H), last("student", 1, LONG, H))
    more(12, "l(1) > l(0.2)", last("student", 1, LONG, L), last("student", 0.2, LONG, L))
    more(12, "l(0.5) > l(0.2)", last("student", 0.5, LONG, L), last("student", 0.2, LONG, L))
    curriculum = runs[f"curriculum_{stop}"]["student"][-1]
    more(13, "A(curriculum) > A(S-R, long)", curriculum[A], last("student", 1, LONG, A))
    more(13, "A(curriculum) > A(S-R, long), with the curriculum's TFLOPs", curriculum[A],
         at(runs[name_of("student", 1, LONG, stop)]["student"], curriculum["tflops"]))
    more(13, "P(curriculum) > P(S-R, long)", curriculum[P], last("student", 1, LONG, P))
    more(13, "l(S-R, long) > l(curriculum)", last("student", 1, LONG, L), curriculum[L])
    return rows


def report(results, seeds, rl):
    """Lines of a markdown table: for each claim and stop convention left side, right side (means over seeds) and verdict."""
    cells = {}                                           # {(claim, text): {stop: cell}}
    for stop in STOPS:
        for rows in zip(*(claims(results[seed], stop, rl) for seed in seeds)):
            left, right = (sum(row[i] for row in rows) / len(rows) for i in (2, 3))
            verdicts = [row[4] for row in rows]
            counted = ", ".join(f"{v} {verdicts.count(v)}" if len(seeds) > 1 else v for v in dict.fromkeys(sorted(verdicts)))
            cells.setdefault(rows[0][:2], {})[stop] = f"{left:.3g}, {right:.3g}: {counted}"
    return ["| claim | left, right side | " + " | ".join(f"stop = {stop}" for stop in STOPS) + " |", "|---|---|---|---|"] + [
        f"| {number} | {text} | " + " | ".join(row.get(stop, "-") for stop in STOPS) + " |"
        for (number, text), row in cells.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--rl", action="store_true", help="GRPO from the eight end points as well")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                        else os.cpu_count(), help="runs at a time, on one thread each")
    args = parser.parse_args()
    out = Path("out/cells")
    check_inputs(out)
    execute(1, [("sample.py", out / "trajectories", ["configs/toy_sample.py"])])
    folders = {seed: out / str(seed) for seed in args.seeds}
    runs = distillation_runs()
    execute(args.jobs, [("train_distill.py", folder / name, [*argv, f"--seed={seed}"]) for seed, folder in folders.items()
                        for name, argv in runs.items()])
    rl = {seed: grpo_runs(folder) if args.rl else {} for seed, folder in folders.items()}
    execute(args.jobs, [("rl_grpo.py", folders[seed] / name, [*argv, f"--seed={seed}"]) for seed in rl
                        for name, argv in rl[seed].items()])
    results = {seed: {name: plot.read_run(folder / name) for name in (*runs, *rl[seed])} for seed, folder in folders.items()}
    draw(folders[args.seeds[0]], out, args.rl)
    for file, lines in (("table.md", table(results, args.seeds)), ("claims.md", report(results, args.seeds, args.rl))):
        (out / file).write_text("\n".join(lines) + "\n")
    print((out / "claims.md").read_text())
    print(f"in {out}: table.md, claims.md, cells.png, mixing.png, curriculum.png, stops.png, tflops.png"
          + (", grpo.png" if args.rl else ""))


if __name__ == "__main__":
    main()
