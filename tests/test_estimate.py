"""estimate.py: memory and FLOPs by hand, activations beside what autograd keeps, kinds of runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import estimate
from estimate import Config, Models, flops, longest_rows, memory, parameter_count, read_models
from kernels.linear_kl import CHUNK_BYTES
from models import forward_flops, response_hidden
from utils import UserError, load_config, write_lines

STUDENT = "student: fp32 weights, gradients, Adam"
COPY = "student: bf16 copy that writes"
CACHE = "rollouts: KV cache"
ENGINE = "rollouts: the engine's weights"
ACTIVATIONS = "update: activations of a micro-batch"
HEAD = "teacher's LM head"


def qwen(hidden, layers, heads, tied, intermediate, vocab=151936, kv=8):
    return Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=128,
        tie_word_embeddings=tied)


SMALL = qwen(1024, 28, 16, True, 3072)                   # Qwen3-0.6B, 4B, 8B, 32B
MIDDLE = qwen(2560, 36, 32, True, 9728)
BIG = qwen(4096, 36, 32, False, 12288)
HUGE = qwen(5120, 64, 64, False, 25600)
N_SMALL, N_BIG, N_HUGE = 596_049_920, 8_190_735_360, 32_762_123_264


def most(parts):
    """The sum of what is always there and the larger of both phases."""
    rollouts = sum(size for part, size in parts.items() if part.startswith("rollouts"))
    update = sum(size for part, size in parts.items() if part.startswith("update"))
    models = (STUDENT, COPY, "teacher", "reference", HEAD)
    return sum(parts.get(part, 0) for part in models) + max(rollouts, update)


# ------------------------------------------------------------------------------------------ memory

def test_memory_by_hand():
    """Qwen3-8B -> 0.6B, vLLM: 28 layers x 82 kB of activations a token; 72 GB."""
    counts = [parameter_count(config) for config in (SMALL, BIG, HUGE)]
    assert counts == [N_SMALL, N_BIG, N_HUGE]            # as published
    parts = memory(Config(), Models(SMALL, SMALL, BIG, "teacher"))
    table = 151936 * 1024
    assert parts == {
        STUDENT: 16 * N_SMALL,
        "teacher": 2 * N_BIG,
        CACHE: 16_000_000_000,
        ENGINE: 2 * (N_SMALL + table),
        ACTIVATIONS: 16384 * 28 * (26 * 1024 + 8 * 3072 + 10 * 3072),
        "update: logits of a chunk, gradient of the head": (6 << 30) + 4 * table,
        "update: weights in bf16": 2 * N_SMALL,
        "at most at a time": most(parts)}
    assert parts["at most at a time"] == pytest.approx(71.756e9, rel=1e-4)


def test_memory_with_transformers():
    """114,688 bytes of cache a token of the 0.6B; the engine has a copy in bf16, none in fp32."""
    parts = memory(Config(engine="hf"), Models(SMALL, SMALL))
    assert parts[CACHE] == 32 * (92 + 4096) * 28 * 2 * 8 * 128 * 2 == 32 * 4188 * 114_688
    assert (parts[COPY], parts[ENGINE]) == (2 * N_SMALL, 0)
    parts = memory(Config(dtype="float32", gpu=False), Models(SMALL, BIG, BIG, "teacher"))
    assert parts[CACHE] == 32 * (92 + 4096) * 36 * 2 * 8 * 128 * 4           # the teacher writes
    assert parts[ENGINE] == 0 and COPY not in parts
    assert parts["update: logits of a chunk, gradient of the head"] == \
        CHUNK_BYTES[0] + 4 * 151936 * 1024
    longer = Config(engine="hf", horizons=(128, 8192), eval_every=0)
    assert memory(longer, Models(SMALL, SMALL))[CACHE] == 32 * (92 + 8192) * 114_688


def test_memory_of_other_roles():
    """The teacher writes; only its head is loaded; hard labels; a reference in fp32."""
    parts = memory(Config(prefix="teacher"), Models(SMALL, BIG, BIG, "teacher"))
    assert parts["teacher"] == parts[ENGINE] == 2 * N_BIG
    assert parts[COPY] == 2 * N_SMALL                    # the student evaluates with transformers
    parts = memory(Config(), Models(SMALL, SMALL, BIG, HEAD))
    assert parts[HEAD] == 2 * 151936 * 4096 and "teacher" not in parts
    parts = memory(Config(), Models(SMALL, SMALL))
    assert list(parts)[:2] == [STUDENT, CACHE]
    parts = memory(Config(group_size=8), Models(SMALL, SMALL, SMALL, "reference"))
    assert parts["reference"] == 4 * N_SMALL and most(parts) == parts["at most at a time"]


def test_sharded_by_hand():
    """Qwen3-32B -> 8B on 8 GPUs: an eighth of both; embedding, head and two layers whole; 57 GB."""
    models = Models(BIG, BIG, HUGE, "teacher")
    cfg = Config(fsdp=True, gradient_checkpointing=True, gpus=8)
    parts = memory(cfg, models)
    assert parts[STUDENT] == 2 * N_BIG and parts["teacher"] == N_HUGE // 4
    assert parts["at most at a time"] == pytest.approx(57.375e9, rel=1e-4)
    cfg.engine = "hf"
    assert memory(cfg, models)[ENGINE] == 2 * N_BIG and COPY not in memory(cfg, models)
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 12288) + 2 * 4096 + 2 * 128
    ours, theirs = estimate.gathered_at_once(BIG), estimate.gathered_at_once(HUGE)
    assert ours == pytest.approx(2 * 151936 * 4096 + 2 * layer, rel=1e-4)
    assert parts["update: gathered weights and gradients"] == 6 * ours + 2 * theirs
    token = 26 * 4096 + 8 * 12288 + 10 * (4096 + 1024)
    assert parts[ACTIVATIONS] == 16384 * (token + 36 * 4096 * 2)
    parts = memory(cfg, Models(BIG, BIG, HUGE, HEAD))
    assert parts[HEAD] == 2 * 151936 * 5120              # each GPU has it whole
    assert parts["update: gathered weights and gradients"] == 6 * ours
    cfg.fsdp = False
    parts = memory(cfg, models)
    assert parts["teacher"] == 2 * N_HUGE
    assert parts[ACTIVATIONS] == 16384 * (token + 36 * 4096 * 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_as_autograd_keeps_them(dtype):
    """Bytes kept for the backward of 96 tokens, less those of 32: the estimate is within 5 %."""
    config = qwen(256, 8, 2, True, 512, 64, 1)
    model = Qwen3ForCausalLM(config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is held, so that no address is used twice.
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    def kept_bytes(tokens):
        kept.clear()
        sequences = [([1], [2] * (tokens - 1))]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = response_hidden(model, sequences, getattr(torch, dtype))
        assert hidden.requires_grad
        return sum(size for size, _ in kept.values())

    cfg = Config(dtype=dtype, max_tokens_per_microbatch=64, gpu=False)
    wanted = memory(cfg, Models(config, config))[ACTIVATIONS]
    assert kept_bytes(96) - kept_bytes(32) == pytest.approx(wanted, rel=0.05)


# ------------------------------------------------------------------------------------------- FLOPs

def test_flops_as_in_the_paper():
    """Appendix H.1's batch (32 prompts of 92 tokens, 128 response tokens), with real shapes."""
    cfg, rows = Config(max_new_tokens=128), [128] * 32
    assert longest_rows(cfg) == rows
    parts = flops(cfg, Models(SMALL, SMALL, MIDDLE, "teacher"), rows)
    assert [count / 1e12 for count in parts.values()] == pytest.approx(
        [8.57, 57.09, 25.71, 91.37], rel=0.001)
    cfg = Config(max_new_tokens=128, trajectories="out/sample_4b")
    parts = flops(cfg, Models(SMALL, SMALL, MIDDLE, HEAD), rows)
    assert parts[HEAD] == 2 * 151936 * 2560 * 32 * 128
    assert parts["a step"] / 1e12 == pytest.approx(25.71 + 3.18, rel=0.001)
    parts = flops(cfg, Models(SMALL, SMALL), rows)             # hard labels
    assert list(parts) == ["student, forward and backward", "a step"]
    cfg.trajectories = None
    assert flops(cfg, Models(SMALL, SMALL), rows) == parts     # solutions from the prompt file
    parts = flops(cfg, Models(SMALL, MIDDLE, MIDDLE, "teacher"), rows)
    assert parts["writing the responses"] == parts["teacher"]
    assert parts["teacher"] / 1e12 == pytest.approx(57.09, rel=0.001)


