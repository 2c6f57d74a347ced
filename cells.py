"""
The paper's comparisons: prefix source, KL direction, mixing, horizon and curriculum; in miniature,
or the whole grid on GPUs.

    python cells.py                                      # make cells: 36 runs on the toy world of
                                                         # data/prices.py, 17 minutes on 2 cores
    python cells.py --rl --seeds 42 43 44                # make paper-toy: three seeds, and GRPO
                                                         # from 16 end points each; 86 minutes
    python cells.py --world smollm --rl                  # make real-cells: a real language model,
                                                         # after make real; hours
    python cells.py --base configs/opd_4b.py --rl --gpus 0,1,2,3,4,5,6,7    # the paper's grid

Each run is a folder out/cells/SEED/NAME (out/cells_smollm, or out/cells_opd_4b of these). Names are
prefix_lam_horizon_stop; hard_horizon_stop, SFT on the teacher's tokens alone; curriculum_stop;
strict_stop, a curriculum with a higher floor that rolls back; grpo_prefix_lam_horizon, with _stop
where that is not union; and, with --base, eval_NAME, a run's last checkpoint on the benchmarks.

Every run is a process on a GPU of its own (without --gpus: on a thread), and begins when those that
it needs have ended. A finished run is not run again, and one that was cut short goes on from its
last checkpoint, on any machine that has the folder. To have a run again, delete its folder (and
those of the runs that begin from it). The figures, table.md, claims.md (the paper's inequalities
with our numbers) and, with --base, paper.md (the paper's table with ours) come to the same folder.

A = Avg@k, P = Pass@k, H = entropy (nats per token of the model's own responses, full softmax at
T = 1), l = length (tokens), all of the last evaluation; R / F = reverse / forward KL (lam = 1 / 0);
S / T = student / teacher prefixes.
"""

import argparse
import dataclasses
import fcntl
import functools
import json
import os
import runpy
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

import plot

PREFIXES = ("teacher", "student")
DIRECTIONS = (("forward", 0), ("reverse", 1))            # the ends of `lams`


@dataclasses.dataclass
class World:
    """
    Models, problems and configs of a set of runs. The configs are files, with options after them;
    `distil` has what all runs have in common: prefix, lam, horizon and stop are set here.
    """

    out: Path
    distil: list
    curriculum: list
    sample: list
    grpo: list
    evaluate: list                                       # [] where no benchmark is run
    rungs: tuple                                         # horizons, short to long
    lams: tuple = (0, 0.2, 0.5, 0.8, 1)
    stops: tuple = ("union",)
    is_grid: bool = False                                # the paper's runs and no controls
    hard: bool = False                                   # also SFT on the teacher's tokens

    @property
    def short(self):
        return self.rungs[0]

    @property
    def long(self):
        return self.rungs[-1]

    @functools.cached_property
    def base(self):
        """What the config file of all runs assigns, {name: value}."""
        return runpy.run_path(self.distil[0])


def small_world(name):
    """
    A toy world, that of data/prices.py ("prices") or the demo's ("toy", for stops.py), or the real
    language model of make real ("smollm").
    """
    curriculum = runpy.run_path(f"configs/{name}_curriculum.py")
    world = World(
        Path("out/cells"), [f"configs/{name}_cells.py"], [f"configs/{name}_curriculum.py"],
        [f"configs/{name}_sample.py"], [f"configs/{name}_grpo.py"], [], curriculum["horizons"])
    if name != "prices":
        world.out = Path(f"out/cells_{name}")
    if name == "smollm":
        world.lams = (0, 0.2, 0.5, 1)
        world.hard = True
        world.grpo += ["--max_steps=20"]
    else:
        world.stops = ("union", "student")
    return world


