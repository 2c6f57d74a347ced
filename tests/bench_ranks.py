"""
Seconds and bytes of a step on 1, 2 and 4 processes of this machine, and what to expect of eight GPUs, on paper.

    python tests/bench_ranks.py                          # make bench-ranks; medians of 3 alternating rounds
    python tests/bench_ranks.py --paper                  # memory, seconds, tokens per second of the 8-GPU configs

Bytes are what the loopback interface carried (gloo talks TCP there) in a run of 24 steps, less what it did in one of 4. On
paper a GPU is an H100: 700 TFLOP/s in a bf16 GEMM, 2.7 TB/s copied, 5 us a launch, 300 GB/s between GPUs, and
`utils.py: estimate_time` says what is made of them. None of that was measured on a GPU.
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
from transformers import Qwen3Config

import train_distill
import utils

OPTIONS = ["configs/toy_opd.py", "--max_new_tokens=96", "--eval_every=0", "--save_every=1000"]


def run(processes, fsdp, steps, folder):
    """(median seconds of a step, bytes over loopback) of a run."""
    loopback = Path("/sys/class/net/lo/statistics/tx_bytes")
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    before = int(loopback.read_text())
    subprocess.run([sys.executable, *start, "train_distill.py", *OPTIONS, f"--max_steps={steps}", f"--fsdp={fsdp}",
                    f"--out_dir={folder}", "--overwrite"], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes)), "CUDA_VISIBLE_DEVICES": ""})
    moved, rows = int(loopback.read_text()) - before, utils.read_lines(folder / "metrics.jsonl")
    return statistics.median(sum(v for key, v in row.items() if key.endswith("_seconds")) for row in rows[2:]), moved


def measure():
    cases = [(1, False), (2, False), (2, True), (4, False), (4, True)]
    found = {case: ([], []) for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            for case in cases:
                (_, few), (seconds, many) = (run(*case, steps, Path(folder) / "run") for steps in (4, 24))
                found[case][0].append(seconds)
                found[case][1].append((many - few) / 20)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, fp32, 64 responses of at most 96 tokens a step\n")
    print("| processes | fsdp | seconds a step | x one process | MB moved a step |\n|---|---|---|---|---|")
    for (processes, fsdp), (seconds, moved) in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, found[1, False][0]))        # of the same round
        print(f"| {processes} | {fsdp} | {statistics.median(seconds):.3f} | {ratio:.2f} | "
              f"{statistics.median(moved) / 1e6:.1f} |")
    print(json.dumps({f"{n} {'fsdp' if fsdp else 'whole'}": value for (n, fsdp), value in found.items()}))


def qwen(hidden, layers, heads, intermediate, tied):
    return Qwen3Config(vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied)


SIZES = {"0.6B": qwen(1024, 28, 16, 3072, True), "8B": qwen(4096, 36, 32, 12288, False),
         "32B": qwen(5120, 64, 64, 25600, False)}
H100 = {"flops": 700e12, "bytes": 2.7e12, "launch": 5e-6, "link": 300e9}


def paper():
    for file in ("configs/opd_8b.py", "configs/opd_32b.py"):
        cfg, _ = utils.load_config(train_distill.Config, [file])
        teacher, student = (SIZES[next(size for size in SIZES if f"-{size}" in name)] for name in (cfg.teacher, cfg.student))
        torch.cuda.is_available = lambda: True           # the chunk of logits is a GPU's
        memory = utils.estimate_memory(cfg, "vllm", student, student, {"teacher": (teacher, 2)}, cfg.max_new_tokens, 8)
        print(f"{file}: {cfg.teacher} -> {cfg.student} on 8 H100, fsdp={cfg.fsdp}")
        print("GB a GPU: " + "; ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.items()))
        evaluation = utils.estimate_time(cfg, "vllm", student, student, {}, cfg.eval_max_new_tokens, 8,
                                         cfg.eval_prompts * cfg.eval_samples, H100)["rollouts"]
        for mean in (cfg.max_new_tokens // 4, cfg.max_new_tokens):
            time = utils.estimate_time(cfg, "vllm", student, student, {"teacher": (teacher, 2)}, cfg.max_new_tokens, 8,
                                       cfg.batch_size, H100, mean)
            step = sum(time.values())
            hours = (cfg.max_steps * step + (cfg.max_steps // cfg.eval_every + 1) * evaluation) / 3600
            print(f"mean length {mean}: " + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in time.items()) +
                  f"; a step {step:.3g} s, {cfg.batch_size * mean / step:.0f} tokens/s, {hours:.1f} h with evaluations of "
                  f"{evaluation:.0f} s")


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    paper() if "--paper" in sys.argv else measure()
