"""
Reinforcement learning from any checkpoint: GRPO with the grader as reward.

    python rl_grpo.py configs/toy_grpo.py --student=out/toy_opd/last          # CPU, a minute
    torchrun --nproc_per_node=8 rl_grpo.py configs/grpo_4b.py

A step samples group_size responses to each of its prompts from the student q. The reward R_i of
response o_i, i running over all of the step, is 1 where its final answer is right, else 0. Then
updates_per_batch AdamW updates are made, each on all of these responses, of

    L = sum_i sum_t  w_i ( kl_coef k3_it
        - c_it min( r_it A_i,  clip(r_it, 1 - clip_low, 1 + clip_high) A_i ) )
    A_i   = R_i - mean(R of its group), divided by std(R of its group) with scale_rewards = "group"
    s_it  = the prompt and the response's tokens before token t
    r_it  = q(o_it | s_it) / q_old(o_it | s_it); q_old is q at the step's first update: r = 1 there
    w_i   = 1 / what the loss is divided by: see `token_weights`
    c_it  = min(q_old / q_sampler, importance_cap); q_sampler is the probability that the rollout
            engine reports, which may differ from the trainer's by rounding
    k3    = rho - 1 - log rho, rho = q_ref / q: in its value an unbiased, non-negative estimate of
            KL(q || q_ref); its gradient, on average over q, is that of the *forward* KL(q_ref || q)

All log-probs are of the full softmax at T = 1. With top_p, top_k or another temperature the sampler
draws from another distribution: r and c then correct for updates and for the two programs, not for
that. N response tokens are in a micro-batch; P prompts x G responses are in a step.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from data.problems import (
    adopt_template,
    check_tokenizers,
    deal,
    load_problems,
    load_tokenizer,
    usable_prompts,
    warn_of_overlap,
)
from engine import Sampling, make_engine, score
from grade import evaluate, grade_all
from kernels import linear_logp
from models import (
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
from utils import (
    WORLD,
    Timer,
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
    student: str = "out/opd_4b/last"  # folder or hub name: where RL starts
    prompts: str = "data/deepscaler.jsonl"  # JSONL with problem and answer
    template: str | None = None  # a model whose chat template is used, as for a Base student
    stop: Literal["union", "student"] = "union"  # with `template`: whose stop ids end a response
    reference: str | None = None  # the KL is to it; None: to the student at first, if kl_coef
    prompts_per_step: int = 4  # over all ranks
    group_size: int = 8  # responses to each prompt
    max_new_tokens: int = 4096  # stop token included
    max_steps: int = 1000
    learning_rate: float = 1e-6
    out_dir: str = "out/grpo"
    # reward and loss
    scale_rewards: Literal["group", "none"] = "group"
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2  # clips nothing at the first update, where r = 1
    kl_coef: float = 0.0  # weight of the KL to the reference: beta of the papers
    mask_truncated: bool = False  # responses without a stop id leave the loss; their reward counts
    importance_cap: float | None = 2.0  # None: no importance weights
    # optimisation
    updates_per_batch: int = 1  # each on the whole batch
    warmup_steps: int = 50  # linear, then constant
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # inf never clips
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # compute; master weights are always fp32
    max_tokens_per_microbatch: int = 16384  # padded tokens in a forward; the result is the same
    gradient_checkpointing: bool = False  # keep a layer's input only, run it again in the backward
    compile: bool = False  # by torch.compile: layers, and a token's forward in hf (docs/speed.md)
    collective_timeout: float = 1800.0  # seconds that a process waits for the others
    # evaluation on a fixed held-out set
    eval_data: str = "data/math500.jsonl"
    eval_every: int = 30  # steps; 0: never
    eval_prompts: int = 200  # the first so many of eval_data
    eval_samples: int = 1  # k of Avg@k and Pass@k
    eval_max_new_tokens: int = 4096
    eval_temperature: float = 0.6
    eval_top_p: float = 0.95
    # the run
    save_every: int = 40  # steps; the end and a new best after step 0 are always saved
    keep: int = 10  # newest checkpoints that stay, besides `best`
    seed: int = 42
    resume: bool = False  # go on from the newest checkpoint in out_dir, if there is one
    overwrite: bool = False  # delete the run in out_dir first
    # rollouts
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    engine: Literal["auto", "hf", "vllm"] = "auto"  # transformers or vLLM; auto: vLLM on a GPU
    rollout_rows: int = 32  # responses decoded together: they bound the KV cache of engine="hf"
    kv_cache_gb: float = 16.0  # of vLLM; it is given back while the trainer computes
    rollout_timeout: float = 600.0  # seconds without a finished response before vLLM is given up
    check_sync_every: int = 50  # steps between comparisons of the engine's log-probs with ours
    max_logprob_gap: float | None = None  # nats; None: bf16 0.15, fp32 1e-4, on a GPU 1e-2
    chat_template_kwargs: dict | None = None  # None: as stored, else {"enable_thinking": False}


# What differs from GRPO in DeepSeekMath (arXiv 2402.03300):
#   - loss_type "dapo", a mean over all tokens, by default; "grpo" is the original mean of means;
#   - no KL to a reference by default (kl_coef = 0); with `reference` its size is measured;
#   - standard deviations divide by n, not n - 1, and equal rewards have A = 0 (no epsilon);
#   - a response without a verdict ("ungraded") is left out of its group's mean, and of the loss;
#   - truncated importance weights between sampler and trainer.


def validate(cfg, world):
    """UserError for every combination that cannot work, before anything is loaded."""
    check_ranges(cfg)
    require(
        cfg.group_size >= 2,
        cfg,
        "group_size",
        "GRPO needs at least 2 responses to a prompt to form an advantage",
    )
    require(
        cfg.prompts_per_step * cfg.group_size >= world,
        cfg,
        "prompts_per_step",
        f"x {cfg.group_size} responses leave some of the {world} processes without work",
    )
    require(
        cfg.temperature > 0,
        cfg,
        "temperature",
        "must be positive: greedy responses are all the same",
    )
    require(
        0 <= cfg.clip_low < 1,
        cfg,
        "clip_low",
        "must be in [0, 1): the ratio is clipped at 1 - clip_low",
    )


# --------------------------------------------------------------------------------------- the maths


def group_advantages(rewards, scale_rewards="group"):
    """
    rewards (P, G): G responses to each of P prompts, NaN where ungraded. Returns A (P, G): reward
    minus the group's mean over graded responses, divided by their standard deviation (over n, not
    n - 1) with scale_rewards = "group". 0 where ungraded, and in groups of equal rewards.
    """
    graded = ~rewards.isnan()
    n = graded.sum(1, keepdim=True).clamp(min=1)
    values = rewards.nan_to_num(0.0)
    centred = torch.where(graded, values - values.sum(1, keepdim=True) / n, 0.0)
    if scale_rewards == "none":
        return centred
    std = (centred.square().sum(1, keepdim=True) / n).sqrt()
    return torch.where(std > 0, centred / std.clamp(min=1e-12), 0.0)


def token_weights(lengths, all_sequences, all_tokens, loss_type, constant):
    """
    w_i for each response of these lengths: what its tokens' losses are multiplied by. The totals
    are those of the whole step, over all ranks, of responses that are in the loss:
        "grpo"     1 / (responses x |o_i|): mean over responses of the mean over tokens; the tokens
                   of a long response count less
        "dapo"     1 / all tokens: mean over tokens
        "dr_grpo"  1 / constant, which is P x G x max_new_tokens: no length and no masked response
                   changes what a token counts; with scale_rewards = "none" this is Dr. GRPO
    """
    divisor = {"grpo": all_sequences, "dapo": all_tokens, "dr_grpo": constant}[loss_type]
    return [1 / (divisor * n if loss_type == "grpo" else divisor) for n in lengths]


def clipped_loss(logps, old_logps, advantages, clip_low, clip_high):
    """
    (-min(r A, clip(r) A), whether clipping made the gradient zero) per token; all (N,),
    r = exp(logps - old_logps).
    """
    ratio = torch.exp((logps - old_logps).clamp(max=20))  # an infinite r times A = 0 would be NaN
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    was_clipped = clipped_ratio * advantages < ratio * advantages
    return loss, was_clipped


def k3(logps, ref_logps):
    """
    rho - 1 - log rho with rho = q_ref / q, per token (N,). Averaged over q its value is
    KL(q || q_ref), and its gradient that of KL(q_ref || q).
    """
    return torch.expm1(ref_logps - logps) - (ref_logps - logps)


# --------------------------------------------------------------------------- responses and rewards


class Sampled(NamedTuple):
    """A response; it belongs to prompt place // G of the step."""

    prompt: list  # token ids
    tokens: list  # token ids of the response
    logps: list  # of the sampler
    truncated: bool  # at max_new_tokens, without a stop id
    place: int  # among the P x G responses of the step
    gold: str  # the answer that is right


