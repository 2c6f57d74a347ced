# opd_8b.py - Qwen3-8B -> Qwen3-0.6B-Base, student prefixes, reverse KL. On 8 GPUs each rank has 4
# of the 32 rollouts of a step.
#
# On paper 72 GB a GPU: python estimate.py configs/opd_8b.py --gpus 8. None of it was measured.
from configs.opd_4b import *

teacher = "Qwen/Qwen3-8B"
out_dir = "out/opd_8b"
