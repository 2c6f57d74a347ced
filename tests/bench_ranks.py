"""
Seconds and bytes of a step on 1, 2 and 4 processes of this machine.

    python tests/bench_ranks.py                          # make bench-ranks

Medians of 3 alternating rounds. Bytes are what the loopback interface carried (gloo talks TCP
there) in a run of 24 steps, less what it carried in one of 4. What GPUs would need is not guessed
here; `python estimate.py configs/opd_8b.py --gpus 8` gives their memory and FLOPs on paper.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import utils

OPTIONS = [
    "configs/toy_opd.py", "--max_new_tokens=96", "--eval_every=0", "--save_every=1000",
    "--overwrite"]
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
FEW, MANY = 4, 24                                        # steps


def train(processes, fsdp, steps, folder):
    """(median seconds of a step, bytes over the loopback) of a run."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        *start, "train_distill.py", *OPTIONS, f"--max_steps={steps}", f"--fsdp={fsdp}",
        f"--out_dir={folder}"]
    threads = max(1, os.cpu_count() // processes)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    before = int(LOOPBACK.read_text())
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    moved = int(LOOPBACK.read_text()) - before

    seconds = []
    for row in utils.read_lines(folder / "metrics.jsonl")[2:]:           # after warming up
        seconds.append(sum(v for key, v in row.items() if key.endswith("_seconds")))
    return statistics.median(seconds), moved


def main():
    cases = [(1, False), (2, False), (2, True), (4, False), (4, True)]   # processes, fsdp
    seconds = {case: [] for case in cases}
    moved = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            for case in cases:
                _, few = train(*case, FEW, Path(folder) / "run")
                median, many = train(*case, MANY, Path(folder) / "run")
                seconds[case].append(median)
                moved[case].append((many - few) / (MANY - FEW))

    print(f"torch {torch.__version__}, {os.cpu_count()} cores, fp32, "
          f"64 responses of at most 96 tokens a step\n")
    print("| processes | fsdp | seconds a step | x one process | MB moved a step |")
    print("|---|---|---|---|---|")
    for case in cases:
        processes, fsdp = case
        ratios = [a / b for a, b in zip(seconds[case], seconds[1, False])]       # of one round
        print(f"| {processes} | {fsdp} | {statistics.median(seconds[case]):.3f} | "
              f"{statistics.median(ratios):.2f} | {statistics.median(moved[case]) / 1e6:.1f} |")
    print(json.dumps({
        f"{processes} {'fsdp' if fsdp else 'whole'}": (seconds[processes, fsdp],
                                                       moved[processes, fsdp])
        for processes, fsdp in cases}))


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    main()
