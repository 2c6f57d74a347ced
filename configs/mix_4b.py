# mix_4b.py - KL mixing on student prefixes (Eq. 4).
# The paper goes through lam = 1, 0.8, 0.5, 0.2 and 0: --reverse_weight=...
from configs.opd_4b import *

reverse_weight = 0.2
out_dir = "out/mix_4b"
