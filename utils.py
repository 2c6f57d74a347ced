"""
What more than one stage needs: config files, prompts, models, rollouts, response-only forwards, grading, checkpoints.

Shape suffixes: B sequences in a micro-batch, T tokens in the longest of them, N response tokens, H hidden size, V vocabulary.
A *sequence* is (prompt ids, response ids), two lists of ints. Tokens go in and tokens come out: nothing is re-encoded.
"""

import ast
import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import types
import typing
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from kernels.linear_kl import CHUNK_BYTES

transformers_logging.disable_progress_bar()


class UserError(ValueError):
    """A mistake the user can mend. The message names the value, the limit and the remedy; scripts print it as one line."""


class EngineError(UserError):
    """Rollouts failed or hang; what was computed before them is whole."""


# -------------------------------------------------------------------------------------------------------------- config

def load_config(cls, argv):
    """
    Defaults of the dataclass `cls` < assignments in a Python file < --key=value. Returns (config, {key: where it came from}).

    In the file, `_names`, modules and functions are ignored and `from configs.other import *` is inheritance. `--key` alone
    sets a boolean. Raises UserError on an unknown key (naming the nearest), a wrong type, or an unreadable file.
    """
    values, origin = {}, {}
    kinds = typing.get_type_hints(cls)

    def put(key, value, where):
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else
                                                              "; --help lists the keys"))
        values[key], origin[key] = _cast(key, value, kinds[key], where), where

    files = [arg for arg in argv if not arg.startswith("--")]
    if len(files) > 1:
        raise UserError(f"two config files, {files[0]} and {files[1]}: give one; options are written --key=value")
    for path in files:
        for key, value in _run_config_file(path).items():
            if not (key.startswith("_") or isinstance(value, types.ModuleType) or callable(value)):
                put(key, value, path)
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            put(key, text if equals else "True", "command line")
    return cls(**values), origin


def _run_config_file(path):
    if not Path(path).is_file():
        near = difflib.get_close_matches(str(path), map(str, Path(path).parent.glob("*.py")), n=1)
        raise UserError(f"no config file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    names = {}
    try:
        exec(compile(Path(path).read_text(), path, "exec"), names)
    except Exception as error:                           # whatever a user's file may raise; reported with its line
        trace, line = error.__traceback__, getattr(error, "lineno", None)
        while trace and line is None:
            if trace.tb_frame.f_code.co_filename == path:
                line = trace.tb_lineno
            trace = trace.tb_next
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return names


def _cast(key, value, kind, where):
    """`value` as the annotated type; command-line text is read as a Python literal unless a str is wanted."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if isinstance(value, str) and where == "command line":
        if type(None) in options and value == "None":
            return None
        literals = [o for o in options if typing.get_origin(o) is typing.Literal]
        if str not in options and not literals:
            try:
                value = float(value) if float in options else ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pass                                     # stays a str and fails below, with the text in the message
    for option in options:
        base = typing.get_origin(option) or option
        if base is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif base is float and type(value) in (int, float):
            return float(value)
        elif base is tuple and isinstance(value, (tuple, list)):
            inner = typing.get_args(option)[0]
            return tuple(_cast(key, v, inner, where) for v in value)
        elif type(value) is base or (value is None and option is type(None)):
            return value
    wanted = " or ".join(" | ".join(map(repr, typing.get_args(o))) if typing.get_origin(o) is typing.Literal
                         else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where}: {key}={value!r} is a {type(value).__name__}; {key} must be {wanted.replace('NoneType', 'None')}")


def print_config(cfg, origin):
    """One line a key; what differs from the default is marked with where it came from."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        mark = f"  <- {origin[field.name]}" if value != field.default else ""
        print(f"  {field.name:<26} {value!r}{mark}")


# ------------------------------------------------------------------------------------------------- processes and seeds

_store = None                                            # torchrun's, once the processes know each other


def init_processes(patience=7200.0):
    """(rank, world size, device), under torchrun or alone; NCCL on GPUs, gloo on CPUs. patience: seconds a rank waits."""
    global _store
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, visible = int(os.environ.get("LOCAL_RANK", 0)), os.environ.get("CUDA_VISIBLE_DEVICES")
    first, patience = world > 1 and not dist.is_initialized(), datetime.timedelta(seconds=patience)
    if first:                                            # the store before all else: it knows which error was the first
        _store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        # or processes that torchrun has started again may find the addresses of the dead
        _store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), _store)
    if world > 1 and visible != "" and (visible is None or "," in visible):      # "": no GPU is wanted; one: it is set already
        # each process sees its own GPU only, as cuda:0, for vLLM in it takes the first it sees; before CUDA is touched
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local) if visible is None else (visible.split(",") + ["-1"] * local)[local]
        if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
            raise UserError(f"process {local} on this machine has no GPU; lower --nproc_per_node to the number of GPUs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if first:
        if device.type == "cuda":
            torch.cuda.init()                            # or init_device_mesh takes GPU number LOCAL_RANK, of the one it sees
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=_store, rank=rank,
                                world_size=world, timeout=patience)
    return rank, world, device


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """In place over all ranks; alone, the tensor as it is (vLLM makes a group of one, for the GPU only)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


_signal = [0, 0.0]                                       # the first that came, and when


def catch_signals():
    """
    From now on SIGTERM and SIGINT are noted for `signal_received`. A second one ends the process at once, unless it follows
    within a second: schedulers signal torchrun and its processes, and torchrun passes its own on. A thread does this, for
    Python runs handlers in the main one, and that may hang in a collective.
    """
    def watch():
        while number := os.read(reading, 1)[0]:
            if number not in stops:
                continue
            if _signal[0] and time.monotonic() > _signal[1] + 1:
                os._exit(128 + number)
            if not _signal[0]:
                _signal[:] = number, time.monotonic()

    def in_fork():                                       # it has the pipe too, and no thread
        signal.set_wakeup_fd(-1)
        for number in stops:
            signal.signal(number, signal.SIG_DFL)

    _signal[0], stops = 0, (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is threading.main_thread() and "signals" not in {t.name for t in threading.enumerate()}:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)                    # gets the number of each signal that has a handler in Python
        for number in stops:
            signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=in_fork)
        threading.Thread(target=watch, name="signals", daemon=True).start()


def signal_received():
    """The number of the signal that any rank has received, or 0. All ranks call it: they stop together, or none does."""
    return int(all_reduce(torch.tensor(float(_signal[0])), dist.ReduceOp.MAX).item())


def end_by_signal(number, saved):
    """Leave together, with the exit code of a program that died of this signal: what comes after it must not start."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{signal.Signals(number).name}: {saved}", flush=True)
    all_reduce(torch.zeros(1))                           # torchrun ends all with the first that ends
    sys.exit(128 + number)


