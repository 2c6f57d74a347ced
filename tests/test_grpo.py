"""
GRPO: its maths by hand and by enumeration, a step against plain autograd, learning, resume,
processes, mistakes.
"""

import json
import math
import shutil

import pytest
import torch
from conftest import torchrun
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as bpe
from transformers import PreTrainedTokenizerFast

import grade
import models
import rl_grpo
import utils
from data.problems import deal, encode_prompt, load_problems, load_tokenizer
from engine import HFEngine, Sampling
from models import stop_ids

SHORT = ["--prompts_per_step=4", "--group_size=4", "--max_new_tokens=60", "--eval_every=0",
         "--save_every=1000", "--max_tokens_per_microbatch=256", "--warmup_steps=0"]


def argv_of(out, *argv, student="data/toy/student", short=True):
    options = SHORT if short else []
    return ["configs/toy_grpo.py", f"--student={student}", *options, f"--out_dir={out}", *argv]


@pytest.fixture()
def rl(tmp_path):
    """rl("--max_steps=3") -> (metrics lines, run folder), from the base student."""
    def go(*argv, out=None, **options):
        out = out or tmp_path / f"rl{len(list(tmp_path.iterdir()))}"
        rl_grpo.main(argv_of(out, *argv, **options))
        return utils.read_lines(out / "metrics.jsonl"), out
    return go


def weights(out):
    return models.load_model(out / "last", torch.float32).state_dict()


# --------------------------------------------------------------------------------------- the maths

NAN = float("nan")
ROOT = math.sqrt(3)  # one reward of four: mean 1/4, standard deviation sqrt(3)/4


@pytest.mark.parametrize("rewards, scaled, centred", [
    ([1, 0, 0, 0], [ROOT, -1 / ROOT, -1 / ROOT, -1 / ROOT], [0.75, -0.25, -0.25, -0.25]),
    ([1, 1, 0, 0], [1, 1, -1, -1], [0.5, 0.5, -0.5, -0.5]),
    ([1, 0, NAN, NAN], [1, -1, 0, 0], [0.5, -0.5, 0, 0]),
    ([1, 1, 1, 1], [0] * 4, [0] * 4),
    ([NAN] * 4, [0] * 4, [0] * 4),
    ([1, NAN, NAN, NAN], [0] * 4, [0] * 4)])
def test_advantages_by_hand(rewards, scaled, centred):
    rewards = torch.tensor([rewards, [1, 0, 1, 0]], dtype=torch.float64)  # a group beside another
    for scale, expected in (("group", scaled), ("none", centred)):
        got = rl_grpo.group_advantages(rewards, scale)[0].tolist()
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind, expected, total", [
    ("dapo", [1 / 12, 1 / 12], 1), ("grpo", [1 / 6, 1 / 12], 1),
    ("dr_grpo", [1 / 30, 1 / 30], 12 / 30)])
def test_token_weights_by_hand(kind, expected, total):
    """Two of a step's three responses, of 2 and 4 tokens; another rank has 6; constant 30."""
    assert rl_grpo.token_weights([2, 4], 3, 12, kind, 30) == expected
    every = rl_grpo.token_weights([2, 4, 6], 3, 12, kind, 30)
    assert sum(w * n for w, n in zip(every, (2, 4, 6))) == pytest.approx(total)


@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    (1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0),  # at r = 1: REINFORCE
    (1.5, 1.0, -1.3, 0.0), (1.5, -1.0, 1.5, 1.5),  # above 1 + 0.3: clipped only where it gains
    (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0),  # below 1 - 0.2: likewise
    (1.2, 1.0, -1.2, -1.2), (0.9, -1.0, 0.9, 0.9)])  # inside
def test_clipped_loss_by_hand(ratio, advantage, loss, slope):
    """slope: d loss / d log q = -A r, or 0 where the clip holds."""
    logps = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    got, clipped = rl_grpo.clipped_loss(logps, old, advantages, 0.2, 0.3)
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(slope)
    assert clipped.item() == (slope == 0)