def share_rewards(cfg, batch, tokenizer):
    """
    Grade this rank's responses and share the verdicts with all ranks: rewards (P, G), NaN where
    ungraded, and whether each response is truncated, (P x G,).
    """
    pairs = [(tokenizer.decode(r.tokens, skip_special_tokens=True), r.gold) for r in batch]
    shared = torch.zeros(2, cfg.prompts_per_step * cfg.group_size, dtype=torch.float64)
    for response, (verdict, _) in zip(batch, grade_all(pairs)):
        reward = torch.nan if verdict is None else float(verdict)
        shared[:, response.place] = torch.tensor([reward, response.truncated], dtype=torch.float64)
    rewards, truncated = all_reduce(shared)
    return rewards.view(-1, cfg.group_size), truncated > 0


class MicroBatch:
    """
    sequences: the responses. The rest are tensors (N,), a number for each response token:
        targets               its id
        sampler_logps         its log-prob by the engine that sampled it
        advantages, weights   A_i and w_i of its response
        old_logps, ref_logps  its log-probs by q_old and the reference; the first update sets them
    divided_by: the last arguments of `token_weights`.
    """

    def __init__(self, responses, advantages, divided_by, device):
        self.sequences, rows = responses, []
        lengths = [len(r.tokens) for r in responses]
        for r, weight in zip(responses, token_weights(lengths, *divided_by)):
            for token, logp in zip(r.tokens, r.logps):
                rows.append((token, logp, advantages[r.place], weight))
        targets, *rest = torch.tensor(rows, device=device).T  # fp32 is exact for ids below 2 ** 24
        self.targets, self.old_logps, self.ref_logps = targets.long(), None, None
        self.sampler_logps, self.advantages, self.weights = rest
        self.weights[~self.sampler_logps.isfinite()] = 0  # as at an entropy near 0


