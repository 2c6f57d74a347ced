"""train_distill.py for real steps, with numbers: cells, invariances, resume, processes, mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SHORT, STOPS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_distill
import utils
from engine import HFEngine, Sampling
from kernels import linear_kl

CELLS = {"toy_sft": ("teacher", 0.0), "toy_offline": ("teacher", 1.0), "toy_dagger": ("student", 0.0),
         "toy_opd": ("student", 1.0), "toy_mix": ("student", 0.2)}


def steps(rows):
    return [row for row in rows if "loss" in row]


def weights(run, step="last"):
    return load_file(run / step / "model.safetensors"), load_file(run / step / "optimizer.safetensors")


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    return all((a[k] - b[k]).abs().max() <= tolerance for k in a)


# --------------------------------------------------------------------------------------------------------------------- cells

@pytest.mark.parametrize("name", CELLS)
def test_cells(train, name):
    """Each corner trains on its own prefixes and direction: loss = lam reverse + (1 - lam) forward on the same tokens."""
    prefix, lam = CELLS[name]
    rows, run = train(f"configs/{name}.py", "--max_steps=2", "--trajectories=None")
    config = json.loads((run / "run_config.json").read_text())
    assert (config["prefix"], config["reverse_weight"]) == (prefix, lam)
    for row in steps(rows):
        assert row["loss"] == pytest.approx(lam * row["reverse_kl"] + (1 - lam) * row["forward_kl"], rel=1e-5)
        assert 0.01 < row["forward_kl"] < 2 and 0.01 < row["reverse_kl"] < 2 and row["max_length"] <= 24
        assert row["student_entropy"] > row["teacher_entropy"] > 0.05
        assert (row["tflops_teacher_writing"] > 0) == (prefix == "teacher")


def test_prefix_source(train, monkeypatch, teacher, student):
    """What the loss is taken on was written by the model that `prefix` names: its own log-probs are the higher ones."""
    seen, plain = [], utils.response_hidden
    monkeypatch.setattr(utils, "response_hidden", lambda m, batch, dtype: seen.append(batch) or plain(m, batch, dtype))
    gaps = []
    for name in ("toy_sft", "toy_opd"):
        seen.clear()
        train(f"configs/{name}.py", "--max_steps=1", "--batch_size=32", "--max_new_tokens=64", "--trajectories=None")
        with torch.no_grad():
            scores = [sum(m(torch.tensor([p + r])).logits[0, len(p) - 1:-1, :272].log_softmax(-1).gather(
                1, torch.tensor(r)[:, None]).sum() for batch in seen[::2] for p, r in batch) for m in (teacher, student)]
        gaps.append((scores[0] - scores[1]).item())
    assert gaps[0] > 0 > gaps[1]


def test_hard_labels(train, student):
    """teacher=None: cross-entropy on the file's solutions, here recomputed from logits."""
    rows, run = train("configs/toy_hard_sft.py", "--max_steps=1", "--max_new_tokens=200", "--trajectories=None")
    order = utils.prompt_order(3000, 0, 8, 42)
    tok = AutoTokenizer.from_pretrained("data/toy/student")
    problems, total, count = utils.load_problems("data/toy/train.jsonl"), 0.0, 0
    for i in order:
        prompt = utils.encode_prompt(tok, problems[i]["problem"])
        response = tok.encode(problems[i]["solution"], add_special_tokens=False) + [STOPS[0]]
        with torch.no_grad():
            log_q = student(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        total, count = total - log_q.gather(1, torch.tensor(response)[:, None]).sum().item(), count + len(response)
    assert rows[0]["loss"] == pytest.approx(total / count, abs=1e-5) and rows[0]["tokens"] == count


def test_loss_does_not_depend_on_microbatches(train):
    runs = [train("configs/toy_opd.py", "--max_steps=3", "--max_new_tokens=96", f"--max_tokens_per_microbatch={budget}")
            for budget in (40, 200, 9999)]
    for rows, run in runs[1:]:
        for a, b in zip(steps(rows), steps(runs[0][0])):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert same(weights(run)[0], weights(runs[0][1])[0], 2e-6)


def test_bf16_compute(train):
    """bf16 compute over fp32 masters: the same step within bf16's rounding, and weights that are not bf16 numbers."""
    options = ("--max_steps=2", "--trajectories=None", "--learning_rate=1e-5")
    exact, _ = train("configs/toy_sft.py", *options)
    rounded, run = train("configs/toy_sft.py", "--dtype=bfloat16", *options)
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.15) and rounded[0]["loss"] != exact[0]["loss"]
    assert any((w != w.bfloat16().float()).any() for w in weights(run)[0].values())