def test_extreme_ratios():
    """A token that fell from probability 1 to 1e-60, and back: no infinity, no NaN."""
    logps = torch.tensor([-140.0, 0.0, 0.0], requires_grad=True)
    old, advantages = torch.tensor([0.0, -140.0, -140.0]), torch.tensor([1.0, 0.0, -1.0])
    loss, _ = rl_grpo.clipped_loss(logps, old, advantages, 0.2, 0.2)
    loss.sum().backward()
    for numbers in (loss, logps.grad):
        assert numbers.isfinite().all()


def test_k3_by_enumeration():
    """E_q[k3] = KL(q || ref), and E_q[grad k3] = grad KL(ref || q) = q - ref."""
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, dtype=torch.float64).log_softmax(0)
    q = z.log_softmax(0)
    values = rl_grpo.k3(q, ref)
    assert (values >= 0).all()
    kl = (q.exp() * (q - ref)).sum()
    assert (q.exp() * values).sum().item() == pytest.approx(kl.item())
    (q.exp().detach() * values).sum().backward()
    assert torch.allclose(z.grad, q.exp() - ref.exp())


@pytest.mark.parametrize("scale, loss_type", [
    ("group", "dapo"), ("none", "dr_grpo"), ("group", "grpo")])
def test_bandit(scale, loss_type):
    """Ten arms, one of them right: found, and pulled 95 times in 100."""
    torch.manual_seed(0)
    z = torch.zeros(10, requires_grad=True)
    for _ in range(400):
        logps = z.log_softmax(0)
        arms = torch.multinomial(logps.exp().detach(), 16, replacement=True)
        advantages = rl_grpo.group_advantages((arms == 7).float()[None], scale)[0]
        weight = torch.tensor(rl_grpo.token_weights([1] * 16, 16, 16, loss_type, 16))
        pulled = logps[arms]
        loss, _ = rl_grpo.clipped_loss(pulled, pulled.detach(), advantages, 0.2, 0.2)
        z.grad = None
        (weight * loss).sum().backward()
        z.data -= 0.5 * z.grad
    assert z.softmax(0)[7] > 0.95


# --------------------------------------------------------------------------------- the real script

