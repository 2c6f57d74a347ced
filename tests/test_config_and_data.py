"""The config loader, every config file, the toy world and its tokenizer, prompts, paper's FLOPs."""

import dataclasses
import itertools
import json
import random
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import eval_math
import rl_grpo
import sample
import train_distill
from data import prices, toy
from data.problems import (
    check_tokenizers,
    deal,
    encode_prompt,
    load_problems,
    load_tokenizer,
    warn_of_overlap,
)
from engine import HFEngine, Sampling
from estimate import without_weights
from grade import evaluate, grade, pass_at_k, tokens_after_box
from models import check_head, forward_flops, lm_head, load_model, stop_ids
from utils import UserError, check_ranges, load_config

# ----------------------------------------------------------------------------------- config loader


@dataclasses.dataclass
class Small:
    rate: float = 0.5
    steps: int = 3
    name: str = "a"
    teacher: str | None = "t"
    flag: bool = False
    ladder: tuple[int, ...] = ()
    kind: Literal["x", "y"] = "x"


def load(tmp_path, text, *options):
    (tmp_path / "c.py").write_text(text)
    return load_config(Small, [str(tmp_path / "c.py"), *options])


def test_config_precedence_and_types(tmp_path):
    text = "import math\n_base = 2\nsteps = _base * 2\nrate = 1\nkind = 'y'\n"
    cfg = load(tmp_path, text, "--steps=7", "--flag", "--teacher=None", "--name=42",
               "--ladder=(128, 256)")
    assert cfg == Small(rate=1.0, steps=7, name="42", teacher=None, flag=True, ladder=(128, 256),
                        kind="y")
    assert type(cfg.rate) is float
    text = "from configs.opd_4b import seed as _s\nflag = True"
    assert load(tmp_path, text, "--flag=False").flag is False
    assert load(tmp_path, "name = '~/x'").name == str(Path.home() / "x")


def test_of_several_config_files_the_later_wins(tmp_path):
    """And what the command line says over all of them, wherever it stands."""
    first, second = str(tmp_path / "first.py"), str(tmp_path / "second.py")
    Path(first).write_text("rate = 0.1\nsteps = 1\nname = 'first'\n")
    Path(second).write_text("steps = 2\nname = 'second'\n")
    cfg = load_config(Small, ["--name=mine", first, second])
    assert cfg == Small(rate=0.1, steps=2, name="mine")
    cfg = load_config(Small, [second, first])
    assert cfg == Small(rate=0.1, steps=1, name="first")


@pytest.mark.parametrize("text, options, message", [
    ("stepz = 3", [], "c.py: unknown key 'stepz'; did you mean 'steps'?"),
    ("", ["--stpes=3"], "command line: unknown key 'stpes'; did you mean 'steps'?"),
    ("", ["--verbose"], "command line: unknown key 'verbose'; --help lists the keys"),
    ("steps = 1.5", [], "steps=1.5 is a float; steps must be int"),
    ("steps = True", [], "steps=True is a bool; steps must be int"),
    ("flag = 1", [], "flag=1 is a int; flag must be bool"),
    ("rate = None", [], "rate must be float"),
    ("ladder = (1, 'a')", [], "ladder=(1, 'a') is a tuple; ladder must be tuple[int, ...]"),
    ("", ["--steps"], "steps=True"),
    ("", ["--steps=ten"], "steps='ten' is a str"),
    ("", ["--kind=z"], "kind='z' is a str; kind must be one of ['x', 'y']"),
    ("", ["nothing.py"], "no config file nothing.py; those of this repository are in configs/"),
    ("x = (", [], "c.py, line 1: SyntaxError"),
    ("import os\nopen('none.txt')", [], "c.py, line 2: FileNotFoundError"),
    ("", ["--steps={{1}}"], "steps='{{1}}' is a str; steps must be int"),
    ("flag = True\nsteps: 5", [], "c.py, line 2: `steps: 5` sets nothing in Python; write ="),
    ("steps = 1\nrate = 1 / 0", [], "c.py, line 2: ZeroDivisionError"),
    ("from configs.nothing import *", [], "c.py, line 1: ModuleNotFoundError"),
])
def test_config_mistakes(tmp_path, text, options, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(tmp_path, text, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key, value, limit", [
    ("max_new_tokens", 0, "must be at least 1"), ("rollout_rows", 0, "must be at least 1"),
    ("num_prompts", -1, "must be at least 1"), ("keep", 0, "must be at least 1"),
    ("eval_every", -1, "must not be negative"), ("temperature", -0.5, "must not be negative"),
    ("top_p", 1.5, "must be in (0, 1]; 1 keeps every token"),
    ("eval_top_p", 0.0, "must be in (0, 1]; 1 keeps every token"),
    ("kv_cache_gb", -1.0, "must be positive"), ("rollout_timeout", 0.0, "must be positive"),
    ("max_logprob_gap", -1.0, "must be positive")])