def test_loss_norm(train, monkeypatch):
    """"token": mean over all tokens of the step. "sequence": mean of per-sequence means. From the per-token numbers."""
    plain = utils.response_hidden
    for norm in ("token", "sequence"):
        per_token, lengths = [], []

        def spy(*args, per_token=per_token):
            out = linear_kl(*args)
            per_token.append(out[2])
            return out

        def spy_hidden(model, batch, dtype, lengths=lengths):
            if torch.is_grad_enabled():                  # the student's forward, not the teacher's or a check
                lengths.append([len(r) for _, r in batch])
            return plain(model, batch, dtype)
        monkeypatch.setattr(train_distill, "linear_kl", spy)
        monkeypatch.setattr(utils, "response_hidden", spy_hidden)
        rows, _ = train("configs/toy_opd.py", "--max_steps=1", "--max_new_tokens=64", f"--loss_norm={norm}")
        parts = [part for rows_, ns in zip(per_token, lengths, strict=True) for part in rows_.split(ns)]
        assert len({len(part) for part in parts}) > 1
        expected = torch.cat(parts).mean() if norm == "token" else torch.stack([part.mean() for part in parts]).mean()
        assert rows[0]["loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_learns(train, student, teacher, prompts):
    """20 steps of on-policy distillation: reverse KL on held-out student rollouts falls by 12 % at least (seen: 18 %)."""
    def held_out_reverse_kl(model):
        rollouts = HFEngine(model).generate(prompts, Sampling(48, STOPS, vocab_size=272), list(range(len(prompts))))
        batch = [(p, tokens) for p, (tokens, _, _) in zip(prompts, rollouts)]
        with torch.no_grad():
            h, h_t = utils.response_hidden(model, batch), utils.response_hidden(teacher, batch)
            return linear_kl(h, model.lm_head.weight, h_t, teacher.lm_head.weight, torch.ones(len(h)), 1.0)[2].mean().item()
    _, run = train("configs/toy_opd.py", "--max_steps=20", "--batch_size=32", "--max_new_tokens=48", "--warmup_steps=2",
                   "--learning_rate=6e-4")
    before, after = held_out_reverse_kl(student), held_out_reverse_kl(utils.load_model(str(run / "last"), torch.float32))
    assert after < 0.88 * before, (before, after)


# ----------------------------------------------------------------------------------------------- resume, processes, checkpoints

def test_resume_is_exact(train):
    """6 steps = 3 + resume + 3, bit for bit: weights, optimiser, metrics; and evaluations are not repeated."""
    options = ("--eval_every=2", "--eval_prompts=4", "--eval_samples=2", "--eval_max_new_tokens=24", "--eval_teacher=False")
    whole, a = train("configs/toy_opd.py", "--max_steps=6", *options)
    _, b = train("configs/toy_opd.py", "--max_steps=3", *options)
    with open(b / "metrics.jsonl", "a") as file:         # a crash left a later step and half a line behind
        file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    resumed, _ = train("configs/toy_opd.py", "--max_steps=6", "--resume", *options, out=b)
    for x, y in zip(weights(a), weights(b)):
        assert same(x, y)
    timing = re.compile("seconds|per_second|logprob_gap|_gb")         # the gap is looked at after a resume, too
    strip = [[{k: v for k, v in row.items() if not timing.search(k)} for row in rows if row["step"] != 3 or "loss" in row]
             for rows in (whole, resumed)]
    assert strip[0] == strip[1]                          # step 3 was the end of the first part, so it was evaluated too


def test_checkpoints(train):
    rows, run = train("configs/toy_opd.py", "--max_steps=5", "--save_every=1", "--keep=2", "--eval_every=1", "--eval_prompts=4",
                      "--eval_samples=2", "--eval_max_new_tokens=40", "--eval_teacher=False")
    scores = [row["avg_at_k"] for row in rows if "avg_at_k" in row][1:]
    best = f"step_{scores.index(max(scores)) + 1:06d}"
    assert os.readlink(run / "last") == "step_000005" and os.readlink(run / "best") == best
    assert {p.name for p in run.glob("step_*")} == {"step_000004", "step_000005", best}
    assert not list(run.glob(".*tmp"))
    model, tok = AutoModelForCausalLM.from_pretrained(run / "last"), AutoTokenizer.from_pretrained(run / "last")
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == [257, 260]
    assert tok.apply_chat_template([{"role": "user", "content": "1+2?"}], tokenize=False, add_generation_prompt=True) \
        == "<|user|>1+2?<|assistant|>"
    samples = utils.read_lines(run / "samples_student_000005.jsonl")
    assert len(samples) == 8 and {"problem", "response", "correct", "stop", "tokens_after_box"} <= samples[0].keys()


def test_nonfinite_loss_stops(train, monkeypatch, tmp_path):
    """A NaN in step 3: the step is named, the batch saved, the checkpoint of step 2 still loads and resumes."""
    calls, plain = [], train_distill.linear_kl

    def broken(*args):
        loss, *stats = plain(*args)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 3 else loss), *stats
    monkeypatch.setattr(train_distill, "linear_kl", broken)
    out = tmp_path / "nan"
    options = ("configs/toy_opd.py", "--max_steps=4", "--save_every=2", "--max_tokens_per_microbatch=9999")
    with pytest.raises(utils.UserError, match="step 3: loss nan"):
        train(*options, out=out)
    batch = utils.read_lines(out / "nonfinite_step_000003_rank_0.jsonl")
    assert len(batch) == 8 and set(batch[0]) == {"prompt_ids", "response_ids"}
    monkeypatch.setattr(train_distill, "linear_kl", plain)
    rows, _ = train(*options, "--resume", out=out)
    assert [row["step"] for row in steps(rows)] == [1, 2, 3, 4] and all(row["loss"] > 0 for row in steps(rows))


