"""
Full-vocabulary KL from hidden states: linear layer -> log-sum-exp -> KL, without ever holding N x V logits.

N response tokens, V vocabulary, H / H_t hidden sizes of student q and teacher p, T temperature; z = logits / T, and

    log q = (z - max z) - log sum exp(z - max z)          d = log q - log p
    forward KL(p||q) = sum_v  q - p - p d                 every term is >= 0: no sum of large numbers of both signs
    reverse KL(q||p) = sum_v  p - q + q d
    d loss / d logit = w/T [ (1 - lam) (q - p) + lam q (d - KL(q||p)) ]                                    (Proposition 1)

The gradient needs nothing from above the loss but a scalar, so it is computed in the forward, a chunk of C tokens at a time:

    Z_q = h_q W_q^T,  Z_p = h_p W_p^T                     two GEMMs, fp32 out                      2 N V (H + H_t) FLOPs
    the row maths: Z_q, Z_p -> dZ, four numbers a token   one kernel: reads 8 V bytes twice, writes 2 V (bf16 dZ) a token
    dh_q = dZ W_q,  dW_q += dZ^T h_q                      two GEMMs, fp32 sums                     4 N V H FLOPs

On a GPU the row maths is the Triton kernel `_kl_kernel`; elsewhere `_kl_rows_torch`, a block of rows at a time so that they
stay in cache.
"""

# tl.constexpr below is not looked up where there is no Triton (other systems than Linux)
from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

CPU_BLOCK = 200_000                                      # logits in a block of the torch row maths: a few such stay in cache
CHUNK_BYTES = 525 << 20, 6 << 30                         # for the logits of one chunk and their gradient: CPU, GPU
TILE = 2048                                              # rows of a bf16 LM head upcast together on a CPU
BLOCK, WARPS = 4096, 8                                   # of the kernels: <= 128 registers a thread, no spills on sm_90


def linear_kl_reference(h_q, W_q, h_p, W_p, weight, reverse_weight, temperature=1.0):
    """The specification. Arguments and results as in `linear_kl`; builds N x V tensors, differentiable by autograd."""
    V = min(len(W_q), len(W_p))
    log_q = torch.log_softmax(h_q @ W_q[:V].T / temperature, -1)                  # (N, V)
    log_p = torch.log_softmax(h_p @ W_p[:V].T / temperature, -1)
    q, p, d = log_q.exp(), log_p.exp(), log_q - log_p
    forward, reverse = -(p * d).sum(-1), (q * d).sum(-1)
    loss = (weight * (reverse_weight * reverse + (1 - reverse_weight) * forward)).sum()
    stats = (forward, reverse, -(q * log_q).sum(-1), -(p * log_p).sum(-1))
    return loss, *(s.detach() for s in stats)


