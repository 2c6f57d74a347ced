# sft_4b.py - off-policy SFT with soft labels: teacher prefixes, forward KL. --teacher=Qwen/Qwen3-8B for the 8B cell.
from configs.opd_4b import *

prefix = "teacher"
reverse_weight = 0.0
out_dir = "out/sft_4b"
