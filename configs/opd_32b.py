# opd_32b.py - Qwen3-32B -> Qwen3-8B-Base, student prefixes, reverse KL. Both are too big for one
# GPU, so they are sharded over all.
#
# On paper 57 GB a GPU: python estimate.py configs/opd_32b.py --gpus 8. None of it was measured.
# Each rank reads both models whole into the host's memory before it keeps its shard: with fp32
# masters and a bf16 teacher 8 x (33 + 66) GB for a node.
from configs.opd_4b import *

student = "Qwen/Qwen3-8B-Base"
teacher = "Qwen/Qwen3-32B"
out_dir = "out/opd_32b"

fsdp = True
gradient_checkpointing = True