def test_step_without_a_token(train, monkeypatch):
    """Nothing to learn from: logged, no update, no division by zero."""
    monkeypatch.setattr(HFEngine, "generate", lambda self, prompts, *_: [([], [], "length") for _ in prompts])
    rows, run = train("configs/toy_opd.py", "--max_steps=2")
    assert [row["loss"] for row in rows] == [0.0, 0.0] and [row["tokens"] for row in rows] == [0, 0]
    assert same(weights(run)[0], {k: v.float() for k, v in load_file("data/toy/student/model.safetensors").items()})


def test_keys_reach_the_sampler(train, monkeypatch):
    """Every sampling key arrives; stop="student" drops the teacher's id, but not for what the teacher writes."""
    calls, plain = [], HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda self, prompts, sampling, seeds: calls.append(
        (self.max_rows, sampling)) or plain(self, prompts, sampling, seeds))
    options = ("--max_steps=1", "--temperature=0.9", "--top_p=0.8", "--top_k=7", "--stop=student", "--rollout_rows=5",
               "--eval_every=1", "--eval_prompts=2", "--eval_samples=1", "--eval_max_new_tokens=9", "--eval_temperature=0.5",
               "--eval_top_p=0.7")
    train("configs/toy_opd.py", *options)
    teacher, before, step, after = calls
    assert step == (5, Sampling(24, (257,), 0.9, 0.8, 7, 272))
    assert before == after == (5, Sampling(9, (257,), 0.5, 0.7, 0, 272)) and teacher[1].stop_ids == (257, 260)
    calls.clear()
    train("configs/toy_sft.py", *options, "--eval_every=0", "--trajectories=None")
    assert calls == [(5, Sampling(24, (257, 260), 0.9, 0.8, 7, 272))]


