# toy_hard_sft.py - plain SFT, the baseline: cross-entropy on the teacher's responses.
# First: python sample.py configs/toy_sample.py
# --trajectories=None trains on the solutions in the prompt file instead.
from configs.toy_sft import *

teacher = None
out_dir = "out/toy_hard_sft"
