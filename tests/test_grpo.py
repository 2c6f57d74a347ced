"""GRPO: its maths by hand and by enumeration, one step against plain autograd, learning, resume, processes, mistakes."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import grade
import rl_grpo
import utils
from engine import HFEngine, Sampling

SHORT = ["--prompts_per_step=4", "--group_size=4", "--max_new_tokens=60", "--eval_every=0", "--save_every=1000",
         "--max_tokens_per_microbatch=256", "--warmup_steps=0"]


@pytest.fixture()
def rl(tmp_path):
    """rl("--max_steps=3") -> (metrics lines, run folder), from the base student."""
    def go(*argv, out=None, short=True, student="data/toy/student"):
        out = out or tmp_path / f"rl{len(list(tmp_path.iterdir()))}"
        rl_grpo.main(["configs/toy_grpo.py", f"--student={student}", *(SHORT if short else []), f"--out_dir={out}", *argv])
        return utils.read_lines(out / "metrics.jsonl"), out
    return go


# ------------------------------------------------------------------------------------------------------------ the maths

def test_advantages_by_hand():
    nan = float("nan")
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, nan, nan], [1, 1, 1, 1], [nan] * 4, [1, nan, nan, nan]],
                           dtype=torch.float64)
    s = math.sqrt(3)                                     # reward 1 in 4: mean 1/4, standard deviation sqrt(3)/4
    expected = [[s, -1 / s, -1 / s, -1 / s], [1, 1, -1, -1], [1, -1, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert torch.allclose(rl_grpo.group_advantages(rewards), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    plain = rl_grpo.group_advantages(rewards, "none")
    assert plain[0].tolist() == [0.75, -0.25, -0.25, -0.25] and plain[2].tolist() == [0.5, -0.5, 0, 0] and not plain[3:].any()


def test_token_weights_by_hand():
    """Two of a step's three responses, of 2 and 4 tokens; the third, on another rank, has 6; constant 30."""
    assert rl_grpo.token_weights([2, 4], 3, 12, "dapo", 30) == [1 / 12, 1 / 12]
    assert rl_grpo.token_weights([2, 4], 3, 12, "grpo", 30) == [1 / 6, 1 / 12]
    assert rl_grpo.token_weights([2, 4], 3, 12, "dr_grpo", 30) == [1 / 30, 1 / 30]
    for kind, total in (("dapo", 1), ("grpo", 1), ("dr_grpo", 12 / 30)):            # over all tokens
        assert sum(w * n for w, n in zip(rl_grpo.token_weights([2, 4, 6], 3, 12, kind, 30), (2, 4, 6))) == pytest.approx(total)


@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    (1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0),       # at r = 1: REINFORCE
    (1.5, 1.0, -1.3, 0.0), (1.5, -1.0, 1.5, 1.5),        # above 1 + 0.3: clipped only where it would gain
    (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0),       # below 1 - 0.2: likewise
    (1.2, 1.0, -1.2, -1.2), (0.9, -1.0, 0.9, 0.9)])      # inside
def test_clipped_loss_by_hand(ratio, advantage, loss, slope):
    """slope: d loss / d log q = -A r, or 0 where the clip holds."""
    logps = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64)
    got, r, clipped = rl_grpo.clipped_loss(logps, old, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.3)
    got.sum().backward()
    assert got.item() == pytest.approx(loss) and r.item() == pytest.approx(ratio)
    assert logps.grad.item() == pytest.approx(slope) and clipped.item() == (slope == 0)


def test_k3_by_enumeration():
    """E_q[k3] = KL(q || ref), and E_q[grad k3] = grad KL(ref || q) = q - ref."""
    z, ref = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64).log_softmax(0)
    q = z.log_softmax(0)
    values = rl_grpo.k3(q, ref)
    assert (values >= 0).all()
    assert (q.exp() * values).sum().item() == pytest.approx((q.exp() * (q - ref)).sum().item())
    (q.exp().detach() * values).sum().backward()
    assert torch.allclose(z.grad, q.exp() - ref.exp())


