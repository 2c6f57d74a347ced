"""The maths, without models: Proposition 1, the decomposition by full enumeration, what each cell
drops; and a divergence of one's own in ten lines."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import linear_kl


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


# ---------------------------------------------------------------------------------- Proposition 1

@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_logit_gradients(direction):
    """dKL(p||q)/dz = q - p and dKL(q||p)/dz = q (d - KL), against autograd and against our op."""
    torch.manual_seed(0)
    z = (3 * torch.randn(50, 11, dtype=torch.float64)).requires_grad_()
    z_p = 3 * torch.randn(50, 11, dtype=torch.float64)
    q, p = z.softmax(-1), z_p.softmax(-1)
    loss = kl(p, q) if direction == "forward" else kl(q, p)
    loss.sum().backward()
    q = q.detach()
    d = (q.log() - p.log()).detach()
    expected = q - p if direction == "forward" else q * (d - kl(q, p)[:, None])
    assert (z.grad - expected).abs().max() < 1e-12

    # Our op on the same logits: hidden states are rows of the identity, and the LM head is the
    # transposed table.
    table = z.detach().T.clone().requires_grad_()                    # (V, N)
    eye = torch.eye(50, dtype=torch.float64)
    loss, *_ = linear_kl(eye, table, eye, z_p.T, torch.ones(50), float(direction == "reverse"))
    loss.backward()
    assert (table.grad.T - expected).abs().max() < 1e-12


def test_estimators_as_losses():
    """
    y ~ q, rho = p/q. Differentiated: E[grad k1] = 0, E[grad k2] = grad reverse KL, and
    E[grad k3] = grad forward KL = q - p.
    """
    torch.manual_seed(1)
    z = torch.randn(7, dtype=torch.float64).requires_grad_()
    z_p = torch.randn(7, dtype=torch.float64)
    q, p = z.softmax(-1), z_p.softmax(-1)
    log_rho = p.log() - q.log()
    forward, = torch.autograd.grad(kl(p, q), z, retain_graph=True)
    reverse, = torch.autograd.grad(kl(q, p), z, retain_graph=True)
    k1 = -log_rho
    k2 = log_rho ** 2 / 2
    k3 = log_rho.exp() - 1 - log_rho
    for k, expected in [(k1, torch.zeros(7)), (k2, reverse), (k3, forward)]:
        expectation = (q.detach() * k).sum()                         # exact, over all seven words
        grad, = torch.autograd.grad(expectation, z, retain_graph=True)
        assert (grad - expected).abs().max() < 1e-12
    assert (forward - (q - p)).abs().max() < 1e-12
    assert (forward - reverse).abs().max() > 0.01


# -------------------------------------------------------- the decomposition, on a tabular model

LENGTH, WORDS = 3, 3
SEQUENCES = list(itertools.product(range(WORDS), repeat=LENGTH))
PREFIXES = [y for t in range(LENGTH) for y in itertools.product(range(WORDS), repeat=t)]


def tabular(seed):
    """Logits (13, 3): one row for each of the 1 + 3 + 9 prefixes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), WORDS, dtype=torch.float64, generator=generator)


def log_steps(z):
    """(27, 3): log-probability of each token of each sequence."""
    logp = z.log_softmax(-1)

    def of_sequence(y):
        return torch.stack([logp[PREFIXES.index(y[:t]), y[t]] for t in range(LENGTH)])
    return torch.stack([of_sequence(y) for y in SEQUENCES])


def prefix_probs(z):
    """(13,): probability that a rollout passes through each prefix."""
    probs = log_steps(z).sum(-1).exp()
    passes = [[y[:len(s)] == s for y in SEQUENCES] for s in PREFIXES]
    return torch.stack([probs[through].sum() for through in passes])


def cell_gradient(prefix, reverse_weight, z, z_p):
    """Gradient of one of the four cells by our op: prefixes are weights, not differentiated."""
    table = z.T.clone().requires_grad_()
    eye = torch.eye(len(PREFIXES), dtype=torch.float64)
    weight = prefix_probs(z_p if prefix == "teacher" else z)
    loss, *_ = linear_kl(eye, table, eye, z_p.T, weight, reverse_weight)
    loss.backward()
    return table.grad.T


@pytest.fixture()
def pair():
    return tabular(2).requires_grad_(), tabular(3)


def test_decomposition(pair):
    """Eq. 2 and 3: KL of sequences = sum over prefixes of the writer's rollouts of the token KL."""
    z, z_p = pair[0].detach(), pair[1]
    q, p = log_steps(z).sum(-1), log_steps(z_p).sum(-1)
    forward, reverse = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    rows_q, rows_p = z.softmax(-1), z_p.softmax(-1)
    assert abs((prefix_probs(z_p) * kl(rows_p, rows_q)).sum() - forward) < 1e-12
    assert abs((prefix_probs(z) * kl(rows_q, rows_p)).sum() - reverse) < 1e-12

    # And the op gives the same numbers from the same weights.
    eye = torch.eye(len(PREFIXES), dtype=torch.float64)
    for weight, lam, exact in [(prefix_probs(z_p), 0.0, forward), (prefix_probs(z), 1.0, reverse)]:
        loss, *_ = linear_kl(eye, z.T, eye, z_p.T, weight, lam)
        assert abs(loss.item() - exact.item()) < 1e-12


