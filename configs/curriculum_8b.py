# curriculum_8b.py - Qwen3-8B -> Qwen3-0.6B-Base with the entropy-gated length curriculum; its
# controls are made as for the 4B teacher.
from configs.curriculum_4b import *

teacher = "Qwen/Qwen3-8B"
out_dir = "out/curriculum_8b"
