"""
Write responses of a model to disk once, to train on them many times; or talk to a checkpoint.

    python sample.py configs/toy_sample.py                          # CPU, half a minute
    torchrun --nproc_per_node=8 sample.py configs/sample_4b.py      # Qwen3-4B on the DeepScaleR prompts
    python sample.py configs/toy_sample.py --prompt="3+4+5?"        # one answer, as it comes; --chat for more

A shard, out_dir/000_00000.safetensors (rank, number), holds n sequences, in all M tokens, R of them response tokens:
    tokens         (M,)      int32   prompt, response, prompt, response, ...
    offsets        (n + 1,)  int64   where a sequence begins in tokens
    prompt_lengths (n,)      int32
    logps          (R,)      fp32    of the response tokens, under the full softmax at T = 1
    stopped        (n,)      uint8   1: ends with a stop id, 0: cut at max_new_tokens
    prompt_index, sample     (n,)    int32: which prompt of the file, which of its responses
    hidden         (R, H_t)  bf16    with cache_hidden: the last hidden states (of size H_t) that predict the response tokens.
                                     Their product with the LM head is the full distribution over the vocabulary of V, in
                                     2 H_t bytes a token instead of 2 V
    hidden_crc     (n,)      int64   CRC-32 of each sequence's part of hidden
and as metadata what made it, with a checksum of all but hidden. Beside it the same as JSON lines, to read; the tokenizer is in
out_dir/tokenizer.

Killed and started again with the same command, it samples what no shard holds. Seeds belong to (seed, prompt, sample), so in
fp32 the set is the same as without the kill; in bf16 another batch rounds otherwise, and a long response may go another way.
The paper samples with top_p 0.95 and top_k 20; the defaults here are 1 and 0, its values are in configs/sample_4b.py.
"""

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

import trajectories
import utils
from engine import Sampling, check_logprobs, choose_engine, make_engine
from utils import UserError


@dataclasses.dataclass
class Config:
    model: str = "Qwen/Qwen3-4B"                         # folder or hub name
    student: str | None = None                           # who will learn from it: its stop ids end a response as well, and ids
                                                         # that it has no embedding for are not sampled
    prompts: str = "data/deepscaler.jsonl"               # JSONL with problem, or question
    num_prompts: int | None = None                       # the first so many; None: all
    samples_per_prompt: int = 1
    # rollouts
    engine: Literal["auto", "hf", "vllm"] = "auto"       # who decodes: transformers, or vLLM; auto: vLLM on a GPU
    max_new_tokens: int = 4096                           # stop token included
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0                                       # 0: all tokens
    rollout_rows: int = 64                               # responses decoded together; bounds the KV cache of engine="hf"
    kv_cache_gb: float = 16.0                            # of vLLM
    rollout_timeout: float = 600.0                       # seconds without a sign of life before vLLM is given up
    max_logprob_gap: float | None = None                 # nats, mean over tokens, between log-probs of engine and model;
                                                         # None: 0.05 in bf16, 1e-4 in fp32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # what is kept
    cache_hidden: bool = False                           # the last hidden states too: no teacher forward in training
    hidden_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_tokens_per_microbatch: int = 16384               # padded tokens in one forward for the hidden states
    shard_bytes: int = 1 << 30                           # a shard is written when it has reached this size ...
    shard_sequences: int = 1024                          # ... or so many sequences: what a kill can cost
    expected_length: int | None = None                   # response tokens to expect, for the disk space; None: max_new_tokens
    out_dir: str = "out/sample"                          # with shards of the same settings in it, what is missing is sampled
    overwrite: bool = False                              # delete the shards in out_dir first
    seed: int = 42
    # instead of writing anything
    prompt: str | None = None                            # answer this on the terminal
    chat: bool = False                                   # answer what is typed


# between runs into one folder; what the three paths name goes in as fingerprints
MAY_CHANGE = ("model", "student", "prompts", "num_prompts", "samples_per_prompt", "engine", "rollout_rows",
              "kv_cache_gb", "rollout_timeout", "max_logprob_gap", "shard_bytes",
              "shard_sequences", "max_tokens_per_microbatch", "expected_length", "out_dir", "overwrite", "prompt", "chat")


def validate(cfg):
    for key in ("num_prompts", "samples_per_prompt", "max_new_tokens", "rollout_rows", "max_tokens_per_microbatch",
                "shard_bytes", "shard_sequences", "expected_length"):
        if getattr(cfg, key) is not None and getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least 1")
    if cfg.temperature < 0 or cfg.top_k < 0:
        raise UserError(f"temperature={cfg.temperature}, top_k={cfg.top_k}: must not be negative")
    if not 0 < cfg.top_p <= 1:
        raise UserError(f"top_p={cfg.top_p}: must be in (0, 1]; 1 keeps every token")


