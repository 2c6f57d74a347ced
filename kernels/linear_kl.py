"""
The KL divergence of two language models over the full vocabulary, computed from hidden states.
The logits of all N tokens (N x V numbers) never exist: a chunk of tokens is handled at a time.

N response tokens, V words in the vocabulary, H and H_t hidden sizes of student q and teacher p,
T temperature, w the weight of a token, lam = reverse_weight, and logits z = h W^T / T:

    log q = (z - max z) - log sum exp(z - max z)        d = log q - log p
    forward KL(p||q) = sum_v  q - p - p d
    reverse KL(q||p) = sum_v  p - q + q d
    d loss / d logit = w/T [ (1 - lam) (q - p) + lam q (d - KL(q||p)) ]         (Proposition 1)

The sum over q - p is 0. It is added because it makes every term positive or 0: a sum of large
numbers of both signs would lose its digits.

The gradient needs nothing from above the loss but one number, so it is computed together with
the loss. For each chunk:

    Z_q = h_q W_q^T,  Z_p = h_p W_p^T      two GEMMs, fp32 results       2 N V (H + H_t) FLOPs
    Z_q, Z_p -> dZ, four sums a token      the row maths: a token reads 8 V bytes twice
                                           and writes 2 V bytes (dZ in bf16)
    dh_q = dZ W_q,  dW_q += dZ^T h_q       two GEMMs, fp32 sums          4 N V H FLOPs

The file goes from the inside to its use: 1. the row maths for a chunk of logits, by a Triton kernel
on a GPU and by torch elsewhere; 2. the GEMMs; 3. `_LinearKL` joins them for autograd; 4.
`linear_kl` is the function to call. `linear_kl_reference` in kernels/bench.py computes the same in
ten lines, from whole logits; the tests compare with it in fp64.

A divergence of your own does not need this file: docs/step.md has a function of ten lines with
ordinary autograd that holds the logits of one chunk at a time too.
"""

# Without Triton (on other systems than Linux) the annotation tl.constexpr must not be looked up.
from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

CHUNK_BYTES = 525 << 20, 6 << 30     # for a chunk's logits and their gradient: on a CPU, on a GPU
CPU_BLOCK = 200_000                  # logits that torch handles together: they stay in cache
TILE = 2048                          # words whose logits a CPU finds in bf16, and refines, together
BLOCK = 4096                         # words that a kernel handles together, and
WARPS = 8                            # its warps: no register is spilled on an H100 (sm_90)


# -------------------------------------------------------------------- 1. the row maths, in Triton

jit = triton.jit if triton else lambda function: function


