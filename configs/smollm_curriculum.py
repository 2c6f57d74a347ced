# smollm_curriculum.py - the entropy-gated length curriculum (section 5.2) on a real language model.
from configs.smollm_cells import *

# Within 12 tokens no response of the teacher ends, within 24 half of them, within 64 all.
horizons = (12, 24, 64)
steps_per_horizon = 6
entropy_floor = 0.6                 # of the entropy at the end of the first rung
out_dir = "out/smollm_curriculum"