@pytest.mark.parametrize("scale, loss_type", [("group", "dapo"), ("none", "dr_grpo"), ("group", "grpo")])
def test_bandit(scale, loss_type):
    """Ten arms, one of them right: found, and pulled 95 times in 100."""
    torch.manual_seed(0)
    z = torch.zeros(10, requires_grad=True)
    for _ in range(400):
        logps = z.log_softmax(0)
        arms = torch.multinomial(logps.exp().detach(), 16, replacement=True)
        advantages = rl_grpo.group_advantages((arms == 7).float()[None], scale)[0]
        weight = torch.tensor(rl_grpo.token_weights([1] * 16, 16, 16, loss_type, 16))
        loss, _, _ = rl_grpo.clipped_loss(logps[arms], logps[arms].detach(), advantages, 0.2, 0.2)
        z.grad = None
        (weight * loss).sum().backward()
        z.data -= 0.5 * z.grad
    assert z.softmax(0)[7] > 0.95


# ------------------------------------------------------------------------------------------------------- the real script

@pytest.mark.parametrize("options", [
    ["--loss_type=dapo"], ["--loss_type=grpo", "--scale_rewards=none"], ["--loss_type=dr_grpo", "--mask_truncated"],
    ["--loss_type=grpo", "--max_tokens_per_microbatch=100000", "--kl_coef=0.5", "--reference=data/toy/teacher"]])
