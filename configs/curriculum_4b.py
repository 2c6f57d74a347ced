# curriculum_4b.py - Qwen3-4B -> Qwen3-0.6B-Base with the entropy-gated length curriculum (5.2).
# Its controls with a fixed horizon are curricula of one rung: --horizons="(128,)" and so on to
# --horizons="(4096,)", each with an --out_dir of its own.
from configs.opd_4b import *

horizons = (128, 256, 512, 1024, 2048, 4096)
steps_per_horizon = 160             # 5 gates in 800 steps, and 200 steps at the last rung
entropy_floor = 0.5                 # half the entropy at the end of the first rung
out_dir = "out/curriculum_4b"
