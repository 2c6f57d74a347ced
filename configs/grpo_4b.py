# grpo_4b.py - GRPO from the student that Qwen3-4B taught, with the paper's settings (appendix
# G.6): 4 prompts x 8 responses a step. To start from another cell, --student=out/dagger_4b/last,
# out/sft_4b/last or out/offline_4b/last.
student = "out/opd_4b/last"
prompts = "data/deepscaler.jsonl"
eval_data = "data/math500.jsonl"
out_dir = "out/grpo_4b"

max_new_tokens = 4096
temperature = 1.0
top_p = 0.95

prompts_per_step = 4
group_size = 8
kl_coef = 0.0
updates_per_batch = 1
max_steps = 1000
learning_rate = 1e-6
warmup_steps = 50
dtype = "bfloat16"
seed = 42

eval_every = 30
eval_max_new_tokens = 4096
eval_temperature = 0.6
eval_top_p = 0.95
save_every = 40
keep = 10
