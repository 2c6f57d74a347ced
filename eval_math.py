"""
Accuracy, length and entropy of a checkpoint on maths problems.

    python eval_math.py configs/toy_eval.py --model=out/toy_opd/last            # CPU, seconds
    torchrun --nproc_per_node=8 eval_math.py configs/eval_math.py --model=out/opd_8b/last
    python eval_math.py --compare out/eval_a out/eval_b                         # paired differences of two evaluations
    python eval_math.py --table out/eval_a out/eval_b                           # their numbers as a Markdown table

n responses to each problem; with c of them right:
    Avg@n            mean over problems of c / n, with a 95 % bootstrap interval over problems
    Pass@k           mean over problems of 1 - C(n - c, k) / C(n, k): unbiased for every k <= n
    length           mean and median tokens of a response; truncated: share without a stop id
    entropy          of the full softmax at T = 1, mean over the tokens of the model's own responses, in nats; before and after
                     the first \\boxed as well, as is the number of tokens that follow it
    repetition       1 - distinct 8-grams / 8-grams of tokens, mean over responses
    ungraded         comparisons that hung or crashed: left out of Avg and Pass, never counted as wrong
Written to out_dir: samples.jsonl (every response, its extracted answer, verdict and reason), results.json (numbers, settings,
versions, seeds, time) and results.png. A run that was killed goes on with the same command, without --overwrite.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import utils
from engine import Sampling, choose_engine, make_engine
from grade import respond, summarise
from utils import UserError

# benchmark: (file made by data/benchmarks.py, problems in it, responses to each in the paper)
BENCHMARKS = {
    "gsm8k": ("data/gsm8k.jsonl", 1319, 3), "math500": ("data/math500.jsonl", 500, 3), "math": ("data/math.jsonl", 5000, 3),
    "amc23": ("data/amc23.jsonl", 40, 5), "aime24": ("data/aime24.jsonl", 30, 5)}


@dataclasses.dataclass
class Config:
    model: str = "out/toy_opd/last"                      # folder or hub name
    benchmarks: str = "gsm8k,math500,math,amc23,aime24"  # names of the table above or JSONL files, with commas between
    num_problems: int | None = None                      # the first so many of each; None: all
    samples_per_problem: int | None = None               # None: the paper's number, 3 for other files
    engine: Literal["auto", "hf", "vllm"] = "auto"       # who decodes: transformers, or vLLM; auto: vLLM on a GPU
    max_new_tokens: int = 8192                           # stop token included
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0                                       # 0: all tokens
    extra_stop_ids: tuple[int, ...] = ()                 # end a response, as the model's own do: a teacher's, say
    rollout_rows: int = 32                               # responses decoded together; bounds the KV cache of engine="hf"
    kv_cache_gb: float = 16.0                            # of vLLM
    rollout_timeout: float = 600.0                       # seconds without a sign of life before vLLM is given up
    max_logprob_gap: float | None = None                 # nats, mean over tokens, between log-probs of engine and model;
                                                         # None: 0.05 in bf16, 1e-4 in fp32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_tokens_per_microbatch: int = 16384               # padded tokens in one forward for the entropies
    window: int = 256                                    # responses sampled, graded and written together: what a kill can cost
    bootstrap: int = 10000                               # resamples of the problems for the intervals
    out_dir: str = "out/eval"
    overwrite: bool = False                              # delete the evaluation in out_dir first
    seed: int = 42


MAY_CHANGE = ("model", "engine", "rollout_rows", "kv_cache_gb", "rollout_timeout", "max_logprob_gap",
              "max_tokens_per_microbatch", "window", "bootstrap", "out_dir", "overwrite")
NUMBERS = ("index", "sample", "correct", "reason", "length", "entropy_sum", "stop", "tokens_after_box", "entropy_after_box_sum",
           "repetition")                                 # what the summary needs of a record


def validate(cfg):
    for key in ("num_problems", "samples_per_problem", "max_new_tokens", "rollout_rows", "max_tokens_per_microbatch", "window",
                "bootstrap"):
        if getattr(cfg, key) is not None and getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least 1")
    if cfg.temperature < 0 or cfg.top_k < 0:
        raise UserError(f"temperature={cfg.temperature}, top_k={cfg.top_k}: must not be negative")
    if not 0 < cfg.top_p <= 1:
        raise UserError(f"top_p={cfg.top_p}: must be in (0, 1]; 1 keeps every token")


def load_benchmarks(cfg):
    """{name: (problems, responses to each)}; every problem has an answer."""
    found = {}
    for name in filter(None, cfg.benchmarks.split(",")):
        path, count, samples = BENCHMARKS.get(name, (name, None, 3))
        if not Path(path).is_file():
            remedy = f"make it with `python data/benchmarks.py {name}`" if count else \
                f"there are {', '.join(BENCHMARKS)}, or give a JSONL file"
            raise UserError(f"no benchmark {path}: {remedy}")
        problems = utils.load_problems(path)
        if count and len(problems) != count:
            raise UserError(f"{path} has {len(problems)} problems, {name} {count}; make it: python data/benchmarks.py {name}")
        if without := [i for i, problem in enumerate(problems, 1) if not problem["answer"]]:
            raise UserError(f"{path}: problem {without[0]} has no answer to compare with")
        if Path(path).stem in found:
            raise UserError(f"benchmarks={cfg.benchmarks!r}: two of the name {Path(path).stem}; rename one file")
        found[Path(path).stem] = (problems[:cfg.num_problems], cfg.samples_per_problem or samples)
    if not found:
        raise UserError(f"benchmarks={cfg.benchmarks!r}: name at least one of {', '.join(BENCHMARKS)}, or a JSONL file")
    return found


def whole_lines(path):
    """(offset, length, record) of each line of a JSONL file; a last line cut short by a kill is left out."""
    with open(path, "rb") as file:
        offset = 0
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield offset, len(line), json.loads(line)
            offset += len(line)


def write_json(path, value):
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=1) + "\n")
    os.replace(f"{path}.tmp", path)


# ------------------------------------------------------------------------------------------------------------- numbers

def counts(records):
    """{index: (graded responses, right ones)}."""
    problems = {}
    for record in records:
        n, c = problems.get(record["index"], (0, 0))
        problems[record["index"]] = (n + (record["correct"] is not None), c + (record["correct"] is True))
    return {index: (n, c) for index, (n, c) in problems.items() if n}


def interval(values, resamples, seed):
    """95 % interval of the mean over problems, by the percentile bootstrap."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def numbers(records, resamples, seed):
    """summarise, and an interval for Avg@k."""
    row, graded = summarise(records), counts(records).values()
    return row | {"avg_interval": interval([c / n for n, c in graded], resamples, seed) if graded else None}


