"""
Shared by the stages: config files, processes and seeds, updates, runs and their logs, checkpoints.
"""

import ast
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import runpy
import shutil
import signal
import sys
import time
import traceback
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()


class UserError(ValueError):
    """An error the user can fix; its line gives the value, the limit and the remedy."""


def first_line(error):
    """The first line of an exception's text, or its repr where the text is empty."""
    return (str(error).strip() or repr(error)).split("\n")[0]


@contextlib.contextmanager
def as_user_error(what):
    """Inside, an error of a library becomes a UserError: one line that begins with `what`."""
    try:
        yield
    except Exception as error:  # each library has errors of its own
        raise UserError(f"{what}: {first_line(error)}") from error


# ------------------------------------------------------------------------------------------ config


def load_config(cls, argv):
    """
    A config of the dataclass `cls`. Later overrides earlier: the defaults, then the assignments in
    Python files in their order, then --key=value.

    In a file `_names`, modules and functions are ignored, and `from configs.other import *` is
    inheritance. `--key` alone is --key=True. Raises UserError on an unknown key (naming the
    nearest), a wrong type, or an unreadable file.
    """
    kinds, values = typing.get_type_hints(cls), {}
    for arg in sorted(argv, key=lambda arg: arg.startswith("--")):
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            given, where = {key: text if equals else "True"}, "command line"
        else:
            given, where = _run_config_file(arg), arg
        for key, value in given.items():
            if key not in kinds:
                near = difflib.get_close_matches(key, kinds)
                hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
                raise UserError(f"{where}: unknown key {key!r}; {hint}")
            values[key] = _cast(key, value, kinds[key], where)
    return cls(**values)


def _run_config_file(path):
    """Run the file and return its public variables, {name: value}."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}; those of this repository are in configs/")
    try:
        names = runpy.run_path(path)
    except Exception as error:  # whatever a user's file may raise is reported with its line
        is_syntax = isinstance(error, SyntaxError)  # it knows its line; the frame is Python's own
        at = error if is_syntax else traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{at.filename}, line {at.lineno}: {type(error).__name__}: {error}") from error
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        if isinstance(node, ast.AnnAssign) and node.value is None:
            raise UserError(
                f"{path}, line {node.lineno}: `{ast.unparse(node)}` sets nothing in Python; write "
                f"= for the colon"
            )
    return {
        key: value
        for key, value in names.items()
        if not (key.startswith("_") or callable(value) or inspect.ismodule(value))
    }


def _cast(key, value, kind, where):
    """`value`, parsed where it is text of the command line, if it fits the annotation `kind`."""
    options = typing.get_args(kind) or (kind,)  # the strings of a Literal, the types of a union
    if where == "command line":
        if value == "None" and type(None) in options:
            value = None
        elif str not in options and value not in options:
            with contextlib.suppress(Exception):  # text that is no literal stays text
                value = (float if float in options else ast.literal_eval)(value)
    if type(value) is int and float in options:
        value = float(value)
    if isinstance(value, str) and value.startswith("~"):
        value = os.path.expanduser(value)
    fits = type(value) in options or isinstance(value, str) and value in options
    if typing.get_origin(kind) is tuple:
        fits = isinstance(value, tuple) and all(type(item) in options for item in value)
    if not fits:
        wanted = kind.__name__ if isinstance(kind, type) else str(kind)
        raise UserError(
            f"{where}: {key}={value!r} is a {type(value).__name__}; "
            f"{key} must be {wanted.replace('typing.Literal', 'one of ')}"
        )
    return value


_RANGES = (  # what a key of this name may be, in every config that has it; None always passes
    (
        "must be at least 1",
        lambda x: x >= 1,
        """
        max_new_tokens rollout_rows max_tokens_per_microbatch num_prompts samples_per_prompt
        num_problems samples_per_problem shard_bytes shard_sequences window
        eval_prompts eval_samples eval_max_new_tokens steps_per_horizon save_every
        keep check_sync_every batch_size prompts_per_step updates_per_batch importance_cap""",
    ),
    (
        "must not be negative",
        lambda x: x >= 0,
        """
        max_steps warmup_steps eval_every top_k temperature eval_temperature weight_decay
        learning_rate entropy_floor kl_coef clip_high""",
    ),
    ("must be in (0, 1]; 1 keeps every token", lambda x: 0 < x <= 1, "top_p eval_top_p"),
    (
        "one process has nothing to shard; start several with torchrun, or set it False",
        lambda x: not x or WORLD > 1,
        "fsdp",
    ),
    (
        "needs a C++ compiler: install g++, or name yours in CXX",
        lambda x: not x or shutil.which(os.environ.get("CXX", "g++")),
        "compile",
    ),
    (
        "must be positive",
        lambda x: x > 0,
        """
        max_grad_norm collective_timeout kv_cache_gb rollout_timeout max_logprob_gap""",
    ),
)


def require(ok, cfg, key, limit):
    """UserError that names a key of the config, its value and the limit, unless `ok`."""
    if not ok:
        raise UserError(f"{key}={getattr(cfg, key)!r}: {limit}")


def must_match(saved, wanted, where, remedy):
    """UserError that names the first of the `wanted` settings that was saved with another value."""
    for key, value in wanted.items():
        if saved.get(key) != value:
            raise UserError(
                f"{where} was made with {key}={saved.get(key)!r}, not {value!r}; {remedy}"
            )


def check_ranges(cfg):
    """UserError where a key of this config is outside the range that its name has everywhere."""
    for limit, allowed, keys in _RANGES:
        for key in keys.split():
            value = getattr(cfg, key, None)
            require(value is None or allowed(value), cfg, key, limit)


def print_config(cfg):
    """One line a key; > marks what differs from the default."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        print0(f"{'>' if value != field.default else ' '} {field.name:<26} {value!r}")


