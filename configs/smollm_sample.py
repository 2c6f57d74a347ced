# smollm_sample.py - the responses of the teacher that configs/smollm_grpo.py makes, to the training
# prompts, with its hidden states: for teacher prefixes.
model = "out/smollm_grpo/last"
student = "data/smollm/base"
prompts = "data/smollm/train.jsonl"
out_dir = "out/smollm_sample"

max_new_tokens = 64
kv_cache_gb = 1.0
rollout_rows = 64
dtype = "bfloat16"
cache_hidden = True
max_tokens_per_microbatch = 2048