def grid(base, sample, grpo, evaluate, short):
    """The paper's runs for any config of on-policy distillation; its horizon is the long one."""
    given = runpy.run_path(base)
    needed = ("student", "teacher", "prompts", "eval_data", "max_new_tokens", "max_steps",
              "eval_max_new_tokens")
    lacks = [key for key in needed if key not in given]
    if lacks or given["max_new_tokens"] <= short:
        sys.exit(f"error: {base} must set {', '.join(lacks or ['max_new_tokens'])}"
                 + ("" if lacks else f" to more than {short}, the short horizon (--short)"))
    rungs = [short]
    while 2 * rungs[-1] < given["max_new_tokens"]:
        rungs.append(2 * rungs[-1])
    rungs.append(given["max_new_tokens"])
    files = [f"--{key}={given[key]}" for key in ("prompts", "eval_data")]
    sampling = [f"--{key}={given[key]}" for key in ("temperature", "top_p", "top_k")
                if key in given]
    few = "--keep=1"                                     # checkpoints of 7 GB, for Qwen3-0.6B
    # As in configs/curriculum_4b.py: 160 of 1000 steps a rung, and 40 more at the last of six.
    steps = int(0.96 * given["max_steps"] / len(rungs))
    return World(
        Path(f"out/cells_{Path(base).stem}"), [base, few],
        [base, few, f"--horizons={tuple(rungs)}", f"--steps_per_horizon={steps}"],
        [sample, f"--model={given['teacher']}", f"--student={given['student']}", files[0],
         f"--max_new_tokens={rungs[-1]}", *sampling],
        [grpo, few, *files], evaluate, tuple(rungs), is_grid=True)


def name_of(prefix, lam, horizon, stop):
    return f"{prefix}_{lam:g}_{horizon}_{stop}"


# -------------------------------------------------------------------------------------------- runs

class Job(NamedTuple):
    script: str
    folder: Path
    argv: list
    after: tuple = ()                                    # folders of the jobs that it needs


def distillation_runs(world):
    """{name: arguments of train_distill.py}, in the order of the work."""
    corners = [("teacher", 0), ("teacher", 1), *(("student", lam) for lam in reversed(world.lams))]
    runs = {}
    for stop in world.stops:
        for horizon in (world.long, world.short, *world.rungs[1:-1]):
            for prefix, lam in corners:
                is_end = horizon in (world.short, world.long)
                # The rungs between the ends are controls for the curriculum only, and the paper has
                # none of them; nor does it mix at the short horizon.
                if not is_end and (world.is_grid or (prefix, lam) != ("student", 1)):
                    continue
                if world.is_grid and lam not in (0, 1) and horizon != world.long:
                    continue
                argv = [
                    *world.distil, f"--prefix={prefix}", f"--reverse_weight={lam}",
                    f"--max_new_tokens={horizon}", f"--stop={stop}"]
                if prefix == "teacher":
                    argv.append(f"--trajectories={world.out}/trajectories")
                runs[name_of(prefix, lam, horizon, stop)] = argv
        if world.hard:
            forward = runs[name_of("teacher", 0, world.long, stop)]
            runs[f"hard_{world.long}_{stop}"] = [*forward, "--teacher=None"]
        runs[f"curriculum_{stop}"] = [*world.curriculum, f"--stop={stop}"]
        if not world.is_grid:
            runs[f"strict_{stop}"] = [
                *runs[f"curriculum_{stop}"], "--entropy_floor=0.85", "--on_gate_closed=rollback"]
    if not world.is_grid:                                # for the figures
        runs[name_of("student", 1, world.long, "union")].append("--eval_teacher=True")
    return runs


def grpo_name(prefix, lam, horizon, stop):
    return f"grpo_{prefix}_{lam}_{horizon}" + ("" if stop == "union" else f"_{stop}")


def grpo_runs(world, folder):
    """{name: (name of the run it begins from, arguments of rl_grpo.py)}: from each corner."""
    runs = {}
    for stop in world.stops:
        for prefix in PREFIXES:
            for _, lam in DIRECTIONS:
                for horizon in (world.short, world.long):
                    start = name_of(prefix, lam, horizon, stop)
                    argv = [*world.grpo, f"--student={folder / start / 'last'}"]
                    if stop != "union":
                        argv.append(f"--stop={stop}")
                    runs[grpo_name(prefix, lam, horizon, stop)] = start, argv
    return runs


