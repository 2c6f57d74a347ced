"""sample.py and trajectories.py: shards, resume after any kill, damage, and training from them."""

import copy as copy_module
import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import STOPS, torchrun
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models
import sample
import train_distill
import utils
from data.problems import encode_prompt, load_problems
from engine import HFEngine, Sampling
from trajectories import Response, Trajectories, load_head

FEW = ("--num_prompts=90", "--max_new_tokens=48", "--shard_sequences=32", "--rollout_rows=16")


def make(out, *argv):
    sample.main(["configs/toy_sample.py", *FEW, f"--out_dir={out}", *argv])
    return out


def command(out, *argv):
    """The same as a process of its own, with fp32 hidden states."""
    options = [*FEW, f"--out_dir={out}", *argv]
    return ["sample.py", "configs/toy_sample.py", *options]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """90 responses in three shards with fp32 hidden states."""
    return make(tmp_path_factory.mktemp("sample") / "fp32")


@pytest.fixture()
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def contents(folder):
    """{(prompt, sample): (prompt ids, response ids, ended)} through the reader, in its order."""
    data = Trajectories(folder, want_hidden=True)
    return {key: data[i][:3] for i, (key, _, _) in enumerate(data.rows)}


def steps(rows):
    return [row for row in rows if "loss" in row]


# ------------------------------------------------------------------------------------------- shards

@pytest.fixture(scope="session")
def rollouts(teacher, tokenizer):
    """(prompt ids, tokens, stop reason) of the 90 responses, straight from the engine."""
    problems = load_problems("data/toy/train.jsonl")[:90]
    prompts = [encode_prompt(tokenizer, problem["problem"]) for problem in problems]
    seeds = [utils.derive_seed(42, "sample", i, 0) for i in range(90)]
    engine = HFEngine(teacher, vocab_size=272)
    results = engine.generate(prompts, Sampling(48, STOPS), seeds)
    return [(p, tokens, reason) for p, (tokens, _, reason) in zip(prompts, results)]


def test_reader(shards, teacher, rollouts):
    """A Response is what the engine gives for its prompt and seed, and a plain forward's states."""
    data = Trajectories(shards, want_hidden=True)
    assert len(data) == 90 and [key for key, _, _ in data.rows] == [(i, 0) for i in range(90)]
    for i, (prompt, tokens, reason) in enumerate(rollouts):
        response = data[i]
        assert isinstance(response, Response)
        assert response[:3] == (prompt, tokens, reason == "stop")
        with torch.no_grad():
            exact = models.response_hidden(teacher, [(prompt, tokens)])
        assert response.hidden.dtype == torch.float32
        assert (response.hidden - exact).abs().max() < 1e-4
    without = Trajectories(shards, want_hidden=False)
    assert without[3] == data[3]._replace(hidden=()) and data.cached and not without.cached


def test_files(shards, teacher, rollouts):
    """Log-probs of a plain forward; settings say who wrote."""
    seen = 0
    for path in sorted(shards.glob("*.safetensors")):
        tensors = load_file(path)
        indices = tensors["prompt_index"].tolist()
        assert len(indices) <= 32 and tensors["logps"].shape == tensors["hidden"].shape[:1]
        logps = tensors["logps"].split([len(rollouts[i][1]) for i in indices])
        for row, i in enumerate(indices):
            prompt, tokens, reason = rollouts[i]
            with torch.no_grad():
                logits = teacher(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
            exact = logits[:, :272].log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
            assert (exact.squeeze(1) - logps[row]).abs().max() < 1e-4
            assert tensors["stopped"][row] == (reason == "stop")
        seen += len(indices)

        with safe_open(path, "pt") as shard:
            settings = json.loads(shard.metadata()["settings"])
            assert shard.metadata()["model"] == "data/toy/teacher"
        assert settings["seed"] == 42
        assert settings["temperature"] == 1.0 and settings["stop_ids"] == [257, 260]
        assert len(settings["revision"]) == len(settings["tokenizer"]) == 16
    assert seen == 90


def test_more_samples_and_other_shards(shards, tmp_path):
    """Whatever the shard size and rows, the same set; raising samples_per_prompt adds to it."""
    options = ("--shard_bytes=5000", "--rollout_rows=7", "--cache_hidden=False")
    other = make(tmp_path / "other", *options)
    assert len(list(other.glob("*.safetensors"))) > 3 and contents(other) == contents(shards)
    make(other, "--samples_per_prompt=2", "--cache_hidden=False")
    both = contents(other)
    assert len(both) == 180 and contents(shards).items() <= both.items()
    differ = sum(both[i, 0] != both[i, 1] for i in range(90))
    assert differ > 45                      # another sample has another seed


def test_killed_and_started_again(tmp_path, shards):
    """
    kill -9 with sequences in flight and a shard half written; the same command then ends with the
    same set.
    """
    out = tmp_path / "killed"
    small = command(out, "--shard_sequences=10", "--rollout_rows=4")
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *small], stdout=quiet, stderr=quiet)
    while len(list(out.glob("*.safetensors"))) < 2 and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.05)                        # the next ten are being written by the model
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(contents(out))
    assert 20 <= before < 90

    left = out / "000_00007.safetensors.tmp"            # what a kill can leave
    left.write_bytes(b"half a shard")
    again = [sys.executable, *small, "--shard_sequences=50"]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{90 - before} responses to sample, {before} are there" in done.stdout
    assert contents(out) == contents(shards) and not left.exists()


