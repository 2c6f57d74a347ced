# opd_8b.py - Qwen3-8B -> Qwen3-0.6B-Base, student prefixes, reverse KL. 8 ranks x 4 = 32 rollouts per step.
#
# Estimated for 8 H100 (python tests/bench_ranks.py --paper), not measured: 72 GB a GPU. If a token of vLLM takes 2.5 ms, a step
# takes 11 s, at 3,000 tokens/s where responses are 1024 tokens long on average, 10,000 where all are 4096, and the run 3 to 4
# hours; at 10 ms a token 42 s, 800 to 3,000 tokens/s, 12 to 13 hours. The rollouts wait for their longest response.
from configs.opd_4b import *

teacher = "Qwen/Qwen3-8B"
out_dir = "out/opd_8b"
