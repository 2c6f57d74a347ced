"""
Write a teacher's responses to disk once, to train on them many times; or talk to a checkpoint.

    python sample.py configs/toy_sample.py                        # CPU, half a minute
    torchrun --nproc_per_node=8 sample.py configs/sample_4b.py    # Qwen3-4B on DeepScaleR's prompts
    python sample.py configs/toy_sample.py --prompt="3+4+5?"      # one answer; --chat for more

trajectories.py describes the files that are written to out_dir.

Killed and started again with the same command, the script samples what no shard holds yet. A seed
belongs to (seed, prompt, sample), so in fp32 the set is the same as without the kill. In bf16 a
batch of other rows rounds differently, and a long response may go another way.

Departure from the paper: it samples with top_p 0.95 and top_k 20. The defaults here are 1 and 0, so
that responses really come from the teacher's distribution; configs/sample_4b.py has the paper's.
"""

import dataclasses
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from transformers import TextStreamer

from data.problems import (
    encode_chat,
    load_problems,
    load_tokenizer,
    tokenizer_revision,
    usable_prompts,
)
from engine import HFEngine, Sampling, make_engine, progress, score
from models import lm_head, load_model, microbatches, model_revision, response_hidden, stop_ids
from trajectories import SHARDS, Sampled, finished, write_shard
from utils import (
    RANK,
    WORLD,
    UserError,
    barrier,
    check_ranges,
    derive_seed,
    end_on_fault,
    fingerprint,
    init_processes,
    load_config,
    lock,
    print0,
    print_config,
    run,
)


@dataclasses.dataclass
class Config:
    model: str = "Qwen/Qwen3-4B"            # who writes: a folder or a hub name
    # Who will learn from it. The student's stop ids end a response as well, and ids that it has no
    # embedding for are not sampled.
    student: str | None = None
    prompts: str = "data/deepscaler.jsonl"  # JSONL with problem, or question
    num_prompts: int | None = None          # only the first so many; None: all
    samples_per_prompt: int = 1
    out_dir: str = "out/sample"             # where shards are there already, the rest is sampled
    overwrite: bool = False                 # delete the shards in out_dir first
    seed: int = 42

    # how responses are sampled
    max_new_tokens: int = 4096              # stop token included
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0                          # 0: all tokens
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    chat_template_kwargs: dict | None = None    # None: as stored, else {"enable_thinking": False}

    # what is kept
    cache_hidden: bool = False              # keep the last hidden states too, in dtype: training
                                            # needs no forward of the teacher then
    max_tokens_per_microbatch: int = 16384  # padded tokens in one forward for the hidden states
    shard_bytes: int = 1 << 30              # response tokens and states of a shard take no more,
                                            # at max_new_tokens each; one response always fits
    shard_sequences: int = 1024             # most responses in a shard: a kill can cost so many

    # who decodes
    engine: Literal["auto", "hf", "vllm"] = "auto"      # auto: vLLM on a GPU, else transformers;
                                            # on the terminal it is always transformers
    rollout_rows: int = 64                  # responses decoded together; for engine="hf" this
                                            # bounds the memory of the KV cache
    compile: bool = False                   # torch.compile a token's forward in hf
    kv_cache_gb: float = 40.0               # of vLLM, on a GPU of 80 GB
    rollout_timeout: float = 600.0          # seconds without a finished response until the end
    max_logprob_gap: float | None = None    # nats, mean over tokens, between the log-probs of the
                                            # engine and the model; None: 0.15 in bf16, 1e-4 in fp32

    # instead of writing anything
    prompt: str | None = None               # answer this on the terminal
    chat: bool = False                      # answer what is typed


# With other values of these a shard would hold other responses or states, so all runs into one
# folder must agree on them. What the paths name is compared by fingerprints: see settings_of.
DECISIVE = ("max_new_tokens", "temperature", "top_p", "top_k", "dtype", "cache_hidden", "seed")


# ----------------------------------------------------------------------------------------- terminal