def test_two_processes(tmp_path, shards):
    out = tmp_path / "two"
    done = torchrun(2, *command(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name[:3] for path in out.glob("*.safetensors")} == {"000", "001"}
    assert contents(out) == contents(shards)


def test_rows_leave_at_their_end(student, prompts):
    """Lengths from 28 to 96: no row is decoded after its end, and the tokens do not change."""
    sampling, seeds = Sampling(96, STOPS), list(range(64))
    whole = HFEngine(student, vocab_size=272).generate(prompts[:64], sampling, seeds)
    engine, calls, plain = HFEngine(student, vocab_size=272, max_rows=8), [], HFEngine._advance

    def advance(ids, lengths, cache):
        calls.append(ids.shape)
        return plain(engine, ids, lengths, cache)

    engine._advance = advance
    few_rows = engine.generate(prompts[:64], sampling, seeds)
    assert [r[0] for r in few_rows] == [r[0] for r in whole]
    lengths = [len(tokens) for tokens, _, _ in whole]
    decoding = [rows for rows, width in calls if width == 1]
    assert max(lengths) > 3 * min(lengths)
    assert max(decoding) == 8 and sum(decoding) == sum(lengths) - 64


# --------------------------------------------------------------------------------- training on them

def test_cached_equals_run(train, shards, tmp_path, monkeypatch):
    """
    With fp32 hidden states the same losses as with the teacher run on the same tokens, and the
    teacher is never loaded.
    """
    plain, loaded = models.load_model, []

    def load_model(path, *args, **options):
        loaded.append(str(path))
        return plain(path, *args, **options)

    run = make(tmp_path / "run", "--cache_hidden=False")
    rounded = shutil.copytree(shards, tmp_path / "bf16")
    for path in rounded.glob("*.safetensors"):
        rewrite(path, hidden=load_file(path)["hidden"].bfloat16())
    for module in (utils, train_distill):
        if hasattr(module, "load_model"):
            monkeypatch.setattr(module, "load_model", load_model)
    losses = {}
    options = ("--max_steps=3", "--max_new_tokens=40")
    for name, folder in (("cached", shards), ("run", run), ("bf16", rounded)):
        loaded.clear()
        rows, _ = train("configs/toy_sft.py", f"--trajectories={folder}", *options)
        losses[name] = [row["loss"] for row in steps(rows)]
        assert loaded and ("data/toy/teacher" in loaded) == (name == "run")
        assert rows[0]["max_length"] <= 40 < 48
    assert losses["cached"] == pytest.approx(losses["run"], abs=1e-6)
    assert losses["bf16"] == pytest.approx(losses["run"], rel=1e-2)
    assert losses["bf16"] != losses["run"]


def test_order_and_resume(train, shards):
    """Every sequence once an epoch, in an order that the seed decides; 3 + 3 steps = 6 steps."""
    seen, plain = [], Trajectories.__getitem__

    def getitem(self, i):
        seen.append(i)
        return plain(self, i)

    options = ("configs/toy_offline.py", f"--trajectories={shards}", "--batch_size=30")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trajectories, "__getitem__", getitem)
        _, a = train(*options, "--max_steps=6")
        order = seen.copy()
        assert sorted(order[:90]) == sorted(order[90:]) == list(range(90))
        assert order[:90] != order[90:]
        seen.clear()
        _, b = train(*options, "--max_steps=3")
        train(*options, "--max_steps=6", "--resume", out=b)
        assert seen == order
    first, second = (load_file(run / "last" / "model.safetensors") for run in (a, b))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_hard_labels_on_shards(train, shards, student):
    options = ("--batch_size=90", "--max_new_tokens=30", "--max_tokens_per_microbatch=900")
    rows, _ = train(
        "configs/toy_hard_sft.py", f"--trajectories={shards}", "--max_steps=1", *options
    )
    total = count = cut = 0
    for prompt, response, ended in contents(shards).values():
        cut += len(response) > 30 or not ended
        short = response[:30]
        with torch.no_grad():
            logits = student(torch.tensor([prompt + short])).logits[0, len(prompt) - 1:-1]
        log_q = logits.log_softmax(-1).gather(1, torch.tensor(short)[:, None])
        total -= log_q.sum().item()
        count += len(short)
    assert rows[0]["loss"] == pytest.approx(total / count, abs=1e-5)
    assert rows[0]["tokens"] == count and rows[0]["truncated_share"] == cut / 90 > 0.1