def test_one_step_is_reinforce_with_a_group_baseline(rl, monkeypatch, tokenizer, student, teacher, options):
    """The gradient of the first update, against plain autograd on the same rollouts: log-softmax, sums in Python."""
    seen = {}
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters, limit):
        seen["grads"] = [p.grad.clone() for p in parameters]
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    (row,), _ = rl("--max_steps=1", *options)
    cfg, _ = utils.load_config(rl_grpo.Config, ["configs/toy_grpo.py", *SHORT, *options])

    problems = utils.load_problems(cfg.prompts)
    order = utils.prompt_order(len(problems), 0, 4, cfg.seed)
    asked = [problems[i] for i in order for _ in range(4)]
    prompts = [utils.encode_prompt(tokenizer, p["problem"]) for p in asked]
    rollouts = HFEngine(student, max_rows=512).generate(
        prompts, Sampling(60, (257,)), [utils.derive_seed(cfg.seed, "train", 0, slot) for slot in range(16)])
    rewards = [float(grade.extract_answer(tokenizer.decode(t)) == p["answer"]) for p, (t, _, _) in zip(asked, rollouts)]
    assert 0 < sum(rewards) < 16 and row["reward_mean"] == pytest.approx(sum(rewards) / 16)
    kept = [i for i in range(16) if not (cfg.mask_truncated and rollouts[i][2] == "length")]
    total = sum(len(rollouts[i][0]) for i in kept)
    assert row["masked"] == 16 - len(kept) and (not cfg.mask_truncated or 0 < row["masked"])
    loss = 0
    for i in kept:
        group = rewards[4 * (i // 4):4 * (i // 4) + 4]
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 4)
        advantage = (rewards[i] - mean) / (std if std and cfg.scale_rewards == "group" else 1)
        tokens = rollouts[i][0]
        ids, here = torch.tensor([prompts[i] + tokens]), slice(len(prompts[i]) - 1, len(prompts[i]) + len(tokens) - 1)
        target = torch.tensor(tokens)[:, None]
        logps = student(ids).logits[0, here].log_softmax(-1).gather(1, target)[:, 0]
        with torch.no_grad():
            ref = teacher(ids).logits[0, here, :student.config.vocab_size].log_softmax(-1).gather(1, target)[:, 0]
        terms = -advantage * logps + cfg.kl_coef * (torch.exp(ref - logps) - 1 - (ref - logps))
        divisor = {"dapo": total, "grpo": len(kept) * len(tokens), "dr_grpo": 16 * 60}[cfg.loss_type]
        loss = loss + terms.sum() / divisor
    loss.backward()
    for got, parameter in zip(seen["grads"], student.parameters()):
        assert torch.allclose(got, parameter.grad, atol=2e-6, rtol=1e-4)
    assert row["ratio_min"] == row["ratio_max"] == 1.0 and row["clip_fraction"] == 0
    assert row["importance_weight"] == pytest.approx(1, abs=1e-4) and row["logprob_gap_max"] < 1e-4


def test_no_signal_no_gradient(rl, monkeypatch):
    """Groups of equal rewards: no gradient, and they are counted."""
    monkeypatch.setattr(rl_grpo, "grade_all", lambda pairs: [(True, "")] * len(pairs))
    rows, _ = rl("--max_steps=2")
    assert [row["grad_norm"] for row in rows] == [0, 0] and [row["equal_groups"] for row in rows] == [1, 1]
    assert rows[0]["reward_mean"] == 1 and rows[0]["kl_to_reference"] == pytest.approx(0, abs=1e-7)


def test_ungraded_responses_leave_the_group(rl, monkeypatch):
    """A step in which every third response has no verdict; then one without any verdict makes no update."""
    monkeypatch.setattr(rl_grpo, "grade_all", lambda pairs: [(None if i % 3 == 0 else i % 2 == 0, "")
                                                            for i in range(len(pairs))])
    rows, _ = rl("--max_steps=1")
    assert rows[0]["ungraded"] == 6 == rows[0]["masked"] and rows[0]["reward_mean"] == pytest.approx(5 / 10)
    monkeypatch.setattr(rl_grpo, "grade_all", lambda pairs: [(None, "")] * len(pairs))
    rows, out = rl("--max_steps=1")
    assert rows[0]["ungraded"] == 16 and rows[0]["reward_mean"] is None and rows[0]["equal_groups"] == 1
    rows, out = rl("--max_steps=2", "--resume", out=out)
    before, after = (utils.load_model(path, torch.float32).state_dict() for path in ("data/toy/student", out / "last"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_several_updates(rl):
    """The second update of a batch has ratios other than 1, and clips."""
    rows, _ = rl("--max_steps=3", "--updates_per_batch=4", "--learning_rate=1e-3", "--clip_low=0.05", "--clip_high=0.05")
    assert rows[0]["ratio_min"] < 0.95 < 1.05 < rows[0]["ratio_max"] and rows[0]["clip_fraction"] > 0
    assert min(row["kl_to_reference"] for row in rows) > 0       # of the first update alone it would be 0 in row 0


@pytest.mark.parametrize("shift, options, factor", [
    (0.5, [], math.exp(0.5)), (0.5, ["--importance_cap=1.25"], 1.25), (-0.5, [], math.exp(-0.5)),
    (0.5, ["--importance_cap=None"], 1.0)])
def test_a_sampler_that_disagrees(rl, monkeypatch, shift, options, factor):
    """q_old / q_sampler weighs every token, up to the cap; the ratio of the update stays 1."""
    before, _ = rl("--max_steps=1", "--max_grad_norm=inf")
    generate = HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda *args: [
        (tokens, [x - shift for x in logps], reason) for tokens, logps, reason in generate(*args)])
    after, _ = rl("--max_steps=1", "--max_grad_norm=inf", "--max_logprob_gap=1", *options)
    assert after[0]["importance_weight"] == pytest.approx(factor, rel=1e-4) and after[0]["ratio_max"] == 1
    assert after[0]["grad_norm"] == pytest.approx(factor * before[0]["grad_norm"], rel=1e-3)
    assert after[0]["logprob_gap_max"] == pytest.approx(0.5, abs=1e-3)


def test_bf16_starts_at_the_reference(rl):
    """The same weights through the same autocast: no KL before the first update moves them."""
    rows, _ = rl("--max_steps=2", "--dtype=bfloat16", "--learning_rate=0", "--kl_coef=1", "--updates_per_batch=2")
    assert [row["kl_to_reference"] for row in rows] == [0, 0] and rows[1]["ratio_min"] == rows[1]["ratio_max"] == 1
    assert 0 < rows[0]["logprob_gap_max"] < 0.5          # sampler and trainer: bf16 weights there, masters here


def test_extreme_ratios():
    """A token that fell from probability 1 to 1e-60: no infinity, no NaN."""
    logps = torch.tensor([-140.0, 0.0, 0.0], requires_grad=True)
    loss, ratio, _ = rl_grpo.clipped_loss(logps, torch.tensor([0.0, -140.0, -140.0]), torch.tensor([1.0, 0.0, -1.0]), 0.2, 0.2)
    loss.sum().backward()
    assert ratio.isfinite().all() and loss.isfinite().all() and logps.grad.isfinite().all()


def test_metrics(rl, tokenizer):
    """Lengths, entropy and KL of a step, recomputed; FLOPs: sampling, the reference, and three forwards for each update."""
    rows, _ = rl("--max_steps=1", "--updates_per_batch=2", "--learning_rate=0")
    row = rows[0]
    assert row["tokens"] == row["mean_length"] * 16 and row["max_length"] <= 60 and abs(row["kl_to_reference"]) < 1e-7
    assert 0.1 < row["student_entropy"] < 0.5 and row["reward_std"] == pytest.approx(
        math.sqrt(row["reward_mean"] * (1 - row["reward_mean"])))
    once, _ = rl("--max_steps=1", "--learning_rate=0")
    assert row["tflops"] / once[0]["tflops"] == pytest.approx(8 / 5)        # G + F + 2 x 3F against G + F + 3F
    assert row["loss"] == pytest.approx(once[0]["loss"]) and row["learning_rate"] == 0


@pytest.mark.parametrize("config", ["toy_opd", "toy_dagger", "toy_offline", "toy_sft"])
def test_from_each_cell(rl, train, config):
    options = ["--trajectories=None"] if config in ("toy_offline", "toy_sft") else []
    _, out = train(f"configs/{config}.py", "--max_steps=1", *options)
    rows, _ = rl("--max_steps=1", student=out / "last")
    assert math.isfinite(rows[0]["loss"]) and rows[0]["tokens"] > 0


def weights(out):
    return utils.load_model(out / "last", torch.float32).state_dict()


def test_resume_is_exact(rl, tmp_path):
    """4 steps are 2 + 2, weights and metrics bit for bit; evaluations too."""
    options = ["--updates_per_batch=2", "--eval_every=2", "--eval_prompts=4", "--eval_samples=2", "--eval_max_new_tokens=30"]
    whole, a = rl("--max_steps=4", *options)
    _, b = rl("--max_steps=2", *options)
    parts, _ = rl("--max_steps=4", "--resume", *options, out=b)
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))

    def plain(rows):
        return [{k: v for k, v in row.items() if not k.endswith(("seconds", "per_second", "gap_mean", "_gb"))} for row in rows]
    assert plain(parts) == plain(whole) and [row["step"] for row in whole] == [0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("options", [
    ["--max_steps=3", "--prompts_per_step=1", "--group_size=5", "--kl_coef=0.1"],
    ["--max_steps=6", "--prompts_per_step=1", "--group_size=2", "--kl_coef=0.1", "--mask_truncated", "--max_new_tokens=40"]])
def test_two_processes_are_one(rl, tmp_path, options):
    """
    Responses are dealt, groups are not: the same rewards, losses and weights, with uneven shares or none in the loss. The last
    step is made by one process, from what two have saved.
    """
    one, a = rl(*options)
    assert "--mask_truncated" not in options or {0, 1} <= {row["masked"] for row in one}
    out = tmp_path / "two"
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "rl_grpo.py",
         "configs/toy_grpo.py", "--student=data/toy/student", *SHORT, f"--out_dir={out}", *options,
         f"--max_steps={len(one) - 1}"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr[-2000:]
    two, _ = rl(*options, "--resume", out=out)
    for x, y in zip(one, two, strict=True):
        for key in ("loss", "reward_mean", "student_entropy", "grad_norm", "kl_to_reference", "tflops", "mean_length"):
            assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), key
    assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(weights(a).values(), weights(out).values()))