def test_flops_of_grpo_and_checkpointing():
    """4 prompts x 8 responses are 32 rows; each update is 3 F, or 4 F where layers run again."""
    cfg = Config(group_size=8, prompts_per_step=4, max_new_tokens=128, updates_per_batch=2)
    models = Models(SMALL, SMALL, SMALL, "reference")
    rows = longest_rows(cfg)
    counts = [count / 1e12 for count in flops(cfg, models, rows).values()]
    assert counts == pytest.approx([8.57, 8.57, 6 * 8.57, 8 * 8.57], rel=0.001)
    cfg.gradient_checkpointing = True
    assert flops(cfg, models, rows)["a step"] / 1e12 == pytest.approx(10 * 8.57, rel=0.001)


# ----------------------------------------------------------------------------------------- scaling

def test_decoding_by_hand():
    """
    Rows of one length take its tokens; 300 rows two rounds of them, for 256 are together; a row
    that ends early makes room; many long rows wait for their keys and values.
    """
    token = estimate.TOKEN_SECONDS
    assert estimate.decoding_seconds(SMALL, 2, [100] * 32) == pytest.approx(100 * token)
    assert estimate.decoding_seconds(SMALL, 2, [100] * 300) == pytest.approx(200 * token)
    assert estimate.decoding_seconds(SMALL, 2, [100] * 256 + [40] * 2) == pytest.approx(140 * token)
    assert estimate.decoding_seconds(SMALL, 2, [100] * 255 + [60, 40]) == pytest.approx(100 * token)
    # 28 layers x 8 heads x 128 x 2 x 2 bytes a token, of 2,140 tokens on average: PROMPT + 2048.
    bytes_of_a_token = 114_688 * 256 * (92 + 2048) + 2 * N_SMALL
    assert estimate.decoding_seconds(SMALL, 2, [4096] * 256) == pytest.approx(
        4096 * bytes_of_a_token / estimate.MEMORY_RATE)


