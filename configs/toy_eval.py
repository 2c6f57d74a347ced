# toy_eval.py - a toy checkpoint on the middle problems: --model=out/toy_opd/last, or another one.
model = "out/toy_opd/last"
benchmarks = "data/toy/middle.jsonl"
out_dir = "out/toy_eval"

num_problems = 64
samples_per_problem = 8
max_new_tokens = 256
temperature = 1.0                   # the model's own distribution, whose entropy is measured
top_p = 1.0
dtype = "float32"

kv_cache_gb = 0.5
rollout_rows = 512
max_tokens_per_microbatch = 4096
window = 512
