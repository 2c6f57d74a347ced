# mix_4b.py - KL mixing on student prefixes (Eq. 4); the paper sweeps lam over 1, 0.8, 0.5, 0.2, 0 by --reverse_weight=...
from configs.opd_4b import *

reverse_weight = 0.2
out_dir = "out/mix_4b"
