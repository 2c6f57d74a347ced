"""sample.py: shards, resume after any kill, damage, and training from them."""

import copy as copy_module
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import STOPS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train_distill
import trajectories
import utils
from engine import HFEngine, Sampling

FEW = ("--num_prompts=90", "--max_new_tokens=48", "--shard_sequences=32", "--rollout_rows=16")


def make(out, *argv):
    sample.main(["configs/toy_sample.py", *FEW, f"--out_dir={out}", *argv])
    return out


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """90 responses in three shards with fp32 hidden states."""
    return make(tmp_path_factory.mktemp("sample") / "fp32", "--hidden_dtype=float32")


@pytest.fixture()
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def contents(folder):
    """{(prompt, sample): (prompt ids, response ids, ended)} through the reader, in its order."""
    data = trajectories.Trajectories(folder, want_hidden=True)
    return {key: data[i][:3] for i, (key, _, _) in enumerate(data.rows)}


def steps(rows):
    return [row for row in rows if "loss" in row]


# ---------------------------------------------------------------------------------------------------------------------- shards

def test_contents(shards, teacher, tokenizer):
    """Each row is what the engine gives for its prompt and seed; log-probs and hidden states are those of one plain forward."""
    problems = utils.load_problems("data/toy/train.jsonl")
    prompts = [utils.encode_prompt(tokenizer, p["problem"]) for p in problems[:90]]
    rollouts = HFEngine(teacher).generate(prompts, Sampling(48, STOPS, vocab_size=272),
                                                [utils.derive_seed(42, "sample", i, 0) for i in range(90)])
    data = trajectories.Trajectories(shards, want_hidden=True)
    assert len(data) == 90 and [key for key, _, _ in data.rows] == [(i, 0) for i in range(90)]
    for i, (tokens, _, reason) in enumerate(rollouts):
        prompt, response, ended, hidden = data[i]
        assert (prompt, response, ended) == (prompts[i], tokens, reason == "stop")
        with torch.no_grad():
            exact = utils.response_hidden(teacher, [(prompt, response)])
        assert hidden.dtype == torch.float32 and (hidden - exact).abs().max() < 1e-4
    seen = 0
    for path in sorted(shards.glob("*.safetensors")):
        tensors, lines = load_file(path), utils.read_lines(path.with_suffix(".jsonl"))
        assert len(lines) == len(tensors["prompt_index"]) <= 32 and tensors["logps"].shape == tensors["hidden"].shape[:1]
        first = 0
        for row, line in enumerate(lines):
            tokens, _, reason = rollouts[i := line["prompt_index"]]
            with torch.no_grad():
                logits = teacher(torch.tensor([prompts[i] + tokens])).logits[0, len(prompts[i]) - 1:-1, :272]
            exact = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
            assert (exact - tensors["logps"][first:(first := first + len(tokens))]).abs().max() < 1e-4
            assert line["problem"] == problems[i]["problem"] and line["length"] == len(tokens)
            assert line["response"] == tokenizer.decode(tokens, skip_special_tokens=True)
            assert line["stop"] == ("<|im_end|>" if reason == "stop" else "length") and tensors["prompt_index"][row] == i
        seen += len(lines)
        with safe_open(path, "pt") as shard:
            settings = json.loads(shard.metadata()["settings"])
        assert (settings["model"], settings["seed"], settings["temperature"]) == ("data/toy/teacher", 42, 1.0)
        assert len(settings["revision"]) == len(settings["tokenizer"]) == 16 and settings["stop_ids"] == [257, 260]
    assert seen == 90


def test_more_samples_and_other_shards(shards, tmp_path):
    """Whatever the shard size, rows and processes, the same set; raising samples_per_prompt adds to it."""
    other = make(tmp_path / "other", "--shard_bytes=5000", "--rollout_rows=7", "--cache_hidden=False")
    assert len(list(other.glob("*.safetensors"))) > 3 and contents(other) == contents(shards)
    make(other, "--samples_per_prompt=2", "--cache_hidden=False")
    both = contents(other)
    assert len(both) == 180 and contents(shards).items() <= both.items()
    assert sum(both[i, 0] != both[i, 1] for i in range(90)) > 45                           # another sample is another seed


