# toy_cells.py - what the runs of stops.py have in common, on the demo's world; it sets prefix,
# reverse_weight, max_new_tokens and stop.
from configs.toy_opd import *

eval_data = "data/toy/hard.jsonl"   # on the middle problems Pass@8 is near 1 for everyone
learning_rate = 3e-4
max_steps = 200
eval_teacher = False
save_every = 100
out_dir = "out/toy_cells"
