"""The memory estimate, by hand and against what autograd keeps; the choice of an engine."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import engine as engine_module
import utils
from engine import HFEngine, Sampling, check_logprobs, choose_engine, make_engine

CFG = SimpleNamespace(dtype="bfloat16", kv_cache_gb=16.0, rollout_rows=32, max_tokens_per_microbatch=16384, fsdp=False,
                      gradient_checkpointing=False)


def qwen(hidden, layers, heads, tied, intermediate=None, vocab=151936, kv=8):
    return Qwen3Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate or 3 * hidden,
                       num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=128,
                       tie_word_embeddings=tied)


def test_by_hand():
    """Qwen3-8B -> 0.6B: parameters as published, 114,688 bytes of cache a token, 28 layers x 82 kB of activations a token."""
    small, big = qwen(1024, 28, 16, True), qwen(4096, 36, 32, False)
    assert utils.parameter_count(small) == 596_049_920 and utils.parameter_count(big) == 8_190_735_360
    parts = utils.estimate_memory(CFG, "vllm", small, small, {"teacher": (big, 2)}, 4096)
    chunk = utils.CHUNK_BYTES[torch.cuda.is_available()] + 4 * 151936 * 1024
    assert list(parts.values())[:-1] == [16 * 596_049_920, 16_381_470_720, 16_000_000_000, 2 * (596_049_920 + 151936 * 1024),
                                         16384 * 28 * (26 * 1024 + 8 * 3072 + 10 * 3072), 2 * 596_049_920, chunk]
    assert parts["at most at a time"] == sum(list(parts.values())[:2]) + sum(list(parts.values())[4:7])
    parts = utils.estimate_memory(CFG, "hf", small, small, {}, 4096)
    assert parts["rollouts: KV cache"] == 32 * 4096 * 28 * 2 * 8 * 128 * 2
    CFG32 = SimpleNamespace(**{**vars(CFG), "dtype": "float32"})
    parts = utils.estimate_memory(CFG32, "hf", small, big, {}, 4096)
    assert parts["rollouts: KV cache"] == 32 * 4096 * 36 * 2 * 8 * 128 * 4 and parts["rollouts: the engine's weights"] == 0


def test_sharded_by_hand():
    """Qwen3-32B -> 8B on 8 devices: an eighth of weights, gradients, Adam and teacher; embedding, head and two layers whole."""
    student, teacher = qwen(4096, 36, 32, False, 12288), qwen(5120, 64, 64, False, 25600)
    n, m = 8_190_735_360, 32_762_123_264
    assert (utils.parameter_count(student), utils.parameter_count(teacher)) == (n, m)
    cfg = SimpleNamespace(**{**vars(CFG), "fsdp": True, "gradient_checkpointing": True})
    parts = utils.estimate_memory(cfg, "hf", student, student, {"teacher": (teacher, 2)}, 4096, world=8)
    assert parts["student: fp32 weights, gradients, Adam"] == 2 * n and parts["teacher"] == m // 4
    assert parts["rollouts: the engine's weights"] == 2 * n
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 12288) + 2 * 4096 + 2 * 128
    assert utils.gathered_at_once(student) == pytest.approx(2 * 151936 * 4096 + 2 * layer, rel=1e-4)
    theirs = utils.gathered_at_once(teacher)
    assert parts["update: weights gathered by FSDP"] == 6 * utils.gathered_at_once(student) + 2 * theirs
    one = 26 * 4096 + 8 * 12288 + 10 * (4096 + 1024)
    assert parts["update: activations of a micro-batch"] == 16384 * (one + 36 * 4096 * 2)
    cfg.fsdp = False
    parts = utils.estimate_memory(cfg, "hf", student, student, {"teacher": (teacher, 2)}, 4096, world=8)
    assert parts["teacher"] == 2 * m and parts["update: activations of a micro-batch"] == 16384 * (one + 36 * 4096 * 4)


def test_time_by_hand():
    """One response of 100 tokens a device; 1e12 FLOP/s in a GEMM, 1e9 bytes/s, 1e-6 s a launch, 1e8 bytes/s between ranks."""
    small, cfg = qwen(256, 4, 2, True, 512, 1000, 1), SimpleNamespace(**{**vars(CFG), "dtype": "float32"})
    n, speeds = utils.parameter_count(small), {"flops": 1e12, "bytes": 1e9, "launch": 1e-6, "link": 1e8}
    forward = utils.forward_flops(small, [100]) / 0.4e12 + 400e-6
    parts = utils.estimate_time(cfg, "hf", small, small, {"teacher": (small, 4)}, 100, 2, 2, speeds)
    cache = 2 * 4 * 128 * 4 * 50
    assert parts == pytest.approx({"rollouts": 100 * ((4 * n + cache) / 1e9 + 400e-6), "teacher and reference": forward,
                                   "student": 3 * forward, "between ranks": 4 * n / 1e8, "optimizer": 28 * n / 1e9})
    cfg.fsdp = cfg.gradient_checkpointing = True
    parts = utils.estimate_time(cfg, "vllm", small, small, {"teacher": (small, 4)}, 100, 2, 2, speeds)
    assert parts == pytest.approx({"rollouts": 100 * ((4 * n + cache) / 1e9 + 0.002), "teacher and reference": forward,
                                   "student": 4 * forward, "between ranks": (12 + 4 + 4) * n / 2 / 1e8,
                                   "optimizer": 14 * n / 1e9})


def test_estimate_is_of_the_right_size(train, capsys):
    """A step of the toy world takes what was printed, within a factor of ten."""
    rows, _ = train("configs/toy_opd.py", "--max_steps=4", "--batch_size=64", "--max_new_tokens=96")
    printed = re.search(r"a step +([\d.]+) s", capsys.readouterr().out)
    seconds = sorted(sum(value for key, value in row.items() if key.endswith("_seconds")) for row in rows)[1]
    assert 0.1 < float(printed[1]) / seconds < 10
    assert all(0.1 < row[f"{phase}_gb"] < 10 for row in rows for phase in ("rollout", "teacher", "student", "optimizer"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_as_autograd_keeps_them(dtype):
    """Bytes saved for backward by a forward over 96 tokens, less those over 32: the estimate is within 5 %."""
    config = qwen(256, 8, 2, True, 512, 64, 1)
    model, kept = Qwen3ForCausalLM(config), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor          # held, so that no address is used twice
        return tensor

    def saved(tokens):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = utils.response_hidden(model, [([1], [2] * (tokens - 1))], dtype)
        return sum(size for size, _ in kept.values()), hidden
    cfg = SimpleNamespace(**{**vars(CFG), "dtype": str(dtype).removeprefix("torch."), "max_tokens_per_microbatch": 64})
    wanted = utils.estimate_memory(cfg, "hf", config, config, {}, 8)["update: activations of a micro-batch"]
    assert saved(96)[0] - saved(32)[0] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("kind, device, version, chosen, printed", [
    ("auto", "cpu", "0.32.0", "hf", "rollouts by transformers (auto: there is no GPU)"),
    ("auto", "cuda", None, "hf", "rollouts by transformers (auto: vLLM installed: None)"),
    ("auto", "cuda", "0.31.9", "hf", "rollouts by transformers (auto: vLLM installed: 0.31.9)"),
    ("auto", "cuda", "0.32.1", "vllm", "rollouts by vLLM 0.32.1"), ("hf", "cuda", "0.32.1", "hf", "rollouts by transformers"),
    ("vllm", "cpu", "0.32.1", "vllm", "rollouts by vLLM 0.32.1")])
def test_the_choice_is_printed(monkeypatch, capsys, kind, device, version, chosen, printed):
    monkeypatch.setattr(engine_module, "vllm_version", lambda: version)
    monkeypatch.setattr(engine_module, "import_vllm", lambda: None)
    assert choose_engine(kind, torch.device(device), True) == chosen
    assert capsys.readouterr().out == printed + "\n"


def test_a_wrong_engine_is_found_here_too(student, prompts):
    """HFEngine with a copy of other weights: the same check, the same message."""
    engine = HFEngine(student, torch.bfloat16)
    engine.model.model.norm.weight.data *= 1.5
    rollouts = engine.generate(prompts[:8], Sampling(12, (257, 260)), range(8))
    engine.max_logprob_gap = 0.05
    with pytest.raises(utils.UserError, match=r"passes max_logprob_gap=0.05. .*: model.norm.weight 0.5,"):
        check_logprobs(engine, student, prompts[:8], rollouts, 272, torch.bfloat16, 4096)
    engine.sync(student)
    rollouts = engine.generate(prompts[:8], Sampling(12, (257, 260)), range(8))
    gaps = check_logprobs(engine, student, prompts[:8], rollouts, 272, torch.bfloat16, 4096)
    assert 0 < gaps["logprob_gap_mean"] < 0.02


@pytest.mark.parametrize("key", ["kv_cache_gb", "rollout_timeout", "max_logprob_gap"])
def test_settings_of_an_engine(student, key):
    good = {"rollout_rows": 4, "kv_cache_gb": 0.1, "rollout_timeout": 1.0, "max_logprob_gap": None}
    assert make_engine("hf", SimpleNamespace(**good), student, torch.float32, 272, 64).max_logprob_gap == 1e-4
    with pytest.raises(utils.UserError, match=f"{key}=-1.0: must be positive"):
        make_engine("hf", SimpleNamespace(**good | {key: -1.0}), student, torch.float32, 272, 64)
