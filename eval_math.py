"""
Accuracy, length and entropy of a checkpoint on maths problems.

    python eval_math.py configs/toy_eval.py --model=out/toy_opd/last      # CPU, seconds
    torchrun --nproc_per_node=8 eval_math.py configs/eval_math.py --model=out/opd_8b/last
    python eval_math.py --compare out/eval_a out/eval_b       # paired differences, with intervals
    python eval_math.py --table out/eval_a out/eval_b         # their numbers as a Markdown table
    python plot.py --eval out/eval_a out/eval_b               # their numbers as bars, results.png

Each problem gets n responses, of which c are right:
    Avg@n         mean over problems of c / n, with a 95 % bootstrap interval over problems
    Pass@k        mean over problems of 1 - C(n - c, k) / C(n, k): unbiased for every k <= n
    length        tokens of a response, mean and median
    truncated     share of responses without a stop token
    entropy       of the full softmax at temperature 1, in nats: mean over the tokens of the model's
                  own responses, and over those before and after the first \\boxed
    ungraded      comparisons that hung or crashed; they count in neither Avg nor Pass

out_dir gets samples.jsonl (every response, its extracted answer, verdict and reason) and
results.json (numbers, settings, versions, seed). An evaluation that was killed goes on with
the same command, without --overwrite.
"""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data.problems import load_problems, usable_prompts
from engine import (
    Sampling,
    choose_engine,
    fingerprint,
    make_engine,
    model_revision,
    tokenizer_revision,
)
from grade import respond, summarise, verdicts_by_problem
from utils import (
    RANK,
    WORLD,
    UserError,
    barrier,
    check_ranges,
    init_processes,
    lm_head,
    load_config,
    load_model,
    load_tokenizer,
    print_config,
    read_lines,
    run,
    stop_ids,
    write_lines,
)

# benchmark: (file made by data/benchmarks.py, problems in it, responses to each in the paper)
BENCHMARKS = {
    "gsm8k": ("data/gsm8k.jsonl", 1319, 3),
    "math500": ("data/math500.jsonl", 500, 3),
    "math": ("data/math.jsonl", 5000, 3),
    "amc23": ("data/amc23.jsonl", 40, 5),
    "aime24": ("data/aime24.jsonl", 30, 5),
}


@dataclasses.dataclass
class Config:
    model: str = "out/toy_opd/last"                     # folder or name on the model hub
    # names of the table above or JSONL files, with commas between
    benchmarks: str = "gsm8k,math500,math,amc23,aime24"
    num_problems: int | None = None                     # the first so many of each; None: all
    samples_per_problem: int | None = None              # None: the paper's number, 3 for a file
    out_dir: str = "out/eval"
    overwrite: bool = False                             # delete the evaluation in out_dir first
    seed: int = 42

    max_new_tokens: int = 8192                          # stop token included
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0                                      # 0: all tokens
    extra_stop_ids: tuple[int, ...] = ()                # tokens that end a response, too
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    engine: Literal["auto", "hf", "vllm"] = "auto"      # hf: transformers; auto: vllm on a GPU
    rollout_rows: int = 32                              # responses that hf decodes together
    kv_cache_gb: float = 16.0                           # of vllm
    rollout_timeout: float = 600.0                      # seconds without a response: it hangs
    max_logprob_gap: float | None = None                # nats; None: 0.05 in bf16, 1e-4 in fp32
    max_tokens_per_microbatch: int = 16384              # padded tokens of a forward (entropies)
    window: int = 256                                   # responses that are written together


# No response depends on these: an evaluation may go on with others.
MAY_CHANGE = ("model", "engine", "rollout_rows", "kv_cache_gb", "rollout_timeout",
              "max_logprob_gap", "max_tokens_per_microbatch", "window", "out_dir",
              "overwrite")