def test_a_simulated_step(tmp_path, capsys):
    """The slowest GPU's rollouts and update, and the gradients; printed for 1, 8 and 64 GPUs."""
    cfg = Config(max_new_tokens=100)
    models = Models(SMALL, SMALL, MIDDLE, "teacher")
    rollouts, update, gradients = estimate.step_seconds(cfg, models, [100, 20, 60, 20], 2)
    assert rollouts == pytest.approx(100 * estimate.TOKEN_SECONDS)
    # Rows 0 and 2: the teacher's forward, and three of the student.
    teacher, student = (
        forward_flops(estimate.without_weights(config), [92 + 100, 92 + 60])
        for config in (MIDDLE, SMALL))
    assert update == pytest.approx((teacher + 3 * student) / estimate.FLOP_RATE)
    assert gradients == pytest.approx(8 * N_SMALL / 2 / 300e9)
    assert estimate.step_seconds(cfg, models, [100], 1)[2] == 0
    cfg.trajectories = "out/sample_4b"                   # on disk: neither model writes
    cached = Models(SMALL, SMALL, MIDDLE, HEAD)
    rollouts, update, _ = estimate.step_seconds(cfg, cached, [100, 20, 60, 20], 2)
    assert rollouts == 0
    head = 2 * 151936 * 2560 * 160
    assert update == pytest.approx((head + 3 * student) / estimate.FLOP_RATE)

    rows = [{"length": length} for length in (10, 20, 40)]
    write_lines(tmp_path / "samples_student_000200.jsonl", rows, mode="w")
    assert estimate.response_shares(tmp_path) == [0.25, 0.5, 1.0]
    estimate.main(["configs/toy_opd.py", "--dtype=bfloat16", f"--lengths={tmp_path}"])
    table = capsys.readouterr().out.split("estimate.py\n")[1].splitlines()
    assert [line.split()[:2] for line in table[1:]] == [
        [rows, gpus] for rows in ("64", "256", "1024") for gpus in ("1", "8", "64")]
    assert all(line.split()[3] == "1.0" for line in table[1::3])
    with pytest.raises(UserError, match="no samples_student_.*give the folder of a run"):
        estimate.main(["configs/toy_opd.py", "--lengths=data"])