def test_what_each_cell_drops(pair):
    z, z_p = pair
    steps_q, steps_p = log_steps(z), log_steps(z_p)
    probs_q, probs_p = steps_q.sum(-1).exp(), steps_p.sum(-1).exp()

    def gradient(loss):
        grad, = torch.autograd.grad(loss, z, retain_graph=True)
        return grad

    def difference(a, b):
        return (a - b).abs().max()

    exact_reverse = gradient((probs_q * (steps_q - steps_p).sum(-1)).sum())
    exact_forward = gradient((probs_p * (steps_p - steps_q).sum(-1)).sum())

    # Teacher prefixes, forward KL: nothing is dropped.
    assert difference(cell_gradient("teacher", 0.0, z.detach(), z_p), exact_forward) < 1e-12

    # Student prefixes, reverse KL (OPD): E_q sum_t grad log q(y_t|s_t) c_t. The exact gradient has
    # the sum of the later costs c_t' too.
    c = (steps_q - steps_p).detach()
    now = gradient((probs_q.detach()[:, None] * steps_q * c).sum())
    future = c.flip(-1).cumsum(-1).flip(-1)
    full = gradient((probs_q.detach()[:, None] * steps_q * future).sum())
    opd = cell_gradient("student", 1.0, z.detach(), z_p)
    assert difference(full, exact_reverse) < 1e-10
    assert difference(opd, now) < 1e-12
    assert difference(opd, exact_reverse) > 0.05

    # Student prefixes, forward KL (DAgger): how the prefixes themselves move is dropped.
    rows = kl(z_p.softmax(-1), z.softmax(-1))
    exact = gradient((prefix_probs(z) * rows).sum())
    assert difference(cell_gradient("student", 0.0, z.detach(), z_p), exact) > 0.05

    # Teacher prefixes, reverse KL: the exact gradient of its own objective, without importance
    # weights.
    own = gradient((prefix_probs(z_p) * kl(z.softmax(-1), z_p.softmax(-1))).sum())
    assert difference(cell_gradient("teacher", 1.0, z.detach(), z_p), own) < 1e-12


# ---------------------------------------------------------------- a divergence of one's own

def chunk_divergence(h_q, W_q, h_p, W_p, weight, reverse_weight):
    """The recipe of docs/step.md: any divergence of a chunk of tokens, here that of linear_kl."""
    V = min(len(W_q), len(W_p))
    log_q = torch.log_softmax(h_q @ W_q[:V].T, -1)                   # (C, V)
    log_p = torch.log_softmax(h_p @ W_p[:V].T, -1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    rows = reverse_weight * reverse + (1 - reverse_weight) * forward
    return (weight * rows).sum()


def divergence(h_q, W_q, h_p, W_p, weight, reverse_weight, chunk=64):
    """The checkpoint drops a chunk's logits; the backward computes them again, chunk by chunk."""
    loss = 0.0
    for i in range(0, len(h_q), chunk):
        rows = slice(i, i + chunk)
        loss = loss + checkpoint(chunk_divergence, h_q[rows], W_q, h_p[rows], W_p, weight[rows],
                                 reverse_weight, use_reentrant=False)
    return loss


@pytest.mark.parametrize("lam", [0.0, 0.2, 1.0])
def test_own_divergence_as_linear_kl(lam):
    """In fp32 the same loss, dh and dW to 1e-6, and autograd keeps no logits for the backward."""
    g = torch.Generator().manual_seed(6)
    N, H, H_t, V, V_t = 200, 24, 40, 500, 512
    h_q = torch.randn(N, H, generator=g)
    h_p = torch.randn(N, H_t, generator=g)
    W_q = torch.randn(V, H, generator=g) / H ** 0.5                  # logits of size 1
    W_p = torch.randn(V_t, H_t, generator=g) / H_t ** 0.5
    weight = torch.rand(N, generator=g) / N

    def run(function):
        h, W = h_q.clone().requires_grad_(), W_q.clone().requires_grad_()
        kept = [0]

        def pack(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = function(h, W, h_p, W_p, weight, lam)
        loss.backward()
        return (loss.detach(), h.grad, W.grad), max(kept)

    chunked, largest_kept = run(divergence)
    fused, _ = run(lambda *arguments: linear_kl(*arguments)[0])
    for ours, theirs in zip(chunked, fused):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    assert largest_kept <= V_t * H_t < 64 * V                        # an LM head, no logits
    _, largest_kept = run(chunk_divergence)
    assert largest_kept == N * V                                     # without chunks they are
