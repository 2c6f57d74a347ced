# sample_4b.py - Qwen3-4B's responses to the DeepScaleR prompts, once, for sft_4b and offline_4b.
# With hidden states a token takes 5,128 bytes: 410 GB at 2,000 tokens a response. With
# --cache_hidden=False it takes 8 bytes, and training runs the teacher.
model = "Qwen/Qwen3-4B"
student = "Qwen/Qwen3-0.6B-Base"
prompts = "data/deepscaler.jsonl"
out_dir = "out/sample_4b"

max_new_tokens = 4096
temperature = 1.0
top_p = 0.95
top_k = 20

rollout_rows = 32       # 20 GB of KV cache at 4096 tokens
dtype = "bfloat16"
cache_hidden = True
seed = 42