def micro_loss(cfg, micro, logps):
    """
    (the loss of a micro-batch, [sum of k3, number of clipped tokens, sum of c, sum of the gap]),
    all over its tokens; gap = |log q_old / q_sampler|.
    """
    loss, was_clipped = clipped_loss(
        logps, micro.old_logps, micro.advantages, cfg.clip_low, cfg.clip_high
    )
    correction = torch.ones_like(loss)
    log_ratio = torch.where(micro.weights > 0, micro.old_logps - micro.sampler_logps, 0)
    if cfg.importance_cap is not None:
        correction = torch.exp(log_ratio).clamp(max=cfg.importance_cap)
    kl = torch.zeros_like(loss) if micro.ref_logps is None else k3(logps, micro.ref_logps)
    loss = correction * loss
    if cfg.kl_coef:  # 0 x infinity is NaN, and switched off it needs no gradient
        loss = loss + cfg.kl_coef * kl
    sums = kl.detach().sum(), was_clipped.sum(), correction.sum(), log_ratio.abs().sum()
    return (micro.weights * loss).sum(), sums


# -------------------------------------------------------------------------------- a step in numbers


def count_tokens_and_flops(cfg, responses, batch, models):
    """
    Over all ranks: tokens of all responses and of the `batch` in the loss, log-probs that are not
    finite, and FLOPs: sampling, the reference, and three forwards for each update.
    """
    lengths = [*map(sequence_length, batch)]
    flops = forward_flops(models["student"], [*map(sequence_length, responses)])
    flops += 3 * cfg.updates_per_batch * forward_flops(models["student"], lengths)
    if "reference" in models:
        flops += forward_flops(models["reference"], lengths)
    own = {
        "tokens": sum(len(r.tokens) for r in responses),
        "loss_tokens": sum(len(r.tokens) for r in batch),
        "nonfinite_logps": sum(not math.isfinite(logp) for r in responses for logp in r.logps),
        "tflops": flops / 1e12,
    }
    return sum_over_ranks(own)