def code_version():
    """The commit this file is at, as git describes it, or "unknown" outside a repository."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                              text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


# ------------------------------------------------------------------------------------------------------------- terminal

def answer(engine, tokenizer, messages, sampling, seed, positions):
    """Print the response to a conversation, token by token, and return it."""
    tokens, shown = [], ""

    def show(_, token):
        nonlocal shown
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):                  # half a character: the next token completes it
            print(text[len(shown):], end="", flush=True)
            shown = text
    prompt = utils.encode_chat(tokenizer, messages)
    if len(prompt) + sampling.max_new_tokens > positions:
        raise UserError(f"a prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones pass "
                        f"max_position_embeddings={positions}; lower max_new_tokens")
    start = time.perf_counter()
    (_, _, reason), = engine.generate([prompt], sampling, [seed], on_token=show)
    seconds = time.perf_counter() - start
    print(f"\n({len(tokens)} tokens, {len(tokens) / seconds:.0f} a second, "
          f"{'stopped' if reason == 'stop' else 'cut at max_new_tokens'})", file=sys.stderr)
    return shown


def talk(engine, tokenizer, sampling, seed, positions):
    """Read prompts until the end of the input; an empty line begins a new conversation."""
    print("A prompt and Enter. An empty line: a new conversation. Ctrl-D: the end.", file=sys.stderr)
    messages = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        messages = [*messages, {"role": "user", "content": text}] if text else []
        try:
            if messages:
                seed_here = utils.derive_seed(seed, "chat", len(messages))
                response = answer(engine, tokenizer, messages, sampling, seed_here, positions)
                messages.append({"role": "assistant", "content": response})
        except UserError as error:
            print(f"error: {error}, or begin a new conversation", file=sys.stderr)
            messages = messages[:-1]


def main(argv):
    cfg, origin = utils.load_config(Config, argv)
    validate(cfg)
    rank, world, device = utils.init_processes()
    chief = rank == 0
    out_dir = Path(cfg.out_dir)
    terminal = cfg.chat or cfg.prompt is not None
    problems = [] if terminal else utils.load_problems(cfg.prompts)

    # 1. the model, and where its responses end
    dtype = getattr(torch, cfg.dtype)
    tokenizer = utils.load_tokenizer(cfg.model)
    model = utils.load_model(cfg.model, dtype, device).requires_grad_(False)
    stops, vocab_size = utils.stop_ids(model.generation_config, tokenizer), len(model.get_output_embeddings().weight)
    if cfg.student:
        student = utils.load_model(cfg.student, dtype)   # dropped at once
        student_stops = utils.stop_ids(student.generation_config, utils.load_tokenizer(cfg.student))
        stops, vocab_size = sorted({*stops, *student_stops}), min(vocab_size, len(student.get_output_embeddings().weight))
        del student
    positions = model.config.max_position_embeddings
    sampling = Sampling(cfg.max_new_tokens, tuple(stops), cfg.temperature, cfg.top_p, cfg.top_k, vocab_size)
    usable = {} if terminal else utils.usable_prompts(cfg.prompts, problems[:cfg.num_prompts], tokenizer, cfg.max_new_tokens,
                                                      positions, vocab_size, chief)
    longest = positions if terminal else max(map(len, usable.values())) + cfg.max_new_tokens
    kind = choose_engine(cfg.engine, device, chief and not terminal)
    engine = make_engine(kind, cfg, model, dtype, vocab_size, longest, sleeps=False)
    if cfg.prompt is not None:
        return answer(engine, tokenizer, [{"role": "user", "content": cfg.prompt}], sampling, cfg.seed, positions)
    if cfg.chat:
        return talk(engine, tokenizer, sampling, cfg.seed, positions)

    # 2. what is to be done: every (prompt, sample) that no shard holds
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"out_dir={cfg.out_dir!r} is a file; choose another name")
    settings = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in MAY_CHANGE}
    settings |= {"revision": utils.model_revision(cfg.model),
                 "tokenizer": utils.fingerprint({**tokenizer.get_vocab(), "chat_template": tokenizer.chat_template}),
                 "problems": utils.fingerprint(dict(enumerate(p["problem"] for p in problems))),
                 "stop_ids": stops, "vocab_size": vocab_size, "hidden_size": model.config.hidden_size}
    done = set() if cfg.overwrite else trajectories.finished(out_dir, settings)
    todo = [(i, j) for i in usable for j in range(cfg.samples_per_prompt) if (i, j) not in done]
    hidden_bytes = model.config.hidden_size * getattr(torch, cfg.hidden_dtype).itemsize if cfg.cache_hidden else 0
    size = len(todo) * (cfg.expected_length or cfg.max_new_tokens) * (8 + hidden_bytes)
    existing = next(path for path in [out_dir, *out_dir.resolve().parents] if path.is_dir())
    free = shutil.disk_usage(existing).free
    if chief:
        utils.print_config(cfg, origin)
        print(f"{len(todo)} responses to sample, {len(done)} are there; {8 + hidden_bytes:,} bytes a response token: "
              f"{size / 1e9:.2f} GB at {cfg.expected_length or cfg.max_new_tokens} tokens each, {free / 1e9:.0f} GB are free")
    if size > free:
        raise UserError(f"{size / 1e6:.1f} MB may be needed and {free / 1e6:.1f} MB are free in {existing}; choose another "
                        f"out_dir, fewer prompts (num_prompts), or an expected_length if responses are shorter than "
                        f"{cfg.expected_length or cfg.max_new_tokens} tokens")
    if world > 1:
        dist.barrier()                                   # every rank has listed the shards
    out_dir.mkdir(parents=True, exist_ok=True)
    if chief:                                            # what a kill left behind, or with --overwrite all of it
        for path in out_dir.glob(f"{trajectories.SHARDS}.*"):
            if cfg.overwrite or not path.with_suffix(".safetensors").exists() or path.suffix == ".tmp":
                path.unlink()
        tokenizer.save_pretrained(out_dir / "tokenizer")
    if world > 1:
        dist.barrier()                                   # and none writes before the folder is clean

    # 3. sample, a window of prompts at a time so that memory does not grow with their number
    mine, rows, held, number = todo[rank::world], [], 0, 0
    metadata = {"settings": settings | {"model": cfg.model, "student": cfg.student, "prompts": cfg.prompts},
                "code": code_version()}
    bar = tqdm(total=len(mine), unit=" responses", disable=not chief, mininterval=1)
    tokens_done, flops, start = 0, 0.0, time.perf_counter()

    def flush():
        nonlocal rows, held, number
        while (path := out_dir / f"{rank:03d}_{number:05d}.safetensors").exists():
            number += 1
        hidden = [None] * len(rows) if cfg.cache_hidden else []
        sequences = [(prompt, response.tolist()) for _, _, prompt, response, _, _ in rows] if cfg.cache_hidden else []
        for batch in utils.microbatches([len(p) + len(r) for p, r in sequences], cfg.max_tokens_per_microbatch):
            with torch.no_grad():
                part = utils.response_hidden(model, [sequences[b] for b in batch], dtype)
            part = part.to("cpu", getattr(torch, cfg.hidden_dtype)).split([len(sequences[b][1]) for b in batch])
            for b, h in zip(batch, part):
                hidden[b] = h.clone()
        records = [{"prompt_index": i, "sample": j, "problem": problems[i]["problem"], "answer": problems[i]["answer"],
                    "response": tokenizer.decode(response, skip_special_tokens=True), "length": len(response),
                    "stop": tokenizer.decode(response[-1:]) if reason == "stop" else reason}
                   for i, j, _, response, _, reason in rows]
        trajectories.write_shard(path, rows, hidden, metadata, records)
        rows, held = [], 0

    # are the engine's log-probs the model's? Ranks also load vLLM together here, those that have nothing to do too
    probe = [usable[i] for i, _ in mine[:8]]
    short = dataclasses.replace(sampling, max_new_tokens=min(64, cfg.max_new_tokens))
    check_logprobs(engine, model, probe, engine.generate(probe, short, range(len(probe))), vocab_size, dtype,
                         cfg.max_tokens_per_microbatch)
    window = 16 * cfg.rollout_rows
    for first in range(0, len(mine), window):
        part = mine[first:first + window]
        prompts = [usable[i] for i, _ in part]
        seeds = [utils.derive_seed(cfg.seed, "sample", i, j) for i, j in part]
        for k, tokens, logps, reason in engine.stream(prompts, sampling, seeds):
            rows.append((*part[k], prompts[k], torch.tensor(tokens, dtype=torch.int32), torch.tensor(logps), reason))
            held += len(tokens) * (8 + hidden_bytes)
            tokens_done += len(tokens)
            flops += utils.forward_flops(model.config, [len(prompts[k]) + len(tokens)])
            bar.update()
            bar.set_postfix_str(f"{tokens_done / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            if held >= cfg.shard_bytes or len(rows) >= cfg.shard_sequences:
                flush()
    if rows:
        flush()
    bar.close()
    if chief:                                            # no barrier: other ranks may be at work for longer than one waits
        print(f"done: {len(mine)} responses, {tokens_done} tokens, {flops / 1e12:.3g} TFLOPs of writing; train on them with "
              f"--prefix=teacher --trajectories={out_dir}")


if __name__ == "__main__":
    utils.run(main, __doc__, Config)