# ----------------------------------------------------------------------------- processes and seeds

# This process is number RANK of the WORLD processes that torchrun has started.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def init_processes(timeout_seconds=7200.0):
    """
    The device of this process, under torchrun or alone; NCCL between GPUs, gloo between CPUs.
    timeout_seconds: how long a rank waits for the others before it ends with an error.
    """
    gpus = torch.cuda.device_count()
    if WORLD > 1 and gpus:
        # vLLM uses the first GPU that it sees, so a process sees only its own, as cuda:0.
        local = int(os.environ["LOCAL_RANK"])
        if local >= gpus:
            raise UserError(
                f"process {local} on this machine has no GPU; lower --nproc_per_node "
                f"to the {gpus} GPUs"
            )
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = names.split(",")[local]
    device = torch.device("cuda" if gpus else "cpu")
    if WORLD > 1 and not dist.is_initialized():
        if gpus:
            torch.cuda.init()  # or a device mesh asks for GPU number LOCAL_RANK of only one
        with as_user_error("cannot join the other processes; start them with torchrun"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                timeout=datetime.timedelta(seconds=timeout_seconds))
    return device


def print0(*args):
    """Print on the first rank only."""
    if RANK == 0:
        print(*args, flush=True)


print_once = functools.cache(print0)
_collective = as_user_error("another process has ended, or is silent for longer than a rank waits")


