"""
Log-probabilities of chosen tokens and the entropy of the full softmax, from hidden states: the N x V logits never exist.

    logp = log q[id],  H(q) = log s - (sum e^x x) / s     x = z - max z,  s = sum e^x,  z = logits / T
    d logp / d logit = (onehot(id) - q) / T

The same driver and GEMMs as `linear_kl`. The upstream gradient is one number a token, unknown in the forward, so the backward
computes the logits of a chunk again: 8 N H V FLOPs in all.
"""

# tl.constexpr below is not looked up where there is no Triton (other systems than Linux)
from __future__ import annotations

import torch

from kernels.linear_kl import (
    CPU_BLOCK,
    _add_mm_,
    _block,
    _buffers,
    _check,
    _chunks,
    _head,
    _mm,
    _on_triton,
    _show,
    _wide,
    jit,
    tl,
)


def linear_logp(h, W, token_ids, temperature=1.0):
    """
    h (N, H), W (V, H), token_ids (N,) in [0, V): others raise on a CPU and give NaN on a GPU. Returns (logps (N,),
    entropy (N,)), fp32, nats; the log-probs are differentiable in h and W, the entropy is not. Raises ValueError on shapes,
    dtypes or devices that do not fit.
    """
    _check("model", h, W)
    if token_ids.shape != h.shape[:1] or token_ids.device != h.device or token_ids.is_floating_point():
        raise ValueError(f"one id a row, on one device: h {_show(h)}, token_ids {_show(token_ids)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    with torch.cuda.device_of(h):                        # where Triton launches
        return _LinearLogp.apply(h, W, token_ids.contiguous(), temperature)


@jit
def _logp_kernel(z_ptr, ids_ptr, stats_ptr, V, stats_stride, inv_T, BLOCK: tl.constexpr):
    """One token a program. Logits (C, V) fp32 -> log q[id], H(q), max z, log sum exp(z - max z)."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    m, s, ex = -1e30, 0.0, 0.0                           # ex = sum e^x x, x = z - m
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, mask=cols < V, other=-1e30) * inv_T
        n = tl.maximum(m, tl.max(z, 0))
        x = z - n
        e, shrink = tl.exp(x), tl.exp(m - n)
        ex = shrink * (ex + (m - n) * s) + tl.sum(e * x, 0)
        s = shrink * s + tl.sum(e, 0)
        m = n
    log_s = tl.log(s)
    chosen = tl.load(ids_ptr + row)
    z = tl.load(z_ptr + chosen, mask=(chosen >= 0) & (chosen < V), other=float("nan"))
    tl.store(stats_ptr + row, z * inv_T - m - log_s)
    tl.store(stats_ptr + row + stats_stride, log_s - ex / s)
    tl.store(stats_ptr + row + 2 * stats_stride, m)
    tl.store(stats_ptr + row + 3 * stats_stride, log_s)


@jit
def _logp_grad_kernel(z_ptr, dz_ptr, ids_ptr, grad_ptr, stats_ptr, V, stats_stride, inv_T, BLOCK: tl.constexpr):
    """d log q[id] / d logit = (onehot(id) - q) / T, times the upstream gradient of the token."""
    row = tl.program_id(0).to(tl.int64)
    m, log_s = tl.load(stats_ptr + row + 2 * stats_stride), tl.load(stats_ptr + row + 3 * stats_stride)
    scale, chosen = tl.load(grad_ptr + row) * inv_T, tl.load(ids_ptr + row)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * V + cols, mask=cols < V, other=-1e30) * inv_T
        dz = scale * (tl.where(cols == chosen, 1.0, 0.0) - tl.exp(z - m - log_s))
        tl.store(dz_ptr + row * V + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < V)


def _logp_rows(z, token_ids, T, stats):
    """Fills stats (4, C): log q[id], H(q), and what the gradient needs again, max z and log sum exp(z - max z)."""
    if _on_triton(z):
        _logp_kernel[(len(z),)](z, token_ids, stats, z.shape[1], stats.stride(0), 1 / T, **_block(z.shape[1]))
        return
    chosen = z.gather(-1, token_ids[:, None]).squeeze(-1) / T
    for i in range(0, len(z), rows := max(1, CPU_BLOCK // z.shape[1])):
        x = z[i:i + rows].div_(T)
        m = x.amax(-1, keepdim=True)
        e = x.sub_(m).exp()
        s = e.sum(-1)
        stats[1:, i:i + rows] = torch.stack([s.log() - x.mul_(e).sum(-1) / s, m.squeeze(-1), s.log()])
    stats[0] = chosen - stats[2] - stats[3]


def _logp_grad_rows(z, token_ids, grad, T, stats, dtype):
    """dZ (C, V) of log q[id] times the upstream gradient (C,)."""
    if _on_triton(z):
        dz = torch.empty_like(z, dtype=dtype)
        _logp_grad_kernel[(len(z),)](z, dz, token_ids, grad, stats, z.shape[1], stats.stride(0), 1 / T, **_block(z.shape[1]))
        return dz
    scale = grad[:, None] / T
    z.div_(T).sub_(stats[2][:, None]).sub_(stats[3][:, None]).exp_().mul_(-scale)
    return z.scatter_add_(-1, token_ids[:, None], scale)


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, token_ids, T):
        head = _head(W, len(W), h.dtype)
        stats = h.new_empty(4, len(h), dtype=_wide(h.dtype))     # log q[id], H(q), max z, log sum exp(z - max z)
        room, = _buffers(1, chunks := _chunks(len(h), len(W), h.device), len(W), h, stats.dtype)
        for rows in chunks:
            z = _mm(h[rows], head.T, room[:rows.stop - rows.start])                        # (C, V) fp32
            _logp_rows(z, token_ids[rows], T, stats[:, rows])
        ctx.save_for_backward(h, W, token_ids, stats)
        ctx.T = T
        logps, entropy = stats[0].clone(), stats[1].clone()
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps, _):
        h, W, token_ids, stats = ctx.saved_tensors
        head, grad_logps = _head(W, len(W), h.dtype), grad_logps.contiguous()
        want_dh, want_dW = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if want_dh else None
        dW = (torch.empty_like if len(h) else torch.zeros_like)(W, dtype=stats.dtype) if want_dW else None
        room, = _buffers(1, chunks := _chunks(len(h), len(W), h.device), len(W), h, stats.dtype)
        for rows in chunks:
            z = _mm(h[rows], head.T, room[:rows.stop - rows.start])
            dz = _logp_grad_rows(z, token_ids[rows], grad_logps[rows], ctx.T, stats[:, rows], h.dtype)
            if want_dh:
                dh[rows] = _mm(dz, head, h.new_empty(len(dz), h.shape[1], dtype=stats.dtype))
            if want_dW:
                _add_mm_(dW, dz.T, h[rows], first=rows.start == 0)
        return dh, dW if dW is None else dW.to(W.dtype), None, None
