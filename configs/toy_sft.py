# toy_sft.py - off-policy SFT with soft labels: teacher prefixes, forward KL.
from configs.toy_opd import *

prefix = "teacher"
reverse_weight = 0.0
out_dir = "out/toy_sft"
