"""
Reinforcement learning from any checkpoint: GRPO with the grader as reward.

    python rl_grpo.py configs/toy_grpo.py --student=out/toy_opd/last          # CPU, a minute
    torchrun --nproc_per_node=8 rl_grpo.py configs/grpo_4b.py

A step samples group_size responses o_i to each of its prompts from the student q, rewards them with 1 where the final answer is
right and 0 elsewhere, and takes updates_per_batch AdamW steps on

    L = - sum_i sum_t  w_i  c_it  min( r_it A_i,  clip(r_it, 1 - clip_low, 1 + clip_high) A_i )  +  kl_coef k3_it
    A_i   = R_i - mean of the group's rewards, over their standard deviation with scale_rewards = "group"
    r_it  = q(o_it | s_it) / q_old(o_it | s_it), q_old being q at the step's first update, so r = 1 there
    w_i   = 1 / what the loss is divided by, see `token_weights`:  loss_type = "grpo" | "dapo" | "dr_grpo"
    c_it  = min(q_old / q_sampler, importance_cap): sampler and trainer are two programs, and may disagree
    k3    = rho - 1 - log rho, rho = q_ref / q: an unbiased, non-negative estimate of KL(q || q_ref) in its value; its gradient,
            in expectation over q, is that of the *forward* KL(q_ref || q)

All log-probs are of the full softmax at T = 1. With top_p or top_k the sampler draws from a renormalised part of it: r and c
then correct for updates and for the two programs, not for what sampling left out. The same holds for another temperature.

What differs from GRPO in DeepSeekMath (arXiv 2402.03300), as the paper on distillation leaves these open:
  - loss_type "dapo" (a mean over all tokens) by default, where "grpo" is the original mean of means
  - no KL to a reference by default (kl_coef = 0); its size is measured all the same
  - standard deviations divide by the group's size, and a group of equal rewards has A = 0 (no epsilon)
  - a response without a verdict ("ungraded") leaves its group and the loss
  - truncated importance weights between sampler and trainer
"""

import dataclasses
import functools
import os
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint as checkpointed

import utils
from engine import Sampling, agree, check_logprobs, choose_engine, make_engine
from grade import evaluate, grade_all
from kernels import linear_logp
from utils import Timer, UserError


