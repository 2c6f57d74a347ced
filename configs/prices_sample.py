# prices_sample.py - responses of the teacher of data/prices.py to the training prompts, with its
# hidden states: for the runs of cells.py on teacher prefixes.
model = "data/prices/teacher"
student = "data/prices/student"
prompts = "data/prices/train.jsonl"
out_dir = "out/prices_sample"

max_new_tokens = 96
kv_cache_gb = 0.5
rollout_rows = 256
dtype = "float32"
cache_hidden = True
max_tokens_per_microbatch = 4096