def print_table(results):
    print(f"{'':<11}{'k':>3} {'Avg@k':>6} {'95 % interval':<15}{'Pass@k':>7}{'length':>7}{'median':>7}{'entropy':>8}{'cut':>7}"
          f"{'ungr.':>6}")
    for name, row in results.items():
        avg, passed = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("avg_at_k", "pass_at_k"))
        low_high = "-" if row["avg_interval"] is None else "{:.3f} - {:.3f}".format(*row["avg_interval"])
        print(f"{name[:10]:<11}{row['k']:>3} {avg:>6} {low_high:<15}{passed:>7}{row['length']:>7.0f}"
              f"{row['median_length']:>7.0f}{row['entropy']:>8.3f}{row['truncated']:>7.1%}{row['ungraded']:>6}")


def read_report(folder):
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise UserError(f"no {path}: give folders that eval_math.py has written to the end")
    return json.loads(path.read_text())


def print_markdown(folders):
    """A row for each folder and benchmark, and what the numbers were measured with."""
    print("| | problems | k | Avg@k (95 %) | Pass@k | length | entropy | truncated |\n|---|---|---|---|---|---|---|---|")
    notes = {}
    for folder in folders:
        report = read_report(folder)
        for name, row in report["results"].items():
            avg = "-"
            if row["avg_at_k"] is not None:
                avg = "{:.3f} ({:.3f} - {:.3f})".format(row["avg_at_k"], *row["avg_interval"])
            passed = "-" if row["pass_at_k"] is None else f"{row['pass_at_k']:.3f}"
            print(f"| `{Path(folder).name}` on {name} | {row['problems']} | {row['k']} | {avg} | {passed} | "
                  f"{row['length']:.1f} | {row['entropy']:.3f} | {row['truncated']:.1%} |")
        s = report["settings"]
        note = (f"T = {s['temperature']}, top-p {s['top_p']}, top-k {s['top_k']}, at most {s['max_new_tokens']} tokens, seed "
                f"{s['seed']}, {s['dtype']} on {report['device']}, torch {report['versions']['torch']}")
        notes.setdefault(note, []).append(Path(folder).name)
    for note, names in notes.items():
        print(f"\n{note}" + (f" ({', '.join(names)})" if len(notes) > 1 else "") + ".")


