"""
Full-vocabulary KL from hidden states, without ever holding N x V logits.

N response tokens, V vocabulary, H / H_t hidden sizes of student q and teacher p; z = logits, d = log q - log p.

    forward KL(p||q) = sum_v (q - p - p d)          every term >= 0; for small |d| written as p d^2 (1/2 + d/6 + ...), since
    reverse KL(q||p) = sum_v (p - q + q d)          q - p - p d would be a difference of near-equal numbers there
    d loss / d z_q   = w/T [ (1 - lam) (q - p) + lam q (d - KL(q||p)) ]                                     (Proposition 1)

The gradient needs nothing from above the loss but a scalar, so it is computed in the forward, chunk by chunk over tokens: each
projection is done once (6 N H V + 2 N H_t V FLOPs) and only (C, V) logits exist at a time.
"""

import torch

CPU_BLOCK = 600_000                                      # elements of a block of rows that stay in cache; measured
GPU_BLOCK = 1 << 26                                      # the row maths holds some ten such blocks, 256 MB each
CHUNK_BYTES = 6 << 30                                    # GPU memory for one chunk's logits and their gradient


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
    and normalisation. Different vocabulary sizes are sliced to the smaller and renormalised. Logits and sums are fp32; GEMMs
    take the dtype of h_q.

    Returns (loss, forward KL, reverse KL, H(q), H(p)): a scalar and four (N,) tensors without gradient, in fp32 at this
    temperature. Under `torch.no_grad()` no gradient is computed. Raises ValueError on shapes that do not fit.
    """
    for name, h, W in (("student", h_q, W_q), ("teacher", h_p, W_p)):
        _check(name, h, W)
    if len(h_q) != len(h_p) or weight.shape != h_q.shape[:1]:
        raise ValueError(f"one row a token: h_q {tuple(h_q.shape)}, h_p {tuple(h_p.shape)}, weight {tuple(weight.shape)}")
    return _LinearKL.apply(h_q, W_q, h_p, W_p, weight, reverse_weight, temperature, torch.is_grad_enabled())


def linear_logp(h, W, token_ids, temperature=1.0):
    """
    Log-probabilities of chosen tokens and the entropy of the full softmax, from hidden states.

    h (N, H), W (V, H), token_ids (N,) in [0, V). Returns (logps (N,), entropy (N,)), fp32, nats; the log-probs are
    differentiable in h and W, the entropy is not. Its upstream gradient arrives per token, so the backward recomputes the
    chunk of logits. Raises ValueError on shapes that do not fit.
    """
    _check("model", h, W)
    if token_ids.shape != h.shape[:1]:
        raise ValueError(f"one id a row: h {tuple(h.shape)}, token_ids {tuple(token_ids.shape)}")
    return _LinearLogp.apply(h, W, token_ids, temperature)


def _check(name, h, W):
    if h.ndim != 2 or W.ndim != 2 or h.shape[1] != W.shape[1]:
        raise ValueError(f"{name}: hidden states {tuple(h.shape)} do not fit the LM head {tuple(W.shape)}; "
                         f"they should be (N, H) and (V, H)")


# --------------------------------------------------------------------------------------------- GEMMs with fp32 results

def _compute_copy(W, dtype):
    """The LM head as the GEMMs read it: in the compute dtype on a GPU, as it is on a CPU (upcast a tile at a time)."""
    return W.to(dtype) if W.is_cuda else W


def _mm(a, b):
    """a (M, K) @ b (K, N), accumulated and returned in fp32."""
    if a.is_cuda and b.dtype != torch.float32:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    if b.dtype == torch.float32:
        return a.float() @ b
    # a CPU has no out_dtype: upcast b (a bf16 LM head or its transpose) by tiles, never whole
    tile, a = 8192, a.float()
    if b.shape[1] > b.shape[0]:
        return torch.cat([a @ b[:, i:i + tile].float() for i in range(0, b.shape[1], tile)], 1)
    out = a.new_zeros(a.shape[0], b.shape[1])
    for i in range(0, b.shape[0], tile):
        out.addmm_(a[:, i:i + tile], b[i:i + tile].float())
    return out


def _add_mm_(out, a, b):
    """out (M, N) fp32 += a (M, K) @ b (K, N)."""
    return out.add_(_mm(a, b)) if b.is_cuda and b.dtype != torch.float32 else out.addmm_(a.float(), b.float())


def _chunks(N, V, device):
    """Slices of tokens whose logits are in memory together: W and dW are read and written once a chunk, so not too small."""
    C = max(128, min(4096, CHUNK_BYTES // (10 * V)) // 128 * 128) if device.type == "cuda" else max(256, (1 << 20) // V)
    return [slice(i, min(i + C, N)) for i in range(0, N, C)]


def _blocks(C, V, device):
    """Slices of a chunk for the row maths: on a CPU small enough to stay in cache between its passes."""
    rows = max(4, (GPU_BLOCK if device.type == "cuda" else CPU_BLOCK) // V)
    return [slice(i, min(i + rows, C)) for i in range(0, C, rows)]


# ----------------------------------------------------------------------------------------------------- row mathematics

def _log_softmax_(z, temperature):
    """In place. z - max and log(sum) are kept apart: one combined logsumexp costs the entropy its precision."""
    if temperature != 1:
        z.div_(temperature)
    z.sub_(z.amax(-1, keepdim=True))
    return z.sub_(z.exp().sum(-1, keepdim=True).log())


def _kl_rows(z_q, z_p, weight, lam, temperature, stats, want_grad):
    """One block of rows: fills stats (4, rows) and overwrites z_q with d loss / d z_q."""
    log_q, log_p = _log_softmax_(z_q, temperature), _log_softmax_(z_p, temperature)
    q, p = log_q.exp(), log_p.exp()
    torch.sum(q * log_q, -1, out=stats[2]).neg_()
    torch.sum(p * log_p, -1, out=stats[3]).neg_()
    d = log_q.sub_(log_p)                                # log q is no longer needed
    difference = q - p
    small, square = d.abs() < 0.1, d * d
    even, odd = square / 24 + 1 / 2, d * (square / 120 + 1 / 6)
    torch.sum(torch.where(small, p * square * (even + odd), difference - p * d), -1, out=stats[0])
    torch.sum(torch.where(small, q * square * (even - odd), q * d - difference), -1, out=stats[1])
    if want_grad:
        grad = d.sub_(stats[1][:, None]).mul_(q).mul_(lam).add_(difference, alpha=1 - lam)
        grad.mul_(weight[:, None] / temperature)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_q, W_q, h_p, W_p, weight, lam, temperature, grad_enabled):
        N, V, device = len(h_q), min(len(W_q), len(W_p)), h_q.device
        want_grad = grad_enabled and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        head_q, head_p = _compute_copy(W_q[:V], h_q.dtype), _compute_copy(W_p[:V], h_p.dtype)
        weight = weight.float()
        stats = torch.empty(4, N, device=device)         # forward KL, reverse KL, H(q), H(p)
        dh = torch.empty_like(h_q) if want_grad else None
        dW = torch.zeros(W_q.shape, device=device) if want_grad else None
        for rows in _chunks(N, V, device):
            z_q, z_p = _mm(h_q[rows], head_q.T), _mm(h_p[rows], head_p.T)                  # (C, V) fp32
            for block in _blocks(len(z_q), V, device):
                _kl_rows(z_q[block], z_p[block], weight[rows][block], lam, temperature, stats[:, rows][:, block], want_grad)
            if want_grad:
                dz = z_q                                 # _kl_rows wrote the gradient over the logits
                dh[rows] = _mm(dz, head_q)
                _add_mm_(dW[:V], dz.T, h_q[rows])
        if want_grad:
            ctx.save_for_backward(dh, dW)
            ctx.dtypes = h_q.dtype, W_q.dtype
        loss = (weight * (lam * stats[1] + (1 - lam) * stats[0])).sum()
        ctx.mark_non_differentiable(*(outputs := tuple(stats)))
        return loss, *outputs

    @staticmethod
    def backward(ctx, grad_loss, *_):
        dh, dW = ctx.saved_tensors
        return (dh * grad_loss).to(ctx.dtypes[0]), (dW * grad_loss).to(ctx.dtypes[1]), *[None] * 6


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, token_ids, temperature):
        head = _compute_copy(W, h.dtype)
        logps, entropy = torch.empty(2, len(h), device=h.device)
        for rows in _chunks(len(h), len(W), h.device):
            z = _mm(h[rows], head.T)                     # (C, V)
            for block in _blocks(len(z), len(W), h.device):
                log_q = _log_softmax_(z[block], temperature)
                entropy[rows][block] = -(log_q.exp() * log_q).sum(-1)
            logps[rows] = z.gather(-1, token_ids[rows, None]).squeeze(-1)
        ctx.save_for_backward(h, W, token_ids)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, _):
        h, W, token_ids = ctx.saved_tensors
        head = _compute_copy(W, h.dtype)
        dh, dW = torch.empty_like(h), torch.zeros(W.shape, device=h.device)
        for rows in _chunks(len(h), len(W), h.device):
            dz = _mm(h[rows], head.T)
            for block in _blocks(len(dz), len(W), h.device):
                _log_softmax_(dz[block], ctx.temperature).exp_().neg_()
            # d log q[y] / d z = onehot(y) - q
            dz.scatter_add_(-1, token_ids[rows, None], torch.ones_like(dz[:, :1]))
            dz.mul_(grad_logps[rows, None] / ctx.temperature)
            dh[rows] = _mm(dz, head)
            _add_mm_(dW, dz.T, h[rows])
        return dh, dW.to(W.dtype), None, None