@dataclasses.dataclass
class Config:
    student: str = "out/opd_4b/last"                     # folder or hub name: where RL starts
    prompts: str = "data/deepscaler.jsonl"               # JSONL with problem and answer
    reference: str | None = None                         # the KL is measured to this model; None: to the student at the start
    # rollouts
    engine: Literal["auto", "hf", "vllm"] = "auto"       # who decodes: transformers, or vLLM; auto: vLLM on a GPU
    max_new_tokens: int = 4096                           # stop token included
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0                                       # 0: all tokens
    rollout_rows: int = 32                               # responses decoded together; bounds the KV cache of engine="hf"
    kv_cache_gb: float = 16.0                            # of vLLM; it is given back while the trainer computes
    rollout_timeout: float = 600.0                       # seconds without a sign of life before vLLM is given up
    check_sync_every: int = 50                           # steps; then the engine's log-probs are compared with the trainer's
    max_logprob_gap: float | None = None                 # nats, mean over tokens; None: 0.05 in bf16, 1e-4 in fp32
    # reward and loss
    prompts_per_step: int = 4                            # over all ranks
    group_size: int = 8                                  # responses to each prompt
    scale_rewards: Literal["group", "none"] = "group"
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0                                 # beta
    mask_truncated: bool = False                         # responses without a stop id leave the loss; their reward counts
    importance_cap: float | None = 2.0                   # None: no importance weights
    # optimisation
    updates_per_batch: int = 1
    max_steps: int = 1000
    learning_rate: float = 1e-6
    warmup_steps: int = 50                               # linear, then constant
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"   # compute; master weights are always fp32
    max_tokens_per_microbatch: int = 16384               # padded tokens in one forward; does not change the result
    gradient_checkpointing: bool = False                 # keep a layer's input only, and run it again in the backward
    collective_timeout: float = 1800.0                   # seconds a process waits for the others before all end
    # evaluation on a fixed held-out set
    eval_data: str = "data/math500.jsonl"
    eval_every: int = 30                                 # steps; 0: never
    eval_prompts: int = 200                              # the first so many of eval_data
    eval_samples: int = 1                                # k of Avg@k and Pass@k
    eval_max_new_tokens: int = 4096
    eval_temperature: float = 0.6
    eval_top_p: float = 0.95
    # run
    out_dir: str = "out/grpo"
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

    need(cfg.group_size >= 2, "group_size", "GRPO needs at least 2 responses to a prompt to form an advantage")
    need(cfg.updates_per_batch >= 1, "updates_per_batch", "must be at least 1; each update goes over the whole batch once")
    need(cfg.prompts_per_step >= 1, "prompts_per_step", "must be at least 1")
    need(cfg.prompts_per_step * cfg.group_size >= world, "prompts_per_step",
         f"{cfg.prompts_per_step} x {cfg.group_size} responses leave some of the {world} processes without work; take more")
    for key in ("max_new_tokens", "rollout_rows", "max_tokens_per_microbatch", "eval_prompts", "eval_samples",
                "eval_max_new_tokens", "save_every", "keep", "check_sync_every"):
        need(getattr(cfg, key) >= 1, key, "must be at least 1")
    for key in ("max_steps", "warmup_steps", "eval_every", "top_k", "eval_temperature", "weight_decay", "learning_rate",
                "kl_coef", "clip_high"):
        need(getattr(cfg, key) >= 0, key, "must not be negative")
    for key in ("top_p", "eval_top_p"):
        need(0 < getattr(cfg, key) <= 1, key, "must be in (0, 1]; 1 keeps every token")
    need(cfg.temperature > 0, "temperature", "must be positive: greedy responses are all the same")
    need(0 <= cfg.clip_low < 1, "clip_low", "must be in [0, 1): the ratio is clipped at 1 - clip_low")
    need(cfg.importance_cap is None or cfg.importance_cap >= 1, "importance_cap", "must be at least 1, or None for no weights")
    need(cfg.max_grad_norm > 0, "max_grad_norm", "must be positive; inf never clips")
    need(cfg.collective_timeout > 0, "collective_timeout", "must be positive: seconds")


# ------------------------------------------------------------------------------------------------------------ the maths

def group_advantages(rewards, scale_rewards="group"):
    """
    rewards (P, G): G responses to each of P prompts, NaN where ungraded. Returns A (P, G): reward minus the group's mean over
    graded responses, divided by their standard deviation (over n, not n - 1) with scale_rewards = "group". 0 where ungraded,
    and in groups of equal rewards.
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
    w_i for each response of these lengths: what its tokens' losses are multiplied by. The totals are those of the whole step,
    over all ranks, of responses that are in the loss:
        "grpo"     1 / (responses x |o_i|): mean over responses of the mean over tokens; a long response's tokens count less
        "dapo"     1 / all tokens: mean over tokens
        "dr_grpo"  1 / constant, which is prompts_per_step x group_size x max_new_tokens: no length and no masked response
                   changes what a token counts; with scale_rewards = "none" this is Dr. GRPO
    """
    return [1 / {"grpo": all_sequences * n, "dapo": all_tokens, "dr_grpo": constant}[loss_type] for n in lengths]


def clipped_loss(logps, old_logps, advantages, clip_low, clip_high):
    """(-min(r A, clip(r) A), r, whether the clip took the gradient) per token; all (N,), r = exp(logps - old_logps)."""
    ratio = torch.exp((logps - old_logps).clamp(max=20))     # an infinite r times A = 0 would be NaN
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return loss, ratio.detach(), ((clipped != ratio) & (clipped * advantages < ratio * advantages)).detach()


def k3(logps, ref_logps):
    """rho - 1 - log rho with rho = q_ref / q, per token (N,). Value: KL(q || ref). Gradient, on average: of KL(ref || q)."""
    return torch.expm1(ref_logps - logps) - (ref_logps - logps)


