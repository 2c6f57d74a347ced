"""
Accuracy, length and entropy of a checkpoint on maths problems.

    python eval_math.py configs/toy_eval.py --model=out/toy_opd/last      # CPU, seconds
    torchrun --nproc_per_node=8 eval_math.py configs/eval_math.py --model=out/opd_8b/last
    python plot.py --eval out/eval_a out/eval_b               # a Markdown table, and results.png
    python plot.py --compare out/eval_a out/eval_b            # paired differences, with intervals

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
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import plot
from data.problems import (
    adopt_template,
    load_problems,
    load_tokenizer,
    tokenizer_revision,
    usable_prompts,
)
from engine import Sampling, make_engine
from grade import respond, summarise, verdicts_by_problem
from models import lm_head, load_model, model_revision, stop_ids
from utils import (
    RANK,
    WORLD,
    UserError,
    barrier,
    check_ranges,
    end_on_fault,
    faults,
    fingerprint,
    init_processes,
    load_config,
    lock,
    must_match,
    print_config,
    read_lines,
    run,
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
    # A model whose chat template and stop ids are used too: for the row of a Base model, its
    # teacher, as its distilled checkpoints have them.
    template: str | None = None
    chat_template_kwargs: dict | None = None    # None: as stored, else {"enable_thinking": False}
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    engine: Literal["auto", "hf", "vllm"] = "auto"      # hf: transformers; auto: vllm on a GPU
    rollout_rows: int = 32                              # responses that hf decodes together
    compile: bool = False                               # torch.compile a token's forward in hf
    kv_cache_gb: float = 40.0                           # of vllm, on a GPU of 80 GB
    rollout_timeout: float = 600.0                      # seconds without a response: it hangs
    max_logprob_gap: float | None = None                # nats; None: as make_engine has it
    max_tokens_per_microbatch: int = 16384              # padded tokens of a forward (entropies)
    window: int = 256                                   # responses that are written together


# No response depends on these: an evaluation may go on with others. What a model and a template
# are is compared by fingerprints.
MAY_CHANGE = ("model", "template", "engine", "rollout_rows", "compile", "kv_cache_gb",
              "rollout_timeout", "max_logprob_gap", "max_tokens_per_microbatch", "window",
              "out_dir", "overwrite")


def load_benchmarks(cfg):
    """{name: (problems, responses to each)}; every problem has an answer."""
    benchmarks = {}
    for given in filter(None, map(str.strip, cfg.benchmarks.split(","))):
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
    tokenizer = load_tokenizer(cfg.model, cfg.chat_template_kwargs)
    model = load_model(cfg.model, dtype, device).requires_grad_(False)
    ends = set(stop_ids(model.generation_config, tokenizer))
    if cfg.template:
        ends.update(adopt_template(tokenizer, cfg.template, cfg.chat_template_kwargs))
    sampling = Sampling(
        cfg.max_new_tokens, tuple(sorted(ends)), cfg.temperature, cfg.top_p, cfg.top_k)

    vocab_size = len(lm_head(model))
    positions = model.config.max_position_embeddings
    prompts = {
        name: usable_prompts(name, problems, tokenizer, cfg.max_new_tokens, positions, vocab_size)
        for name, (problems, _) in benchmarks.items()}
    longest = max(len(ids) for of_one in prompts.values() for ids in of_one.values())
    engine = make_engine(
        cfg.engine, cfg, model, dtype, vocab_size,
        longest + cfg.max_new_tokens, sleeps=False)
    return tokenizer, engine, sampling, prompts


# --------------------------------------------------------------------------------- out_dir's files

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
    path = folder / "settings.json"
    if not path.is_file():
        raise UserError(f"out_dir={cfg.out_dir!r} exists and is no evaluation; "
                        "choose another name")
    old = json.loads(path.read_text())
    if not cfg.overwrite:
        must_match(old, settings, folder, "choose another out_dir, or --overwrite")


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


# -------------------------------------------------------------------------------------------- main

def main(argv):
    # 1. the problems, the model, and where its responses end
    cfg = load_config(Config, argv)
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
        lock(out_dir)
        if cfg.overwrite:
            for path in [*out_dir.glob("results.*"), *out_dir.glob("samples*.jsonl")]:
                path.unlink()
        write_lines(out_dir / "settings.json", [settings], mode="w")
        merge_samples(out_dir, list(benchmarks))
        print_config(cfg)
    barrier()
    done = {(record["benchmark"], record["index"], record["sample"])
            for record in read_lines(out_dir / "samples.jsonl")}

    # 3. sample, grade and measure what is missing, a window at a time
    engine.generate([], sampling, [])                   # ranks load vLLM together, also idle ones
    for name, (problems, samples) in benchmarks.items():
        missing = [(index, sample) for index in prompts[name] for sample in range(samples)
                   if (name, index, sample) not in done]
        pairs = missing[RANK::WORLD]
        for first in tqdm(range(0, len(pairs), cfg.window), name, disable=RANK > 0 or None):
            records, gaps = respond(engine, tokenizer, problems, prompts[name],
                                    pairs[first:first + cfg.window], sampling, cfg.seed)
            write_lines(out_dir / f"{'faulty' if faults else 'samples'}_{RANK:03d}.jsonl",
                        [{"benchmark": name, **record, **gaps} for record in records])
            end_on_fault()
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
            "avg_interval": plot.interval(shares, cfg.seed),
            "skipped": len(problems) - len(prompts[name]),
        }
    write_lines(out_dir / "results.json", [{
        "results": results,
        "settings": settings,
        "config": dataclasses.asdict(cfg),
        "versions": {package: version(package)
                     for package in ("torch", "transformers", "math-verify", "numpy")},
        "device": device.type,
    }], mode="w")
    print("\n".join(plot.evaluation_table(plot.read_reports([out_dir]))))
    print(f"{len(records)} responses in {out_dir}; a picture: python plot.py --eval {out_dir}")


if __name__ == "__main__":
    run(main, __doc__, Config)