def own_loss(cfg, prompts, rollouts, rewards, student, reference):
    """
    What has the gradient of the loss of 4 groups of 4 responses at r = 1, by plain log-softmax and
    sums in Python; and how many responses are not in it.
    """
    kept = [i for i in range(16) if not (cfg.mask_truncated and rollouts[i][2] == "length")]
    total = sum(len(rollouts[i][0]) for i in kept)
    loss = 0
    for i in kept:
        group = rewards[4 * (i // 4):4 * (i // 4) + 4]
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 4)
        advantage = (rewards[i] - mean) / (std if std and cfg.scale_rewards == "group" else 1)
        tokens, n = rollouts[i][0], len(prompts[i])
        ids, predicts = torch.tensor([prompts[i] + tokens]), slice(n - 1, n + len(tokens) - 1)
        target = torch.tensor(tokens)[:, None]
        logits = student(ids).logits[0, predicts]
        logps = logits.log_softmax(-1).gather(1, target)[:, 0]
        with torch.no_grad():
            logits = reference(ids).logits[0, predicts, :student.config.vocab_size]
            ref = logits.log_softmax(-1).gather(1, target)[:, 0]
        k3 = torch.exp(ref - logps) - 1 - (ref - logps)
        terms = -advantage * logps + cfg.kl_coef * k3
        divisors = {"dapo": total, "grpo": len(kept) * len(tokens), "dr_grpo": 16 * 60}
        loss = loss + terms.sum() / divisors[cfg.loss_type]
    return loss, 16 - len(kept)


@pytest.mark.parametrize("options", [
    ["--loss_type=dapo"],
    ["--loss_type=grpo", "--scale_rewards=none"],
    ["--loss_type=dr_grpo", "--mask_truncated"],
    ["--loss_type=grpo", "--max_tokens_per_microbatch=100000", "--kl_coef=0.5",
     "--reference=data/toy/teacher"]])
def test_one_step_is_reinforce_with_a_group_baseline(
        rl, monkeypatch, tokenizer, student, teacher, options):
    """The gradient of the first update, against plain autograd on the same rollouts."""
    grads, clip = [], torch.nn.utils.clip_grad_norm_

    def record(parameters, limit):
        grads.extend(p.grad.clone() for p in parameters)
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    (row,), _ = rl("--max_steps=1", *options)
    cfg = utils.load_config(rl_grpo.Config, ["configs/toy_grpo.py", *SHORT, *options])

    problems = load_problems(cfg.prompts)
    order = [i for _, i, _ in deal(len(problems), 0, 4, cfg.seed)]
    asked = [problems[i] for i in order for _ in range(4)]
    prompts = [encode_prompt(tokenizer, p["problem"]) for p in asked]
    seeds = [utils.derive_seed(cfg.seed, "train", 0, place) for place in range(16)]
    rollouts = HFEngine(student).generate(prompts, Sampling(60, (257,)), seeds)
    answers = [grade.extract_answer(tokenizer.decode(tokens)) for tokens, _, _ in rollouts]
    rewards = [float(answer == p["answer"]) for answer, p in zip(answers, asked)]
    assert 0 < sum(rewards) < 16
    assert row["reward_mean"] == pytest.approx(sum(rewards) / 16)

    loss, masked = own_loss(cfg, prompts, rollouts, rewards, student, teacher)
    loss.backward()
    assert row["not_in_loss"] == masked and (masked > 0) == cfg.mask_truncated
    for got, parameter in zip(grads, student.parameters(), strict=True):
        assert torch.allclose(got, parameter.grad, atol=2e-6, rtol=1e-4)
    assert row["clip_fraction"] == 0
    assert row["importance_weight"] == pytest.approx(1, abs=1e-4)
    assert row["logprob_gap_mean"] < 1e-5


def give_verdicts(monkeypatch, verdict):
    """Responses are graded by verdict(i), i their place on this rank."""
    monkeypatch.setattr(rl_grpo, "grade_all", lambda pairs: [
        (verdict(i), "") for i in range(len(pairs))])


def test_no_signal_no_gradient(rl, monkeypatch):
    """Groups of equal rewards: no gradient, and they are counted."""
    give_verdicts(monkeypatch, lambda i: True)
    rows, _ = rl("--max_steps=2")
    assert [row["grad_norm"] for row in rows] == [0, 0]
    assert [row["equal_groups"] for row in rows] == [1, 1]
    assert rows[0]["reward_mean"] == 1


def test_ungraded_responses_leave_the_group(rl, monkeypatch, capsys):
    """Every third response has no verdict; then none has one, and no update is made."""
    give_verdicts(monkeypatch, lambda i: None if i % 3 == 0 else i % 2 == 0)
    (row,), _ = rl("--max_steps=1")
    assert row["ungraded"] == 6 == row["not_in_loss"]
    assert row["reward_mean"] == pytest.approx(5 / 10)
    give_verdicts(monkeypatch, lambda i: None)
    (row,), out = rl("--max_steps=1")
    assert row["ungraded"] == 16 and row["reward_mean"] is None and row["equal_groups"] == 1
    assert "step 1: no response is in the loss, so no update was made" in capsys.readouterr().out
    rl("--max_steps=2", "--resume", out=out)  # a checkpoint without moments
    before, after = models.load_model("data/toy/student", torch.float32).state_dict(), weights(out)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_ratio_is_one_at_first(rl, monkeypatch):
    """To the bit at the first update of each step, and only there."""
    plain, equal = rl_grpo.micro_loss, []

    def look(cfg, micro, logps):
        equal.append(torch.equal(logps, micro.old_logps))
        return plain(cfg, micro, logps)

    monkeypatch.setattr(rl_grpo, "micro_loss", look)
    rl("--max_steps=2", "--updates_per_batch=2", "--max_tokens_per_microbatch=99999")
    assert equal == [True, False] * 2


def test_several_updates(rl):
    """The second update of a batch has ratios other than 1, and clips."""
    rows, _ = rl("--max_steps=3", "--updates_per_batch=4", "--learning_rate=1e-3",
                 "--clip_low=0.05", "--clip_high=0.05", "--reference=data/toy/student")
    assert rows[0]["clip_fraction"] > 0
    assert min(row["kl_to_reference"] for row in rows) > 0  # of the first update it is 0


@pytest.mark.parametrize("shift, options, factor", [
    (0.5, [], math.exp(0.5)), (0.5, ["--importance_cap=1.25"], 1.25),
    (-0.5, [], math.exp(-0.5)), (0.5, ["--importance_cap=None"], 1.0)])
def test_a_sampler_that_disagrees(rl, monkeypatch, shift, options, factor):
    """q_old / q_sampler weighs every token, up to the cap; the ratio of the update stays 1."""
    (before,), _ = rl("--max_steps=1", "--max_grad_norm=inf")
    generate = HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda *args: [
        (tokens, [x - shift for x in logps], reason)
        for tokens, logps, reason in generate(*args)])
    (after,), _ = rl("--max_steps=1", "--max_grad_norm=inf", "--max_logprob_gap=1", *options)
    assert after["importance_weight"] == pytest.approx(factor, rel=1e-4)
    assert after["clip_fraction"] == 0
    assert after["grad_norm"] == pytest.approx(factor * before["grad_norm"], rel=1e-3)
    assert after["logprob_gap_mean"] == pytest.approx(0.5, abs=1e-3)


