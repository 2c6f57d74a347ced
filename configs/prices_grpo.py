# prices_grpo.py - GRPO on the world of data/prices.py, from a run of cells.py.
from configs.toy_grpo import *

student = "out/cells/42/student_1_96_union/last"
prompts = "data/prices/train.jsonl"
eval_data = "data/prices/test.jsonl"
max_new_tokens = 96
eval_max_new_tokens = 192
eval_every = 25
out_dir = "out/prices_grpo"
