# toy_curriculum.py - the entropy-gated length curriculum (section 5.2) on the toy world: student
# prefixes, reverse KL. Its controls are curricula of one rung: --horizons="(24,)" and so on to
# --horizons="(160,)". With --stop=student the gate closes.
from configs.toy_cells import *

# Within 24 tokens few responses end, within 160 all but the longest hundredth do.
horizons = (24, 48, 96, 160)
steps_per_horizon = 50
entropy_floor = 0.6                 # of the entropy at the end of the first rung
out_dir = "out/toy_curriculum"
