# prices_sample.py - responses of the teacher of data/prices.py to the training prompts, with its
# hidden states: for the runs of cells.py on teacher prefixes.
from configs.toy_sample import *

model = "data/prices/teacher"
student = "data/prices/student"
prompts = "data/prices/train.jsonl"
max_new_tokens = 96
out_dir = "out/prices_sample"
