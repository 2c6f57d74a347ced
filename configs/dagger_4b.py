# dagger_4b.py - DAgger style: student prefixes, forward KL.
# --teacher=Qwen/Qwen3-8B is the 8B cell.
from configs.opd_4b import *

reverse_weight = 0.0
out_dir = "out/dagger_4b"