def test_ranges(key, value, limit):
    """A key of a name has the same range in all configs; None passes, and so does the limit."""
    check_ranges(SimpleNamespace(**{key: None}))
    check_ranges(SimpleNamespace(**{key: 1}))
    with pytest.raises(UserError, match=re.escape(f"{key}={value!r}: {limit}")):
        check_ranges(SimpleNamespace(**{key: value}))


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads(path, monkeypatch):
    monkeypatch.setattr("utils.WORLD", 8)  # some shard
    stage = train_distill
    for part, script in (("sample", sample), ("eval", eval_math), ("grpo", rl_grpo)):
        if part in path.stem:
            stage = script
    cfg = load_config(stage.Config, [str(path)])
    check_ranges(cfg)
    if stage in (train_distill, rl_grpo):
        stage.validate(cfg, 1)
        stage.validate(cfg, 8)
    assert cfg.out_dir == f"out/{path.stem}"


def test_batch_not_divisible():
    message = "batch_size=30: must be a multiple of the 8 processes; try 32"
    with pytest.raises(UserError, match=message):
        train_distill.validate(train_distill.Config(batch_size=30), 8)


# ----------------------------------------------------------------------------------- paper configs

SMALL, MIDDLE, BIG = "Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B"
SHAPES = {  # hidden size, layers, size of the MLP, heads, whether embedding and head are one
    SMALL: (1024, 28, 3072, 16, True), MIDDLE: (2560, 36, 9728, 32, True),
    BIG: (4096, 36, 12288, 32, False)}


def qwen3(name, heads=None):
    hidden, layers, mlp, real_heads, tied = SHAPES[name]
    return Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp, vocab_size=151936,
        head_dim=128, num_attention_heads=heads or real_heads, num_key_value_heads=8,
        tie_word_embeddings=tied, max_position_embeddings=40960)


@pytest.mark.parametrize("name, parameters", [
    (SMALL, 596_049_920), (MIDDLE, 4_022_468_096), (BIG, 8_190_735_360)])