def load_benchmarks(cfg):
    """{name: (problems, responses to each)}; every problem has an answer."""
    benchmarks = {}
    for given in filter(None, cfg.benchmarks.split(",")):
        path, count, samples = BENCHMARKS.get(given, (given, None, 3))
        make = f"make it with `python data/benchmarks.py {given}`"
        if not Path(path).is_file():
            remedy = make if count else f"there are {', '.join(BENCHMARKS)}, or give a JSONL file"
            raise UserError(f"no benchmark {path}: {remedy}")
        problems = load_problems(path, answered=True)
        if count and len(problems) != count:
            raise UserError(f"{path} has {len(problems)} problems, {given} {count}; {make}")
        name = Path(path).stem
        if name in benchmarks:
            raise UserError(f"benchmarks={cfg.benchmarks!r}: two of the name {name}; "
                            "rename one file")
        benchmarks[name] = problems[:cfg.num_problems], cfg.samples_per_problem or samples
    if not benchmarks:
        raise UserError(f"benchmarks={cfg.benchmarks!r}: name at least one of "
                        f"{', '.join(BENCHMARKS)}, or a JSONL file")
    return benchmarks


def open_model(cfg, benchmarks, device):
    """Tokenizer, engine and sampling of cfg.model, and {benchmark: {index: prompt's token ids}}."""
    dtype = getattr(torch, cfg.dtype)
    tokenizer = load_tokenizer(cfg.model)
    model = load_model(cfg.model, dtype, device).requires_grad_(False)
    ends = {*stop_ids(model.generation_config, tokenizer), *cfg.extra_stop_ids}
    sampling = Sampling(
        cfg.max_new_tokens, tuple(sorted(ends)), cfg.temperature, cfg.top_p, cfg.top_k)

    vocab_size = len(lm_head(model))
    positions = model.config.max_position_embeddings
    prompts = {}
    longest = 0
    for name, (problems, _) in benchmarks.items():
        prompts[name] = usable_prompts(
            name, problems, tokenizer, cfg.max_new_tokens, positions, vocab_size)
        longest = max(longest, *map(len, prompts[name].values()))
    kind = choose_engine(cfg.engine, device)
    engine = make_engine(
        kind, cfg, model, dtype, vocab_size, longest + cfg.max_new_tokens, sleeps=False)
    return tokenizer, engine, sampling, prompts


# --------------------------------------------------------------------------------- out_dir's files

def read_report(folder):
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise UserError(f"no {path}: give folders that eval_math.py has written to the end")
    return json.loads(path.read_text())


def settings_of(cfg, benchmarks, tokenizer, sampling):
    """All that the responses depend on, as JSON gives it back."""
    settings = dataclasses.asdict(cfg)
    for key in MAY_CHANGE:
        del settings[key]
    settings |= {
        "revision": model_revision(cfg.model),
        "stop_ids": sampling.stop_ids,
        "tokenizer": tokenizer_revision(tokenizer),
        "problems": {name: fingerprint(dict(enumerate(problems)))
                     for name, (problems, _) in benchmarks.items()},
    }
    return json.loads(json.dumps(settings))


def check_folder(cfg, settings):
    """Raise UserError unless out_dir is new, or holds an evaluation with the same settings."""
    folder = Path(cfg.out_dir)
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / "settings.json").is_file():
        raise UserError(f"out_dir={cfg.out_dir!r} exists and is no evaluation; "
                        "choose another name")
    old = json.loads((folder / "settings.json").read_text())
    for key, value in settings.items():
        if not cfg.overwrite and old.get(key) != value:
            raise UserError(f"{folder} was evaluated with {key}={old.get(key)!r}, not {value!r}; "
                            "choose another out_dir, or --overwrite")


def merge_samples(folder, names):
    """
    Collect the lines of all samples*.jsonl in samples.jsonl, benchmarks in the order of `names`,
    and remove the other files. Returns the records. A last line that a kill cut short is dropped.
    """
    paths = list(folder.glob("samples*.jsonl"))
    records = {}
    for path in paths:
        for record in read_lines(path):
            key = names.index(record["benchmark"]), record["index"], record["sample"]
            records[key] = record
    merged = [records[key] for key in sorted(records)]
    write_lines(folder / "samples.jsonl", merged, mode="w")
    for path in paths:
        if path.name != "samples.jsonl":
            path.unlink()
    return merged


