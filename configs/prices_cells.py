# prices_cells.py - what the runs of cells.py have in common, on the world of data/prices.py;
# cells.py sets prefix, reverse_weight, max_new_tokens and stop.
from configs.toy_opd import *

student = "data/prices/student"
teacher = "data/prices/teacher"
prompts = "data/prices/train.jsonl"
eval_data = "data/prices/test.jsonl"
max_new_tokens = 96                 # a right response has 78 or 90
eval_max_new_tokens = 192
batch_size = 32
max_steps = 200
eval_teacher = False
save_every = 100
out_dir = "out/prices_cells"