# ------------------------------------------------------------------------------------ config files

def roles(*argv):
    """(who writes: student or teacher, what is loaded besides the student)."""
    models = read_models(load_config(Config, list(argv)))
    writer = "student" if models.writer is models.student else "teacher"
    return writer, models.kind


def test_what_a_config_loads(monkeypatch, tmp_path):
    assert roles("configs/toy_opd.py") == ("student", "teacher")
    assert roles("configs/toy_sft.py", f"--trajectories={tmp_path}/none") == ("student", HEAD)
    assert roles("configs/toy_sft.py", "--trajectories=None") == ("teacher", "teacher")
    assert roles("configs/toy_hard_sft.py") == ("student", "")
    grpo = "configs/toy_grpo.py", "--student=data/toy/student"
    assert roles(*grpo) == ("student", "")
    assert roles(*grpo, "--kl_coef=0.1") == ("student", "reference")
    for cached, kind in ((True, HEAD), (False, "teacher")):
        monkeypatch.setattr(
            estimate, "Trajectories", lambda *_, on=cached, **__: SimpleNamespace(cached=on))
        assert roles("configs/toy_sft.py", f"--trajectories={tmp_path}") == ("student", kind)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("toy_*.py")), ids=lambda p: p.stem)
def test_toy_configs(path, capsys):
    """Each config of a training script gives two tables whose last lines are their totals."""
    if path.stem in ("toy_eval", "toy_sample"):
        with pytest.raises(UserError, match="unknown key 'model'"):
            estimate.main([str(path)])
        return
    estimate.main([str(path), "--gpu=False", "--student=data/toy/student"])
    numbers = {line[:52].strip(): float(line[52:]) for line in capsys.readouterr().out.splitlines()
               if line.startswith("  ")}
    assert 0.55 < numbers["at most at a time"] < 0.7     # 525 MiB: logits of a chunk
    assert (HEAD in numbers) == (path.stem in ("toy_sft", "toy_offline"))
    assert numbers["student, forward and backward"] > 0 and numbers["a step"] < 0.1


def test_command_line(tmp_path, capsys):
    """A config.json is enough; `--gpus 8` is read; a model that is not there is named."""
    BIG.save_pretrained(tmp_path / "big")
    SMALL.save_pretrained(tmp_path / "small")
    models = [f"--student={tmp_path}/small", f"--teacher={tmp_path}/big"]
    estimate.main(["configs/opd_8b.py", "--gpus", "8", *models])
    out = capsys.readouterr().out
    assert "at most at a time                                     71.756\n" in out
    assert "teacher                                             2194.014\n" in out
    estimate.main(["configs/opd_8b.py", "--gpus", "8", "--fsdp", *models])
    assert f"{STUDENT:<50}     1.192\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="no config.json.*config.json is enough here"):
        estimate.main(["configs/opd_8b.py", f"--student={tmp_path}/none"])