# ----------------------------------------------------------------------------------------- mistakes

def mistake(folder, *argv):
    """The message, in one line, that training on a folder ends with."""
    options = ["--max_steps=1", "--batch_size=90", "--eval_every=0", "--max_new_tokens=48",
               f"--out_dir={folder}/run"]
    with pytest.raises(utils.UserError) as caught:
        train_distill.main(
            ["configs/toy_sft.py", f"--trajectories={folder}", *options, *argv]
        )
    assert "\n" not in str(caught.value) and not (folder / "run").exists()
    return str(caught.value)


def rewrite(path, settings=None, **changes):
    """Change some tensors or settings of a shard."""
    with safe_open(path, "pt") as shard:
        metadata = shard.metadata()
    metadata["settings"] = json.dumps(json.loads(metadata["settings"]) | (settings or {}))
    save_file({**load_file(path), **changes}, path, metadata)


def test_damage(copy):
    """
    A shard cut short, empty, or something else is named, with the remedy, by training and sampling;
    sampling again restores the same set.
    """
    whole, path = contents(copy), copy / "000_00001.safetensors"
    good = path.read_bytes()
    for bad in (good[:-1000], b"", b"\x08\0\0\0\0\0\0\0no shard"):
        path.write_bytes(bad)
        message = mistake(copy)
        assert "000_00001.safetensors is damaged" in message
        assert "delete it and run sample.py again" in message
        with pytest.raises(utils.UserError, match="000_00001.safetensors is damaged.*delete it"):
            make(copy)
    save_file({"tokens": torch.zeros(3)}, path)             # a safetensors file, but no shard
    assert "000_00001.safetensors is damaged" in mistake(copy)
    path.unlink()
    make(copy)
    assert contents(copy) == whole


def test_foreign_shards(copy, tmp_path):
    path = copy / "000_00000.safetensors"
    original = path.read_bytes()
    tokens = load_file(path)["tokens"]
    tokens[0] = 271
    rewrite(path, tokens=tokens)
    narrow = shutil.copytree("data/toy/student", tmp_path / "narrow")
    model = models.load_model(str(narrow), torch.float32)
    model.resize_token_embeddings(265)
    model.save_pretrained(narrow)
    message = mistake(copy, f"--student={narrow}")
    assert "holds id 271, the smaller vocabulary ends at 264" in message

    path.write_bytes(original)
    rewrite(path, {"temperature": 0.5})
    assert "was made with temperature=1.0, not 0.5; that is what the shards before" in mistake(copy)

    path.write_bytes(original)
    shutil.copy(path, copy / "000_00009.safetensors")
    assert "holds some sequences twice" in mistake(copy)
    (copy / "000_00009.safetensors").unlink()

    other = copy / "tokenizer" / "tokenizer.json"
    other.write_text(other.read_text().replace('"7"', '"€"'))
    assert "incompatible tokenizers" in mistake(copy)

    empty = tmp_path / "empty"
    empty.mkdir()
    message = mistake(empty)
    assert "no trajectories in" in message and "python sample.py" in message