def test_log_probs_that_are_not_finite(rl, monkeypatch):
    """
    They are counted, and their tokens left out of the loss, whose divisor stays: the gradient is
    that of the other tokens, as where those log-probs were any number and their weight was 0.
    """
    generate, plain = HFEngine.generate, rl_grpo.micro_loss

    def broken(self, *args):
        rollouts = generate(self, *args)
        for _, logps, _ in rollouts:
            logps[::5] = [value] * len(logps[::5])
        return rollouts

    def left_out(cfg, micro, logps):
        micro.weights[micro.sampler_logps == -7.0] = 0
        return plain(cfg, micro, logps)

    monkeypatch.setattr(HFEngine, "generate", broken)
    for number in (-math.inf, math.nan):
        value = number
        (row,), _ = rl("--max_steps=1", "--max_grad_norm=inf")
        assert 16 <= row["nonfinite_logps"] < row["tokens"] / 4
        assert row["logprob_gap_mean"] < 1e-4 and row["importance_weight"] == pytest.approx(1)
    value = -7.0
    monkeypatch.setattr(rl_grpo, "micro_loss", left_out)
    (other,), _ = rl("--max_steps=1", "--max_grad_norm=inf", "--max_logprob_gap=9")
    assert other["nonfinite_logps"] == 0
    assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_bf16_starts_at_the_reference(rl):
    """The same weights through the same autocast: no KL before the first update moves them."""
    rows, _ = rl("--max_steps=2", "--dtype=bfloat16", "--learning_rate=0", "--kl_coef=1",
                 "--updates_per_batch=2")
    assert [row["kl_to_reference"] for row in rows] == [0, 0]
    assert 0 < rows[0]["logprob_gap_mean"] < 0.1  # the sampler has bf16 weights, fp32 ones here


def test_metrics(rl):
    """
    Lengths and entropy of a step; FLOPs: sampling, 3 forwards an update, and the reference where
    there is one: it is neither loaded nor run for a KL that has no weight.
    """
    (row,), _ = rl("--max_steps=1", "--updates_per_batch=2", "--learning_rate=0")
    assert row["tokens"] == row["mean_length"] * 16 <= 16 * 60
    assert row["kl_to_reference"] is None and "reference_seconds" not in row
    assert 0.1 < row["student_entropy"] < 0.5
    (once,), _ = rl("--max_steps=1", "--learning_rate=0")
    assert row["tflops"] / once["tflops"] == pytest.approx(7 / 4)  # G + 2 x 3F, G + 3F
    for option in ("--kl_coef=1e-9", "--reference=data/toy/student"):
        (measured,), _ = rl("--max_steps=1", "--learning_rate=0", option)
        assert measured["tflops"] / once["tflops"] == pytest.approx(5 / 4)  # G + F + 3F
        assert abs(measured["kl_to_reference"]) < 1e-7 and measured["reference_seconds"] > 0
    assert row["loss"] == pytest.approx(once["loss"]) and row["learning_rate"] == 0


