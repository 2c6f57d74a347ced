"""The maths, without models: Proposition 1, the decomposition by full enumeration, what each cell drops."""

import itertools

import pytest
import torch

from kernels import linear_kl


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


# ------------------------------------------------------------------------------------------------------------- Proposition 1

@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_logit_gradients(direction):
    """dKL(p||q)/dz = q - p and dKL(q||p)/dz = q (d - KL), against autograd in fp64 and against our op."""
    torch.manual_seed(0)
    z = (3 * torch.randn(50, 11, dtype=torch.float64)).requires_grad_()
    z_p = 3 * torch.randn(50, 11, dtype=torch.float64)
    q, p = z.softmax(-1), z_p.softmax(-1)
    (kl(p, q) if direction == "forward" else kl(q, p)).sum().backward()
    q, d = q.detach(), (q.log() - p.log()).detach()
    expected = q - p if direction == "forward" else q * (d - kl(q, p)[:, None])
    assert (z.grad - expected).abs().max() < 1e-12

    # our op on the same logits: hidden states are rows of the identity, the LM head is the transposed table
    table = z.detach().T.clone().requires_grad_()                                          # (V, N)
    eye = torch.eye(50, dtype=torch.float64)
    loss, *_ = linear_kl(eye, table, eye, z_p.T, torch.ones(50), float(direction == "reverse"))
    loss.backward()
    assert (table.grad.T - expected).abs().max() < 1e-12


def test_estimators_as_losses():
    """y ~ q, rho = p/q. Differentiated: E[grad k1] = 0, E[grad k2] = grad reverse KL, E[grad k3] = grad forward KL = q - p."""
    torch.manual_seed(1)
    z, z_p = torch.randn(7, dtype=torch.float64).requires_grad_(), torch.randn(7, dtype=torch.float64)
    q, p = z.softmax(-1), z_p.softmax(-1)
    log_rho = p.log() - q.log()
    forward, = torch.autograd.grad(kl(p, q), z, retain_graph=True)
    reverse, = torch.autograd.grad(kl(q, p), z, retain_graph=True)
    for k, expected in [(-log_rho, torch.zeros(7)), (log_rho ** 2 / 2, reverse), (log_rho.exp() - 1 - log_rho, forward)]:
        grad, = torch.autograd.grad((q.detach() * k).sum(), z, retain_graph=True)          # the exact expectation
        assert (grad - expected).abs().max() < 1e-12
    assert (forward - (q - p)).abs().max() < 1e-12 and (forward - reverse).abs().max() > 0.01


# ----------------------------------------------------------------------------------- the decomposition, on a tabular model

PREFIXES = [y for t in range(3) for y in itertools.product(range(3), repeat=t)]            # 1 + 3 + 9 of them
SEQUENCES = list(itertools.product(range(3), repeat=3))


def tabular(seed):
    return torch.randn(len(PREFIXES), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_steps(z):
    """(27, 3): log-probability of each token of each sequence."""
    logp = z.log_softmax(-1)
    return torch.stack([torch.stack([logp[PREFIXES.index(y[:t]), y[t]] for t in range(3)]) for y in SEQUENCES])


def prefix_probs(z):
    """(13,): probability that a rollout passes through each prefix."""
    probs = log_steps(z).sum(-1).exp()
    return torch.stack([probs[[y[:len(s)] == s for y in SEQUENCES]].sum() for s in PREFIXES])


def cell_gradient(prefix, reverse_weight, z, z_p):
    """Gradient of one of the four cells, from our op: prefixes are weighted, not differentiated."""
    table, eye = z.T.clone().requires_grad_(), torch.eye(len(PREFIXES), dtype=torch.float64)
    linear_kl(eye, table, eye, z_p.T, prefix_probs(z_p if prefix == "teacher" else z), reverse_weight)[0].backward()
    return table.grad.T


@pytest.fixture()
def pair():
    return tabular(2).requires_grad_(), tabular(3)


def test_decomposition(pair):
    """Eq. 2 and 3: KL between whole sequences = sum over prefixes of the writer's rollouts of the per-token KL."""
    z, z_p = pair[0].detach(), pair[1]
    q, p = log_steps(z).sum(-1), log_steps(z_p).sum(-1)
    forward, reverse = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    rows_q, rows_p = z.softmax(-1), z_p.softmax(-1)
    assert abs((prefix_probs(z_p) * kl(rows_p, rows_q)).sum() - forward) < 1e-12
    assert abs((prefix_probs(z) * kl(rows_q, rows_p)).sum() - reverse) < 1e-12
    # and the op gives the same numbers from the same weights
    eye = torch.eye(len(PREFIXES), dtype=torch.float64)
    for weight, lam, exact in [(prefix_probs(z_p), 0.0, forward), (prefix_probs(z), 1.0, reverse)]:
        loss, *_ = linear_kl(eye, z.T, eye, z_p.T, weight, lam)
        assert abs(loss.item() - exact.item()) < 1e-12


def test_what_each_cell_drops(pair):
    z, z_p = pair
    steps_q, steps_p = log_steps(z), log_steps(z_p)
    probs_q, probs_p = steps_q.sum(-1).exp(), steps_p.sum(-1).exp()
    exact_reverse, = torch.autograd.grad((probs_q * (steps_q - steps_p).sum(-1)).sum(), z, retain_graph=True)
    exact_forward, = torch.autograd.grad((probs_p * (steps_p - steps_q).sum(-1)).sum(), z, retain_graph=True)

    # teacher prefixes, forward: nothing is dropped
    assert (cell_gradient("teacher", 0.0, z.detach(), z_p) - exact_forward).abs().max() < 1e-12

    # student prefixes, reverse (OPD): E_q sum_t grad log q(y_t|s_t) c_t; the exact gradient adds the later costs sum c_t'
    c = (steps_q - steps_p).detach()
    now, = torch.autograd.grad((probs_q.detach()[:, None] * steps_q * c).sum(), z, retain_graph=True)
    future = c.flip(-1).cumsum(-1).flip(-1)
    full, = torch.autograd.grad((probs_q.detach()[:, None] * steps_q * future).sum(), z, retain_graph=True)
    opd = cell_gradient("student", 1.0, z.detach(), z_p)
    assert (full - exact_reverse).abs().max() < 1e-10
    assert (opd - now).abs().max() < 1e-12
    assert (opd - exact_reverse).abs().max() > 0.05

    # student prefixes, forward (DAgger): drops how the prefixes themselves move
    rows = kl(z_p.softmax(-1), z.softmax(-1))
    exact, = torch.autograd.grad((prefix_probs(z) * rows).sum(), z, retain_graph=True)
    assert (cell_gradient("student", 0.0, z.detach(), z_p) - exact).abs().max() > 0.05

    # teacher prefixes, reverse: the exact gradient of its own objective, without importance weights
    own, = torch.autograd.grad((prefix_probs(z_p) * kl(z.softmax(-1), z_p.softmax(-1))).sum(), z)
    assert (cell_gradient("teacher", 1.0, z.detach(), z_p) - own).abs().max() < 1e-12