@_collective
def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Reduce in place over all ranks, and return the tensor; one process leaves it as it is."""
    if WORLD > 1:
        dist.all_reduce(tensor, op)
    return tensor


def sum_over_ranks(numbers):
    """{name: sum over all ranks} of {name: this rank's number}, in fp64."""
    sums = all_reduce(torch.tensor([*numbers.values()], dtype=torch.float64))
    return dict(zip(numbers, sums.tolist()))


def barrier():
    """Wait until every rank has come here."""
    all_reduce(torch.zeros(1))


_noted = []  # (number, time) of the signals that came
faults = []  # sentences on what is wrong with an engine of this rank


def catch_signals():
    """
    From now on the first SIGTERM or SIGINT is only noted, for `end_early`. A second one ends
    the process at once, unless it comes within a second of the first: a scheduler signals this
    process and torchrun, which forwards the same signal to it.
    """

    def note(number, frame):
        _noted.append((number, time.monotonic()))
        if _noted[-1][1] > _noted[0][1] + 1:
            os._exit(128 + number)

    _noted.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def end_early(save, step):
    """
    Where any rank has noted a signal or a fault all ranks save and leave: with exit code 128 + the
    signal's number, or 1, and on the rank that has it with the fault as a UserError.
    """
    code = 128 + _noted[0][0] if _noted else len(faults)
    code = all_reduce(torch.tensor(code), dist.ReduceOp.MAX).item()
    if code:
        save()
        print0(f"ends with code {code}; step {step} is saved: --resume goes on")
        barrier()  # torchrun ends all with the first that ends
        end_on_fault()
        sys.exit(code)


def end_on_fault():
    """UserError with the first of this rank's `faults`, where there is one."""
    if faults:
        raise UserError(faults.pop(0))


def _hash(value):
    """16 hex digits, the same in every process and run."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def derive_seed(*parts):
    """A 63-bit seed from ints and strings."""
    return int(_hash(parts), 16) >> 1


def fingerprint(items):
    """16 hex digits of a dict's keys and values."""
    return _hash(sorted(items.items()))


# ------------------------------------------------------------------------------------ one update


def update(cfg, optimizer, step, loss):
    """
    The update number `step`, from 1 on. The gradients are summed over ranks, where FSDP has not
    done so in the backward, and scaled to a norm of at most cfg.max_grad_norm; the rate grows
    linearly over cfg.warmup_steps. Returns the norm before that. A rank that had nothing in the
    loss adds zeros. UserError, and no update, unless `loss`, of this rank or of all, and the norm
    are finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if not isinstance(parameter, DTensor):
            all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(loss + norm):
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {norm}: not finite, so no update was "
            f"made. The last checkpoint is untouched, and --resume repeats the steps after it "
            f"exactly: try a lower learning_rate than {cfg.learning_rate}, or dtype=float32"
        )
    for group in optimizer.param_groups:
        group["lr"] = cfg.learning_rate * min(1, step / max(1, cfg.warmup_steps))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ----------------------------------------------------------------------------- runs and their logs


def start_run(cfg, inputs, identity, **own):
    """
    (training state, checkpoint to go on from or None), after every check of cfg.out_dir. All ranks
    call it, and the first one looks. UserError where the run cannot begin.

    inputs: paths that the run reads. identity: {name: value}, equal in a checkpoint and the run
    that resumes it: the script, and fingerprints of what it learns from, which do not change when a
    folder is moved. own: what only this script adds to the state. There, `step` counts updates,
    `last_eval_step` is the step whose gate, evaluation and checkpoint were last dealt with (-1:
    none), and `rung_began` is the step at which the curriculum's present horizon opened (0 without
    one).
    """
    path, step = Path(cfg.out_dir), -1
    require(
        not cfg.resume or not cfg.overwrite, cfg, "overwrite", "give --resume or this, not both")
    if RANK == 0:
        if path.is_file() or path.is_dir() and any(path.iterdir()):
            require(
                (path / "run_config.json").is_file(),
                cfg,
                "out_dir",
                "is no run to resume or to overwrite, for it has no run_config.json; choose "
                "another name",
            )
            require(
                cfg.resume or cfg.overwrite,
                cfg,
                "out_dir",
                "exists: --resume goes on with that run, --overwrite deletes it",
            )
        for name in filter(None, inputs if cfg.overwrite else ()):
            # With a name below it, a path is among the parents itself.
            require(
                path.resolve() not in (Path(name).resolve() / "file").parents,
                cfg,
                "out_dir",
                f"--overwrite would delete {name}, which this run reads; choose another name",
            )
        step = newest_checkpoint(path) if cfg.resume else -1
    step = all_reduce(torch.tensor(step), dist.ReduceOp.MAX).item()
    state = {
        "step": 0,
        "last_eval_step": -1,
        "tflops": 0.0,
        "best_score": -1.0,
        "best_step": 0,
        "rung_began": 0,
        **identity,
        **own,
    }
    if step < 0:
        return state, None
    checkpoint = path / f"step_{step:06d}"
    saved = json.loads((checkpoint / "train_state.json").read_text())
    remedy = f"resume with that, or start a new run from its weights with --student={checkpoint}"
    must_match(saved, identity, checkpoint, remedy)
    require(cfg.max_steps >= step, cfg, "max_steps", f"{checkpoint} is at step {step}; raise it")
    return state | saved, checkpoint


def open_run(cfg, model, tokenizer, state):
    """
    Make out_dir with run_config.json, try whether the student can be saved, write a metrics.jsonl
    without what came after the checkpoint, print the config. All ranks call it, the first writes.
    """
    barrier()  # every rank has read what --overwrite deletes
    if RANK > 0:
        return
    out_dir = Path(cfg.out_dir)
    if cfg.overwrite and out_dir.exists():
        lock(out_dir)
        shutil.rmtree(out_dir.resolve())
    out_dir.resolve().mkdir(parents=True, exist_ok=True)  # where out_dir is a link it stays one
    lock(out_dir)
    (out_dir / "run_config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    trial = out_dir / "trial"  # a model folder without weights
    _write_checkpoint(trial, model, tokenizer, {}, {}, state)
    shutil.rmtree(trial)
    print_config(cfg)
    metrics = out_dir / "metrics.jsonl"
    metrics.touch()
    # Training rows count up to the checkpoint's step, evaluations up to the last one it knows of.
    kept = [
        row
        for row in read_lines(metrics)
        if row["step"] <= state["step" if "loss" in row else "last_eval_step"]
    ]
    write_lines(metrics, kept, mode="w")


_held = []  # the file of the lock: closed, it would be free


def lock(folder):
    """
    Keep the folder for this process until it ends, or locks another. UserError that names the
    process which has it.
    """
    path = Path(folder) / ".lock"
    _held[:] = [open(path, "a")]
    try:
        fcntl.flock(_held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"out_dir={str(folder)!r}: {path.read_text()} writes there; wait for its end, or "
            f"choose another name. (Processes of one run are started by torchrun)"
        ) from error
    except OSError:
        pass  # a disk that knows no locks
    path.write_text(f"process {os.getpid()} on {os.uname().nodename}")


def write_lines(path, rows, mode="a"):
    """Append rows as JSON lines; mode "w" replaces the file whole. UserError if it cannot."""
    target = f"{path}.tmp" if mode == "w" else path
    try:
        with open(target, mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(target, path)
    except OSError as error:
        why = error.strerror if Path(path).parent.is_dir() else "its folder has been removed"
        raise UserError(
            f"cannot write {path}: {why}; mend that and start again the same way, a "
            f"training run with --resume: what was saved before is whole"
        ) from error


def read_lines(path):
    """JSON lines; a last line that a crash has cut short is dropped."""
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def log_evaluation(cfg, state, name, metrics, records):
    """
    Write what `evaluate` returned to metrics.jsonl, samples_NAME_STEP.jsonl and the terminal.
    Returns whether it is the student's best score so far; the state keeps that.
    """
    step, score, passed = state["step"], metrics["avg_at_k"], metrics["pass_at_k"]
    if RANK == 0:
        row = {"step": step, "model": name, **metrics}
        write_lines(f"{cfg.out_dir}/metrics.jsonl", [row])
        write_lines(f"{cfg.out_dir}/samples_{name}_{step:06d}.jsonl", records, mode="w")
    print0(
        f"eval {step:>4} {name:<8} Avg@{metrics['k']} {'-' if score is None else f'{score:.3f}'}  "
        f"Pass@{metrics['k']} {'-' if passed is None else f'{passed:.3f}'}  length "
        f"{metrics['length']:.0f}  entropy {metrics['entropy']:.3f}  cut {metrics['truncated']:.0%}"
    )
    is_best = name == "student" and score is not None and score > state["best_score"]
    if is_best:
        state.update(best_score=score, best_step=step)
    return is_best


def log_step(cfg, columns, row, header):
    """
    One training step to metrics.jsonl, and ten numbers of it to the terminal in 80 columns.
    columns: "heading=key of row" ten times.
    """
    columns = dict(column.split("=") for column in columns.split())
    if RANK == 0:
        write_lines(f"{cfg.out_dir}/metrics.jsonl", [row])
    if header:
        print0(" ".join(f"{name:>7}" for name in columns))
    print0(" ".join(f"{row[key] or 0:>7.3g}" for key in columns.values()))


class Timer(dict):
    """
    Seconds by name of the lap, and in all, as a dict for the log; on a GPU also the peak of this
    rank's memory so far, in GB, less the engine's. There each lap waits for the device, or its time
    would be wrong.
    """

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.start = self.now = time.perf_counter()

    def lap(self, name):
        if self.on_gpu:
            torch.cuda.synchronize()
            # Torch counts the pages of an engine that is asleep, which are not there.
            vllm = sys.modules.get("vllm.device_allocator.cumem")
            pages = vllm.CuMemAllocator.get_instance().get_current_usage() if vllm else 0
            self["peak_gb"] = (torch.cuda.max_memory_allocated() - pages) / 1e9
        last, self.now = self.now, time.perf_counter()
        self[f"{name}_seconds"] = self.get(f"{name}_seconds", 0.0) + self.now - last
        self["seconds"] = self.now - self.start


# ------------------------------------------------------------------------------------- checkpoints

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)
STEP_GLOB = "step_[0-9][0-9][0-9][0-9][0-9][0-9]"  # no folder of the user's own matches this


def save_checkpoint(cfg, model, tokenizer, optimizer, state):
    """
    Write out_dir/step_000040 (the number is state["step"]): an ordinary model folder with its
    tokenizer, and beside it optimizer.pt and train_state.json. It does not depend on the number of
    ranks: all of them call it, and the first writes what is gathered, to a temporary name that is
    renamed when everything is on the disk. UserError when it cannot be written; nothing is left of
    it then.

    The link `last` points to it, `best` to the step of the best evaluation (there is none where
    that is step 0), and `stable` to the step at which the open horizon began, whose weights had
    passed a gate. Other checkpoints stay while they are among the newest cfg.keep.
    """
    weights, moments = get_model_state_dict(model, options=FULL_STATE), {}
    if optimizer.state:
        whole = get_optimizer_state_dict(model, optimizer, options=FULL_STATE)
        moments = whole.get("state")  # only the first rank has it
    if RANK == 0:
        path = Path(f"{cfg.out_dir}/step_{state['step']:06d}")
        own = dict(model.named_parameters()) | dict(model.named_buffers())  # a tied tensor once
        weights = {name: weights[name] for name in own if name in weights}
        state["config"] = dataclasses.asdict(cfg)
        _write_checkpoint(path, model, tokenizer, weights, moments, state)
        links = {"last": state["step"], "best": state["best_step"], "stable": state["rung_began"]}
        links = {link: f"step_{step:06d}" for link, step in links.items() if step}
        for link, target in links.items():
            with contextlib.suppress(OSError):  # a disk without links; `model_folder` needs none
                link = path.with_name(link)
                shutil.rmtree(link, ignore_errors=True)  # a copy, by cp -rL; no link is followed
                link.unlink(missing_ok=True)
                link.symlink_to(target)
        for older in sorted(path.parent.glob(STEP_GLOB))[: -cfg.keep]:
            if older.name not in links.values():
                shutil.rmtree(older, ignore_errors=True)  # somebody may be reading it
    barrier()  # or a slow save would look like a hang in a later collective


def _write_checkpoint(path, model, tokenizer, weights, moments, state):
    """
    The files of a checkpoint at `path`, in place of those that may be there. UserError where any
    library cannot write its part; what was there stays then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was cut short
        model.save_pretrained(temporary, state_dict=weights, max_shard_size="9TB")
        tokenizer.save_pretrained(temporary)
        torch.save(moments, temporary / "optimizer.pt")
        (temporary / "train_state.json").write_text(json.dumps(state, indent=1))
        for name in temporary.rglob("*"):
            if name.is_file():
                with open(name) as file:
                    os.fsync(file)  # a full disk may say so only now
        with contextlib.suppress(FileNotFoundError):  # of an earlier save of this step
            path.rename(temporary / "old")
        temporary.replace(path)
        shutil.rmtree(path / "old", ignore_errors=True)
    except Exception as error:  # tokenizers and torch have errors of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot save {path}: {first_line(error)}; mend that, then --resume: checkpoints "
            f"before it are whole"
        ) from error