# ----------------------------------------------------------------------------------------- numbers

def interval(values, seed, resamples=10000):
    """95 % interval of the mean over problems, by the percentile bootstrap; None of no values."""
    if not values:
        return None
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def accuracy_cells(row):
    """Avg@k, its interval and Pass@k as texts, "-" where there is none."""
    avg, passed = ("-" if row[key] is None else f"{row[key]:.3f}"
                   for key in ("avg_at_k", "pass_at_k"))
    low_high = row["avg_interval"]
    return avg, "{:.3f} - {:.3f}".format(*low_high) if low_high else "-", passed


def print_table(results):
    print(f"{'':<11}{'k':>3} {'Avg@k':>6} {'95 % interval':<15}{'Pass@k':>7}{'length':>7}"
          f"{'median':>7}{'entropy':>8}{'cut':>7}{'ungr.':>6}")
    for name, row in results.items():
        avg, low_high, passed = accuracy_cells(row)
        print(f"{name[:10]:<11}{row['k']:>3} {avg:>6} {low_high:<15}{passed:>7}"
              f"{row['length']:>7.0f}{row['median_length']:>7.0f}{row['entropy']:>8.3f}"
              f"{row['truncated']:>7.1%}{row['ungraded']:>6}")


def print_markdown(folders):
    """A row for each folder and benchmark, and what the numbers were measured with."""
    print("| | problems | k | Avg@k (95 %) | Pass@k | length | entropy | truncated |\n"
          "|---|---|---|---|---|---|---|---|")
    notes = {}                                          # {text: folders}
    for folder in folders:
        report = read_report(folder)
        label = Path(folder).name
        for name, row in report["results"].items():
            avg, low_high, passed = accuracy_cells(row)
            print(f"| `{label}` on {name} | {row['problems']} | {row['k']} | {avg} ({low_high}) "
                  f"| {passed} | {row['length']:.1f} | {row['entropy']:.3f} "
                  f"| {row['truncated']:.1%} |")
        note = ("T = {temperature}, top-p {top_p}, top-k {top_k}, at most {max_new_tokens} tokens, "
                "seed {seed}, {dtype} on ").format(**report["settings"])
        note += f"{report['device']}, torch {report['versions']['torch']}"
        notes.setdefault(note, []).append(label)
    for note, labels in notes.items():
        print(f"\n{note}" + (f" ({', '.join(labels)})" if len(notes) > 1 else "") + ".")


def by_problem(folder):
    """
    {(benchmark, the problem's text): (share of right responses, mean length)}, of the problems with
    graded responses.
    """
    verdicts = {}
    lengths = {}
    for record in read_lines(Path(folder) / "samples.jsonl"):
        key = record["benchmark"], record["problem"]
        lengths.setdefault(key, []).append(record["length"])
        if record["correct"] is not None:
            verdicts.setdefault(key, []).append(record["correct"])
    return {key: (np.mean(verdicts[key]), np.mean(lengths[key])) for key in verdicts}


def compare(first, second):
    """Print paired differences, second - first, over the problems both have, with intervals."""
    there, here = read_report(first), read_report(second)
    for key, value in there["settings"].items():
        other = here["settings"].get(key)
        if key not in ("revision", "problems", "benchmarks") and other != value:
            print(f"warning: {key} is {value!r} there and {other!r} here")

    before, after = by_problem(first), by_problem(second)
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise UserError(f"{first} and {second} have no problem in common: "
                        f"{', '.join(there['results'])} and {', '.join(here['results'])}")
    print(f"{second} - {first}\n"
          f"{'':<11}{'problems':>9}{'Avg':>8} {'95 % interval':<18}"
          f"{'length':>8} {'95 % interval':<16}")
    for name in there["results"]:
        differences = [np.subtract(after[key], before[key]) for key in shared if key[0] == name]
        if differences:
            shares, lengths = zip(*differences)
            share = difference(shares, "+.3f")
            length = difference(lengths, "+.0f")
            print(f"{name[:10]:<11}{len(shares):>9}{share:<27}{length:<25}")


