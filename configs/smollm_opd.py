# smollm_opd.py - on-policy distillation of SmolLM2-135M-Instruct as it comes, from the model that
# configs/smollm_grpo.py has made of it. CPU, minutes.
student = "data/smollm/base"
teacher = "out/smollm_grpo/last"
prompts = "data/smollm/train.jsonl"
eval_data = "data/smollm/held_out.jsonl"
out_dir = "out/smollm_opd"

prefix = "student"
reverse_weight = 1.0
max_new_tokens = 64
rollout_rows = 64
kv_cache_gb = 1.0                   # with --engine=vllm

batch_size = 32
max_steps = 15
learning_rate = 3e-5
warmup_steps = 5
dtype = "bfloat16"
max_tokens_per_microbatch = 1152

eval_every = 8
eval_prompts = 64
eval_samples = 4
eval_max_new_tokens = 64
eval_temperature = 1.0              # the model's own distribution, whose entropy means something
eval_top_p = 1.0
eval_kl = True                      # moves long before accuracy does
save_every = 8
keep = 2
