# prices_cells.py - what the runs of cells.py have in common, on the world of data/prices.py. It
# sets prefix, reverse_weight, max_new_tokens and stop itself.
student = "data/prices/student"
teacher = "data/prices/teacher"
prompts = "data/prices/train.jsonl"
eval_data = "data/prices/test.jsonl"
out_dir = "out/prices_cells"

prefix = "student"
reverse_weight = 1.0
max_new_tokens = 96                 # a right response has 77 to 89

rollout_rows = 512
kv_cache_gb = 0.5                   # with --engine=vllm

batch_size = 32
max_steps = 200
learning_rate = 2e-4
warmup_steps = 10
dtype = "float32"
max_tokens_per_microbatch = 4096

eval_every = 25
eval_prompts = 64
eval_samples = 8
eval_max_new_tokens = 192
eval_temperature = 1.0              # the model's own distribution, whose entropy means something
eval_top_p = 1.0
save_every = 100
keep = 2
