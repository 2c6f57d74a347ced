# smollm_cells.py - what the runs of `cells.py --world smollm` have in common. It sets prefix,
# reverse_weight, max_new_tokens and stop itself.
from configs.smollm_opd import *

batch_size = 16
max_steps = 20
eval_every = 20
eval_kl = False                     # of the cached teacher only the head is kept
save_every = 20
out_dir = "out/smollm_cells"