def answer(engine, tokenizer, messages, sampling, seed):
    """Print the response to a conversation, word by word, and return it."""
    positions = engine.model.config.max_position_embeddings
    prompt = encode_chat(tokenizer, messages)
    if len(prompt) + sampling.max_new_tokens > positions:
        raise UserError(
            f"a prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones pass "
            f"max_position_embeddings={positions}; lower max_new_tokens"
        )
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)    # prints a word when it is whole

    def show(_, token):
        streamer.put(torch.tensor([token]))

    (_, tokens, _, stop_reason), = engine.stream([prompt], sampling, [seed], on_token=show)
    streamer.end()
    end = "stopped" if stop_reason == "stop" else "cut at max_new_tokens"
    print(f"({len(tokens)} tokens, {end})", file=sys.stderr)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def talk(engine, tokenizer, sampling, seed):
    """Read prompts until the end of the input; an empty line begins a new conversation."""
    print("Enter sends. An empty line begins a new conversation. Ctrl-D ends.", file=sys.stderr)
    messages = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text:
            messages = []
            continue

        asked = [*messages, {"role": "user", "content": text}]
        turn_seed = derive_seed(seed, "chat", len(asked))
        response = answer(engine, tokenizer, asked, sampling, turn_seed)
        messages = [*asked, {"role": "assistant", "content": response}]


# ------------------------------------------------------------------------------------ what is to do

def limits(cfg, model, tokenizer):
    """
    (stop ids, vocabulary size): what ends a response, and the first id that is never sampled. With
    cfg.student both are such that the student can learn from the response.
    """
    stops = stop_ids(model.generation_config, tokenizer)
    vocab_size = len(lm_head(model))
    if cfg.student:
        student = load_model(cfg.student, model.dtype)
        student_stops = stop_ids(student.generation_config, load_tokenizer(cfg.student))
        stops = sorted({*stops, *student_stops})
        vocab_size = min(vocab_size, len(lm_head(student)))
    return tuple(stops), vocab_size


def settings_of(cfg, engine, tokenizer, stops, problems):
    """What decides which responses and hidden states a shard holds, as {key: JSON value}."""
    texts = {i: problem["problem"] for i, problem in enumerate(problems)}
    return {
        **{key: getattr(cfg, key) for key in DECISIVE},
        "hidden_dtype": cfg.dtype,          # older shards say so: they may have states in another
        "revision": model_revision(cfg.model),
        "tokenizer": tokenizer_revision(tokenizer),
        "problems": fingerprint(texts),
        "stop_ids": list(stops),
        "vocab_size": engine.vocab_size,
        "hidden_size": engine.model.config.hidden_size,
    }


def prepare_folder(out_dir, tokenizer, overwrite):
    """Delete what a kill left behind, or with `overwrite` all shards. All ranks call it."""
    barrier()                               # until here other ranks may still read the shards
    out_dir.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        lock(out_dir)
        for path in out_dir.glob(f"{SHARDS}.*"):
            if overwrite or path.suffix == ".tmp":
                path.unlink()
        tokenizer.save_pretrained(out_dir / "tokenizer")
    barrier()                               # and none writes before the folder is clean


# ------------------------------------------------------------------------------------- trajectories

def responses(cfg, engine, sampling, prompts, pairs):
    """Write the response of each (prompt index, sample) of `pairs`: a Sampled as each one ends."""
    asked = [prompts[i] for i, _ in pairs]
    seeds = [derive_seed(cfg.seed, "sample", i, sample) for i, sample in pairs]
    for k, *rollout in engine.stream(asked, sampling, seeds):
        yield Sampled(*pairs[k], asked[k], *rollout)


@torch.no_grad()
def hidden_states(engine, rows):
    """The states that predict each row's response tokens: [(n, H_t)] in cfg.dtype, on the CPU."""
    sequences = [(row.prompt, row.tokens, i) for i, row in enumerate(rows)]
    states = {}
    for micro in microbatches(sequences, engine.max_tokens):
        hidden = response_hidden(engine.model, micro, engine.dtype)                 # (N, H_t)
        _, responses, places = zip(*micro)
        parts = hidden.cpu().split([*map(len, responses)])
        states.update(zip(places, parts))
    return [states[i] for i in range(len(rows))]


