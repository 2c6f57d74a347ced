"""
Distil a teacher LLM into a smaller student.

    python train_distill.py configs/toy_opd.py                        # CPU, about two minutes
    torchrun --nproc_per_node=8 train_distill.py configs/opd_8b.py    # Qwen3-8B -> Qwen3-0.6B-Base

p = teacher, q = student: next-token distributions at each response token, after a prefix s = prompt + response so far.
    prefix           who wrote the response the loss is taken on: "teacher" or "student"
    reverse_weight   lam in  L(s) = lam KL(q||p) + (1 - lam) KL(p||q)                                        (Eq. 4)

                     lam = 0, forward KL(p||q)          lam = 1, reverse KL(q||p)
    "teacher"        off-policy SFT, soft labels        offline-RL style
    "student"        DAgger style                       OPD: on-policy distillation

Nothing is differentiated through sampling: prefixes are data. The teacher's come from disk (trajectories, written by sample.py;
with cached hidden states only the teacher's LM head is loaded) or are written step by step. teacher=None is SFT on hard labels,
the trajectories or the solutions in the prompt file: the Monte-Carlo form of forward KL on teacher prefixes.

horizons = (128, 256, ...) is the entropy-gated length curriculum (section 5.2), for any prefix and direction: after
steps_per_horizon steps on a rung the next one opens only if the entropy of the student's own responses, to held-out prompts and
as long as the rung, has not fallen below a floor.

Where the paper (arXiv 2605.16826) is silent or contradicts itself, we
  - take the KL over the full vocabulary (its appendix D speaks of a sampled estimate, its sections 3 and G.4 of the full one);
  - average over all response tokens of the step, whatever the ranks and micro-batches (loss_norm = "sequence" for the other);
  - keep fp32 master weights under bf16 compute: at lr 5e-7 pure bf16 weights lose most updates;
  - sample with top_p = 1, top_k = 0 by default, so that prefixes really come from q; the paper's 0.95 / 20 are in its configs;
  - end a student's response on the stop ids of either model (stop = "union"): a Base student and a chat teacher end their turns
    with different ids, and on its own id alone (stop = "student") a student that has learned the teacher's never stops. What
    the teacher writes always ends on either;
  - cache the teacher's last hidden states, not its logits: 37 to 59 times smaller, and exact;
  - look at the gate once, at the end of a rung; closed, it stays closed. The floor is half the entropy after the first rung.
"""

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint as checkpointed

import trajectories
import utils
from engine import Sampling, agree, check_logprobs, choose_engine, make_engine
from grade import evaluate
from kernels import linear_kl, linear_logp
from utils import Timer, UserError


