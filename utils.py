"""
What more than one stage needs: config files, processes and seeds, prompts, models, response-only
forwards, checkpoints and logs.

Shape suffixes: B sequences in a micro-batch, T tokens in the longest of them, N response tokens,
H hidden size, V vocabulary. A *sequence* is a pair (prompt ids, response ids), two lists of ints.
Tokens go in and tokens come out: no response is ever decoded and encoded again.
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
import runpy
import shutil
import signal
import sys
import time
import traceback
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()


class UserError(ValueError):
    """A mistake the user can mend: one line that names the value, the limit and the remedy."""


def first_line(error):
    """The first line of an exception's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def reading(what):
    """Around the reading of a user's file: what goes wrong there becomes a UserError."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot read {what}: {first_line(error)}") from error


# ------------------------------------------------------------------------------------------ config

def load_config(cls, argv):
    """
    Defaults of the dataclass `cls` < assignments in Python files, in their order < --key=value.

    In a file `_names`, modules and functions are ignored, and `from configs.other import *` is
    inheritance. `--key` alone sets a boolean. Returns (config, {key: where its value came from}).
    Raises UserError on an unknown key (naming the nearest), a wrong type, or an unreadable file.
    """
    kinds, values, origin = typing.get_type_hints(cls), {}, {}
    for arg in sorted(argv, key=lambda arg: arg.startswith("--")):
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            given, where = {key: text if equals else "True"}, "command line"
        else:
            given, where = _run_config_file(arg), arg
        for key, value in given.items():
            if key not in kinds:
                near = difflib.get_close_matches(key, kinds, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
                raise UserError(f"{where}: unknown key {key!r}; {hint}")
            values[key] = _cast(key, value, kinds[key], where)
            origin[key] = where
    return cls(**values), origin


def _run_config_file(path):
    """{name: value} of its assignments."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}; those of this repository are in configs/")
    try:
        names = runpy.run_path(path)
    except Exception as error:  # whatever a user's file may raise is reported with its line
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = getattr(error, "filename", None) or frame.filename
        line = getattr(error, "lineno", frame.lineno)
        raise UserError(f"{where}, line {line}: {type(error).__name__}: {error}") from error
    hidden = types.ModuleType | types.FunctionType | type
    return {key: value for key, value in names.items()
            if not key.startswith("_") and not isinstance(value, hidden)}


def _cast(key, value, kind, where):
    """`value` as the annotated type: an int fits a float, a list a tuple."""
    options = typing.get_args(kind) or (kind,)  # the strings of a Literal, the types of a union
    if where == "command line":
        if value == "None" and type(None) in options:
            value = None
        elif str not in options and value not in options:
            with contextlib.suppress(ValueError, SyntaxError):
                value = (float if float in options else ast.literal_eval)(value)
    if type(value) is int and float in options:
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    fits = type(value) in options or isinstance(value, str) and value in options
    if typing.get_origin(kind) is tuple:
        fits = isinstance(value, tuple) and all(type(item) in options for item in value)
    if not fits:
        wanted = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
        raise UserError(f"{where}: {key}={value!r} is a {type(value).__name__}; "
                        f"{key} must be {wanted.replace('typing.Literal', 'one of ')}")
    return value


_RANGES = (  # what a key of this name may be, in whichever config it stands; None always passes
    ("must be at least 1", lambda x: x >= 1, """
        max_new_tokens rollout_rows max_tokens_per_microbatch num_prompts samples_per_prompt
        num_problems samples_per_problem shard_bytes shard_sequences expected_length window
        bootstrap eval_prompts eval_samples eval_max_new_tokens steps_per_horizon gate_prompts
        save_every keep check_sync_every batch_size prompts_per_step updates_per_batch"""),
    ("must not be negative", lambda x: x >= 0, """
        max_steps warmup_steps eval_every top_k temperature eval_temperature weight_decay
        learning_rate entropy_floor kl_coef clip_high"""),
    ("must be in (0, 1]; 1 keeps every token", lambda x: 0 < x <= 1, "top_p eval_top_p"),
    ("must be positive", lambda x: x > 0, """
        max_grad_norm collective_timeout kv_cache_gb rollout_timeout max_logprob_gap"""),
)


def need(ok, cfg, key, limit):
    """UserError that names a key of the config, its value and the limit, unless `ok`."""
    if not ok:
        raise UserError(f"{key}={getattr(cfg, key)!r}: {limit}")


