# toy_sample.py - the toy teacher's responses to the training prompts, with its hidden states: for
# toy_sft and toy_offline.
model = "data/toy/teacher"
student = "data/toy/student"
prompts = "data/toy/train.jsonl"
out_dir = "out/toy_sample"

max_new_tokens = 160
kv_cache_gb = 0.5
rollout_rows = 256
dtype = "float32"
cache_hidden = True
max_tokens_per_microbatch = 4096
