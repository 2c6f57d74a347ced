"""The maths, without models: Proposition 1, the decomposition by full enumeration, what each cell drops, the fused op."""

import itertools

import pytest
import torch

from kernels import linear_kl, linear_logp
from kernels.linear_kl import linear_kl_reference


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


# -------------------------------------------------------------------------------------------------------------- the op itself

def inputs(N, V, V_t, scale=1.0, H=24, H_t=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(N + V)
    h, W, h_t, W_t = (torch.randn(*shape, generator=g) for shape in [(N, H), (V, H), (N, H_t), (V_t, H_t)])
    return [(scale * h).to(dtype), W.to(dtype), (scale * h_t).to(dtype), W_t.to(dtype), torch.rand(N, generator=g)]


def run_op(op, tensors, lam, temperature, dtype, grad_output=1.0):
    h, W, h_t, W_t, weight = (t.detach().to(dtype) for t in tensors)
    h.requires_grad_(), W.requires_grad_()
    loss, *stats = op(h, W, h_t, W_t, weight, lam, temperature)
    (grad_output * loss).backward()
    return [loss.detach(), *stats, h.grad, W.grad]


@pytest.mark.parametrize("N, V, V_t, scale", [(37, 517, 533, 1.0), (1, 1, 3, 1.0), (1, 259, 257, 1.0), (200, 259, 257, 6.0),
                                              (300, 4099, 4099, 1e-2), (200, 31, 31, 30.0)])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_op_against_fp64(N, V, V_t, scale, lam):
    """Loss, four statistics and both gradients, with padded vocabularies, huge and tiny logits, T = 0.7, grad_output = 3."""
    tensors = inputs(N, V, V_t, scale)
    ours = run_op(linear_kl, tensors, lam, 0.7, torch.float32, 3.0)
    exact = run_op(linear_kl_reference, tensors, lam, 0.7, torch.float64, 3.0)
    for name, a, b in zip(["loss", "forward", "reverse", "H(q)", "H(p)", "dh", "dW"], ours, exact):
        assert (a - b).norm() <= 2e-5 * max(1, scale) * b.norm() + 1e-6, name      # fp32 logits carry eps |z|


def test_op_by_hand():
    """q = (3/4, 1/4), p = (1/2, 1/2)."""
    h, eye = torch.ones(1, 1), torch.tensor([[0.75], [0.25]]).log()
    loss, forward, reverse, H_q, H_p = linear_kl(h, eye, h, torch.zeros(2, 1), torch.tensor([2.0]), 0.25)
    assert forward.item() == pytest.approx(0.1438410, abs=1e-6)      # log 2 - log 3 / 2 + ... = ln(4/3)/2
    assert reverse.item() == pytest.approx(0.1308120, abs=1e-6)      # 3/4 ln 3/2 + 1/4 ln 1/2
    assert H_q.item() == pytest.approx(0.5623351, abs=1e-6) and H_p.item() == pytest.approx(0.6931472, abs=1e-6)
    assert loss.item() == pytest.approx(2 * (0.25 * 0.1308120 + 0.75 * 0.1438410), abs=1e-6)


def test_op_edges():
    tensors = inputs(9, 50, 50)
    tensors[4][3:] = 0
    tensors[0].requires_grad_()
    loss, *_ = linear_kl(*tensors, 0.5)
    loss.backward()
    assert tensors[0].grad[3:].abs().max() == 0 and tensors[0].grad[:3].abs().max() > 0    # weight 0 contributes nothing
    with torch.no_grad():
        quiet, *_ = linear_kl(*tensors, 0.5)
    assert not quiet.requires_grad and quiet == loss
    empty = inputs(0, 50, 50)
    empty[1].requires_grad_()
    loss, *stats = linear_kl(*empty, 0.5)
    loss.backward()
    assert loss == 0 and empty[1].grad.abs().max() == 0 and stats[0].shape == (0,)
    strided = [torch.stack([t, t], -1)[..., 0] for t in inputs(9, 50, 50)]
    assert linear_kl(*strided, 0.5)[0] == pytest.approx(linear_kl(*inputs(9, 50, 50), 0.5)[0].item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"\(9, 24\) float32 on cpu do not fit the LM head \(50, 7\)"):
        linear_kl(tensors[0], torch.zeros(50, 7), *tensors[2:], 0.5)
    with pytest.raises(ValueError, match="one row a token"):
        linear_kl(*tensors[:4], torch.ones(8), 0.5)


def test_op_bf16():
    """bf16 inputs keep fp32 logits: statistics stay exact; the gradients are rounded once, when they are returned in bf16."""
    tensors = inputs(64, 700, 700, 0.3, dtype=torch.bfloat16)
    ours = run_op(linear_kl, tensors, 0.5, 1.0, torch.bfloat16)
    exact = run_op(linear_kl_reference, tensors, 0.5, 1.0, torch.float64)
    for a, b in zip(ours[1:5], exact[1:5]):
        assert (a - b).norm() < 1e-5 * b.norm()
    for a, b in zip(ours[5:], exact[5:]):
        assert (a - b).norm() < 5e-3 * b.norm()


def test_linear_logp():
    h, W, *_, weight = inputs(33, 400, 400)
    ids = torch.randint(400, (33,), generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = h.detach().clone().to(dtype).requires_grad_(), W.clone().to(dtype).requires_grad_()
        if dtype == torch.float32:
            logps, entropy = linear_logp(a, b, ids, 0.8)
        else:
            log_q = torch.log_softmax(a @ b.T / 0.8, -1)
            logps, entropy = log_q.gather(1, ids[:, None]).squeeze(1), -(log_q.exp() * log_q).sum(-1)
        (logps * weight).sum().backward()                # another upstream gradient for every token
        results.append([logps.detach(), entropy.detach(), a.grad, b.grad])
    for ours, exact in zip(*results):
        assert (ours - exact).norm() < 1e-5 * exact.norm()