def jobs_of(world, seeds, rl):
    """All jobs of these seeds."""
    trajectories = world.out / "trajectories"
    work = [Job("sample.py", trajectories, world.sample)]
    if world.evaluate:
        for name in ("student", "teacher"):
            work.append(Job("eval_math.py", world.out / f"eval_{name}", [
                *world.evaluate, f"--model={world.base[name]}",
                f"--template={world.base['teacher']}"]))
    for seed in seeds:
        folder, trained = world.out / str(seed), []
        for name, argv in distillation_runs(world).items():
            needs = (trajectories,) if f"--trajectories={trajectories}" in argv else ()
            trained.append(Job("train_distill.py", folder / name, argv, needs))
        for name, (start, argv) in grpo_runs(world, folder).items() if rl else ():
            trained.append(Job("rl_grpo.py", folder / name, argv, (folder / start,)))
        work += [job._replace(argv=[*job.argv, f"--seed={seed}"]) for job in trained]
        for job in trained if world.evaluate else ():
            work.append(Job(
                "eval_math.py", folder / f"eval_{job.folder.name}",
                [*world.evaluate, f"--model={job.folder}/last"], (job.folder,)))
    return work


def check_inputs(world, models=()):
    """
    Exit if the runs in world.out were made from other configs, problems or models than there are
    now, or where one is missing. models: folders besides those that the config of all runs names.
    """
    configs = [argv[0] for argv in (
        world.distil, world.curriculum, world.sample, world.grpo, world.evaluate) if argv]
    inputs = {}
    for file in dict.fromkeys(configs):                  # by what they assign, inherited or not
        inputs[file] = {key: value for key, value in runpy.run_path(file).items()
                        if not key.startswith("_")}
    named = [world.base[key] for key in ("prompts", "eval_data", "student", "teacher")]
    for path in map(Path, [*named, *models]):
        if not path.exists() and (len(path.parts) != 2 or path.parent.exists()):
            sys.exit(f"error: no {path}, which the runs read")       # else a name on the hub
        files = [path] if path.is_file() else [
            file for file in sorted(path.glob("*")) if file.suffix in (".json", ".safetensors")]
        for file in files:
            inputs[str(file)] = checksum(file)
    text = "".join(f"{name} {value}\n" for name, value in inputs.items())
    record = world.out / "inputs.txt"
    if record.exists() and record.read_text() != text:
        sys.exit(f"error: {world.out} was made with other configs or models than there are now; "
                 f"delete it, or move it away")
    world.out.mkdir(parents=True, exist_ok=True)
    record.write_text(text)