def check_ranges(cfg):
    """UserError where a key of this config is outside the range that its name has everywhere."""
    for limit, allowed, keys in _RANGES:
        for key in keys.split():
            value = getattr(cfg, key, None)
            need(value is None or allowed(value), cfg, key, limit)


def print_config(cfg, origin):
    """One line a key; what differs from the default is marked with where it came from."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        mark = f"  <- {origin[field.name]}" if value != field.default else ""
        print0(f"  {field.name:<26} {value!r}{mark}")


# ----------------------------------------------------------------------------- processes and seeds

RANK = int(os.environ.get("RANK", 0))  # of this process among the WORLD that torchrun has started
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def init_processes(patience=7200.0):
    """
    (rank, world size, device), under torchrun or alone; NCCL between GPUs, gloo between CPUs.
    patience: seconds that a rank waits for the others before it ends.
    """
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if WORLD > 1 and gpus > 1:
        # Each process sees its own GPU only, as cuda:0: a vLLM in it takes the first it sees.
        if local >= gpus:
            raise UserError(f"process {local} on this machine has no GPU; lower --nproc_per_node "
                            f"to the {gpus} GPUs")
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = names.split(",")[local]
    device = torch.device("cuda" if gpus else "cpu")
    if WORLD > 1 and not dist.is_initialized():
        if gpus:
            torch.cuda.init()  # or a device mesh takes GPU number LOCAL_RANK, of the one it sees
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo",
                                timeout=datetime.timedelta(seconds=patience))
    return RANK, WORLD, device


def print0(*args):
    """Print on the first rank only."""
    if RANK == 0:
        print(*args, flush=True)


@contextlib.contextmanager
def _with_others():
    """Around a collective: where it fails, the fault is another process's."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"another process has ended, or is silent for longer than a rank waits "
                        f"({first_line(error)[:200]})") from error


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """In place over all ranks; alone, the tensor as it is."""
    if WORLD > 1:
        with _with_others():
            dist.all_reduce(tensor, op)
    return tensor


def all_gather(items):
    """The lists of all ranks, one after the other, on every rank."""
    parts = [items] * WORLD
    if WORLD > 1:
        with _with_others():
            dist.all_gather_object(parts, items)
    return sum(parts, [])


def barrier():
    """No rank goes on before all have come here."""
    all_reduce(torch.zeros(1))


_noted = []  # the first signal that came, and when


def catch_signals():
    """
    From now on the first SIGTERM or SIGINT is only noted, for `signal_received`. A second one has
    its default effect, unless it comes within a second: a scheduler signals torchrun and its
    processes, and torchrun passes its own on.
    """
    def note(number, frame):
        if _noted and time.monotonic() > _noted[1] + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _noted[:] = _noted or (number, time.monotonic())

    _noted.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def signal_received():
    """The number of the signal that any rank has noted, or 0: all ranks stop together, or none."""
    return int(all_reduce(torch.tensor([*_noted[:1], 0.0]).max(), dist.ReduceOp.MAX))


def end_by_signal(number, step):
    """Leave together, with the exit code of a program that died of this signal."""
    print0(f"{signal.Signals(number).name}: step {step} is saved: --resume goes on")
    barrier()  # torchrun ends all with the first that ends
    sys.exit(128 + number)