def compare(first, second):
    """Print paired differences second - first over the problems both have, with bootstrap intervals."""
    sides, settings = [], [read_report(folder)["settings"] for folder in (first, second)]
    for folder in (first, second):
        sides.append({})
        for _, _, record in whole_lines(Path(folder) / "samples.jsonl"):      # paired by the problem's text
            sides[-1].setdefault(record["benchmark"], []).append(
                {"index": record["problem"], "correct": record["correct"], "length": record["length"]})
    for key in settings[0]:
        if key not in ("revision", "problems", "benchmarks") and settings[0][key] != settings[1].get(key):
            print(f"warning: {key} is {settings[0][key]!r} there and {settings[1].get(key)!r} here")
    shared = [name for name in sides[0] if {r["index"] for r in sides[0][name]} & {r["index"] for r in sides[1].get(name, [])}]
    if not shared:
        raise UserError(f"{first} and {second} have no problem in common: {', '.join(sides[0])} and {', '.join(sides[1])}")
    print(f"{second} - {first}\n{'':<11}{'problems':>9}{'Avg':>8} {'95 % interval':<18}{'length':>8} {'95 % interval':<16}")
    for name in shared:
        shares, lengths = [], []
        for records in (side[name] for side in sides):
            shares.append({i: c / n for i, (n, c) in counts(records).items()})
            lengths.append({i: [r["length"] for r in records if r["index"] == i] for i in shares[-1]})
        both = sorted(shares[0].keys() & shares[1].keys())
        cells = []
        for differences, form in (([shares[1][i] - shares[0][i] for i in both], "{:+.3f}"),
                                  ([np.mean(lengths[1][i]) - np.mean(lengths[0][i]) for i in both], "{:+.0f}")):
            low, high = interval(differences, 10000, 0)
            cells += [form.format(np.mean(differences)), f"{form.format(low)} .. {form.format(high)}"]
        print(f"{name[:10]:<11}{len(both):>9}{cells[0]:>8} {cells[1]:<18}{cells[2]:>8} {cells[3]:<16}")


