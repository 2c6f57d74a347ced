"""
Log-probabilities of chosen tokens, and the entropy of the full softmax, from hidden states.
As in linear_kl.py, the logits of all N tokens never exist.

    logp = log q[id]                x = z - max z,  z = logits, at temperature 1
    H(q) = log s - (sum e^x x) / s                  s = sum e^x
    d logp / dz = onehot(id) - q

Chunks and GEMMs are those of linear_kl.py. One thing differs: what flows back is one number a
token, which the forward does not know. So the backward computes the logits of each chunk again:
8 N H V FLOPs in all, where `linear_kl` has 6 N H V for the student.
"""

# Without Triton (on other systems than Linux) the annotation tl.constexpr must not be looked up.
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

# ---------------------------------------------------------------------- the row maths, in Triton

@jit
def _logp_kernel(z_ptr, ids_ptr, stats_ptr, V, stats_stride, BLOCK: tl.constexpr):
    """
    One token a program. Reads the logits (C, V) in fp32; writes log q[id], H(q), max z and
    log sum exp(z - max z) to stats (4, C).
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    m, s, ex = -1e30, 0.0, 0.0                           # ex = sum e^x x, x = z - m
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, mask=cols < V, other=-1e30)
        n = tl.maximum(m, tl.max(z, 0))                  # the new maximum
        x = z - n
        e = tl.exp(x)
        shrink = tl.exp(m - n)
        ex = shrink * (ex + (m - n) * s) + tl.sum(e * x, 0)
        s = shrink * s + tl.sum(e, 0)
        m = n
    log_s = tl.log(s)
    chosen = tl.load(ids_ptr + row)
    in_range = (chosen >= 0) & (chosen < V)
    z = tl.load(z_ptr + chosen, mask=in_range, other=float("nan"))
    tl.store(stats_ptr + row, z - m - log_s)
    tl.store(stats_ptr + row + stats_stride, log_s - ex / s)
    tl.store(stats_ptr + row + 2 * stats_stride, m)
    tl.store(stats_ptr + row + 3 * stats_stride, log_s)


@jit
def _logp_grad_kernel(z_ptr, dz_ptr, ids_ptr, grad_ptr, stats_ptr, V, stats_stride,
                      BLOCK: tl.constexpr):
    """dZ (C, V) = onehot(id) - q, times the upstream gradient of the token."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(stats_ptr + row + 2 * stats_stride)
    log_s = tl.load(stats_ptr + row + 3 * stats_stride)
    grad = tl.load(grad_ptr + row)
    chosen = tl.load(ids_ptr + row)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * V + cols, mask=cols < V, other=-1e30)
        dz = grad * (tl.where(cols == chosen, 1.0, 0.0) - tl.exp(z - m - log_s))
        tl.store(dz_ptr + row * V + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < V)


# ------------------------------------------------------------------ the row maths, Triton or torch

def _logp_rows(z, token_ids, stats):
    """
    Fills stats (4, C) from the logits z (C, V) of a chunk, which are overwritten: log q[id], H(q),
    and what the gradient needs again, max z and log sum exp(z - max z).
    """
    C, V = z.shape
    if _on_triton(z):
        _logp_kernel[(C,)](z, token_ids, stats, V, stats.stride(0), **_block(V))
        return
    chosen = z.gather(-1, token_ids[:, None]).squeeze(-1)
    logp, entropy, maximum, log_sum = stats
    rows = max(1, CPU_BLOCK // V)                        # handled together
    for i in range(0, C, rows):
        block = slice(i, i + rows)
        x = z[block]
        m = x.amax(-1, keepdim=True)
        e = x.sub_(m).exp()
        s = e.sum(-1)
        maximum[block] = m.squeeze(-1)
        log_sum[block] = s.log()
        entropy[block] = s.log() - x.mul_(e).sum(-1) / s
    logp.copy_(chosen - maximum - log_sum)


def _logp_grad_rows(z, token_ids, grad, stats, dtype):
    """dZ (C, V) of log q[id], times the upstream gradient (C,). On a CPU it replaces z."""
    C, V = z.shape
    if _on_triton(z):
        dz = torch.empty_like(z, dtype=dtype)
        _logp_grad_kernel[(C,)](
            z, dz, token_ids, grad, stats, V, stats.stride(0), **_block(V))
        return dz
    maximum, log_sum = stats[2:, :, None]                # (C, 1) each
    grad = grad[:, None]
    q = z.sub_(maximum).sub_(log_sum).exp_()
    return q.mul_(-grad).scatter_add_(-1, token_ids[:, None], grad)


# --------------------------------------------------------------------------- the autograd function

class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, token_ids):
        N, V = len(h), len(W)
        head = _head(W, V, h.dtype)
        stats = h.new_empty(4, N, dtype=_wide(h.dtype))
        chunks = _chunks(N, V, h.device)
        room, = _buffers(1, chunks, V, h, stats.dtype)
        for rows in chunks:
            z = _mm(h[rows], head.T, room[:rows.stop - rows.start])      # (C, V)
            _logp_rows(z, token_ids[rows], stats[:, rows])
        ctx.save_for_backward(h, W, token_ids, stats)
        logps = stats[0].clone()                         # stats is kept, and must not change
        entropy = stats[1].clone()
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps, _):
        h, W, token_ids, stats = ctx.saved_tensors
        N, V = len(h), len(W)
        head = _head(W, V, h.dtype)
        grad_logps = grad_logps.contiguous()
        want_dh, want_dW = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if want_dh else None
        dW = torch.empty_like(W, dtype=stats.dtype) if want_dW else None
        if want_dW and not N:
            dW.zero_()                                   # else the first chunk overwrites it
        chunks = _chunks(N, V, h.device)
        room, = _buffers(1, chunks, V, h, stats.dtype)
        for rows in chunks:
            z = _mm(h[rows], head.T, room[:rows.stop - rows.start])
            dz = _logp_grad_rows(
                z, token_ids[rows], grad_logps[rows], stats[:, rows], h.dtype)
            if want_dh:
                dh[rows] = _mm(dz, head, torch.empty_like(h[rows], dtype=stats.dtype))
            if want_dW:
                _add_mm_(dW, dz.T, h[rows], first=rows.start == 0)
        return dh, dW.to(W.dtype) if want_dW else None, None


# ----------------------------------------------------------------------------- the public function

def linear_logp(h, W, token_ids):
    """
    h (N, H) hidden states, W (V, H) LM head, token_ids (N,) in [0, V): another id raises an error
    on a CPU and gives NaN on a GPU, which is not waited for.

    Returns (logps (N,), entropy (N,)), in nats, fp32 (fp64 for fp64 inputs), at temperature 1.
    The log-probabilities are differentiable in h and W, the entropy is not. Raises ValueError where
    shapes, dtypes or devices do not fit.
    """
    _check("model", h, W)
    wrong_place = token_ids.shape != h.shape[:1] or token_ids.device != h.device
    if wrong_place or token_ids.is_floating_point():
        raise ValueError(
            f"one id a row, on one device: h {_show(h)}, token_ids {_show(token_ids)}")
    with torch.cuda.device_of(h):                        # where Triton launches
        return _LinearLogp.apply(h, W, token_ids.contiguous())
