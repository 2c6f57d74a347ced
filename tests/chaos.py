"""
Break training runs in every way we could think of, resume them, and compare with a run that nothing happened to.

    python tests/chaos.py                                # make chaos: a table, some minutes; exit code 1 if a line is not "yes"
    python tests/chaos.py --kills 3 --quick              # what `make test` runs

Steps lost: steps that metrics.jsonl had when the run ended, less the step it was resumed from; at most save_every = 3 may be.
Recovered: the resumed run's losses and evaluations, and its weights and optimiser at the end, are those of the run that nothing
happened to, bit for bit (to 2e-5 where two processes summed gradients), each is in metrics.jsonl once, and one line told the
fault.
"""

import argparse
import contextlib
import datetime
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

torch.set_num_threads(1)                                 # and torch computes nothing here: the runs are forks of this process
SAVE_EVERY, STEPS = 3, 14
OPTIONS = ["configs/toy_opd.py", "--batch_size=8", "--max_new_tokens=32", f"--save_every={SAVE_EVERY}", f"--max_steps={STEPS}",
           "--keep=100", "--eval_every=4", "--eval_prompts=2", "--eval_samples=2", "--eval_max_new_tokens=16",
           "--eval_teacher=False"]
fork = multiprocessing.get_context("fork")


def go(argv, log, before):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    before()
    sys.argv = ["train_distill.py", *OPTIONS, *argv]
    utils.run(train_distill.main, "", train_distill.Config)


def start(out, *argv, before=int):
    """A run as a process of its own, without the seconds of its imports. before() is called in it."""
    process = fork.Process(target=go, args=([f"--out_dir={out}", *argv], f"{out}.log", before))
    process.start()
    return process


def torchrun(out, *argv, before=(), program="train_distill.py"):
    """On two processes, in a session of its own."""
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *before,
                                 program, *OPTIONS, f"--out_dir={out}", *argv], stdout=log, stderr=log, start_new_session=True)


def rank_of(launcher, rank):
    """The pid of a rank, once it is at work."""
    while True:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int((folder / "stat").read_text().rsplit(")")[-1].split()[1]) == launcher.pid and \
                        f"\0RANK={rank}\0".encode() in (folder / "environ").read_bytes():
                    return int(folder.name)
            except OSError:
                pass
        time.sleep(0.01)


def steps_in(out):
    path = out / "metrics.jsonl"
    return [row["step"] for row in utils.read_lines(path) if "loss" in row] if path.exists() else []


def wait_for(test, seconds=120):
    until = time.time() + seconds
    while not test():
        if time.time() > until:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.001)


def state_of(out):
    rows = utils.read_lines(out / "metrics.jsonl")       # of steps, and of evaluations, each once
    rows = [(row["step"], row["loss"] if "loss" in row else row["entropy"]) for row in rows]
    return rows, {**load_file(out / "last/model.safetensors"), **load_file(out / "last/optimizer.safetensors")}


def compare(out, whole, tolerance):
    """What is wrong with the run in `out`: a line, or ""."""
    (rows, tensors), (wanted, reference) = state_of(out), whole
    if [step for step, _ in rows] != [step for step, _ in wanted]:
        return f"steps {[step for step, _ in rows]}"
    if max(abs(a - b) for (_, a), (_, b) in zip(rows, wanted)) > tolerance / 2:
        return "other losses"
    far = max(abs(tensors[name] - reference[name]).max() for name in reference)
    return f"weights differ by {far:.1g}" if far > tolerance else ""


class Trials:
    """One folder for each run; a line of the table for each kind of fault."""

    def __init__(self, root):
        self.root, self.lines, self.count = Path(root), [], 0
        process = start(self.root / "whole")
        process.join()
        self.whole = state_of(self.root / "whole")

    def folder(self):
        self.count += 1
        return self.root / f"run{self.count}"

    def resume(self, out, tolerance=0.0):
        """Resume on one process: (steps lost, what went wrong or "")."""
        reached, log = max(steps_in(out), default=0), Path(f"{out}.log")
        before = len(log.read_text()) if log.exists() else 0
        process = start(out, "--resume")
        process.join()
        text = log.read_text()[before:]
        found = re.search(r"process\(es\) on cpu, from step (\d+)", text)
        if process.exitcode or not found:
            return None, f"resumed with exit code {process.exitcode}: {text.splitlines()[-1:]}"
        return reached - int(found[1]), compare(out, self.whole, tolerance)

    def line(self, fault, lost, wrong, allowed=SAVE_EVERY):
        lost, wrong = [x for x in lost if x is not None], [why for why in wrong if why]
        verdict = "yes" if not wrong and max(lost, default=0) <= allowed else f"NO: {wrong[:1] or 'too many steps lost'}"
        self.lines.append((fault, f"{max(lost)}" if lost else "-", f"{allowed}", verdict))
        print("{:<46}  {:>4}  {:>7}  {}".format(*self.lines[-1]), flush=True)


