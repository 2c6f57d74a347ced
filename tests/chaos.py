"""
Break training runs in many ways, resume them, and compare with a run that nothing happened to.

    python tests/chaos.py                      # make chaos: a table; exit code 0 if all is "yes"
    python tests/chaos.py --quick --kills=4    # what `make test` runs

Steps lost: the steps in metrics.jsonl when the run ended, less the step that it was resumed from.
Recovered: at most save_every steps were lost; one line told the fault; and the resumed run has the
losses and evaluations of the run that nothing happened to, each once, and its weights and moments,
bit for bit, or to 2e-5 where two processes have summed gradients.
"""

import argparse
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
from safetensors.numpy import load_file

import train_distill
import utils

# Runs are forks of this process, to save the seconds of its imports. So torch may read here, but
# computes nothing: its threads would be missing in the forks.
torch.set_num_threads(1)
fork = multiprocessing.get_context("fork")
SAVE_EVERY, STEPS = 3, 14
OPTIONS = ["configs/toy_opd.py", "--prompts=data/toy/easy.jsonl", "--batch_size=8",
           "--max_new_tokens=16",
           f"--save_every={SAVE_EVERY}", f"--max_steps={STEPS}", "--keep=100", "--eval_every=4",
           "--eval_prompts=2", "--eval_samples=2", "--eval_max_new_tokens=16",
           "--eval_teacher=False"]
TABLE = "{:<46}  {:>4}  {:>7}  {}"


# -------------------------------------------------------------------------------- runs, and waiting

def run_here(argv, log, before):
    """In the new process: its output goes to the log, before() comes first."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    before()
    sys.argv = ["train_distill.py", *OPTIONS, *argv]
    utils.run(train_distill.main, "", train_distill.Config)


def start(out, *argv, before=int):
    process = fork.Process(
        target=run_here, args=([f"--out_dir={out}", *argv], log_of(out), before))
    process.start()
    return process


def start_two(out):
    """The same on two processes, by torchrun, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train_distill.py", *OPTIONS, f"--out_dir={out}"]
    with open(log_of(out), "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def log_of(out):
    return Path(f"{out}.log")


def steps_in(out):
    """The steps that the run has made, from its metrics."""
    path = out / "metrics.jsonl"
    rows = utils.read_lines(path) if path.exists() else []
    return [row["step"] for row in rows if "loss" in row]


def wait_for(test, seconds=30):
    until = time.time() + seconds
    while not test():
        if time.time() > until:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.001)


def pid_of_rank(launcher, rank):
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise LookupError(f"no process of rank {rank}")


# ------------------------------------------------------------------------------------- comparisons

def result_of(out):
    """Losses of steps and entropies of evaluations, in order; weights and moments at the end."""
    rows = utils.read_lines(out / "metrics.jsonl")
    numbers = [(row["step"], row["loss"] if "loss" in row else row["entropy"]) for row in rows]
    tensors = load_file(out / "last/model.safetensors")
    for name, moments in torch.load(out / "last/optimizer.pt").items():
        tensors |= {f"{name} {kind}": tensor.numpy() for kind, tensor in moments.items()}
    return numbers, tensors


def difference(out, whole, tolerance):
    """How the run in `out` differs from the whole one: a line, or ""."""
    (numbers, tensors), (wanted, reference) = result_of(out), whole
    if [step for step, _ in numbers] != [step for step, _ in wanted]:
        return f"steps {[step for step, _ in numbers]}"
    if max(abs(a - b) for (_, a), (_, b) in zip(numbers, wanted)) > tolerance / 2:
        return "other losses"
    if tensors.keys() != reference.keys():
        return "other tensors"
    furthest = max(abs(tensors[name] - reference[name]).max() for name in reference)
    return f"weights or moments differ by {furthest:.1g}" if furthest > tolerance else ""


def not_told(out, text):
    """What is wrong with the log: `text` (a pattern) should be there once, and no traceback."""
    log = log_of(out).read_text()
    own = log.split("torch/distributed/elastic")[0]  # torchrun's report has a traceback
    if len(re.findall(text, log)) != 1 or "Traceback" in own:
        return f"not told in a line: {text}"
    return ""


def other_code(process, code):
    return "" if process.exitcode == code else f"exit code {process.exitcode}"


class Trials:
    """A folder for each run; a line of the table for each kind of fault."""

    def __init__(self, root):
        self.root, self.count, self.recovered = Path(root), 0, True
        began = time.time()
        start(self.root / "whole").join()
        self.seconds = time.time() - began
        self.whole = result_of(self.root / "whole")

    def folder(self):
        self.count += 1
        return self.root / f"run{self.count}"

    def resume(self, out, tolerance=0.0):
        """Resume on one process: (steps lost, what went wrong or "")."""
        reached, log = max(steps_in(out), default=0), log_of(out)
        read_so_far = len(log.read_text())
        process = start(out, "--resume")
        process.join()
        text = log.read_text()[read_so_far:]
        found = re.search(r"process\(es\) on cpu, from step (\d+)", text)
        if process.exitcode or not found:
            return 0, f"resumed with exit code {process.exitcode}: {text.splitlines()[-1:]}"
        return reached - int(found[1]), difference(out, self.whole, tolerance)

    def report(self, fault, lost, wrong, allowed=SAVE_EVERY):
        """lost: steps, of each run; wrong: lines, or "" where all went well."""
        wrong = [line for line in wrong if line]
        if max(lost) > allowed:
            wrong.append("too many steps lost")
        self.recovered &= not wrong
        verdict = f"NO: {wrong[0]}" if wrong else "yes"
        print(TABLE.format(fault, max(lost), allowed, verdict), flush=True)