def test_warmup_and_sync(train, monkeypatch):
    """lr rises linearly, then stays; before every rollout the engine's bf16 copy equals the masters of that step."""
    gaps, plain = [], HFEngine.generate
    students = []
    load = utils.load_model
    monkeypatch.setattr(utils, "load_model", lambda *args: students.append(load(*args)) or students[-1])
    monkeypatch.setattr(HFEngine, "generate", lambda self, *args: gaps.append(max(
        (a - b.bfloat16()).abs().max().item() for a, b in zip(self.model.parameters(), students[0].parameters())))
        or plain(self, *args))
    rows, _ = train("configs/toy_opd.py", "--max_steps=4", "--dtype=bfloat16", "--warmup_steps=3", "--learning_rate=3e-3")
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])
    assert gaps == [0.0] * 4


def test_real_problems(train, tmp_path):
    """GSM8K's format, byte by byte: the toy models cannot solve it, and the pipeline does not care."""
    path = tmp_path / "gsm8k.jsonl"
    utils.write_lines(path, [{"question": f"Ann has {i} pens — “blue” ones, and buys {i} more. How many pens?",
                              "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i} pens\n#### {2 * i}"} for i in range(9)])
    rows, _ = train("configs/toy_opd.py", f"--prompts={path}", f"--eval_data={path}", "--max_steps=2", "--eval_every=2",
                    "--eval_max_new_tokens=20", "--eval_samples=1", "--eval_teacher=False")
    assert len(steps(rows)) == 2 and all(row["loss"] > 0 for row in steps(rows))
    rows, _ = train("configs/toy_hard_sft.py", f"--prompts={path}", "--max_steps=1", "--max_new_tokens=100",
                    "--trajectories=None")
    assert rows[0]["tokens"] > 8 * 20


# ------------------------------------------------------------------------------------------------------------------ mistakes

