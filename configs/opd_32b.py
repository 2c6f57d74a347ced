# opd_32b.py - Qwen3-32B -> Qwen3-8B-Base, student prefixes, reverse KL: too big for one GPU each, so both are sharded over all.
#
# Estimated for 8 H100 (python tests/bench_ranks.py --paper), not measured: 57 GB a GPU; at 8 ms a token of vLLM 36 to 43 s a
# step, 900 to 3,000 tokens/s, 10 to 12 hours. Each rank reads both models whole into the host's memory before it keeps its
# shard: with fp32 masters and a bf16 teacher 8 x (33 + 66) GB for a node.
from configs.opd_4b import *

student = "Qwen/Qwen3-8B-Base"
teacher = "Qwen/Qwen3-32B"
out_dir = "out/opd_32b"

fsdp = True
gradient_checkpointing = True
