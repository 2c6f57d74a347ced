# prices_grpo.py - GRPO on the world of data/prices.py, from a run of cells.py.
student = "out/cells/42/student_1_96_union/last"
prompts = "data/prices/train.jsonl"
eval_data = "data/prices/test.jsonl"
out_dir = "out/prices_grpo"

max_new_tokens = 96
kv_cache_gb = 0.5
rollout_rows = 512

prompts_per_step = 8
group_size = 8
max_steps = 150
learning_rate = 2e-4
warmup_steps = 5
dtype = "float32"
max_tokens_per_microbatch = 4096

eval_every = 25
eval_prompts = 64
eval_samples = 8
eval_max_new_tokens = 192
eval_temperature = 1.0
eval_top_p = 1.0
save_every = 50
keep = 2
