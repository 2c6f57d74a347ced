# opd_4b.py - Qwen3-4B -> Qwen3-0.6B-Base, student prefixes, reverse KL, with the paper's settings
# (section 3, appendix G). --max_new_tokens=128 is its short horizon, and
# --teacher=Qwen/Qwen3-4B-Base is the other reading of its text.
student = "Qwen/Qwen3-0.6B-Base"
teacher = "Qwen/Qwen3-4B"
prompts = "data/deepscaler.jsonl"
eval_data = "data/math500.jsonl"
out_dir = "out/opd_4b"

prefix = "student"
reverse_weight = 1.0
loss_norm = "sequence"              # a mean of the sequences' means
max_new_tokens = 4096
temperature = 1.0
top_p = 0.95
top_k = 20

batch_size = 32
max_steps = 1000
learning_rate = 5e-7
warmup_steps = 50                   # 5 % of the steps
dtype = "bfloat16"
max_tokens_per_microbatch = 16384
seed = 42

eval_every = 30
eval_prompts = 200
eval_samples = 1
eval_max_new_tokens = 4096
eval_temperature = 0.6
eval_top_p = 0.95
save_every = 40
keep = 10