def test_wrong_teacher(copy, tmp_path):
    message = mistake(copy, "--teacher=data/toy/student")
    assert "was made with revision=" in message and "set teacher to data/toy/teacher, " in message
    other = shutil.copytree("data/toy/teacher", tmp_path / "teacher")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    message = mistake(copy, f"--teacher={other}")
    assert "set teacher to data/toy/teacher, which made them, or sample again" in message
    for key in ("eval_teacher", "eval_kl"):
        assert "set eval_teacher and eval_kl False" in mistake(copy, f"--{key}=True")
    assert 'set prefix="teacher"' in mistake(copy, "--prefix=student")

    short = shutil.copytree("data/toy/student", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    assert "lower max_new_tokens" in mistake(copy, f"--student={short}")


@pytest.mark.parametrize("options, message", [
    (["--temperature=0.3"], "was made with temperature=1.0, not 0.3; set that, or sample"),
    (["--top_p=0.9"], "was made with top_p=1.0, not 0.9"),
    (["--top_k=5"], "was made with top_k=0, not 5"),
    (["--max_new_tokens=49"], "sampled with max_new_tokens=48, the horizon is 49; lower "),
    (["--horizons=(8,200)"], "sampled with max_new_tokens=48, the horizon is 200; lower "),
])
def test_settings_that_contradict_the_shards(shards, options, message):
    assert message in mistake(shards, *options)


def test_a_resume_with_other_trajectories(shards, copy, train):
    """A folder of as many, sampled anew from another seed, is not the run's; a copy of it is."""
    options = ["configs/toy_sft.py", "--dtype=float32", "--max_steps=1", "--eval_every=0"]
    _, run = train(*options, f"--trajectories={shards}")
    options[2] = "--max_steps=2"
    other = make(run.parent / "other", "--seed=7")
    assert len(contents(other)) == len(contents(shards))
    with pytest.raises(utils.UserError, match="made with trajectories='[0-9a-f]{16}', not"):
        train(*options, f"--trajectories={other}", "--resume", out=run)
    train(*options, f"--trajectories={copy}", "--resume", out=run)


def test_compared_are_models_not_their_paths(shards, tmp_path):
    """One folder may be filled from a model under two names, and trained on under a third."""
    out = shutil.copytree(shards, tmp_path / "shards")
    (out / "000_00001.safetensors").unlink()
    for name in ("teacher", "student"):
        shutil.copytree(f"data/toy/{name}", tmp_path / name)
    prompts = shutil.copy("data/toy/train.jsonl", tmp_path / "prompts.jsonl")
    make(out, f"--model={tmp_path}/teacher",
         f"--student={tmp_path}/student", f"--prompts={prompts}")
    assert contents(out) == contents(shards)
    data = Trajectories(out, want_hidden=True)
    assert {shard.model for shard in data.shards} == {"data/toy/teacher", f"{tmp_path}/teacher"}
    load_head("data/toy/teacher", data, torch.float32)


@pytest.mark.parametrize("says_tied", [True, False])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_the_head_is_the_one_that_the_model_uses(tmp_path, teacher, says_tied, form):
    """Where the file has an lm_head.weight of its own, whatever the config says of it."""
    folder = shutil.copytree("data/toy/teacher", tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    (folder / "model.safetensors").unlink()
    if form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = says_tied
    (folder / "config.json").write_text(json.dumps(config))
    model = models.load_model(str(folder), torch.float32)
    out = make(tmp_path / "shards", f"--model={folder}", "--num_prompts=4")
    data = Trajectories(out, want_hidden=True)
    head = load_head(str(folder), data, torch.float32)[0]
    response = data[0]
    ids = torch.tensor([[*response.prompt, *response.tokens]])
    with torch.no_grad():
        wanted = model(ids).logits[0, len(response.prompt) - 1:-1]
    got = response.hidden.float() @ head.T
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_untied_head_in_several_files(tmp_path, teacher):
    """lm_head.weight of its own, in a checkpoint of several files with an index."""
    config = copy_module.deepcopy(teacher.config)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = type(teacher)(config)
    model.generation_config = teacher.generation_config
    folder = shutil.copytree("data/toy/teacher", tmp_path / "untied")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="500KB")
    assert (folder / "model.safetensors.index.json").is_file()
    out = make(tmp_path / "shards", f"--model={folder}", "--num_prompts=4")
    head, _ = load_head(str(folder), Trajectories(out, want_hidden=True), "auto")
    assert torch.equal(head.float(), model.lm_head.weight.detach())
    assert not torch.equal(head.float(), model.model.embed_tokens.weight.detach())


def test_empty_responses_are_left_out(copy):
    whole = Trajectories(copy, want_hidden=True)
    path = copy / "000_00000.safetensors"
    tensors = load_file(path)
    n = tensors["prompt_lengths"][0].item()
    cut = tensors["offsets"][1].item() - n                  # drop the first response's tokens
    emptied = (tensors["prompt_index"][0].item(), 0)
    expected = {key: whole[i] for i, (key, _, _) in enumerate(whole.rows) if key != emptied}
    rewrite(
        path,
        tokens=torch.cat([tensors["tokens"][:n], tensors["tokens"][n + cut:]]),
        offsets=torch.cat([tensors["offsets"][:1], tensors["offsets"][1:] - cut]),
        logps=tensors["logps"][cut:],
        hidden=tensors["hidden"][cut:],
    )
    data = Trajectories(copy, want_hidden=True)
    assert [key for key, _, _ in data.rows] == list(expected) and len(data) == 89
    for i, (key, _, _) in enumerate(data.rows):             # the others are as they were
        assert data[i][:3] == expected[key][:3]
        assert torch.equal(data[i].hidden, expected[key].hidden)


@pytest.mark.parametrize("option, message", [
    ("--seed=7", "was made with seed=42, not 7; choose another out_dir"),
    ("--prompts=data/toy/hard.jsonl", "made with problems='[0-9a-f]{16}', not '[0-9a-f]{16}'"),
    ("--temperature=-1", "must not be negative"),
    ("--top_p=0", r"must be in \(0, 1\]"),
    ("--rollout_rows=0", "must be at least 1"),
    ("--num_prompts=0", "must be at least 1"),
    ("--modle=x", "did you mean 'model'"),
    ("--model=nowhere/at/all", "no model folder"),
    ("--out_dir=README.md", "is a file; choose another name"),
])
def test_sampling_mistakes(shards, option, message):
    before = contents(shards)
    with pytest.raises(utils.UserError, match=message):
        make(shards, option)
    assert contents(shards) == before


def test_prompts_over_the_context(tmp_path):
    with pytest.raises(utils.UserError, match="no usable prompt: .* with 5000 new tokens"):
        make(tmp_path / "none", "--max_new_tokens=5000")


def test_disk(tmp_path, monkeypatch):
    """A disk that is full in the middle leaves the shards before it whole."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))

    out = tmp_path / "full"
    done = subprocess.run(
        [sys.executable, *command(out, "--shard_sequences=30")],
        capture_output=True, text=True, preexec_fn=limit,
    )
    assert done.returncode == 1 and "error: cannot write" in done.stderr, done.stderr[-500:]
    assert "Traceback" not in done.stderr
    assert not list(out.glob("*.tmp")) and len(contents(out)) >= 30


# ----------------------------------------------------------------------------------------- terminal

def test_one_prompt(capsys, teacher, tokenizer):
    """--prompt prints what generate gives for the seed."""
    assert sample.main(["configs/toy_sample.py", "--prompt=3+4+5?"])
    shown = capsys.readouterr()
    engine = HFEngine(teacher, vocab_size=272)
    prompt = encode_prompt(tokenizer, "3+4+5?")
    (tokens, _, _), = engine.generate([prompt], Sampling(160, STOPS), [42])
    assert shown.out.strip() == tokenizer.decode(tokens, skip_special_tokens=True)
    assert f"({len(tokens)} tokens, stopped)" in shown.err


def test_half_a_word_waits(capsys, student, tokenizer):
    """A word, or a character of several tokens, is printed once it is whole."""
    class Engine:
        model = student

        def stream(self, prompts, sampling, seeds, on_token):
            ids = tokenizer.encode("a€ b", add_special_tokens=False)
            assert len(ids) == 6
            for token in ids:
                on_token(0, token)
                printed.append(capsys.readouterr().out)
            yield 0, ids, [0.0] * 6, "stop"

    printed = []
    question = [{"role": "user", "content": "?"}]
    sample.answer(Engine(), tokenizer, question, Sampling(9, STOPS), 0)
    assert printed == ["", "", "", "", "a€ ", ""]
    assert capsys.readouterr().out == "b\n"


def test_chat(monkeypatch, tokenizer):
    """The conversation so far is the prompt; an empty line begins anew; a long one ends it."""
    lines = iter(["1+2+3?", "4+5+6?", "", "7+8+9?", "1" * 2100, ""])
    seen, plain = [], HFEngine.stream

    def read(prompt):
        try:
            return next(lines)
        except StopIteration as error:
            raise EOFError from error

    def stream(self, prompts, *args, **options):
        seen.append(tokenizer.decode(prompts[0]))
        return plain(self, prompts, *args, **options)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(HFEngine, "stream", stream)
    with pytest.raises(utils.UserError, match="pass max_position_embeddings=2048"):
        sample.main(["configs/toy_sample.py", "--chat", "--max_new_tokens=20"])
    first, second, third = seen
    assert first == "<|user|>1+2+3?<|assistant|>" and third == "<|user|>7+8+9?<|assistant|>"
    assert second.startswith(first) and second.endswith("<|user|>4+5+6?<|assistant|>")
