# toy_mix.py - KL mixing (Eq. 4) on student prefixes, lam = 0.2: mostly forward KL.
from configs.toy_opd import *

reverse_weight = 0.2
out_dir = "out/toy_mix"