def test_paper_models_on_meta(name, parameters):
    """The real shapes: as many parameters as published, and heads that the losses can use."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(qwen3(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    check_head(model, name)
    assert lm_head(model).shape == (151936, SHAPES[name][0])


def test_paper_flops():
    """
    Appendix H.1, B 32, P 92, R 128, within 1 %. The paper takes heads x head_dim = H; a forward of
    teacher or student has full attention there, generation has causal attention.
    """
    lengths = [220] * 32
    # the paper's heads: H / 128
    configs = qwen3(SMALL, heads=8), qwen3(MIDDLE, heads=20)
    generation, teacher_causal = (
        forward_flops(without_weights(config), lengths) / 1e12 for config in configs)
    # a token attends to all tokens, not to half of them on average
    more = [sum(2 * config.num_hidden_layers * config.hidden_size * n * n for n in lengths) / 1e12
            for config in configs]
    student, teacher = generation + more[0], teacher_causal + more[1]
    assert generation == pytest.approx(7.66, rel=0.002)
    assert teacher == pytest.approx(53.13, rel=0.01)
    assert 3 * student == pytest.approx(23.19, rel=0.01)  # cached teacher prefixes
    on_policy = generation + teacher + 3 * student
    assert on_policy == pytest.approx(83.98, rel=0.01)  # student prefixes
    assert on_policy / (3 * student) == pytest.approx(3.62, rel=0.01)
    assert (teacher + 3 * student) / (3 * student) == pytest.approx(3.29, rel=0.01)


def test_flops_of_the_real_shapes():
    """What metrics.jsonl counts: 16 heads x 128 = 2048 where H = 1024, causal attention."""
    student, teacher = (
        forward_flops(without_weights(qwen3(name)), [220] * 32) / 1e12 for name in (SMALL, MIDDLE))
    head = 2 * 32 * 128 * 2560 * 151936 / 1e12  # of a cached teacher, at response tokens
    assert (student, teacher, head) == pytest.approx((8.57, 57.09, 3.19), rel=0.002)
    on_policy = 4 * student + teacher
    assert on_policy / (3 * student) == pytest.approx(3.55, rel=0.002)
    assert on_policy / (3 * student + head) == pytest.approx(3.16, rel=0.002)
    assert (teacher + 3 * student) / (3 * student + head) == pytest.approx(2.87, rel=0.002)

    tiny = Qwen3Config(
        hidden_size=4, num_hidden_layers=1, intermediate_size=3, vocab_size=10, head_dim=2,
        num_attention_heads=2, num_key_value_heads=1)
    query, key_and_value, output, mlp, head = 2 * 4 * 4, 2 * 4 * 4, 2 * 4 * 4, 6 * 4 * 3, 2 * 4 * 10
    attention = 2 * 4 * 36
    by_hand = 6 * (query + key_and_value + output + mlp + head) + attention
    assert forward_flops(without_weights(tiny), [6]) == by_hand
    tiny.tie_word_embeddings = not tiny.tie_word_embeddings
    assert forward_flops(without_weights(tiny), [6]) == by_hand


@pytest.mark.parametrize("config, matrices", [
    # a layer of H = 8: query, key, value, output, and an MLP of two matrices; V = 20
    (GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16), 12 * 64),
    (GPTNeoXConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
                   intermediate_size=32), 12 * 64),
    (OPTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
               ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=16), 12 * 64),
], ids=["gpt2", "neox", "opt"])
def test_flops_of_other_architectures(config, matrices):
    """Whatever the names in a config; learned positions of GPT-2 and OPT are counted on top."""
    positions = 8 * {"gpt2": 16, "opt": 18}.get(config.model_type, 0)
    attention = 2 * 2 * 8 * 36
    by_hand = 6 * 2 * (2 * matrices + 8 * 20 + positions) + attention
    assert forward_flops(without_weights(config), [6]) == by_hand


@pytest.mark.parametrize("path, teacher, prefix, lam", [
    ("opd_4b", MIDDLE, "student", 1.0), ("opd_8b", BIG, "student", 1.0),
    ("sft_4b", MIDDLE, "teacher", 0.0), ("dagger_4b", MIDDLE, "student", 0.0),
    ("offline_4b", MIDDLE, "teacher", 1.0), ("mix_4b", MIDDLE, "student", 0.2),
    ("hard_sft_4b", None, "teacher", 0.0)])
def test_paper_settings(path, teacher, prefix, lam):
    cfg = load_config(train_distill.Config, [f"configs/{path}.py"])
    assert (cfg.teacher, cfg.prefix, cfg.reverse_weight) == (teacher, prefix, lam)
    assert cfg.trajectories == (None if prefix == "student" else "out/sample_4b")
    expected = {
        "learning_rate": 5e-7, "loss_norm": "sequence",
        "batch_size": 32, "max_steps": 1000, "warmup_steps": 50, "seed": 42,
        "temperature": 1.0, "top_p": 0.95, "top_k": 20, "max_new_tokens": 4096, "eval_every": 30,
        "save_every": 40, "keep": 10, "eval_temperature": 0.6, "eval_top_p": 0.95}
    assert {key: getattr(cfg, key) for key in expected} == expected


# ----------------------------------------------------------------------------------- the toy world

def digits_of(problem):
    return sorted(problem.removesuffix("?").split("+"))


def test_problems_are_the_shipped_ones():
    """The files are what toy.py makes; no sum is in two files, and every step of it is right."""
    files = toy.make_problems()
    sums = {}
    for name, rows in files.items():
        assert load_problems(f"data/toy/{name}.jsonl") == rows, f"{name}: run python data/toy.py"
        sums[name] = {tuple(digits_of(row["problem"])) for row in rows}
    for a, b in itertools.combinations(sums, 2):
        assert not sums[a] & sums[b]
    for row in itertools.chain(*files.values()):
        digits = digits_of(row["problem"])
        assert row["answer"] == str(sum(map(int, digits)) % 10)
        assert grade(row["solution"], row["answer"]) == (True, "same text")
        for line in row["solution"].split("\\boxed")[0].split("\n"):
            steps = [step for step in line.split(";") if step]  # such as 3+8=1
            assert sorted([steps[0][0], *(step[2] for step in steps)]) == digits
            assert all((int(step[0]) + int(step[2])) % 10 == int(step[4]) for step in steps)

    encoding = toy.make_encoding()
    lengths = sorted(len(encoding.encode(row["solution"])) + 1 for row in files["middle"])
    assert lengths[int(0.9 * len(lengths))] >= 6 * 16  # the longest tenth; a short horizon is 16


def test_prices_problems_are_the_shipped_ones():
    """As above, of the other toy world; a response has at least 13 times its first rung."""
    files = prices.make_problems()
    seen = set()
    for name, rows in files.items():
        assert load_problems(f"data/prices/{name}.jsonl") == rows, f"{name}: run data/prices.py"
        for row in rows:
            money, *things = row["problem"].removesuffix("?").split("+")
            assert frozenset(things) not in seen and len(set(things)) == len(things)
            seen.add(frozenset(things))
            for line in row["solution"].split("\\boxed")[0].split("\n"):
                steps = re.findall(r"([a-z])\+(\d)=(\d\d)", line)
                assert sorted(thing for thing, *_ in steps) == sorted(things)
                total = int(money)
                for thing, price, after in steps:
                    total = (total + int(price)) % 100
                    assert int(price) == prices.PRICES[thing] and int(after) == total
                assert int(row["answer"]) == total
            assert grade(row["solution"], row["answer"]) == (True, "same text")
    encoding = toy.make_encoding()
    shortest = min(len(encoding.encode(row["solution"])) + 1 for row in files["train"])
    rungs = runpy.run_path("configs/prices_curriculum.py")["horizons"]
    assert shortest >= 13 * rungs[0] and shortest > rungs[1] and shortest > rungs[2]
    assert runpy.run_path("configs/prices_cells.py")["max_new_tokens"] == rungs[-1]


def test_tokenizer_and_export_agree():
    """tiktoken, the exported tokenizer.json and a decode round trip, on 3,000 random strings."""
    encoding, rng = toy.make_encoding(), random.Random(0)
    tokenizers = [AutoTokenizer.from_pretrained(f"data/toy/{name}")
                  for name in ("student", "teacher")]
    pieces = ["\\boxed{", "\\boxed", "\\", "b", "{", "}", "é", "🙂", "\n", "\r\n", " ", "  ", "\t",
              "\u0300", "漢", "\x00", "3", "+", "<|im_end|>", "<|", "<|user|>", "|>"]

    def piece():
        return rng.choice(pieces) if rng.random() < 0.8 else chr(rng.randrange(0xD800))

    for _ in range(3000):
        text = "".join(piece() for _ in range(rng.randrange(25)))
        ids = encoding.encode(text, allowed_special="all")
        for tokenizer in tokenizers:
            assert tokenizer.encode(text, add_special_tokens=False) == ids
            assert tokenizer.decode(ids) == text
    assert encoding.n_vocab == 261
    assert encode_prompt(tokenizers[0], "3+4?") == [258, 51, 43, 52, 63, 259]


def test_toy_checkpoints(student, teacher, tokenizer):
    """Ordinary Qwen3 folders: small, padded to different sizes, two stop ids, 2 MB together."""
    assert type(student).__name__ == type(teacher).__name__ == "Qwen3ForCausalLM"
    assert [len(lm_head(model)) for model in (student, teacher)] == [272, 288]
    assert len(tokenizer) == 261
    assert 3 * student.num_parameters() <= teacher.num_parameters()
    assert stop_ids(student.generation_config, tokenizer) == [257]
    assert stop_ids(teacher.generation_config, tokenizer) == [260]
    for model in (student, teacher):
        assert model.config.head_dim == 32 and model.config.max_position_embeddings >= 2048
    assert sum(p.stat().st_size for p in Path("data/toy").glob("*/model.safetensors")) <= 2e6
    check_tokenizers(tokenizer, load_tokenizer("data/toy/teacher"), "a", "b")


def measure(model, tokenizer, problems, limit, samples):
    """`evaluate` at T = 1; either id ends a response."""
    engine = HFEngine(model, vocab_size=272, max_tokens=8192)
    held_out = [(row, encode_prompt(tokenizer, row["problem"])) for row in problems]
    return evaluate(engine, tokenizer, held_out, Sampling(limit, (257, 260)), samples, seed=0)[0]


def test_prices_leaves_room_for_each_claim(tokenizer):
    """
    What docs/results.md calls room, on the numbers that a run of cells.py begins with: no side of a
    claim begins at a bound, or reaches one if the student becomes its teacher.
    """
    cfg = runpy.run_path("configs/prices_cells.py")
    problems = load_problems(cfg["eval_data"])[:cfg["eval_prompts"]]
    limit = cfg["eval_max_new_tokens"]

    ours, theirs = (measure(load_model(f"data/prices/{name}", torch.float32), tokenizer, problems,
                            limit, cfg["eval_samples"]) for name in ("student", "teacher"))
    assert 0.1 <= ours["avg_at_k"] and theirs["avg_at_k"] <= 0.9
    assert theirs["avg_at_k"] - ours["avg_at_k"] >= 0.3
    assert 0.5 <= ours["pass_at_k"] <= 0.85 and theirs["pass_at_k"] <= 0.95
    assert theirs["pass_at_k"] - ours["pass_at_k"] >= 0.15
    assert min(ours["entropy"], theirs["entropy"]) >= 0.15
    assert max(ours["length"], theirs["length"]) <= 0.5 * limit


def test_toy_models_are_as_good_as_they_should_be(student, teacher, tokenizer):
    """Middle set at T = 1: the student has room to grow, the teacher has little."""
    problems = load_problems("data/toy/middle.jsonl")[:96]
    ours, theirs = (measure(model, tokenizer, problems, 256, 4) for model in (student, teacher))
    assert 0.2 <= ours["avg_at_k"] <= 0.5 and theirs["avg_at_k"] >= 0.95
    assert 0.8 < ours["stop_reasons"]["<|endoftext|>"] < 0.97  # a tenth ends as a chat
    assert theirs["stop_reasons"]["<|im_end|>"] > 0.9
    assert ours["entropy"] > theirs["entropy"]
    assert theirs["tokens_after_box"] == pytest.approx(3, abs=0.2)


def test_recipe_still_learns():
    """
    On two-digit sums the loss falls to the entropy of the data (order of two digits, passes), not
    just to that of single characters.
    """
    recipe = dict(toy.SPECS["student"], steps=120)
    _, loss = toy.pretrain(recipe, toy.sums((2,)), batch_size=32, learning_rate=4e-3)
    assert loss < 0.6


# --------------------------------------------------------------------- prompts and small things

def test_reads_gsm8k(tmp_path):
    path, worked = tmp_path / "g.jsonl", "6*7=<<6*7=42>>42\n#### 1,042"
    rows = [{"question": "How many?", "answer": worked}, {"problem": "x?", "answer": 27.0}]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    first, second = load_problems(path)
    assert first == {"problem": "How many?", "answer": "1,042", "solution": worked}
    assert second == {"problem": "x?", "answer": "27.0", "solution": None}
    assert grade("so it is #### 1042", first["answer"])[0]
    assert grade("\\boxed{27}", second["answer"])[0]


@pytest.mark.parametrize("line, expected", [
    ({"problem": "x?", "answer": "We get $\\boxed{\\frac{1}{2}}$."}, "\\frac{1}{2}"),
    ({"problem": "x?", "solution": "It is $\\boxed{7}$.", "level": 1}, "7"),
    ({"problem": "x?", "answer": "5", "solution": "It is $\\boxed{7}$."}, "5"),
    ({"problem": "x?", "answer": "", "solution": "It is $\\boxed{7}$."}, "7"),
    ({"problem": "x?", "answer": "\\boxed{7}", "solution": 42}, "7"),
    ({"problem": "x?", "answer": "\\boxed{1 \\\\\n 2}"}, "1 \\\\\n 2"),
    ({"problem": None, "question": "x?", "answer": 7}, "7"),
    ({"problem": "x?", "question": None, "answer": " 7 "}, "7"),
    ({"problem": "x?", "answer": "   "}, None),
])
def test_gold_answers(tmp_path, line, expected):
    """What is worked out is unpacked, a blank is none; the file may begin with a BOM."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(line), encoding="utf-8-sig")
    row, = load_problems(path)
    assert (row["problem"], row["answer"]) == ("x?", expected)
    assert row["solution"] is None or isinstance(row["solution"], str)
    if line.get("solution") == 42:
        assert row["solution"] == "42"                  # it is not replaced by the answer's text