def says(out, *texts):
    """What of `texts` the log lacks; a Python traceback counts, torchrun's own report does not."""
    log = Path(f"{out}.log").read_text()
    own = log.split("torch/distributed/elastic")[0]
    found = [f"not said: {text}" for text in texts if len(re.findall(text, log)) != 1]
    return "; ".join(found + ["a traceback"] * ("Traceback" in own))


# -------------------------------------------------------------------------------------------------------------- the faults

def kills(trials, count, rng):
    """kill -9, half of them at any moment, half while a checkpoint is being written."""
    started = time.time()
    start(trials.folder()).join()
    duration = time.time() - started
    for fault, saving in (("kill -9 at a random moment", False), ("kill -9 while a checkpoint is written", True)):
        lost, wrong = [], []
        for _ in range((count + 1 - saving) // 2):
            out = trials.folder()
            process = start(out)
            if saving:                                   # the n-th save, and up to 40 ms into it
                name = f".step_{SAVE_EVERY * rng.randrange(1, STEPS // SAVE_EVERY + 1):06d}.tmp"
                wait_for(lambda out=out, name=name, process=process: (out / name).exists() or not process.is_alive())
                time.sleep(rng.random() * 0.04)
            else:
                time.sleep(0.2 + rng.random() * (duration - 0.2))
            process.kill()
            process.join()
            steps, why = trials.resume(out)
            lost, wrong = [*lost, steps], [*wrong, why]
        trials.line(f"{fault}, {len(lost)} times", lost, wrong)


def full_disk(trials):
    """A file system of 5 MB, full at the third save; without the right to mount one, a limit on the size of files."""
    out = trials.folder()
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(out)], capture_output=True).returncode == 0
    try:
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))
        process = start(out, before=int if mounted else limit)
        process.join()
        why = says(out, "error: cannot save .*checkpoints before it are whole: make room, then --resume")
        why += f"; exit code {process.exitcode}" * (process.exitcode != 1)
        why += "; something half-written is left" * bool(list(out.glob(".step*")))
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", str(out)], check=True)
        steps, wrong = trials.resume(out)
        trials.line("the disk is full in a save" if mounted else "files may not grow (cannot mount)", [steps], [why, wrong])
    finally:
        if mounted:
            subprocess.run(["umount", str(out)], check=True)


def damage(trials, quick):
    for fault, file, change in (("a checkpoint's file cut short", "optimizer.safetensors", lambda data: data[:-1000]),
                                ("a byte flipped in the weights", "model.safetensors",
                                 lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]),
                                ("a byte flipped in the state", "train_state.json", lambda data: data.replace(b"6", b"7", 1)),
                                ("a file of a checkpoint missing", "model.safetensors", None))[:2 if quick else 4]:
        out = trials.folder()
        process = start(out)
        wait_for(lambda out=out: len(steps_in(out)) >= 7)
        process.terminate()                              # so the newest is that of the last step
        process.join()
        newest = sorted(out.glob("step_*"))[-1]
        data = (newest / file).read_bytes()
        (newest / file).unlink() if change is None else (newest / file).write_bytes(change(data))
        steps, why = trials.resume(out)
        trials.line(fault, [steps], [why, says(out, rf"warning: {newest} is damaged.*going on from step \d+")])


def plant_nan():
    plain, calls = train_distill.linear_kl, []

    def broken(h_q, *args):
        calls.append(1)
        if len(calls) == 8:
            h_q.register_hook(lambda grad: grad * float("nan"))
        return plain(h_q, *args)
    train_distill.linear_kl = broken


def nan(trials):
    out = trials.folder()
    process = start(out, before=plant_nan)
    process.join()
    why = says(out, "error: step 8: loss .*, gradient norm nan: not finite, so no update was made")
    steps, wrong = trials.resume(out)
    trials.line("a NaN in the gradient of step 8", [steps], [why, wrong])


def slow():
    plain, calls = train_distill.linear_kl, []

    def late(*args):
        calls.append(1)
        if len(calls) == 5:                              # as in a collective: Python's signal handlers do not run there
            print("it hangs", flush=True)
            with contextlib.suppress(RuntimeError):
                torch.distributed.HashStore().wait(["never"], datetime.timedelta(seconds=4))
        return plain(*args)
    train_distill.linear_kl = late


def signals(trials):
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        out = trials.folder()
        process = start(out)
        wait_for(lambda out=out: len(steps_in(out)) >= 4)
        os.kill(process.pid, number)
        process.join()
        why = says(out, rf"{name}: step \d+ is saved: --resume goes on")
        steps, wrong = trials.resume(out)
        trials.line(f"{name} (exit code {process.exitcode})", [steps],
                    [why, wrong, "exit code" * (process.exitcode != 128 + number)], allowed=0)
    out = trials.folder()
    process = start(out, before=slow)
    wait_for(lambda: "it hangs" in Path(f"{out}.log").read_text() if Path(f"{out}.log").exists() else False)
    process.terminate()
    time.sleep(1.1)
    process.terminate()
    process.join(0.5)                                    # a step takes longer
    why = "" if process.exitcode == 128 + signal.SIGTERM else f"exit code {process.exitcode}"
    why += "; it was saved" * ("is saved" in Path(f"{out}.log").read_text())
    process.kill()
    steps, wrong = trials.resume(out)
    trials.line("a second SIGTERM, in the same step", [steps], [why, wrong])
    out = trials.folder()
    process = start(out)
    wait_for(lambda: len(steps_in(out)) >= 2)
    os.kill(process.pid, signal.SIGSTOP)                 # so that it is in the middle of a step when both arrive
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    trials.line("stopped, SIGTERM, continued", *[[x] for x in trials.resume(out)], allowed=0)