@pytest.mark.parametrize("config", ["toy_opd", "toy_dagger", "toy_offline", "toy_sft"])
def test_from_each_cell(rl, train, config):
    options = ["--trajectories=None"] if config in ("toy_offline", "toy_sft") else []
    _, out = train(f"configs/{config}.py", "--max_steps=1", *options)
    (row,), _ = rl("--max_steps=1", student=out / "last")
    assert math.isfinite(row["loss"]) and row["tokens"] > 0


def test_resume_is_exact(rl):
    """4 steps are 2 + 2, weights and metrics bit for bit; evaluations too."""
    options = ["--updates_per_batch=2", "--eval_every=2", "--eval_prompts=4", "--eval_samples=2",
               "--eval_max_new_tokens=30"]
    whole, a = rl("--max_steps=4", *options)
    _, b = rl("--max_steps=2", *options)
    parts, _ = rl("--max_steps=4", "--resume", *options, out=b)
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))

    def plain(rows):  # times differ, and the step after a resume compares log-probs once more
        ends = ("seconds", "per_second", "gap_mean")
        return [{k: v for k, v in row.items() if not k.endswith(ends)} for row in rows]

    assert plain(parts) == plain(whole)
    assert [row["step"] for row in whole] == [0, 1, 2, 2, 3, 4, 4]


DRIVER = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import rl_grpo, utils
def main(argv):
    for run in json.loads(argv[0]):
        rl_grpo.main(run)
