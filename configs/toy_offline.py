# toy_offline.py - offline-RL style: teacher prefixes, reverse KL.
from configs.toy_opd import *

prefix = "teacher"
out_dir = "out/toy_offline"
