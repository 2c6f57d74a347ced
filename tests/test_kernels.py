"""
The fused ops against fp64: the Triton kernels (by its interpreter, or on a GPU) and the torch path,
on the same cases.

conftest.py sets TRITON_INTERPRET=1 where there is no GPU, so the kernels that run here are the ones
that are compiled there.
"""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import import_utils

from kernels import cpu, linear_logp, roofline
from kernels.bench import linear_kl_reference
from kernels.linear_kl import linear_kl

# The modules; the package's names are the functions.
op = importlib.import_module("kernels.linear_kl")
logp_op = importlib.import_module("kernels.linear_logp")
ROOT = Path(op.__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["loss", "forward KL", "reverse KL", "H(q)", "H(p)", "dh", "dW"]


@pytest.fixture(params=["triton", "torch"])
def path(request, monkeypatch):
    """Both forms of the row maths, whatever the device would choose."""
    for module in (op, logp_op):
        monkeypatch.setattr(module, "_on_triton", lambda z: request.param == "triton")
    return request.param


def inputs(N, V, V_t, scale=1.0, H=24, H_t=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(N + V)
    h = scale * torch.randn(N, H, generator=g)
    W = torch.randn(V, H, generator=g)
    h_t = scale * torch.randn(N, H_t, generator=g)
    W_t = torch.randn(V_t, H_t, generator=g)
    weight = torch.rand(N, generator=g)
    return [t.to(DEVICE) for t in (h.to(dtype), W.to(dtype), h_t.to(dtype), W_t.to(dtype), weight)]


def run(function, tensors, lam, temperature=1.0, dtype=torch.float32, grad_output=1.0):
    """What NAMES lists."""
    h, W, h_t, W_t, weight = (t.detach().to(dtype) for t in tensors)     # strides stay
    h.requires_grad_()
    W.requires_grad_()
    loss, *stats = function(h, W, h_t, W_t, weight, lam, temperature)
    (grad_output * loss).backward()
    return [loss.detach(), *stats, h.grad, W.grad]


def distance(a, b):
    """Relative Frobenius distance."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def distances(a, b):
    """The largest relative distance of one number from its exact value."""
    return ((a.double() - b.double()).abs() / b.double().abs()).max().item()


# ----------------------------------------------------------------------------------- against fp64

@pytest.mark.parametrize("N, V, V_t, scale", [
    (37, 517, 533, 1.0), (1, 1, 3, 1.0), (1, 259, 257, 1.0), (20, 259, 257, 6.0),
    (3, 4099, 4099, 1e-2), (2, 9001, 9001, 1.0), (20, 31, 31, 30.0)])
@pytest.mark.parametrize("lam, temperature, grad_output", [
    (0.0, 1.0, 1.0), (0.2, 0.7, 3.0), (0.5, 2.0, -1.0), (1.0, 1.0, 0.5)])
def test_against_fp64(path, N, V, V_t, scale, lam, temperature, grad_output):
    """
    Odd sizes, one token, one word, padded vocabularies, large and tiny gaps; loss, four statistics
    and both gradients.
    """
    tensors = inputs(N, V, V_t, scale)
    ours = run(linear_kl, tensors, lam, temperature, grad_output=grad_output)
    exact = run(linear_kl_reference, tensors, lam, temperature, torch.float64, grad_output)
    for name, a, b in zip(NAMES, ours, exact):           # fp32 logits carry an error of eps |z|
        assert (a - b).norm() <= 2e-5 * max(1, scale) * b.norm() + 1e-6, name


def rows(z_q, z_p, lam, dtype=torch.float32):
    """(dZ, stats) of the row maths alone, every weight 1."""
    stats = torch.empty(4, len(z_q), device=DEVICE)
    weight = torch.ones(len(z_q), device=DEVICE)
    dz = op._kl_rows(z_q.clone(), z_p.clone(), weight, lam, 1.0, stats, True, dtype)
    return dz, stats


def exact_rows(z_q, z_p, lam):
    log_q = z_q.double().log_softmax(-1)
    log_p = z_p.double().log_softmax(-1)
    q, p, d = log_q.exp(), log_p.exp(), log_q - log_p
    forward, reverse = -(p * d).sum(-1), (q * d).sum(-1)
    stats = torch.stack([forward, reverse, -(q * log_q).sum(-1), -(p * log_p).sum(-1)])
    return (1 - lam) * (q - p) + lam * q * (d - reverse[:, None]), stats


@pytest.mark.parametrize("std", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_given_logits(path, std, lam):
    """The real vocabulary: gradients within 1e-5 of fp64, statistics too."""
    g = torch.Generator().manual_seed(3)
    z_q = (std * torch.randn(2, 151936, generator=g)).to(DEVICE)
    z_p = (std * torch.randn(2, 151936, generator=g)).to(DEVICE)
    dz, stats = rows(z_q, z_p, lam)
    exact_dz, exact_stats = exact_rows(z_q, z_p, lam)
    assert distance(dz, exact_dz) < 1e-5
    assert distances(stats[:2], exact_stats[:2]) < 1e-5
    assert (stats[2:] - exact_stats[2:]).abs().max() < 1e-5


def test_gemms_are_the_larger_error(path):
    """From hidden states: at most twice the error of fp32 GEMMs around fp64 row maths."""
    tensors = inputs(64, 5003, 5003, 1.0, 128, 256)
    h, W, h_t, W_t, weight = tensors
    exact = run(linear_kl_reference, tensors, 0.5, dtype=torch.float64)
    ours = run(linear_kl, tensors, 0.5)
    dz = weight[:, None] * exact_rows(h @ W.T, h_t @ W_t.T, 0.5)[0].float()
    for i, best in ((5, dz @ W), (6, dz.T @ h)):
        assert distance(ours[i], exact[i]) < 2 * distance(best, exact[i])


def test_extreme_and_equal_logits(path):
    g = torch.Generator().manual_seed(4)
    z = torch.randn(4, 5000, generator=g).to(DEVICE)
    other = torch.randn(4, 5000, generator=g).to(DEVICE)
    for scale in (200.0, 1e4):
        dz, stats = rows(scale * z, scale * other, 0.5)
        _, exact = exact_rows(scale * z, scale * other, 0.5)
        assert dz.isfinite().all() and stats.isfinite().all() and (stats >= 0).all()
        assert distances(stats[:2], exact[:2]) < 1e-4
    _, stats = rows(3 * z, 3 * z, 0.5)
    assert stats[:2].abs().max() < 1e-6                  # KL(p||p) = 0
    # A KL is about gap^2 / 2, in the middle 1e-6, and it is never negative.
    for gap in (1e-1, 1.4e-3, 1e-4):
        _, stats = rows(3 * z, 3 * z + gap * other, 0.5)
        _, exact = exact_rows(3 * z, 3 * z + gap * other, 0.5)
        assert (stats[:2] >= 0).all() and distances(stats[:2], exact[:2]) < 1e-2, gap


def test_lopsided_rows(path):
    """
    One direction large, the other small: neither borrows digits from the other. Then a NaN in a row
    of weight 0.
    """
    narrow = torch.tensor([[0.0, -7.0, -9000.0], [0.0, -4000.0, -9.0]], device=DEVICE)
    wide = torch.tensor([[0.0, -7.1, -6.0], [0.0, -8.0, -9.1]], device=DEVICE)
    for z_q, z_p in ((narrow, wide), (wide, narrow)):
        _, stats = rows(z_q, z_p, 0.5)
        _, exact = exact_rows(z_q, z_p, 0.5)
        assert exact[:2].max() > 1000 * exact[:2].min()
        assert distances(stats[:2], exact[:2]) < 1e-4
    tensors = inputs(5, 40, 40)
    tensors[0][3] = float("nan")
    tensors[4][3] = 0.0
    loss, *_, dh, dW = run(linear_kl, tensors, 0.5)
    assert loss.isfinite() and dh[3].abs().max() == 0 and dh[2].abs().max() > 0
    tensors[0][3] = 1.0
    assert torch.equal(dW, run(linear_kl, tensors, 0.5)[-1]) and dW.abs().max() > 0


@pytest.mark.parametrize("i", [0, 2])
def test_nan_of_weight_0_in_bf16(i):
    """A hidden state of student or teacher; oneDNN reads beyond the row before it."""
    tensors = inputs(64, 300, 300, 0.3, 33, 33, torch.bfloat16)
    tensors[4][2] = 0.0
    wanted = run(linear_kl, tensors, 0.5, dtype=torch.bfloat16)
    tensors[i][2] = float("nan")
    got = run(linear_kl, tensors, 0.5, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(got[:1] + got[5:], wanted[:1] + wanted[5:]))


@pytest.mark.parametrize("dtypes", [
    (torch.float64, torch.float32), (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)])
def test_two_dtypes(dtypes):
    """Of the student's tensors and the teacher's: the statistics are those of fp64."""
    h, W, h_t, W_t, weight = inputs(40, 500, 500, 0.3)
    tensors = [h.to(dtypes[0]), W.to(dtypes[0]), h_t.to(dtypes[1]), W_t.to(dtypes[1]), weight]
    exact = linear_kl_reference(*(t.double() for t in tensors), 0.5)
    for ours, other in zip(linear_kl(*tensors, 0.5), exact):
        assert distance(ours, other) < 1e-5


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5, 1.0])
def test_gradcheck(lam):
    """The torch path in fp64, both padded vocabularies."""
    h, W, h_t, W_t, weight = (t.double().cpu() for t in inputs(3, 7, 6, H=4, H_t=5))
    ids = torch.tensor([0, 6, 3])
    h.requires_grad_()
    W.requires_grad_()

    def loss_of(h, W):
        return linear_kl(h, W, h_t, W_t, weight, lam, 0.7)[0]

    def logps_of(h, W):
        return linear_logp(h, W, ids)[0]

    assert torch.autograd.gradcheck(loss_of, (h, W))
    assert torch.autograd.gradcheck(logps_of, (h, W))


def test_by_hand(path):
    """q = (3/4, 1/4), p = (1/2, 1/2)."""
    h = torch.ones(1, 1, device=DEVICE)
    W_q = torch.tensor([[0.75], [0.25]], device=DEVICE).log()
    weight = torch.tensor([2.0], device=DEVICE)
    results = linear_kl(h, W_q, h, torch.zeros_like(W_q), weight, 0.25)
    loss, forward, reverse, H_q, H_p = (result.item() for result in results)
    assert forward == pytest.approx(0.1438410, abs=1e-6)             # ln(4/3) / 2
    assert reverse == pytest.approx(0.1308120, abs=1e-6)             # 3/4 ln 3/2 + 1/4 ln 1/2
    assert H_q == pytest.approx(0.5623351, abs=1e-6)
    assert H_p == pytest.approx(0.6931472, abs=1e-6)
    assert loss == pytest.approx(2 * (0.25 * 0.1308120 + 0.75 * 0.1438410), abs=1e-6)


# Flips of a sign (or of a role) in the formulas, each of which must push a result away from fp64;
# the first flips nothing.
FLIPS = {"linear_kl": [
    ("", ""),
    ("shrink * (gap + shift", "shrink * (gap - shift"),
    ("tl.sum(e_q * (x_q - x_p), 0)", "tl.sum(e_q * (x_q + x_p), 0)"),
    ("tl.exp(m_p - n_p) * s_p", "tl.exp(n_p - m_p) * s_p"),
    ("p * (even + odd)", "p * (even - odd)"),
    ("q - p - p * d)", "q - p + p * d)"),
    ("q * (even - odd)", "q * (even + odd)"),
    ("p - q + q * d)", "p - q - q * d)"),
    ("H_q -= ", "H_q += "),
    ("H_p -= ", "H_p += "),
    ("(1 - lam) * (q - p) + lam * q * (", "(1 - lam) * (q - p) - lam * q * ("),
    ("(x_q - x_p) - gap)", "(x_q - x_p) + gap)"),
    ("(1 - lam) * (q - p) + lam", "(1 - lam) * (q + p) + lam"),
    ("out=H_q).neg_()", "out=H_q)"),
    ("out=H_p).neg_()", "out=H_p)"),
    ("torch.mul(d, 0.5, out=z_p)", "torch.mul(d, -0.5, out=z_p)"),
    ("torch.add(q, p, out=room)", "torch.sub(q, p, out=room)"),
    ("q_minus_p, p, d, value=-1", "q_minus_p, p, d, value=1"),
    ("q_minus_p, q, d, value=-1", "q_minus_p, q, d, value=1"),
    ("d.sub_(reverse", "d.add_(reverse"),
    ("q.mul_(lam * scale)", "q.mul_(-lam * scale)"),
    ("(1 - lam) * scale", "(lam - 1) * scale"),
    ("z.sub_(s.log())", "z.add_(s.log())"),
    ("lam * reverse + (1 - lam) * forward)", "lam * forward + (1 - lam) * reverse)"),
], "linear_logp": [
    ("", ""),
    ("shrink * (ex + (m - n) * s)", "shrink * (ex - (m - n) * s)"),
    ("row, z - m - log_s)", "row, z - m + log_s)"),
    ("log_s - ex / s)", "log_s + ex / s)"),
    ("- tl.exp(z - m - log_s)", "+ tl.exp(z - m - log_s)"),
    ("q.mul_(log_q).sum(-1).neg_()", "q.mul_(log_q).sum(-1)"),
    ("q.mul_(-factor", "q.mul_(factor"),
]}


@pytest.mark.parametrize("file, old, new", [
    (file, *flip) for file, flips in FLIPS.items() for flip in flips])
def test_flipped_signs_are_caught(tmp_path, monkeypatch, file, old, new):
    """The source with one sign flipped, imported as another module, does not agree with fp64."""
    source = (ROOT / "kernels" / f"{file}.py").read_text()
    assert source.count(old) == 1 or not old, "the formula has moved: mend this list"
    (tmp_path / "flipped.py").write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location("flipped", tmp_path / "flipped.py")
    flipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flipped)

    worst = 0.0
    for triton in (True, False):
        monkeypatch.setattr(flipped, "_on_triton", lambda z, on=triton: on)
        for scale in (3.0, 0.01):                        # both sides of |d| = 0.1
            if file == "linear_kl":
                tensors = inputs(9, 9001, 9001, scale, 8, 8)         # three blocks of the kernel
                ours = run(flipped.linear_kl, tensors, 0.3)
                exact = run(linear_kl_reference, tensors, 0.3, dtype=torch.float64)
                pairs = zip(ours, exact)
            else:
                pairs = logp_results(flipped.linear_logp, 9, 9001, scale, 8)
            for a, b in pairs:
                worst = max(worst, distance(a, b) if a.isfinite().all() else 1.0)
    assert (worst > 2e-4) == bool(old), worst


# -------------------------------------------------------------------------- what the op promises

def test_edges(path):
    tensors = inputs(9, 50, 50)
    tensors[4][3:] = 0
    h = tensors[0].requires_grad_()
    loss, *_ = linear_kl(*tensors, 0.5)
    loss.backward()
    # A token of weight 0 contributes nothing.
    assert h.grad[3:].abs().max() == 0 and h.grad[:3].abs().max() > 0
    with torch.no_grad():
        quiet, *_ = linear_kl(*tensors, 0.5)
    assert not quiet.requires_grad and quiet == loss

    empty = inputs(0, 50, 50)
    empty[1].requires_grad_()
    loss, *stats = linear_kl(*empty, 0.5)
    loss.backward()
    assert loss == 0 and empty[1].grad.abs().max() == 0 and stats[0].shape == (0,)

    strided = [torch.stack([t, t], -1)[..., 0] for t in inputs(9, 50, 50)]
    assert not strided[0].is_contiguous()
    for a, b in zip(run(linear_kl, strided, 0.5), run(linear_kl, inputs(9, 50, 50), 0.5)):
        assert distance(a, b) < 1e-6


def test_bad_input():
    h, W, h_t, W_t, weight = inputs(9, 50, 50)
    match = r"\(9, 24\) float32 on \w+.* do not fit the LM head \(50, 7\)"
    with pytest.raises(ValueError, match=match):
        linear_kl(h, torch.zeros(50, 7, device=DEVICE), h_t, W_t, weight, 0.5)
    with pytest.raises(ValueError, match=r"h_q \(9, 24\).* h_p \(8, 40\).* weight \(9,\)"):
        linear_kl(h, W, h_t[:8], W_t, weight, 0.5)
    with pytest.raises(ValueError, match=r"teacher: hidden states \(9, 40\) int64"):
        linear_kl(h, W, h_t.long(), W_t, weight, 0.5)
    with pytest.raises(ValueError, match=r"\(50, 24\) float32 on meta"):
        linear_kl(h, W.to("meta"), h_t, W_t, weight, 0.5)
    with pytest.raises(ValueError, match=r"\(50, 24\) float16"):
        linear_kl(h, W.half(), h_t, W_t, weight, 0.5)
    match = "once_differentiable|double backward|differentiated twice|does not require grad"
    with pytest.raises(RuntimeError, match=match):
        loss = linear_kl(h.requires_grad_(), W, h_t, W_t, weight, 0.5)[0]
        grad, = torch.autograd.grad(loss, h, create_graph=True)
        torch.autograd.grad(grad.sum(), h)
    with pytest.raises(ValueError, match="temperature=0"):
        linear_kl(h, W, h_t, W_t, weight, 0.5, 0)
    with pytest.raises(ValueError, match=r"h \(9, 24\).*token_ids \(8,\) int64"):
        linear_logp(h, W, torch.zeros(8, dtype=torch.long, device=DEVICE))
    with pytest.raises(ValueError, match=r"token_ids \(9,\) float32"):
        linear_logp(h, W, weight)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.numel = max(self.numel, out.numel())
        return out


def test_chunks(path, monkeypatch):
    """Any chunking gives the same numbers, and no tensor of N x V elements is ever made."""
    tensors = inputs(500, 400, 400)
    whole = run(linear_kl, tensors, 0.3)
    monkeypatch.setattr(op, "CHUNK_BYTES", (1, 1))
    chunks = op._chunks(500, 400, torch.device("cpu"))
    assert [len(range(*chunk.indices(500))) for chunk in chunks] == [125] * 4
    with LargestTensor() as largest:
        parts = run(linear_kl, tensors, 0.3)
    # The row maths have room for three blocks at most.
    assert 125 * 400 <= largest.numel <= 3 * 125 * 400 < 500 * 400
    for a, b in zip(parts, whole):
        assert distance(a, b) < 1e-6


def test_flops():
    """Each projection once: 6 N H V + 2 N H_t V. Gradients that nobody wants are not computed."""
    N, V, H, H_t = 64, 1000, 24, 40
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run(linear_kl, inputs(N, V, V), 0.5)
    assert counter.get_total_flops() == 6 * N * H * V + 2 * N * H_t * V

    h, W, h_t, W_t, weight = inputs(N, V, V)
    h.requires_grad_()
    W.requires_grad_()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_kl(h, W, h_t, W_t, weight, 0.5)
    assert counter.get_total_flops() == 2 * N * (H + H_t) * V
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        linear_kl(h, W.detach(), h_t, W_t, weight, 0.5)[0].backward()        # a frozen LM head
    assert counter.get_total_flops() == 4 * N * H * V + 2 * N * H_t * V


def test_bf16():
    """
    bf16 inputs have logits in fp32, or with 16 bits on a CPU: statistics are exact, and gradients
    are rounded to bf16 once or twice. Three tiles of the vocabulary; beside it autocast, and an
    fp32 head under bf16 hidden states, as in training. The same for `linear_logp`.
    """
    tensors = inputs(64, 5000, 5000, 0.3, dtype=torch.bfloat16)
    exact = run(linear_kl_reference, tensors, 0.5, dtype=torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(linear_kl, tensors, 0.5, dtype=torch.bfloat16)
    for a, b in zip(ours[1:5], exact[1:5]):
        assert distance(a, b) < 1e-5
    for a, b in zip(ours[5:], exact[5:]):
        assert distance(a, b) < 3e-3
    h, W, h_t, W_t, weight = (t.clone() for t in tensors)
    W = W.float().requires_grad_()                       # an fp32 master: dW stays in fp32
    linear_kl(h, W, h_t, W_t, weight.bfloat16(), 0.5)[0].backward()
    assert W.grad.dtype == torch.float32 and distance(W.grad, exact[6]) < 3e-3

    results = []
    for dtype in (torch.float64, torch.bfloat16):
        h, W = (t.to(dtype).requires_grad_() for t in tensors[:2])
        logps, entropy = linear_logp(h, W, torch.arange(0, 5000, 79, device=DEVICE))
        results.append((logps, entropy, *torch.autograd.grad((weight * logps).sum(), (h, W))))
    for x, y, limit in zip(*results, (1e-5, 1e-5, 3e-3, 3e-3)):
        assert distance(y, x) < limit


def test_tied_weights():
    """One Parameter is both embedding and LM head: the two gradients add up."""
    g = torch.Generator().manual_seed(5)
    table = torch.randn(40, 8, generator=g)
    teacher = torch.randn(40, 8, generator=g)
    ids = torch.randint(40, (12,), generator=g)
    weight = torch.rand(12, generator=g)
    grads = []
    for function, dtype in ((linear_kl, torch.float32), (linear_kl_reference, torch.float64)):
        W = table.clone().to(dtype).requires_grad_()
        h = torch.nn.functional.embedding(ids, W).tanh()
        loss, *_ = function(h, W, h.detach(), teacher.to(dtype), weight.to(dtype), 0.5)
        loss.backward()
        grads.append(W.grad)
    assert distance(*grads) < 1e-5
    assert grads[0][torch.isin(torch.arange(40), ids)].abs().min() > 0


# ------------------------------------------------------------------------------------ linear_logp

def logp_reference(h, W, ids):
    log_q = torch.log_softmax(h @ W.T, -1)
    logps = log_q.gather(1, ids[:, None]).squeeze(1)
    return logps, -(log_q.exp() * log_q).sum(-1)


def logp_results(function, N, V, scale=1.0, H=24):
    """Pairs (ours, fp64): log-probs, entropy, dh, dW, with an upstream gradient for each token."""
    h, W, *_, weight = inputs(N, V, V, scale, H)
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for compute, dtype in ((function, torch.float32), (logp_reference, torch.float64)):
        a = h.detach().clone().to(dtype).requires_grad_()
        b = W.clone().to(dtype).requires_grad_()
        logps, entropy = compute(a, b, ids)
        (logps * weight).sum().backward()
        results.append([logps.detach(), entropy.detach(), a.grad, b.grad])
    return list(zip(*results))


@pytest.mark.parametrize("N, V, scale", [
    (33, 400, 1.0), (1, 1, 1.0), (5, 9001, 3.0), (300, 37, 10.0), (0, 50, 1.0)])
def test_linear_logp(path, N, V, scale, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", (1, 1))       # several chunks at N = 300
    for ours, exact in logp_results(linear_logp, N, V, scale):
        assert (ours - exact).norm() <= 2e-5 * exact.norm() + 1e-6


# ---------------------------------------------------------------------------------- Triton itself

@pytest.mark.skipif(DEVICE == "cuda", reason="8 GB of untouched memory are cheap on a CPU only")
def test_row_offsets_are_int64():
    """
    Row 2 of a stride of 2^30 elements lies 2^31 from row 0. Removing `.to(tl.int64)` makes this
    read elsewhere and crash.
    """
    code = """
import importlib, sys, torch
sys.path.insert(0, ".")
op = importlib.import_module("kernels.linear_kl")
V, stride = 50, 2 ** 30
room = torch.empty(2 * stride + 4 * V)                   # never touched but for a few pages
z_q, z_p, dz = (room.as_strided((3, V), (stride, 1), i * V) for i in range(3))
z_q.copy_(torch.randn(3, V)), z_p.copy_(torch.randn(3, V))
stats = torch.empty(4, 3)
op._kl_kernel[(3,)](z_q, z_p, dz, torch.ones(3), stats, V, stride, 3, 0.5, 1.0,
                    GRAD=True, BLOCK=64)
log_q, log_p = z_q.log_softmax(-1), z_p.log_softmax(-1)
expected = (log_p.exp() * (log_p - log_q)).sum(-1)
assert (stats[0] - expected).abs().max() < 1e-5, (stats[0], expected)
assert dz[2].abs().max() > 0.01
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-800:]


COMPILE = r"""
import importlib, json, os, re, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, ".")
op = importlib.import_module("kernels.linear_kl")
logp_op = importlib.import_module("kernels.linear_logp")
KINDS = {"dz_ptr": "*bf16", "out_ptr": "*bf16", "ids_ptr": "*i64", "lam": "fp32", "inv_T": "fp32",
         "GRAD": "constexpr", "BLOCK": "constexpr"}
CONSTANTS = {"GRAD": True, "BLOCK": op.BLOCK}
TARGETS = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
binaries = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

def usage_of(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(binaries, "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(key + r":(\d+)", text)[1]) for key in ("REG", "STACK")}

results = []
for kernel in (op._kl_kernel, logp_op._logp_kernel):
    names = kernel.arg_names
    types = [KINDS.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names]
    constants = {(names.index(k),): v for k, v in CONSTANTS.items() if k in names}
    sizes = "V", "z_stride", "out_stride"
    aligned = [i for i, n in enumerate(names) if n.endswith("_ptr") or n in sizes]
    source = ASTSource(fn=kernel, signature=dict(zip(names, types)), constexprs=constants,
                       attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    for target in TARGETS:
        built = triton.compile(source, target=target, options=dict(num_warps=op.WARPS))
        row = {"kernel": kernel.__name__, "arch": target.arch}
        if target.backend == "cuda":
            usage = usage_of(built.asm["cubin"])
            row["registers"], row["spilled"] = usage["REG"], usage["STACK"]
            loads = [line for line in built.asm["ptx"].splitlines() if "ld.global" in line]
            row["wide_loads"] = sum(".v4.b32" in line for line in loads)
        else:
            code = built.asm["amdgcn"]
            spills = re.findall(r"(?:private_segment_fixed_size|vgpr_spill_count): +(\d+)", code)
            row["spilled"] = max(int(n) for n in spills)
            row["wide_loads"] = code.count("load_dwordx4")
        results.append(row)
print(json.dumps(results))
"""


def test_compiled_kernels():
    """
    Ahead of time, in a process without the interpreter, for A100, H100 and MI300: no spills, room
    for two blocks of threads on an SM, logits read 16 bytes at a time.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 6
    for row in results:
        assert row["spilled"] == 0, row
        assert row["wide_loads"] >= (8 if row["kernel"] == "_kl_kernel" else 2), row
        if row["arch"] == 90:
            assert 65536 // (row["registers"] * 32 * op.WARPS) >= 2, row


def test_roofline():
    """
    The row kernel is bound by memory on an H100, by its compiled code: two loops with two
    exponentials a word each; a loop and a branch are found by hand.
    """
    listing = ["  /*0010*/  MOV R1, c[0x0] ;", "  /*0020*/  LDG.E.128 R4, [R2] ;",
               "  /*0030*/  @P1 MUFU.EX2 R5, R6 ;", "  /*0040*/  @!P0 BRA 0x20 ;",
               "  /*0050*/  BRA 0x70 ;"]
    assert roofline.loops(listing) == [{"LDG": 1, "MUFU": 1, "BRA": 1}]
    code = ("from kernels import roofline\nlines, words = roofline.compiled()\n"
            "loops = [x for x in roofline.loops(lines) if x['LDG']]\n"
            "print([x['MUFU'] / words for x in loops], roofline.limits(loops, words))")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    exponentials, limits = re.fullmatch(r"(\[.*\]) (\{.*\})", done.stdout.splitlines()[-1]).groups()
    assert json.loads(exponentials) == pytest.approx([2, 2], abs=0.3)
    limits = json.loads(limits.replace("'", '"'))
    assert limits["memory"] == pytest.approx(1.24, abs=0.01)
    assert 0.3 < limits["special"] + limits["issue"] < limits["memory"]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_no_synchronisation():
    tensors = inputs(300, 5000, 5000, dtype=torch.bfloat16)
    run(linear_kl, tensors, 0.5, dtype=torch.bfloat16)   # compiles
    tensors = [t.requires_grad_(i < 2) for i, t in enumerate(tensors)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_kl(*tensors, 0.5)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


GROWTH = """
import os, sys
if sys.argv[1] == "limited":
    import kernels
import torch

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

weight = torch.randn(1536, 576, dtype=torch.bfloat16, requires_grad=True)
for rows in range(800, 920):
    (torch.randn(rows, 576, dtype=torch.bfloat16) @ weight.T).sum().backward()
    weight.grad = None
    if rows == 820:
        start = megabytes()
print(megabytes() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from /proc")
def test_products_of_ever_new_shapes_do_not_pile_up():
    """In bf16 torch keeps a compiled product for each shape; `kernels` keeps few of them."""
    grown = {}
    for how in ("limited", "as it is"):
        environment = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
        environment |= {"MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": "."}
        done = subprocess.run([sys.executable, "-c", GROWTH, how], env=environment, check=True,
                              capture_output=True, text=True)
        grown[how] = float(done.stdout)
    if grown["as it is"] < 50:
        pytest.skip("this machine's products take no memory worth a limit")
    assert grown["limited"] < grown["as it is"] / 2


# ------------------------------------------------------------------------------ attention on a CPU

def exact_attention(query, key, value, mask):
    """By whole scores in fp64; every group of three heads has a key and a value."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(3, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_attention(monkeypatch, dtype, tolerance):
    """
    Output and gradients of a causal sequence, and the output of a query under a mask, for which no
    key or value is copied. In bf16 they are rounded once.
    """
    torch.manual_seed(0)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert attention is cpu.attention
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    query, key, value = (torch.randn(2, heads, 40, 32, dtype=dtype) for heads in (6, 2, 2))
    plain = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", None)
    mask = torch.rand(2, 1, 1, 40) < 0.5
    with plain, torch.no_grad():
        last, _ = attention(module, query[:, :, -1:], key, value, mask, scaling=None)
    assert last.dtype == dtype
    assert distance(last, exact_attention(query[:, :, -1:], key, value, mask)) < tolerance

    outputs, grads = [], []
    weight = torch.randn(2, 40, 6, 32, dtype=dtype)
    for exact in (False, True):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        if exact:
            output = exact_attention(*inputs, torch.ones(40, 40, dtype=torch.bool).tril())
        else:
            with plain:
                output, _ = attention(module, *inputs, None)
        outputs.append(output)
        grads.append(torch.autograd.grad((weight * output).sum(), inputs))
    assert outputs[0].dtype == dtype and distance(*outputs) < tolerance
    assert all(distance(ours, other) < tolerance for ours, other in zip(*grads))


def test_a_package_of_the_same_name(tmp_path):
    """
    transformers looks for Hugging Face's `kernels` and finds this folder: a script in it that
    imports transformers first works, and where that package is installed one line says what to do.
    """
    info = tmp_path / f"kernels-{import_utils.KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: kernels\nVersion: {import_utils.KERNELS_MIN_VERSION}\n")
    script = ("from transformers import AutoModelForCausalLM as model\n"
              "model.from_pretrained('data/toy/student')")
    for installed in (False, True):
        found = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path) if installed else ""})
        last = found.stderr.strip().split("\n")[-1]
        assert bool(found.returncode) == installed, found.stderr
        assert last.endswith("finds this repository's folder of that name first: pip uninstall "
                             "kernels") == installed