def test_killed_and_started_again(tmp_path, shards):
    """kill -9 with sequences in flight and a shard half written; the same command then ends with the same set."""
    out = tmp_path / "killed"
    command = [sys.executable, "sample.py", "configs/toy_sample.py", *FEW, f"--out_dir={out}", "--hidden_dtype=float32",
               "--shard_sequences=10", "--rollout_rows=4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("*.safetensors"))) < 2 and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.05)                                     # the next ten are being written by the model
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(contents(out))
    assert 20 <= before < 90
    leftovers = [out / "000_00007.safetensors.tmp", out / "000_00007.jsonl", out / "000_00007.jsonl.tmp"]
    for path in leftovers:                               # what a kill can leave
        path.write_bytes(b"half a shard")
    done = subprocess.run([*command, "--shard_sequences=50"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{90 - before} responses to sample, {before} are there" in done.stdout
    assert contents(out) == contents(shards) and not any(path.exists() for path in leftovers)


def test_two_processes(tmp_path, shards):
    out = tmp_path / "two"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29641",
                           "sample.py", "configs/toy_sample.py", *FEW, f"--out_dir={out}", "--hidden_dtype=float32"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name[:3] for path in out.glob("*.safetensors")} == {"000", "001"} and contents(out) == contents(shards)


def test_rows_stay_busy(student, prompts):
    """Lengths from 28 to 96: finished rows make room, so the forwards are few; and the tokens do not change."""
    sampling, seeds = Sampling(96, STOPS, vocab_size=272), list(range(64))
    whole = HFEngine(student).generate(prompts[:64], sampling, seeds)
    engine, calls, plain = HFEngine(student, max_rows=8), [], HFEngine._advance
    engine._advance = lambda ids, lengths, cache: calls.append(ids.shape) or plain(engine, ids, lengths, cache)
    assert [r[0] for r in engine.generate(prompts[:64], sampling, seeds)] == [r[0] for r in whole]
    lengths = [len(tokens) for tokens, _, _ in whole]
    decoded = sum(rows for rows, width in calls if width == 1)
    assert max(lengths) > 3 * min(lengths) and decoded == sum(lengths) - 64                # no row is decoded after its end
    assert sum(width == 1 for _, width in calls) < 1.35 * sum(lengths) / 8                 # most steps have most rows


# ----------------------------------------------------------------------------------------------------------- training on them

def test_cached_equals_run(train, shards, tmp_path, monkeypatch):
    """With fp32 hidden states the same losses as with the teacher run on the same tokens, and the teacher is never loaded."""
    plain, loaded = utils.load_model, []
    monkeypatch.setattr(utils, "load_model", lambda path, *args: loaded.append(str(path)) or plain(path, *args))
    run = make(tmp_path / "run", "--cache_hidden=False")
    rounded = make(tmp_path / "bf16")
    losses = {}
    for name, folder in (("cached", shards), ("run", run), ("bf16", rounded)):
        loaded.clear()
        rows, _ = train("configs/toy_sft.py", f"--trajectories={folder}", "--max_steps=3", "--max_new_tokens=40")
        losses[name] = [row["loss"] for row in steps(rows)]
        assert ("data/toy/teacher" in loaded) == (name == "run")
        assert rows[0]["tflops_teacher_writing"] == 0 and (rows[0]["tflops_teacher_head"] > 0) == (name != "run")
    assert losses["cached"] == pytest.approx(losses["run"], abs=1e-6)
    assert losses["bf16"] == pytest.approx(losses["run"], rel=1e-2) and losses["bf16"] != losses["run"]
    assert rows[0]["max_length"] <= 40 < 48


def test_order_and_resume(train, shards):
    """Every sequence once an epoch, in an order that the seed decides; 3 + 3 steps = 6 steps."""
    seen, plain = [], trajectories.Trajectories.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectories.Trajectories, "__getitem__", lambda self, i: seen.append(i) or plain(self, i))
        options = ("configs/toy_offline.py", f"--trajectories={shards}", "--batch_size=30")
        whole, a = train(*options, "--max_steps=6")
        assert sorted(seen[:90]) == sorted(seen[90:]) == list(range(90)) and seen[:90] != seen[90:]
        order = seen.copy()
        seen.clear()
        _, b = train(*options, "--max_steps=3")
        train(*options, "--max_steps=6", "--resume", out=b)
        assert seen == order
    first, second = load_file(a / "last" / "model.safetensors"), load_file(b / "last" / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_hard_labels_on_shards(train, shards, student):
    rows, _ = train("configs/toy_hard_sft.py", f"--trajectories={shards}", "--max_steps=1", "--batch_size=90",
                    "--max_new_tokens=30", "--max_tokens_per_microbatch=900")
    total = count = cut = 0
    for prompt, response, ended in contents(shards).values():
        cut += len(response) > 30 or not ended
        with torch.no_grad():
            log_q = student(torch.tensor([prompt + response[:30]])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        total -= log_q.gather(1, torch.tensor(response[:30])[:, None]).sum().item()
        count += len(response[:30])
    assert rows[0]["loss"] == pytest.approx(total / count, abs=1e-5) and rows[0]["tokens"] == count
    assert rows[0]["truncated_share"] == cut / 90 > 0.1


# -------------------------------------------------------------------------------------------------------------------- mistakes

def mistake(folder, *argv):
    with pytest.raises(utils.UserError) as caught:
        train_distill.main(["configs/toy_sft.py", f"--trajectories={folder}", f"--out_dir={folder}/run", "--max_steps=1",
                            "--batch_size=90", "--eval_every=0", *argv])
    assert "\n" not in str(caught.value) and not (folder / "run").exists()
    return str(caught.value)


def rewrite(path, metadata=None, **changes):
    """A shard with some tensors or settings changed, its checksum made right again."""
    with safe_open(path, "pt") as shard:
        old = shard.metadata()
    tensors = {**load_file(path), **changes}
    settings = {**json.loads(old["settings"]), **(metadata or {})}
    save_file(tensors, path, {**old, "settings": json.dumps(settings), "checksum": utils.fingerprint(
        {key: value for key, value in tensors.items() if key != "hidden"})})


def test_damage(copy):
    """A shard cut short or with a byte flipped is named, with the remedy; sampling again restores the same set."""
    whole, path = contents(copy), copy / "000_00001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1000])
    assert "000_00001.safetensors is damaged" in mistake(copy) and "run sample.py again" in mistake(copy)
    with pytest.raises(utils.UserError, match="000_00001.safetensors is damaged.*delete it and start again"):
        make(copy, "--hidden_dtype=float32")
    header = 8 + int.from_bytes(good[:8], "little")
    places = json.loads(good[8:header])
    for name in ("tokens", "logps"):
        begin = header + places[name]["data_offsets"][0]
        path.write_bytes(good[:begin + 5] + bytes([good[begin + 5] ^ 1]) + good[begin + 6:])
        assert "its checksum is wrong" in mistake(copy)
    path.write_bytes(b"")
    assert "is damaged" in mistake(copy)
    path.unlink()
    make(copy, "--hidden_dtype=float32")
    assert contents(copy) == whole
    begin = header + places["hidden"]["data_offsets"][0]
    path.write_bytes(good[:begin + 5] + bytes([good[begin + 5] ^ 1]) + good[begin + 6:])
    with pytest.raises(utils.UserError, match="hidden states' checksum is wrong"):
        train_distill.main(["configs/toy_sft.py", f"--trajectories={copy}", f"--out_dir={copy}/run", "--max_steps=1",
                            "--batch_size=90", "--eval_every=0"])


def test_foreign_shards(copy, tmp_path):
    path = copy / "000_00000.safetensors"
    original = path.read_bytes()
    tensors = load_file(path)
    tensors["tokens"][0] = 271
    rewrite(path, tokens=tensors["tokens"])
    narrow = shutil.copytree("data/toy/student", tmp_path / "narrow")
    model = utils.load_model(str(narrow), torch.float32)
    model.resize_token_embeddings(265)
    model.save_pretrained(narrow)
    assert "holds id 271, the smaller vocabulary ends at 264" in mistake(copy, f"--student={narrow}")
    path.write_bytes(original)
    rewrite(path, {"temperature": 0.5})
    assert "was made with temperature=1.0, shards before it with 0.5" in mistake(copy)
    path.write_bytes(original)
    shutil.copy(path, copy / "000_00009.safetensors")
    assert "holds some sequences twice" in mistake(copy)
    (copy / "000_00009.safetensors").unlink()
    other = copy / "tokenizer" / "tokenizer.json"
    other.write_text(other.read_text().replace('"7"', '"€"'))
    assert "incompatible tokenizers" in mistake(copy)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no trajectories in" in mistake(empty) and "python sample.py" in mistake(empty)


def test_wrong_teacher(shards, copy, tmp_path):
    assert "of size 128, the LM head of data/toy/student takes 64" in mistake(copy, "--teacher=data/toy/student")
    other = shutil.copytree("data/toy/teacher", tmp_path / "teacher")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert "set teacher to that one, or sample again" in mistake(copy, f"--teacher={other}")
    assert "eval_teacher=True" in mistake(copy, "--eval_teacher=True")
    assert 'set prefix="teacher"' in mistake(copy, "--prefix=student")
    assert "lower max_new_tokens" in mistake(copy, f"--student={short_model(tmp_path)}")


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
    head = trajectories.load_head(str(folder), trajectories.Trajectories(out, want_hidden=True))
    assert torch.equal(head.float(), model.lm_head.weight.detach())
    assert not torch.equal(head.float(), model.model.embed_tokens.weight.detach())


def short_model(tmp_path):
    short = shutil.copytree("data/toy/student", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    return short


def test_empty_responses_are_left_out(copy):
    path = copy / "000_00000.safetensors"
    tensors = load_file(path)
    n = tensors["prompt_lengths"][0].item()
    cut = tensors["offsets"][1].item() - n                       # drop the first response's tokens
    keep = torch.cat([tensors["tokens"][:n], tensors["tokens"][n + cut:]])
    offsets = torch.cat([tensors["offsets"][:1], tensors["offsets"][1:] - cut])
    rewrite(path, tokens=keep, offsets=offsets, logps=tensors["logps"][cut:], hidden=tensors["hidden"][cut:])
    data = trajectories.Trajectories(copy, want_hidden=True)
    assert len(data) == 89
    for i in range(89):                                          # checksums of the others still fit
        data[i]


@pytest.mark.parametrize("option, message", [
    ("--seed=7", "was made with seed=42, not 7; choose another out_dir"), ("--temperature=-1", "must not be negative"),
    ("--prompts=data/toy/hard.jsonl", "was made with problems='[0-9a-f]{16}', not '[0-9a-f]{16}'"),
    ("--top_p=0", r"must be in \(0, 1\]"),
    ("--rollout_rows=0", "must be at least 1"), ("--num_prompts=0", "must be at least 1"),
    ("--modle=x", "did you mean 'model'"), ("--model=nowhere/at/all", "no model folder")])
def test_sampling_mistakes(shards, option, message):
    before = contents(shards)
    with pytest.raises(utils.UserError, match=message):
        make(shards, "--hidden_dtype=float32", option)
    assert contents(shards) == before


def test_prompts_over_the_context(tmp_path):
    with pytest.raises(utils.UserError, match="no usable prompt: 5000 new tokens"):
        make(tmp_path / "none", "--max_new_tokens=5000")


def test_disk(tmp_path, monkeypatch):
    """Too small for the projection: refused before anything is sampled. Full in the middle: the shards before it stay whole."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6, 10 ** 5))
    with pytest.raises(utils.UserError, match="2.2 MB may be needed and 0.1 MB are free.*expected_length"):
        make(tmp_path / "small", "--hidden_dtype=float32")
    assert not (tmp_path / "small").exists()
    monkeypatch.undo()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
    out = tmp_path / "full"
    done = subprocess.run([sys.executable, "sample.py", "configs/toy_sample.py", *FEW, f"--out_dir={out}",
                           "--shard_sequences=30", "--hidden_dtype=float32"],
                          capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "error: cannot write" in done.stderr and "Traceback" not in done.stderr, done.stderr[-500:]
    assert not list(out.glob("*.tmp")) and len(list(out.glob("*.jsonl"))) == len(list(out.glob("*.safetensors"))) >= 1
    assert len(contents(out)) >= 30


# -------------------------------------------------------------------------------------------------------------------- terminal

def test_one_prompt(capsys, teacher, tokenizer):
    """--prompt prints what generate gives for the seed, token by token."""
    assert sample.main(["configs/toy_sample.py", "--prompt=3+4+5?"])
    shown = capsys.readouterr()
    (tokens, _, _), = HFEngine(teacher).generate([utils.encode_prompt(tokenizer, "3+4+5?")],
                                                       Sampling(160, STOPS, vocab_size=272), [42])
    assert shown.out.strip() == tokenizer.decode(tokens, skip_special_tokens=True)
    assert f"({len(tokens)} tokens, " in shown.err and "stopped" in shown.err


def test_half_a_character_waits(capsys, tokenizer):
    """A character of several tokens is printed once it is whole."""
    class Engine:
        def generate(self, prompts, sampling, seeds, on_token):
            ids = tokenizer.encode("a€b", add_special_tokens=False)
            assert len(ids) == 5
            for token in ids:
                on_token(0, token)
                printed.append(capsys.readouterr().out)
            return [(ids, [0.0] * 5, "stop")]
    printed = []
    sample.answer(Engine(), tokenizer, [{"role": "user", "content": "?"}], Sampling(9, STOPS), 0, 99)
    assert printed == ["a", "", "", "€", "b"]


def test_chat(monkeypatch, capsys, tokenizer):
    """The conversation so far is the prompt; an empty line begins anew."""
    lines, seen = iter(["1+2+3?", "4+5+6?", "", "7+8+9?"]), []
    monkeypatch.setattr("builtins.input", lambda prompt: read(lines))
    plain = HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda self, prompts, *a, **k: seen.append(prompts[0]) or plain(
        self, prompts, *a, **k))
    sample.main(["configs/toy_sample.py", "--chat", "--max_new_tokens=20"])
    texts = [tokenizer.decode(ids) for ids in seen]
    assert texts[0] == "<|user|>1+2+3?<|assistant|>" and texts[2] == "<|user|>7+8+9?<|assistant|>"
    assert texts[1].startswith(texts[0]) and texts[1].endswith("<|user|>4+5+6?<|assistant|>")


def read(lines):
    try:
        return next(lines)
    except StopIteration as error:
        raise EOFError from error
