# toy_offline.py - offline-RL style: teacher prefixes, reverse KL.
# First: python sample.py configs/toy_sample.py
from configs.toy_sft import *

reverse_weight = 1.0
out_dir = "out/toy_offline"