def derive_seed(*parts):
    """A 63-bit seed from ints and strings: seeds belong to prompts, not to ranks or batches."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def prompt_order(n, start, count, seed):
    """Indices [start, start + count) of the endless stream of epochs, each a permutation of n: no cursor to save."""
    order = []
    while len(order) < count:
        epoch, offset = divmod(start + len(order), n)
        order += _epoch(n, seed, epoch)[offset:]
    return order[:count]


@functools.lru_cache(maxsize=2)
def _epoch(n, seed, epoch):
    return random.Random(derive_seed(seed, "epoch", epoch)).sample(range(n), n)


# ------------------------------------------------------------------------------------------------------------- prompts

def load_problems(path):
    """
    Rows {"problem", "answer", "solution"} (str, str | None, str | None) of a JSONL file. GSM8K's {"question", "answer"}, whose
    answer is a worked solution ending in "#### 42", is read as well. Raises UserError naming file and line.
    """
    if not Path(path).is_file():
        raise UserError(f"no prompt file {path}; it should be JSONL, {{\"problem\": ..., \"answer\": ...}} on each line")
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_read_problem(line, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not rows:
        raise UserError(f"{path} holds no problems; each line should be {{\"problem\": ..., \"answer\": ...}}")
    return rows


def _read_problem(line, where):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
    row = row if isinstance(row, dict) else {}
    problem, answer, solution = row.get("problem", row.get("question")), row.get("answer"), row.get("solution")
    if not isinstance(problem, str) or not problem.strip():
        raise UserError(f"{where}: no \"problem\" or \"question\" text; found the keys {sorted(row)}")
    if not isinstance(answer, (str, int, float, type(None))):
        raise UserError(f"{where}: \"answer\" is a {type(answer).__name__}; it must be text or a number")
    if not isinstance(solution, str | None):
        raise UserError(f"{where}: \"solution\" is a {type(solution).__name__}; it must be text")
    if isinstance(answer, str) and "####" in answer:
        solution, answer = answer, answer.split("####")[-1].strip()
    return {"problem": problem, "answer": None if answer is None else str(answer), "solution": solution}


def encode_chat(tokenizer, messages):
    """Token ids of a conversation [{"role", "content"}] through the chat template, ready for the answer."""
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; add a chat_template.jinja beside it")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def encode_prompt(tokenizer, problem):
    """Token ids of one user message, ready for the answer."""
    return encode_chat(tokenizer, [{"role": "user", "content": problem}])


def usable_prompts(path, problems, tokenizer, horizon, positions, vocab_size, verbose):
    """{index: prompt ids} of the problems that leave room for the horizon; the others are counted."""
    prompts = {i: encode_prompt(tokenizer, problem["problem"]) for i, problem in enumerate(problems)}
    usable = {i: ids for i, ids in prompts.items() if len(ids) + horizon <= positions}
    if not usable:
        raise UserError(f"{path}: no usable prompt: {horizon} new tokens and a prompt of {min(map(len, prompts.values()))} or "
                        f"more pass max_position_embeddings={positions}; lower max_new_tokens, eval_max_new_tokens or horizons")
    if (largest := max(map(max, usable.values()))) >= vocab_size:
        raise UserError(f"{path}: the chat template writes id {largest}, the smaller vocabulary ends at {vocab_size - 1}; "
                        f"choose models of one family")
    if verbose and len(usable) < len(prompts):
        print(f"warning: {path}: {len(prompts) - len(usable)} of {len(prompts)} prompts skipped: with {horizon} new tokens "
              f"they pass max_position_embeddings={positions}")
    return usable


# ----------------------------------------------------------------------------------------------- models and tokenizers

def load_tokenizer(path):
    """The tokenizer of a local folder or hub name. Raises UserError when it is missing."""
    _check_model_path(path, "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read a tokenizer there: {first_line(error)}") from error


def check_tokenizers(a, b, whose, others):
    """
    Two tokenizers are compatible when they map the same ids to the same bytes; end-of-text id, template and embedding padding
    may differ, and one may have added tokens that the other lacks. Raises UserError naming the first differing id.
    """
    a, b = ({i: token for token, i in t.get_vocab().items()} for t in (a, b))
    for i in sorted(a.keys() & b.keys()):
        if a[i] != b[i]:
            raise UserError(f"incompatible tokenizers: id {i} is {a[i]!r} for {whose} and {b[i]!r} for {others}; choose two "
                            f"models of one family")
    if (missing := min(len(a), len(b)) - len(a.keys() & b.keys())) > 0:
        raise UserError(f"incompatible tokenizers: {missing} ids of the smaller one ({len(a)} for {whose}, {len(b)} for "
                        f"{others}) are unknown to the other; choose two models of one family")


def load_model(path, dtype, device="cpu"):
    """A causal LM in eval mode (no dropout), in `dtype`. UserError when it is missing, damaged, or its head is not linear."""
    _check_model_path(path)
    check_weights(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot load a model there: {first_line(error)}") from error
    if info["missing_keys"]:
        raise UserError(f"{path}: the checkpoint lacks {sorted(info['missing_keys'])[0]}; its weights would be random")
    check_head(model, path)
    return model.to(device).eval()


def check_weights(path):
    """UserError where `path` is a checkpoint of ours whose weights are not what was saved."""
    ours = all((Path(path) / name).is_file() for name in ("manifest.json", "train_state.json"))
    if ours and (why := damage(Path(path), "model*")):
        raise UserError(f"{path} is damaged ({why}): take another checkpoint; if you changed it yourself, delete its "
                        f"manifest.json")


def check_head(model, name):
    """The loss is taken from hidden states, so logits must be `hidden @ W.T` and nothing more."""
    found = [key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")
             if getattr(model.config, key, None) not in (None, 1.0)]
    if found or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{name}: its LM head has a {(found or ['bias'])[0]}; only logits = hidden @ W.T is supported")


def _check_model_path(path, file="config.json"):
    is_hub_name = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")) and not Path(path).parent.is_dir()
    if not is_hub_name and not (Path(path) / file).is_file():
        raise UserError(f"no model folder {path}: it has no {file}; give a folder, or a hub name such as Qwen/Qwen3-0.6B")


alive = []                                               # vLLM engines in this process


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop_ids(generation_config, tokenizer):
    """Every id that ends a response: all of generation_config.eos_token_id, else the tokenizer's."""
    ids = generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise UserError(f"{tokenizer.name_or_path}: neither generation_config.json nor the tokenizer has an eos_token_id")
    return [ids] if isinstance(ids, int) else list(ids)


