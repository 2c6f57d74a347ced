# offline_4b.py - offline-RL style: teacher prefixes, reverse KL, on the trajectories of sft_4b.
from configs.sft_4b import *

reverse_weight = 1.0
out_dir = "out/offline_4b"