def model_folder(path, file="config.json"):
    """
    `path`, or the newest checkpoint in it where it is the folder of a run. UserError where it lacks
    `file` and is no hub name either.
    """
    folder = Path(path)
    is_hub_name = len(folder.parts) == 2 and not folder.parent.is_dir()
    if is_hub_name:
        print_once(f"{path}: no folder here, so it is looked for on the model hub")
    elif not (folder / file).is_file():
        checkpoints = sorted(folder.glob(f"{STEP_GLOB}/{file}"))
        if not checkpoints:
            raise UserError(
                f"no model folder {path}: it has no {file}; give a folder, or a hub name "
                f"such as Qwen/Qwen3-0.6B"
            )
        return str(checkpoints[-1].parent)
    return path


def newest_checkpoint(out_dir):
    """
    The step of the newest checkpoint that loads; -1 where nothing was saved yet. Those that do not
    are named, and passed over. UserError when none loads. Opening a file of tensors compares its
    length with what it says of itself, so one that was cut short is found without reading it.
    """
    found = sorted(Path(out_dir).glob(STEP_GLOB), reverse=True)
    for path in found:
        try:
            json.loads((path / "train_state.json").read_text())
            json.loads((path / "config.json").read_text())
            safe_open(path / "model.safetensors", "pt")
            torch.load(path / "optimizer.pt", mmap=True)
            return int(path.name[5:])
        except Exception as error:  # whatever a broken file makes its reader raise
            print0(f"warning: {path} is damaged ({first_line(error)}), and passed over")
    if found:
        raise UserError(f"no checkpoint in {out_dir} loads; start anew with --overwrite")
    print0(f"no checkpoint in {out_dir} yet: from the start")
    return -1


# -------------------------------------------------------------------------------- a script's start


def run(main, doc, cls):
    """
    Call main(argv) of a script: --help prints its header and config; a user's mistake is one line
    that names the rank; an exit code of 0 means that everything was done.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        return print(doc, inspect.getsource(cls), sep="\n")
    code = 1
    try:
        main(sys.argv[1:])
        code = 0
    except (SystemExit, KeyboardInterrupt) as end:  # the latter outside of a training loop
        code = getattr(end, "code", 130)
    except (UserError, OSError) as error:
        print(f"error: {f'rank {RANK}: ' if WORLD > 1 else ''}{error}", file=sys.stderr)
    except Exception:  # a bug; the other processes must not wait for this one
        traceback.print_exc()
    sys.stdout.flush()
    if not isinstance(code, int):  # sys.exit("words"), in a user's own edit
        sys.exit(code)
    # An orderly end would wait for gloo's threads, for a rank that is gone or an engine asleep.
    os._exit(code)