def derive_seed(*parts):
    """A 63-bit seed from ints and strings: seeds belong to prompts, not to ranks or batches."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def prompt_order(n, start, count, seed):
    """
    Indices [start, start + count) of an endless stream of epochs, each a permutation of range(n).
    It follows from the step alone, so there is no cursor to save.
    """
    return [_epoch(n, seed, i // n)[i % n] for i in range(start, start + count)]


@functools.lru_cache(maxsize=2)
def _epoch(n, seed, epoch):
    return random.Random(derive_seed(seed, "epoch", epoch)).sample(range(n), n)


# ----------------------------------------------------------------------------------------- prompts

def load_problems(path):
    """
    Rows {"problem", "answer", "solution"} (str, str | None, str | None) of a JSONL file. GSM8K's
    {"question", "answer"}, whose answer is a worked solution ending in "#### 42", is read as well.
    Raises UserError that names the file and the line.
    """
    form = 'JSONL, {"problem": ..., "answer": ...} on each line'
    if not Path(path).is_file():
        raise UserError(f"no prompt file {path}; it should be {form}")
    rows = []
    with reading(path):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with reading(f"{path}, line {number}"):
                rows.append(_problem(dict(json.loads(line))))
    if not rows:
        raise UserError(f"{path} holds no problems; it should be {form}")
    return rows


def _problem(row):
    problem, answer = row.get("problem", row.get("question")), row.get("answer")
    solution = row.get("solution")
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f'no "problem" or "question" text; found the keys {sorted(row)}')
    if not isinstance(answer, str | int | float | None) or not isinstance(solution, str | None):
        raise ValueError('"answer" must be text or a number, "solution" text')
    if isinstance(answer, str) and "####" in answer:
        solution, answer = answer, answer.split("####")[-1].strip()
    answer = None if answer is None else str(answer)
    return {"problem": problem, "answer": answer, "solution": solution}


def encode_chat(tokenizer, messages):
    """Token ids of a conversation [{"role", "content"}] by the chat template, ready to answer."""
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; "
                        f"add a chat_template.jinja beside it")
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def encode_prompt(tokenizer, problem):
    """Token ids of one user message, ready to be answered."""
    return encode_chat(tokenizer, [{"role": "user", "content": problem}])


def usable_prompts(path, problems, tokenizer, horizon, positions, vocab_size):
    """
    {index: prompt ids} of the problems that leave room for `horizon` new tokens among `positions`;
    the others are counted in a warning. UserError where none does, or an id is past the vocabulary.
    """
    prompts = [encode_prompt(tokenizer, row["problem"]) for row in problems]
    usable = {i: ids for i, ids in enumerate(prompts) if len(ids) + horizon <= positions}
    if not usable:
        shortest = min(map(len, prompts))
        raise UserError(
            f"{path}: no usable prompt: {horizon} new tokens and a prompt of {shortest} or more "
            f"pass max_position_embeddings={positions}; lower max_new_tokens, eval_max_new_tokens "
            f"or horizons")
    largest = max(map(max, usable.values()))
    if largest >= vocab_size:
        raise UserError(f"{path}: the chat template writes id {largest}, the smaller vocabulary "
                        f"ends at {vocab_size - 1}; choose models of one family")
    if len(usable) < len(prompts):
        print0(f"warning: {path}: {len(prompts) - len(usable)} of {len(prompts)} prompts skipped: "
               f"with {horizon} new tokens they pass max_position_embeddings={positions}")
    return usable


# --------------------------------------------------------------------------- models and tokenizers

def load_tokenizer(path):
    """The tokenizer of a local folder or hub name. Raises UserError when it is missing."""
    _check_model_path(path, "tokenizer_config.json")
    with reading(f"a tokenizer in {path}"):
        return AutoTokenizer.from_pretrained(path)


def check_tokenizers(a, b, whose, others):
    """
    UserError unless two tokenizers map the same ids to the same text. End-of-text id, template and
    padding of the embeddings may differ, and one may have added tokens that the other lacks.
    """
    a, b = ({i: token for token, i in t.get_vocab().items()} for t in (a, b))
    for i in sorted(min(a, b, key=len)):
        if a.get(i) != b.get(i):
            raise UserError(f"incompatible tokenizers: id {i} is {a.get(i)!r} for {whose} and "
                            f"{b.get(i)!r} for {others}; choose two models of one family")


def load_model(path, dtype, device="cpu"):
    """
    A causal LM in eval mode (no dropout), in `dtype`. UserError when it is missing or damaged, or
    when its logits are more than hidden states times the LM head, for the losses need no more.
    """
    _check_model_path(path)
    with reading(f"a model in {path}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"it lacks {min(info['missing_keys'])}, which would be random")
    check_head(model, path)
    return model.to(device).eval()


def check_head(model, name):
    """UserError unless logits are `hidden @ W.T` and nothing more."""
    found = [key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")
             if getattr(model.config, key, None) not in (None, 1.0)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        found = ["bias"]
    if found:
        raise UserError(f"{name}: its LM head has a {found[0]}; only logits = hidden @ W.T is "
                        f"supported")


def lm_head(model):
    """W (V, H) of logits = hidden @ W.T."""
    return model.get_output_embeddings().weight


def _check_model_path(path, file="config.json"):
    folder = Path(path)
    is_hub_name = len(folder.parts) == 2 and not folder.parent.is_dir()
    if not is_hub_name and not (folder / file).is_file():
        raise UserError(f"no model folder {path}: it has no {file}; give a folder, or a hub name "
                        f"such as Qwen/Qwen3-0.6B")


def load_model_config(path):
    """config.json of a local folder or hub name."""
    _check_model_path(path)
    return AutoConfig.from_pretrained(path)


def stop_ids(generation_config, tokenizer):
    """The ids that end a response: all of generation_config.eos_token_id, else the tokenizer's."""
    ids = generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise UserError(f"{tokenizer.name_or_path}: neither generation_config.json nor the "
                        f"tokenizer has an eos_token_id")
    return [ids] if isinstance(ids, int) else list(ids)


