"""
Time, peak extra memory and gradient error of linear_kl beside other people's code, all in one run.

    python -m kernels.bench                   # the shapes of Qwen3: minutes on a GPU, some ten minutes on two CPU cores
    python -m kernels.bench --tokens 1024     # only N = 1024

One measurement is forward + backward to gradients of h_q and W_q; medians of `--repeats` alternating rounds after one warm-up.
  naive   the reference in kernels/linear_kl.py by autograd
  TRL     ChunkedDivergenceFunction (pip install trl==1.16.0)         at lam = 1 the same function, reverse KL; at lam = 0.5
  Liger   LigerFusedLinearJSDLoss (pip install liger-kernel)          they compute the JSD at beta = 0.5, another function
Memory: peak above the inputs, dW included. Error: of dW, relative Frobenius norm against fp64 on the same inputs, first 256
tokens. Floor: the four GEMMs alone, in the same dtype (6 N H V + 2 N H_t V FLOPs). Row maths: 18 V bytes a token, as a share of
the bandwidth of a copy. Writes kernels/results/<device>.json and .png.
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
from kernels.linear_kl import _kl_rows, linear_kl_reference

RESULTS = Path(__file__).parent / "results"


def inputs(N, H, H_t, V, dtype, device):
    """Logits with a standard deviation of 3, and a teacher that agrees with the student about half."""
    g = torch.Generator().manual_seed(0)
    h_q, h_p = torch.randn(N, H, generator=g), torch.randn(N, H_t, generator=g)
    W_q, W_p = 3 * torch.randn(V, H, generator=g) / H ** 0.5, 3 * torch.randn(V, H_t, generator=g) / H_t ** 0.5
    n = min(H, H_t)
    h_p[:, :n] += h_q[:, :n]
    W_p[:, :n] += W_q[:, :n]
    return [t.to(device, dtype) for t in (h_q, W_q, h_p / 2, W_p / 2)]


def jsd_reference(h_q, W_q, h_p, W_p, weight, beta):
    """Generalised JSD as TRL and Liger have it: beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q."""
    log_q, log_p = torch.log_softmax(h_q @ W_q.T, -1), torch.log_softmax(h_p @ W_p.T, -1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    rows = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return (weight * rows.sum(-1)).sum(),


def methods(device):
    """{name: (function like linear_kl, its exact form)}; what is not installed is left out."""
    found = {"ours": (op, linear_kl_reference), "naive": (linear_kl_reference, linear_kl_reference)}

    def exact(h_q, W_q, h_p, W_p, weight, lam):
        return (linear_kl_reference if lam in (0, 1) else jsd_reference)(h_q, W_q, h_p, W_p, weight, lam)
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl(h_q, W_q, h_p, W_p, weight, lam):
            rows, _ = ChunkedDivergenceFunction.apply(h_q, W_q, None, h_p, W_p, None, lam)
            return (rows * weight).sum(),
        found["TRL"] = (trl, exact)
    except ImportError:
        pass
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        def liger(h_q, W_q, h_p, W_p, weight, lam):      # its weight is 1 / N for every token, like ours here
            loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=float(lam),
                                           compiled=device.type == "cuda")
            return loss(h_q, W_q, h_p, W_p, torch.zeros(len(h_q), dtype=torch.long, device=device)),
        found["Liger"] = (liger, exact)
    except ImportError:
        pass
    return found


def step(function, tensors, lam):
    """Forward and backward; returns (loss, dW)."""
    h_q, W_q, h_p, W_p = tensors
    h_q, W_q = h_q.detach().requires_grad_(), W_q.detach().requires_grad_()
    weight = torch.full((len(h_q),), 1 / len(h_q), device=h_q.device)
    loss = function(h_q, W_q, h_p, W_p, weight, lam)[0]
    loss.backward()
    return loss.detach(), W_q.grad


def clock(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(function, device):
    """Most memory held during the call beyond what was held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def status(key):                                     # Linux: the high-water mark can be set back
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def floor_seconds(tensors, device, repeats):
    """The four GEMMs of a chunk of at most 4096 (CPU: 256) tokens, scaled to N."""
    h_q, W_q, h_p, W_p = tensors
    C = min(len(h_q), 4096 if device.type == "cuda" else 256)
    h_q, h_p, dz = h_q[:C], h_p[:C], torch.randn(C, len(W_q), device=device).to(h_q.dtype)
    z, dh, dW = torch.empty_like(dz), torch.empty_like(h_q), torch.empty_like(W_q)

    def gemms():
        torch.mm(h_q, W_q.T, out=z), torch.mm(h_p, W_p.T, out=z), torch.mm(dz, W_q, out=dh), torch.mm(dz.T, h_q, out=dW)
    gemms()
    return statistics.median(clock(gemms, device) for _ in range(max(3, repeats))) * len(tensors[0]) / C


