# smollm_pruned.py - brought back: SmolLM2-135M-Instruct without six of its 30 layers learns from
# the whole model, on its own responses to word problems.
# First: python data/smollm.py --drop 25,4,5,26,7,6
from configs.smollm_opd import *

student = "data/smollm/pruned"
teacher = "data/smollm/base"
out_dir = "out/smollm_pruned"

batch_size = 16
max_steps = 72
learning_rate = 5e-5
eval_every = 24
eval_samples = 1
save_every = 24