def test_learns(rl):
    """50 steps raise Avg@4 on 32 held-out problems by 0.2 and more (full runs, three seeds: below)."""
    rows, _ = rl("--max_steps=50", "--eval_every=50", "--eval_prompts=32", "--eval_samples=4", short=False)
    scores = [row["avg_at_k"] for row in rows if "avg_at_k" in row]
    assert scores[1] - scores[0] >= 0.2, scores


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_150_steps_raise_accuracy(rl, seed):
    rows, _ = rl(f"--seed={seed}", short=False)
    scores = [row["avg_at_k"] for row in rows if "avg_at_k" in row]
    assert scores[-1] - scores[0] >= 0.2, scores


@pytest.mark.parametrize("option, message", [
    ("--group_size=1", "group_size=1: GRPO needs at least 2 responses to a prompt to form an advantage"),
    ("--updates_per_batch=0", "updates_per_batch=0: must be at least 1"),
    ("--temperature=0", "temperature=0.0: must be positive"),
    ("--clip_low=1", "clip_low=1.0: must be in"), ("--importance_cap=0.5", "importance_cap=0.5: must be at least 1"),
    ("--loss_type=ppo", "loss_type='ppo'"), ("--prompts=data/none.jsonl", "no prompt file data/none.jsonl"),
    ("--student=data/toy/none", "data/toy/none"), ("--max_new_tokens=99999", "no usable prompt"),
    ("--eval_every=-1", "eval_every=-1: must not be negative"), ])
