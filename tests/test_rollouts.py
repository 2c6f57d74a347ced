"""The sampler, the decode loop, the choice and the check of an engine, forwards over responses."""

import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import STOPS

import engine as engines
import models
from engine import HFEngine, Sampling, choose_engine, make_engine, sample_tokens, score
from kernels import linear_kl
from models import lm_head, microbatches, response_hidden
from utils import Timer, UserError, end_on_fault


def tokens_of(rollouts):
    return [tokens for tokens, _, _ in rollouts]


def exact_logps(model, prompt, response):
    """Log-probs (n, V) of the next token, from one plain forward over the whole sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    return logits[:, :272].log_softmax(-1)


# ----------------------------------------------------------------------------------------- sampler

@pytest.mark.parametrize("temperature, top_p, top_k", [
    (1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 5), (0.7, 0.9, 8)])
def test_sampled_distribution(temperature, top_p, top_k):
    """
    Chi-square of 200,000 draws against the distribution worked out token by token; log-probs stay
    those at T = 1.
    """
    logits = torch.tensor([1.0, 2.5, 0.3, -1.0, 2.4, 0.0, 1.7, -2.0, 0.9, -0.5, 3.0, -4.0])
    expected = torch.softmax(logits.double() / temperature, -1)
    order = expected.argsort(descending=True)
    if top_k:
        expected[order[top_k:]] = 0
        expected /= expected.sum()
    before = 0.0
    for i in order.tolist():
        if before >= top_p:  # a token stays unless those before it already hold top_p
            expected[i] = 0
        before += expected[i].item()
    expected /= expected.sum()

    n = 200_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(7))
    sampling = Sampling(1, STOPS, temperature, top_p, top_k)
    tokens, logps = sample_tokens(logits.expand(n, -1), uniforms, sampling)
    counts = torch.bincount(tokens, minlength=12).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = ((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum().item()
    assert chi2 < 35  # 11 degrees of freedom at most: p = 2e-4 at 35
    assert (logps - logits.log_softmax(-1)[tokens]).abs().max() < 1e-6


def test_sampler_edges():
    logits = torch.tensor([[0.0, 5.0, 1.0], [2.0, 1.0, 0.0]])
    greedy = Sampling(1, STOPS, temperature=0)
    assert sample_tokens(logits, torch.tensor([0.99, 0.99]), greedy)[0].tolist() == [1, 0]
    impossible = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for uniform in (0.0, 1 - 2 ** -24):  # the ends of what torch.rand gives
        tokens, _ = sample_tokens(impossible, torch.tensor([uniform]), Sampling(1, STOPS))
        assert tokens.tolist() == [1]
    for uniform in (0.0, 0.5, 1 - 2 ** -24):  # NaN: some id in range; the loss says what is wrong
        nan = torch.full((1, 3), float("nan"))
        tokens, _ = sample_tokens(nan, torch.tensor([uniform]), Sampling(1, STOPS, top_p=0.9))
        assert 0 <= tokens.item() < 3


# ------------------------------------------------------------------------------------- decode loop

def test_rollouts_do_not_depend_on_the_batch(student, prompts):
    """Alone, 7 or 64 together, in another order: the same tokens for the same seed."""
    prompts = prompts[:64]
    engine, sampling = HFEngine(student, vocab_size=272), Sampling(64, STOPS)
    together = engine.generate(prompts, sampling, list(range(64)))
    tokens = tokens_of(together)

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = engine.generate([prompts[i] for i in order], sampling, order)
    assert tokens_of(shuffled) == [tokens[i] for i in order]
    small = HFEngine(student, vocab_size=272, max_rows=7)
    in_sevens = small.generate(prompts, sampling, list(range(64)))
    assert tokens_of(in_sevens) == tokens
    alone = [engine.generate([prompts[i]], sampling, [i])[0][0] for i in range(8)]
    assert alone == tokens[:8]

    for (_, logps, _), (_, others, _) in zip(together, in_sevens):
        assert max(abs(x - y) for x, y in zip(logps, others)) < 1e-4
    assert engine.generate(prompts[:1], sampling, [99])[0][0] != tokens[0]  # another seed


def test_equal_prompts_are_read_once(student, prompts, monkeypatch):
    """A group's prompt is one row of the first forward, and the responses are as of rows alone."""
    a, b = prompts[0], [0, *prompts[0]]  # id 0 in front is a token, not padding
    engine, sampling, rows = HFEngine(student, vocab_size=272), Sampling(48, STOPS), []
    alone = [engine.generate([p], sampling, [i])[0] for i, p in enumerate([a, b, a, a, b])]
    forward = engine._advance

    def advance(ids, lengths, cache):
        rows.append(len(ids))
        return forward(ids, lengths, cache)

    monkeypatch.setattr(engine, "_advance", advance)
    together = engine.generate([a, b, a, a, b], sampling, range(5))
    assert rows[:2] == [2, 5]
    assert tokens_of(together) == tokens_of(alone) and len({*map(tuple, tokens_of(alone))}) == 5
    for (_, logps, _), (_, others, _) in zip(together, alone):
        assert max(abs(x - y) for x, y in zip(logps, others)) < 1e-4


