# toy_hard_sft.py - plain SFT: cross-entropy on the solutions in the prompt file, no teacher.
from configs.toy_opd import *

teacher = None
prefix = "teacher"
reverse_weight = 0.0
eval_teacher = False
out_dir = "out/toy_hard_sft"