def removed(trials):
    out = trials.folder()
    process = start(out)
    wait_for(lambda: len(steps_in(out)) >= 4)
    out.rename(f"{out}.moved")
    process.join()
    why = says(out, "error: cannot (write|save) .*its folder has been removed")
    os.rename(f"{out}.moved", out)
    steps, wrong = trials.resume(out)
    trials.line("the output folder removed, put back", [steps], [why, wrong])


def ranks(trials, quick):
    """Two processes; resumed on one."""
    out = trials.folder()                                # a rank dies
    launcher = torchrun(out)
    wait_for(lambda: len(steps_in(out)) >= 5)
    os.kill(rank_of(launcher, 1), signal.SIGKILL)
    launcher.wait()
    why = says(out, "error: another process has ended")
    steps, wrong = trials.resume(out, 2e-5)
    trials.line("one rank of two killed", [steps], [why, wrong])

    out = trials.folder()                                # torchrun is told to end
    launcher = torchrun(out)
    wait_for(lambda: len(steps_in(out)) >= 4)
    launcher.terminate()
    launcher.wait()
    why = says(out, r"SIGTERM: step \d+ is saved: --resume goes on")
    steps, wrong = trials.resume(out, 2e-5)
    trials.line(f"SIGTERM to torchrun (its exit code {launcher.returncode})", [steps], [why, wrong], allowed=0)
    if quick:
        return

    out = trials.folder()                                # torchrun starts them again
    launcher = torchrun(out, "--resume", before=["--max-restarts=1"])
    wait_for(lambda: len(steps_in(out)) >= 5)
    reached = max(steps_in(out))
    os.kill(rank_of(launcher, 1), signal.SIGKILL)
    launcher.wait()
    begun = re.findall(r"process\(es\) on cpu, from step (\d+)", Path(f"{out}.log").read_text())
    trials.line("one rank killed, torchrun --max-restarts=1", [reached + 1 - int(begun[-1])],
                [compare(out, trials.whole, 2e-5), f"exit code {launcher.returncode}" * (launcher.returncode != 0),
                 f"begun {len(begun)} times" * (len(begun) != 2)])

    out = trials.folder()                                # one hangs
    launcher = torchrun(out, "--collective_timeout=5")
    wait_for(lambda: len(steps_in(out)) >= 4)
    pid, since = rank_of(launcher, 1), time.time()
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: "error:" in Path(f"{out}.log").read_text())
    took = time.time() - since
    os.kill(pid, signal.SIGCONT)                         # else torchrun's SIGTERM waits for its SIGKILL, 30 s
    launcher.wait()
    why = says(out, "error: another process has ended, or is silent")
    steps, wrong = trials.resume(out, 2e-5)
    trials.line("one rank hangs, collective_timeout = 5", [steps], [why, wrong, f"told after {took:.0f} s" * (took > 15)])

    out = trials.folder()                                # a bug, on one rank only
    script = trials.root / "bug.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {os.getcwd()!r})\nimport train_distill, utils\n"
                      "plain, calls = train_distill.linear_kl, []\n"
                      "def broken(*args):\n    calls.append(1)\n    if len(calls) == 8 and os.environ['RANK'] == '1':\n"
                      "        raise IndexError('a bug on one rank')\n    return plain(*args)\n"
                      "train_distill.linear_kl = broken\nutils.run(train_distill.main, '', train_distill.Config)\n")
    torchrun(out, program=str(script)).wait()
    log = Path(f"{out}.log").read_text().split("torch/distributed/elastic")[0]
    why = "" if log.count("Traceback") == 1 and log.count("IndexError: a bug on one rank") == 1 else "not told once"
    steps, wrong = trials.resume(out, 2e-5)
    trials.line("an exception on one rank", [steps], [why, wrong])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a few faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    with tempfile.TemporaryDirectory() as root:
        trials = Trials(root)
        print(f"{STEPS} steps, save_every={SAVE_EVERY}, seed {args.seed}")
        print("{:<46}  {:>4}  {:>7}  {}".format("fault", "lost", "allowed", "recovered"))
        kills(trials, args.kills, random.Random(args.seed))
        full_disk(trials)
        damage(trials, args.quick)
        nan(trials)
        signals(trials)
        removed(trials)
        ranks(trials, args.quick)
    sys.exit(any(verdict != "yes" for _, _, _, verdict in trials.lines))


if __name__ == "__main__":
    main()