def metrics_row(cfg, state, rewards, truncated, in_loss, totals, sums):
    """The numbers of a step for the log, and all FLOPs so far."""
    tokens = max(1, totals["loss_tokens"])
    state["tflops"] += totals["tflops"]
    loss, *means = (x / cfg.updates_per_batch for x in sums)
    entropy, kl, clip_share, correction, gap = (x / tokens for x in means)
    reward = rewards.nanmean()  # NaN without a verdict
    equal = (group_advantages(rewards) == 0).all(1)
    return {
        "loss": loss,
        "reward_mean": None if reward.isnan() else reward.item(),
        "equal_groups": equal.double().mean().item(),
        "ungraded": rewards.isnan().sum().item(),
        "not_in_loss": (~in_loss).sum().item(),
        "student_entropy": entropy,
        "kl_to_reference": kl if cfg.reference or cfg.kl_coef else None,
        "clip_fraction": clip_share,
        "importance_weight": correction,
        "logprob_gap_mean": gap,
        "nonfinite_logps": totals["nonfinite_logps"],
        "mean_length": totals["tokens"] / len(truncated),
        "truncated_share": truncated.double().mean().item(),
        "tokens": int(totals["tokens"]),
        "tflops": state["tflops"],
    }


COLUMNS = """
    step=step loss=loss reward=reward_mean same=equal_groups H_q=student_entropy len=mean_length
    cut=truncated_share clip=clip_fraction kl=kl_to_reference sec=seconds"""


