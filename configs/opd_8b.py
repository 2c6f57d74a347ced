# opd_8b.py - Qwen3-8B -> Qwen3-0.6B-Base, student prefixes, reverse KL. 8 ranks x 4 = 32 rollouts per step.
from configs.opd_4b import *

teacher = "Qwen/Qwen3-8B"
out_dir = "out/opd_8b"