def test_rollouts_score_as_sampled(student, prompts):
    """
    Log-probs from the decode loop (left padding, cache, dropped rows) are those of one plain
    forward over the whole sequence.
    """
    mixed = [prompts[i][:-1] + [52, 43] * (i % 3) + prompts[i][-1:] for i in range(12)]  # in length
    engine = HFEngine(student, vocab_size=272)
    rollouts = engine.generate(mixed, Sampling(48, STOPS), list(range(12)))
    assert {reason for _, _, reason in rollouts} == {"stop", "length"}
    for prompt, (tokens, logps, reason) in zip(mixed, rollouts):
        exact = exact_logps(student, prompt, tokens)
        exact = exact.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        assert (exact - torch.tensor(logps)).abs().max() < 1e-4
        assert (reason == "stop") == (tokens[-1] in STOPS)
        assert reason == "stop" or len(tokens) == 48
        assert not set(tokens[:-1]) & set(STOPS)


def test_first_tokens_follow_the_model(student, prompts):
    """4,000 seeds, one prompt: first tokens are as frequent as they are likely (chi-square)."""
    engine, n = HFEngine(student, vocab_size=272, max_rows=4000), 4000
    rollouts = engine.generate(prompts[:1] * n, Sampling(1, STOPS), list(range(n)))
    counts = torch.tensor([tokens[0] for tokens in tokens_of(rollouts)]).bincount(minlength=272)
    with torch.no_grad():
        logits = student(torch.tensor(prompts[:1])).logits[0, -1, :272]
    expected = n * logits.double().softmax(-1)
    likely = expected > 5
    off = counts - expected
    chi2 = (off[likely] ** 2 / expected[likely]).sum()
    chi2 += off[~likely].sum() ** 2 / expected[~likely].sum().clamp(min=1)
    assert chi2 < 40 and likely.sum() < 12


def test_a_failure_inside_leaves_nothing_unsharded(monkeypatch):
    class Shard(torch.nn.Module):
        calls = []

        def unshard(self):
            self.calls.append("unshard")

        def reshard(self):
            self.calls.append("reshard")

        def set_reshard_after_forward(self, on, recurse):
            self.calls.append(on)

    monkeypatch.setattr(models, "FSDPModule", Shard)
    model = torch.nn.Sequential(Shard())
    with pytest.raises(KeyError), models.unsharded(model):
        raise KeyError
    assert Shard.calls == ["unshard", False, "reshard", True]


def test_masked_ids_and_stop_rules(student, prompts):
    """
    Ids past the smaller vocabulary are never sampled, however likely; a response ends on the given
    stop ids only.
    """
    def responses(vocab_size, limit, stops):
        engine = HFEngine(student, vocab_size=vocab_size)
        return tokens_of(engine.generate(prompts[:8], Sampling(limit, stops), list(range(8))))

    with torch.no_grad():
        embeddings = student.model.embed_tokens.weight
        embeddings[262:] = 3 * embeddings[STOPS[0]]
    assert max(map(max, responses(None, 40, STOPS))) >= 262
    assert max(map(max, responses(262, 40, STOPS))) < 262
    endless = responses(262, 200, (260,))
    assert any(STOPS[0] in tokens[:-1] for tokens in endless)  # just a token now