# -------------------------------------------------------------------------------------- the faults

def kill_at_random(trials, times, rng):
    lost, wrong = [], []
    for _ in range(times):
        out = trials.folder()
        process = start(out)
        time.sleep(rng.uniform(0.2, trials.seconds))
        process.kill()
        process.join()
        steps, line = trials.resume(out)
        lost.append(steps)
        wrong.append(line)
    trials.report(f"kill -9 at a random moment, {times} times", lost, wrong)


def kill_in_a_save(trials, times, rng):
    """In any of the saves, as soon as its folder is there or up to 40 ms later."""
    lost, wrong = [], []
    for _ in range(times):
        out = trials.folder()
        step = SAVE_EVERY * rng.randrange(1, STEPS // SAVE_EVERY + 1)
        written = out / f".step_{step:06d}.tmp"
        process = start(out)
        wait_for(lambda written=written: written.exists())
        time.sleep(rng.uniform(0, 0.04))
        process.kill()
        process.join()
        steps, line = trials.resume(out)
        lost.append(steps)
        wrong.append(line)
    trials.report(f"kill -9 while a checkpoint is written, {times} times", lost, wrong)


def full_disk(trials):
    """
    A file system of 5 MB, full at the third save; without the right to mount one, a limit on the
    size of a file.
    """
    out = trials.folder()
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(out)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))

    try:
        process = start(out, before=int if mounted else limit)
        process.join()
        told = not_told(out, "error: cannot save .*; mend that, then --resume: checkpoints before")
        left = "something half-written is left" if list(out.glob(".step*")) else ""
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", str(out)], check=True)
        steps, line = trials.resume(out)
        fault = "the disk is full in a save" if mounted else "files may not grow (cannot mount)"
        trials.report(fault, [steps], [told, other_code(process, 1), left, line])
    finally:
        if mounted:
            subprocess.run(["umount", str(out)], check=True)


def cut_short(trials):
    """Files of a checkpoint, one at a time; it is the newest, since SIGTERM has just saved it."""
    lost, wrong = [], []
    files = ("optimizer.pt", "model.safetensors", "train_state.json")
    for file in files:
        out = trials.folder()
        process = start(out)
        wait_for(lambda out=out: len(steps_in(out)) >= 7)
        process.terminate()
        process.join()
        newest = sorted(out.glob("step_*"))[-1]
        os.truncate(newest / file, (newest / file).stat().st_size - 100)
        steps, line = trials.resume(out)
        told = not_told(out, rf"warning: {newest} is damaged .*, and passed over")
        lost.append(steps)
        wrong += [told, line]
    trials.report(f"a checkpoint's file cut short, {len(files)} files", lost, wrong)


def signalled(trials, number, times):
    """The step in progress is finished and saved; a second signal within a second counts as one."""
    name, out = signal.Signals(number).name, trials.folder()
    process = start(out)
    wait_for(lambda: len(steps_in(out)) >= 4)
    for _ in range(times):
        os.kill(process.pid, number)
    process.join()
    told = not_told(out, rf"code {128 + number}; step \d+ is saved: --resume goes on")
    steps, line = trials.resume(out)
    trials.report(f"{name}{', twice at once' if times > 1 else ''}: exit code {process.exitcode}",
                  [steps], [told, other_code(process, 128 + number), line], allowed=0)


def a_rank_killed(trials):
    out = trials.folder()
    launcher = start_two(out)
    wait_for(lambda: len(steps_in(out)) >= 5)
    os.kill(pid_of_rank(launcher, 1), signal.SIGKILL)
    launcher.wait()
    told = not_told(out, "error: rank 0: another process has ended")
    steps, line = trials.resume(out, 2e-5)
    trials.report("one rank of two killed", [steps], [told, line])


def interrupted_together(trials):
    """Ctrl-C reaches torchrun and its processes, and torchrun passes its own on to them."""
    out = trials.folder()
    launcher = start_two(out)
    wait_for(lambda: len(steps_in(out)) >= 4)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait()
    told = not_told(out, r"code 130; step \d+ is saved: --resume goes on")
    steps, line = trials.resume(out, 2e-5)
    trials.report("Ctrl-C to torchrun and two ranks", [steps], [told, line], allowed=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="without Ctrl-C to two processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    rng = random.Random(args.seed)
    print(f"{STEPS} steps, save_every={SAVE_EVERY}, seed {args.seed}")
    print(TABLE.format("fault", "lost", "allowed", "recovered"))
    with tempfile.TemporaryDirectory() as root:
        trials = Trials(root)
        kill_at_random(trials, args.kills // 2, rng)
        kill_in_a_save(trials, args.kills // 2, rng)
        full_disk(trials)
        cut_short(trials)
        signalled(trials, signal.SIGTERM, 2)
        signalled(trials, signal.SIGINT, 1)
        a_rank_killed(trials)
        if not args.quick:
            interrupted_together(trials)
    sys.exit(not trials.recovered)


if __name__ == "__main__":
    main()
