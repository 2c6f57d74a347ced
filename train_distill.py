"""
Distil a teacher LLM into a smaller student.

    python train_distill.py configs/toy_opd.py                        # CPU, about a minute
    torchrun --nproc_per_node=8 train_distill.py configs/opd_8b.py    # Qwen3-8B -> Qwen3-0.6B-Base

Equations and sections are those of arXiv 2605.16826. p = teacher, q = student: next-token
distributions at each response token, after its prefix s = prompt + response so far.
    prefix           which model wrote the responses that the prefixes are of
    reverse_weight   lam in  L(s) = lam KL(q||p) + (1 - lam) KL(p||q)                      (Eq. 4)

                     lam = 0, forward KL(p||q)          lam = 1, reverse KL(q||p)
    "teacher"        off-policy SFT, soft labels        offline-RL style
    "student"        DAgger style                       OPD: on-policy distillation

Nothing is differentiated through sampling: prefixes are data. N response tokens are in a
micro-batch, H and H_t are the hidden sizes of student and teacher, V and V_t their vocabularies.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from data.problems import (
    check_tokenizers,
    deal,
    encode_prompt,
    load_problems,
    load_tokenizer,
    usable_prompts,
    warn_of_overlap,
)
from engine import Sampling, make_engine, score
from grade import evaluate
from kernels import linear_kl, linear_logp
from models import (
    exchange_stops,
    forward_flops,
    lm_head,
    load_checkpoint,
    load_model,
    microbatches,
    model_revision,
    response_hidden,
    sequence_length,
    stop_ids,
)
from trajectories import Response, Trajectories, load_head
from utils import (
    RANK,
    WORLD,
    Timer,
    UserError,
    all_reduce,
    catch_signals,
    check_ranges,
    end_early,
    fingerprint,
    init_processes,
    load_config,
    log_evaluation,
    log_step,
    open_run,
    print0,
    require,
    run,
    save_checkpoint,
    start_run,
    sum_over_ranks,
    update,
)


@dataclass
class Config:
    # a first run needs these
    student: str = "Qwen/Qwen3-0.6B-Base"  # folder or hub name
    teacher: str | None = "Qwen/Qwen3-4B"  # None: SFT on hard labels, no teacher
    prompts: str = "data/deepscaler.jsonl"  # JSONL with problem, answer (and solution)
    trajectories: str | None = None  # a folder of sample.py, for prefix="teacher"
    prefix: Literal["teacher", "student"] = "student"
    reverse_weight: float = 1.0  # lam in [0, 1]
    loss_norm: Literal["token", "sequence"] = "token"  # mean over tokens, or of sequence means
    terminal: Literal["raw", "mask"] = "raw"  # mask: learn responses without the id that ends them
    max_new_tokens: int = 4096  # the horizon, stop token included
    batch_size: int = 32  # prompts a step over all ranks, one response each
    max_steps: int = 1000
    learning_rate: float = 5e-7
    out_dir: str = "out/distill"
    # optimisation
    warmup_steps: int = 50  # linear, then constant
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # inf never clips
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # compute; master weights are always fp32
    max_tokens_per_microbatch: int = 16384  # padded tokens in a forward; the result is the same
    gradient_checkpointing: bool = (
        False  # store layers' inputs only, run them again in the backward
    )
    compile: bool = False  # by torch.compile: layers, and a token's forward in hf (docs/speed.md)
    # evaluation on a fixed held-out set
    eval_data: str = "data/math500.jsonl"
    eval_every: int = 30  # steps; 0: never
    eval_prompts: int = 200  # the first ones of eval_data
    eval_samples: int = 1  # k of Avg@k and Pass@k
    eval_max_new_tokens: int = 4096
    eval_temperature: float = 0.6
    eval_top_p: float = 0.95
    eval_teacher: bool = False  # measure the teacher too, once
    eval_kl: bool = False  # measure both KLs on the student's held-out responses
    # the run
    save_every: int = 40  # steps; also saved: gates, new bests after step 0, the end
    keep: int = 10  # newest checkpoints that stay, besides `best`
    seed: int = 42
    resume: bool = False  # go on from the newest checkpoint in out_dir, if there is one
    overwrite: bool = False  # delete the run in out_dir first
    # rollouts
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    stop: Literal["union", "student"] = "union"  # whose stop ids end a student's response
    exchange_stops: bool = False  # its stop ids and the teacher's change places (docs/stops.md)
    engine: Literal["auto", "hf", "vllm"] = "auto"  # transformers or vLLM; auto: vLLM on a GPU
    rollout_rows: int = 32  # responses decoded together: they bound the KV cache of engine="hf"
    kv_cache_gb: float = 16.0  # of vLLM; it is given back while the trainer computes
    rollout_timeout: float = 600.0  # seconds without a finished response before vLLM is given up
    check_sync_every: int = 50  # steps between comparisons of the engine's log-probs with ours
    max_logprob_gap: float | None = None  # nats; None: bf16 0.15, fp32 1e-4, on a GPU 1e-2
    chat_template_kwargs: dict | None = None  # None: as stored, else {"enable_thinking": False}
    # processes (torchrun)
    fsdp: bool = False  # shard student and teacher over them; else each holds both whole
    collective_timeout: float = 1800.0  # seconds that one waits for the others before all end
    # Entropy-gated length curriculum (section 5.2). A rung is a horizon. After steps_per_horizon
    # updates its gate measures the student's entropy, by a response to each of the eval_prompts at
    # T = 1 with top_p and top_k, and opens the next rung or closes for good.
    horizons: tuple[int, ...] = ()  # rungs, short to long; (): max_new_tokens throughout
    steps_per_horizon: int = 160  # the last rung has the rest of max_steps
    entropy_floor: float = 0.5  # H_min, as a fraction of the first rung's entropy or in nats
    floor_unit: Literal["first_rung", "nats"] = "first_rung"
    on_gate_closed: Literal["hold", "stop", "rollback"] = "hold"  # see `pass_gate`


# Where the paper (arXiv 2605.16826) is silent or contradicts itself, we
#   - take the KL over the full vocabulary (appendix D samples it, sections 3 and G.4 do not);
#   - average over all response tokens of the step, whatever the ranks and micro-batches; configs of
#     the paper's runs average over sequences, as the same lab's public code (PowerOPD) does;
#   - keep fp32 master weights: at lr 5e-7 pure bf16 weights lose most updates;
#   - sample with top_p = 1 and top_k = 0 by default, so that prefixes really come from q;
#   - end a student's response on the stop ids of both models: a Base student and a chat teacher
#     end with different ids, and with stop = "student" one that has learned the teacher's id never
#     stops. What the teacher writes always ends on either;
#   - cache the teacher's last hidden states, not its logits: 37 to 59 times smaller, and exact;
#   - look at the gate once, at the end of a rung, and keep it closed once it is closed.


def validate(cfg, world):
    """UserError for settings that cannot work together, before anything is loaded."""
    check_ranges(cfg)
    require(
        0 <= cfg.reverse_weight <= 1, cfg, "reverse_weight",
        "must be in [0, 1]; 0 is forward KL, 1 reverse KL")
    require(
        cfg.batch_size % world == 0, cfg, "batch_size",
        f"must be a multiple of the {world} processes; try {-(-cfg.batch_size // world) * world}")
    require(
        list(cfg.horizons) == sorted({*cfg.horizons}) and 0 < min(cfg.horizons, default=1),
        cfg, "horizons",
        "must be positive and grow from rung to rung")
    require(
        cfg.floor_unit == "nats" or cfg.entropy_floor <= 1, cfg, "entropy_floor",
        'above 1 x the entropy of the first rung none opens; lower it, or set floor_unit="nats"')
    require(
        cfg.prefix == "teacher" or not cfg.trajectories, cfg, "trajectories",
        'what is on disk was not written by this student; set prefix="teacher"')
    require(
        cfg.teacher
        or cfg.prefix == "teacher"
        and not (cfg.reverse_weight or cfg.eval_teacher or cfg.eval_kl),
        cfg, "teacher",
        'SFT on hard labels needs prefix="teacher", reverse_weight=0 (reverse KL to a hard '
        "label is infinite), eval_teacher=False and eval_kl=False")


# ---------------------------------------------------------------------------------------- prefixes


def response_source(cfg):
    """
    Where this run's responses come from: "student" or "teacher" writes them anew in each step, or
    they are on "disk", as trajectories or, for SFT without a teacher, as the file's solutions.
    """
    if cfg.prefix == "teacher" and (cfg.trajectories or cfg.teacher is None):
        return "disk"
    return cfg.prefix


def get_responses(cfg, slots, horizon, data, models, engines, check):
    """
    (responses, gaps): a Response for each (place in the step, index of the prompt, seed) of
    `slots`, cut at the horizon, or with terminal = "mask" before its stop id; and, where `check` is
    set and a model has written them, how far the engine's log-probs are from the model's, else {}.
    """
    source, gaps = response_source(cfg), {}
    _, indices, seeds = zip(*slots)
    if source == "disk":
        batch = [data.responses[i] for i in indices]
    else:
        engine, prompts = engines[source], [data.prompts[i] for i in indices]
        sampling = Sampling(
            horizon, models.stops[source], cfg.temperature, cfg.top_p, cfg.top_k, want_logps=check
        )
        rollouts = engine.generate(prompts, sampling, seeds)
        if check:
            _, gaps = score(engine, prompts, rollouts)
        batch = [
            Response(prompt, tokens, reason == "stop")
            for prompt, (tokens, _, reason) in zip(prompts, rollouts)
        ]

    def cut(r):  # at the horizon, for what is on disk may be longer; or before the stop id
        end = min(horizon, len(r.tokens) - (cfg.terminal == "mask" and r.ended))
        ended = r.ended and len(r.tokens) <= horizon
        return Response(r.prompt, r.tokens[:end], ended, r.hidden[:end])

    return [cut(response) for response in batch], gaps


# ---------------------------------------------------------------------------------------- the loss


def token_weights(cfg, micro, step_tokens):
    """
    What each token's KL is multiplied by, (N,) fp32. With loss_norm = "token" it is 1 / tokens of
    the whole step, over all ranks and micro-batches: the loss is a mean over tokens. With
    "sequence" it is 1 / (own length x batch_size): a mean of the means of the sequences.
    """
    weights = []
    for n in (len(response.tokens) for response in micro):
        denominator = step_tokens if cfg.loss_norm == "token" else n * cfg.batch_size
        weights += [1 / max(1, denominator)] * n
    return torch.tensor(weights)


def teacher_hidden(models, micro):
    """
    The teacher's hidden states (N, H_t) at the response tokens of a micro-batch, and its LM head
    (V_t, H_t). They come from a forward; or, where hidden states are cached, from the disk: then
    models.teacher is None, for the head is all that was loaded.
    """
    if models.teacher is None:
        cached = [response.hidden.to(models.head_p) for response in micro if response.tokens]
        return torch.cat([models.head_p[:0], *cached]), models.head_p
    with torch.no_grad():
        hidden = response_hidden(models.teacher, micro, models.dtype)
    return hidden, lm_head(models.teacher)


def hard_label_loss(h_q, W_q, micro, weight):
    """
    Cross-entropy on the tokens themselves: the KL(p||q) of a one-hot p. Over responses that the
    teacher samples its mean is KL(p||q) + H(p), so the gradient is forward KL's and the value is
    not. Results as `linear_kl`'s, zero where a one-hot p has none.
    """
    targets = torch.tensor([token for r in micro for token in r.tokens], dtype=torch.long)
    logps, entropy = linear_logp(h_q, W_q, targets.to(h_q.device))
    zeros = torch.zeros_like(entropy)
    return -(weight * logps).sum(), -logps.detach(), zeros, entropy, zeros


PER_TOKEN = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")


def loss_and_gradient(cfg, models, batch, timer):
    """
    Add the gradient of L (Eq. 4) on this rank's responses to the student's, where gradients are
    on. Returns numbers of the whole step, over all ranks: those of `split`, the loss, and means
    over response tokens of KL(p||q), KL(q||p), H(q) and H(p), in nats.

    `linear_kl` gives the sum of weight x the mixed KL, ready for a backward, then those four for
    each token, (N,), unweighted and detached. A loss of your own gives the same.
    """
    micros, step = split(cfg, batch, models)
    student, sums = models.student, torch.zeros(5, device=models.student.device)
    for micro in micros:
        weight = token_weights(cfg, micro, step["tokens"]).to(sums)  # (N,)
        if cfg.teacher:
            h_p, W_p = teacher_hidden(models, micro)  # (N, H_t), (V_t, H_t)
        timer.lap("teacher")
        h_q = response_hidden(student, micro, models.dtype)  # (N, H)
        W_q = lm_head(student)  # (V, H); after the forward, in which FSDP has gathered it
        if cfg.teacher:
            loss, *stats = linear_kl(h_q, W_q, h_p, W_p, weight, cfg.reverse_weight)
        else:
            loss, *stats = hard_label_loss(h_q, W_q, micro, weight)
        if torch.is_grad_enabled():
            loss.backward()
        sums += torch.stack([loss.detach(), *(per_token.sum() for per_token in stats)])
        timer.lap("student")
    loss, *sums = all_reduce(sums).tolist()
    means = [x / max(1, step["tokens"]) for x in sums]
    return step | dict(zip(PER_TOKEN, means), loss=loss)


# ---------------------------------------------------------------------------------- the curriculum


def gate(entropies, floor, unit):
    """
    The curriculum's rule (section 5.2). entropies: E_0 ... E_m, nats per token, at the ends of the
    rungs so far.

        rung m + 1 opens  iff  E_i >= E_min for every i <= m
        E_min = floor (unit = "nats")  or  floor * E_0 (unit = "first_rung")

    So once closed it stays closed, and the first gate always opens with "first_rung". Returns
    (whether the next rung opens, E_min). An entropy that is not a number closes the gate.
    """
    h_min = floor * entropies[0] if unit == "first_rung" else floor
    return all(entropy >= h_min for entropy in entropies), h_min


# The curriculum's part of the training state, which is saved and resumed with it: the number of
# the open `rung`, the step `rung_began`, the `entropies` at the gates so far, and `closed`.


def ladder(cfg):
    return cfg.horizons or (cfg.max_new_tokens,)  # a fixed horizon is a ladder of one


def current_horizon(cfg, state):
    return ladder(cfg)[: state["rung"] + 1][-1]


def gate_is_due(cfg, state):
    ends = state["rung_began"] + cfg.steps_per_horizon
    is_last = state["rung"] + 1 >= len(ladder(cfg))
    return state["step"] >= ends and not is_last and not state["closed"]


def pass_gate(cfg, state, models, data, engine, optimizer):
    """
    Measure the student's own entropy on held-out prompts, and open the next rung or close the gate
    for good. Closed, on_gate_closed = "hold" goes on at the rung that failed, "stop" ends the run,
    and "rollback" goes back to weights, optimiser and horizon of the rung before, if there is one.
    """
    horizon, began = current_horizon(cfg, state), state["rung_began"]
    sampling = Sampling(horizon, models.stops["student"], 1.0, cfg.top_p, cfg.top_k)
    metrics, records = evaluate(
        engine, models.template, data.held_out[: cfg.eval_prompts], sampling, 1, cfg.seed
    )
    state["entropies"].append(metrics["entropy"])
    opens, h_min = gate(state["entropies"], cfg.entropy_floor, cfg.floor_unit)
    if opens:
        state.update(rung=state["rung"] + 1, rung_began=state["step"])
    else:
        state["closed"] = True
    if not opens and cfg.on_gate_closed == "rollback" and began:
        load_checkpoint(f"{cfg.out_dir}/step_{began:06d}", models.student, optimizer)
        engine.sync()
        state["rung"] -= 1
    metrics |= {
        "gate": "open" if opens else "closed",
        "horizon": horizon,
        "entropy_floor": h_min,
        "next_horizon": current_horizon(cfg, state),
        "entropies": state["entropies"]}
    log_evaluation(cfg, state, "gate", metrics, records)
    print0(
        f"gate {metrics['gate']}: entropy {metrics['entropy']:.3f}, floor {h_min:.3f}; horizon "
        f"{horizon} -> {metrics['next_horizon']}"
    )


# ------------------------------------------------------------------------------------------ set-up


@dataclass
class Models:
    student: object  # fp32 masters
    teacher: object  # in the compute dtype; None: its head is enough, or there is none
    head_p: object  # (V_t, H_t) of a teacher whose hidden states are cached, else None
    dtype: object  # of the computation
    tokenizer: object  # the student's, with the teacher's chat template: it goes into checkpoints
    template: object  # the tokenizer that makes the prompts and reads the responses
    vocab_size: int  # ids below it have a row in both embeddings
    positions: int  # the smallest max_position_embeddings of the models that are loaded
    stops: dict  # ids that end a response of "student" or "teacher"; "own": of the student at first


def load_models(cfg, trajectories, device):
    """Both models and their tokenizers, checked against each other, sharded with cfg.fsdp."""
    tokenizer = template = load_tokenizer(cfg.student, cfg.chat_template_kwargs)
    for path in (cfg.teacher, trajectories and trajectories.folder / "tokenizer"):
        if path:
            template = load_tokenizer(path, cfg.chat_template_kwargs)
            check_tokenizers(tokenizer, template, "the student", "the teacher")
            tokenizer.chat_template = template.chat_template
    dtype = getattr(torch, cfg.dtype)
    host = "cpu" if cfg.fsdp else device  # sharding moves a layer at a time
    student = load_model(
        cfg.student, torch.float32, host, cfg.gradient_checkpointing, cfg.compile
    )
    models, heads = [student], [lm_head(student)]
    teacher, head_p, teacher_generation = None, None, None
    if trajectories and trajectories.cached:
        require(
            not (cfg.eval_teacher or cfg.eval_kl), cfg, "trajectories",
            "of the teacher only its LM head is kept: set eval_teacher and eval_kl False")
        head_p, teacher_generation = load_head(cfg.teacher, trajectories, dtype, device)
        heads.append(head_p)
    elif cfg.teacher:
        teacher = load_model(cfg.teacher, dtype, host, compiled=cfg.compile).requires_grad_(False)
        teacher_generation = teacher.generation_config
        models.append(teacher)
        heads.append(lm_head(teacher))
    vocab_size = min(map(len, heads))
    positions = min(model.config.max_position_embeddings for model in models)

    own_ids = stop_ids(student.generation_config, tokenizer)
    teacher_ids = stop_ids(teacher_generation, template) if teacher_generation else []
    disk_ids = trajectories.settings["stop_ids"] if trajectories else []
    either = sorted({*own_ids, *teacher_ids, *disk_ids})
    student_ids = either if cfg.stop == "union" else own_ids
    if cfg.exchange_stops:
        # Also when resumed: its checkpoint, which is loaded later, may have an LM head of its own.
        exchange_stops(student, own_ids, teacher_ids, encode_prompt(template, "?"))
        student_ids = student.config.eos_token_id = teacher_ids
        tokenizer.eos_token = template.eos_token
    stops = {"own": own_ids, "student": student_ids, "teacher": either}
    for model in models if cfg.fsdp else ():
        shard(model, dtype)
    # Whoever loads a checkpoint stops there too.
    student.generation_config.eos_token_id = student_ids
    return Models(
        student, teacher, head_p, dtype, tokenizer, template, vocab_size, positions, stops
    )


def shard(model, dtype):
    """
    FSDP2: a rank keeps its part of every tensor and gathers a layer, in `dtype`, only while it
    runs. Embedding, norm and head are one group, for two of them may be one tensor. Gradients of a
    micro-batch are in `dtype` and summed in fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*model.base_model.layers, model]:
        fully_shard(module, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # a sum: weights have divided by the step's tokens
        module.set_force_sum_reduction_for_comms(True)
    # The loss takes hidden states, not forward's logits, so FSDP must know of this method too.
    model.sharded_base_model = lambda *args, **kwargs: model.base_model(*args, **kwargs)
    register_fsdp_forward_method(model, "sharded_base_model")


@dataclass
class Data:
    held_out: list  # (problem, its prompt's ids), for evaluations and the gate
    prompts: list  # ids of each training prompt; [] with trajectories, which have them
    responses: object = None  # Trajectories, or a Response to each prompt; None: a model writes


def encode_data(cfg, models, trajectories, problems, held_out):
    """The data as token ids; prompts that leave no room for the longest horizon are left out."""
    limits, horizon = (models.positions, models.vocab_size), ladder(cfg)[-1]
    data = Data([], [], trajectories)
    if held_out:
        longest = max(horizon, cfg.eval_max_new_tokens)
        usable = usable_prompts(cfg.eval_data, held_out, models.template, longest, *limits)
        data.held_out = [(held_out[i], prompt) for i, prompt in usable.items()]
    if trajectories:
        trajectories.check(cfg, horizon, *limits)
        return data
    usable = usable_prompts(cfg.prompts, problems, models.template, horizon, *limits)
    data.prompts = list(usable.values())
    if cfg.teacher is None:
        end = models.stops["own"][0]
        data.responses = []
        for i, prompt in usable.items():
            solution = problems[i]["solution"]
            if not solution:
                raise UserError(
                    f"{cfg.prompts}: problem {problems[i]['problem'][:40]!r} has no "
                    f"solution; add one, name a teacher, or give trajectories"
                )
            tokens = models.tokenizer.encode(solution, add_special_tokens=False)
            data.responses.append(Response(prompt, [*tokens, end], True))
    return data


def make_engines(cfg, models, data):
    """
    {"student": engine, "teacher": engine, where it is run}. vLLM can put only one engine of a
    process to sleep, so where the teacher writes the prefixes it has vLLM, and the student's
    evaluations use transformers.
    """
    kinds = {"student": cfg.engine}
    if response_source(cfg) == "teacher":
        kinds = {"student": "hf", "teacher": cfg.engine}
    elif cfg.eval_teacher:
        kinds["teacher"] = "hf"
    prompts = data.prompts + [prompt for _, prompt in data.held_out]
    longest = max(map(len, prompts), default=0) + max(ladder(cfg)[-1], cfg.eval_max_new_tokens)
    return {
        name: make_engine(
            kind, cfg, getattr(models, name), models.dtype, models.vocab_size, longest
        )
        for name, kind in kinds.items()
    }


# -------------------------------------------------------------------------------- a step in numbers


def split(cfg, batch, models):
    """
    Micro-batches of this rank's responses, and what the whole step has over all ranks: "tokens" of
    responses, the "truncated_count", the "max_length", and "student_flops" and "teacher_flops" of a
    forward. Every rank has equally many micro-batches, for with FSDP each forward is a collective:
    a rank with fewer gets some of an empty response.
    """
    responses = [len(response.tokens) for response in batch]
    lengths = [*map(sequence_length, batch)]
    own = {
        "tokens": sum(responses),
        "truncated_count": sum(not response.ended for response in batch),
        "student_flops": forward_flops(models.student, lengths),
        "teacher_flops": forward_flops(models.teacher, lengths) if models.teacher else 0}
    micros = microbatches(batch, cfg.max_tokens_per_microbatch)
    most = torch.tensor([max(responses, default=0), len(micros)])
    longest, forwards = all_reduce(most, dist.ReduceOp.MAX).tolist()
    micros += [[Response([0], [], True)]] * (forwards - len(micros))
    return micros, sum_over_ranks(own) | {"max_length": longest}


@torch.no_grad()
def held_out_kl(cfg, models, held_out, records, timer):
    """Both KLs on an evaluation's responses of the student, nats per token."""
    batch = [Response(held_out[r["index"]][1], r["tokens"], True) for r in records[RANK::WORLD]]
    measured = loss_and_gradient(cfg, models, batch, timer)
    return {key: measured[key] for key in PER_TOKEN[:2]}


def metrics_row(cfg, state, numbers):
    """
    The numbers of a step for the log, and all FLOPs so far as the paper counts them (appendix H.1).
    With F_s and F_t of a forward, student prefixes take F_s to write, F_t and 3 F_s; teacher
    prefixes F_t + 3 F_s; cached ones 3 F_s. Not counted: the teacher's writing, F_t, and what a
    cached teacher's LM head takes, 2 V_t H_t for each token.
    """
    forwards = 4 if response_source(cfg) == "student" else 3
    state["tflops"] += (forwards * numbers["student_flops"] + numbers["teacher_flops"]) / 1e12
    return numbers | {
        "reverse_kl": numbers["reverse_kl"] if cfg.teacher else None,
        "mean_length": numbers["tokens"] / cfg.batch_size,
        "truncated_share": numbers["truncated_count"] / cfg.batch_size,
        "tflops": state["tflops"]}


COLUMNS = """
    step=step loss=loss fwd=forward_kl rev=reverse_kl H_q=student_entropy len=mean_length
    cut=truncated_share grad=grad_norm tok/s=tokens_per_second sec=seconds"""


def main(argv):
    cfg = load_config(Config, argv)
    device = init_processes(cfg.collective_timeout)
    validate(cfg, WORLD)

    # files first, for mistakes in them should not cost the time to load models
    trajectories, problems, held_out = None, [], []
    if cfg.trajectories:
        trajectories = Trajectories(cfg.trajectories, want_hidden=cfg.teacher is not None)
    else:
        problems = load_problems(cfg.prompts)
    if cfg.eval_every or len(cfg.horizons) > 1:
        held_out = load_problems(cfg.eval_data)
        warn_of_overlap(problems, held_out)
    identity = {
        "script": Path(__file__).stem,
        "student": model_revision(cfg.student),
        "teacher": cfg.teacher and model_revision(cfg.teacher),
        "trajectories": trajectories and trajectories.revision,
        "prompts": fingerprint(dict(enumerate(problems))),
        "exchange_stops": cfg.exchange_stops or None}  # None: as in older checkpoints
    inputs = cfg.student, cfg.teacher, cfg.prompts, cfg.eval_data, cfg.trajectories
    state, checkpoint = start_run(cfg, inputs, identity, rung=0, entropies=[], closed=False)
    models = load_models(cfg, trajectories, device)
    data = encode_data(cfg, models, trajectories, problems, held_out)
    engines = make_engines(cfg, models, data)

    student = models.student
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=cfg.learning_rate, fused=True, weight_decay=cfg.weight_decay
    )
    if checkpoint:
        load_checkpoint(checkpoint, student, optimizer)
    save = partial(save_checkpoint, cfg, student, models.tokenizer, optimizer, state)
    open_run(cfg, student, models.tokenizer, state)  # from here on files are written
    start_step, count = state["step"], len(data.responses or data.prompts)
    print0(f"{count} prompts, {WORLD} process(es) on {device.type}, from step {start_step}")
    catch_signals()

    for step in range(start_step, cfg.max_steps + 1):  # updates so far; the last only evaluates
        state["step"] = step
        end_early(save, step)
        engines["student"].sync()

        # 0. gate, evaluation, checkpoint. A resumed run has done these already at its first step.
        is_new, is_best = step > state["last_eval_step"], False
        at_gate = is_new and gate_is_due(cfg, state)
        if at_gate:
            pass_gate(cfg, state, models, data, engines["student"], optimizer)
        is_last = step == cfg.max_steps or state["closed"] and cfg.on_gate_closed == "stop"
        if is_new and cfg.eval_every and (is_last or step % cfg.eval_every == 0):
            for name in ["teacher"] * (cfg.eval_teacher and step == 0) + ["student"]:
                sampling = Sampling(cfg.eval_max_new_tokens, models.stops[name],
                                    cfg.eval_temperature, cfg.eval_top_p)
                metrics, records = evaluate(engines[name], models.template,
                                            data.held_out[:cfg.eval_prompts], sampling,
                                            cfg.eval_samples, cfg.seed)
                if cfg.eval_kl and name == "student":
                    metrics |= held_out_kl(cfg, models, data.held_out, records, Timer(device))
                is_best = log_evaluation(cfg, state, name, metrics, records)
        state["last_eval_step"] = step
        if is_new and step > 0 and (at_gate or is_best or is_last or step % cfg.save_every == 0):
            save()
        if is_last:
            break

        # 1. prefixes: a response to each prompt of this rank's share of the step
        timer, horizon = Timer(device), current_horizon(cfg, state)
        slots = deal(count, step, cfg.batch_size, cfg.seed)
        check = step <= start_step + 1 or step % cfg.check_sync_every == 0
        batch, gaps = get_responses(cfg, slots, horizon, data, models, engines, check)
        end_early(save, step)
        timer.lap("rollout")

        # 2. - 3. hidden states of both models at the response tokens; the KL and its gradient
        numbers = loss_and_gradient(cfg, models, batch, timer)

        # 4. update: one sum of the gradients over ranks, clip, step
        grad_norm = 0.0
        if numbers["tokens"]:  # else there is nothing to learn from in this step
            grad_norm = update(cfg, optimizer, step + 1, numbers["loss"])
        timer.lap("optimizer")

        # 5. log
        row = metrics_row(cfg, state, numbers) | {
            "step": step + 1,
            "horizon": horizon,
            "grad_norm": grad_norm,
            "learning_rate": optimizer.param_groups[0]["lr"],
            **gaps,
            **timer,
            "tokens_per_second": numbers["tokens"] / timer["seconds"]}
        log_step(cfg, COLUMNS, row, header=step % 20 == 0 or step == start_step)

    end_early(save, step)
    print0(
        f"done at step {step}, horizon {current_horizon(cfg, state)}: {cfg.out_dir}/last; `python "
        f"plot.py {cfg.out_dir}` draws the curves and prints a table"
    )


if __name__ == "__main__":
    run(main, __doc__, Config)
