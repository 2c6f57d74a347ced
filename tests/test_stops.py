"""Where a response ends: exchange_stops, terminal, stops.py. docs/stops.md says what for."""

import json
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import STOPS, saved, steps_of, weights, without_times
from transformers import AutoModelForCausalLM

import cells
import sample
import stops
import train_distill
from data.problems import deal, encode_prompt, load_problems, load_tokenizer
from engine import HFEngine, Sampling
from models import exchange_stops, load_model, stop_ids
from trajectories import Trajectories
from utils import UserError, load_config

OPD = "configs/toy_opd.py"
OWN, THEIRS = STOPS  # <|endoftext|> of the student, <|im_end|> of the teacher
STRICT = ("--stop=student", "--exchange_stops")


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def exchanged(columns, pairs):
    order = list(range(columns))
    for a, b in pairs:
        order[a], order[b] = order[b], order[a]
    return order


# ---------------------------------------------------------------------------------- exchange_stops

@pytest.mark.parametrize("own, theirs, pairs", [
    ([257], [260], [(257, 260)]),
    ([257, 258], [260, 259, 10], [(257, 260), (258, 259)]),  # in order; an id of theirs may remain
    ([258], [260, 258], [(258, 260)]),  # as Qwen3's
    ([258, 257], [258, 260], [(257, 260)])])  # one that both have stays
def test_logits_are_exchanged(student, own, theirs, pairs):
    """The logits are the exchanged logits, to the bit, and no other row of any weight changes."""
    ids = [40, 50, 43, 51]
    before = logits_of(student, ids)
    tensors = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    exchange_stops(student, own, theirs, ids)
    order = exchanged(len(before[0]), pairs)
    assert torch.equal(logits_of(student, ids), before[:, order])
    for name, tensor in student.state_dict().items():
        is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(tensor, tensors[name][order] if is_vocabulary else tensors[name]), name
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_template_that_writes_a_stop_id(student):
    """The student reads it as before: only the LM head's rows change, a matrix of its own now."""
    ids = [40, THEIRS, 50, OWN]
    before = logits_of(student, ids)
    embedding = student.model.embed_tokens.weight.detach().clone()
    exchange_stops(student, [OWN], [THEIRS], ids)
    assert torch.equal(logits_of(student, ids), before[:, exchanged(len(before[0]), [STOPS])])
    assert torch.equal(student.model.embed_tokens.weight, embedding)
    assert student.lm_head.weight.requires_grad and not student.config.tie_word_embeddings


@pytest.mark.parametrize("own, theirs", [
    ([257], [257]), ([257], []), ([257, 258], [260]), ([257, 258], [258, 260])])
def test_ids_that_form_no_pairs(student, own, theirs):
    with pytest.raises(UserError, match=f"stop ids .{own[0]}.* of the student and .* set it False"):
        exchange_stops(student, own, theirs, [])


def test_it_happens_once(train, student):
    """
    At lr 0 the saved weights are the exchanged ones, also after a resume, which goes on bit for
    bit; a run cannot go on without it.
    """
    rest = ("--max_steps=2", "--learning_rate=0")
    _, still = train(OPD, *STRICT, *rest)
    exchange_stops(student, [OWN], [THEIRS], [])
    expected = student.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in weights(still / "last").items())
    whole_rows, whole = train(OPD, *STRICT, "--max_steps=4")
    _, half = train(OPD, *STRICT, "--max_steps=2")
    rows, _ = train(OPD, *STRICT, "--max_steps=4", "--resume", out=half)
    assert without_times(rows) == without_times(whole_rows)
    first, second = saved(whole / "last"), saved(half / "last")
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(UserError, match="made with exchange_stops=True, not None; resume with"):
        train(OPD, "--stop=student", "--max_steps=5", "--resume", out=half)


def test_it_ends_as_the_teacher_does(train):
    """
    From the first step on, so `union` and `student` are one run; whoever loads the folder stops
    at the teacher's id alone. The loss at step 1 has lost the teacher's end.
    """
    plain, _ = train(OPD, "--stop=student", "--max_steps=1", "--max_new_tokens=160")
    rows, out = train(OPD, *STRICT, "--max_steps=3", "--max_new_tokens=160")
    union, _ = train(OPD, "--exchange_stops", "--max_steps=3", "--max_new_tokens=160")
    assert without_times(rows) == without_times(union)
    assert rows[0]["loss"] < 0.7 * plain[0]["loss"] and rows[0]["truncated_share"] < 0.2
    tokenizer = load_tokenizer(out)
    model = load_model(out / "last", torch.float32)
    assert stop_ids(model.generation_config, tokenizer) == [THEIRS]
    assert model.config.eos_token_id == [THEIRS] and tokenizer.eos_token_id == THEIRS
    prompts = [encode_prompt(tokenizer, text) for text in ("3+4+5?", "1+2+3+4?", "9+9+1?")]
    rollouts = HFEngine(model).generate(prompts, Sampling(200, (THEIRS,), 0), range(3))
    other = AutoModelForCausalLM.from_pretrained(out / "last")
    for prompt, (tokens, _, reason) in zip(prompts, rollouts):
        generated = other.generate(
            torch.tensor([prompt]), max_new_tokens=200, do_sample=False)[0, len(prompt):].tolist()
        assert generated == tokens and reason == "stop" and OWN not in tokens


