"""The sampler, the decode loop, and the forward over responses."""

import pytest
import torch
from conftest import STOPS

import utils
from engine import HFEngine, Sampling, sample_tokens
from kernels import linear_kl

# ------------------------------------------------------------------------------------------------------------------- sampler

@pytest.mark.parametrize("temperature, top_p, top_k",
                         [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 5), (0.7, 0.9, 8)])
def test_sampled_distribution(temperature, top_p, top_k):
    """Chi-square of 200,000 draws against the distribution worked out token by token; log-probs stay those at T = 1."""
    logits = torch.tensor([1.0, 2.5, 0.3, -1.0, 2.4, 0.0, 1.7, -2.0, 0.9, -0.5, 3.0, -4.0])
    expected = torch.softmax(logits.double() / temperature, -1)
    order = expected.argsort(descending=True)
    if top_k:
        expected[order[top_k:]] = 0
        expected /= expected.sum()
    before = 0.0
    for i in order.tolist():                             # keep a token unless those before it already hold top_p
        if before >= top_p:
            expected[i] = 0
        before += expected[i].item()
    expected /= expected.sum()

    n = 200_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(7))
    tokens, logps = sample_tokens(logits.expand(n, -1), uniforms, Sampling(1, STOPS, temperature, top_p, top_k))
    counts = torch.bincount(tokens, minlength=12).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = ((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum().item()
    assert chi2 < 35                                     # 11 degrees of freedom at most: p = 2e-4 at 35
    assert (logps - logits.log_softmax(-1)[tokens]).abs().max() < 1e-6


def test_sampler_edges():
    logits = torch.tensor([[0.0, 5.0, 1.0], [2.0, 1.0, 0.0]])
    greedy, _ = sample_tokens(logits, torch.tensor([0.99, 0.99]), Sampling(1, STOPS, temperature=0))
    assert greedy.tolist() == [1, 0]
    impossible = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for u in (0.0, 1 - 2 ** -24):                        # the ends of what torch.rand gives
        assert sample_tokens(impossible, torch.tensor([u]), Sampling(1, STOPS))[0].tolist() == [1]
    for u in (0.0, 0.5, 1 - 2 ** -24):                   # NaN: some id in range; the loss will say what is wrong
        token, _ = sample_tokens(torch.full((1, 3), float("nan")), torch.tensor([u]), Sampling(1, STOPS, top_p=0.9))
        assert 0 <= token.item() < 3


# --------------------------------------------------------------------------------------------------------------- decode loop

def test_rollouts_do_not_depend_on_the_batch(student, prompts):
    """Alone, in a batch of 7, in a batch of 64, in another order: the same tokens for the same seed."""
    engine, sampling = HFEngine(student), Sampling(64, STOPS, vocab_size=272)
    together = engine.generate(prompts[:64], sampling, list(range(64)))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = engine.generate([prompts[i] for i in order], sampling, order)
    assert sum(together[i][0] != shuffled[j][0] for j, i in enumerate(order)) == 0
    small = HFEngine(student, max_rows=7).generate(prompts[:64], sampling, list(range(64)))
    alone = [engine.generate([prompts[i]], sampling, [i])[0] for i in range(8)]
    assert sum(a[0] != b[0] for a, b in zip(together, small)) == 0
    assert sum(a[0] != b[0] for a, b in zip(together, alone)) == 0
    assert max(abs(x - y) for a, b in zip(together, small) for x, y in zip(a[1], b[1])) < 1e-4
    assert engine.generate(prompts[:1], sampling, [99])[0][0] != together[0][0]            # another seed, other tokens


def test_rollouts_score_as_sampled(student, prompts):
    """log-probs from the decode loop (left padding, cache, dropped rows) = those of one plain forward of the whole sequence."""
    mixed = [prompts[i][:-1] + [52, 43] * (i % 3) + prompts[i][-1:] for i in range(12)]    # prompts of several lengths
    rollouts = HFEngine(student).generate(mixed, Sampling(48, STOPS, vocab_size=272), list(range(12)))
    for prompt, (tokens, logps, reason) in zip(mixed, rollouts):
        with torch.no_grad():
            logits = student(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        assert (exact - torch.tensor(logps)).abs().max() < 1e-4
        assert (reason == "stop") == (tokens[-1] in STOPS) and (reason == "stop" or len(tokens) == 48)
        assert not set(tokens[:-1]) & set(STOPS)


def test_first_tokens_follow_the_model(student, prompts):
    """4,000 seeds on one prompt: the first token's frequencies are the model's probabilities (chi-square)."""
    engine, sampling = HFEngine(student, max_rows=4000), Sampling(1, STOPS, vocab_size=272)
    rollouts = engine.generate(prompts[:1] * 4000, sampling, list(range(4000)))
    counts = torch.bincount(torch.tensor([tokens[0] for tokens, _, _ in rollouts]), minlength=272).double()
    with torch.no_grad():
        expected = student(torch.tensor(prompts[:1])).logits[0, -1, :272].double().softmax(-1) * 4000
    likely = expected > 5
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum() + (counts - expected)[~likely].sum() ** 2 / max(
        1.0, expected[~likely].sum().item())
    assert chi2 < 40 and likely.sum() < 12


def test_masked_ids_and_stop_rules(student, prompts):
    """Ids past the smaller vocabulary are never sampled, however likely; a response ends on the given stop ids only."""
    with torch.no_grad():
        student.model.embed_tokens.weight[262:] = 3 * student.model.embed_tokens.weight[STOPS[0]]
    free = HFEngine(student).generate(prompts[:8], Sampling(40, STOPS), list(range(8)))
    masked = HFEngine(student).generate(prompts[:8], Sampling(40, STOPS, vocab_size=262), list(range(8)))
    assert max(t for tokens, _, _ in free for t in tokens) >= 262 > max(t for tokens, _, _ in masked for t in tokens)
    endless = HFEngine(student).generate(prompts[:8], Sampling(200, (260,), vocab_size=262), list(range(8)))
    assert any(STOPS[0] in tokens[:-1] for tokens, _, _ in endless)                        # its own stop id is just a token now


def test_bf16_copy_follows_sync(student, prompts):
    engine = HFEngine(student, torch.bfloat16)
    before = engine.generate(prompts[:4], Sampling(12, STOPS, vocab_size=272), [1, 2, 3, 4])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.5)
    assert engine.generate(prompts[:4], Sampling(12, STOPS, vocab_size=272), [1, 2, 3, 4]) == before
    engine.sync(student)
    assert engine.generate(prompts[:4], Sampling(12, STOPS, vocab_size=272), [1, 2, 3, 4]) != before
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(engine.model.parameters(), student.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(engine.model.buffers(), student.buffers()))    # rotary frequencies stay fp32


# ----------------------------------------------------------------------------------------------- forward over responses

def heads(model):
    return model.get_output_embeddings().weight


def test_microbatches():
    lengths = [5, 90, 7, 30, 31, 90, 200]
    batches = utils.microbatches(lengths, 180)
    assert sorted(i for b in batches for i in b) == list(range(7)) and batches[0] == [6] and batches[1] == [1, 5]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 180 for b in batches)
    assert utils.microbatches([], 100) == []


@pytest.mark.parametrize("budget", [1, 150, 400, 100_000])
def test_alignment(student, teacher, sequences, budget):
    """Under any micro-batching: teacher = student gives KL 0, and a real teacher the numbers of one plain forward each."""
    from_batches, exact = {}, {}
    for batch in utils.microbatches([len(p) + len(r) for p, r in sequences[:16]], budget):
        part = [sequences[i] for i in batch]
        with torch.no_grad():
            h, h_t = utils.response_hidden(student, part), utils.response_hidden(teacher, part)
            loss, *stats = linear_kl(h, heads(student), h, heads(student), torch.ones(len(h)), 0.5)
            assert max(s.abs().max() for s in stats[:2]) < 1e-6 and abs(loss) < 1e-6
            _, forward, *_ = linear_kl(h, heads(student), h_t, heads(teacher), torch.ones(len(h)), 0.5)
        for i, rows in zip(batch, forward.split([len(sequences[i][1]) for i in batch])):
            from_batches[i] = rows
    for i, (prompt, response) in enumerate(sequences[:16]):
        with torch.no_grad():
            log_q, log_p = (m(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1, :272].log_softmax(-1)
                            for m in (student, teacher))
        exact[i] = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert (from_batches[i] - exact[i]).abs().max() < 1e-4


def test_one_token_changes_the_rows_after_it(student, sequences):
    """Row t predicts response token t from what is before it: changing token 3 of the second response changes its rows > 3."""
    batch = [(p, list(r)) for p, r in sequences[:3]]
    with torch.no_grad():
        before = utils.response_hidden(student, batch)
        batch[1][1][3] = 65
        changed = (utils.response_hidden(student, batch) - before).abs().amax(-1) > 1e-6
    first, second = len(batch[0][1]), len(batch[1][1])
    assert changed.nonzero().squeeze(1).tolist() == list(range(first + 4, first + second))


def test_pad_equal_to_eos_is_no_mask(student, sequences):
    """Stop ids, and the id 0 that fills the padding, count as tokens wherever a response has them."""
    batch = [(sequences[0][0], [257, 0, 257, 51, 257]), (sequences[1][0], [50] * 40)]
    with torch.no_grad():
        rows = utils.response_hidden(student, batch)
        alone = torch.cat([utils.response_hidden(student, [pair]) for pair in batch])
    assert rows.shape == (45, 64) and (rows - alone).abs().max() < 1e-5