# --------------------------------------------------------------------------------------------- main

def main(argv):
    cfg = load_config(Config, argv)
    check_ranges(cfg)
    device = init_processes()
    out_dir = Path(cfg.out_dir)
    if out_dir.is_file():
        raise UserError(f"out_dir={cfg.out_dir!r} is a file; choose another name")
    on_terminal = cfg.chat or cfg.prompt is not None
    problems = [] if on_terminal else load_problems(cfg.prompts)

    # 1. the model and its engine
    dtype = getattr(torch, cfg.dtype)
    tokenizer = load_tokenizer(cfg.model, cfg.chat_template_kwargs)
    model = load_model(cfg.model, dtype, device).requires_grad_(False)
    stops, vocab_size = limits(cfg, model, tokenizer)
    sampling = Sampling(cfg.max_new_tokens, stops, cfg.temperature, cfg.top_p, cfg.top_k)
    if on_terminal:
        engine = HFEngine(model, dtype, vocab_size)
        if cfg.chat:
            return talk(engine, tokenizer, sampling, cfg.seed)
        return answer(
            engine, tokenizer, [{"role": "user", "content": cfg.prompt}], sampling, cfg.seed)

    prompts = usable_prompts(
        cfg.prompts, problems[:cfg.num_prompts], tokenizer, cfg.max_new_tokens,
        model.config.max_position_embeddings, vocab_size,
    )
    longest = max(map(len, prompts.values())) + cfg.max_new_tokens
    engine = make_engine(cfg.engine, cfg, model, dtype, vocab_size, longest, sleeps=False)

    # 2. what is to be done: every (prompt, sample) that no shard holds
    settings = settings_of(cfg, engine, tokenizer, stops, problems)
    done = set() if cfg.overwrite else finished(out_dir, settings)
    todo = [
        (i, sample)
        for i in prompts
        for sample in range(cfg.samples_per_prompt)
        if (i, sample) not in done
    ]
    token_bytes = 8                         # on disk, of a response token: its id and its log-prob
    if cfg.cache_hidden:
        token_bytes += model.config.hidden_size * dtype.itemsize
    print_config(cfg)
    print0(
        f"{len(todo)} responses to sample, {len(done)} are there; {token_bytes:,} bytes a response "
        f"token, at most "
        f"{len(todo) * cfg.max_new_tokens * token_bytes / 1e9:.2f} GB"
    )
    prepare_folder(out_dir, tokenizer, cfg.overwrite)

    # 3. are the engine's log-probs the model's? Ranks that have nothing to do take part
    mine = todo[RANK::WORLD]
    probe = [prompts[i] for i, _ in mine[:8]]
    short = dataclasses.replace(sampling, max_new_tokens=min(64, cfg.max_new_tokens))
    score(engine, probe, engine.generate(probe, short, range(len(probe))))
    end_on_fault()

    # 4. sample, and write a shard whenever one is full
    metadata = {"settings": json.dumps(settings), "model": cfg.model}
    number = 0                              # of this rank's next shard, where no file has it yet
    sampled = iter(progress(responses(cfg, engine, sampling, prompts, mine), len(mine)))
    most = min(cfg.shard_sequences, cfg.shard_bytes // (token_bytes * cfg.max_new_tokens))
    while rows := list(islice(sampled, max(1, most))):
        hidden = hidden_states(engine, rows) if cfg.cache_hidden else []
        while (path := out_dir / f"{RANK:03d}_{number:05d}.safetensors").exists():
            number += 1
        write_shard(path, rows, hidden, metadata)
    # No barrier here: other ranks may be at work for longer than one waits.
    print0(
        f"done: {len(mine)} responses by this process; train on them with --prefix=teacher "
        f"--trajectories={out_dir}"
    )


if __name__ == "__main__":
    run(main, __doc__, Config)