@jit
def _kl_kernel(zq_ptr, zp_ptr, dz_ptr, weight_ptr, stats_ptr, V, z_stride, stats_stride,
               lam, inv_T, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """
    One token a program. Reads the logits (C, V) in fp32 of both models. Writes a token's forward
    KL, reverse KL, H(q) and H(p) to stats (4, C), and where GRAD its row of dZ (C, V).
    """
    row = tl.program_id(0).to(tl.int64)                  # C * V passes 2^31 at C = 14135
    zq_ptr += row * z_stride
    zp_ptr += row * z_stride
    dz_ptr += row * z_stride

    # First pass over the vocabulary: the maxima m, the sums s = sum e^(z - m) of both models, and
    #     gap = sum e^(z_q - m_q) ((z_q - m_q) - (z_p - m_p)).
    # When a later block moves a maximum, what is summed already is rescaled, and gap is shifted.
    m_q = -1e30                                          # not -inf: exp(-inf - -inf) is NaN
    m_p = -1e30
    s_q, s_p, gap = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z_q = tl.load(zq_ptr + cols, mask=cols < V, other=-1e30) * inv_T
        z_p = tl.load(zp_ptr + cols, mask=cols < V, other=-1e30) * inv_T
        n_q = tl.maximum(m_q, tl.max(z_q, 0))            # the new maxima
        n_p = tl.maximum(m_p, tl.max(z_p, 0))
        x_q = z_q - n_q
        x_p = z_p - n_p
        e_q = tl.exp(x_q)
        shrink = tl.exp(m_q - n_q)
        shift = (m_q - n_q) - (m_p - n_p)
        gap = shrink * (gap + shift * s_q) + tl.sum(e_q * (x_q - x_p), 0)
        s_q = shrink * s_q + tl.sum(e_q, 0)
        s_p = tl.exp(m_p - n_p) * s_p + tl.sum(tl.exp(x_p), 0)
        m_q = n_q
        m_p = n_p
    log_sq = tl.log(s_q)
    log_sp = tl.log(s_p)
    gap = gap / s_q                                      # KL(q||p) + log_sq - log_sp

    # Second pass: the four sums and the gradient.
    scale = tl.load(weight_ptr + row) * inv_T            # of the gradient
    forward, reverse, H_q, H_p = 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x_q = tl.load(zq_ptr + cols, mask=cols < V, other=-1e30) * inv_T - m_q
        x_p = tl.load(zp_ptr + cols, mask=cols < V, other=-1e30) * inv_T - m_p
        log_q = x_q - log_sq
        log_p = x_p - log_sp
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        d = log_q - log_p
        # For small d, q - p - p d = p (e^d - 1 - d) is a difference of nearly equal numbers.
        # There its power series is used; even and odd are the terms with even and odd powers.
        small = tl.abs(d) < 0.1
        square = d * d
        even = square * (0.5 + square / 24)
        odd = d * square * (1 / 6 + square / 120)
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


def _memory_of(z, dtype):
    """
    The first part of z's memory as a tensor of z's shape in `dtype`, which is not wider: its row i
    ends no later than row i of z. It has no gaps between rows: oneDNN reads beyond the end of a row
    in bf16, and what it finds there, times 0, must not be NaN.
    """
    return z.view(dtype).flatten()[:z.numel()].view(z.shape)


def _on_triton(z):
    return triton is not None and z.is_cuda and z.dtype == torch.float32


def _block(V):
    return dict(BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS)


# ------------------------------------------------------------------ the row maths, Triton or torch

def _kl_rows(z_q, z_p, weight, lam, T, stats, want_grad, dtype):
    """
    Turns the logits z_q, z_p (C, V) of a chunk into stats (4, C), which is filled in place, and
    dZ (C, V) in `dtype`, the gradient in the student's logits, which is returned (None without
    want_grad). The kernel writes dZ to a new tensor. On a CPU, where new memory is slow, z_q is
    overwritten, and dZ takes the place of z_p.
    """
    C, V = z_q.shape
    if _on_triton(z_q):
        dz = torch.empty_like(z_q, dtype=dtype) if want_grad else None
        _kl_kernel[(C,)](
            z_q, z_p, dz if want_grad else z_q, weight, stats, V, V, stats.stride(0),
            lam, 1 / T, GRAD=want_grad, **_block(V))     # without GRAD it never touches dz
        return dz
    rows = max(1, min(C, CPU_BLOCK // V))                # handled together
    room = z_q.new_empty(3, rows, V)                     # for q, p and products
    dz = _memory_of(z_p, dtype)
    for i in range(0, C, rows):
        block = slice(i, i + rows)                       # the last one may be smaller
        _kl_rows_torch(
            z_q[block], z_p[block], weight[block, None], lam, T, stats[:, block],
            dz[block] if want_grad else None, *room[:, :C - i])
    return dz if want_grad else None


def _kl_rows_torch(z_q, z_p, weight, lam, T, stats, dz, q, p, room):
    """
    The row maths for a few rows, in place: a product into memory in cache is what a CPU does fast.
    weight is (C, 1). q, p and room are memory like z_q. dz, unless it is None, may be memory of
    z_p, which is read for the last time before dz is written.

    Here q - p is (q + p) tanh(d / 2), which keeps its digits near d = 0, as do both KLs' terms with
    it, and overflows nowhere. (The kernel's series would need torch.where, which takes 15 times as
    long as a product.)
    """
    log_q = _log_softmax_(z_q, T, q)                     # log_q is z_q from here on, log_p is z_p
    log_p = _log_softmax_(z_p, T, p)
    forward, reverse, H_q, H_p = stats
    torch.sum(torch.mul(q, log_q, out=room), -1, out=H_q).neg_()
    torch.sum(torch.mul(p, log_p, out=room), -1, out=H_p).neg_()

    d = log_q.sub_(log_p)                                # d is z_q from here on; z_p is free
    q_minus_p = torch.mul(d, 0.5, out=z_p).tanh_()
    q_minus_p.mul_(torch.add(q, p, out=room))

    terms = torch.addcmul(q_minus_p, p, d, value=-1, out=room)       # q - p - p d
    torch.sum(terms, -1, out=forward).clamp_(min=0)
    terms = torch.addcmul(q_minus_p, q, d, value=-1, out=room)       # -(p - q + q d)
    torch.sum(terms, -1, out=reverse).neg_().clamp_(min=0)

    if dz is not None:
        scale = weight / T
        forward_part = torch.mul(q_minus_p, (1 - lam) * scale, out=p)
        dz.copy_(forward_part.addcmul_(d.sub_(reverse[:, None]), q.mul_(lam * scale)))
        if (weight == 0).any():
            dz[weight[:, 0] == 0] = 0                    # even where a logit is not finite


def _log_softmax_(z, T, q):
    """
    Makes z into log q in place, returns it, and fills q. Maximum and log of the sum are subtracted
    one after the other: as one number (logsumexp) they would cost the entropy its precision, and
    torch.log_softmax, which adds 150k terms one by one, is 6e-6 off.
    """
    if T != 1:
        z.div_(T)
    torch.exp(z.sub_(z.amax(-1, keepdim=True)), out=q)
    s = q.sum(-1, keepdim=True)
    q.div_(s)
    return z.sub_(s.log())


# -------------------------------------------------------------------- 2. GEMMs with fp32 results

def _wide(dtype):
    """The dtype of logits and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_dtype(h):
    """Of dh until it is returned: fp32 on a GPU, where a bf16 product may have sums in bf16."""
    return _wide(h.dtype) if h.is_cuda else h.dtype


def _mm(a, b, out):
    """
    out (M, N) = a (M, K) @ b (K, N), summed in fp32 (fp64 for fp64). Writing to memory used before
    saves page faults: on a CPU those of a fresh tensor of 150 MB cost as much as its GEMM.
    """
    if a.dtype in (out.dtype, torch.float32):
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)

    # A CPU has no out_dtype: it sums in fp32 and rounds to bf16. A second GEMM subtracts what the
    # first has given before it rounds, so together they have 16 bits, in less time than in fp32.
    for i in range(0, b.shape[1], TILE):
        words = slice(i, i + TILE)
        high = torch.mm(a, b[:, words])
        torch.add(high.float(), high.addmm_(a, b[:, words], beta=-1), out=out[:, words])
    return out


def _add_mm_(out, a, b, first):
    """
    out (M, N) += a (M, K) @ b (K, N), summed in fp32; a CPU rounds the product of bf16 before it is
    added. The `first` product is not added: it replaces what was in out.
    """
    beta = 0 if first else 1
    if a.dtype == out.dtype:
        return out.addmm_(a, b, beta=beta)
    if a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    product = torch.mm(a, b)
    return out.copy_(product) if first else out.add_(product)


def _chunks(N, V, device):
    """
    Slices of the tokens whose logits are in memory together. Each chunk reads W and updates dW
    once, so there are as few as memory allows, and of equal size.
    """
    # A word of a token takes two logits in fp32, and dZ in bf16: on a CPU that lies in a logit's
    # memory.
    limit = CHUNK_BYTES[device.type == "cuda"] // (10 * V)
    limit = max(128, min(4096, limit))
    size = -(-N // -(-N // limit)) if N else 1               # -(-a // b) rounds a / b up
    return [slice(i, min(i + size, N)) for i in range(0, N, size)]


def _buffer(chunks, V, like, dtype):
    """Memory for the logits of one chunk; the next chunk uses it again."""
    rows = chunks[0].stop if chunks else 0               # no other is larger
    return like.new_empty(rows, V, dtype=dtype)


# ------------------------------------------------------------------------ 3. the autograd function

class _LinearKL(torch.autograd.Function):
    """The forward computes loss and gradients; the backward hands them out, times grad_loss."""

    @staticmethod
    def forward(ctx, h_q, W_q, h_p, W_p, weight, lam, T, grad_enabled):
        N, V = len(h_q), min(len(W_q), len(W_p))
        wide = _wide(h_q.dtype)
        want_dh, want_dW = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        head_q = W_q[:V].to(h_q.dtype)
        head_p = W_p[:V].to(h_p.dtype)
        weight = weight.to(wide).contiguous()
        # 0 x NaN would be NaN: in dW, which has rows of h_q times their gradients; and oneDNN reads
        # beyond a row, into the next one, which it multiplies by 0.
        h_q, h_p = (h.masked_fill((weight == 0)[:, None], 0) for h in (h_q, h_p))

        stats = h_q.new_empty(4, N, dtype=wide)          # forward KL, reverse KL, H(q), H(p)
        dh = torch.empty_like(h_q, dtype=_sum_dtype(h_q)) if want_dh else None
        dW = torch.empty_like(W_q, dtype=wide) if want_dW else None
        if want_dW:
            # Words past the smaller vocabulary have no gradient. The rest is overwritten by the
            # first chunk, unless there is no token and so no chunk.
            dW[V if N else 0:] = 0

        chunks = _chunks(N, V, h_q.device)
        room_q, room_p = (_buffer(chunks, V, h, wide) for h in (h_q, h_p))
        for rows in chunks:
            C = rows.stop - rows.start
            z_q = _mm(h_q[rows], head_q.T, room_q[:C])   # (C, V)
            z_p = _mm(h_p[rows], head_p.T, room_p[:C])
            dz = _kl_rows(
                z_q, z_p, weight[rows], lam, T, stats[:, rows], want_dh or want_dW, h_q.dtype)
            if want_dh:
                _mm(dz, head_q, dh[rows])
            if want_dW:
                _add_mm_(dW[:V], dz.T, h_q[rows], first=rows.start == 0)

        ctx.save_for_backward(dh, dW)
        ctx.dtypes = h_q.dtype, W_q.dtype
        forward, reverse, H_q, H_p = stats
        losses = weight * (lam * reverse + (1 - lam) * forward)
        losses = losses.masked_fill(weight == 0, 0)      # 0 x NaN would be NaN
        ctx.mark_non_differentiable(forward, reverse, H_q, H_p)
        return losses.sum(), forward, reverse, H_q, H_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        # dW may be 2.5 GB, so it is scaled in place; a second backward then raises an error. On a
        # GPU the comparison with 1 would wait for the device.
        grads = [None] * 8                               # one for each argument of forward
        scaling = grad_loss.is_cuda or grad_loss != 1
        for i, grad in enumerate(ctx.saved_tensors):
            if grad is not None:
                if scaling:
                    grad.mul_(grad_loss)
                grads[i] = grad.to(ctx.dtypes[i])
        return tuple(grads)


# -------------------------------------------------------------------------- 4. the public function

def linear_kl(h_q, W_q, h_p, W_p, weight, reverse_weight, temperature=1.0):
    """
    loss = sum_n weight[n] (lam KL(q||p) + (1 - lam) KL(p||q)),  lam = reverse_weight    (Eq. 4)

    h_q (N, H), W_q (V, H)      hidden states and LM head of the student, which get gradients
    h_p (N, H_t), W_p (V_t, H_t)    those of the teacher, which get none
    weight (N,)                 mask and normalisation; a weight of 0 makes a gradient of exactly 0

    If the vocabularies differ in size, the words of the smaller one are used and renormalised.
    The GEMMs take the dtype of h_q and h_p; logits, sums and dW are fp32 (fp64 for fp64 inputs). On
    a CPU logits of bf16 have 16 bits, and dh and each chunk's part of dW are rounded to bf16 once.

    Returns (loss, forward KL, reverse KL, H(q), H(p)): the loss is a scalar, the others are (N,),
    in nats, at this temperature and without gradient. Under `torch.no_grad()` no gradient is
    computed. Nothing here waits for the GPU. After one forward there can be one backward.

    Raises ValueError where shapes, dtypes or devices do not fit. float16 does not: dZ would
    underflow in it.
    """
    _check("student", h_q, W_q)
    _check("teacher", h_p, W_p)
    same_device = h_q.device == h_p.device == weight.device
    if len(h_q) != len(h_p) or weight.shape != h_q.shape[:1] or not same_device:
        raise ValueError(
            f"one row a token, on one device: h_q {_show(h_q)}, h_p {_show(h_p)}, "
            f"weight {_show(weight)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    grad_enabled = torch.is_grad_enabled()               # inside the function it never is
    with torch.cuda.device_of(h_q):                      # where Triton launches
        return _LinearKL.apply(
            h_q, W_q, h_p, W_p, weight, float(reverse_weight), temperature, grad_enabled)


def _check(name, h, W):
    shapes_fit = h.ndim == W.ndim == 2 and h.shape[1] == W.shape[1]
    dtypes_fit = {h.dtype, W.dtype} <= {torch.float32, torch.bfloat16, torch.float64}
    if not (shapes_fit and dtypes_fit and h.device == W.device):
        raise ValueError(
            f"{name}: hidden states {_show(h)} do not fit the LM head {_show(W)}; they should be "
            f"(N, H) and (V, H) on one device, in float32, bfloat16 or float64")


def _show(tensor):
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
