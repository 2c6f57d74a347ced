"""
Does a run fit, and what does a step cost? Memory and FLOPs on paper, from the run's own config.

    python estimate.py configs/toy_opd.py --gpu=False                    # on a CPU
    python estimate.py configs/opd_8b.py --gpus 8 --max_new_tokens=2048

It takes the configs of train_distill.py and of rl_grpo.py (those set group_size) and any
--key=value. Of a model it reads config.json only. Nothing is measured but one thing, what autograd
keeps of Qwen3 (tests/test_estimate.py counts it). vLLM writes the responses unless engine="hf" or
--gpu=False. A folder of trajectories that is not there yet is taken to have hidden states.

Memory of one GPU; `size` is 2 bytes in bf16 and 4 in fp32, n the number of the student's weights:

    student                    16 n: fp32 weights, gradients and AdamW's two moments
    teacher                    size x its weights; where its hidden states are cached, its LM head
    reference (GRPO)           4 x its weights
    KV cache                   vLLM: kv_cache_gb; transformers: 2 x layers x keys of a layer
                               x size x rollout_rows x (prompt + response)
    activations                max_tokens_per_microbatch x what a layer keeps of a token x layers
    logits                     CHUNK_BYTES of kernels/linear_kl.py, and the head's fp32 gradient

fsdp divides the models by the number of GPUs and gathers embedding, head, a layer and the next one.
CUDA, NCCL and the graphs of vLLM take some GB more.

With --lengths=out/a_run, a folder whose evaluations say how long responses are, it also simulates
steps per hour on 1, 8 and 64 GPUs, for the config's rows a step, 256 and 1,024: see `step_seconds`.

FLOPs of a step on all GPUs together, F being one forward (`models.forward_flops`): F of the writer
for the responses, F of teacher or reference, 3 F of the student for each update (4 F with gradient
checkpointing), 2 V H_t a response token for the LM head of a teacher with cached states.
"""

import dataclasses
import functools
import heapq
import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rl_grpo
import train_distill
from kernels.linear_kl import CHUNK_BYTES
from models import forward_flops
from trajectories import Trajectories
from utils import UserError, first_line, load_config, model_folder, read_lines, run

PROMPT = 92                          # tokens of a prompt: the mean in the paper (appendix H.1)


@dataclasses.dataclass
class Config(train_distill.Config, rl_grpo.Config):
    group_size: int | None = None    # None: a config of train_distill.py
    gpus: int = 1                    # `--gpus 8` is read too
    gpu: bool = True                 # False: there is none, so transformers writes
    lengths: str | None = None       # the folder of a run: simulate steps per hour


class Models(NamedTuple):
    """Configs of a run's models, as transformers has them."""
    student: Any
    writer: Any                      # who writes the responses, if only those of evaluations
    frozen: Any = None
    kind: str = ""                   # of `frozen`: "teacher", "teacher's LM head" or "reference"


def read_models(cfg):
    """The Models that a run loads. UserError where a config.json is missing."""
    def read(path):
        try:
            return AutoConfig.from_pretrained(model_folder(path))
        except (OSError, ValueError) as error:
            remedy = f"of {path} config.json is enough here, without weights"
            raise UserError(f"{first_line(error)} ({remedy})") from error

    student = read(cfg.student)
    if cfg.exchange_stops:           # then the LM head may need a matrix of its own
        student.tie_word_embeddings = False
    if cfg.group_size:
        if not cfg.reference and not cfg.kl_coef:
            return Models(student, student)
        return Models(student, student, read(cfg.reference or cfg.student), "reference")
    if cfg.teacher is None:
        return Models(student, student)
    teacher = read(cfg.teacher)
    folder = cfg.trajectories
    if folder is None:
        writer = teacher if cfg.prefix == "teacher" else student
        return Models(student, writer, teacher, "teacher")
    cached = not Path(folder).exists() or Trajectories(folder, want_hidden=True).cached
    return Models(student, student, teacher, "teacher's LM head" if cached else "teacher")


def without_weights(config):
    """The model of a config on the meta device: it has shapes, and takes no memory."""
    return _without_weights(config.to_json_string())


@functools.cache
def _without_weights(text):                              # making one takes a tenth of a second
    config = json.loads(text)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def parameter_count(config):
    return without_weights(config).num_parameters()


