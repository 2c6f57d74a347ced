# opd_32b.py - Qwen3-32B -> Qwen3-8B-Base, student prefixes, reverse KL: too big for one GPU each, so both are sharded over all.
from configs.opd_4b import *

student = "Qwen/Qwen3-8B-Base"
teacher = "Qwen/Qwen3-32B"
out_dir = "out/opd_32b"

fsdp = True
gradient_checkpointing = True