# ------------------------------------------------------------- forwards over responses, gradients

def base_model(model):
    """
    The part of a causal LM before its head; where FSDP shards the model, the method around which
    FSDP gathers the weights.
    """
    return getattr(model, "sharded_base_model", model.base_model)


def microbatches(lengths, max_tokens):
    """
    Lists of indices, longest sequences first so that memory peaks at once, each with
    rows x longest <= max_tokens after padding. A sequence longer than that is alone in its list.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def response_hidden(model, sequences, dtype=torch.float32):
    """
    Hidden states (N, H) in `dtype`, after the final norm, that predict the response tokens of the
    (prompt, response) pairs, in order: from position len(prompt) - 1 on, one for each token.

    Rows are padded on the right and run without a mask: under causal attention no real token sees
    the padding, and positions, never token ids, say what is a response. Wider weights run under
    autocast; FSDP gathers them in `dtype`.
    """
    rows = [torch.tensor([*prompt, *response]) for prompt, response in sequences]
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (B, T)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response) in zip(predicts, sequences):
        row[len(prompt) - 1:len(prompt) + len(response) - 1] = True
    needs_cast = model.dtype != dtype and not isinstance(model, FSDPModule)
    with torch.autocast(ids.device.type, dtype, enabled=needs_cast):
        hidden = base_model(model)(ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[predicts].to(dtype)


def sum_gradients(parameters):
    """One all-reduce over the gradients; a rank that had nothing in the loss adds zeros."""
    if WORLD > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters]
        vector_to_parameters(all_reduce(parameters_to_vector(grads)), grads)


def stop_unless_finite(cfg, step, loss, grad_norm, sequences):
    """UserError unless both are finite: this rank's batch is written down, no update is made."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    path = Path(cfg.out_dir, f"nonfinite_step_{step:06d}_rank_{RANK}.jsonl")
    write_lines(path, [{"prompt_ids": p, "response_ids": r} for p, r in sequences], mode="w")
    raise UserError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so no update was made. "
        f"The batch is in {path}, the last checkpoint is untouched; --resume with a lower "
        f"learning_rate than {cfg.learning_rate}, or dtype=float32")


# ----------------------------------------------------------------------------- runs and their logs

def start_run(cfg, script, inputs, **own):
    """
    (training state, checkpoint to go on from or None), after every check of cfg.out_dir. All ranks
    call it, and the first one looks. script: a checkpoint of another one is refused. inputs: paths
    that the run reads. `step` counts updates, `looked` is the last step at which the run has
    evaluated, `own` is what only this script keeps. UserError where the run cannot begin.
    """
    path, step = Path(cfg.out_dir), -1
    if RANK == 0:
        if cfg.resume and cfg.overwrite:
            raise UserError("--resume and --overwrite exclude each other: go on with the run, or "
                            "throw it away")
        if path.is_file() or path.is_dir() and any(path.iterdir()):
            if not (path / "run_config.json").is_file():
                raise UserError(f"out_dir={cfg.out_dir!r} has no run_config.json: it is no run to "
                                f"resume or to overwrite; choose another name")
            if not cfg.overwrite and not cfg.resume:
                raise UserError(f"out_dir={cfg.out_dir!r} exists: --resume goes on with that run, "
                                f"--overwrite deletes it")
            for name in filter(None, inputs if cfg.overwrite else ()):
                if path.resolve() in Path(name).resolve().parents:
                    raise UserError(f"--overwrite would delete {name}, which this run reads; "
                                    f"choose another out_dir")
        step = newest_checkpoint(path) if cfg.resume else -1
    step = int(all_reduce(torch.tensor(step), dist.ReduceOp.MAX).item())
    state = {"script": script, "student": cfg.student, "step": 0, "looked": -1, "tflops": 0.0,
             "best": -1.0, "best_step": 0, "rung_began": 0, **own}
    if step < 0:
        return state, None
    checkpoint = path / f"step_{step:06d}"
    saved = json.loads((checkpoint / "train_state.json").read_text())
    for key in ("script", "student"):
        if saved[key] != state[key]:
            raise UserError(f"{checkpoint} has {key}={saved[key]!r}, not {state[key]!r}; resume "
                            f"with that one, or start a new run from its weights with "
                            f"--student={checkpoint}")
    if cfg.max_steps < step:
        raise UserError(f"max_steps={cfg.max_steps}: {checkpoint} is at step {step} already; raise "
                        f"max_steps")
    return state | saved, checkpoint


