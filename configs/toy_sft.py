# toy_sft.py - off-policy SFT with soft labels: teacher prefixes, forward KL.
# First: python sample.py configs/toy_sample.py
from configs.toy_opd import *

prefix = "teacher"
trajectories = "out/toy_sample"
reverse_weight = 0.0
eval_teacher = False                # of the teacher only its LM head is kept
out_dir = "out/toy_sft"
