# toy_grpo.py - GRPO on the toy world, on a CPU, from any of its checkpoints:
# --student=out/toy_sft/last, --student=data/toy/student and so on.
student = "out/toy_opd/last"
prompts = "data/toy/train.jsonl"
eval_data = "data/toy/middle.jsonl"
out_dir = "out/toy_grpo"

max_new_tokens = 160
kv_cache_gb = 0.5
rollout_rows = 512

prompts_per_step = 8
group_size = 8
max_steps = 150
learning_rate = 2e-4
warmup_steps = 5
dtype = "float32"
max_tokens_per_microbatch = 4096

eval_every = 50
eval_prompts = 64
eval_samples = 8
eval_max_new_tokens = 256
eval_temperature = 1.0
eval_top_p = 1.0
save_every = 50
keep = 2