def open_run(cfg, origin, state):
    """
    Make out_dir with run_config.json, and a metrics.jsonl without what came after the checkpoint;
    print the config, and what differs from a resumed run's. All ranks call it, the first writes.
    """
    barrier()  # every rank has read what --overwrite deletes
    if RANK > 0:
        return
    out_dir = Path(cfg.out_dir)
    if cfg.overwrite and out_dir.exists():
        shutil.rmtree(out_dir.resolve())
    out_dir.mkdir(parents=True, exist_ok=True)
    print_config(cfg, origin)
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))  # as JSON has it: tuples are lists
    for key, old in state.get("config", config).items():
        if config.get(key) != old and key not in ("resume", "overwrite", "max_steps", "out_dir"):
            print0(f"warning: {key}={config.get(key)!r} now, {old!r} when the checkpoint was "
                   f"written")
    (out_dir / "run_config.json").write_text(json.dumps(config, indent=1))
    metrics = out_dir / "metrics.jsonl"
    rows = read_lines(metrics) if metrics.exists() else []
    kept = [row for row in rows if row["step"] <= state["step" if "loss" in row else "looked"]]
    write_lines(metrics, kept, mode="w")


def write_lines(path, rows, mode="a"):
    """Append rows as JSON lines; mode "w" replaces the file whole. UserError if it cannot."""
    target = f"{path}.tmp" if mode == "w" else path
    try:
        with open(target, mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(target, path)
    except OSError as error:
        why = error.strerror if Path(path).parent.is_dir() else "its folder has been removed"
        raise UserError(f"cannot write {path}: {why}; mend that and start again the same way, a "
                        f"training run with --resume: what was saved before is whole") from error


def read_lines(path):
    """JSON lines; a last line that a crash has cut short is dropped."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def log_evaluation(out_dir, step, name, metrics, records):
    """What `evaluate` returned, to metrics.jsonl, samples_NAME_STEP.jsonl and the terminal."""
    if RANK > 0:
        return
    write_lines(Path(out_dir, "metrics.jsonl"), [{"step": step, "model": name, **metrics}])
    write_lines(Path(out_dir, f"samples_{name}_{step:06d}.jsonl"), records, mode="w")
    scores = [metrics["avg_at_k"], metrics["pass_at_k"]]
    avg, passed = ("-" if score is None else f"{score:.3f}" for score in scores)
    print0(f"eval {step:>4} {name:<8} Avg@{metrics['k']} {avg}  Pass@{metrics['k']} {passed}  "
           f"length {metrics['length']:.0f}  entropy {metrics['entropy']:.3f}  "
           f"cut {metrics['truncated']:.0%}")


def print_row(columns, row, header):
    """One training step in 80 columns, four characters a number. columns: {heading: key of row}."""
    if header:
        print0(" ".join(f"{name:>4}" for name in columns))
    cells = []
    for key in columns.values():
        x = row.get(key)
        if isinstance(x, float):
            x = f"{x / 1000:.0f}k" if x >= 1e4 else f"{x:.3f}".removeprefix("0")[:4].rstrip(".")
        cells.append("-" if x is None else x)
    print0(*[f"{cell:>4}" for cell in cells])


class Timer(dict):
    """
    Seconds between laps, summed by name, and on a GPU the peaks of this rank's memory in GB, ready
    for the log. There a lap waits for the device, so that they mean something.
    """

    def __init__(self, device):
        self.on_gpu, self.now = device.type == "cuda", time.perf_counter()

    def lap(self, name):
        if self.on_gpu:
            torch.cuda.synchronize()
            peak, key = torch.cuda.max_memory_allocated() / 1e9, f"{name}_gb"
            self[key] = max(peak, self.get(key, 0.0))
            torch.cuda.reset_peak_memory_stats()
        last, self.now = self.now, time.perf_counter()
        key = f"{name}_seconds"
        self[key] = self.get(key, 0.0) + self.now - last


# ------------------------------------------------------------------------------------- checkpoints

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(cfg, model, tokenizer, optimizer, state):
    """
    Write out_dir/step_000040 (the number is state["step"]): an ordinary model folder with its
    tokenizer, and beside it optimizer.pt and train_state.json. It does not depend on the number of
    ranks: all of them call it, and the first writes what is gathered, to a temporary name that is
    renamed when everything is on the disk. UserError when it cannot be written; nothing is left of
    it then.

    `last` points to it, `best` and `stable` to steps state["best_step"] and state["rung_began"].
    Others stay while they are among the newest cfg.keep.
    """
    weights, moments = get_model_state_dict(model, options=_WHOLE), {}
    if optimizer.state:
        whole = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
        moments = whole.get("state")  # only the first rank has it
    if RANK == 0:
        path = Path(cfg.out_dir, f"step_{state['step']:06d}")
        state = state | {"config": dataclasses.asdict(cfg)}
        own = dict(model.named_parameters()) | dict(model.named_buffers())  # a tied tensor once
        weights = {name: weights[name] for name in own if name in weights}
        _write_checkpoint(path, model, tokenizer, weights, moments, state)
        links = {"last": state["step"], "best": state["best_step"], "stable": state["rung_began"]}
        for link, step in links.items():
            if step:
                temporary = path.with_name(f".{link}.tmp")
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(f"step_{step:06d}")
                temporary.replace(path.with_name(link))
        for older in _checkpoints(cfg.out_dir)[:-cfg.keep]:
            if int(older.name[5:]) not in links.values():
                shutil.rmtree(older, ignore_errors=True)  # somebody may be reading it
    barrier()  # the others must not take the wait for a hang of something else


def _write_checkpoint(path, model, tokenizer, weights, moments, state):
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError("its folder has been removed")
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was cut short
        model.save_pretrained(temporary, state_dict=weights, max_shard_size="9TB")
        tokenizer.save_pretrained(temporary)
        torch.save(moments, temporary / "optimizer.pt")
        (temporary / "train_state.json").write_text(json.dumps(state, indent=1))
        for file in [*temporary.rglob("*"), temporary]:  # a full disk may say so only now
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)  # of this run, which has gone on from there
        temporary.replace(path)
    except Exception as error:  # tokenizers and torch have errors of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot save {path}: {first_line(error)}; checkpoints before it are "
                        f"whole: make room, then --resume") from error


def _checkpoints(out_dir):
    """The folders, the oldest first."""
    return sorted(Path(out_dir).glob("step_*"), key=lambda path: int(path.name[5:]))


def newest_checkpoint(out_dir):
    """
    The step of the newest checkpoint that loads; -1 where nothing was saved yet. Those that do not
    are named, and passed over. UserError when none loads. Opening a file of tensors compares its
    length with what it says of itself, so one that was cut short is found without reading it.
    """
    passed = []
    for path in reversed(_checkpoints(out_dir)):
        try:
            json.loads((path / "train_state.json").read_text())
            load_model_config(path)
            safe_open(path / "model.safetensors", "pt")
            torch.load(path / "optimizer.pt", mmap=True)
        except Exception as error:  # whatever a broken file makes its reader raise
            passed.append(f"{path} is damaged ({first_line(error)})")
            continue
        for line in passed:
            print0(f"warning: {line}: going on from {path.name}")
        return int(path.name[5:])
    if passed:
        raise UserError(f"{'; '.join(passed)}: no whole checkpoint to resume from; start anew with "
                        f"--overwrite")
    print0(f"no checkpoint in {out_dir} yet: from the start")
    return -1


def load_optimizer(checkpoint, model, optimizer):
    """Restore AdamW's moments exactly, sharded ones from the whole; rates stay the config's."""
    path = Path(checkpoint) / "optimizer.pt"
    with reading(path):
        moments = torch.load(path, mmap=True)
    if moments:  # there are none before the first update
        state = get_optimizer_state_dict(model, optimizer) | {"state": moments}
        set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)


# -------------------------------------------------------------------------------- a script's start

def run(main, doc, cls):
    """
    Call main(argv) of a script: --help prints its header and config; a user's mistake is one line
    that names the rank; an exit code of 0 means that everything was done.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(doc, inspect.getsource(cls), sep="\n")
        return
    code = 0
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:  # outside a training loop, which would finish its step
        code = 128 + signal.SIGINT
    except (UserError, OSError) as error:
        code = 1
        print(f"error: {f'rank {RANK}: ' if WORLD > 1 else ''}{error}", file=sys.stderr)
    except Exception:  # a bug; the other processes must not wait for this one
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)  # an orderly end would wait for gloo's threads, or for a rank that is gone
    sys.exit(code)