def test_mistakes(tmp_path, option, message):
    with pytest.raises(utils.UserError) as caught:
        rl_grpo.main(["configs/toy_grpo.py", "--student=data/toy/student", *SHORT, f"--out_dir={tmp_path / 'x'}", option])
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "x").exists()


def test_prompts_without_answers_and_foreign_folders(rl, train, tmp_path):
    rows = [{"problem": "1+2?", "answer": "3"}, {"problem": "2+2?"}]
    utils.write_lines(tmp_path / "p.jsonl", rows)
    with pytest.raises(utils.UserError, match="p.jsonl: problem 2 has no answer, .* remove it .1 of 2 have none"):
        rl(f"--prompts={tmp_path / 'p.jsonl'}")
    other = tmp_path / "other"                           # a student folder with another model's tokenizer in it
    shutil.copytree("data/toy/student", other)
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign = PreTrainedTokenizerFast(tokenizer_object=letters)
    foreign.chat_template = "{{ messages[0]['content'] }}"
    foreign.save_pretrained(other)
    with pytest.raises(utils.UserError, match="its tokenizer does not know the stop id 257"):
        rl(student=other)
    _, out = train("configs/toy_opd.py", "--max_steps=1")
    with pytest.raises(utils.UserError, match="was written by 'train_distill', not by 'rl_grpo'.*--student="):
        rl("--resume", out=out)
    _, out = rl("--max_steps=1")
    with pytest.raises(utils.UserError, match="began from student='data/toy/student', not '"):
        rl("--resume", "--max_steps=2", out=out, student=out / "last")
    moved = tmp_path / "moved"
    shutil.copytree("data/toy/student", moved)
    _, other_out = rl("--max_steps=1", student=moved)
    shutil.copytree("data/toy/teacher", moved, dirs_exist_ok=True)
    with pytest.raises(utils.UserError, match="moved has changed since .* was begun"):
        rl("--resume", "--max_steps=2", out=other_out, student=moved)
    with pytest.raises(utils.UserError, match="max_steps=0: .* is at step 1 already"):
        rl("--resume", "--max_steps=0", out=out)
