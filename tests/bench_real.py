"""
An on-policy step of a real language model beside TRL's; seconds and peak memory, medians.

    python data/smollm.py --drop 25,4,5,26,7,6
    python tests/bench_real.py 3          # rounds; `pip install trl==1.16.0` for TRL's rows

SmolLM2-135M-Instruct teaches itself without six layers: 16 word problems, at most 64 new tokens,
reverse KL, on the CPU. The learning rate is 1e-6, so that response lengths stay what they are.
Each measurement is a process of its own, in alternating rounds, since its memory is measured too;
the first two of its six steps are left out. Prints a table and where our seconds go, beside the
two floors of the machine: the GEMMs of the step at the speed of a large GEMM, and reading the
student's weights once for each token that is decoded. Writes out/bench_real.json.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_decode import machine  # noqa: E402  (beside this file)
from bench_step import trl_steps  # noqa: E402

import models  # noqa: E402
import train_distill  # noqa: E402  (needs the repository on the path)
import utils  # noqa: E402

STUDENT, TEACHER, PROMPTS = "data/smollm/pruned", "data/smollm/base", "data/smollm/train.jsonl"
BATCH, NEW_TOKENS = 16, 64
STEPS, WARMUP = 6, 2
PHASES = ("rollout", "teacher", "student", "optimizer")


def ours(dtype, folder, *options):
    """Rows of metrics.jsonl."""
    train_distill.main([
        "configs/smollm_pruned.py", f"--student={STUDENT}", f"--teacher={TEACHER}",
        f"--dtype={dtype}", f"--batch_size={BATCH}", f"--max_new_tokens={NEW_TOKENS}",
        f"--max_steps={STEPS}", "--eval_every=0", "--save_every=1000", "--learning_rate=1e-6",
        f"--out_dir={folder}/ours", *options])
    return utils.read_lines(f"{folder}/ours/metrics.jsonl")


def compiled(dtype, folder):
    """The same with compile = True."""
    return ours(dtype, folder, "--compile=True")


def trl(dtype, folder):
    """[{"seconds"}] of TRL's DistillationTrainer with the same models, prompts and sampling."""
    seconds = trl_steps(STUDENT, TEACHER, PROMPTS, BATCH, NEW_TOKENS, STEPS, dtype, Path(folder))
    return [{"seconds": step} for step in seconds]


def floors(dtype, row):
    """
    Seconds that the step's matrix products take at the speed of a large one, and those of reading
    the student's weights once for each of the tokens that are decoded one after the other.
    """
    dtype = getattr(torch, dtype)
    flops, bytes_per_second = machine(dtype)
    size = dtype.itemsize
    student = sum(p.numel() for p in models.load_model(STUDENT, dtype).parameters())
    update = (3 * row["student_flops"] + row["teacher_flops"]) / flops
    return {"GEMMs of the update": update, "GEMMs of the rollout": row["student_flops"] / flops,
            "reading weights": row["max_length"] * student * size / bytes_per_second}


def one(who, dtype, out):
    """A measurement, in a process of its own."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        rows = {"ours": ours, "compiled": compiled, "TRL": trl}[who](dtype, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6       # GB on Linux
    report = {"rows": rows[WARMUP:], "peak_gb": peak}
    if who != "TRL":
        report["floors"] = floors(dtype, rows[-1])
    Path(out).write_text(json.dumps(report))


def main():
    if sys.argv[1:2] == ["--one"]:
        return one(*sys.argv[2:])
    rounds = int(sys.argv[1]) if sys.argv[1:] else 3
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("bfloat16", "float32"):
            for _ in range(rounds):
                for who in ("ours", "compiled", "TRL"):
                    out = Path(folder, "one.json")
                    run = subprocess.run([sys.executable, __file__, "--one", who, dtype, str(out)],
                                         capture_output=True, text=True)
                    if run.returncode and "No module named" in run.stderr:
                        continue                        # TRL is not installed
                    if run.returncode:
                        sys.exit(run.stderr)
                    report.setdefault(f"{who} {dtype}", []).append(json.loads(out.read_text()))
                    print(f"{who} {dtype} done", file=sys.stderr)

    print(f"\n{'':<18}{'seconds':>9}{'peak GB':>9}  a step's phases")
    summary = {}
    for name, runs in report.items():
        rows = [row for run in runs for row in run["rows"]]
        numbers = {"seconds": statistics.median(row["seconds"] for row in rows),
                   "peak_gb": statistics.median(run["peak_gb"] for run in runs)}
        if not name.startswith("TRL"):
            for phase in PHASES:
                numbers[phase] = statistics.median(row[f"{phase}_seconds"] for row in rows)
            numbers["floors"] = {
                part: statistics.median(run["floors"][part] for run in runs)
                for part in runs[0]["floors"]}
        summary[name] = numbers
        phases = ", ".join(f"{phase} {numbers[phase]:.1f}" for phase in PHASES if phase in numbers)
        print(f"{name:<18}{numbers['seconds']:>9.2f}{numbers['peak_gb']:>9.2f}  {phases}")
    for dtype in ("bfloat16", "float32"):
        of_machine = summary[f"ours {dtype}"]["floors"].items()
        print(f"{dtype}: floors in seconds: " + ", ".join(
            f"{part} {seconds:.2f}" for part, seconds in of_machine))
        other = summary.get(f"TRL {dtype}")
        for who in ("ours", "compiled") if other else ():
            own = summary[f"{who} {dtype}"]
            print(f"{dtype}: TRL / {who}: {other['seconds'] / own['seconds']:.2f}; memory {who} / "
                  f"TRL: {own['peak_gb'] / other['peak_gb']:.2f}")
    Path("out").mkdir(exist_ok=True)
    Path("out/bench_real.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
