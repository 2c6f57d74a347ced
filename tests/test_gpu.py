"""
What needs a GPU: `make test-gpu` runs this file and the kernels' tests there. docs/running.md says
which of it has run.
"""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import STOPS, steps_of, torchrun
from transformers import AutoModelForCausalLM, Qwen3Config

import estimate
import models
import train_distill
import utils
from engine import Sampling, make_engine, score, vllm_version

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; make test-gpu")
needs_vllm = pytest.mark.skipif(vllm_version() == "none", reason='pip install -e ".[vllm]"')
CFG = SimpleNamespace(rollout_rows=64, kv_cache_gb=0.5, rollout_timeout=300.0,
                      max_logprob_gap=None, max_tokens_per_microbatch=4096)


@pytest.mark.parametrize("config", ["toy_opd", "toy_dagger", "toy_offline", "toy_sft"])
def test_a_step_in_bf16_beside_fp32(train, config):
    """The four cells: the same responses up to rounding, so nearly the same numbers."""
    rows = {}
    for dtype in ("float32", "bfloat16"):
        (rows[dtype],), _ = train(
            f"configs/{config}.py", "--max_steps=1", "--engine=hf", f"--dtype={dtype}",
            "--trajectories=None", "--batch_size=64")
    for key in ("loss", "forward_kl", "reverse_kl", "student_entropy", "mean_length"):
        assert rows["bfloat16"][key] == pytest.approx(rows["float32"][key], rel=0.1), key
    assert rows["bfloat16"]["logprob_gap_mean"] < 0.02


@needs_vllm
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_generate_sleep_sync_generate(prompts, dtype, limit):
    """
    The engine holds the trainer's weights, by digest and by log-probs, before an update and after
    it; asleep it has given its memory back, and the trainer's stream is as it was.
    """
    model = models.load_model("data/toy/student", torch.float32, "cuda")
    stream = torch.cuda.current_stream()
    engine, sampling = make_engine("vllm", CFG, model, dtype, 272, 400), Sampling(40, STOPS)
    free = []
    for _ in range(3):
        rollouts = engine.generate(prompts[:32], sampling, range(32))
        assert engine.asleep and torch.cuda.current_stream() == stream
        free.append(torch.cuda.mem_get_info()[0])
        _, gaps = score(engine, prompts[:32], rollouts)
        utils.end_on_fault()
        assert gaps["logprob_gap_mean"] < limit and gaps["nonfinite_logps"] == 0
        for parameter in model.parameters():
            parameter.data *= 1.01
        assert not engine.in_sync()
        engine.sync()
    assert free[-1] > free[0] - 2**26


@needs_vllm
def test_two_ranks(tmp_path):
    """They have the losses of one, with an engine each, whole or sharded."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is visible")
    argv = ["train_distill.py", "configs/toy_opd.py", "--engine=vllm", "--batch_size=16",
            "--max_steps=3", "--eval_every=0", "--temperature=0"]
    losses = []
    for ranks, options in ((1, []), (2, []), (2, ["--fsdp=True"])):
        out = tmp_path / f"{ranks}{len(options)}"
        done = torchrun(ranks, *argv, *options, f"--out_dir={out}")
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in steps_of(utils.read_lines(out / "metrics.jsonl"))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)


def random_model(folder, size, layers=2):
    """A Qwen3 of the paper's shapes with random weights, and the toy world's tokenizer."""
    hidden, inner, heads = size
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=True, max_position_embeddings=32768, eos_token_id=257)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = f"data/toy/student/{name}"
        if os.path.exists(source):
            (folder / name).write_bytes(open(source, "rb").read())
    return str(folder)


def test_memory_of_the_papers_shapes(tmp_path):
    """
    Five steps of opd_4b with two layers and 4,096 new tokens: the memory does not grow after the
    second step, and is what estimate.py says, but for what CUDA itself takes.
    """
    kind = "hf" if vllm_version() == "none" else "vllm"
    argv = ["configs/opd_4b.py", "--prompts=data/toy/train.jsonl", "--eval_every=0",
            "--max_steps=5", "--batch_size=8", "--save_every=1000", "--check_sync_every=2",
            f"--engine={kind}", f"--out_dir={tmp_path / 'out'}"]
    argv.append(f"--student={random_model(tmp_path / 'student', (1024, 3072, 16))}")
    argv.append(f"--teacher={random_model(tmp_path / 'teacher', (2560, 9728, 32))}")
    train_distill.main(argv)
    rows = utils.read_lines(tmp_path / "out/metrics.jsonl")
    print(json.dumps([{"peak_gb": row["peak_gb"], "seconds": row["seconds"]} for row in rows]))
    cfg = utils.load_config(estimate.Config, argv)
    expected = estimate.memory(cfg, estimate.read_models(cfg))["at most at a time"] / 1e9
    assert rows[-1]["peak_gb"] < 1.02 * rows[1]["peak_gb"]
    assert 0.3 * expected < rows[-1]["peak_gb"] < 1.1 * expected
