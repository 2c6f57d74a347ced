"""
Time, peak extra memory and gradient error of linear_kl beside other people's code, in one run.

    python -m kernels.bench                   # shapes of Qwen3: minutes on a GPU, some ten minutes
                                              # on two CPU cores
    python -m kernels.bench --tokens 1024     # only N = 1024

One measurement is forward + backward to gradients of h_q and W_q. Times are medians of `--repeats`
alternating rounds after one warm-up.

    naive   the reference below by autograd
    compiled    the same under torch.compile
    TRL     ChunkedDivergenceFunction (pip install trl==1.16.0)
    Liger   LigerFusedLinearJSDLoss (pip install liger-kernel)

At lam = 1 all compute the same function, the reverse KL. At lam = 0.5 TRL and Liger compute the JSD
at beta = 0.5, another function.

Memory is the peak above the inputs, dW included. Error is that of dW against fp64 on the same
inputs, first 256 tokens, as a relative Frobenius norm. The floor is the four GEMMs alone, in the
same dtype (6 N H V + 2 N H_t V FLOPs). The row maths move 18 V bytes a token; their speed is given
as a share of the bandwidth of a copy. Writes kernels/results/<device>.json and .png.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from kernels import linear_kl as op
from kernels.linear_kl import _kl_rows

RESULTS = Path(__file__).parent / "results"


def inputs(N, H, H_t, V, dtype, device):
    """Logits with a standard deviation of 3, and a teacher that agrees about half."""
    g = torch.Generator().manual_seed(0)
    h_q = torch.randn(N, H, generator=g)
    h_p = torch.randn(N, H_t, generator=g)
    W_q = 3 * torch.randn(V, H, generator=g) / H ** 0.5
    W_p = 3 * torch.randn(V, H_t, generator=g) / H_t ** 0.5
    shared = min(H, H_t)
    h_p[:, :shared] += h_q[:, :shared]
    W_p[:, :shared] += W_q[:, :shared]
    return [t.to(device, dtype) for t in (h_q, W_q, h_p / 2, W_p / 2)]


# ------------------------------------------------------------------------------------- the methods

def linear_kl_reference(h_q, W_q, h_p, W_p, weight, reverse_weight, temperature=1.0):
    """
    What `linear_kl` takes, returns and computes, from logits (N, V) in memory and by autograd.
    """
    V = min(len(W_q), len(W_p))
    z_q, z_p = h_q @ W_q[:V].T / temperature, h_p @ W_p[:V].T / temperature
    return rows_reference(z_q, z_p, weight, reverse_weight)


def rows_reference(z_q, z_p, weight, reverse_weight):
    """The same from logits (N, V)."""
    log_q = torch.log_softmax(z_q, -1)
    log_p = torch.log_softmax(z_p, -1)
    q = log_q.exp()
    p = log_p.exp()
    d = log_q - log_p
    forward = -(p * d).sum(-1)
    reverse = (q * d).sum(-1)
    loss = (weight * (reverse_weight * reverse + (1 - reverse_weight) * forward)).sum()
    stats = (forward, reverse, -(q * log_q).sum(-1), -(p * log_p).sum(-1))
    return loss, *(s.detach() for s in stats)


def jsd_reference(h_q, W_q, h_p, W_p, weight, beta):
    """
    Generalised JSD as TRL and Liger have it: beta KL(p||m) + (1 - beta) KL(q||m), where
    m = beta p + (1 - beta) q.
    """
    log_q = torch.log_softmax(h_q @ W_q.T, -1)
    log_p = torch.log_softmax(h_p @ W_p.T, -1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    from_p = beta * log_p.exp() * (log_p - log_m)
    from_q = (1 - beta) * log_q.exp() * (log_q - log_m)
    return (weight * (from_p + from_q).sum(-1)).sum(),


def exact_of_others(h_q, W_q, h_p, W_p, weight, lam):
    """What TRL and Liger compute: a KL at the ends, the JSD between them."""
    reference = linear_kl_reference if lam in (0, 1) else jsd_reference
    return reference(h_q, W_q, h_p, W_p, weight, lam)


def methods(device):
    """{name: (function like linear_kl, its exact form)}; what is not installed is left out."""
    found = {
        "ours": (op, linear_kl_reference),
        "naive": (linear_kl_reference, linear_kl_reference),
        "compiled": (torch.compile(linear_kl_reference), linear_kl_reference)}
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl(h_q, W_q, h_p, W_p, weight, lam):
            rows, _ = ChunkedDivergenceFunction.apply(h_q, W_q, None, h_p, W_p, None, lam)
            return (rows * weight).sum(),
        found["TRL"] = (trl, exact_of_others)
    except ImportError:
        pass
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        def liger(h_q, W_q, h_p, W_p, weight, lam):      # its weights are 1 / N, like ours here
            loss = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=float(lam),
                compiled=device.type == "cuda")
            labels = torch.zeros(len(h_q), dtype=torch.long, device=device)
            return loss(h_q, W_q, h_p, W_p, labels),
        found["Liger"] = (liger, exact_of_others)
    except ImportError:
        pass
    return found


def step(function, tensors, lam):
    """Forward and backward; returns (loss, dW)."""
    h_q, W_q, h_p, W_p = tensors
    h_q = h_q.detach().requires_grad_()
    W_q = W_q.detach().requires_grad_()
    weight = torch.full((len(h_q),), 1 / len(h_q), device=h_q.device)
    loss = function(h_q, W_q, h_p, W_p, weight, lam)[0]
    loss.backward()
    return loss.detach(), W_q.grad


# -------------------------------------------------------------------------------- what is measured

def clock(function, device):
    """Seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(function, device):
    """Most memory held during the call beyond what was held before. On a CPU: Linux only."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    Path("/proc/self/clear_refs").write_text("5")        # the high-water mark is set back
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def gradient_error(function, exact, tensors, lam):
    """Of dW, relative to its exact form in fp64."""
    _, dW = step(function, tensors, lam)
    _, true = step(exact, [t.double() for t in tensors], lam)
    return ((dW.double() - true).norm() / true.norm()).item()


def floor_seconds(tensors, device, repeats):
    """The four GEMMs of a chunk of at most 4096 (on a CPU 256) tokens, scaled to N."""
    h_q, W_q, h_p, W_p = tensors
    C = min(len(h_q), 4096 if device.type == "cuda" else 256)
    h_q, h_p = h_q[:C], h_p[:C]
    dz = torch.randn(C, len(W_q), device=device).to(h_q.dtype)
    z, dh, dW = torch.empty_like(dz), torch.empty_like(h_q), torch.empty_like(W_q)

    def gemms():
        torch.mm(h_q, W_q.T, out=z)
        torch.mm(h_p, W_p.T, out=z)
        torch.mm(dz, W_q, out=dh)
        torch.mm(dz.T, h_q, out=dW)

    gemms()
    seconds = statistics.median(clock(gemms, device) for _ in range(max(3, repeats)))
    return seconds * len(tensors[0]) / C


def row_speeds(V, dtype, device):
    """
    GB/s at 18 V bytes a token of the row maths, ours and those of torch.compile on the same logits,
    and of a copy at read + write.
    """
    C = 2048 if device.type == "cuda" else 64
    z_q = torch.randn(C, V, device=device)
    z_p = torch.randn(C, V, device=device)
    stats = torch.empty(4, C, device=device)
    weight = torch.ones(C, device=device)
    source = torch.randn(C * V, device=device)
    target = torch.empty(C * V, device=device)

    def rows():
        _kl_rows(z_q, z_p, weight, 0.5, 1.0, stats, True, dtype)

    compiled = torch.compile(rows_reference)

    def compiled_rows():
        logits = z_q.detach().requires_grad_()
        compiled(logits, z_p, weight, 0.5)[0].backward()
        logits.grad.to(dtype)

    def copy():
        target.copy_(source)

    def median(call):
        return statistics.median([clock(call, device) for _ in range(9)][2:])

    # On a CPU ours overwrites the logits, so it comes last.
    moved = 18 * V * C / 1e9
    compiled_gbs, copy_gbs = moved / median(compiled_rows), 8 * V * C / 1e9 / median(copy)
    return moved / median(rows), compiled_gbs, copy_gbs


def measure(case, repeats, device):
    """
    The rows of the report for a case: a dict for each method that is installed and has enough
    memory. All methods take turns, so that noise of the machine hits all.
    """
    lam, dtype = case["lam"], getattr(torch, case["dtype"])
    tensors = inputs(case["N"], case["H"], case["H_t"], case["V"], dtype, device)
    h_q, W_q, h_p, W_p = tensors
    few = [h_q[:256], W_q, h_p[:256], W_p]
    floor = floor_seconds(tensors, device, repeats)

    def call_of(function):
        return lambda: step(function, tensors, lam)

    calls, times, rows = {}, {}, []
    for method, (function, exact) in methods(device).items():
        row = case | {"method": method, "floor_seconds": floor}
        try:
            row["gradient_error"] = gradient_error(function, exact, few, lam)
            row["peak_extra_bytes"] = peak_bytes(call_of(function), device)
            calls[method] = call_of(function)
            times[method] = []
            rows.append(row)
        except torch.cuda.OutOfMemoryError:
            print(f"{describe(row)} out of memory")
        gc.collect()
    for _ in range(repeats):
        for method, call in calls.items():
            times[method].append(clock(call, device))
    for row in rows:
        row["seconds"] = statistics.median(times[row["method"]])
        row["times_ours"] = row["seconds"] / statistics.median(times["ours"])
    return rows


def describe(row):
    return (f"{row['H']:>5}{row['H_t']:>5}{row['N']:>6}{row['lam']:>5} "
            f"{row['dtype']:<9}{row['method']:<9}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    tokens = [256, 1024, 4096, 16384] if gpu else [256, 1024]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=7 if gpu else 3)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the JSON and PNG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    if gpu:
        name = torch.cuda.get_device_name()
        shapes = [(1024, 1024), (1024, 2560), (1024, 4096), (4096, 4096)]        # H, H_t
        kinds = [(0.5, "bfloat16"), (1.0, "bfloat16")]
    else:
        name = f"{platform.processor() or platform.machine()} CPU, {args.threads} threads"
        shapes = [(1024, 1024)]
        kinds = [(0.5, "float32"), (1.0, "float32"), (0.5, "bfloat16")]
    rows = []
    report = {"device": name, "torch": torch.__version__, "repeats": args.repeats, "rows": rows}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / (name.lower().replace(" ", "-") if gpu else "cpu")

    print(f"{name}, torch {torch.__version__}, V = {args.vocab}")
    print(f"{'H':>5}{'H_t':>5}{'N':>6}{'lam':>5} {'dtype':<9}{'method':<9}{'ms':>9}{'/ ours':>7}"
          f"{'x floor':>8}{'GB':>7}{'error':>9}")
    for H, H_t in shapes:
        torch._dynamo.reset()                # it compiles for each shape, and gives up after 8
        for N in args.tokens:
            for lam, dtype in kinds:
                case = {"H": H, "H_t": H_t, "N": N, "V": args.vocab, "lam": lam, "dtype": dtype}
                for row in measure(case, args.repeats, device):
                    rows.append(row)
                    print(f"{describe(row)}{1e3 * row['seconds']:>9.1f}{row['times_ours']:>7.2f}"
                          f"{row['seconds'] / row['floor_seconds']:>8.2f}"
                          f"{row['peak_extra_bytes'] / 1e9:>7.2f}"
                          f"{row['gradient_error']:>9.1e}", flush=True)
                write(report, stem)          # a long run: what there is is kept

    dtype = torch.bfloat16 if gpu else torch.float32
    row_gbs, compiled_gbs, copy_gbs = row_speeds(args.vocab, dtype, device)
    print(f"row maths {row_gbs:.1f} GB/s, copy {copy_gbs:.1f} GB/s: {row_gbs / copy_gbs:.0%}; "
          f"of torch.compile {compiled_gbs:.1f} GB/s")
    report |= {"row_GB_per_s": row_gbs, "compiled_row_GB_per_s": compiled_gbs,
               "copy_GB_per_s": copy_gbs}
    write(report, stem)
    draw(report, stem.with_suffix(".png"))
    print(f"wrote {stem}.json and .png")


def write(report, stem):
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


def draw(report, path):
    """Time (as a multiple of ours) and memory of each method, case by case."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def case_of(row):
        return row["N"], row["H"], row["H_t"], row["lam"], row["dtype"]

    rows = report["rows"]
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    size = (12, 1.2 + 0.42 * len(cases))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    panels = (
        ("times_ours", 1, "time / time of ours"),
        ("peak_extra_bytes", 1e9, "peak memory above the inputs, GB"))
    height = 0.8 / len(names)
    for axis, (key, unit, label) in zip(axes, panels):
        for i, name in enumerate(names):
            found = {case_of(row): row[key] / unit for row in rows if row["method"] == name}
            values = [found.get(case, 0) for case in cases]
            offset = (i - len(names) / 2 + 0.5) * height
            places = [y + offset for y in range(len(cases))]
            bars = axis.barh(places, values, height, label=name)
            numbers = [f"{v:.2f}" if v else "" for v in values]
            axis.bar_label(bars, numbers, fontsize=6, padding=2)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    labels = [f"N {n}, H {h}, H_t {t}, lam {lam}, {dtype}" for n, h, t, lam, dtype in cases]
    axes[0].set_yticks(range(len(cases)), labels, fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    title = f"linear_kl, forward + backward, V = {rows[0]['V']}: {report['device']}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