COLUMNS = {"step": "step", "loss": "loss", "rew": "reward_mean", "same": "equal_groups", "H": "student_entropy",
           "len": "mean_length", "max": "max_length", "cut": "truncated_share", "clip": "clip_fraction", "r": "ratio_max",
           "kl": "kl_to_reference", "grad": "grad_norm", "tok/s": "tokens_per_second", "roll": "rollout_seconds",
           "stu": "student_seconds", "TFL": "tflops"}


def main(argv):
    cfg, origin = utils.load_config(Config, argv)
    rank, world, device = utils.init_processes(cfg.collective_timeout)
    validate(cfg, world)
    chief = rank == 0                                    # the rank that prints and writes
    checkpoint = utils.prepare_out_dir(cfg.out_dir, cfg.resume, cfg.overwrite, (cfg.student, cfg.prompts, cfg.eval_data,
                                                                                cfg.reference))
    state = {"script": "rl_grpo", "student": cfg.student, "reference": None, "step": 0, "tflops": 0.0, "best": -1.0,
             "looked": False}
    if checkpoint:
        state |= utils.read_train_state(checkpoint, "rl_grpo")
        if state["student"] != cfg.student:
            raise UserError(f"{checkpoint} began from student={state['student']!r}, not {cfg.student!r}; resume with that one, "
                            f"or start a new run from its weights with --student={checkpoint}")
        if cfg.max_steps < state["step"]:
            raise UserError(f"max_steps={cfg.max_steps}: {checkpoint} is at step {state['step']} already; raise max_steps")
    problems = utils.load_problems(cfg.prompts)
    if without := [i for i, problem in enumerate(problems, 1) if not problem["answer"]]:
        raise UserError(f"{cfg.prompts}: problem {without[0]} has no answer, and the reward is whether the answer is right; "
                        f"remove it ({len(without)} of {len(problems)} have none)")
    eval_problems = utils.load_problems(cfg.eval_data)[:cfg.eval_prompts] if cfg.eval_every else []

    # models: fp32 masters for both: in another dtype the same weights would be 0.01 nats apart at the start
    dtype = getattr(torch, cfg.dtype)
    tokenizer = utils.load_tokenizer(cfg.student)
    kind = choose_engine(cfg.engine, device, chief)
    utils.print_estimate(cfg, kind, device, cfg.student, cfg.student, {"reference, fp32": (cfg.reference or cfg.student, 4)},
                         cfg.max_new_tokens, world, cfg.prompts_per_step * cfg.group_size)
    student = utils.load_model(checkpoint or cfg.student, torch.float32, device)
    reference_path = cfg.reference or cfg.student
    reference = utils.load_model(reference_path, torch.float32, device).requires_grad_(False)
    revision = utils.model_revision(reference_path)
    if state["reference"] not in (None, revision):
        raise UserError(f"{reference_path} has changed since {checkpoint} was begun (revision {state['reference']}, now "
                        f"{revision}): the KL would be to other weights; start a new run with --student={checkpoint}")
    state["reference"] = revision
    for layer in student.base_model.layers if cfg.gradient_checkpointing else ():
        layer.forward = functools.partial(checkpointed, layer.forward, use_reentrant=False, preserve_rng_state=False)
    utils.check_tokenizers(tokenizer, utils.load_tokenizer(reference_path), "the student", "the reference")
    vocab_size = min(len(m.get_output_embeddings().weight) for m in (student, reference))
    positions = min(m.config.max_position_embeddings for m in (student, reference))
    stops = utils.stop_ids(student.generation_config, tokenizer)
    if unknown := [i for i in stops if i >= len(tokenizer) or tokenizer.convert_ids_to_tokens(i) is None]:
        raise UserError(f"{cfg.student}: its tokenizer does not know the stop id {unknown[0]} of its generation config: they "
                        f"belong to different models; copy the tokenizer of the model that it was trained from")

    # prompts: those with room for the horizon, in this data and in the evaluation's
    limits = positions, vocab_size, chief
    encoded = utils.usable_prompts(cfg.prompts, problems, tokenizer, cfg.max_new_tokens, *limits)
    prompts, golds = list(encoded.values()), [problems[i]["answer"] for i in encoded]
    if cfg.eval_every:
        encoded_eval = utils.usable_prompts(cfg.eval_data, eval_problems, tokenizer, cfg.eval_max_new_tokens, *limits)
        eval_problems, eval_prompts = [eval_problems[i] for i in encoded_eval], list(encoded_eval.values())
    sampling = Sampling(cfg.max_new_tokens, tuple(stops), cfg.temperature, cfg.top_p, cfg.top_k, vocab_size)
    eval_sampling = Sampling(cfg.eval_max_new_tokens, tuple(stops), cfg.eval_temperature, cfg.eval_top_p, 0, vocab_size)
    longest = max(map(len, [*prompts, *(eval_prompts if cfg.eval_every else [])])) + max(cfg.max_new_tokens,
                                                                                         cfg.eval_max_new_tokens)
    engine = make_engine(kind, cfg, student, dtype, vocab_size, longest)

    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    if checkpoint:
        utils.load_optimizer(checkpoint, student, optimizer)
    metrics_file = utils.open_run(cfg, origin, state, rank, world)         # from here on files are written
    if chief:
        print(f"{len(prompts)} prompts, {world} process(es) on {device.type}, from step {state['step']}")

    def save(is_best=False):
        utils.save_checkpoint(cfg.out_dir, student, tokenizer, optimizer,
                              {**state, "step": step, "config": dataclasses.asdict(cfg)}, cfg.keep, ["best"] * is_best)
        return f"step {step} is saved: --resume goes on"

    start_step = state["step"]
    utils.catch_signals()
    for step in range(start_step, cfg.max_steps + 1):        # step = batches done so far; the last pass only evaluates
        if stop := utils.signal_received():              # on SIGTERM or SIGINT the step is finished, nothing is lost
            state["looked"] &= step == start_step        # of the step before; here nothing has been looked at yet
            utils.end_by_signal(stop, save())
        engine.sync(student)
        fresh = not (step == start_step and state["looked"])     # else a resumed run has evaluated and saved there
        state["looked"] = not fresh
        if fresh:
            is_best = False
            if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.max_steps):
                metrics, records = evaluate(engine, student, tokenizer, eval_problems, eval_prompts, eval_sampling,
                                                  cfg.eval_samples, cfg.seed, cfg.max_tokens_per_microbatch, rank, world, dtype,
                                                  save)
                utils.log_evaluation(cfg.out_dir, step, "student", metrics, records, chief)
                score = metrics["avg_at_k"]
                is_best = step > 0 and score is not None and score > state["best"]
                state["best"] = score if is_best else state["best"]
            state["looked"] = True
            if step > 0 and (is_best or step % cfg.save_every == 0 or step == cfg.max_steps):
                save(is_best)
        if step == cfg.max_steps:
            break

        # 1. rollouts: responses, not groups, are dealt to ranks, and seeded by their place in the step
        timer = Timer(device, "rollout", "reward", "reference", "student", "optimizer")
        order = utils.prompt_order(len(prompts), step * cfg.prompts_per_step, cfg.prompts_per_step, cfg.seed)
        slots = list(range(cfg.prompts_per_step * cfg.group_size))[rank::world]        # prompt, response = divmod(slot, G)
        asked = [order[slot // cfg.group_size] for slot in slots]
        seeds = [utils.derive_seed(cfg.seed, "train", step, slot) for slot in slots]
        rollouts, gaps = agree(save, engine.generate, [prompts[i] for i in asked], sampling, seeds), {}
        if step == start_step or step % cfg.check_sync_every == 0:
            gaps = check_logprobs(engine, student, [prompts[i] for i in asked], rollouts, vocab_size, dtype,
                                        cfg.max_tokens_per_microbatch)
        timer.lap("rollout")

        # 2. rewards, shared with all ranks; advantages within the groups
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _, _ in rollouts]
        verdicts = grade_all([(text, golds[i]) for text, i in zip(texts, asked)])
        shared = torch.zeros(3, cfg.prompts_per_step * cfg.group_size, dtype=torch.float64)  # right, ungraded, cut
        for slot, (verdict, _), (_, _, reason) in zip(slots, verdicts, rollouts):
            shared[:, slot] = torch.tensor([float(verdict is True), float(verdict is None), float(reason == "length")])
        right, ungraded, cut = utils.all_reduce(shared.to(device)).cpu()
        rewards = torch.where(ungraded > 0, torch.nan, right).view(cfg.prompts_per_step, cfg.group_size)
        advantages = group_advantages(rewards, cfg.scale_rewards).flatten()
        in_loss = (ungraded == 0) & ~((cut > 0) & cfg.mask_truncated)
        written = [(slot, prompts[i], tokens, logps) for slot, i, (tokens, logps, _) in zip(slots, asked, rollouts)]
        batch = [row for row in written if in_loss[row[0]]]
        counts = [(sum(len(r) for _, _, r, _ in rows),
                   utils.forward_flops(model.config, [len(p) + len(r) for _, p, r, _ in rows]))
                  for model, rows in ((student, written), (student, batch), (reference, batch))]
        counts = torch.tensor(counts, dtype=torch.float64, device=device)
        (all_tokens, writer_flops), (loss_tokens, batch_flops), (_, reference_flops) = utils.all_reduce(counts).tolist()
        longest = torch.tensor(max(len(tokens) for tokens, _, _ in rollouts), device=device)
        longest = utils.all_reduce(longest, dist.ReduceOp.MAX).item()
        weights = token_weights([len(row[2]) for row in batch], in_loss.sum().item(), loss_tokens, cfg.loss_type,
                                len(ungraded) * cfg.max_new_tokens)
        timer.lap("reward")

        # 3. - 4. loss, gradient, one sum over ranks, clip, step: updates_per_batch times over the whole batch
        old, ref = [None] * len(batch), [None] * len(batch)              # log-probs at the first update, and of the reference
        totals = torch.zeros(6, device=device)           # loss, then sums over tokens: entropy, k3, clipped, c; tokens
        extremes = torch.tensor([-torch.inf, -torch.inf, 0.0], device=device)    # -min r, max r, max |log q_old/q_sampler|
        grad_norm = torch.zeros(())
        for update in range(cfg.updates_per_batch if loss_tokens else 0):
            for picked in utils.microbatches([len(row[1]) + len(row[2]) for row in batch], cfg.max_tokens_per_microbatch):
                sequences = [batch[i][1:3] for i in picked]
                lengths = [len(response) for _, response in sequences]
                targets = torch.tensor([t for _, response in sequences for t in response], device=device)          # (N,)

                def per_token(values, lengths=lengths):
                    return torch.tensor([v for v, n in zip(values, lengths) for _ in range(n)], device=device)   # (N,)
                if update == 0:
                    with torch.no_grad():
                        hidden = utils.response_hidden(reference, sequences, dtype)
                        theirs, _ = linear_logp(hidden, reference.get_output_embeddings().weight[:vocab_size], targets)
                        for i, part in zip(picked, theirs.split(lengths)):
                            ref[i] = part
                    timer.lap("reference")
                hidden = utils.response_hidden(student, sequences, dtype)                                          # (N, H)
                logps, entropy = linear_logp(hidden, student.get_output_embeddings().weight[:vocab_size], targets)
                if update == 0:
                    for i, part in zip(picked, logps.detach().split(lengths)):
                        old[i] = part
                old_logps, ref_logps = torch.cat([old[i] for i in picked]), torch.cat([ref[i] for i in picked])
                sampled = torch.tensor([x for i in picked for x in batch[i][3]], device=device)
                correction = torch.ones_like(sampled) if cfg.importance_cap is None else \
                    torch.exp(old_logps - sampled).clamp(max=cfg.importance_cap)
                advantage = per_token([advantages[batch[i][0]].item() for i in picked])
                loss, ratio, clipped = clipped_loss(logps, old_logps, advantage, cfg.clip_low, cfg.clip_high)
                loss, kl = correction * loss, k3(logps, ref_logps)
                if cfg.kl_coef:                          # 0 x infinity is NaN, and switched off it needs no gradient
                    loss = loss + cfg.kl_coef * kl
                loss = (per_token([weights[i] for i in picked]) * loss).sum()
                loss.backward()
                totals += torch.stack([loss.detach(), entropy.sum(), kl.detach().sum(), clipped.sum(), correction.sum(),
                                       torch.tensor(float(len(targets)), device=device)])
                gap = (old_logps - sampled).abs().max()
                extremes = torch.maximum(extremes, torch.stack([-ratio.min(), ratio.max(), gap]))
            if world > 1:
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                vector_to_parameters(utils.all_reduce(parameters_to_vector(grads)), grads)
                for p, grad in zip(parameters, grads):
                    p.grad = grad
            timer.lap("student")
            norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            grad_norm = torch.maximum(grad_norm, norm.cpu())
            if not torch.isfinite(norm):
                batch_file = os.path.join(cfg.out_dir, f"nonfinite_step_{step + 1:06d}_rank_{rank}.jsonl")
                utils.write_lines(batch_file, [{"prompt_ids": p, "response_ids": r} for _, p, r, _ in batch], mode="w")
                raise UserError(f"step {step + 1}, update {update + 1}: gradient norm {norm.item()}: not finite, so it was not "
                                f"made. The batch is in {batch_file}, a checkpoint before it is whole: --resume with a lower "
                                f"learning_rate than {cfg.learning_rate}, or dtype=float32")
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate * min(1, (step + 1) / max(1, cfg.warmup_steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            timer.lap("optimizer")

        # 5. log: means over the updates, the largest gradient norm; FLOPs: sampling, reference, and 3 F for each update
        state["tflops"] += (writer_flops + reference_flops + 3 * cfg.updates_per_batch * batch_flops) / 1e12
        loss, entropy, kl, clipped, correction, seen = utils.all_reduce(totals).tolist()
        lowest, highest, gap = utils.all_reduce(extremes, dist.ReduceOp.MAX).tolist()
        timings = timer.summary()
        if chief:
            graded, seen = rewards[~rewards.isnan()], max(1, seen)
            equal = (rewards.nan_to_num(2.0).amin(1) >= rewards.nan_to_num(-1.0).amax(1)).sum().item()
            row = {"step": step + 1, "loss": loss / cfg.updates_per_batch,
                   "reward_mean": graded.mean().item() if len(graded) else None,
                   "reward_std": graded.std(correction=0).item() if len(graded) else None,
                   "equal_groups": equal / cfg.prompts_per_step, "ungraded": int(ungraded.sum().item()),
                   "masked": int((~in_loss).sum().item()), "student_entropy": entropy / seen, "kl_to_reference": kl / seen,
                   "clip_fraction": clipped / seen, "ratio_min": -lowest if loss_tokens else None,
                   "ratio_max": highest if loss_tokens else None,
                   "importance_weight": correction / seen, "logprob_gap_max": gap, **gaps,
                   "mean_length": all_tokens / len(cut), "max_length": longest, "truncated_share": cut.mean().item(),
                   "grad_norm": grad_norm.item(), "learning_rate": optimizer.param_groups[0]["lr"], "tokens": int(all_tokens),
                   "tokens_per_second": all_tokens / sum(timer.laps.values()), **timings,
                   "tflops": state["tflops"]}
            utils.write_lines(metrics_file, [row])
            utils.print_row(COLUMNS, row, header=step % 20 == 0 or step == start_step)
            if not loss_tokens:
                print(f"warning: step {step + 1}: no response is in the loss, so no update was made; ungraded "
                      f"{row['ungraded']}, cut {row['truncated_share']:.0%}", flush=True)

    if chief:
        print(f"done: {cfg.out_dir}/last; `python plot.py {cfg.out_dir}` draws the curves and prints a table")


if __name__ == "__main__":
    utils.run(main, __doc__, Config)