@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder of things that are wrong."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty.jsonl").write_text("\n")
    (root / "bad.jsonl").write_text('{"problem": "1+2?", "answer": "3"}\n{"problem": \n')
    (root / "nokey.jsonl").write_text('{"text": "1+2?"}\n')
    (root / "latin.jsonl").write_bytes(b'{"problem": "caf\xe9"}\n')
    (root / "long.jsonl").write_text(json.dumps({"problem": "1+" * 1500 + "2?", "answer": "3"}) + "\n")
    (root / "nothing").mkdir()
    (root / "used").mkdir()
    (root / "used" / "thesis.txt").write_text("years of work")
    shutil.copytree("data/toy/teacher", root / "other_tokenizer")
    text = (root / "other_tokenizer" / "tokenizer.json").read_text()
    (root / "other_tokenizer" / "tokenizer.json").write_text(text.replace('"3": 51', '"3": 52').replace('"4": 52', '"4": 51'))
    shutil.copytree("data/toy/student", root / "cut")
    tensors = load_file("data/toy/student/model.safetensors")
    del tensors["model.norm.weight"]
    shutil.copytree("data/toy/student", root / "lacking")
    save_file(tensors, root / "lacking" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree("data/toy/teacher", root / "untemplated")
    (root / "untemplated" / "chat_template.jinja").unlink()
    (root / "unsolved.jsonl").write_text('{"problem": "1+2?", "answer": "3", "solution": " "}\n')
    (root / "cut" / "model.safetensors").write_bytes((root / "cut" / "model.safetensors").read_bytes()[:5000])
    return root


@pytest.mark.parametrize("option, message", [
    ("--student=data/toy/studnt", "no model folder data/toy/studnt"),
    ("--student={root}/nothing", "no tokenizer_config.json"),
    ("--student={root}/cut", "cannot load a model there"),
    ("--student={root}/lacking", "the checkpoint lacks model.norm.weight"),
    ("--teacher={root}/untemplated", "has no chat template"),
    ("--teacher=", "no model folder"),
    ("--teacher=None --prefix=teacher --reverse_weight=0 --eval_teacher=False --prompts={root}/unsolved.jsonl",
     "problem '1.2.' has none; add a \"solution\""),
    ("--teacher={root}/other_tokenizer", "incompatible tokenizers: id 51 is '3' for the student and '4' for the teacher"),
    ("--prompts={root}/none.jsonl", "no prompt file"),
    ("--prompts={root}/empty.jsonl", "holds no problems"),
    ("--prompts={root}/bad.jsonl", "bad.jsonl, line 2: not JSON"),
    ("--prompts={root}/nokey.jsonl", r"line 1: no \"problem\" or \"question\" text; found the keys \['text'\]"),
    ("--prompts={root}/latin.jsonl", "is not UTF-8"),
    ("--prompts={root}/long.jsonl", "no usable prompt: 24 new tokens and a prompt of 3004"),
    ("--max_new_tokens=2048", "pass max_position_embeddings=2048"),
    ("--reverse_weight=1.5", r"reverse_weight=1.5: must be in \[0, 1\]"),
    ("--reverse_weight=half", "command line: reverse_weight='half' is a str; reverse_weight must be float"),
    ("--prefix=techer", "prefix='techer' is a str; prefix must be 'teacher' | 'student'"),
    ("--teacher=None", 'prefix=\'student\': teacher=None is SFT .* set prefix="teacher"'),
    ("--learning_rat=1", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    ("--batch_size=0", "batch_size=0: must be a positive multiple"),
    ("--top_p=0", r"top_p=0.0: must be in \(0, 1\]"),
    ("--out_dir={root}/used", "no run to resume or to overwrite"),
    ("--out_dir={root}/used --overwrite", "no run to resume or to overwrite"),
    ("--out_dir={root}/used --resume", "no run to resume or to overwrite"),
    ("--out_dir={root}/used/thesis.txt", "is a file"),
    ("configs/toy_odp.py", "two config files"),
])
def test_mistakes(broken, option, message, tmp_path):
    """One clear line, before anything is written."""
    before = sorted(broken.rglob("*"))
    with pytest.raises(utils.UserError, match=message) as caught:
        train_distill.main(["configs/toy_opd.py", *SHORT, f"--out_dir={tmp_path}/run", *option.format(root=broken).split()])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() and sorted(broken.rglob("*")) == before


def test_resume_mistakes(train):
    _, run = train("configs/toy_opd.py", "--max_steps=1")
    again = ["configs/toy_opd.py", *SHORT, "--max_steps=2", "--resume", f"--out_dir={run}"]
    with pytest.raises(utils.UserError, match="was trained from student='data/toy/student', not 'data/toy/teacher'"):
        train_distill.main([*again, "--student=data/toy/teacher"])
    with pytest.raises(utils.UserError, match="--overwrite would delete"):
        train_distill.main([*again[:-2], "--overwrite", f"--out_dir={run}", f"--student={run}/step_000001"])
    with pytest.raises(utils.UserError, match="max_steps=0: .* is at step 1 already"):
        train_distill.main([*again, "--max_steps=0"])
    with pytest.raises(utils.UserError, match="was written by 'train_distill', not by 'rl_grpo'"):
        utils.read_train_state(run / "last", "rl_grpo")
    with pytest.raises(utils.UserError, match="out_dir='.*' has no run_config.json: it is no run to resume or to overwrite"):
        train_distill.main([*again[:-1], f"--out_dir={run.parent}"])
    for name in ("optimizer.safetensors", "model.safetensors", "train_state.json", "config.json", "manifest.json"):
        whole = (run / "last" / name).read_bytes()
        for damaged in (whole[:-10], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], None):
            (run / "last" / name).unlink() if damaged is None else (run / "last" / name).write_bytes(damaged)
            with pytest.raises(utils.UserError, match=r"step_000001 is damaged \(.*\): no whole checkpoint to resume from"):
                train_distill.main(again)
            if name == "model.safetensors":              # nor can another run start from it
                with pytest.raises(utils.UserError, match=r"last is damaged \(.*\): take another checkpoint"):
                    utils.load_model(run / "last", torch.float32)
            (run / "last" / name).write_bytes(whole)
    train_distill.main(again)                            # whole again, it resumes
    assert [row["step"] for row in utils.read_lines(run / "metrics.jsonl")] == [1, 2]


def test_resume_from_the_newest_whole_checkpoint(train, capsys):
    """Damaged ones are passed over, `last` is not asked; without any the run begins again; leftovers of a save go."""
    options = ("configs/toy_opd.py", "--save_every=1")
    _, whole = train(*options, "--max_steps=3")
    _, run = train(*options, "--max_steps=2")
    (run / "last").unlink()
    os.symlink("step_000001", run / "last")              # killed after the rename of step 2, before `last` was moved
    (run / ".step_000003.tmp").mkdir()
    train(*options, "--max_steps=2", "--resume", out=run)
    assert os.readlink(run / "last") == "step_000002" and not list(run.glob(".*"))
    (run / "step_000002").rename(run / ".step_000002.old")       # killed between the two renames of a save
    capsys.readouterr()
    rows, _ = train(*options, "--max_steps=3", "--resume", out=run)
    assert "from step 2\n" in capsys.readouterr().out and not list(run.glob(".*"))
    data = (run / "step_000003" / "model.safetensors").read_bytes()
    (run / "step_000003" / "model.safetensors").write_bytes(data[:-9] + bytes([data[-9] ^ 16]) + data[-8:])
    rows, _ = train(*options, "--max_steps=3", "--resume", out=run)
    assert "step_000003 is damaged (model.safetensors is not what was saved): going on from step 2" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [1, 2, 3] and same(weights(run)[0], weights(whole)[0])
    for folder in run.glob("step_*"):
        shutil.rmtree(folder)
    rows, _ = train(*options, "--max_steps=3", "--resume", out=run)
    assert "yet: from the start" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [1, 2, 3] and same(weights(run)[0], weights(whole)[0])


def test_restarted_by_torchrun(train, monkeypatch, capsys):
    """`torchrun --max-restarts` gives the same command again: with --resume it begins the run, then goes on with it."""
    options = ("configs/toy_opd.py", "--save_every=1")
    _, run = train(*options, "--max_steps=2", "--resume")
    assert "run0 yet: from the start" in capsys.readouterr().out
    made = (run / "step_000002").stat().st_mtime_ns
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for argv in ((), ("--overwrite",)):                  # told at the first try, not at the first crash
        with pytest.raises(utils.UserError, match="--max-restarts=3 needs --resume, or a restart would find that .* exists"):
            train(*options, *argv, "--max_steps=3", out=run)
    rows, _ = train(*options, "--max_steps=3", "--resume", out=run)
    assert [row["step"] for row in rows] == [1, 2, 3] and (run / "step_000002").stat().st_mtime_ns == made


def test_checkpoints_beside_other_things(train, monkeypatch):
    """Copies and folders of the user's own do not count; a full disk that the tokenizer meets leaves nothing half-written."""
    options = ("configs/toy_opd.py", "--save_every=1")
    _, run = train(*options, "--max_steps=1")
    shutil.copytree(run / "step_000001", run / "step_000009_backup")
    (run / "step_000001" / "eval").mkdir()
    (run / "step_000001" / "eval" / "results.json").write_text("{}")
    train(*options, "--max_steps=2", "--keep=1", "--resume", out=run)
    assert {path.name for path in run.glob("step_*")} == {"step_000002", "step_000009_backup"}

    def full(*args, **options):
        raise Exception("No space left on device (os error 28)")
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(utils.UserError, match="cannot save .*step_000003: No space left .*: make room, then --resume"):
        train(*options, "--max_steps=3", "--resume", out=run)
    assert not list(run.glob(".*")) and utils.damage(run / "last") == ""


def test_command_line(tmp_path):
    """As a user meets it: --help, and a mistake as one line on stderr with exit code 1."""
    go = [sys.executable, "train_distill.py"]
    shown = subprocess.run([*go, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "KL(q||p)" in shown.stdout and "reverse_weight: float" in shown.stdout
    failed = subprocess.run([*go, "configs/toy_odp.py"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.strip() == "error: no config file configs/toy_odp.py; did you mean configs/toy_opd.py?"
