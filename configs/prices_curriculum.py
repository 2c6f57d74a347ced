# prices_curriculum.py - the entropy-gated length curriculum (section 5.2) on the world of
# data/prices.py: student prefixes, reverse KL.
from configs.prices_cells import *

# One step of a solution, four, and eight, which no response ends within; and all of it.
horizons = (6, 24, 48, 96)
steps_per_horizon = 50
entropy_floor = 0.6                 # of the entropy at the end of the first rung
out_dir = "out/prices_curriculum"
