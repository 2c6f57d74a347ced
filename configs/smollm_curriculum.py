# smollm_curriculum.py - the entropy-gated length curriculum (section 5.2) on a real language model.
from configs.smollm_cells import *

# Of the teacher's 432 responses one ends within 12 tokens, 43 % within 24, 78 % within 64 (T = 1).
horizons = (12, 24, 64)
steps_per_horizon = 6
entropy_floor = 0.6                 # of the entropy at the end of the first rung
out_dir = "out/smollm_curriculum"