def difference(values, form):
    """The mean of differences and its interval, as text."""
    low, high = interval(values, 0)
    mean = format(np.mean(values), form)
    return f"{mean:>8} {low:{form}} .. {high:{form}}"


# -------------------------------------------------------------------------------------------- main

def main(argv):
    if argv[:1] == ["--compare"]:
        if len(argv) != 3:
            raise UserError("--compare takes two folders: "
                            "python eval_math.py --compare out/eval_a out/eval_b")
        return compare(*argv[1:])
    if argv[:1] == ["--table"]:
        if len(argv) < 2:
            raise UserError("--table takes folders: "
                            "python eval_math.py --table out/eval_a out/eval_b")
        return print_markdown(argv[1:])

    # 1. the problems, the model, and where its responses end
    cfg, origin = load_config(Config, argv)
    check_ranges(cfg)
    device = init_processes(timeout_seconds=7 * 86400)    # they meet at the end only
    benchmarks = load_benchmarks(cfg)
    tokenizer, engine, sampling, prompts = open_model(cfg, benchmarks, device)

    # 2. what is done already, with the same settings
    out_dir = Path(cfg.out_dir)
    settings = settings_of(cfg, benchmarks, tokenizer, sampling)
    check_folder(cfg, settings)
    barrier()                                           # every rank has looked
    if RANK == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        if cfg.overwrite:
            for path in [*out_dir.glob("results.*"), *out_dir.glob("samples*.jsonl")]:
                path.unlink()
        write_lines(out_dir / "settings.json", [settings], mode="w")
        merge_samples(out_dir, list(benchmarks))
        print_config(cfg, origin)
    barrier()
    done = {(record["benchmark"], record["index"], record["sample"])
            for record in read_lines(out_dir / "samples.jsonl")}

    # 3. sample, grade and measure what is missing, a window at a time
    engine.generate([], sampling, [])                   # ranks load vLLM together, also idle ones
    for name, (problems, samples) in benchmarks.items():
        missing = [(index, sample) for index in prompts[name] for sample in range(samples)
                   if (name, index, sample) not in done]
        pairs = missing[RANK::WORLD]
        firsts = range(0, len(pairs), cfg.window)
        for first in tqdm(firsts, desc=name, unit="window", disable=RANK > 0 or not pairs):
            records = respond(engine, tokenizer, problems, prompts[name],
                              pairs[first:first + cfg.window], sampling, cfg.seed)
            write_lines(out_dir / f"samples_{RANK:03d}.jsonl",
                        [{"benchmark": name, **record} for record in records])
    barrier()
    if RANK > 0:
        return

    # 4. one file in order, the numbers, the table
    records = merge_samples(out_dir, list(benchmarks))
    wanted = sum(len(prompts[name]) * samples for name, (_, samples) in benchmarks.items())
    if len(records) < wanted:
        raise UserError(f"{wanted - len(records)} of {wanted} responses are not in {out_dir}: do "
                        "all machines write there? The same command samples what is missing")
    results = {}
    for name, (problems, _) in benchmarks.items():
        rows = [record for record in records if record["benchmark"] == name]
        shares = [np.mean(verdicts) for verdicts in verdicts_by_problem(rows).values()]
        results[name] = summarise(rows) | {
            "avg_interval": interval(shares, cfg.seed),
            "skipped": len(problems) - len(prompts[name]),
        }
    versions = {package: version(package)
                for package in ("torch", "transformers", "math-verify", "numpy")}
    report = {
        "results": results,
        "settings": settings,
        "config": dataclasses.asdict(cfg),
        "versions": {"python": platform.python_version(), **versions},
        "device": device.type,
        "responses_of_this_run": len(records) - len(done),
    }
    write_lines(out_dir / "results.json", [report], mode="w")
    print_table(results)
    print(f"{len(records)} responses at T = {cfg.temperature}, top-p {cfg.top_p}, top-k "
          f"{cfg.top_k}, at most {cfg.max_new_tokens} tokens, seed {cfg.seed}; in {out_dir}\n"
          f"a picture of it: python plot.py --eval {out_dir}")


if __name__ == "__main__":
    run(main, __doc__, Config)