def attention_sizes(config):
    """(heads x head_dim, key-value heads x head_dim) of a layer."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim


def gathered_at_once(config):
    """Weights of a sharded model that are whole at a time: embedding and head, two layers."""
    vocabulary = config.vocab_size * config.hidden_size
    if not config.tie_word_embeddings:
        vocabulary *= 2
    return vocabulary + 2 * (parameter_count(config) - vocabulary) // config.num_hidden_layers


def memory(cfg, models):
    """
    {part: bytes} on one GPU. Parts "rollouts: " and "update: " are not there at the same time;
    the last entry is the larger sum.
    """
    student, writer, frozen, kind = models
    hidden, layers = student.hidden_size, student.num_hidden_layers
    keys = sum(attention_sizes(student))
    horizon = max(cfg.horizons or [cfg.max_new_tokens])
    size = getattr(torch, cfg.dtype).itemsize
    sharded = cfg.fsdp and cfg.gpus > 1
    shards = cfg.gpus if sharded else 1
    vllm = cfg.engine == "vllm" or cfg.engine == "auto" and cfg.gpu
    n = parameter_count(student)

    always = {"student: fp32 weights, gradients, Adam": 16 * n // shards}
    if kind == "teacher's LM head":
        always[kind] = size * frozen.vocab_size * frozen.hidden_size
    elif frozen:
        always[kind] = (4 if kind == "reference" else size) * parameter_count(frozen) // shards
    if size == 2 and not sharded and not (vllm and writer is student):
        always["student: bf16 copy that writes"] = 2 * n

    longest = max(horizon, cfg.eval_max_new_tokens if cfg.eval_every else 0)
    weights = size * parameter_count(writer)
    if vllm:                         # which keeps a head apart from the embedding
        cache = int(cfg.kv_cache_gb * 1e9)
        weights += size * writer.tie_word_embeddings * writer.vocab_size * writer.hidden_size
    else:                            # which uses the weights that are there, gathered
        cached_keys = writer.num_hidden_layers * attention_sizes(writer)[1]
        cache = 2 * size * cached_keys * cfg.rollout_rows * (PROMPT + longest)
        weights *= sharded
    rollouts = {"rollouts: KV cache": cache, "rollouts: the engine's weights": weights}

    if size == 4:                    # kept of a token by a layer
        layer = 24 * hidden + 16 * (student.intermediate_size + keys)
    else:
        layer = 26 * hidden + 8 * student.intermediate_size + 10 * keys
        if not cfg.gpu:              # whose attention is in fp32
            layer += 4 * keys + 2 * attention_sizes(student)[0]
    token = layers * layer
    if cfg.gradient_checkpointing:   # each layer's input, which autocast leaves in fp32; one layer
        token = layers * hidden * (size if sharded else 4) + layer
    update = {
        "update: activations of a micro-batch": cfg.max_tokens_per_microbatch * token,
        "update: logits of a chunk, gradient of the head":
            CHUNK_BYTES[cfg.gpu] + 4 * student.vocab_size * hidden}
    if size == 2 and not cfg.gpu:    # a head in bf16, and its gradient's products
        update["update: LM head in bf16"] = 4 * student.vocab_size * hidden
    if sharded:
        whole = (4 + size) * gathered_at_once(student)           # 4: gradients
        if kind == "teacher":
            whole += size * gathered_at_once(frozen)
        update["update: gathered weights and gradients"] = whole
    elif size == 2:
        update["update: weights in bf16"] = 2 * n

    most = sum(always.values()) + max(sum(rollouts.values()), sum(update.values()))
    return always | rollouts | update | {"at most at a time": most}


def longest_rows(cfg):
    """Lengths of the responses of a step, were each as long as allowed."""
    rows = cfg.prompts_per_step * cfg.group_size if cfg.group_size else cfg.batch_size
    return [max(cfg.horizons or [cfg.max_new_tokens])] * rows


def flops(cfg, models, responses):
    """{part: FLOPs} of a step with responses of these lengths."""
    student, writer, frozen, kind = models
    lengths = [PROMPT + response for response in responses]
    parts = {}
    if (cfg.group_size or frozen) and not cfg.trajectories:
        parts["writing the responses"] = forward_flops(without_weights(writer), lengths)
    if kind == "teacher's LM head":
        parts[kind] = 2 * frozen.vocab_size * frozen.hidden_size * sum(responses)
    elif frozen:
        parts[kind] = forward_flops(without_weights(frozen), lengths)
    forwards = cfg.updates_per_batch * (4 if cfg.gradient_checkpointing else 3)
    parts["student, forward and backward"] = forwards * forward_flops(
        without_weights(student), lengths)
    return parts | {"a step": sum(parts.values())}


# What a simulated step assumes of an H100 and its neighbours. None of these was measured here.
FLOP_RATE = 400e12                   # of the update: 40 % of the peak in bf16
MEMORY_RATE = 2.5e12                 # bytes a second
TOKEN_SECONDS = 3.5e-3               # least time of one token of all rows: launches, sampling
ROWS_AT_ONCE = 256                   # as vLLM here
LINK_RATE = 300e9, 40e9              # bytes a second of a gradient: within 8 GPUs, and beyond


def response_shares(folder):
    """Lengths of the responses of a run's last evaluation, as shares of the longest of them."""
    files = sorted(Path(folder).glob("samples_student_*.jsonl"))
    if not files:
        raise UserError(f"lengths={folder!r}: no samples_student_*.jsonl there; give the folder of "
                        f"a run with evaluations")
    records = read_lines(files[-1])
    longest = max(record["length"] for record in records)
    return [record["length"] / longest for record in records]