utils.run(main, "", rl_grpo.Config)
"""


def test_two_processes_are_one(rl, tmp_path):
    """
    Responses are dealt, groups are not: the same rewards, losses and weights, with uneven shares,
    and with a rank that has no response in the loss. The last step is made by one process, from
    what two have saved.
    """
    ways = {"uneven": (3, ["--group_size=5"]),
            "masked": (6, ["--group_size=2", "--mask_truncated", "--max_new_tokens=40"])}
    ways = {name: (steps, ["--prompts_per_step=1", "--kl_coef=0.1", *options])
            for name, (steps, options) in ways.items()}
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    runs = [argv_of(tmp_path / name, *options, f"--max_steps={steps - 1}")
            for name, (steps, options) in ways.items()]
    finished = torchrun(2, script, json.dumps(runs))
    assert finished.returncode == 0, finished.stderr[:2000]

    keys = ("loss", "reward_mean", "student_entropy", "grad_norm", "kl_to_reference", "tflops",
            "mean_length", "not_in_loss")
    for name, (steps, options) in ways.items():
        options = [*options, f"--max_steps={steps}"]
        one, a = rl(*options)
        assert name != "masked" or {0, 1} <= {row["not_in_loss"] for row in one}
        two, b = rl(*options, "--resume", out=tmp_path / name)
        for x, y in zip(one, two, strict=True):
            for key in keys:
                assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), (name, key)
        for x, y in zip(weights(a).values(), weights(b).values(), strict=True):
            assert torch.allclose(x, y, atol=2e-5)


def gain(rows):
    """How much Avg@k rose from the first evaluation to the last."""
    scores = [row["avg_at_k"] for row in rows if "avg_at_k" in row]
    return scores[-1] - scores[0]


def test_learns(rl):
    """30 steps raise Avg@4 on 32 held-out problems by 0.2 and more."""
    options = ["--max_steps=30", "--eval_every=30", "--eval_prompts=32", "--eval_samples=4"]
    rows, _ = rl(*options, short=False)
    assert gain(rows) >= 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_150_steps_raise_accuracy(rl, seed):
    rows, _ = rl(f"--seed={seed}", short=False)
    assert gain(rows) >= 0.2


# ---------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("option, message", [
    ("--group_size=1",
     "group_size=1: GRPO needs at least 2 responses to a prompt to form an advantage"),
    ("--updates_per_batch=0", "updates_per_batch=0: must be at least 1"),
    ("--prompts_per_step=0", "prompts_per_step=0: must be at least 1"),
    ("--temperature=0", "temperature=0.0: must be positive"),
    ("--clip_low=1", "clip_low=1.0: must be in [0, 1)"),
    ("--importance_cap=0.5", "importance_cap=0.5: must be at least 1"),
    ("--loss_type=ppo", "loss_type='ppo'"),
    ("--prompts=data/none.jsonl", "data/none.jsonl: "),
    ("--student=data/toy/none", "data/toy/none"),
    ("--max_new_tokens=99999", "no usable prompt"),
    ("--eval_every=-1", "eval_every=-1: must not be negative")])
def test_mistakes(tmp_path, option, message):
    with pytest.raises(utils.UserError) as caught:
        rl_grpo.main([*argv_of(tmp_path / "x"), option])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_more_processes_than_responses():
    cfg = rl_grpo.Config(prompts_per_step=1, group_size=2)
    with pytest.raises(utils.UserError, match="prompts_per_step=1: x 2 responses leave some of"):
        rl_grpo.validate(cfg, 3)


def test_prompts_without_answers(rl, tmp_path):
    path = tmp_path / "p.jsonl"
    utils.write_lines(path, [{"problem": "1+2?", "answer": "3"}, {"problem": "2+2?"}])
    with pytest.raises(utils.UserError, match="p.jsonl, line 2: it has no answer .* remove it"):
        rl(f"--prompts={path}")


@pytest.mark.parametrize("stop, ids", [("union", [257, 260]), ("student", [257])])
def test_template_and_stop(rl, tmp_path, stop, ids):
    """A student without a template takes the teacher's, with or without the ids that end there."""
    base = shutil.copytree("data/toy/student", tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(utils.UserError, match="its tokenizer has no chat template"):
        rl("--max_steps=1", student=base)
    options = ["--max_steps=1", "--template=data/toy/teacher", f"--stop={stop}"]
    _, out = rl(*options, student=base)
    model = models.load_model(out / "last", torch.float32)
    assert stop_ids(model.generation_config, load_tokenizer(out / "last")) == ids
    assert encode_prompt(load_tokenizer(out / "last"), "3+4?") == [258, 51, 43, 52, 63, 259]


def test_a_student_with_another_models_tokenizer(rl, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree("data/toy/student", folder)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters = Tokenizer(bpe.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign = PreTrainedTokenizerFast(tokenizer_object=letters)
    foreign.chat_template = "{{ messages[0]['content'] }}"
    foreign.save_pretrained(folder)
    with pytest.raises(utils.UserError, match=r"stop ids are \[257\], and the tokenizer has 256"):
        rl(student=folder)


def test_what_a_run_cannot_resume(rl, train, tmp_path):
    _, out = train("configs/toy_opd.py", "--max_steps=1")
    with pytest.raises(utils.UserError, match="made with script='train_distill', not 'rl_grpo'"):
        rl("--resume", out=out)
    moved = tmp_path / "moved"
    shutil.copytree("data/toy/student", moved)
    _, out = rl("--max_steps=1", "--kl_coef=0.1", student=moved)
    with pytest.raises(utils.UserError, match="made with student='[0-9a-f]{16}', not"):
        rl("--resume", "--max_steps=2", out=out, student=out / "last")
    with pytest.raises(utils.UserError, match="max_steps=0: .* is at step 1"):
        rl("--resume", "--max_steps=0", "--kl_coef=0.1", out=out, student=moved)
    shutil.copytree("data/toy/teacher", moved, dirs_exist_ok=True)
    with pytest.raises(utils.UserError, match="made with (student|reference)='[0-9a-f]{16}', not"):
        rl("--resume", "--max_steps=2", "--kl_coef=0.1", out=out, student=moved)
