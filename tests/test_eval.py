"""eval_math.py end to end: resume, two processes, intervals, comparisons; data/benchmarks.py."""

import json
import math
import os
import random
import shutil
import subprocess
import sys

import pytest
from conftest import torchrun
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import eval_math
import grade
import models
import plot
import utils
from data import benchmarks
from engine import HFEngine

FEW = ("--num_problems=12", "--samples_per_problem=3", "--max_new_tokens=60", "--window=10")


def run(out, *argv):
    """(report, text of samples.jsonl) of the toy student's evaluation."""
    eval_math.main(
        ["configs/toy_eval.py", "--model=data/toy/student", *FEW, f"--out_dir={out}", *argv])
    (report,) = utils.read_lines(out / "results.json")
    return report, (out / "samples.jsonl").read_text()


def parsed(samples):
    return [json.loads(line) for line in samples.splitlines()]


def responses(samples):
    """All but the entropies, which may differ in the last digit."""
    return [[r[key] for key in ("index", "sample", "response", "correct", "length")]
            for r in parsed(samples)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "a"
    return out, *run(out)


def test_two_runs_agree(done, tmp_path):
    """One seed: the same lines and numbers, whatever the window and the rows; another: others."""
    _, report, samples = done
    again, same = run(tmp_path / "b")
    assert same == samples and again["results"] == report["results"]
    _, same = run(tmp_path / "c", "--window=7", "--rollout_rows=5")
    assert responses(same) == responses(samples)
    _, different = run(tmp_path / "d", "--seed=1")
    assert different != samples and len(parsed(different)) == len(parsed(samples)) == 36


def test_numbers(done):
    """Every number of the summary, recomputed from samples.jsonl."""
    _, report, samples = done
    rows, row = parsed(samples), report["results"]["middle"]
    right = [sum(r["correct"] for r in rows if r["index"] == i) for i in range(12)]
    assert row["avg_at_k"] == pytest.approx(sum(right) / 36)
    assert row["pass_at_k"] == pytest.approx(sum(c > 0 for c in right) / 12)
    for k in (1, 2, 3):
        exact = sum(1 - math.comb(3 - c, k) / math.comb(3, k) for c in right) / 12
        assert row["pass_at"][str(k)] == pytest.approx(exact)
    assert row["avg_interval"][0] < row["avg_at_k"] < row["avg_interval"][1]
    assert row["k"] == 3 and row["ungraded"] == row["skipped"] == 0

    lengths = sorted(r["length"] for r in rows)
    tokens = sum(lengths)
    assert row["length"] == pytest.approx(tokens / 36) and row["median_length"] == lengths[18]
    assert row["truncated"] == sum(r["stop"] == "length" for r in rows) / 36
    assert 0 < row["truncated"] < 1

    assert row["entropy"] == pytest.approx(sum(r["entropy_sum"] for r in rows) / tokens)
    boxed = [r for r in rows if r["tokens_after_box"] is not None]
    after = sum(r["tokens_after_box"] for r in boxed)
    before = sum(r["length"] for r in boxed) - after
    both = row["entropy_before_box"] * before + row["entropy_after_box"] * after
    assert both == pytest.approx(sum(r["entropy_sum"] for r in boxed))
    assert 0 < row["entropy_after_box"] < row["entropy_before_box"]

    assert set(report["versions"]) == {"torch", "transformers", "math-verify", "numpy"}
    assert report["settings"]["seed"] == 42
    assert report["settings"]["revision"] == models.model_revision("data/toy/student")
    assert {r["extracted"] for r in rows if r["correct"]} <= {str(i) for i in range(10)}


def record(index, sample, correct, reason="", **more):
    return {
        "index": index, "sample": sample, "correct": correct, "reason": reason, "length": 10,
        "entropy_sum": 5.0, "stop": "x", "tokens_after_box": None, "entropy_after_box_sum": 0.0,
    } | more


def test_summary_by_hand():
    """Two problems, one response ungraded: it is in no average; the entropy is split at the box."""
    row = grade.summarise([
        record(0, 0, True, length=10, tokens_after_box=4, entropy_sum=7.0,
               entropy_after_box_sum=1.0),
        record(0, 1, None, "no verdict in 5 s", length=20, stop="length"),
        record(1, 0, False),
        record(1, 1, True)])
    assert row["avg_at_k"] == (1 + 0.5) / 2 and row["ungraded"] == 1 and row["k"] == 2
    assert row["pass_at"] == {1: (1 + 0.5) / 2, 2: 1.0}         # at k = 2 problem 1 alone counts
    assert row["pass_at_k"] == 1
    assert row["length"] == 12.5 and row["median_length"] == 10
    assert row["entropy"] == 22 / 50
    assert row["entropy_before_box"] == 1.0 and row["entropy_after_box"] == 0.25
    assert row["truncated"] == 0.25 and row["stop_reasons"] == {"length": 0.25, "x": 0.75}
    assert row["tokens_after_box"] == 4 and row["problems"] == 2 and row["responses"] == 4
    none = grade.summarise([record(0, 0, None, "no reference answer")])
    assert none["avg_at_k"] is none["pass_at_k"] is none["entropy_after_box"] is None
    assert none["ungraded"] == 0


def test_not_one_right_answer(capsys):
    grade.summarise([record(0, 0, True), record(0, 1, False)])
    assert capsys.readouterr().out == ""
    grade.summarise([record(0, 0, None), record(0, 1, False, answer="forty", extracted="40")])
    expected = "as they should be? One is 'forty', the answer found is '40'"
    assert expected in capsys.readouterr().out


def test_a_base_model_is_measured_like_its_checkpoints(tmp_path):
    """`template`: a Base model takes the prompts and the stop ids of its teacher."""
    base = shutil.copytree("data/toy/student", tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}=")
    options = [f"--model={base}", "--num_problems=3", "--samples_per_problem=1"]
    own, _ = run(tmp_path / "own", *options)
    as_taught, samples = run(tmp_path / "taught", *options, "--template=data/toy/teacher")
    assert own["settings"]["stop_ids"] == [257]
    plain, same = run(tmp_path / "plain", *options[1:], "--model=data/toy/student",
                      "--template=data/toy/teacher")
    assert as_taught["settings"]["stop_ids"] == plain["settings"]["stop_ids"] == [257, 260]
    assert responses(samples) == responses(same)
    assert as_taught["settings"]["tokenizer"] != own["settings"]["tokenizer"]


def test_names_of_benchmarks():
    """Blanks around them do not count, and neither does a comma at the end."""
    cfg = eval_math.Config(benchmarks="data/toy/middle.jsonl, data/toy/hard.jsonl ,")
    assert list(eval_math.load_benchmarks(cfg)) == ["middle", "hard"]


def test_greedy_samples_are_all_the_same(tmp_path):
    _, samples = run(tmp_path / "e", "--temperature=0", "--num_problems=2",
                     "--samples_per_problem=2")
    first, second, *others = [record["response"] for record in parsed(samples)]
    assert first == second != others[0] == others[1]


def test_training_measures_the_same(train, tmp_path):
    """The last evaluation of a run, and eval_math.py on its last checkpoint: the same numbers."""
    rows, out = train("configs/toy_opd.py", "--max_steps=2", "--eval_every=2", "--eval_prompts=6",
                      "--eval_samples=2", "--eval_max_new_tokens=60", "--eval_teacher=False")
    (last,) = [row for row in rows if row.get("avg_at_k") is not None and row["step"] == 2]
    report, samples = run(tmp_path / "e", f"--model={out / 'last'}", "--num_problems=6",
                          "--samples_per_problem=2")
    trained = utils.read_lines(out / "samples_student_000002.jsonl")
    assert [r["response"] for r in trained] == [r["response"] for r in parsed(samples)]
    for key in ("avg_at_k", "pass_at_k", "length", "entropy", "truncated", "stop_reasons",
                "tokens_after_box"):
        assert report["results"]["middle"][key] == pytest.approx(last[key], rel=1e-4), key


def test_an_engine_with_other_weights(tmp_path, monkeypatch):
    """The evaluation ends after the first window, whose responses are kept, but not as results."""
    monkeypatch.setattr(HFEngine, "in_sync", lambda self: False)
    with pytest.raises(utils.UserError, match="the engine's weights are not the model's"):
        run(tmp_path)
    assert len(utils.read_lines(tmp_path / "faulty_000.jsonl")) == 10
    assert not (tmp_path / "samples_000.jsonl").exists()


def test_resume_after_a_kill(done, tmp_path, monkeypatch):
    """Of a third of the lines the last is cut in the middle: only what is missing is sampled."""
    _, report, samples = done
    out = tmp_path / "killed"
    plain, sampled = eval_math.respond, []

    def spy(engine, tokenizer, problems, prompts, pairs, *rest):
        sampled.extend(pairs)
        return plain(engine, tokenizer, problems, prompts, pairs, *rest)

    monkeypatch.setattr(eval_math, "respond", spy)
    run(out)
    (out / "results.json").unlink()
    (out / "samples.jsonl").unlink()
    lines = samples.splitlines(keepends=True)
    (out / "samples_000.jsonl").write_text("".join(lines[5:17]) + lines[17][:30])
    (out / "samples_003.jsonl").write_text(lines[0])            # of a run with more processes
    sampled.clear()
    again, resumed = run(out)
    assert len(sampled) == 36 - 13
    assert again["results"]["middle"]["avg_at_k"] == report["results"]["middle"]["avg_at_k"]
    assert responses(resumed) == responses(samples)
    left = [".lock", "results.json", "samples.jsonl", "settings.json"]
    assert sorted(path.name for path in out.iterdir()) == left

    sampled.clear()
    rerun, same = run(out)                                      # nothing to do: nothing changes
    assert not sampled
    assert same == resumed and rerun["results"] == again["results"]
    _, other = run(out, "--overwrite", "--seed=1")
    assert len(sampled) == 36 and other != resumed


def test_two_processes(done, tmp_path):
    out = tmp_path / "two"
    finished = torchrun(2, "eval_math.py", "configs/toy_eval.py", "--model=data/toy/student", *FEW,
                        f"--out_dir={out}")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert responses((out / "samples.jsonl").read_text()) == responses(done[2])


def test_a_real_benchmark(tmp_path):
    """
    Real text through a byte-level tokenizer and an untrained model, to the end, with gold answers
    of all kinds: BENCHMARK=file.jsonl, or some fractions.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<eos>": 256}
    tokenizer = Tokenizer(bpe.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{{ messages[0]['content'] }}\n"
    config = Qwen3Config(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=32, max_position_embeddings=4096,
        eos_token_id=256)
    model = tmp_path / "model"
    Qwen3ForCausalLM(config).save_pretrained(model)
    fast.save_pretrained(model)

    problems = [{"problem": f"What is $\\frac{{{i}}}{{7}}$? " * 8, "answer": f"\\frac{{{i}}}{{7}}"}
                for i in range(30)]
    utils.write_lines(tmp_path / "fractions.jsonl", problems)
    path = os.environ.get("BENCHMARK", tmp_path / "fractions.jsonl")
    eval_math.main(["configs/eval_math.py", f"--model={model}", f"--benchmarks={path}",
                    f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=16", "--dtype=float32"])
    (report,) = utils.read_lines(tmp_path / "out" / "results.json")
    (row,) = report["results"].values()
    assert row["responses"] == 3 * row["problems"] and row["avg_at_k"] == 0
    assert row["truncated"] > 0.5
    assert abs(row["entropy"] - math.log(257)) < 0.2            # an untrained model


def test_compare_table_and_bars(done, tmp_path, capsys, monkeypatch):
    folder, report, samples = done
    better = tmp_path / "better"
    better.mkdir()
    rows = [{**r, "correct": True, "length": r["length"] + 5} for r in parsed(samples)]
    utils.write_lines(better / "samples.jsonl", rows)
    settings = {**report["settings"], "seed": 43}
    utils.write_lines(better / "results.json", [{**report, "settings": settings}])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["plot.py", "--compare", str(folder), str(better)])
    plot.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warning: seed is 42 there and 43 here"
    cells = lines[-1].split()
    gain = 1 - report["results"]["middle"]["avg_at_k"]
    assert cells[:2] == ["middle", "12"] and float(cells[2]) == pytest.approx(gain, abs=1e-3)
    assert float(cells[3]) < gain < float(cells[5])
    assert cells[6:] == ["+5", "+5", "..", "+5"]

    monkeypatch.setattr(sys, "argv", ["plot.py", "--compare", str(folder), str(tmp_path)])
    with pytest.raises(SystemExit, match="no .*results.json; give folders"):
        plot.main()

    monkeypatch.setattr(sys, "argv", ["plot.py", "--eval", str(better), str(folder)])
    plot.main()
    written, *table = capsys.readouterr().out.splitlines()
    assert written == f"wrote {better / 'results.png'}"
    assert table[2].startswith("| `better` on middle | 12 | 3 | ")
    assert table[3].startswith("| `a` on middle")
    assert "seed 43" in table[-3] and "seed 42" in table[-1]
    assert (better / "results.png").read_bytes().startswith(b"\x89PNG")


def test_bootstrap_covers():
    """The 95 % interval of a mean of 40 coins holds the truth in 88 to 99 of 100 trials."""
    rng, inside = random.Random(0), 0
    for trial in range(100):
        low, high = plot.interval([float(rng.random() < 0.3) for _ in range(40)], trial, 300)
        inside += low <= 0.3 <= high
    assert 88 <= inside <= 99


@pytest.mark.parametrize("option, message", [
    ("--benchmarks=gsm9k", "no benchmark gsm9k: there are gsm8k, math500"),
    ("--benchmarks=", "name at least one of gsm8k"),
    ("--benchmarks=math", "make it with `python data/benchmarks.py math`"),
    ("--benchmarks=data/toy/middle.jsonl,data/toy/middle.jsonl", "two of the name middle"),
    ("--seed=3", "was made with seed=42, not 3"),
    ("--model=data/toy/teacher", "was made with revision="),
    ("--top_p=0", "must be in"),
    ("--window=0", "window=0: must be at least 1"),
    ("--temperature=-1", "must not be negative"),
    ("--model=nothing/at/all", "no model folder"),
    ("--max_new_tokens=9999", "no usable prompt")])
def test_eval_mistakes(done, option, message):
    with pytest.raises(utils.UserError, match=message):
        run(done[0], option)
    assert (done[0] / "samples.jsonl").read_text() == done[2]


def test_foreign_folders_and_full_disks(done, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("")
    with pytest.raises(utils.UserError, match="exists and is no evaluation"):
        run(tmp_path)

    def full(path, *args, **options):
        if "samples_" in str(path):
            raise OSError(28, "No space left on device")
        return open(path, *args, **options)

    monkeypatch.setattr(utils, "open", full, raising=False)
    with pytest.raises(utils.UserError, match="No space left on device; mend that"):
        run(tmp_path / "full")


# ------------------------------------------------------------------------------ data/benchmarks.py

def test_benchmark_files(tmp_path):
    """Counts and content are checked, and a file that changes is refused."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    rows = [{"problem": f"p{i}", "answer": 27.0 if i else "a\u2028b", "url": "x"}
            for i in range(40)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (source / "amc23.jsonl").write_text(text)
    assert benchmarks.make("amc23", source, out) == 40
    assert benchmarks.make("gsm8k", source, out) is None
    made = utils.read_lines(out / "amc23.jsonl")
    assert made[:2] == [{"problem": "p0", "answer": "a\u2028b", "source": "amc23"},
                        {"problem": "p1", "answer": "27", "source": "amc23"}]
    assert (out / "amc23.sha256").read_text().endswith("  amc23.jsonl\n")

    utils.write_lines(source / "amc23.jsonl", rows[:-1], mode="w")
    with pytest.raises(benchmarks.DataError, match="39 rows, amc23 has 40"):
        benchmarks.make("amc23", source, out)
    new = {"problem": "new", "answer": "1"}
    utils.write_lines(source / "amc23.jsonl", [*rows[:-1], new], mode="w")
    with pytest.raises(benchmarks.DataError, match="its content is not what"):
        benchmarks.make("amc23", source, out)


def test_answers_of_datasets(tmp_path):
    training = [{"problem": "p", "answer": ""}, {"problem": "p", "answer": "x"}]
    utils.write_lines(tmp_path / "deepscaler.jsonl", training)
    # A training prompt without an answer is of no use.
    assert benchmarks.make("deepscaler", tmp_path, tmp_path) == 1
    solution = "so \\boxed{\\frac{1}{2}} . Then \\boxed{x^{2}}."
    row = {"problem": "p", "level": "Level 1", "solution": solution}
    assert benchmarks.convert("math", row, "here")["answer"] == "x^{2}"
    assert benchmarks.convert("math", row, "here")["solution"] == row["solution"].strip()
    row = {"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\n#### 42"}
    assert benchmarks.convert("gsm8k", row, "here") == {
        "problem": "6 x 7?", "answer": "42", "source": "gsm8k", "solution": row["answer"]}
    for row in ({"problem": "p", "answer": "1"}, {"problem": "p", "answer": "1", "solution": " "}):
        assert "solution" not in benchmarks.convert("deepscaler", row, "here")
    with pytest.raises(benchmarks.DataError, match="here: no problem or no answer"):
        benchmarks.convert("math", {"problem": "p", "solution": "none"}, "here")


def test_data_scripts_run():
    """From the repository root, as their headers say."""
    for script in ("data/benchmarks.py", "data/toy.py"):
        command = [sys.executable, script, "--help"]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0 and "usage:" in finished.stdout, finished.stderr


def test_benchmarks_without_torch(tmp_path):
    """Where torch cannot be imported: of MATH, whose answers are found by the grader."""
    rows = [{"problem": "p", "solution": f"\\boxed{{{i}}}"} for i in range(5000)]
    utils.write_lines(tmp_path / "math_test.jsonl", rows)
    code = ("import runpy, sys; sys.modules['torch'] = None; sys.path[0] = 'data'; sys.argv = "
            f"['', 'math', '--from-dir={tmp_path}', '--out={tmp_path}']; "
            "runpy.run_path('data/benchmarks.py', run_name='__main__')")
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.startswith("math        5000 rows -> "), finished.stderr
    assert utils.read_lines(tmp_path / "math.jsonl")[7]["answer"] == "7"