def test_untied_through_training_and_resume(train, chats):
    """A folder with an LM head of its own: saved, resumed bit for bit, loaded by transformers."""
    options = (f"--teacher={chats}", *STRICT)
    whole_rows, whole = train(OPD, *options, "--max_steps=4")
    _, half = train(OPD, *options, "--max_steps=2")
    rows, _ = train(OPD, *options, "--max_steps=4", "--resume", out=half)
    assert without_times(rows) == without_times(whole_rows)
    config = json.loads((whole / "last/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    found = weights(whole / "last")
    head, embedding = found["lm_head.weight"], found["model.embed_tokens.weight"]
    moved = (head[OWN] - embedding[THEIRS]).abs().max(), (head[OWN] - embedding[OWN]).abs().max()
    assert moved[0] < 0.1 < moved[1]
    loaded = AutoModelForCausalLM.from_pretrained(whole / "last")
    assert torch.equal(loaded.lm_head.weight, head)
    assert torch.equal(loaded.model.embed_tokens.weight, embedding)


def test_cached_hidden_states(train, tmp_path):
    """The teacher's stop ids are known where only its LM head is loaded."""
    out = tmp_path / "shards"
    sample.main(["configs/toy_sample.py", f"--out_dir={out}", "--num_prompts=16"])
    options = (f"--trajectories={out}", "--max_steps=2", "--max_new_tokens=96", "--stop=student")
    rows, run = train("configs/toy_sft.py", *options, "--exchange_stops")
    _, union = train("configs/toy_sft.py", *options, "--exchange_stops", "--stop=union")
    ends = load_model(union / "last", torch.float32).generation_config.eos_token_id
    assert ends == [THEIRS]                             # shards say that either id ended a response
    plain, _ = train("configs/toy_sft.py", *options)
    assert load_model(run / "last", torch.float32).generation_config.eos_token_id == [THEIRS]
    assert steps_of(rows)[0]["loss"] < steps_of(plain)[0]["loss"]


# ---------------------------------------------------------------------------------------- terminal

@pytest.mark.parametrize("loss_norm", ["token", "sequence"])
def test_mask_by_hand(train, student, teacher, tokenizer, loss_norm):
    """The loss of the responses without their stop id, from whole logits in fp64."""
    rows, _ = train(OPD, "--max_steps=1", "--max_new_tokens=60", "--terminal=mask",
                    f"--loss_norm={loss_norm}")
    problems, asked, seeds = load_problems("data/toy/train.jsonl"), [], []
    for _, i, seed in deal(3000, 0, 8, seed=42):
        asked.append(encode_prompt(tokenizer, problems[i]["problem"]))
        seeds.append(seed)
    rollouts = HFEngine(student).generate(asked, Sampling(60, STOPS), seeds)
    means, total, tokens, ended = [], 0.0, 0, 0
    for prompt, (response, _, reason) in zip(asked, rollouts):
        n = len(response) - (reason == "stop")
        ids = torch.tensor([prompt + response])
        log_q, log_p = (
            model.double()(ids).logits[0, len(prompt) - 1:, :272].log_softmax(-1)[:n]
            for model in (student, teacher))
        kl = (log_q.exp() * (log_q - log_p)).sum().item()
        means.append(kl / n)
        total, tokens, ended = total + kl, tokens + n, ended + (reason == "stop")
    assert 2 <= ended <= 7
    expected = total / tokens if loss_norm == "token" else sum(means) / 8
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["tokens"] == tokens and rows[0]["truncated_share"] == 1 - ended / 8


def test_mask_on_disk(train, tmp_path):
    """From shards with hidden states, and from the solutions of a file."""
    out = tmp_path / "shards"
    sample.main(["configs/toy_sample.py", f"--out_dir={out}", "--num_prompts=16"])
    for config, options in (("configs/toy_sft.py", [f"--trajectories={out}"]),
                            ("configs/toy_hard_sft.py", ["--trajectories=None"])):
        options += ["--max_steps=1", "--max_new_tokens=160"]
        (raw,), _ = train(config, *options)
        (masked,), _ = train(config, *options, "--terminal=mask")
        assert raw["truncated_share"] == masked["truncated_share"] < 1
        assert masked["tokens"] == raw["tokens"] - 8 * (1 - raw["truncated_share"])
        assert masked["loss"] != raw["loss"]
    # One token beyond the horizon is its stop id: it is cut, and all before it counts.
    horizon = next(len(r.tokens) for r in Trajectories(out, False) if r.ended) - 1
    cfg = SimpleNamespace(prefix="teacher", trajectories=out, teacher="", terminal="mask")
    data = SimpleNamespace(responses=list(Trajectories(out, False)))
    found, _ = train_distill.get_responses(
        cfg, [(i, i, 0) for i in range(16)], horizon, data, None, None, False)
    for response, whole in zip(found, data.responses, strict=True):
        ends = whole.ended and len(whole.tokens) <= horizon
        assert response.ended == ends
        assert response.tokens == whole.tokens[:len(whole.tokens) - 1 if ends else horizon]


# ----------------------------------------------------------------------------------------- stops.py

def test_its_runs_have_valid_configs():
    """Each condition is what its name says."""
    runs = stops.toy_runs(stops.toy_world())
    assert len(runs) == 36 and len({name for name, _ in runs.values()}) == 36
    for (_, condition), (_, argv) in [*runs.items(), *stops.real_runs(stops.real_world()).items()]:
        cfg = load_config(train_distill.Config, argv)
        train_distill.validate(cfg, 1)
        assert cfg.exchange_stops == condition.startswith("exchanged")
        assert (cfg.terminal == "mask") == condition.endswith("_mask")
        assert cfg.stop == ("union" if condition.startswith("union") else "student")


def planted(lengths, seeds=3):
    """
    {seed: what `cells.measured` returns}: 4 responses to a problem, of these lengths, and a token
    more for each seed.
    """
    ones, lengths = np.ones(len(lengths)), np.array(lengths, float)
    return {seed: {
        key: np.stack([4 * (lengths + seed if key == "length" else 0.5 * ones), 4 * ones])
        for key in stops.COLUMNS} for seed in range(seeds)}


def test_tables_and_figure(tmp_path):
    """Values, intervals over problems and seeds, and differences, which are paired."""
    results = {("reverse KL", "union"): planted([60, 80, 100]),
               ("reverse KL", "student"): planted([230, 250, 270]),
               ("reverse KL", "exchanged"): planted([61, 81, 101], seeds=1),
               ("forward KL", "student"): planted([240, 240, 240], seeds=1)}
    lines = stops.table(results)
    assert lines[2].startswith("| reverse KL | `union` | 3 | 0.500 (0.500 .. 0.500) | 81.0 (")
    low, high = (float(x) for x in lines[2].split(" | ")[4][6:-1].split(" .. "))
    assert 56 < low < 68 and 94 < high < 106                # of three problems and seeds
    assert lines[5].split(" | ")[2:5:2] == ["1", "240.0 (240.0 .. 240.0)"]
    rows = [line.split(" | ") for line in stops.differences(results)[2:]]
    # Forward KL has nothing beside it. For each problem and seed alike: it is paired.
    assert [(row[1], row[2], row[4]) for row in rows] == [
        ("`union` minus `student`", "3", "-170.0 (-170.0 .. -170.0)"),
        ("`exchanged` minus `student`", "1", "-169.0 (-169.0 .. -169.0)"),
        ("`exchanged` minus `union`", "1", "+1.0 (+1.0 .. +1.0)")]
    stops.draw(results, tmp_path / "stops.png")
    assert (tmp_path / "stops.png").stat().st_size > 5000


def test_stops_from_runs_to_tables(tmp_path, monkeypatch, capsys):
    """All of it, with a planted stage: 36 folders, then tables that say what the folders do."""
    stage = tmp_path / "stage.py"
    stage.write_text(textwrap.dedent("""
        import json, sys
        from pathlib import Path
        out = Path(next(a for a in sys.argv if a.startswith("--out_dir=")).split("=")[1])
        out.mkdir(parents=True)
        length = 250 if out.name.endswith("_student") else 80
        rows = [{"index": i, "correct": True, "length": length + i, "entropy_sum": 1.0,
                 "stop": "length", "tokens_after_box": None, "entropy_after_box_sum": 0.0}
                for i in range(4)]
        for step in (0, 200):
            (out / f"samples_student_{step:06d}.jsonl").write_text(
                "".join(json.dumps(row) + "\\n" for row in rows if step or row["index"] < 2))
    """))
    start, world = cells.start, stops.toy_world()
    world.out = tmp_path / "out"
    monkeypatch.setattr(stops, "toy_world", lambda: world)
    monkeypatch.setattr(cells, "start", lambda job, gpu: start(job._replace(script=stage), gpu))
    stops.main(["--jobs", "8"])
    printed = capsys.readouterr().out
    table = (world.out / "stops_table.md").read_text()
    assert "| reverse KL, horizon 160 | `student` | 1 | 1.000 (1.000 .. 1.000) | 251.5 (" in table
    assert "| curriculum | `exchanged_mask` | 1 | 1.000 (1.000 .. 1.000) | 81.5 (" in table
    assert table in printed and (world.out / "stops.png").is_file()
    assert len(list((world.out / "42").glob("*/finished"))) == 36
    # What is finished is reported, and nothing is run: of two seeds the second has none.
    (world.out / "42/curriculum_union/finished").unlink()
    stops.main(["--seeds", "42", "43", "--report"])
    assert (world.out / "stops_table.md").read_text() == "".join(
        line for line in table.splitlines(True) if "| curriculum | `union` |" not in line)