def checksum(file):
    """Of its content, read in blocks, for weights may be larger than the memory."""
    value = 0
    with open(file, "rb") as content:
        while block := content.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def cores():
    """Of this machine, that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)    # not on every system
    return len(affinity(0)) if affinity else os.cpu_count()


def is_finished(folder):
    return (folder / "finished").exists()


def execute(work, gpus):
    """
    Run the jobs, one at a time on each of `gpus`. A job sees that GPU alone; "" is no GPU, and one
    thread of the CPU. It begins when those that it needs are finished. Where one fails, what needs
    it is left out, and the rest goes on; a GPU on which two in a row have failed gets no more. It
    exits at the end where something has failed, and at the beginning where a folder was finished
    with other arguments.
    """
    for job in work:
        made_with = (job.folder / "finished").read_text() if is_finished(job.folder) else None
        if made_with not in (None, json.dumps(job.argv)):
            sys.exit(f"error: {job.folder} was run with {made_with}, not {json.dumps(job.argv)}; "
                     f"delete it, or move it away")
    waiting = [job for job in work if not is_finished(job.folder)]
    count = len(waiting)
    print(f"{len(work)} runs, {len(work) - count} finished before", flush=True)
    running, failed, held, ended = {}, set(), set(), 0
    failures = dict.fromkeys(range(len(gpus)), 0)        # in a row, of a place in `gpus`
    free = list(failures)
    try:
        while running or waiting and free:
            for job in list(waiting):
                if failed & {*job.after}:
                    waiting.remove(job)
                    failed.add(job.folder)
                    print(f"{job.folder}: left out, for what it needs has failed", flush=True)
                elif is_finished(job.folder):            # by another process
                    waiting.remove(job)
                elif free and all(map(is_finished, job.after)):
                    process = start(job, gpus[free[0]])
                    if process:
                        waiting.remove(job)
                        running[process] = job, free.pop(0), time.time()
                    elif job.folder not in held:
                        held.add(job.folder)
                        print(f"{job.folder}: another process is running it", flush=True)
            for process in [process for process in running if process.poll() is not None]:
                job, place, began = running.pop(process)
                ended += 1
                note = ""
                if process.returncode:
                    failed.add(job.folder)
                    failures[place] += 1
                    note = f": failed, see {job.folder}.log"
                else:
                    (job.folder / "finished").write_text(json.dumps(job.argv))
                    failures[place] = 0
                if failures[place] < 2:
                    free.append(place)
                else:
                    note += f"; two in a row on GPU {gpus[place]!r}, which gets no more"
                print(f"[{ended:>3}/{count}] {job.folder} {time.time() - began:.0f} s{note}",
                      flush=True)
            time.sleep(0.2)
    except KeyboardInterrupt:                            # the runs have received it too
        sys.exit("interrupted; the same command goes on")
    finally:
        for process in running:
            process.wait()
    if failed or waiting:
        sys.exit("error: some runs failed; mend the cause and give the same command: "
                 "the others are kept")


def start(job, gpu):
    """The process of a job; None where another process has it."""
    command = [sys.executable, job.script, *job.argv, f"--out_dir={job.folder}"]
    if job.script in ("train_distill.py", "rl_grpo.py"):     # the others always go on
        command.append("--resume")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    if not gpu:
        environment["OMP_NUM_THREADS"] = "1"
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{job.folder}.log", "a") as log:
        # The run inherits the lock, and holds it should this script be killed before the run.
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            pass                                         # a disk that knows no locks
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


# ---------------------------------------------------------------------------------------- figures

def draw(world, folder, rl):
    """The figures, from the runs of one seed."""
    out, short, long = world.out, world.short, world.long

    def read(names):
        return {label: plot.read_run(folder / name) for label, name in names.items()}

    def corners(horizon, stop):
        return read({
            f"{prefix} prefixes, {kl} KL": name_of(prefix, lam, horizon, stop)
            for prefix in PREFIXES for kl, lam in DIRECTIONS})

    def mixes(horizon, stop):
        names = {f"lam = {lam:g}": name_of("student", lam, horizon, stop) for lam in world.lams}
        return read(names)

    def ladder(stop):
        rungs = (short, long) if world.is_grid else world.rungs
        names = {f"horizon {rung}": name_of("student", 1, rung, stop) for rung in rungs}
        names["curriculum"] = f"curriculum_{stop}"
        if not world.is_grid:
            names["strict curriculum"] = f"strict_{stop}"
        return read(names)

    def after_grpo(horizon):
        return read({
            f"from {prefix} prefixes, {kl} KL": f"grpo_{prefix}_{lam}_{horizon}"
            for prefix in PREFIXES for kl, lam in DIRECTIONS})

    names = ["accuracy", "entropy", "length"]
    for file, make in (("cells.png", corners), ("mixing.png", mixes)):
        rows = {}
        for stop in world.stops:
            for horizon in (short, long):
                if not (world.is_grid and make is mixes and horizon == short):
                    rows[f"horizon {horizon}, stop = {stop}"] = make(horizon, stop)
        plot.draw(rows, names, out / file)

    rows = {f"stop = {stop}": ladder(stop) for stop in world.stops}
    plot.draw(rows, [*names, "horizon"], out / "curriculum.png")

    rows = {f"horizon {horizon}": corners(horizon, world.stops[0]) for horizon in (short, long)}
    plot.draw(rows, names, out / "tflops.png", x="tflops")

    if rl:
        rows = {f"GRPO after horizon {horizon}": after_grpo(horizon) for horizon in (short, long)}
        plot.draw(rows, names, out / "grpo.png")


# ------------------------------------------------------------------------------------ the bootstrap

RESAMPLES = 2000


@functools.cache
def draws(count):
    """
    How often each of `count` things is drawn, with replacement, (1 + RESAMPLES, count). The first
    row has each once: the sample itself. Two calls draw alike, so differences are paired.
    """
    drawn = np.random.default_rng(count).multinomial(count, [1 / count] * count, RESAMPLES)
    return np.vstack([np.ones(count), drawn])


# The 97.5 % quantiles of Student's t for 2, 3, ... seeds.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def over_seeds(values):
    """
    The mean over seeds, (1 + RESAMPLES,), of a list of such arrays or numbers, one for each seed.
    Seeds are drawn anew too. A few of them vary too little when they are drawn from themselves, so
    what the draw of seeds adds is widened: then it is the interval of Student's t. One seed says
    nothing about others, and its interval is that of the problems alone.
    """
    n = len(values)
    numbers = [np.broadcast_to(np.asarray(value, float), 1 + RESAMPLES) for value in values]
    numbers = np.stack(numbers, 1)
    mean = numbers.mean(1)
    if n == 1:
        return mean
    wider = T[min(n - 2, len(T) - 1)] / 1.96 * np.sqrt(n / (n - 1))
    return mean + wider * ((draws(n) * numbers).mean(1) - mean)


def measured(path):
    """
    The samples_*.jsonl of an evaluation, by problem: {key of the evaluation: (2, problems)}. The
    first row has sums over a problem's responses, the second what they are divided by.
    """
    sums = {}
    for record in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()):
        length, after = record["length"], record["tokens_after_box"]
        entropy, entropy_after = record["entropy_sum"], record["entropy_after_box_sum"]
        boxed = after is not None
        parts = {
            "avg_at_k": (record["correct"] or 0, record["correct"] is not None),
            "length": (length, 1),
            "truncated": (record["stop"] == "length", 1),
            "entropy": (entropy, length),
            "entropy_before_box": (entropy - entropy_after, length - after) if boxed else (0, 0),
            "entropy_after_box": (entropy_after, after) if boxed else (0, 0)}
        for key, part in parts.items():
            of_key = sums.setdefault(key, {})
            of_key[record["index"]] = np.add(of_key.get(record["index"], 0), part)
    arrays = {key: np.array([x[i] for i in sorted(x)], float).T for key, x in sums.items()}
    right, graded = arrays["avg_at_k"]
    arrays["pass_at_k"] = np.stack([right > 0, graded > 0]).astype(float)
    return arrays


def ratios(arrays):
    """(1 + RESAMPLES,) of one number of `measured`: of the problems themselves, and as drawn."""
    top, bottom = arrays
    counts = draws(len(top))
    with np.errstate(invalid="ignore"):                  # 0 / 0 where no response has a box
        return (counts @ top) / (counts @ bottom)


def with_resamples(folder, run):
    """The run with arrays (1 + RESAMPLES,) in its evaluations: numbers of the drawn problems."""
    evaluations = []
    for e in run["student"]:
        numbers = measured(f"{folder}/samples_student_{e['step']:06d}.jsonl")
        evaluations.append(e | {key: ratios(arrays) for key, arrays in numbers.items()})
    return run | {"student": evaluations}


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


def claims(world, runs, stop, rl):
    """
    The paper's inequalities on one seed: rows of (number of the claim, what is compared, left side,
    right side). A text with "about" says that both are equal, another that the left one is larger.
    The evaluations in `runs` may have arrays in place of numbers, and so have the sides then. It is
    long because it is a list: a line for each inequality.
    """
    A, P, H, L = "avg_at_k", "pass_at_k", "entropy", "length"
    short, long, limit = world.short, world.long, world.base["eval_max_new_tokens"]
    rows = []

    def claim(number, text, left, right):
        rows.append((number, text, left, right))

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
        at = np.interp(tflops, spent, range(len(run)))   # 2.5: in the middle after run[2]
        before, after = run[int(at)], run[min(int(at) + 1, len(run) - 1)]
        return before[A] + (at - int(at)) * (after[A] - before[A])

    gap_short = mean(A, short, lam=1) - mean(A, short, lam=0)
    gap_long = mean(A, long, lam=1) - mean(A, long, lam=0)
    claim(2, "A(R) > A(F), short", mean(A, short, lam=1), mean(A, short, lam=0))
    claim(2, "A(R) > A(F), long", mean(A, long, lam=1), mean(A, long, lam=0))
    claim(2, "A(R) - A(F): short > long", gap_short, gap_long)

    claim(3, "P(R) about P(F), short", mean(P, short, lam=1), mean(P, short, lam=0))
    claim(3, "P(F) > P(R), long", mean(P, long, lam=0), mean(P, long, lam=1))

    for prefix in PREFIXES:
        for horizon, text in ((short, "short"), (long, "long")):
            claim(4, f"H(F) > H(R), {prefix} prefixes, {text}",
                 last(prefix, 0, horizon, H), last(prefix, 1, horizon, H))
    claim(4, "H(S-F) > 2 H(S-R), long: collapse",
         last("student", 0, long, H), 2 * last("student", 1, long, H))

    claim(5, "l(S-R, long) > 0.9 of the limit", last("student", 1, long, L), 0.9 * limit)
    claim(5, "l: 0.9 of the limit > l(S-R, short)", 0.9 * limit, last("student", 1, short, L))

    claim(6, "A(S) > A(T), long", mean(A, long, prefix="student"), mean(A, long, prefix="teacher"))
    claim(6, "A(S) about A(T), short",
          mean(A, short, prefix="student"), mean(A, short, prefix="teacher"))
    claim(6, "P(S) > P(T), long", mean(P, long, prefix="student"), mean(P, long, prefix="teacher"))

    for horizon, text in ((short, "short"), (long, "long")):
        by_direction = mean(H, horizon, lam=0) - mean(H, horizon, lam=1)
        by_prefix = mean(H, horizon, prefix="student") - mean(H, horizon, prefix="teacher")
        claim(7, f"H moves more with direction than with prefix, {text}",
             abs(by_direction), abs(by_prefix))

    gain_forward = mean(A, long, lam=0) - mean(A, short, lam=0)
    gain_reverse = mean(A, long, lam=1) - mean(A, short, lam=1)
    claim(8, "A(long) > A(short), R", mean(A, long, lam=1), mean(A, short, lam=1))
    claim(8, "A(long) > A(short), F", mean(A, long, lam=0), mean(A, short, lam=0))
    claim(8, "A(long) - A(short): F > R", gain_forward, gain_reverse)

    for lam, kl in ((0, "F"), (1, "R")):
        teacher = evaluations("teacher", lam, long)
        student = evaluations("student", lam, long)
        for part, text in ((0.5, "half of"), (1, "all of")):
            spent = part * teacher[-1]["tflops"]
            claim(9, f"A(T) > A(S), {kl}, long, with {text} T's TFLOPs",
                 accuracy_at(teacher, spent), accuracy_at(student, spent))
        claim(9, f"A(S) > A(T), {kl}, long, at the last step", student[-1][A], teacher[-1][A])

    if rl:
        gained, began = {}, {}
        for lam in (0, 1):
            starts = [(prefix, horizon) for prefix in PREFIXES for horizon in (short, long)]
            after = [runs[grpo_name(prefix, lam, horizon, stop)]["student"]
                     for prefix, horizon in starts]
            gained[lam] = sum(run[-1][A] - run[0][A] for run in after) / len(after)
            began[lam] = sum(run[0][H] for run in after) / len(after)
        claim(10, "A gained by GRPO: from F > from R", gained[0], gained[1])
        claim(10, "A gained by GRPO: 0 > from R", 0, gained[1])
        claim(11, "H at GRPO's step 0: F > R", began[0], began[1])

    claim(12, "A(0.2) about A(1)", last("student", 0.2, long, A), last("student", 1, long, A))
    claim(12, "A(0.2) > A(0)", last("student", 0.2, long, A), last("student", 0, long, A))
    claim(12, "H(0.2) > H(1)", last("student", 0.2, long, H), last("student", 1, long, H))
    claim(12, "l(1) > l(0.2)", last("student", 1, long, L), last("student", 0.2, long, L))
    claim(12, "l(0.5) > l(0.2)", last("student", 0.5, long, L), last("student", 0.2, long, L))

    curriculum = runs[f"curriculum_{stop}"]["student"][-1]
    same_tflops = accuracy_at(evaluations("student", 1, long), curriculum["tflops"])
    claim(13, "A(curriculum) > A(S-R, long)", curriculum[A], last("student", 1, long, A))
    claim(13, "A(curriculum) > A(S-R, long), with the curriculum's TFLOPs",
         curriculum[A], same_tflops)
    claim(13, "P(curriculum) > P(S-R, long)", curriculum[P], last("student", 1, long, P))
    claim(13, "l(S-R, long) > l(curriculum)", last("student", 1, long, L), curriculum[L])
    return rows


# What is called equal where a claim says "about": the interval of the difference lies within this.
MARGIN = 0.05


def verdict(text, difference):
    """
    Whether a claim holds or fails, or is open because the 95 % interval of left - right does not
    decide it; and that interval. difference: left - right of the sample, then of each resample.
    """
    low, high = np.percentile(difference[1:], [2.5, 97.5])
    if "about" in text:
        holds = -MARGIN < low and high < MARGIN
        fails = high < -MARGIN or MARGIN < low
    else:
        holds, fails = low > 0, high < 0
    return "holds" if holds else "**fails**" if fails else "open", low, high


def report(world, results, seeds, rl):
    """
    Lines of a markdown table: for each claim and stop convention left side and right side (means
    over seeds), the verdict, and the interval of their difference that it rests on.
    """
    texts = {}                                           # {(claim, text): {stop: cell}}
    for stop in world.stops:
        of_seeds = [claims(world, results[seed], stop, rl) for seed in seeds]
        for rows in zip(*of_seeds):
            number, text = rows[0][:2]
            left, right = (over_seeds([row[side] for row in rows]) for side in (2, 3))
            decided, low, high = verdict(text, left - right)
            texts.setdefault((number, text), {})[stop] = (
                f"{left[0]:.3g}, {right[0]:.3g}: {decided} ({low:+.2g} .. {high:+.2g})")

    headings = " | ".join(f"stop = {stop}" for stop in world.stops)
    lines = [f"| claim | left, right side | {headings} |", "|---" * (2 + len(world.stops)) + "|"]
    for (number, text), row in texts.items():
        of_stops = " | ".join(row.get(stop, "-") for stop in world.stops)
        lines.append(f"| {number} | {text} | {of_stops} |")
    return lines


def beside_the_toy(lines, path="docs/claims.md"):
    """The toy world's table of claims with the last column of this one's added."""
    verdicts = {}
    for line in lines:
        *row, found = line.strip("| ").split(" | ")
        verdicts[tuple(row[:2])] = found
    joined = []
    for number, line in enumerate(Path(path).read_text().strip().split("\n")):
        key = tuple(line.strip("| ").split(" | ")[:2])
        ours = verdicts.get(key, "-") if number else "a real language model"
        joined.append(line + ("---|" if number == 1 else f" {ours} |"))
    return joined


# ----------------------------------------------------------------------------- the paper's numbers

# Avg@k, Pass@k in per cent and length, means of four benchmarks, {(prefix, lam, teacher): (short,
# long, short -> GRPO, long -> GRPO)}; and of the curriculum.
PAPER = {
    ("teacher", 0, "4B"): "30.9/45.4/3710 31.9/46.5/6411 34.9/49.4/3879 32.9/46.4/2924",
    ("teacher", 1, "4B"): "33.3/45.6/3152 33.4/45.4/7877 32.1/44.0/3012 28.0/40.4/4994",
    ("student", 0, "4B"): "29.0/44.5/4821 36.0/50.0/2943 34.0/45.9/3246 38.4/50.6/7498",
    ("student", 1, "4B"): "34.5/47.1/3642 36.4/48.3/8185 34.2/46.1/2871 30.6/42.8/3853",
    ("teacher", 0, "8B"): "30.6/47.4/3188 31.5/47.8/2767 32.7/46.9/3087 34.1/46.1/2140",
    ("teacher", 1, "8B"): "32.3/44.8/3090 33.4/47.6/7634 31.5/44.2/3189 32.9/45.2/7123",
    ("student", 0, "8B"): "29.3/48.0/4751 35.5/51.8/6130 30.5/43.1/4172 30.8/43.7/8192",
    ("student", 1, "8B"): "34.5/48.7/3424 36.6/49.2/8190 32.6/46.4/3833 28.7/39.2/3982",
    ("curriculum", "4B"): "40.0/54.1/2688",
    ("curriculum", "8B"): "40.2/51.8/2793"}


def paper_table(world, seeds, rl):
    """
    Markdown lines: the paper's table with ours. Ours are means over the benchmarks and seeds that
    were evaluated.
    """
    def ours(name):
        found = []
        for seed in seeds:
            path = world.out / str(seed) / f"eval_{name}" / "results.json"
            found += json.loads(path.read_text())["results"].values()
        return shown(found)

    def shown(rows):
        avg, passed, length = (np.mean([np.nan if row[key] is None else row[key] for row in rows])
                               for key in ("avg_at_k", "pass_at_k", "length"))
        return f"{100 * avg:.1f} / {100 * passed:.1f} / {length:.0f}"

    size = "8B" if "8B" in world.base["teacher"] else "4B"
    stop = world.stops[0]
    lines = ["| Avg@k / Pass@k / length | distilled | paper | after GRPO | paper |",
             "|---" * 5 + "|"]
    for prefix in PREFIXES:
        for kl, lam in DIRECTIONS:
            theirs = [part.replace("/", " / ") for part in PAPER[prefix, lam, size].split()]
            for i, horizon in enumerate((world.short, world.long)):
                after = ours(f"grpo_{prefix}_{lam}_{horizon}") if rl else "-"
                lines.append(
                    f"| {prefix} prefixes, {kl} KL, {horizon} "
                    f"| {ours(name_of(prefix, lam, horizon, stop))} | {theirs[i]} "
                    f"| {after} | {theirs[2 + i]} |")
    for lam in world.lams:
        if lam not in (0, 1):
            distilled = ours(name_of("student", lam, world.long, stop))
            lines.append(
                f"| student prefixes, lam = {lam}, {world.long} | {distilled} | - | - | - |")
    theirs = PAPER["curriculum", size].replace("/", " / ")
    distilled = ours(f"curriculum_{stop}")
    lines.append(f"| curriculum to {world.long} | {distilled} | {theirs} | - | - |")
    for name in ("student", "teacher"):
        evaluated = json.loads((world.out / f"eval_{name}" / "results.json").read_text())
        numbers = shown(evaluated["results"].values())
        lines.append(f"| the {name} as it comes | {numbers} | - | - | - |")
    return [*lines, "", f"The paper's: Qwen3-{size} teaches Qwen3-0.6B-Base, horizons 128 and "
                        f"4096, means of GSM8K, MATH, AMC23 and AIME24."]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--rl", action="store_true", help="GRPO from the cells' ends as well")
    parser.add_argument("--jobs", type=int, help="without --gpus: runs at a time, on one thread "
                                                 "each; default as many as there are cores")
    parser.add_argument("--gpus", help="a run at a time on each of these, as 0,1,2,3")
    parser.add_argument("--world", choices=["prices", "smollm"], default="prices")
    parser.add_argument("--base", help="in place of a world: a config of on-policy distillation, "
                                       "for the paper's runs and its table")
    parser.add_argument("--short", type=int, default=128, help="the short horizon, with --base")
    parser.add_argument("--sample", default="configs/sample_4b.py", help="config, with --base")
    parser.add_argument("--grpo", default="configs/grpo_4b.py", help="config, with --base")
    parser.add_argument("--eval", default="configs/eval_math.py", help="config, with --base")
    parser.add_argument("--benchmarks", default="gsm8k,math,amc23,aime24",
                        help="of eval_math.py, with --base; the default is the paper's")
    args = parser.parse_args(argv)
    if args.base and not args.gpus and not args.jobs:
        parser.error("--base: name the GPUs with --gpus, or threads of the CPU with --jobs")
    if args.base:
        evaluate = [args.eval, f"--benchmarks={args.benchmarks}"]
        world = grid(args.base, args.sample, args.grpo, evaluate, args.short)
    else:
        world = small_world(args.world)

    check_inputs(world)
    gpus = args.gpus.split(",") if args.gpus else [""] * (args.jobs or cores())
    execute(jobs_of(world, args.seeds, args.rl), gpus)

    results = {}
    for seed in args.seeds:
        folder = world.out / str(seed)
        names = [*distillation_runs(world), *(grpo_runs(world, folder) if args.rl else ())]
        results[seed] = {name: plot.read_run(folder / name) for name in names}
    draw(world, world.out / str(args.seeds[0]), args.rl)
    resampled = {
        seed: {name: with_resamples(world.out / str(seed) / name, run)
               for name, run in results[seed].items()} for seed in args.seeds}
    written = {"table.md": table(results, args.seeds),
               "claims.md": report(world, resampled, args.seeds, args.rl)}
    if args.base:
        written["paper.md"] = paper_table(world, args.seeds, args.rl)
    elif args.world == "smollm":
        written["claims.md"] = beside_the_toy(written["claims.md"])
    for name, lines in written.items():
        (world.out / name).write_text("\n".join(lines) + "\n")
    print("\n".join(written["paper.md" if args.base else "claims.md"]))
    print(f"\nin {world.out}: {', '.join(written)}, cells.png, mixing.png, curriculum.png, "
          f"tflops.png" + (", grpo.png" if args.rl else ""))


if __name__ == "__main__":
    main()
