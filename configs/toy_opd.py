# toy_opd.py - the demo: on-policy distillation (student prefixes, reverse KL) of the toy student,
# on a CPU.
student = "data/toy/student"
teacher = "data/toy/teacher"
prompts = "data/toy/train.jsonl"
eval_data = "data/toy/middle.jsonl"
out_dir = "out/toy_opd"

prefix = "student"
reverse_weight = 1.0
max_new_tokens = 160                # the longest hundredth of the teacher's responses is cut

rollout_rows = 512
kv_cache_gb = 0.5                   # with --engine=vllm

batch_size = 64
max_steps = 100
learning_rate = 2e-4
warmup_steps = 10
dtype = "float32"
max_tokens_per_microbatch = 4096    # stays near a CPU's cache; more would be slower

eval_every = 25
eval_prompts = 64
eval_samples = 8
eval_max_new_tokens = 256
eval_temperature = 1.0              # the model's own distribution, whose entropy means something
eval_top_p = 1.0
eval_teacher = True
save_every = 50
keep = 2
