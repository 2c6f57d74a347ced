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
    _buffer,
    _check,
    _chunks,
    _log_softmax_,
    _memory_of,
    _mm,
    _on_triton,
    _show,
    _sum_dtype,
    _wide,
    jit,
    tl,
)

# ---------------------------------------------------------------------- the row maths, in Triton

@jit
def _logp_kernel(z_ptr, out_ptr, ids_ptr, grad_ptr, V, out_stride,
                 GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """
    One token a program. Reads the logits (C, V) in fp32. Writes log q[id] and H(q) to out (2, C);
    where GRAD a row of dZ (C, V) = onehot(id) - q, times the token's upstream gradient, instead.
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
    if GRAD:
        grad = tl.load(grad_ptr + row)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + cols, mask=cols < V, other=-1e30)
            dz = grad * (tl.where(cols == chosen, 1.0, 0.0) - tl.exp(z - m - log_s))
            dz = dz.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * out_stride + cols, dz, mask=cols < V)
    else:
        in_range = (chosen >= 0) & (chosen < V)
        z = tl.load(z_ptr + chosen, mask=in_range, other=float("nan"))
        tl.store(out_ptr + row, z - m - log_s)
        tl.store(out_ptr + row + out_stride, log_s - ex / s)


# ------------------------------------------------------------------ the row maths, Triton or torch

def _logp_rows(z, token_ids, stats, grad=None, dtype=None):
    """
    From the logits z (C, V) of a chunk, which are overwritten: log q[id] and H(q) into stats
    (2, C); or, given the upstream gradient (C,), dZ (C, V) in `dtype`, which is returned: a new
    tensor or, on a CPU, in the memory of z.
    """
    C, V = z.shape
    if _on_triton(z):
        out = stats if grad is None else torch.empty_like(z, dtype=dtype)
        _logp_kernel[(C,)](
            z, out, token_ids, z if grad is None else grad, V, out.stride(0),
            GRAD=grad is not None, **_block(V))
        return out
    rows = max(1, min(C, CPU_BLOCK // V))                # handled together
    room, dz = torch.empty_like(z[:rows]), _memory_of(z, dtype or z.dtype)
    for i in range(0, C, rows):
        block = slice(i, i + rows)                       # the last one may be smaller
        q = room[:C - i]
        ids = token_ids[block, None]
        log_q = _log_softmax_(z[block], 1, q)            # takes the place of z
        if grad is None:
            stats[0, block] = log_q.gather(-1, ids).squeeze(-1)
            stats[1, block] = q.mul_(log_q).sum(-1).neg_()
        else:
            factor = grad[block, None]
            dz[block] = q.mul_(-factor).scatter_add_(-1, ids, factor)
    return dz


# --------------------------------------------------------------------------- the autograd function

class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, token_ids):
        N, V = len(h), len(W)
        head = W.to(h.dtype)
        stats = h.new_empty(2, N, dtype=_wide(h.dtype))
        chunks = _chunks(N, V, h.device)
        room = _buffer(chunks, V, h, stats.dtype)
        for rows in chunks:
            z = _mm(h[rows], head.T, room[:rows.stop - rows.start])      # (C, V)
            _logp_rows(z, token_ids[rows], stats[:, rows])
        ctx.save_for_backward(h, W, token_ids)
        logps, entropy = map(torch.clone, stats)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps, _):
        h, W, token_ids = ctx.saved_tensors
        N, V = len(h), len(W)
        wide = _wide(h.dtype)
        head = W.to(h.dtype)
        grad_logps = grad_logps.contiguous()
        want_dh, want_dW = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h, dtype=_sum_dtype(h)) if want_dh else None
        dW = torch.empty_like(W, dtype=wide) if want_dW else None
        if want_dW and not N:
            dW.zero_()                                   # else the first chunk overwrites it
        chunks = _chunks(N, V, h.device)
        room = _buffer(chunks, V, h, wide)
        for rows in chunks:
            z = _mm(h[rows], head.T, room[:rows.stop - rows.start])
            dz = _logp_rows(z, token_ids[rows], None, grad_logps[rows], h.dtype)
            if want_dh:
                _mm(dz, head, dh[rows])
            if want_dW:
                _add_mm_(dW, dz.T, h[rows], first=rows.start == 0)
        return dh.to(h.dtype) if want_dh else None, dW.to(W.dtype) if want_dW else None, None


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