@pytest.mark.parametrize("content, message", [
    (rb'[{"problem": "x?", "answer": "7"}]', "line 1: a JSON list; give one object on each line"),
    (rb'{"problem": "\frac{2}{4}?", "answer": "1"}', "line 1: '\\x0crac{2}{4}?' holds the control"),
    (rb'{"problem": "x?", "answer": "2\theta"}', "'2\\theta' holds the control character '\\t'"),
    (rb'{"problem": "x \ud800", "answer": "1"}', "line 1: 'utf-8' codec can't encode character"),
    (b"PAR1\x15\x89\x00", "must be text with {\"problem\": ..., \"answer\": ...} on each line"),
    (b"\x1f\x8b\x08\x00", "in UTF-8; unpack or convert it: "),
])
def test_what_is_no_problem_file(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        load_problems(path)
    assert load_problems("data/toy/middle.jsonl")       # a tab and line ends are usual in problems
    path.write_text(json.dumps({"problem": "f(x)\n{\n\treturn x;\r\n}", "answer": "7"}))
    assert load_problems(path)[0]["problem"].count("\t") == 1


def test_overlap_is_counted(capsys):
    rows = [{"problem": text} for text in ("What is 3 + 4?", "what is\n3+4?", "6?")]
    warn_of_overlap(rows[:1], rows)
    assert "warning: 2 of the 3 problems of the evaluation are also" in capsys.readouterr().out
    warn_of_overlap(rows[2:], rows[:2])
    assert capsys.readouterr().out == ""


def test_template_kwargs_are_kept(tmp_path):
    """They are defaults inside the template: saved with it, used by all, overridden by a caller."""
    tokenizer = load_tokenizer("data/toy/student")
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if enable_thinking %}<think>{% endif %}{{ mood }}")

    def asked(tokenizer, **options):
        messages = [{"role": "user", "content": "1"}]
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    tokenizer.save_pretrained(tmp_path / "a")
    plain = load_tokenizer(tmp_path / "a")
    assert asked(plain) == "1" and asked(plain, enable_thinking=True) == "1<think>"
    assert tokenizer.decode(encode_prompt(plain, "1")) == "1"
    moody = load_tokenizer(tmp_path / "a", {"enable_thinking": True, "mood": "+"})
    moody.save_pretrained(tmp_path / "b")
    for again in (moody, AutoTokenizer.from_pretrained(tmp_path / "b")):
        assert asked(again) == "1<think>+"
    assert load_tokenizer(tmp_path / "b").chat_template == moody.chat_template
    assert asked(load_tokenizer(tmp_path / "b", {"mood": "-"})) == "1<think>-"
    plain.save_pretrained(tmp_path / "c")
    thinking = load_tokenizer(tmp_path / "c", {"enable_thinking": True})
    assert asked(thinking) == "1<think>"
    thinking.save_pretrained(tmp_path / "c")
    assert asked(load_tokenizer(tmp_path / "c", {"enable_thinking": False})) == "1"
    moody.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="the chat template of .*b? ?.*fails: no"):
        encode_prompt(moody, "1")
    moody.chat_template = {"tool_use": "{{ messages }}"}
    with pytest.raises(UserError, match="the chat template of .* fails: "):
        encode_prompt(moody, "1")


