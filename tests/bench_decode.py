"""
Decoding with transformers beside `model.generate`, and where a token's time goes.

    python tests/bench_decode.py          # the toy student; after make real-pruned SmolLM2, too

Our decode loop, as it is and with `compile = True`, and `model.generate` sample responses to the
same prompts at T = 1, in alternating rounds; medians. The round in which programs are built has its
own line. Then once more, not compiled, with a clock in each part of a forward, beside two floors:
the matrix products at the speed of a large one, and reading the weights once a token. Clocks cost a
little themselves, so parts add up to more than a plain round takes.
"""

import contextlib
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations import sdpa_attention

sys.path.insert(0, str(Path(__file__).parent.parent))
import engine  # noqa: E402  (needs the repository on the path)
import sample  # noqa: E402
from data.problems import encode_prompt, load_problems, load_tokenizer  # noqa: E402
from kernels import cpu  # noqa: E402
from models import load_model  # noqa: E402

# (folder, problems, dtype, rows, new tokens, stop ids or None for the model's own, rounds)
CASES = (
    ("data/toy/student", "data/toy/train.jsonl", "float32", 64, 96, (257, 260), 21),
    ("data/smollm/pruned", "data/smollm/train.jsonl", "float32", 16, 64, None, 5),
    ("data/smollm/pruned", "data/smollm/train.jsonl", "bfloat16", 16, 64, None, 5))


@contextlib.contextmanager
def plain_attention():
    """Inside, attention is that of transformers, as others have it, not that of kernels/cpu.py."""
    faster = cpu.attention, sdpa_attention.use_gqa_in_sdpa
    AttentionInterface.register("sdpa", cpu.plain)
    sdpa_attention.use_gqa_in_sdpa = cpu.plain_use_gqa
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", faster[0])
        sdpa_attention.use_gqa_in_sdpa = faster[1]


def machine(dtype):
    """FLOP/s of a large matrix product, and bytes/s of reading 0.5 GB."""
    a, b = torch.randn(4096, 1024).to(dtype), torch.randn(1024, 4096).to(dtype)
    numbers = torch.randn(1 << 28 if dtype == torch.bfloat16 else 1 << 27).to(dtype)
    product, reading = [], []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        product.append(time.perf_counter() - start)
        start = time.perf_counter()
        numbers.sum()
        reading.append(time.perf_counter() - start)
    flops = 2 * 4096 * 1024 * 4096 / statistics.median(product)
    return flops, numbers.nbytes / statistics.median(reading)


@contextlib.contextmanager
def clocks(model):
    """Inside, {part: [calls, seconds]} is filled by what the parts of a forward take."""
    code = sys.modules[type(model).__module__]
    norm, = {type(part) for part in model.modules() if type(part).__name__.endswith("RMSNorm")}
    parts = [
        ("forward", engine.HFEngine, "_advance"),
        ("matrices", torch.nn.Linear, "forward"),
        ("norms", norm, "forward"),
        ("attention", torch.nn.functional, "scaled_dot_product_attention"),
        ("rotary", code, "apply_rotary_pos_emb"),
        ("KV cache", DynamicLayer, "update"),
        ("rows that leave", DynamicLayer, "batch_select_indices"),
        ("sampling", engine, "sample_tokens")]
    found, plain = {}, [getattr(owner, name) for _, owner, name in parts]

    def clocked(part, function):
        total = found.setdefault(part, [0, 0.0])

        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            total[0] += 1
            total[1] += time.perf_counter() - start
            return result
        return call

    for (part, owner, name), function in zip(parts, plain):
        setattr(owner, name, clocked(part, function))
    try:
        yield found
    finally:
        for (_, owner, name), function in zip(parts, plain):
            setattr(owner, name, function)


def programs(folder, path, dtype, rows, new_tokens, stops):
    """The model, and {name: a function of a seed that writes the responses}."""
    model, tokenizer = load_model(folder, getattr(torch, dtype)), load_tokenizer(folder)
    prompts = [
        encode_prompt(tokenizer, problem["problem"]) for problem in load_problems(path)[:rows]]
    ends = stops or (model.generation_config.eos_token_id,)
    ours, programmed = (
        engine.make_engine("hf", sample.Config(compile=on), model, model.dtype, None, 4096)
        for on in (False, True))
    sampling = engine.Sampling(new_tokens, ends)
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")

    def generate(seed):
        torch.manual_seed(seed)
        with torch.inference_mode(), plain_attention():
            model.generate(
                **padded, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                max_new_tokens=new_tokens, eos_token_id=list(ends), pad_token_id=ends[0])

    def decode(writer, seed):
        writer.generate(prompts, sampling, [seed * 1000 + i for i in range(rows)])

    return model, {
        "ours": functools.partial(decode, ours), "model.generate": generate,
        "compiled": functools.partial(decode, programmed)}


def decoding(*case, rounds):
    """
    (model, median seconds of each program, those of the compiled one's first round, our seconds by
    part, forwards, one for each token) of a case.
    """
    model, calls = programs(*case)
    times = {name: [] for name in calls}
    for seed in range(rounds + 1):                       # in turn: noise of the machine hits both
        for name, call in calls.items():
            start = time.perf_counter()
            call(seed)
            times[name].append(time.perf_counter() - start)
    with clocks(model) as parts:
        start = time.perf_counter()
        calls["ours"](1)
        total = time.perf_counter() - start
    forwards, forward = parts.pop("forward")
    seconds = {part: spent for part, (_, spent) in parts.items()}
    outside = seconds["sampling"] + seconds["rows that leave"]
    seconds["rest of the forward"] = forward - sum(seconds.values()) + outside
    seconds["LM head, lists"] = total - forward - outside
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    return model, medians, times["compiled"][0], seconds, forwards


def main():
    torch.set_num_threads(2)
    for *case, rounds in CASES:
        folder, _, dtype, rows, new_tokens, _ = case
        if not Path(folder).exists():
            print(f"{folder}: not there (make real-pruned)")
            continue
        model, seconds, building, parts, tokens = decoding(*case, rounds=rounds)
        theirs = seconds["model.generate"]
        print(f"{folder}, {dtype}, {rows} rows x {new_tokens} tokens")
        for name, spent in seconds.items():
            print(f"  {name:<20}{spent:>8.3f} s {theirs / spent:>6.2f}x")
        print(f"  {'building it':<20}{building:>8.1f} s")
        total = sum(parts.values())
        for part, spent in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {part:<20}{1e3 * spent / tokens:>8.2f} ms a token {spent / total:>6.0%}")
        flops, speed = machine(model.dtype)
        weights = sum(weight.numel() for weight in model.parameters())
        print(f"  {'floors':<20}{1e3 * 2 * rows * weights / flops:>8.2f} ms of products, "
              f"{1e3 * weights * model.dtype.itemsize / speed:.2f} ms of reading the weights")


if __name__ == "__main__":
    main()