def linear_kl(h_q, W_q, h_p, W_p, weight, reverse_weight, temperature=1.0):
    """
    loss = sum_n weight[n] * (lam KL(q||p) + (1 - lam) KL(p||q)), lam = reverse_weight (Eq. 4), in nats.

    h_q (N, H), W_q (V, H): student; gradients flow here only. h_p (N, H_t), W_p (V_t, H_t): teacher. weight (N,) carries mask
    and normalisation; a row of weight 0 gets a gradient of exactly 0. Different vocabulary sizes are sliced to the smaller and
    renormalised. GEMMs take the dtype of h_q and h_p; logits, sums and dW are fp32 (fp64 for fp64 inputs).

    Returns (loss, forward KL, reverse KL, H(q), H(p)): a scalar and four (N,) tensors without gradient, at this temperature.
    Under `torch.no_grad()` no gradient is computed. Nothing here waits for the device. One backward a forward: dW is scaled in
    place. Raises ValueError on shapes, dtypes or devices that do not fit; float16 does not, its dZ would underflow.
    """
    _check("student", h_q, W_q)
    _check("teacher", h_p, W_p)
    if len(h_q) != len(h_p) or weight.shape != h_q.shape[:1] or not h_q.device == h_p.device == weight.device:
        raise ValueError(f"one row a token, on one device: h_q {_show(h_q)}, h_p {_show(h_p)}, weight {_show(weight)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    with torch.cuda.device_of(h_q):                      # where Triton launches
        return _LinearKL.apply(h_q, W_q, h_p, W_p, weight, float(reverse_weight), temperature, torch.is_grad_enabled())


def _show(tensor):
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _check(name, h, W):
    if h.ndim != 2 or W.ndim != 2 or h.shape[1] != W.shape[1] or h.device != W.device or not {h.dtype, W.dtype} <= {
            torch.float32, torch.bfloat16, torch.float64}:
        raise ValueError(f"{name}: hidden states {_show(h)} do not fit the LM head {_show(W)}; they should be (N, H) and "
                         f"(V, H) on one device, in float32, bfloat16 or float64")


# ------------------------------------------------------------------------------------------------- row maths in Triton

jit = triton.jit if triton else lambda function: function


@jit
def _kl_kernel(zq_ptr, zp_ptr, dz_ptr, weight_ptr, stats_ptr, V, z_stride, stats_stride, lam, inv_T,
               GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """One token a program. Logits (C, V) fp32 -> dz (C, V) in the compute dtype, and forward KL, reverse KL, H(q), H(p)."""
    row = tl.program_id(0).to(tl.int64)                  # C * V passes 2^31 at C = 14135
    zq_ptr += row * z_stride
    zp_ptr += row * z_stride
    dz_ptr += row * z_stride

    # 1. maxima, sums, and gap = sum e^{z_q - m_q} ((z_q - m_q) - (z_p - m_p)), online: when a maximum moves, what is summed
    # already is rescaled, and gap shifted too
    m_q, m_p = -1e30, -1e30                              # not -inf: exp(-inf - -inf) is NaN
    s_q, s_p, gap = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z_q = tl.load(zq_ptr + cols, mask=cols < V, other=-1e30) * inv_T
        z_p = tl.load(zp_ptr + cols, mask=cols < V, other=-1e30) * inv_T
        n_q, n_p = tl.maximum(m_q, tl.max(z_q, 0)), tl.maximum(m_p, tl.max(z_p, 0))
        x_q, x_p = z_q - n_q, z_p - n_p
        e_q, shrink = tl.exp(x_q), tl.exp(m_q - n_q)
        gap = shrink * (gap + ((m_q - n_q) - (m_p - n_p)) * s_q) + tl.sum(e_q * (x_q - x_p), 0)
        s_q = shrink * s_q + tl.sum(e_q, 0)
        s_p = tl.exp(m_p - n_p) * s_p + tl.sum(tl.exp(x_p), 0)
        m_q, m_p = n_q, n_p
    log_sq, log_sp = tl.log(s_q), tl.log(s_p)
    gap = gap / s_q                                      # KL(q||p) + log_sq - log_sp

    # 2. the four sums and the gradient
    scale = tl.load(weight_ptr + row) * inv_T            # of the gradient
    forward, reverse, H_q, H_p = 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x_q = tl.load(zq_ptr + cols, mask=cols < V, other=-1e30) * inv_T - m_q
        x_p = tl.load(zp_ptr + cols, mask=cols < V, other=-1e30) * inv_T - m_p
        log_q, log_p = x_q - log_sq, x_p - log_sp
        q, p, d = tl.exp(log_q), tl.exp(log_p), log_q - log_p
        # for small d, q - p - p d = p (e^d - 1 - d) is a difference of near-equal numbers: its series
        small, square = tl.abs(d) < 0.1, d * d
        even, odd = square * (0.5 + square / 24), d * square * (1 / 6 + square / 120)
        forward += tl.sum(tl.where(small, p * (even + odd), q - p - p * d), 0)
        reverse += tl.sum(tl.where(small, q * (even - odd), p - q + q * d), 0)
        H_q -= tl.sum(q * log_q, 0)
        H_p -= tl.sum(p * log_p, 0)
        if GRAD:
            dz = scale * ((1 - lam) * (q - p) + lam * q * ((x_q - x_p) - gap))
            dz = tl.where(scale == 0, 0.0, dz)           # even where a logit is not finite
            tl.store(dz_ptr + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < V)
    tl.store(stats_ptr + row, forward)
    tl.store(stats_ptr + row + stats_stride, reverse)
    tl.store(stats_ptr + row + 2 * stats_stride, H_q)
    tl.store(stats_ptr + row + 3 * stats_stride, H_p)


def _on_triton(z):
    return triton is not None and z.is_cuda and z.dtype == torch.float32


def _block(V):
    return dict(BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS)


# -------------------------------------------------------------------------------------------- row maths, Triton or torch

def _kl_rows(z_q, z_p, weight, lam, T, stats, want_grad, dtype):
    """Fills stats (4, C) from one chunk of logits (C, V); returns dZ (C, V) where wanted. Logits are overwritten on a CPU."""
    C, V = z_q.shape
    if _on_triton(z_q):
        dz = torch.empty_like(z_q, dtype=dtype) if want_grad else z_q
        _kl_kernel[(C,)](z_q, z_p, dz, weight, stats, V, V, stats.stride(0), lam, 1 / T, GRAD=want_grad, **_block(V))
        return dz if want_grad else None
    room = z_q.new_empty(3, rows := max(1, min(C, CPU_BLOCK // V)), V)
    for i in range(0, C, rows):
        block = slice(i, i + rows)
        _kl_rows_torch(z_q[block], z_p[block], weight[block, None], lam, T, stats[:, block], want_grad, *room[:, :C - i])
    return z_q


def _kl_rows_torch(z_q, z_p, weight, lam, T, stats, want_grad, q, p, room):
    """
    The same for a block of rows, writing dZ over z_q; q, p and room are memory to use. q - p is (q + p) tanh(d / 2) here: near
    d = 0 it, and with it both KLs' terms, keep their digits, and far from it nothing overflows. (A series there would need
    torch.where, which takes 15 times as long as a product.)
    """
    log_q, log_p = _log_softmax_(z_q, T, q), _log_softmax_(z_p, T, p)
    torch.sum(torch.mul(q, log_q, out=room), -1, out=stats[2]).neg_()
    torch.sum(torch.mul(p, log_p, out=room), -1, out=stats[3]).neg_()
    d = log_q.sub_(log_p)
    difference = torch.mul(d, 0.5, out=z_p).tanh_().mul_(torch.add(q, p, out=room))        # q - p
    torch.sum(torch.addcmul(difference, p, d, value=-1, out=room), -1, out=stats[0]).clamp_(min=0)
    torch.sum(torch.addcmul(difference, q, d, value=-1, out=room), -1, out=stats[1]).neg_().clamp_(min=0)
    if want_grad:
        scale = weight / T
        d.sub_(stats[1][:, None]).mul_(q).mul_(lam * scale).addcmul_(difference, (1 - lam) * scale)
        if (weight == 0).any():
            d[weight[:, 0] == 0] = 0                     # even where a logit is not finite


def _log_softmax_(z, T, q):
    """log q in place, and q. z - max and log(sum) are kept apart: one combined logsumexp costs the entropy its precision;
    torch.log_softmax sums 150k terms one by one and is 6e-6 off."""
    if T != 1:
        z.div_(T)
    torch.exp(z.sub_(z.amax(-1, keepdim=True)), out=q)
    s = q.sum(-1, keepdim=True)
    q.div_(s)
    return z.sub_(s.log())


# --------------------------------------------------------------------------------------------- GEMMs with fp32 results

def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _head(W, V, dtype):
    """The LM head as the GEMMs read it: in the compute dtype on a GPU, as it is on a CPU (upcast a tile at a time)."""
    return W[:V].to(dtype) if W.is_cuda else W[:V]


def _mm(a, b, out):
    """out (M, N) fp32 (fp64) = a (M, K) @ b (K, N), accumulated in fp32. Logits are written into memory used before: on a CPU
    a fresh tensor of 150 MB costs as much in page faults as its GEMM."""
    if a.is_cuda and b.dtype != out.dtype:
        return torch.mm(a.to(b.dtype), b, out_dtype=out.dtype, out=out)
    a = a.to(out.dtype)
    if b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    # a CPU has no out_dtype: upcast b (a bf16 LM head or its transpose) by tiles, never whole
    if b.shape[1] > b.shape[0]:
        for i in range(0, b.shape[1], TILE):
            torch.mm(a, b[:, i:i + TILE].to(out.dtype), out=out[:, i:i + TILE])
        return out
    out.zero_()
    for i in range(0, len(b), TILE):
        out.addmm_(a[:, i:i + TILE], b[i:i + TILE].to(out.dtype))
    return out


def _add_mm_(out, a, b, first):
    """out (M, N) fp32 += a (M, K) @ b (K, N), without rounding the product first; where `first`, what was in out is ignored."""
    beta = 0 if first else 1
    if a.is_cuda and b.dtype != out.dtype:
        return torch.addmm(out, a.to(b.dtype), b, out_dtype=out.dtype, beta=beta, out=out)
    return out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


def _chunks(N, V, device):
    """Slices of tokens whose logits are in memory together: W and dW are read and written once a chunk, so few and alike."""
    most = max(128, min(4096, CHUNK_BYTES[device.type == "cuda"] // (10 * V)))
    C = -(-N // -(-N // most)) if N else 1               # as many chunks as needed, then of equal size
    return [slice(i, min(i + C, N)) for i in range(0, N, C)]


def _buffers(count, chunks, V, like, dtype):
    """Room for the logits of one chunk, used again by the next."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return [like.new_empty(rows, V, dtype=dtype) for _ in range(count)]


# ------------------------------------------------------------------------------------------------- the autograd functions

class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_q, W_q, h_p, W_p, weight, lam, T, grad_enabled):
        N, V, wide = len(h_q), min(len(W_q), len(W_p)), _wide(h_q.dtype)
        want_dh, want_dW = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        head_q, head_p, weight = _head(W_q, V, h_q.dtype), _head(W_p, V, h_p.dtype), weight.to(wide).contiguous()
        stats = h_q.new_empty(4, N, dtype=wide)          # forward KL, reverse KL, H(q), H(p)
        dh = torch.empty_like(h_q) if want_dh else None
        dW = torch.empty_like(W_q, dtype=wide) if want_dW else None
        if want_dW:
            dW[V if N else 0:] = 0                       # words past the smaller vocabulary; the first chunk fills the rest
        room_q, room_p = _buffers(2, chunks := _chunks(N, V, h_q.device), V, h_q, wide)
        for rows in chunks:
            C = rows.stop - rows.start
            z_q, z_p = _mm(h_q[rows], head_q.T, room_q[:C]), _mm(h_p[rows], head_p.T, room_p[:C])        # (C, V) fp32
            dz = _kl_rows(z_q, z_p, weight[rows], lam, T, stats[:, rows], want_dh or want_dW, h_q.dtype)
            if want_dh:
                dh[rows] = _mm(dz, head_q, h_q.new_empty(C, h_q.shape[1], dtype=wide))
            if want_dW:
                _add_mm_(dW[:V], dz.T, h_q[rows], first=rows.start == 0)
        ctx.save_for_backward(dh, dW)
        ctx.dtypes = h_q.dtype, W_q.dtype
        losses = weight * (lam * stats[1] + (1 - lam) * stats[0])
        loss = losses.masked_fill(weight == 0, 0).sum()
        ctx.mark_non_differentiable(*(outputs := tuple(stats)))
        return loss, *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        grads = ctx.saved_tensors
        if grad_loss.is_cuda or grad_loss != 1:          # a second backward raises: dW may be 2.5 GB, so no copy is made
            grads = [None if g is None else g.mul_(grad_loss) for g in grads]
        return *[None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)], *[None] * 6
