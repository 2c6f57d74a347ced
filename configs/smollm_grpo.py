# smollm_grpo.py - GRPO makes a teacher: SmolLM2-135M-Instruct learns word problems of one step, on
# a CPU. `python data/smollm.py` makes the model and the problems.
student = "data/smollm/base"
prompts = "data/smollm/train.jsonl"
eval_data = "data/smollm/held_out.jsonl"
out_dir = "out/smollm_grpo"

max_new_tokens = 40
temperature = 0.6                   # at 1 the base model is right too seldom for a reward
rollout_rows = 64
kv_cache_gb = 1.0                   # with --engine=vllm

prompts_per_step = 8
group_size = 8
max_steps = 60
learning_rate = 2e-5
warmup_steps = 5
dtype = "bfloat16"
max_tokens_per_microbatch = 2048

eval_every = 30
eval_prompts = 64
eval_samples = 4
eval_max_new_tokens = 64
eval_temperature = 1.0              # the model's own distribution, whose entropy means something
eval_top_p = 1.0
save_every = 30
keep = 2