def decoding_seconds(config, size, lengths):
    """
    One GPU writes responses of these lengths, ROWS_AT_ONCE together; a row that ends makes room for
    the next. A token of all rows takes TOKEN_SECONDS, or the time to read the weights once and each
    row's keys and values, if that is longer.
    """
    weights = size * parameter_count(config)
    keys = 2 * size * config.num_hidden_layers * attention_sizes(config)[1]     # bytes of a token
    waiting, running, seconds, now = sorted(lengths), [], 0.0, 0
    while waiting or running:
        while waiting and len(running) < ROWS_AT_ONCE:          # the longest first
            heapq.heappush(running, (now + waiting.pop(), now))     # (ends, began), in tokens
        ends = running[0][0]
        tokens = ends - now
        read = sum((now + ends) / 2 - began + PROMPT for _, began in running)
        seconds += tokens * max(TOKEN_SECONDS, (weights + keys * read) / MEMORY_RATE)
        now = ends
        while running and running[0][0] == now:
            heapq.heappop(running)
    return seconds


def step_seconds(cfg, models, lengths, gpus):
    """
    (seconds of rollouts, of the update, of summing gradients) of a step with responses of these
    lengths, dealt to the GPUs in turn. The slowest GPU is waited for twice: after the rollouts and
    after the update.
    """
    size = getattr(torch, cfg.dtype).itemsize
    rollouts, updates = [], []
    for rank in range(min(gpus, len(lengths))):
        own = lengths[rank::gpus]
        parts = flops(cfg, models, own)
        written = parts.get("writing the responses", 0)         # 0: they are on disk
        rollouts.append(decoding_seconds(models.writer, size, own) if written else 0.0)
        updates.append((parts["a step"] - written) / FLOP_RATE)
    gradients = 8 * parameter_count(models.student) * (gpus - 1) / gpus / LINK_RATE[gpus > 8]
    return max(rollouts), max(updates), gradients


def scaling_table(cfg, models, shares):
    """Lines: rows a step, GPUs, steps an hour, times one GPU's, and what a step's time goes to."""
    horizon, *others = longest_rows(cfg)
    lines = [f"{'rows':>6}{'GPUs':>6}{'steps/hour':>12}{'x one GPU':>11}{'rollouts':>10}"
             f"{'update':>9}{'sum':>7}  s"]
    for rows in (1 + len(others), 256, 1024):
        drawn = random.Random(cfg.seed).choices(shares, k=rows)
        lengths = [math.ceil(share * horizon) for share in drawn]
        of_gpus = {gpus: step_seconds(cfg, models, lengths, gpus) for gpus in (1, 8, 64)}
        for gpus, parts in of_gpus.items():
            lines.append(f"{rows:>6}{gpus:>6}{3600 / sum(parts):>12.0f}"
                         f"{sum(of_gpus[1]) / sum(parts):>11.1f}"
                         f"{parts[0]:>10.1f}{parts[1]:>9.1f}{parts[2]:>7.2f}")
    return lines


def main(argv):
    if "--gpus" in argv:             # as torchrun has it; load_config wants --gpus=8
        i = argv.index("--gpus")
        argv[i:i + 2] = ["=".join(argv[i:i + 2])]
    cfg = load_config(Config, argv)
    models = read_models(cfg)
    device = "one GPU" if cfg.gpu else "the CPU"
    print(f"memory of {device}, GB")
    for part, size in memory(cfg, models).items():
        print(f"  {part:<50}{size / 1e9:10.3f}")
    print("FLOPs of a step, were every response as long as allowed, 10^12")
    for part, count in flops(cfg, models, longest_rows(cfg)).items():
        print(f"  {part:<50}{count / 1e12:10.3f}")
    if cfg.lengths:
        print("simulated, with the assumptions of estimate.py")
        print("\n".join(scaling_table(cfg, models, response_shares(cfg.lengths))))


if __name__ == "__main__":
    run(main, __doc__, Config)
