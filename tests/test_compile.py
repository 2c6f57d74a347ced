"""
compile = True: layers give the same numbers and gradients, rollouts the same tokens, and all is
compiled a few times, whatever the lengths.
"""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

import rl_grpo
import train_distill
from engine import Sampling, make_engine, score
from models import load_model, response_hidden
from utils import UserError, check_ranges, read_lines

ROWS = [(4, 40), (7, 25), (12, 90), (1, 33), (2, 50)]


@pytest.fixture
def traced(monkeypatch, request):
    """Layers are traced, but no program is built: that takes half a minute."""
    torch._dynamo.reset()
    counters.clear()
    backend = getattr(request, "param", "eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def graphs():
    return counters["stats"]["unique_graphs"]


def batch(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(48, 58, (rows, length), generator=generator).tolist()
    return [(row[: 3 + i % 2], row[3 + i % 2 :]) for i, row in enumerate(ids)]


@pytest.mark.parametrize("traced", ["aot_eager"], indirect=True)  # differentiated, too
@pytest.mark.parametrize("recompute, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_same_numbers_and_no_compiling_for_each_length(traced, recompute, dtype):
    plain = load_model("data/toy/student", torch.float32)
    ours = load_model("data/toy/student", torch.float32, "cpu", recompute, compiled=True)
    for shape in ROWS:
        found = []
        for model in (plain, ours):
            hidden = response_hidden(model, batch(*shape), dtype)
            hidden.float().square().sum().backward()
            found.append([hidden, *(weight.grad for weight in model.parameters())])
            model.zero_grad()
        for x, y in zip(*found):
            scale = x.float().abs().max()
            assert (x - y).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * scale
    made = graphs()
    assert 3 <= made <= 12                               # attention, MLP, norm; B = 1 is its own
    for rows, length in ROWS:
        response_hidden(ours, batch(rows, length + 1), dtype).float().sum().backward()
    assert graphs() == made


def engine_of(model, dtype, compiled):
    cfg = SimpleNamespace(compile=compiled, rollout_rows=64, max_tokens_per_microbatch=4096,
                          max_logprob_gap=None, kv_cache_gb=1.0, rollout_timeout=9.0)
    return make_engine("hf", cfg, model, dtype, 272, 96)


def written_by(engine, rows, length):
    prompts = [prompt + response for prompt, response in batch(rows, length)]
    rollouts = engine.generate(prompts, Sampling(60, (257, 260)), range(rows))
    return prompts, rollouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollouts_are_the_same_by_few_programs(traced, dtype):
    """
    Of the model itself or its copy, whose layers are compiled for training, too: whatever the rows
    and lengths, and with new weights.
    """
    models = [load_model("data/toy/student", torch.float32, compiled=on) for on in (False, True)]
    plain, ours = (engine_of(model, dtype, on) for model, on in zip(models, (False, True)))
    wrote = []
    for shape in ROWS:
        wrote.append(written_by(plain, *shape))
        assert written_by(ours, *shape) == wrote[-1]
        assert 1 <= graphs() <= 3                        # one row is its own; rows = columns may be
        for model, engine in zip(models, (plain, ours)):
            model.model.norm.weight.data *= 0.9
            engine.sync()
    assert written_by(ours, *ROWS[0]) != wrote[0]
    response_hidden(models[1], batch(4, 20))
    assert graphs() > 3                                  # in training layers have their programs


@pytest.mark.slow                                        # it builds the programs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_programs_write_what_the_model_means(dtype):
    """Log-probs are the model's, and a row does not depend on its neighbours."""
    torch._dynamo.reset()
    engine = engine_of(load_model("data/toy/student", torch.float32), dtype, True)
    prompts, rollouts = written_by(engine, 12, 20)
    _, gaps = score(engine, prompts, rollouts)
    assert gaps["logprob_gap_max"] < (1e-4 if dtype == torch.float32 else 0.15)
    if dtype == torch.float32:
        for i in (0, 7):
            alone, = engine.generate(prompts[i:i + 1], Sampling(60, (257, 260)), [i])
            assert alone[0] == rollouts[i][0]


def test_both_stages_read_the_key(traced, tmp_path):
    """Loss and gradient of runs with and without it, to rounding."""
    for script, argv in ((train_distill, ["configs/toy_opd.py", "--batch_size=4"]),
                         (rl_grpo, ["configs/toy_grpo.py", "--student=data/toy/student",
                                    "--prompts_per_step=1", "--kl_coef=0.1"])):
        found = []
        for on in (False, True):
            out = tmp_path / f"{script.__name__}_{on}"
            script.main([*argv, "--max_steps=1", "--max_new_tokens=16", "--eval_every=0",
                         f"--compile={on}", f"--out_dir={out}"])
            rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
            found += [(row["loss"], row["grad_norm"]) for row in rows]
            assert (graphs() > 0) == on
        assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found) == 2
        counters.clear()
        torch._dynamo.reset()


def test_without_a_compiler(monkeypatch):
    cfg = train_distill.Config(compile=True)
    monkeypatch.setenv("CXX", "none-at-all")
    with pytest.raises(UserError, match="compile=True: needs a C.. compiler: install g"):
        check_ranges(cfg)
    check_ranges(train_distill.Config())
    monkeypatch.setenv("CXX", sys.executable)
    check_ranges(cfg)