def test_bf16_copy_follows_sync(student, prompts):
    engine = HFEngine(student, torch.bfloat16, vocab_size=272)
    sampling, seeds = Sampling(12, STOPS), [1, 2, 3, 4]
    before = engine.generate(prompts[:4], sampling, seeds)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.5)
    assert engine.generate(prompts[:4], sampling, seeds) == before
    engine.sync()
    assert engine.generate(prompts[:4], sampling, seeds) != before
    for copied, master in zip(engine.decoder.parameters(), student.parameters(), strict=True):
        assert torch.equal(copied, master.bfloat16())
    for copied, master in zip(engine.decoder.buffers(), student.buffers(), strict=True):
        assert torch.equal(copied, master)  # rotary frequencies stay fp32


# ----------------------------------------------------------------------------------------- engines

@pytest.mark.parametrize("kind, device, version, chosen", [
    ("auto", "cpu", "0.32.0", "hf"),
    ("auto", "cuda", "none", "hf"),
    ("auto", "cuda", "0.31.9", "hf"),
    ("auto", "cuda", "0.32.1", "vllm"),
    ("hf", "cuda", "0.32.1", "hf"),
    ("vllm", "cpu", "0.32.1", "vllm")])
def test_the_choice_is_printed(monkeypatch, capsys, kind, device, version, chosen):
    monkeypatch.setattr(engines, "vllm_version", lambda: version)
    model = SimpleNamespace(device=torch.device(device), name_or_path="out/model")
    assert choose_engine(kind, model) == chosen
    printed = f"out/model writes with engine={chosen!r} (on {device}, vLLM installed: {version})\n"
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("dtype, given, limit", [
    (torch.float32, None, 1e-4), (torch.bfloat16, None, 0.15), (torch.bfloat16, 0.2, 0.2)])
def test_settings_of_an_engine(student, dtype, given, limit):
    cfg = SimpleNamespace(rollout_rows=4, max_tokens_per_microbatch=99, max_logprob_gap=given,
                          kv_cache_gb=1.0, rollout_timeout=9.0, compile=False)
    engine = make_engine("hf", cfg, student, dtype, 272, 64)
    assert engine.max_logprob_gap == limit
    assert (engine.max_rows, engine.max_tokens, engine.vocab_size) == (4, 99, 272)


def test_an_engine_with_other_weights_is_found(student, prompts):
    """A bf16 copy whose last norm is off by a half, then in sync again."""
    engine = HFEngine(student, torch.bfloat16, vocab_size=272, max_tokens=4096)
    engine.max_logprob_gap = 0.05
    engine.decoder.model.norm.weight.data *= 1.5
    rollouts = engine.generate(prompts[:8], Sampling(12, STOPS), range(8))
    score(engine, prompts[:8], rollouts)
    with pytest.raises(UserError, match="the engine's weights are not the model's"):
        end_on_fault()
    message = r"differ by 0\.\d+ nats on average, .* the mean passes max_logprob_gap=0.05: "
    with pytest.raises(UserError, match=message):
        end_on_fault()
    engine.sync()
    rollouts = engine.generate(prompts[:8], Sampling(12, STOPS), range(8))
    _, gaps = score(engine, prompts[:8], rollouts)
    end_on_fault()
    assert 0 < gaps["logprob_gap_mean"] < 0.02
    assert gaps["logprob_gap_mean"] < gaps["logprob_gap_max"]


def test_log_probs_that_are_not_finite(student, prompts):
    """They are counted, and the gap is that of the others."""
    engine = HFEngine(student, vocab_size=272)
    rollouts = engine.generate(prompts[:4], Sampling(12, STOPS), range(4))
    _, gaps = score(engine, prompts[:4], rollouts)
    rollouts[0][1][2], rollouts[1][1][0] = -math.inf, math.nan
    _, others = score(engine, prompts[:4], rollouts)
    assert gaps["nonfinite_logps"] == 0 and others["nonfinite_logps"] == 2
    assert 0 < others["logprob_gap_mean"] <= others["logprob_gap_max"] <= gaps["logprob_gap_max"]
    rollouts = [(tokens, [math.nan] * len(tokens), reason) for tokens, _, reason in rollouts]
    engine.max_logprob_gap = 0.1
    score(engine, prompts[:4], rollouts)
    with pytest.raises(UserError, match="the mean passes max_logprob_gap=0.1"):
        end_on_fault()
    score(engine, [], [])
    end_on_fault()


