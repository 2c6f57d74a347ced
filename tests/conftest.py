"""The toy models, and a short way to run the training script in this process."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# The same numbers on every machine; CUDA_VISIBLE_DEVICES=0 takes a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: kernels run on the CPU

import pytest
import torch
from safetensors.torch import load_file

import train_distill
from data.problems import encode_prompt, load_problems, load_tokenizer
from models import load_model
from utils import read_lines

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

STOPS = (257, 260)  # <|endoftext|>, <|im_end|>
SHORT = ["--batch_size=8", "--max_new_tokens=24", "--eval_every=0", "--save_every=1000",
         "--max_tokens_per_microbatch=512"]


def torchrun(n, *arguments, timeout=500):
    """
    A finished process, with what its ranks printed, rank after rank: each writes into a file of
    its own, for in one pipe a rank's line may lie in the middle of another's.
    """
    with tempfile.TemporaryDirectory() as logs:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--redirects=3",
             f"--nproc_per_node={n}", f"--log-dir={logs}", *map(str, arguments)],
            timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
            text=True)
        launcher = done.stderr
        done.stdout, done.stderr = (
            "".join(path.read_text() for path in sorted(Path(logs).glob(f"*/*/*/{stream}.log")))
            for stream in ("stdout", "stderr"))
    if done.returncode and not done.stderr:
        done.stderr = launcher  # no rank has begun
    return done


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("data/toy/student")


@pytest.fixture()
def student():
    return load_model("data/toy/student", torch.float32)


@pytest.fixture(scope="session")
def teacher():
    return load_model("data/toy/teacher", torch.float32)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    problems = load_problems("data/toy/middle.jsonl")
    return [encode_prompt(tokenizer, problem["problem"]) for problem in problems]


@pytest.fixture(scope="session")
def sequences(tokenizer, prompts):
    """(prompt, response) pairs from the solutions in the file, of many lengths."""
    pairs = []
    for prompt, problem in zip(prompts, load_problems("data/toy/middle.jsonl")):
        solution = tokenizer.encode(problem["solution"], add_special_tokens=False)
        pairs.append((prompt, [*solution, STOPS[0]]))
    return pairs


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """The toy teacher with a template that writes its stop id into the prompt, as Qwen3's does."""
    folder = tmp_path_factory.mktemp("chats") / "teacher"
    shutil.copytree("data/toy/teacher", folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{{ m['content'] }}<|im_end|>")
    tokenizer.save_pretrained(folder)
    assert STOPS[1] in encode_prompt(tokenizer, "1+2?")
    return folder


@pytest.fixture()
def train(tmp_path):
    """train("configs/toy_opd.py", "--max_steps=3") -> (rows of metrics.jsonl, run folder)."""
    def go(config, *options, out=None):
        out = out or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        train_distill.main([config, *SHORT, f"--out_dir={out}", *options])
        return read_lines(out / "metrics.jsonl"), out
    return go


def steps_of(rows):
    """Those of training steps, without the evaluations between them."""
    return [row for row in rows if "loss" in row]


def without_times(rows):
    """What a run that is left alone and one that is resumed have in common to the last digit."""
    # The gap is looked at after a resume, too.
    varies = re.compile("seconds|per_second|logprob_gap|nonfinite|_gb")
    return [{key: row[key] for key in row if not varies.search(key)} for row in rows]


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def saved(checkpoint):
    """Weights and AdamW's moments, each tensor by its name."""
    tensors = weights(checkpoint)
    for name, moments in torch.load(checkpoint / "optimizer.pt").items():
        for key, tensor in moments.items():
            tensors[f"{name} {key}"] = tensor
    return tensors


def same(a, b, tolerance=0.0):
    """Whether two {name: tensor} differ by no more than this."""
    assert a.keys() == b.keys()
    return all((a[name] - b[name]).abs().max() <= tolerance for name in a)