@pytest.mark.parametrize("n, correct", [(5, 2), (6, 0), (4, 4), (8, 1)])
def test_pass_at_k(n, correct):
    """Against enumeration of all k-subsets."""
    verdicts = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        passed = [any(subset) for subset in itertools.combinations(verdicts, k)]
        assert pass_at_k(n, correct, k) == pytest.approx(sum(passed) / len(passed))
    with pytest.raises(ValueError, match=f"k={n + 1}: Pass@k needs 1 <= k <= n={n}"):
        pass_at_k(n, correct, n + 1)


def test_tokens_after_box(tokenizer):
    ids = tokenizer.encode("1+2=3;\\boxed{3}<|im_end|>zz", add_special_tokens=False)
    assert tokens_after_box(tokenizer, ids) == 5
    assert tokens_after_box(tokenizer, ids[:4]) is None


def test_deal(monkeypatch):
    """Every epoch is a permutation; a step needs none before it; ranks share its places."""
    def indices(step, size, seed=3):
        return [index for _, index, _ in deal(7, step, size, seed)]

    stream = indices(0, 21)
    assert all(sorted(stream[i:i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert stream[:7] != stream[7:14] and indices(0, 21, seed=4) != stream
    assert [i for step in range(7) for i in indices(step, 3)] == stream
    whole = deal(7, 2, 3, seed=3, group=4)
    assert [place for place, _, _ in whole] == list(range(12))
    assert [index for _, index, _ in whole] == [i for i in indices(2, 3) for _ in range(4)]
    assert len({seed for _, _, seed in whole}) == 12
    parts = []
    for rank in range(2):
        monkeypatch.setattr("data.problems.RANK", rank)
        monkeypatch.setattr("data.problems.WORLD", 2)
        parts += deal(7, 2, 3, seed=3, group=4)
    assert sorted(parts) == whole
