# smollm_stops.py - what stops.py runs on a real language model: a student that is its teacher but
# for the id that ends a response. First: python data/smollm.py --other-end
from configs.smollm_opd import *

student = "data/smollm/other_end"
teacher = "data/smollm/base"
out_dir = "out/smollm_stops"
stop = "student"                    # the strictest convention

max_new_tokens = 96
batch_size = 16
max_steps = 10
eval_every = 10
eval_prompts = 48
eval_samples = 1
eval_max_new_tokens = 192
eval_kl = False
save_every = 10