@dataclasses.dataclass
class Config:
    # what is trained on what
    student: str = "Qwen/Qwen3-0.6B-Base"                # folder or hub name
    teacher: str | None = "Qwen/Qwen3-4B"                # None: hard-label SFT on the prompt file's solutions
    prompts: str = "data/deepscaler.jsonl"               # JSONL with problem / answer (and solution), or question / answer
    trajectories: str | None = None                      # folder that sample.py wrote, for prefix="teacher"; None: the teacher
                                                         # writes them step by step
    prefix: Literal["teacher", "student"] = "student"
    reverse_weight: float = 1.0                          # lam in [0, 1]
    loss_norm: Literal["token", "sequence"] = "token"    # mean over tokens, or mean of per-sequence means
    # rollouts
    engine: Literal["auto", "hf", "vllm"] = "auto"       # who decodes: transformers, or vLLM; auto: vLLM on a GPU
    max_new_tokens: int = 4096                           # the horizon, stop token included
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0                                       # 0: all tokens
    stop: Literal["union", "student"] = "union"          # whose stop ids end a student's response
    rollout_rows: int = 32                               # responses decoded together; bounds the KV cache of engine="hf": 0.6B,
                                                         # 4096 tokens and 32 rows hold 15 GB
    kv_cache_gb: float = 16.0                            # of vLLM; it is given back while the trainer computes
    rollout_timeout: float = 600.0                       # seconds without a sign of life before vLLM is given up
    check_sync_every: int = 50                           # steps; then the engine's log-probs are compared with the trainer's
    max_logprob_gap: float | None = None                 # nats, mean over tokens; None: 0.05 in bf16, 1e-4 in fp32
    # entropy-gated length curriculum (section 5.2)
    horizons: tuple[int, ...] = ()                       # rungs, short to long; (): max_new_tokens throughout
    steps_per_horizon: int = 160                         # updates on a rung before its gate; the last rung has the rest
    gate_prompts: int = 200                              # the first so many of eval_data; one response each at T = 1, top_p and
                                                         # top_k as above, as long as the rung's horizon
    entropy_floor: float = 0.5                           # H_min: a fraction of the first rung's entropy at its end, or nats
    floor_unit: Literal["first_rung", "nats"] = "first_rung"
    on_gate_closed: Literal["hold", "stop", "rollback"] = "hold"     # go on at the rung that failed; end there; or go back to
                                                         # weights, optimiser and horizon of the rung before, if any, and go on
    # optimisation
    batch_size: int = 32                                 # prompts a step over all ranks, one response each
    max_steps: int = 1000
    learning_rate: float = 5e-7
    warmup_steps: int = 50                               # linear, then constant
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"   # compute; master weights are always fp32
    max_tokens_per_microbatch: int = 16384               # padded tokens in one forward; does not change the result
    gradient_checkpointing: bool = False                 # keep a layer's input only, and run it again in the backward
    # processes (torchrun)
    fsdp: bool = False                                   # shard student and teacher over them; else each holds both whole
    collective_timeout: float = 1800.0                   # seconds one waits for the others before all end
    # evaluation on a fixed held-out set
    eval_data: str = "data/math500.jsonl"
    eval_every: int = 30                                 # steps; 0: never
    eval_prompts: int = 200                              # the first so many of eval_data
    eval_samples: int = 1                                # k of Avg@k and Pass@k
    eval_max_new_tokens: int = 4096
    eval_temperature: float = 0.6
    eval_top_p: float = 0.95
    eval_teacher: bool = False                           # measure the teacher too, once (with fsdp whole on each device)
    # run
    out_dir: str = "out/distill"
    save_every: int = 40                                 # steps; the end of the run and a new best are always saved
    keep: int = 10                                       # newest checkpoints that stay, besides `best`
    seed: int = 42
    resume: bool = False                                 # go on from the newest whole checkpoint in out_dir, if there is one
    overwrite: bool = False                              # delete the run in out_dir first


def validate(cfg, world):
    """Every combination that cannot work, before anything is loaded."""
    def need(ok, key, limit):
        if not ok:
            raise UserError(f"{key}={getattr(cfg, key)!r}: {limit}")

    need(0 <= cfg.reverse_weight <= 1, "reverse_weight", "must be in [0, 1]; 0 is forward KL, 1 reverse KL")
    need(cfg.batch_size >= 1 and cfg.batch_size % world == 0, "batch_size",
         f"must be a positive multiple of the {world} processes; try {max(1, cfg.batch_size // world) * world}")
    for key in ("max_new_tokens", "rollout_rows", "max_tokens_per_microbatch", "eval_prompts", "eval_samples",
                "eval_max_new_tokens", "steps_per_horizon", "gate_prompts", "save_every", "keep", "check_sync_every"):
        need(getattr(cfg, key) >= 1, key, "must be at least 1")
    for key in ("max_steps", "warmup_steps", "eval_every", "top_k", "temperature", "eval_temperature", "weight_decay",
                "learning_rate", "entropy_floor"):
        need(getattr(cfg, key) >= 0, key, "must not be negative")
    for key in ("top_p", "eval_top_p"):
        need(0 < getattr(cfg, key) <= 1, key, "must be in (0, 1]; 1 keeps every token")
    need(list(cfg.horizons) == sorted({*cfg.horizons}) and min(cfg.horizons, default=1) >= 1, "horizons",
         "must be positive and grow from rung to rung")
    need(cfg.floor_unit == "nats" or cfg.entropy_floor <= 1, "entropy_floor",
         'above 1 x the entropy at the end of the first rung no rung opens; lower it, or set floor_unit="nats"')
    need(cfg.max_grad_norm > 0, "max_grad_norm", "must be positive; inf never clips")
    need(cfg.collective_timeout > 0, "collective_timeout", "must be positive: seconds")
    if cfg.trajectories is not None:
        need(cfg.prefix == "teacher", "trajectories", 'what is on disk was not written by this student; set prefix="teacher"')
    if cfg.teacher is None:
        need(cfg.prefix == "teacher", "prefix", 'teacher=None is SFT on solutions; set prefix="teacher"')
        need(cfg.reverse_weight == 0, "reverse_weight", "reverse KL to a hard label is infinite; with teacher=None set it to 0")
        need(not cfg.eval_teacher, "eval_teacher", "there is none with teacher=None; set it to False")


