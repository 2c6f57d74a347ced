# toy_dagger.py - DAgger style: student prefixes, forward KL.
from configs.toy_opd import *

reverse_weight = 0.0
out_dir = "out/toy_dagger"
