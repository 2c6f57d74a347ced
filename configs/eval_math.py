# eval_math.py - the paper's benchmarks and settings (section 4): T 0.6, top-p 0.95, 8192 tokens,
# k = 3, 3, 3, 5, 5. The paper's "MATH500" figures fit the 5000 problems of the MATH test set
# (math); math500 is a part of it. First make the files: python data/benchmarks.py. The row of the
# Base student: --model=Qwen/Qwen3-0.6B-Base --template=Qwen/Qwen3-4B
model = "out/opd_4b/last"
benchmarks = "gsm8k,math500,math,amc23,aime24"
out_dir = "out/eval_math"

max_new_tokens = 8192
temperature = 0.6
top_p = 0.95
top_k = 0
rollout_rows = 32
dtype = "bfloat16"
seed = 42