def gate(entropies, floor, unit):
    """
    The curriculum's rule (section 5.2). entropies: H_0 ... H_m, nats per token, at the ends of the rungs so far.

        rung m + 1 opens  iff  H_i >= H_min for every i <= m;        H_min = floor ("nats") or floor * H_0 ("first_rung")

    So once closed it stays closed, and length plays no part. Returns (whether the next rung opens, H_min); (False, None) before
    the first measurement. UserError (a ValueError) when an entropy is not finite.
    """
    if not entropies:
        return False, None
    if not all(map(math.isfinite, entropies)):
        raise UserError(f"the gate measured entropies {entropies}: not finite, so the weights are broken; start again from an "
                        f"earlier checkpoint with a lower learning_rate")
    h_min = floor * entropies[0] if unit == "first_rung" else floor
    return min(entropies) >= h_min, h_min


def shard(model, device, dtype):
    """
    FSDP2: a rank keeps its part of every tensor and gathers a layer, in `dtype`, only while it runs. What is no layer, that is
    embedding, norm and head, is one group: two may be one tensor. Gradients, in `dtype` for a micro-batch, are summed in fp32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*model.base_model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        module.set_gradient_divide_factor(1.0)           # a sum: the loss is divided by the tokens of the whole step
        module.set_force_sum_reduction_for_comms(True)
    model.sharded_base_model = lambda *args, **kwargs: model.base_model(*args, **kwargs)
    register_fsdp_forward_method(model, "sharded_base_model")            # the loss takes hidden states, not forward's logits


COLUMNS = {"step": "step", "loss": "loss", "fwd": "forward_kl", "rev": "reverse_kl", "H_q": "student_entropy",
           "H_p": "teacher_entropy", "len": "mean_length", "max": "max_length", "cut": "truncated_share", "grad": "grad_norm",
           "tok/s": "tokens_per_second", "roll": "rollout_seconds", "tea": "teacher_seconds", "stu": "student_seconds",
           "opt": "optimizer_seconds", "TFL": "tflops"}


def main(argv):
    cfg, origin = utils.load_config(Config, argv)
    rank, world, device = utils.init_processes(cfg.collective_timeout)
    validate(cfg, world)
    chief = rank == 0                                    # the rank that prints and writes
    inputs = (cfg.student, cfg.teacher, cfg.prompts, cfg.eval_data, cfg.trajectories)
    checkpoint = utils.prepare_out_dir(cfg.out_dir, cfg.resume, cfg.overwrite, inputs)
    state = {"script": "train_distill", "student": cfg.student, "step": 0, "tflops": 0.0, "best": -1.0, "own_stops": None,
             "looked": False, "entropies": [], "rung": 0, "rung_began": 0, "closed": False}           # the curriculum's
    if checkpoint:
        state |= utils.read_train_state(checkpoint, "train_distill")
        if state["student"] != cfg.student:
            raise UserError(f"{checkpoint} was trained from student={state['student']!r}, not {cfg.student!r}; resume with "
                            f"that one, or start a new run from its weights with --student={checkpoint}")
        if cfg.max_steps < state["step"]:
            raise UserError(f"max_steps={cfg.max_steps}: {checkpoint} is at step {state['step']} already; raise max_steps")
    data = trajectories.Trajectories(cfg.trajectories, want_hidden=cfg.teacher is not None) if cfg.trajectories else None
    if data and state.setdefault("trajectories", len(data)) != len(data):
        raise UserError(f"{cfg.trajectories} holds {len(data)} sequences, {state['trajectories']} when {checkpoint} was "
                        f"written: their order would change; start a new run from its weights with --student={checkpoint}")
    problems = utils.load_problems(cfg.prompts) if data is None else []
    ladder = cfg.horizons or (cfg.max_new_tokens,)       # a fixed horizon is a ladder of one
    held_out = utils.load_problems(cfg.eval_data) if cfg.eval_every or len(ladder) > 1 else []

    # models: fp32 masters for the student, the compute dtype for the teacher, of which its head is enough for cached states
    dtype = getattr(torch, cfg.dtype)
    tokenizer = template = utils.load_tokenizer(cfg.student)
    for path in (cfg.teacher, data and str(data.folder / "tokenizer")):
        if path is not None:                             # its chat template makes the prompts, and goes into the checkpoints
            utils.check_tokenizers(tokenizer, template := utils.load_tokenizer(path), "the student", "the teacher")
            tokenizer.chat_template = template.chat_template
    kind = choose_engine(cfg.engine, device, chief)
    utils.print_estimate(cfg, kind, device, cfg.student, (cfg.prefix == "teacher" and cfg.teacher) or cfg.student,
                         {"teacher": (None if data and data.cached else cfg.teacher, dtype.itemsize)}, ladder[-1], world,
                         cfg.batch_size)
    sharded = cfg.fsdp and world > 1
    host = "cpu" if sharded else device                  # sharding moves a layer at a time
    student = utils.load_model(checkpoint or cfg.student, torch.float32, host)
    teacher = head_p = None
    if cfg.teacher and data and data.cached:
        if cfg.eval_teacher:
            raise UserError("eval_teacher=True: beside cached hidden states only the teacher's LM head is loaded; set it False")
        head_p = trajectories.load_head(cfg.teacher, data).to(device, dtype)
    elif cfg.teacher:
        teacher = utils.load_model(cfg.teacher, dtype, host).requires_grad_(False)
        head_p = teacher.get_output_embeddings().weight
    for model in filter(None, (student, teacher) if sharded else ()):
        shard(model, device, dtype)
    for layer in student.base_model.layers if cfg.gradient_checkpointing else ():
        layer.forward = functools.partial(checkpointed, layer.forward, use_reentrant=False, preserve_rng_state=False)
    vocab_size = min(len(W) for W in (student.get_output_embeddings().weight, head_p) if W is not None)
    positions = min(m.config.max_position_embeddings for m in (student, teacher) if m)
    own_stops = state["own_stops"] = state["own_stops"] or utils.stop_ids(student.generation_config, tokenizer)
    teacher_stops = utils.stop_ids(teacher.generation_config, template) if teacher else []
    all_stops = sorted({*own_stops, *teacher_stops, *(data.settings["stop_ids"] if data else [])})
    student_stops = all_stops if cfg.stop == "union" else own_stops
    student.generation_config.eos_token_id = student_stops    # so a checkpoint stops where its training did

    # prompts: those with room for the horizon, in this data and in the evaluation's
    limits = positions, vocab_size, chief
    if data:
        data.check(ladder[-1], positions, vocab_size)
    else:
        encoded = utils.usable_prompts(cfg.prompts, problems, template, ladder[-1], *limits)
        prompts = list(encoded.values())

    def first(n, horizon):
        usable = utils.usable_prompts(cfg.eval_data, held_out[:n], template, horizon, *limits)
        return [held_out[i] for i in usable], list(usable.values())
    eval_set = first(cfg.eval_prompts, cfg.eval_max_new_tokens) if cfg.eval_every else ([], [])
    gate_set = first(cfg.gate_prompts, ladder[-1]) if len(ladder) > 1 else ([], [])
    if cfg.teacher is None and data is None:
        if without := [problems[i]["problem"][:40] for i in encoded if not (problems[i]["solution"] or "").strip()]:
            raise UserError(f"{cfg.prompts}: teacher=None trains on solutions, and problem {without[0]!r} has none; add a "
                            f"\"solution\" to every line, name a teacher, or give trajectories")
        end = tokenizer.eos_token_id if tokenizer.eos_token_id in own_stops else own_stops[0]
        solutions = [[*tokenizer.encode(problems[i]["solution"], add_special_tokens=False), end] for i in encoded]

    eval_sampling = Sampling(cfg.eval_max_new_tokens, tuple(student_stops), cfg.eval_temperature, cfg.eval_top_p, 0, vocab_size)
    longest = max(map(len, [*([] if data else prompts), *(p for _, some in (eval_set, gate_set) for p in some)]), default=0)
    longest += max(ladder[-1], cfg.eval_max_new_tokens)
    writes = teacher is not None and data is None and cfg.prefix == "teacher"    # then it has vLLM: of two, none could sleep
    student_engine = make_engine("hf" if writes else kind, cfg, student, dtype, vocab_size, longest)
    teacher_engine = teacher and make_engine(kind if writes else "hf", cfg, teacher, dtype, vocab_size, longest)
    writer, writer_engine = (student, student_engine) if cfg.prefix == "student" else (teacher, teacher_engine)

    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    if checkpoint:
        utils.load_optimizer(checkpoint, student, optimizer)

    metrics_file = utils.open_run(cfg, origin, state, rank, world)         # from here on files are written
    if chief:
        print(f"{len(data)} trajectories" if data else f"{len(prompts)} prompts", end="")
        print(f", {world} process(es) on {device.type}, from step {state['step']}")
        if len(ladder) > 1 and cfg.max_steps <= (climb := cfg.steps_per_horizon * (len(ladder) - 1)):
            print(f"warning: max_steps={cfg.max_steps}: horizon {ladder[-1]} opens after {climb} steps at the earliest")

    def save(is_best=False):
        links = ["best"] * is_best + ["stable"] * (state["rung_began"] == step > 0)      # stable: where a gate has just opened
        utils.save_checkpoint(cfg.out_dir, student, tokenizer, optimizer,
                              {**state, "step": step, "config": dataclasses.asdict(cfg)}, cfg.keep, links)
        return f"step {step} is saved: --resume goes on"

    rescue = None if sharded else save                   # beside a failed engine: shards could not be gathered any more

    def ask(engine, model, held_out, how, samples):
        return evaluate(engine, model, template, *held_out, how, samples, cfg.seed, cfg.max_tokens_per_microbatch, rank,
                              world, dtype, rescue)

    def measure(engine, model, name, stops):
        how = dataclasses.replace(eval_sampling, stop_ids=tuple(stops))
        metrics, records = ask(engine, model, eval_set, how, cfg.eval_samples)
        utils.log_evaluation(cfg.out_dir, step, name, metrics, records, chief)
        return metrics

    start_step = state["step"]
    utils.catch_signals()
    for step in range(start_step, cfg.max_steps + 1):        # step = updates done so far; the last pass only evaluates
        if stop := utils.signal_received():              # on SIGTERM or SIGINT the step is finished, nothing is lost
            state["looked"] &= step == start_step        # of the step before; here nothing has been looked at yet
            utils.end_by_signal(stop, save())
        student_engine.sync(student)
        fresh = not (step == start_step and state["looked"])     # else a resumed run has looked, evaluated and saved there
        state["looked"] = not fresh
        rung = min(state["rung"], len(ladder) - 1)
        looks = fresh and not state["closed"] and rung + 1 < len(ladder) and step >= state["rung_began"] + cfg.steps_per_horizon
        if looks:                                        # the curriculum: one look at the gate, at the end of a rung
            how = Sampling(ladder[rung], tuple(student_stops), 1.0, cfg.top_p, cfg.top_k, vocab_size)
            seen, records = ask(student_engine, student, gate_set, how, 1)
            state["entropies"].append(seen["entropy"])
            opens, h_min = gate(state["entropies"], cfg.entropy_floor, cfg.floor_unit)
            if opens:
                state |= {"rung": rung + 1, "rung_began": step}
            else:
                state["closed"] = True
                if cfg.on_gate_closed == "rollback" and rung:            # to the checkpoint of the last gate that opened
                    stable = Path(cfg.out_dir, f"step_{state['rung_began']:06d}")
                    if why := utils.damage(stable):
                        raise UserError(f"cannot roll back to {stable}: it is damaged ({why}); go on with on_gate_closed=hold")
                    set_model_state_dict(student, utils.load_model(stable, torch.float32).state_dict(),
                                         options=StateDictOptions(full_state_dict=True))
                    utils.load_optimizer(stable, student, optimizer)
                    student_engine.sync(student)
                    state["rung"] = rung - 1
            decision = {"gate": "open" if opens else "closed", "on_gate_closed": cfg.on_gate_closed, "horizon": ladder[rung],
                        "next_horizon": ladder[state["rung"]], "entropies": state["entropies"], "entropy_floor": h_min}
            utils.log_evaluation(cfg.out_dir, step, "gate", seen | decision, records, chief)
            if chief:
                print(f"gate {step:>4} {decision['gate']}: entropy {seen['entropy']:.3f}, floor {h_min:.3f}; horizon "
                      f"{ladder[rung]} -> {ladder[state['rung']]}", flush=True)
        horizon = ladder[min(state["rung"], len(ladder) - 1)]
        over = step == cfg.max_steps or state["closed"] and cfg.on_gate_closed == "stop"
        if fresh:
            is_best = False
            if cfg.eval_every and (step % cfg.eval_every == 0 or over):
                if step == 0 and cfg.eval_teacher:
                    measure(teacher_engine, teacher, "teacher", all_stops)
                score = measure(student_engine, student, "student", student_stops)["avg_at_k"]
                is_best = step > 0 and score is not None and score > state["best"]
                state["best"] = score if is_best else state["best"]
            state["looked"] = True
            if step > 0 and (is_best or looks or step % cfg.save_every == 0 or over):
                save(is_best)
        if over:
            break

        # 1. prefixes: prompts are dealt to ranks, and seeded by their place in the step, not by rank
        timer = Timer(device, "rollout", "teacher", "student", "optimizer")
        order = utils.prompt_order(len(data or prompts), step * cfg.batch_size, cfg.batch_size, cfg.seed)
        mine = list(enumerate(order))[rank::world]
        gaps = {}
        if data:
            written = [data[i] for _, i in mine]
        elif cfg.teacher is None:
            written = [(prompts[i], solutions[i], True, None) for _, i in mine]
        else:
            stops = tuple(student_stops if cfg.prefix == "student" else all_stops)
            sampling = Sampling(horizon, stops, cfg.temperature, cfg.top_p, cfg.top_k, vocab_size)
            seeds = [utils.derive_seed(cfg.seed, "train", step, slot) for slot, _ in mine]
            asked = [prompts[i] for _, i in mine]
            rollouts = agree(rescue, writer_engine.generate, asked, sampling, seeds)
            if step == start_step or step % cfg.check_sync_every == 0:
                gaps = check_logprobs(writer_engine, writer, asked, rollouts, vocab_size, dtype,
                                            cfg.max_tokens_per_microbatch)
            written = [(prompt, tokens, reason == "stop", None) for prompt, (tokens, _, reason) in zip(asked, rollouts)]
        truncated = sum(not ended or len(r) > horizon for _, r, ended, _ in written)
        sequences = [(p, r[:horizon]) for p, r, _, _ in written]
        cached = [None if h is None else h[:horizon] for _, _, _, h in written]
        lengths = [len(p) + len(r) for p, r in sequences]
        flops = [utils.forward_flops(m.config, lengths) if m else 0 for m in (student, teacher, None if data else writer)]
        counts = torch.tensor([sum(len(r) for _, r in sequences), len(sequences), truncated, *flops], dtype=torch.float64)
        all_tokens, all_sequences, truncated, *flops = utils.all_reduce(counts.to(device)).tolist()
        student_flops, teacher_flops, writer_flops = flops
        batches = utils.microbatches(lengths, cfg.max_tokens_per_microbatch)
        most = torch.tensor([max([len(r) for _, r in sequences], default=0), len(batches)], device=device)
        longest, forwards = utils.all_reduce(most, dist.ReduceOp.MAX).tolist()
        batches += [[]] * (forwards - len(batches))      # as many on every rank: with fsdp each is a collective
        timer.lap("rollout")

        # 2. - 3. hidden states of both models on those prefixes, and the KL from them, gradient included
        totals = torch.zeros(5, device=device)           # loss, then sums over tokens: forward, reverse, H(q), H(p)
        for picked in batches:
            batch = [sequences[i] for i in picked] or [([0], [])]        # a prompt without a response: weight 0
            norms = [1 / all_tokens if cfg.loss_norm == "token" else 1 / (len(r) * all_sequences) for _, r in batch for _ in r]
            weight = torch.tensor(norms, device=device)                                                # (N,)
            if teacher:
                with torch.no_grad():
                    h_p = utils.response_hidden(teacher, batch, dtype)                                 # (N, H_t)
                head_p = teacher.get_output_embeddings().weight
            elif cfg.teacher:
                h_p = torch.cat([head_p[:0], *(cached[i].to(device, dtype) for i in picked)])
            timer.lap("teacher")
            h_q = utils.response_hidden(student, batch, dtype)                                         # (N, H)
            head_q = student.get_output_embeddings().weight      # after the forward: with fsdp it is whole from there on
            if cfg.teacher:
                loss, *stats = linear_kl(h_q, head_q, h_p, head_p, weight, cfg.reverse_weight)
            else:                                        # cross-entropy is the forward KL to a one-hot p
                targets = torch.tensor([t for _, r in batch for t in r], dtype=torch.long, device=device)
                logps, entropy = linear_logp(h_q, head_q, targets)
                loss, nothing = -(weight * logps).sum(), torch.zeros_like(entropy)
                stats = (-logps.detach(), nothing, entropy, nothing)
            loss.backward()
            totals += torch.stack([loss.detach(), *(s.sum() for s in stats)])
            timer.lap("student")

        # 4. one gradient sum over ranks (weights are already divided by the tokens of the whole step), clip, step
        if all_tokens:
            if world > 1 and not sharded:                # sharded gradients are summed in the backward
                grads = [p.grad for p in parameters]
                vector_to_parameters(utils.all_reduce(parameters_to_vector(grads)), grads)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            grad_norm = grad_norm.full_tensor() if sharded else grad_norm
            loss, *sums = utils.all_reduce(totals).tolist()
            if not torch.isfinite(grad_norm + totals[0]):
                batch_file = os.path.join(cfg.out_dir, f"nonfinite_step_{step + 1:06d}_rank_{rank}.jsonl")
                utils.write_lines(batch_file, [{"prompt_ids": p, "response_ids": r} for p, r in sequences], mode="w")
                raise UserError(f"step {step + 1}: loss {loss}, gradient norm {grad_norm.item()}: not finite, so no update was "
                                f"made. The batch is in {batch_file}, the last checkpoint is untouched; --resume with a lower "
                                f"learning_rate than {cfg.learning_rate}, or dtype=float32")
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate * min(1, (step + 1) / max(1, cfg.warmup_steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:                                            # nothing to learn from in this step
            loss, sums, grad_norm = 0.0, [0.0] * 4, torch.zeros(())
        timer.lap("optimizer")

        # 5. log. FLOPs as the paper counts them (appendix H.1): student prefixes G_s + F_t + 3 F_s, teacher prefixes
        # F_t + 3 F_s, with the teacher's writing kept apart; cached 3 F_s, with the teacher's head kept apart
        state["tflops"] += (3 * student_flops + teacher_flops + (writer_flops if cfg.prefix == "student" else 0)) / 1e12
        timings = timer.summary()
        if chief:
            forward, reverse, entropy_q, entropy_p = (s / max(1, all_tokens) for s in sums)
            row = {"step": step + 1, "loss": loss, "forward_kl": forward, "reverse_kl": reverse if cfg.teacher else None,
                   "student_entropy": entropy_q, "teacher_entropy": entropy_p,
                   "mean_length": all_tokens / max(1, all_sequences), "max_length": longest, "horizon": horizon,
                   "truncated_share": truncated / cfg.batch_size, "grad_norm": grad_norm.item(),
                   "learning_rate": optimizer.param_groups[0]["lr"], "tokens": int(all_tokens),
                   "tokens_per_second": all_tokens / sum(timer.laps.values()), **timings, **gaps,
                   "tflops": state["tflops"],
                   "tflops_teacher_writing": writer_flops / 1e12 if cfg.prefix == "teacher" else 0.0,
                   "tflops_teacher_head": 2 * head_p.numel() * all_tokens / 1e12 if cfg.teacher and not teacher else 0.0}
            utils.write_lines(metrics_file, [row])
            utils.print_row(COLUMNS, row, header=step % 20 == 0 or step == start_step)

    if chief:
        why = f"the gate closed at horizon {horizon}, on_gate_closed=stop; " if step < cfg.max_steps else ""
        print(f"done: {why}{cfg.out_dir}/last; `python plot.py {cfg.out_dir}` draws the curves and prints a table")


if __name__ == "__main__":
    utils.run(main, __doc__, Config)
