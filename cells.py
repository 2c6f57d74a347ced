"""
The paper's comparisons in miniature: prefix source, KL direction, mixing, horizon and curriculum,
for both stop conventions.

    python cells.py                                      # make cells: 36 runs on the toy world,
                                                         # half an hour on 2 cores
    python cells.py --rl --seeds 42 43 44                # make paper-toy: three seeds, and GRPO
                                                         # from eight end points each; hours
    python cells.py --world smollm --rl                  # make real-cells: a real language model,
                                                         # after make real; hours

Each run is a folder out/cells/SEED/NAME (out/cells_smollm of that world). The names are
prefix_lam_horizon_stop; hard_horizon_stop, SFT on the teacher's tokens alone; curriculum_stop;
strict_stop, a curriculum with a higher floor that rolls back; and grpo_prefix_lam_horizon.

A finished run is not run again, and one that was cut short goes on from its last checkpoint. To
have a run again, delete its folder (and those of the GRPO runs that begin from it). The figures,
table.md and claims.md (the paper's inequalities with our numbers) come to the same folder.

A = Avg@8, P = Pass@8, H = entropy (nats per token of the model's own responses, full softmax at
T = 1), l = length (tokens), all of the last evaluation; R / F = reverse / forward KL (lam = 1 / 0);
S / T = student / teacher prefixes.
"""

import argparse
import fcntl
import importlib
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import plot

PREFIXES = ("teacher", "student")
DIRECTIONS = (("forward", 0), ("reverse", 1))            # the ends of LAMS


def use_world(name):
    """
    Set what differs between the worlds: lengths, from configs/NAME_curriculum.py, the amounts of
    reverse KL, stop conventions, the arguments of GRPO, and where everything goes.
    """
    global CONFIGS, PARENT, OUT, RUNGS, SHORT, LONG, LIMIT, LAMS, STOPS, HARD, GRPO
    curriculum = importlib.import_module(f"configs.{name}_curriculum")
    CONFIGS = f"configs/{name}"
    PARENT = importlib.import_module(f"configs.{name}_cells")    # models and problems of all runs
    RUNGS = curriculum.horizons                          # each is a fixed horizon too
    SHORT, LONG = RUNGS[0], RUNGS[-1]
    LIMIT = curriculum.eval_max_new_tokens
    if name == "toy":
        OUT = Path("out/cells")
        LAMS = (0, 0.2, 0.5, 0.8, 1)
        STOPS = ("union", "student")
        HARD = False
        GRPO = ["--eval_data=data/toy/hard.jsonl", "--eval_every=25"]
    else:
        OUT = Path(f"out/cells_{name}")
        LAMS = (0, 0.2, 0.5, 1)
        STOPS = ("union",)                               # student and teacher have the same
        HARD = True
        GRPO = ["--max_steps=20"]


use_world("toy")

# Differences up to these count as none: A over 512 responses has a standard error of about 0.02.
TIE = {"A": 0.02, "P": 0.02, "H": 0.005, "l": 5}


def name_of(prefix, lam, horizon, stop):
    return f"{prefix}_{lam:g}_{horizon}_{stop}"


def distillation_runs():
    """{name: arguments of train_distill.py}, in the order of the work."""
    cells = [("teacher", 0), ("teacher", 1), *(("student", lam) for lam in reversed(LAMS))]
    runs = {}
    for stop in STOPS:
        for horizon in (LONG, SHORT, *RUNGS[1:-1]):
            for prefix, lam in cells:
                # The rungs between the ends are controls for the curriculum only.
                if horizon not in (SHORT, LONG) and (prefix, lam) != ("student", 1):
                    continue
                argv = [
                    f"{CONFIGS}_cells.py", f"--prefix={prefix}", f"--reverse_weight={lam}",
                    f"--max_new_tokens={horizon}", f"--stop={stop}"]
                if prefix == "teacher":
                    argv.append(f"--trajectories={OUT}/trajectories")
                runs[name_of(prefix, lam, horizon, stop)] = argv
        if HARD:
            forward = runs[name_of("teacher", 0, LONG, stop)]
            runs[f"hard_{LONG}_{stop}"] = [*forward, "--teacher=None"]
        curriculum = [f"{CONFIGS}_curriculum.py", f"--stop={stop}"]
        runs[f"curriculum_{stop}"] = curriculum
        runs[f"strict_{stop}"] = [
            *curriculum, "--entropy_floor=0.85", "--on_gate_closed=rollback"]
    runs[name_of("student", 1, LONG, "union")].append("--eval_teacher=True")     # for the figures
    return runs


