# sft_4b.py - off-policy SFT with soft labels: teacher prefixes, forward KL.
# First: torchrun --nproc_per_node=8 sample.py configs/sample_4b.py
# For the 8B cell sample with --model=Qwen/Qwen3-8B --out_dir=out/sample_8b, and train with
# --teacher=Qwen/Qwen3-8B --trajectories=out/sample_8b.
from configs.opd_4b import *

prefix = "teacher"
trajectories = "out/sample_4b"
reverse_weight = 0.0
out_dir = "out/sft_4b"