def main(argv):
    cfg = load_config(Config, argv)
    device = init_processes(cfg.collective_timeout)
    validate(cfg, WORLD)
    problems, held_out = load_problems(cfg.prompts, answered=True), []
    if cfg.eval_every:
        held_out = load_problems(cfg.eval_data)[: cfg.eval_prompts]
        warn_of_overlap(problems, held_out)
    path = cfg.reference or cfg.student
    tokenizer = load_tokenizer(cfg.student, cfg.chat_template_kwargs)
    check_tokenizers(tokenizer, load_tokenizer(path), "the student", "the reference")
    identity = {
        "script": Path(__file__).stem,
        "student": model_revision(cfg.student),
        "prompts": fingerprint(dict(enumerate(problems))),
        "reference": model_revision(path) if cfg.reference or cfg.kl_coef else None,
    }
    state, checkpoint = start_run(
        cfg, (path, cfg.student, cfg.template, cfg.prompts, cfg.eval_data), identity
    )
    student = load_model(
        cfg.student, torch.float32, device, cfg.gradient_checkpointing, cfg.compile
    )
    models, dtype = {"student": student}, getattr(torch, cfg.dtype)
    if identity["reference"]:
        # In fp32 as the masters: in another dtype the same weights would be 0.01 nats apart.
        models["reference"] = load_model(path, torch.float32, device, compiled=cfg.compile)
    vocab_size = min(len(lm_head(model)) for model in models.values())
    positions = min(model.config.max_position_embeddings for model in models.values())
    limits = positions, vocab_size
    stops = stop_ids(student.generation_config, tokenizer)
    if cfg.template:
        theirs = adopt_template(tokenizer, cfg.template, cfg.chat_template_kwargs)
        if cfg.stop == "union":
            stops = sorted({*stops, *theirs})
        student.generation_config.eos_token_id = stops  # whoever loads a checkpoint stops there too
    usable = usable_prompts(cfg.prompts, problems, tokenizer, cfg.max_new_tokens, *limits)
    prompts, golds = list(usable.values()), [problems[i]["answer"] for i in usable]
    if held_out:
        usable = usable_prompts(
            cfg.eval_data, held_out, tokenizer, cfg.eval_max_new_tokens, *limits
        )
        held_out = [(held_out[i], prompt) for i, prompt in usable.items()]
    sampling = Sampling(cfg.max_new_tokens, stops, cfg.temperature, cfg.top_p, cfg.top_k)
    eval_sampling = Sampling(cfg.eval_max_new_tokens, stops, cfg.eval_temperature, cfg.eval_top_p)
    longest = max(map(len, prompts + [prompt for _, prompt in held_out]))
    longest += max(cfg.max_new_tokens, cfg.eval_max_new_tokens)
    engine = make_engine(cfg.engine, cfg, student, dtype, vocab_size, longest)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=cfg.learning_rate, fused=True, weight_decay=cfg.weight_decay
    )
    if checkpoint:
        load_checkpoint(checkpoint, student, optimizer)
    save = partial(save_checkpoint, cfg, student, tokenizer, optimizer, state)
    open_run(cfg, student, tokenizer, state)  # from here on files are written
    start_step = state["step"]
    print0(f"{len(prompts)} prompts, {WORLD} process(es) on {device.type}, from step {start_step}")
    catch_signals()

    def logps_of(model, micro):  # log-probs, and detached entropies, (N,)
        hidden = response_hidden(model, micro.sequences, dtype)
        return linear_logp(hidden, lm_head(model)[:vocab_size], micro.targets)

    for step in range(start_step, cfg.max_steps + 1):  # trained so far; the last only evaluates
        state["step"] = step
        end_early(save, step)
        engine.sync()

        # 0. evaluation, checkpoint. A resumed run has done these already at its first step.
        is_new, over, is_best = step > state["last_eval_step"], step == cfg.max_steps, False
        if is_new and cfg.eval_every and (over or step % cfg.eval_every == 0):
            metrics, records = evaluate(
                engine, tokenizer, held_out, eval_sampling, cfg.eval_samples, cfg.seed
            )
            is_best = log_evaluation(cfg, state, "student", metrics, records)
        state["last_eval_step"] = step
        if is_new and step > 0 and (is_best or over or step % cfg.save_every == 0):
            save()
        if over:
            break

        # 1. rollouts: this rank's share of the responses; a group may be split over ranks
        timer = Timer(device)
        slots = deal(len(prompts), step, cfg.prompts_per_step, cfg.seed, cfg.group_size)
        asked = [prompts[i] for _, i, _ in slots]
        rollouts = engine.generate(asked, sampling, [seed for _, _, seed in slots])
        if step <= start_step + 1 or step % cfg.check_sync_every == 0:
            score(engine, asked, rollouts)
        end_early(save, step)
        responses = [
            Sampled(prompts[i], tokens, logps, reason == "length", place, golds[i])
            for (place, i, _), (tokens, logps, reason) in zip(slots, rollouts)
        ]
        timer.lap("rollout")

        # 2. rewards, shared with all ranks; advantages within the groups; who is in the loss
        rewards, truncated = share_rewards(cfg, responses, tokenizer)
        advantages = group_advantages(rewards, cfg.scale_rewards).flatten().tolist()
        in_loss = ~rewards.flatten().isnan() & ~(truncated & cfg.mask_truncated)
        batch = [response for response in responses if in_loss[response.place]]
        totals = count_tokens_and_flops(cfg, responses, batch, models)
        divided_by = (in_loss.sum().item(), totals["loss_tokens"], cfg.loss_type,
                      len(truncated) * cfg.max_new_tokens)
        micros = [
            MicroBatch(micro, advantages, divided_by, device)
            for micro in microbatches(batch, cfg.max_tokens_per_microbatch)
        ]
        timer.lap("reward")

        # 3. updates_per_batch times: loss and gradient of the batch, sum over ranks, clip, step
        own_sums = torch.zeros(6, device=device)  # loss; over tokens: H(q), k3, clipped, c, gap
        grad_norm = 0.0
        for _ in range(cfg.updates_per_batch if totals["loss_tokens"] else 0):
            for micro in micros:
                if "reference" in models and micro.ref_logps is None:
                    with torch.no_grad():
                        micro.ref_logps, _ = logps_of(models["reference"], micro)
                    timer.lap("reference")
                logps, entropy = logps_of(student, micro)
                if micro.old_logps is None:
                    micro.old_logps = logps.detach()
                loss, stats = micro_loss(cfg, micro, logps)
                loss.backward()
                own_sums += torch.stack([loss.detach(), entropy.sum(), *stats])
                timer.lap("student")
            grad_norm = max(grad_norm, update(cfg, optimizer, step + 1, own_sums[0].item()))
            timer.lap("optimizer")

        # 4. log: means over the updates, the largest gradient norm
        sums = all_reduce(own_sums).tolist()
        row = metrics_row(cfg, state, rewards, truncated, in_loss, totals, sums)
        row |= {
            "step": step + 1,
            "grad_norm": grad_norm,
            "learning_rate": optimizer.param_groups[0]["lr"],
            **timer,
            "tokens_per_second": totals["tokens"] / timer["seconds"],
        }
        log_step(cfg, COLUMNS, row, header=step % 20 == 0 or step == start_step)
        if not totals["loss_tokens"]:
            print0(
                f"warning: step {step + 1}: no response is in the loss, so no update was made; "
                f"ungraded {row['ungraded']}, cut {row['truncated_share']:.0%}"
            )

    end_early(save, step)
    print0(
        f"done: {cfg.out_dir}/last; `python plot.py {cfg.out_dir}` draws the curves and prints "
        f"a table"
    )


if __name__ == "__main__":
    run(main, __doc__, Config)