def draw(results, path):
    """Accuracy with its interval, and length, by benchmark."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for x, row in enumerate(results.values()):
        if row["avg_at_k"] is not None:
            low, high = row["avg_interval"]
            left.bar(x - 0.2, row["avg_at_k"], 0.4, color="C0", label="Avg@k, 95 % interval" if x == 0 else None)
            left.errorbar(x - 0.2, row["avg_at_k"], [[row["avg_at_k"] - low], [high - row["avg_at_k"]]], color="0.2", capsize=3)
            left.bar(x + 0.2, row["pass_at_k"], 0.4, color="C1", label="Pass@k" if x == 0 else None)
        right.bar(x - 0.2, row["length"], 0.4, color="C2", label="mean" if x == 0 else None)
        right.bar(x + 0.2, row["median_length"], 0.4, color="C3", label="median" if x == 0 else None)
    left.set_ylim(0, 1.25)                               # room for the legend
    left.set_yticks(np.arange(0, 1.01, 0.2))
    right.set_ylim(0, 1.25 * right.get_ylim()[1])
    for axis, title in ((left, "accuracy"), (right, "response length (tokens)")):
        axis.set_xticks(range(len(results)), [f"{name}\nk = {row['k']}" for name, row in results.items()])
        axis.set_xlim(-1, len(results))
        axis.set_title(title, fontsize=10)
        axis.legend(frameon=False, ncols=2, loc="upper center", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------- main

def main(argv):
    if argv[:1] == ["--compare"]:
        if len(argv) != 3:
            raise UserError("--compare takes two folders: python eval_math.py --compare out/eval_a out/eval_b")
        return compare(*argv[1:])
    if argv[:1] == ["--table"]:
        if len(argv) < 2:
            raise UserError("--table takes folders: python eval_math.py --table out/eval_a out/eval_b")
        return print_markdown(argv[1:])
    cfg, origin = utils.load_config(Config, argv)
    validate(cfg)
    rank, world, device = utils.init_processes(patience=7 * 86400)       # ranks meet at the end only
    chief, out_dir = rank == 0, Path(cfg.out_dir)
    benchmarks = load_benchmarks(cfg)

    # 1. the model, and where its responses end
    dtype = getattr(torch, cfg.dtype)
    tokenizer = utils.load_tokenizer(cfg.model)
    model = utils.load_model(cfg.model, dtype, device).requires_grad_(False)
    stops = sorted({*utils.stop_ids(model.generation_config, tokenizer), *cfg.extra_stop_ids})
    vocab_size, positions = len(model.get_output_embeddings().weight), model.config.max_position_embeddings
    sampling = Sampling(cfg.max_new_tokens, tuple(stops), cfg.temperature, cfg.top_p, cfg.top_k, vocab_size)
    prompts = {name: utils.usable_prompts(name, problems, tokenizer, cfg.max_new_tokens, positions, vocab_size, chief)
               for name, (problems, _) in benchmarks.items()}
    longest = max(len(ids) for some in prompts.values() for ids in some.values()) + cfg.max_new_tokens
    kind = choose_engine(cfg.engine, device, chief)
    engine = make_engine(kind, cfg, model, dtype, vocab_size, longest, sleeps=False)

    # 2. what is done already: lines of samples*.jsonl, with the same settings
    settings = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in MAY_CHANGE}
    settings |= {"revision": utils.model_revision(cfg.model), "stop_ids": stops,
                 "tokenizer": utils.fingerprint({**tokenizer.get_vocab(), "chat_template": tokenizer.chat_template}),
                 "problems": {name: utils.fingerprint(dict(enumerate(problems))) for name, (problems, _) in benchmarks.items()}}
    settings = json.loads(json.dumps(settings))
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        if not (out_dir / "settings.json").is_file():
            raise UserError(f"out_dir={cfg.out_dir!r} exists and is no evaluation; choose another name")
        old = json.loads((out_dir / "settings.json").read_text())
        if not cfg.overwrite and (changed := [key for key in settings if old.get(key) != settings[key]]):
            raise UserError(f"{cfg.out_dir} was evaluated with {changed[0]}={old.get(changed[0])!r}, not "
                            f"{settings[changed[0]]!r}; choose another out_dir, or --overwrite")
    if world > 1:
        dist.barrier()                                   # every rank has looked
    if chief:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path in out_dir.glob("results.*") if cfg.overwrite else ():
            path.unlink()
        for path in out_dir.glob("samples*.jsonl"):
            if cfg.overwrite:
                path.unlink()
            else:                                        # without the end of a line that a kill cut short
                os.truncate(path, max((offset + length for offset, length, _ in whole_lines(path)), default=0))
        write_json(out_dir / "settings.json", settings)
        utils.print_config(cfg, origin)
    if world > 1:
        dist.barrier()
    done = {(record["benchmark"], record["index"], record["sample"])
            for path in out_dir.glob("samples*.jsonl") for _, _, record in whole_lines(path)}
    if world > 1:
        dist.barrier()                                   # every rank has read before any writes

    # 3. sample, measure and grade, a window at a time so that memory does not grow with the number of responses
    start, mine = time.time(), out_dir / f"samples_{rank:03d}.jsonl"
    engine.generate([], sampling, [])                    # ranks load vLLM together, also one that has nothing to do
    for name, (problems, samples) in benchmarks.items():
        todo = [(i, j) for i in prompts[name] for j in range(samples) if (name, i, j) not in done][rank::world]
        with tqdm(total=len(todo), desc=name, unit=" responses", disable=not (chief and todo), mininterval=1) as bar:
            for first in range(0, len(todo), cfg.window):
                pairs = todo[first:first + cfg.window]
                records = respond(engine, model, tokenizer, problems, prompts[name], pairs, sampling, cfg.seed,
                                        cfg.max_tokens_per_microbatch, dtype)
                utils.write_lines(mine, [{"benchmark": name, **record} for record in records])
                bar.update(len(pairs))
    if world > 1:
        dist.barrier()
    if not chief:
        return

    # 4. one file in order, the numbers, the table
    lines = {}                                           # (benchmark, index, sample): where the line is, and its numbers
    paths = list(out_dir.glob("samples*.jsonl"))
    for path in paths:
        for offset, length, record in whole_lines(path):
            key = list(benchmarks).index(record["benchmark"]), record["index"], record["sample"]
            lines[key] = path, offset, length, {name: record[name] for name in NUMBERS}
    lines = dict(sorted(lines.items()))
    wanted = sum(len(prompts[name]) * samples for name, (_, samples) in benchmarks.items())
    if len(lines) < wanted:
        raise UserError(f"{wanted - len(lines)} of {wanted} responses are not in {out_dir}: do all machines write there? "
                         f"The same command samples what is missing")
    temporary = out_dir / "samples.tmp"
    with contextlib.ExitStack() as stack, open(temporary, "wb") as merged:
        sources = {path: stack.enter_context(open(path, "rb")) for path in paths}
        for path, offset, length, _ in lines.values():
            sources[path].seek(offset)
            merged.write(sources[path].read(length))
    os.replace(temporary, out_dir / "samples.jsonl")
    for path in paths:
        if path.name != "samples.jsonl":
            path.unlink()
    results = {name: numbers([line[-1] for key, line in lines.items() if key[0] == b], cfg.bootstrap, cfg.seed)
               | {"skipped": len(problems) - len(prompts[name])} for b, (name, (problems, _)) in enumerate(benchmarks.items())}
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "math-verify", "numpy")}
    report = {"results": results, "model": cfg.model, "settings": settings, "config": dataclasses.asdict(cfg),
              "versions": {"python": platform.python_version(), **versions}, "device": device.type, "processes": world,
              "seconds": round(time.time() - start, 1), "responses_in_these_seconds": len(lines) - len(done)}
    known = out_dir / "results.json"
    if len(lines) > len(done) or not known.is_file() or read_report(out_dir)["results"] != json.loads(json.dumps(results)):
        write_json(out_dir / "results.json", report)
        draw(results, out_dir / "results.png")
    print_table(results)
    print(f"{len(lines)} responses at T = {cfg.temperature}, top-p {cfg.top_p}, top-k {cfg.top_k}, at most "
          f"{cfg.max_new_tokens} tokens, seed {cfg.seed}; in {out_dir}")


if __name__ == "__main__":
    utils.run(main, __doc__, Config)