def test_environment_of_vllm(monkeypatch):
    """Set before vLLM is imported; what the user has set stays."""
    monkeypatch.setattr(os, "environ", {"VLLM_NO_USAGE_STATS": "0"})
    choose_engine("hf", SimpleNamespace(device=torch.device("cpu"), name_or_path=""))
    assert os.environ == {
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_memory_without_a_sleeping_engine(monkeypatch):
    """Torch counts the pages that vLLM's allocator has given back."""
    for name, value in {"synchronize": None, "max_memory_allocated": 5e9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    timer = Timer(SimpleNamespace(type="cuda"))
    timer.lap("rollout")
    assert timer["peak_gb"] == 5
    allocator = SimpleNamespace(get_current_usage=lambda: 2e9)
    module = SimpleNamespace(CuMemAllocator=SimpleNamespace(get_instance=lambda: allocator))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    timer.lap("student")
    assert timer["peak_gb"] == 3


# ------------------------------------------------------------------------- forwards over responses

def test_microbatches():
    lengths = [5, 90, 7, 30, 31, 90, 200]
    sequences = [([0] * 3, [1] * (n - 3), i) for i, n in enumerate(lengths)]
    batches = microbatches(sequences, 180)
    picked = [[i for _, _, i in batch] for batch in batches]
    assert sorted(sum(picked, [])) == list(range(7))
    assert picked[0] == [6] and picked[1] == [1, 5]
    for batch in picked[1:]:
        assert len(batch) * max(lengths[i] for i in batch) <= 180
    assert microbatches([], 100) == []


@pytest.mark.parametrize("budget", [1, 150, 400, 100_000])
def test_alignment(student, teacher, sequences, budget):
    """
    In any micro-batches: a teacher that is the student gives KL 0, and a real teacher the numbers
    of one plain forward of each sequence.
    """
    for part in microbatches(sequences[:16], budget):
        with torch.no_grad():
            h_q = response_hidden(student, part), lm_head(student)
            h_p = response_hidden(teacher, part), lm_head(teacher)
            weight = torch.ones(len(h_q[0]))
            loss, forward, reverse, *_ = linear_kl(*h_q, *h_q, weight, 0.5)
            assert abs(loss) < 1e-6 and max(forward.abs().max(), reverse.abs().max()) < 1e-6
            _, forward, *_ = linear_kl(*h_q, *h_p, weight, 0.5)
        for (prompt, response), rows in zip(part, forward.split([len(r) for _, r in part])):
            log_q = exact_logps(student, prompt, response)
            log_p = exact_logps(teacher, prompt, response)
            exact = (log_p.exp() * (log_p - log_q)).sum(-1)
            assert (rows - exact).abs().max() < 1e-4


def test_one_token_changes_the_rows_after_it(student, sequences):
    """
    Row t predicts response token t from what is before it: another token 3 in the second response
    changes its rows from 4 on, and no other.
    """
    batch = [(prompt, list(response)) for prompt, response in sequences[:3]]
    with torch.no_grad():
        before = response_hidden(student, batch)
        batch[1][1][3] = 65
        changed = (response_hidden(student, batch) - before).abs().amax(-1) > 1e-6
    first, second = len(batch[0][1]), len(batch[1][1])
    assert changed.nonzero().squeeze(1).tolist() == list(range(first + 4, first + second))


def test_pad_equal_to_eos_is_no_mask(student, sequences):
    """Stop ids, and the id 0 that fills the padding, count as tokens where a response has them."""
    batch = [(sequences[0][0], [257, 0, 257, 51, 257]), (sequences[1][0], [50] * 40)]
    with torch.no_grad():
        rows = response_hidden(student, batch)
        alone = torch.cat([response_hidden(student, [pair]) for pair in batch])
    assert rows.shape == (45, 64) and (rows - alone).abs().max() < 1e-5