def row_share(V, dtype, device):
    """(GB/s of the row maths counted as 18 V bytes a token, GB/s of a copy counted as read + write)."""
    C = 2048 if device.type == "cuda" else 64
    z_q, z_p, stats = torch.randn(C, V, device=device), torch.randn(C, V, device=device), torch.empty(4, C, device=device)
    source, target, weight = torch.randn(C * V, device=device), torch.empty(C * V, device=device), torch.ones(C, device=device)
    seconds = {name: statistics.median([clock(call, device) for _ in range(9)][2:]) for name, call in {
        "rows": lambda: _kl_rows(z_q, z_p, weight, 0.5, 1.0, stats, True, dtype),
        "copy": lambda: target.copy_(source)}.items()}
    return 18 * V * C / seconds["rows"] / 1e9, 8 * V * C / seconds["copy"] / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384] if gpu else [256, 1024])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=7 if gpu else 3)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the JSON and PNG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU, {args.threads} threads"
    shapes = [(1024, 1024), (1024, 2560), (1024, 4096), (4096, 4096)] if gpu else [(1024, 1024)]
    rows, out = [], Path(args.out)
    report = {"device": name, "torch": torch.__version__, "repeats": args.repeats, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    stem = out / ("cpu" if not gpu else name.lower().replace(" ", "-"))

    print(f"{name}, torch {torch.__version__}, V = {args.vocab}")
    print(f"{'H':>5}{'H_t':>5}{'N':>6}{'lam':>5} {'dtype':<9}{'method':<7}{'ms':>9}{'/ ours':>7}{'x floor':>8}{'GB':>7}"
          f"{'error':>9}")
    for H, H_t in shapes:
        torch._dynamo.reset()                            # Liger compiles for every shape, and gives up after eight
        for N in args.tokens:
            for lam, dtype in [(0.5, torch.bfloat16), (1.0, torch.bfloat16)] if gpu else [
                    (0.5, torch.float32), (1.0, torch.float32), (0.5, torch.bfloat16)]:
                tensors = inputs(N, H, H_t, args.vocab, dtype, device)
                few = [tensors[0][:256], tensors[1], tensors[2][:256], tensors[3]]
                floor = floor_seconds(tensors, device, args.repeats)
                entries = {}
                for method, (function, exact) in methods(device).items():
                    row = {"H": H, "H_t": H_t, "N": N, "V": args.vocab, "lam": lam, "dtype": str(dtype)[6:], "method": method,
                           "floor_seconds": floor}
                    try:
                        _, dW = step(function, few, lam)
                        _, true = step(exact, [t.double() for t in few], lam)
                        row["gradient_error"] = ((dW.double() - true).norm() / true.norm()).item()
                        del dW, true
                        row["peak_extra_bytes"] = peak_bytes(lambda f=function, t=tensors, w=lam: step(f, t, w), device)
                        entries[method] = (function, row, [])
                    except torch.cuda.OutOfMemoryError:
                        print(f"{H:>5}{H_t:>5}{N:>6}{lam:>5} {row['dtype']:<9}{method:<7} out of memory")
                    gc.collect()
                for _ in range(args.repeats):
                    for function, _, times in entries.values():
                        times.append(clock(lambda f=function, t=tensors, w=lam: step(f, t, w), device))
                for method, (_, row, times) in entries.items():
                    row["seconds"] = statistics.median(times)
                    row["times_ours"] = row["seconds"] / statistics.median(entries["ours"][2])
                    rows.append(row)
                    print(f"{H:>5}{H_t:>5}{N:>6}{lam:>5} {row['dtype']:<9}{method:<7}{1e3 * row['seconds']:>9.1f}"
                          f"{row['times_ours']:>7.2f}{row['seconds'] / floor:>8.2f}{row['peak_extra_bytes'] / 1e9:>7.2f}"
                          f"{row['gradient_error']:>9.1e}", flush=True)
                stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")       # a long run: keep what there is
    row_gbs, copy_gbs = row_share(args.vocab, torch.bfloat16 if gpu else torch.float32, device)
    print(f"row maths {row_gbs:.1f} GB/s, copy {copy_gbs:.1f} GB/s: {row_gbs / copy_gbs:.0%}")
    report |= {"row_GB_per_s": row_gbs, "copy_GB_per_s": copy_gbs}
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, stem.with_suffix(".png"))
    print(f"wrote {stem}.json and .png")


def draw(report, path):
    """Seconds and memory of each method by case, as multiples of ours where that says more."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    cases = list(dict.fromkeys((r["H"], r["H_t"], r["N"], r["lam"], r["dtype"]) for r in report["rows"]))
    names = list(dict.fromkeys(r["method"] for r in report["rows"]))
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.2 + 0.42 * len(cases)), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "peak_extra_bytes"),
                                ("time / time of ours", "peak memory above the inputs, GB")):
        for i, name in enumerate(names):
            found = {(r["H"], r["H_t"], r["N"], r["lam"], r["dtype"]): r for r in report["rows"] if r["method"] == name}
            values = [(found[c]["times_ours"] if key == "seconds" else found[c][key] / 1e9) if c in found else 0 for c in cases]
            bars = axis.barh([y + 0.8 * (i - len(names) / 2 + 0.5) / len(names) for y in range(len(cases))], values,
                             0.8 / len(names), label=name)
            axis.bar_label(bars, [f"{v:.2f}" if v else "" for v in values], fontsize=6, padding=2)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(cases)), [f"N {n}, H {h}, H_t {t}, lam {lam}, {d}" for h, t, n, lam, d in cases], fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.suptitle(f"linear_kl, forward + backward, V = {report['rows'][0]['V']}: {report['device']}", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