def fingerprint(items):
    """16 hex digits of a dict's keys and values; tensors count by their bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for key, value in sorted(items.items()):
        digest.update(f"{key} ".encode())
        digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def load_model_config(path):
    """config.json of a local folder or hub name."""
    _check_model_path(path)
    return AutoConfig.from_pretrained(path)


def model_revision(path):
    """Which weights: the hub's commit, or for a folder a fingerprint of its weight files (sizes, first and last 64 kB)."""
    if not Path(path).is_dir():
        return Path(cached_file(path, "config.json")).parent.name
    parts = {}
    for file in sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")]):
        if file.name != "optimizer.safetensors":
            with open(file, "rb") as f:
                head, size = f.read(1 << 16), f.seek(0, os.SEEK_END)
                f.seek(max(0, size - (1 << 16)))
                parts[file.name] = (size, head, f.read())
    return fingerprint(parts)


def forward_flops(config, lengths):
    """
    FLOPs of one forward over sequences of these lengths, multiply-add = 2 (paper, appendix H.1): dense layers and the LM head
    at every token, plus causal attention. Counts the real shapes (the paper takes heads x head_dim = H for every model).
    """
    hidden, (q_size, kv_size) = config.hidden_size, attention_sizes(config)
    layer = 2 * hidden * (q_size + 2 * kv_size) + 2 * q_size * hidden + 6 * hidden * config.intermediate_size
    dense = config.num_hidden_layers * layer + 2 * hidden * config.vocab_size
    attention = config.num_hidden_layers * 2 * q_size    # a token attends to half the sequence on average: 4 Hq L / 2
    return sum(n * (dense + attention * n) for n in lengths)


