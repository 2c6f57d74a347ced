# offline_4b.py - offline-RL style: teacher prefixes, reverse KL. --teacher=Qwen/Qwen3-8B for the 8B cell.
from configs.opd_4b import *

prefix = "teacher"
out_dir = "out/offline_4b"
