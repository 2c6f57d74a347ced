"""Two threads, the toy models, and a short way to run the training script in process."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")        # the same numbers on every machine; CUDA_VISIBLE_DEVICES=0 overrides
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ["TRITON_INTERPRET"] = "1"                 # read when a kernel is defined: kernels run on the CPU

import pytest
import torch

import train_distill
import utils

torch.set_num_threads(2)

STOPS = (257, 260)                                       # <|endoftext|>, <|im_end|>
SHORT = ["--batch_size=8", "--max_new_tokens=24", "--eval_every=0", "--save_every=1000", "--max_tokens_per_microbatch=512"]


@pytest.fixture(scope="session")
def tokenizer():
    return utils.load_tokenizer("data/toy/student")


@pytest.fixture()
def student():
    return utils.load_model("data/toy/student", torch.float32)


@pytest.fixture(scope="session")
def teacher():
    return utils.load_model("data/toy/teacher", torch.float32)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    return [utils.encode_prompt(tokenizer, row["problem"]) for row in utils.load_problems("data/toy/middle.jsonl")]


@pytest.fixture(scope="session")
def sequences(prompts):
    """(prompt, response) pairs from the files' solutions, of many lengths."""
    tok, rows = utils.load_tokenizer("data/toy/student"), utils.load_problems("data/toy/middle.jsonl")
    return [(p, tok.encode(r["solution"], add_special_tokens=False) + [257]) for p, r in zip(prompts, rows)]


@pytest.fixture()
def train(tmp_path):
    """train("configs/toy_opd.py", "--max_steps=3") -> (metrics lines, run folder)."""
    def go(*argv, out=None, short=True):
        out = out or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        train_distill.main([*argv[:1], *(SHORT if short else []), f"--out_dir={out}", *argv[1:]])
        return utils.read_lines(out / "metrics.jsonl"), out
    return go