def attention_sizes(config):
    """Sizes of the queries and of the keys of a layer: heads x head_dim, key-value heads x head_dim."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim


def parameter_count(config):
    """Of a causal LM, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def estimate_memory(cfg, kind, student, writer, others, horizon, world=1):
    """
    {part: bytes} of training on one of `world` devices. student, writer: configs of the model that learns and of the one that
    writes with engine `kind`; others: {name: (config, bytes a weight)} besides. Parts "rollouts: " and "update: " are not
    there together; the last entry is the larger sum. Activations: what autograd keeps of a micro-batch, as measured for Qwen3.
    """
    size, n, layers = getattr(torch, cfg.dtype).itemsize, parameter_count(student), student.num_hidden_layers
    shards = world if getattr(cfg, "fsdp", False) else 1
    (q, k), (_, written) = attention_sizes(student), attention_sizes(writer)
    layer = (24 * student.hidden_size + 16 * (student.intermediate_size + q + k) if size == 4 else
             26 * student.hidden_size + 8 * student.intermediate_size + 10 * (q + k))
    token = layers * layer
    if cfg.gradient_checkpointing:                       # a layer's input; autocast leaves it in fp32
        token = layer + layers * student.hidden_size * (size if shards > 1 else 4)
    models = [(student, size), *others.values()]
    whole = 4 * gathered_at_once(student) + sum(size_ * gathered_at_once(config) for config, size_ in models)    # 4: gradients
    rollouts = {"rollouts: KV cache": int(cfg.kv_cache_gb * 1e9) if kind == "vllm" else
                2 * writer.num_hidden_layers * written * size * horizon * cfg.rollout_rows,
                "rollouts: the engine's weights": size * (
                    parameter_count(writer) + writer.tie_word_embeddings * writer.vocab_size * writer.hidden_size)
                if kind == "vllm" else size * parameter_count(writer) if shards > 1 else size * n if size < 4 else 0}
    update = {"update: activations of a micro-batch": cfg.max_tokens_per_microbatch * token,
              **({"update: weights gathered by FSDP": whole} if shards > 1 else
                 {"update: weights in bf16": 0 if size == 4 else 2 * n}),
              "update: logits of a chunk, gradient of the head": CHUNK_BYTES[torch.cuda.is_available()] +
              4 * student.vocab_size * student.hidden_size}
    always = {"student: fp32 weights, gradients, Adam": 16 * n // shards,
              **{name: size_ * parameter_count(config) // shards for name, (config, size_) in others.items()}}
    return always | rollouts | update | {
        "at most at a time": sum(always.values()) + max(sum(rollouts.values()), sum(update.values()))}


def gathered_at_once(config):
    """Weights of a sharded model that are whole at a time: embedding and head, a layer, and the next one on its way."""
    vocabulary = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return vocabulary + 2 * (parameter_count(config) - vocabulary) // config.num_hidden_layers


def measure_speeds(device, dtype, world):
    """
    What this device does now: {"flops" in a GEMM, "bytes" copied and "link" bytes between ranks, each a second; "launch":
    seconds of a small operation}. All ranks call it.
    """
    def seconds(work, repeats):
        times = []
        for _ in range(4):                               # the first warms up
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / repeats)
        return min(times[1:])
    n = 8192 if device.type == "cuda" else 512
    matrix, small = torch.ones(n, n, dtype=dtype, device=device), torch.ones(8, 8, dtype=dtype, device=device)
    block = torch.ones(4 * n * n, dtype=torch.float32, device=device)
    return {"flops": 2 * n ** 3 / seconds(lambda: matrix @ matrix, 2), "bytes": 8 * len(block) / seconds(block.clone, 2),
            "launch": seconds(lambda: torch.nn.functional.linear(small, small), 100),
            "link": 8 * len(block) * (world - 1) / world / seconds(lambda: all_reduce(block), 1) if world > 1 else math.inf}


def estimate_time(cfg, kind, student, writer, others, horizon, world, rows, speeds, mean=None):
    """
    {part: seconds} of a step, roughly: `rows` responses over `world` devices, the longest of `horizon` tokens and all of `mean`
    on average (None: of the horizon). Decoding reads weights and KV cache once a token, GEMMs in training reach 0.4 of
    speeds["flops"], a layer of transformers is 100 small operations, a token of vLLM 2 ms besides.
    """
    size, n, shards = getattr(torch, cfg.dtype).itemsize, parameter_count(student), world if getattr(cfg, "fsdp", False) else 1
    rows, mean, share = -(-rows // world), mean or horizon, (world - 1) / world
    forwards = -(-rows * mean // cfg.max_tokens_per_microbatch)

    def forward(config, times):
        return times * (forward_flops(config, [mean] * rows) / (0.4 * speeds["flops"]) +
                        forwards * 100 * config.num_hidden_layers * speeds["launch"])
    together = min(rows, cfg.rollout_rows)
    cache = 2 * writer.num_hidden_layers * attention_sizes(writer)[1] * size * together * mean / 2
    token = (size * parameter_count(writer) + cache) / speeds["bytes"] + (
        0.002 if kind == "vllm" else 100 * writer.num_hidden_layers * speeds["launch"])
    moved = 2 * share * 4 * n
    if shards > 1:                                       # gathered forward and backward, gradients scattered in fp32
        moved = share * (forwards * (2 * size + 4) * n + size * parameter_count(writer) +
                         forwards * sum(size_ * parameter_count(config) for config, size_ in others.values()))
    return {"rollouts": horizon * -(-rows // together) * token,
            "teacher and reference": sum(forward(config, 1) for config, _ in others.values()),
            "student": forward(student, 4 if cfg.gradient_checkpointing else 3), "between ranks": moved / speeds["link"],
            "optimizer": 28 * n / shards / speeds["bytes"]}


def print_estimate(cfg, kind, device, student, writer, others, horizon, world, rows):
    """
    Memory and time to expect for models at these paths, before anything is allocated. others: {name: (path, bytes a weight)};
    rows: responses in a step, over all `world` ranks. All ranks call it.
    """
    chief, speeds = int(os.environ.get("RANK", 0)) == 0, measure_speeds(device, getattr(torch, cfg.dtype), world)
    student, writer = load_model_config(student), load_model_config(writer)
    others = {name: (load_model_config(path), size) for name, (path, size) in others.items() if path}
    longest = max(horizon, cfg.eval_max_new_tokens if cfg.eval_every else 0)
    parts = estimate_memory(cfg, kind, student, writer, others, longest, world)
    has = f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f}" if device.type == "cuda" else ""
    if not chief:
        return
    print("memory to expect on each device, roughly")
    for name, size in parts.items():
        print(f"  {name:<48} {size / 1e9:8.3f} GB" + (has if name == "at most at a time" else ""))
    parts = estimate_time(cfg, kind, student, writer, others, horizon, world, rows, speeds)
    evaluations = cfg.max_steps // cfg.eval_every + 1 if cfg.eval_every else 0
    one = estimate_time(cfg, kind, student, student, {}, cfg.eval_max_new_tokens, world, cfg.eval_prompts * cfg.eval_samples,
                        speeds)["rollouts"] if evaluations else 0.0
    print("time to expect, roughly, were every response as long as allowed")
    for name, seconds in {**parts, "a step": sum(parts.values()), "an evaluation": one}.items():
        print(f"  {name:<48} {seconds:8.3f} s")
    print(f"  {f'{cfg.max_steps} steps, {evaluations} evaluations':<48} "
          f"{(cfg.max_steps * sum(parts.values()) + evaluations * one) / 3600:8.3f} h")
    link = f", between ranks {speeds['link'] / 1e9:.3g} GB/s" if world > 1 else ""
    print(f"  (measured: GEMM {speeds['flops'] / 1e12:.3g} TFLOP/s, memory {speeds['bytes'] / 1e9:.3g} GB/s{link})")


alive = []


# --------------------------------------------------------------------------------------------- forwards over responses

def base_model(model):
    """The part of a causal LM before its head; where FSDP shards it, by the method around which FSDP gathers weights."""
    return getattr(model, "sharded_base_model", model.base_model)


@contextlib.contextmanager
def gathered(model):
    """
    Inside, every rank holds the whole weights of a model sharded by FSDP: gathered once, not once a token, and ranks need not
    run equally many forwards. Any other model is left as it is.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.unshard()
        shard.set_reshard_after_forward(False, recurse=False)
    yield
    for shard in shards:
        shard.reshard()
        if shard is not model:                           # the root's weights stay after a forward, for the LM head
            shard.set_reshard_after_forward(True, recurse=False)


def microbatches(lengths, max_tokens):
    """
    Lists of indices, longest sequences first (so that memory peaks at once), each with rows x longest <= max_tokens after
    padding. A sequence longer than the budget makes a batch of its own.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def response_hidden(model, sequences, dtype=torch.float32):
    """
    Hidden states (N, H) in `dtype` (by autocast where the weights are wider; FSDP gathers them in it), after the final norm,
    that predict each response token of the (prompt, response) sequences, in order: positions len(prompt) - 1 ...
    len(prompt) + len(response) - 2.

    Padded on the right and run without a mask: under causal attention no real token sees the padding, and positions, never
    token ids, say what is a response.
    """
    device = model.device
    width = max(len(p) + len(r) for p, r in sequences)
    ids = torch.tensor([[*p, *r, *[0] * (width - len(p) - len(r))] for p, r in sequences], device=device)     # (B, T)
    with torch.autocast(device.type, dtype, enabled=model.dtype != dtype and not isinstance(model, FSDPModule)):
        hidden = base_model(model)(ids, use_cache=False).last_hidden_state                                    # (B, T, H)
    where = [row * width + len(p) - 1 + t for row, (p, r) in enumerate(sequences) for t in range(len(r))]
    return hidden.flatten(0, 1).index_select(0, torch.tensor(where, dtype=torch.long, device=device)).to(dtype)


# --------------------------------------------------------------------------------------------------- logs, checkpoints

def write_lines(path, rows, mode="a"):
    """Append rows as JSON lines, or with mode "w" replace the file whole. Numbers that are not finite become null."""
    def clean(x):
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x
    target = f"{path}.tmp" if mode == "w" else path
    try:
        with open(target, mode, encoding="utf-8") as file:
            file.write("".join(json.dumps(clean(row)) + "\n" for row in rows))
        os.replace(target, path)
    except OSError as error:
        why = error.strerror if Path(path).parent.is_dir() else "its folder has been removed"
        raise UserError(f"cannot write {path}: {why}; mend that and start again the same way, a training run with --resume: "
                        f"what was saved before is whole") from error


def read_lines(path):
    """JSON lines; a last line cut short by a crash is dropped."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def open_run(cfg, origin, state, rank, world):
    """
    Make out_dir, with run_config.json and a metrics.jsonl without what came after the checkpoint; print the config, and what
    differs from a resumed run's. Returns the path of metrics.jsonl. Every rank calls it; the first one writes.
    """
    if world > 1:
        dist.barrier()                                   # every rank has checked out_dir
    metrics_file = os.path.join(cfg.out_dir, "metrics.jsonl")
    if rank == 0:
        if cfg.overwrite and os.path.exists(cfg.out_dir):
            shutil.rmtree(os.path.realpath(cfg.out_dir))
        os.makedirs(cfg.out_dir, exist_ok=True)
        for leftover in Path(cfg.out_dir).glob(".step_*"):       # of a save that was cut short
            shutil.rmtree(leftover)
        _point(Path(cfg.out_dir), state.get("links", ()), f"step_{state['step']:06d}")      # a crash may have come before
        print_config(cfg, origin)
        for key, old in state.get("config", {}).items():     # of a resumed run
            now = json.loads(json.dumps(getattr(cfg, key)))      # as JSON has it: a tuple is a list there
            if key not in ("resume", "overwrite", "max_steps", "out_dir") and now != old:
                print(f"warning: {key}={getattr(cfg, key)!r} now, {old!r} when the checkpoint was written")
        with open(os.path.join(cfg.out_dir, "run_config.json"), "w") as file:
            json.dump(dataclasses.asdict(cfg), file, indent=1)
        done = read_lines(metrics_file) if os.path.exists(metrics_file) else []
        decided = state.get("closed") or state.get("rung_began") == state["step"]        # the gate at that step
        kept = [row for row in done if row["step"] < state["step"] or row["step"] == state["step"] and (
            "loss" in row or state["looked"] or "gate" in row and decided)]      # else its evaluation is to come again
        write_lines(metrics_file, kept, mode="w")
    return metrics_file


def log_evaluation(out_dir, step, name, metrics, records, chief):
    """What `evaluate` returned, to metrics.jsonl, samples_NAME_STEP.jsonl and the terminal."""
    if chief:
        write_lines(os.path.join(out_dir, "metrics.jsonl"), [{"step": step, "model": name, **metrics}])
        write_lines(os.path.join(out_dir, f"samples_{name}_{step:06d}.jsonl"), records, mode="w")
        k, (avg, passed) = metrics["k"], ("-" if metrics[key] is None else f"{metrics[key]:.3f}" for key in
                                          ("avg_at_k", "pass_at_k"))
        print(f"eval {step:>4} {name:<8} Avg@{k} {avg}  Pass@{k} {passed}  length {metrics['length']:.0f}  "
              f"entropy {metrics['entropy']:.3f}  cut {metrics['truncated']:.0%}", flush=True)


def print_row(columns, row, header):
    """One training step in 80 columns: every number in four characters. columns: {heading: key of row}, the step first."""
    def short(x):
        if x is None:
            return "-"
        text = f"{x:.3f}" if abs(x) < 10 else f"{x:.0f}"
        return text.removeprefix("0")[:4] if abs(x) < 1e4 else f"{x / 1000:.0f}k"
    if header:
        print(" ".join(f"{name:>4}" for name in columns))
    print(f"{row['step']:>4}", *[f"{short(row[key]):>4}" for key in list(columns.values())[1:]], flush=True)


class Timer:
    """
    Seconds since the last lap, summed by name, and the peak memory in it, GB: of this rank's tensors on a GPU, else of its
    process. On a GPU a lap waits for the device, so that they mean something.
    """

    def __init__(self, device, *names):
        self.device, self.laps = device, {f"{name}_seconds": 0.0 for name in names}
        self.peaks, self.now = {f"{name}_gb": peak_memory(device) * 0 for name in names}, time.perf_counter()

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[f"{name}_seconds"] += now - self.now
        self.peaks[f"{name}_gb"] = max(self.peaks[f"{name}_gb"], peak_memory(self.device))
        self.now = now

    def summary(self):
        """Both: the seconds of this rank, the peaks of the rank that had the largest. All ranks call it."""
        peaks = all_reduce(torch.tensor([*self.peaks.values()]), dist.ReduceOp.MAX).tolist()
        return self.laps | dict(zip(self.peaks, peaks))


def peak_memory(device):
    """GB, since the last call; NaN where the system does not tell."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")    # Linux: the peak begins anew
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e9
    except (OSError, TypeError):
        return math.nan


def prepare_out_dir(out_dir, resume, overwrite, inputs=()):
    """
    Check `out_dir` before any work: returns the checkpoint to go on from, or None. `inputs`: paths read. All ranks call it, and
    the first one looks.
    """
    path, step = Path(out_dir), -1
    if not dist.is_initialized() or dist.get_rank() == 0:
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other: go on with the run, or throw it away")
        if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0":
            if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
                raise UserError(f"--max-restarts={restarts}: on several machines torchrun's agents count restarts each for "
                                f"itself; leave it out, and give the same command again with --resume")
            if not resume:
                raise UserError(f"--max-restarts={restarts} needs --resume, or a restart would find that {out_dir} exists, or "
                                f"delete it; --resume begins where there is nothing to go on from")
        if path.exists() and not path.is_dir():
            raise UserError(f"out_dir={str(path)!r} is a file; choose another name")
        if path.is_dir() and any(path.iterdir()):
            if not (path / "run_config.json").is_file():
                raise UserError(f"out_dir={str(path)!r} has no run_config.json: it is no run to resume or to overwrite; choose "
                                f"another name")
            if not overwrite and not resume:
                raise UserError(f"out_dir={str(path)!r} exists: --resume goes on with that run, --overwrite deletes it")
            for name in inputs if overwrite else ():
                if name and path.resolve() in Path(name).resolve().parents:
                    raise UserError(f"--overwrite would delete {name}, which this run reads; choose another out_dir")
        step = newest_checkpoint(path) if resume else -1
    step = int(all_reduce(torch.tensor(step), dist.ReduceOp.MAX).item())
    checkpoint = path / f"step_{step:06d}"
    if step >= 0 and not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not on this machine: all of them need the same out_dir")
    return checkpoint if step >= 0 else None


def save_checkpoint(out_dir, model, tokenizer, optimizer, state, keep, links=()):
    """
    Write out_dir/step_000040, from state["step"]: an ordinary model folder with its tokenizer, and beside it
    optimizer.safetensors, train_state.json and manifest.json with the SHA-256 of every file. It does not depend on the number
    of ranks: all of them call it, and the first writes what is gathered, to a temporary name that is renamed when everything is
    on the disk. `last` and the `links` ("best", "stable") point to it; what no link points to stays while among the newest
    `keep`. UserError when it cannot be written; nothing is left of it then.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    moments = get_optimizer_state_dict(model, optimizer, options=options) if optimizer.state else {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        _write_checkpoint(Path(out_dir), model, tokenizer, weights, moments, state, keep, [*links, "last"])
    all_reduce(torch.zeros(1))                           # others would take the wait for a hang of something else


def _write_checkpoint(out_dir, model, tokenizer, weights, moments, state, keep, links):
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}         # a tied tensor once
    name = f"step_{state['step']:06d}"
    temporary, old = out_dir / f".{name}.tmp", out_dir / f".{name}.old"
    try:
        if not out_dir.is_dir():
            raise FileNotFoundError("its folder has been removed")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict={key: value for key, value in weights.items() if key in own})
        tokenizer.save_pretrained(temporary)
        save_file({f"{name_}/{key}": value.contiguous() for name_, values in moments.get("state", {}).items()
                   for key, value in values.items()}, temporary / "optimizer.safetensors")
        (temporary / "train_state.json").write_text(json.dumps(state | {"links": links}, indent=1))
        digests = {str(path.relative_to(temporary)): _digest(path) for path in sorted(temporary.rglob("*")) if path.is_file()}
        (temporary / "manifest.json").write_text(json.dumps({"sha256": digests}, indent=1))
        for path in [*temporary.rglob("*"), temporary]:  # a disk that is full, or a network, may say so only now
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if (out_dir / name).exists():                    # of this run, resumed
            os.replace(out_dir / name, old)
        os.replace(temporary, out_dir / name)
        shutil.rmtree(old, ignore_errors=True)
        _point(out_dir, links, name)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError | safetensors.SafetensorError) and type(error) is not Exception:    # as tokenizers do
            raise
        raise UserError(f"cannot save {out_dir / name}: {first_line(error)}; checkpoints before it are whole: make room, then "
                        f"--resume") from error
    pointed = {os.readlink(out_dir / link) for link in ("last", "best", "stable") if (out_dir / link).is_symlink()}
    for _, older in _checkpoints(out_dir)[:-keep]:
        if older.name not in pointed:
            shutil.rmtree(older, ignore_errors=True)     # somebody may be reading it


def _point(out_dir, links, name):
    for link in links:
        (out_dir / f".{link}.tmp").unlink(missing_ok=True)
        os.symlink(name, out_dir / f".{link}.tmp")
        os.replace(out_dir / f".{link}.tmp", out_dir / link)


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint, pattern="*"):
    """What is wrong with the files of a checkpoint that match, by its manifest; "" where they are whole."""
    try:
        for name, digest in json.loads((checkpoint / "manifest.json").read_text())["sha256"].items():
            path = checkpoint / name
            if path.match(pattern) and not (path.is_file() and _digest(path) == digest):
                return f"{name} is not what was saved"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {first_line(error)}"
    return ""


def newest_checkpoint(out_dir):
    """
    The step of the newest whole checkpoint; -1 where nothing was saved yet. Damaged ones are named, and passed over. UserError
    when all are damaged.
    """
    for old in out_dir.glob(".step_*.old"):              # killed between the two renames of a save
        if not (out_dir / old.stem[1:]).exists():
            os.replace(old, out_dir / old.stem[1:])
    wrong = []
    for step, folder in _checkpoints(out_dir)[::-1]:
        if not (why := damage(folder)):
            for line in wrong:
                print(f"warning: {line}: going on from step {step}")
            return step
        wrong.append(f"{folder} is damaged ({why})")
    if wrong:
        raise UserError(f"{'; '.join(wrong)}: no whole checkpoint to resume from; start anew with --overwrite")
    print(f"no checkpoint in {out_dir} yet: from the start")
    return -1


def _checkpoints(out_dir):
    """[(step, folder)], the oldest first."""
    return sorted((int(name[1]), path) for path in out_dir.glob("step_*") if (name := re.fullmatch(r"step_(\d+)", path.name)))


def read_train_state(checkpoint, script):
    """train_state.json of a checkpoint this script wrote, or a UserError."""
    state = json.loads((checkpoint / "train_state.json").read_text())
    if state.get("script") != script:
        raise UserError(f"{checkpoint} was written by {state.get('script')!r}, not by {script!r}; "
                        f"start from its weights instead: --student={checkpoint}")
    return state


def load_optimizer(checkpoint, model, optimizer):
    """Restore AdamW's moments, exactly; sharded ones from the whole. Raises UserError when the file is another model's."""
    path, by_parameter = Path(checkpoint) / "optimizer.safetensors", {}
    try:
        with safetensors.safe_open(path, "pt") as file:          # a tensor at a time: every rank reads it
            if not file.keys():                          # written before the first update
                return
            for i, (name, parameter) in enumerate(model.named_parameters()):
                values = {key: file.get_tensor(f"{name}/{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
                if values["exp_avg"].shape != parameter.shape:
                    raise UserError(f"{path} belongs to another model: {name} is {tuple(values['exp_avg'].shape)} there and "
                                    f"{tuple(parameter.shape)} here")
                by_parameter[i] = {key: distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                                                          parameter.placements, src_data_rank=None)
                                   if isinstance(parameter, DTensor) and value.ndim else value for key, value in values.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged or belongs to another model: {first_line(error)}") from error
    optimizer.load_state_dict({"state": by_parameter, "param_groups": optimizer.state_dict()["param_groups"]})


def run(main, doc, cls):
    """Call main(argv) for a script: --help, mistakes as one line, and of several processes' errors only the first."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(doc, inspect.getsource(cls), sep="\n")
        return
    together, code = int(os.environ.get("WORLD_SIZE", 1)) > 1, 0
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:                            # outside a training loop, which would finish its step
        sys.stdout.flush()
        os._exit(128 + signal.SIGINT)
    except Exception as error:                           # whatever it is, the other processes must not wait for this one
        if not _first_to_fail():
            time.sleep(5)                                # torchrun ends all with the first that ends: let that be the cause
        elif isinstance(error, UserError | OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif together and isinstance(error, RuntimeError) and re.search(
                r"(?is)(?:gloo|NCCL|ProcessGroup).*(?:closed|reset|refused|remote|timed? ?out)", str(error)):
            print(f"error: another process has ended, or is silent for longer than a rank waits ({first_line(error)[:200]})",
                  file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        if together or isinstance(error, EngineError):   # an orderly end would wait for what hangs
            sys.stdout.flush()
            os._exit(1)
        sys.exit(1)
    if dist.is_initialized() and not alive:             # vLLM's exit takes them down itself
        dist.destroy_process_group()
        sys.stdout.flush()                               # gloo's threads outlive it with sharded weights: one of them in
        sys.stderr.flush()                               # need of the interpreter at its end would abort the process
        os._exit(code or 0)
    sys.exit(code)


def _first_to_fail():
    """True for the first process that asks: the errors after it are mostly its consequences."""
    if _store is None:                                   # too early to know of each other; then all meet the same error
        return os.environ.get("RANK", "0") == "0"
    try:
        return _store.add("failed", 1) == 1
    except RuntimeError:                                 # torchrun, which keeps the store, has ended
        return True