def grpo_runs(folder):
    """{name: arguments of rl_grpo.py}: from each corner, short and long."""
    runs = {}
    for prefix in PREFIXES:
        for _, lam in DIRECTIONS:
            for horizon in (SHORT, LONG):
                student = folder / name_of(prefix, lam, horizon, "union") / "last"
                runs[f"grpo_{prefix}_{lam}_{horizon}"] = [
                    f"{CONFIGS}_grpo.py", f"--student={student}", *GRPO]
    return runs


def check_inputs(out):
    """Exit if the runs in `out` were made from other configs or models than there are now."""
    files = [Path(f"{CONFIGS}_{name}.py") for name in ("cells", "curriculum", "grpo", "sample")]
    files += [Path(PARENT.prompts), Path(PARENT.eval_data)]
    for folder in (PARENT.student, PARENT.teacher):
        files += sorted(Path(folder).glob("*.json")) + sorted(Path(folder).glob("*.safetensors"))
    inputs = "".join(f"{file} {zlib.crc32(file.read_bytes())}\n" for file in files)
    record = out / "inputs.txt"
    if record.exists() and record.read_text() != inputs:
        sys.exit(f"error: {out} was made with other configs or models than there are now; "
                 f"delete it, or move it away")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(inputs)


def cores():
    """Of this machine, that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)    # not on every system
    return len(affinity(0)) if affinity else os.cpu_count()


def execute(jobs, work):
    """
    Run the commands (script, folder, arguments), `jobs` at a time, on one thread each. Exits when
    one of them fails.
    """
    todo = [job for job in work if not (job[1] / "finished").exists()]
    print(f"{len(work)} runs, {len(work) - len(todo)} finished before", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run_one(number, job):
        script, folder, argv = job
        command = [sys.executable, script, *argv, f"--out_dir={folder}"]
        if script != "sample.py":                        # which always goes on
            command.append("--resume")
        started = time.time()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log:
            # The run inherits the lock, and holds it should this script be killed before the run.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: another process is running it", flush=True)
                return 1
            code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        if code == 0:
            (folder / "finished").touch()
        seconds = time.time() - started
        failed = f": failed, see {folder}.log" if code else ""
        print(f"[{number:>3}/{len(todo)}] {folder} {seconds:.0f} s{failed}", flush=True)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(run_one, range(1, len(todo) + 1), todo))
        except KeyboardInterrupt:                        # the runs have received it too
            pool.shutdown(cancel_futures=True)
            sys.exit("interrupted; the same command goes on")
    if any(codes):
        sys.exit("error: some runs failed; mend the cause and give the same command: "
                 "the others are kept")


# ---------------------------------------------------------------------------------------- figures

def draw(folder, out, rl):
    """The figures, from the runs of one seed."""
    def read(names):
        return {label: plot.read_run(folder / name) for label, name in names.items()}

    def corners(horizon, stop):
        return read({
            f"{prefix} prefixes, {kl} KL": name_of(prefix, lam, horizon, stop)
            for prefix in PREFIXES for kl, lam in DIRECTIONS})

    def mixes(horizon, stop):
        return read({f"lam = {lam:g}": name_of("student", lam, horizon, stop) for lam in LAMS})

    def ladder(stop):
        names = {f"horizon {rung}": name_of("student", 1, rung, stop) for rung in RUNGS}
        names["curriculum"] = f"curriculum_{stop}"
        names["strict curriculum"] = f"strict_{stop}"
        return read(names)

    def after_grpo(horizon):
        return read({
            f"from {prefix} prefixes, {kl} KL": f"grpo_{prefix}_{lam}_{horizon}"
            for prefix in PREFIXES for kl, lam in DIRECTIONS})

    names = ["accuracy", "entropy", "length"]
    for file, make in (("cells.png", corners), ("mixing.png", mixes)):
        rows = {}
        for stop in STOPS:
            for horizon in (SHORT, LONG):
                rows[f"horizon {horizon}, stop = {stop}"] = make(horizon, stop)
        plot.draw(rows, names, out / file)

    rows = {f"stop = {stop}": ladder(stop) for stop in STOPS}
    plot.draw(rows, [*names, "horizon"], out / "curriculum.png")

    rows = {f"horizon {horizon}": corners(horizon, "union") for horizon in (SHORT, LONG)}
    plot.draw(rows, names, out / "tflops.png", x="tflops")

    if rl:
        rows = {f"GRPO after horizon {horizon}": after_grpo(horizon) for horizon in (SHORT, LONG)}
        plot.draw(rows, names, out / "grpo.png")


# -------------------------------------------------------------------------------- table and claims

COLUMNS = (                                              # heading, key of an evaluation, digits
    ("Avg@8", "avg_at_k", 3),
    ("Pass@8", "pass_at_k", 3),
    ("length", "length", 1),
    ("entropy", "entropy", 3),
    ("before box", "entropy_before_box", 3),
    ("after box", "entropy_after_box", 3),
    ("after box, tokens", "tokens_after_box", 1),
    ("truncated", "truncated", 3),
    ("TFLOPs", "tflops", 2))


def table(results, seeds):
    """Lines of a markdown table: each run's last evaluation, over seeds the mean (and range)."""
    def cell(values, digits):
        values = [v for v in values if v is not None]
        if not values:
            return "-"
        mean = f"{sum(values) / len(values):.{digits}f}"
        if len(seeds) == 1:
            return mean
        return f"{mean} ({min(values):.{digits}f} - {max(values):.{digits}f})"

    first = next(iter(results[seeds[0]].values()))["student"][-1]
    headings = " | ".join(heading.replace("@8", f"@{first['k']}") for heading, _, _ in COLUMNS)
    lines = [f"| run | {headings} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in results[seeds[0]]:
        last = [results[seed][name]["student"][-1] for seed in seeds]
        cells = [cell([e[key] for e in last], digits) for _, key, digits in COLUMNS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def claims(runs, stop, rl):
    """
    The paper's inequalities on one seed: rows of (number of the claim, what is compared, left side,
    right side, verdict). It is long because it is a list: a line for each inequality.
    """
    A, P, H, L = "avg_at_k", "pass_at_k", "entropy", "length"
    rows = []

    def more(claim, text, left, right):
        """left > right; the tolerance is that of the first of the letters A, P, H, l in `text`."""
        tie = next(TIE[letter] for letter in text if letter in TIE)
        if abs(left - right) <= tie:
            verdict = "tie"
        else:
            verdict = "holds" if left > right else "**fails**"
        rows.append((claim, text, left, right, verdict))

    def about(claim, text, left, right):
        """left = right within twice the tolerance."""
        equal = abs(left - right) <= 2 * TIE[text[0]]
        rows.append((claim, text, left, right, "holds" if equal else "**fails**"))

    def evaluations(prefix, lam, horizon):
        return runs[name_of(prefix, lam, horizon, stop)]["student"]

    def last(prefix, lam, horizon, key):
        return evaluations(prefix, lam, horizon)[-1][key]

    def mean(key, horizon, prefix=None, lam=None):
        """Over both prefix sources where `prefix` is None, both directions where `lam` is."""
        prefixes = PREFIXES if prefix is None else (prefix,)
        lams = (0, 1) if lam is None else (lam,)
        values = [last(p, x, horizon, key) for p in prefixes for x in lams]
        return sum(values) / len(values)

    def accuracy_at(run, tflops):
        """Linear between evaluations."""
        spent = [e["tflops"] for e in run]
        return float(np.interp(tflops, spent, [e[A] for e in run]))

    gap_short = mean(A, SHORT, lam=1) - mean(A, SHORT, lam=0)
    gap_long = mean(A, LONG, lam=1) - mean(A, LONG, lam=0)
    more(2, "A(R) > A(F), short", mean(A, SHORT, lam=1), mean(A, SHORT, lam=0))
    more(2, "A(R) > A(F), long", mean(A, LONG, lam=1), mean(A, LONG, lam=0))
    more(2, "A(R) - A(F): short > long", gap_short, gap_long)

    about(3, "P(R) about P(F), short", mean(P, SHORT, lam=1), mean(P, SHORT, lam=0))
    more(3, "P(F) > P(R), long", mean(P, LONG, lam=0), mean(P, LONG, lam=1))

    for prefix in PREFIXES:
        for horizon, text in ((SHORT, "short"), (LONG, "long")):
            more(4, f"H(F) > H(R), {prefix} prefixes, {text}",
                 last(prefix, 0, horizon, H), last(prefix, 1, horizon, H))
    more(4, "H(S-F) > 2 H(S-R), long: collapse",
         last("student", 0, LONG, H), 2 * last("student", 1, LONG, H))

    more(5, "l(S-R, long) > 0.9 of the limit", last("student", 1, LONG, L), 0.9 * LIMIT)
    more(5, "l: 0.9 of the limit > l(S-R, short)", 0.9 * LIMIT, last("student", 1, SHORT, L))

    more(6, "A(S) > A(T), long", mean(A, LONG, prefix="student"), mean(A, LONG, prefix="teacher"))
    about(6, "A(S) about A(T), short",
          mean(A, SHORT, prefix="student"), mean(A, SHORT, prefix="teacher"))
    more(6, "P(S) > P(T), long", mean(P, LONG, prefix="student"), mean(P, LONG, prefix="teacher"))

    for horizon, text in ((SHORT, "short"), (LONG, "long")):
        by_direction = mean(H, horizon, lam=0) - mean(H, horizon, lam=1)
        by_prefix = mean(H, horizon, prefix="student") - mean(H, horizon, prefix="teacher")
        more(7, f"H moves more with direction than with prefix, {text}",
             abs(by_direction), abs(by_prefix))

    gain_forward = mean(A, LONG, lam=0) - mean(A, SHORT, lam=0)
    gain_reverse = mean(A, LONG, lam=1) - mean(A, SHORT, lam=1)
    more(8, "A(long) > A(short), R", mean(A, LONG, lam=1), mean(A, SHORT, lam=1))
    more(8, "A(long) > A(short), F", mean(A, LONG, lam=0), mean(A, SHORT, lam=0))
    more(8, "A(long) - A(short): F > R", gain_forward, gain_reverse)

    for lam, kl in ((0, "F"), (1, "R")):
        teacher = evaluations("teacher", lam, LONG)
        student = evaluations("student", lam, LONG)
        for part, text in ((0.5, "half of"), (1, "all of")):
            spent = part * teacher[-1]["tflops"]
            more(9, f"A(T) > A(S), {kl}, long, with {text} T's TFLOPs",
                 accuracy_at(teacher, spent), accuracy_at(student, spent))
        more(9, f"A(S) > A(T), {kl}, long, at the last step", student[-1][A], teacher[-1][A])

    if rl and stop == "union":
        gained, began = {}, {}
        for lam in (0, 1):
            starts = [(prefix, horizon) for prefix in PREFIXES for horizon in (SHORT, LONG)]
            after = [runs[f"grpo_{prefix}_{lam}_{horizon}"]["student"]
                     for prefix, horizon in starts]
            gained[lam] = sum(run[-1][A] - run[0][A] for run in after) / len(after)
            began[lam] = sum(run[0][H] for run in after) / len(after)
        more(10, "A gained by GRPO: from F > from R", gained[0], gained[1])
        more(10, "A gained by GRPO: 0 > from R", 0, gained[1])
        more(11, "H at GRPO's step 0: F > R", began[0], began[1])

    about(12, "A(0.2) about A(1)", last("student", 0.2, LONG, A), last("student", 1, LONG, A))
    more(12, "A(0.2) > A(0)", last("student", 0.2, LONG, A), last("student", 0, LONG, A))
    more(12, "H(0.2) > H(1)", last("student", 0.2, LONG, H), last("student", 1, LONG, H))
    more(12, "l(1) > l(0.2)", last("student", 1, LONG, L), last("student", 0.2, LONG, L))
    more(12, "l(0.5) > l(0.2)", last("student", 0.5, LONG, L), last("student", 0.2, LONG, L))

    curriculum = runs[f"curriculum_{stop}"]["student"][-1]
    same_tflops = accuracy_at(evaluations("student", 1, LONG), curriculum["tflops"])
    more(13, "A(curriculum) > A(S-R, long)", curriculum[A], last("student", 1, LONG, A))
    more(13, "A(curriculum) > A(S-R, long), with the curriculum's TFLOPs",
         curriculum[A], same_tflops)
    more(13, "P(curriculum) > P(S-R, long)", curriculum[P], last("student", 1, LONG, P))
    more(13, "l(S-R, long) > l(curriculum)", last("student", 1, LONG, L), curriculum[L])
    return rows


def report(results, seeds, rl):
    """
    Lines of a markdown table: for each claim and stop convention left side and right side (means
    over seeds), and the verdict.
    """
    cells = {}                                           # {(claim, text): {stop: cell}}
    for stop in STOPS:
        of_seeds = [claims(results[seed], stop, rl) for seed in seeds]
        for rows in zip(*of_seeds):
            left = sum(row[2] for row in rows) / len(rows)
            right = sum(row[3] for row in rows) / len(rows)
            verdicts = sorted(row[4] for row in rows)
            counted = verdicts[0]
            if len(seeds) > 1:
                counts = {verdict: verdicts.count(verdict) for verdict in verdicts}
                counted = ", ".join(f"{verdict} {count}" for verdict, count in counts.items())
            claim_and_text = rows[0][:2]
            cells.setdefault(claim_and_text, {})[stop] = f"{left:.3g}, {right:.3g}: {counted}"

    headings = " | ".join(f"stop = {stop}" for stop in STOPS)
    lines = [f"| claim | left, right side | {headings} |", "|---|---|---|---|"]
    for (number, text), row in cells.items():
        of_stops = " | ".join(row.get(stop, "-") for stop in STOPS)
        lines.append(f"| {number} | {text} | {of_stops} |")
    return lines


def beside_the_toy(lines, path="docs/claims.md"):
    """The toy world's table of claims with the last column of this one's added."""
    cells = {}
    for line in lines:
        *row, verdict = line.strip("| ").split(" | ")
        cells[tuple(row[:2])] = verdict
    joined = []
    for number, line in enumerate(Path(path).read_text().strip().split("\n")):
        key = tuple(line.strip("| ").split(" | ")[:2])
        ours = cells.get(key, "-") if number else "a real language model"
        joined.append(line + ("---|" if number == 1 else f" {ours} |"))
    return joined


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--rl", action="store_true", help="GRPO from the eight end points as well")
    parser.add_argument("--jobs", type=int, default=cores(),
                        help="runs at a time, on one thread each")
    parser.add_argument("--world", choices=["toy", "smollm"], default="toy")
    args = parser.parse_args()
    use_world(args.world)

    out = OUT
    check_inputs(out)
    folders = {seed: out / str(seed) for seed in args.seeds}
    runs = distillation_runs()
    rl_runs = {seed: grpo_runs(folder) if args.rl else {} for seed, folder in folders.items()}

    execute(1, [("sample.py", out / "trajectories", [f"{CONFIGS}_sample.py"])])
    execute(args.jobs, [
        ("train_distill.py", folder / name, [*argv, f"--seed={seed}"])
        for seed, folder in folders.items() for name, argv in runs.items()])
    execute(args.jobs, [
        ("rl_grpo.py", folder / name, [*argv, f"--seed={seed}"])
        for seed, folder in folders.items() for name, argv in rl_runs[seed].items()])

    results = {}
    for seed, folder in folders.items():
        names = [*runs, *rl_runs[seed]]
        results[seed] = {name: plot.read_run(folder / name) for name in names}
    draw(folders[args.seeds[0]], out, args.rl)
    (out / "table.md").write_text("\n".join(table(results, args.seeds)) + "\n")
    lines = report(results, args.seeds, args.rl)
    if args.world != "toy":
        lines = beside_the_toy(lines)
    (out / "claims.md").write_text("\n".join(lines) + "\n")
    print((out / "claims.md").read_text())
    print(f"in {out}: table.md, claims.md, cells.png, mixing.png, curriculum.png, "
          f"tflops.png" + (", grpo.png" if args.rl else ""))


if __name__ == "__main__":
    main()
