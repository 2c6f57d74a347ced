# hard_sft_4b.py - plain SFT, the baseline: cross-entropy on the trajectories of sft_4b.
from configs.sft_4b import *

teacher = None
out_dir = "out/hard_sft_4b"
