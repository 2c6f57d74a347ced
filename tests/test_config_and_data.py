"""The config loader, every config file, the toy world and its tokenizer, prompts, the grader, the paper's FLOPs."""

import ast
import dataclasses
import inspect
import json
import random
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import eval_math
import grade
import rl_grpo
import sample
import train_distill
import utils
from data import toy
from engine import HFEngine, Sampling, make_engine
from utils import UserError

# ------------------------------------------------------------------------------------------------------------- config loader


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
    return utils.load_config(Small, [str(tmp_path / "c.py"), *options])


def test_config_precedence_and_types(tmp_path):
    cfg, origin = load(tmp_path, "import math\n_base = 2\nsteps = _base * 2\nrate = 1\nkind = 'y'\n", "--steps=7", "--flag",
                       "--teacher=None", "--name=42", "--ladder=(128, 256)")
    assert cfg == Small(rate=1.0, steps=7, name="42", teacher=None, flag=True, ladder=(128, 256), kind="y")
    assert type(cfg.rate) is float and origin["steps"] == "command line" and origin["rate"].endswith("c.py")
    assert load(tmp_path, "from configs.opd_4b import seed as _s\nflag = True", "--flag=False")[0].flag is False


@pytest.mark.parametrize("text, options, message", [
    ("stepz = 3", [], r"c.py: unknown key 'stepz'; did you mean 'steps'"),
    ("", ["--stpes=3"], "command line: unknown key 'stpes'; did you mean 'steps'"),
    ("steps = 1.5", [], "steps=1.5 is a float; steps must be int"),
    ("steps = True", [], "steps=True is a bool; steps must be int"),
    ("flag = 1", [], "flag=1 is a int; flag must be bool"),
    ("rate = None", [], "rate must be float"),
    ("", ["--steps"], "steps=True"),
    ("", ["--steps=ten"], "steps='ten' is a str"),
    ("", ["--kind=z"], "kind must be 'x' | 'y'"),
    ("x = (", [], r"c.py, line 1: SyntaxError"),
    ("steps = 1\nrate = 1 / 0", [], r"c.py, line 2: ZeroDivisionError"),
    ("from configs.nothing import *", [], "c.py, line 1: ModuleNotFoundError"),
])
def test_config_mistakes(tmp_path, text, options, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as caught:
        load(tmp_path, text, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads(path):
    if "sample" in path.stem:
        cfg, _ = utils.load_config(sample.Config, [str(path)])
        sample.validate(cfg)
    elif "eval" in path.stem:
        cfg, _ = utils.load_config(eval_math.Config, [str(path)])
        eval_math.validate(cfg)
    elif "grpo" in path.stem:
        cfg, _ = utils.load_config(rl_grpo.Config, [str(path)])
        rl_grpo.validate(cfg, 8)
    else:
        cfg, _ = utils.load_config(train_distill.Config, [str(path)])
        train_distill.validate(cfg, 1)
        train_distill.validate(cfg, 8)
    assert cfg.out_dir == f"out/{path.stem}"


def test_every_key_is_read():
    """No config key that nobody reads."""
    for script in (train_distill, sample, eval_math, rl_grpo):
        source = Path(script.__file__).read_text()
        loop = source[source.index("def load_benchmarks" if script is eval_math else "def main"):]
        for field in dataclasses.fields(script.Config):
            assert f"cfg.{field.name}" in loop + inspect.getsource(make_engine), field.name


def test_batch_not_divisible():
    cfg = train_distill.Config(batch_size=30)
    with pytest.raises(UserError, match="batch_size=30: must be a positive multiple of the 8 processes; try 24"):
        train_distill.validate(cfg, 8)


# ------------------------------------------------------------------------------------------------------------- paper configs

QWEN3 = {"Qwen/Qwen3-0.6B-Base": (1024, 28, 3072, 16, True), "Qwen/Qwen3-4B": (2560, 36, 9728, 32, True),
         "Qwen/Qwen3-8B": (4096, 36, 12288, 32, False)}


def qwen3(name, heads=None, head_dim=128, kv_heads=8):
    hidden, layers, inner, real_heads, tied = QWEN3[name]
    return Qwen3Config(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, vocab_size=151936,
                       head_dim=head_dim, num_attention_heads=heads or real_heads, num_key_value_heads=kv_heads,
                       tie_word_embeddings=tied, max_position_embeddings=40960)


@pytest.mark.parametrize("name, parameters", [("Qwen/Qwen3-0.6B-Base", 596_049_920), ("Qwen/Qwen3-4B", 4_022_468_096),
                                              ("Qwen/Qwen3-8B", 8_190_735_360)])
def test_paper_models_on_meta(name, parameters):
    """The real shapes: parameter counts as published, heads our loss can use, under 10 GB for 0.6B masters and Adam."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(qwen3(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    utils.check_head(model, name)
    assert model.get_output_embeddings().weight.shape == (151936, QWEN3[name][0])
    if "0.6B" in name:
        assert parameters * 4 * 4 < 10e9                 # weights, gradient, two moments in fp32


def test_paper_flops():
    """Appendix H.1: B 32, P 92, R 128. The paper has heads x head_dim = H, full attention in F, causal in G: within 1 %."""
    lengths = [220] * 32
    as_paper = {"Qwen/Qwen3-0.6B-Base": qwen3("Qwen/Qwen3-0.6B-Base", heads=8, kv_heads=8),
                "Qwen/Qwen3-4B": qwen3("Qwen/Qwen3-4B", heads=20)}
    causal = [utils.forward_flops(c, lengths) / 1e12 for c in as_paper.values()]
    F_s, F_t = (forward + sum(2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * n * n for n in lengths) / 1e12
                for forward, c in zip(causal, as_paper.values()))        # a token attends to all, not to half, on average
    assert causal[0] == pytest.approx(7.66, rel=0.002) and F_t == pytest.approx(53.13, rel=0.01)
    assert 3 * F_s == pytest.approx(23.19, rel=0.01)                     # cached teacher prefixes
    assert causal[0] + F_t + 3 * F_s == pytest.approx(83.98, rel=0.01)   # student prefixes
    assert (causal[0] + F_t + 3 * F_s) / (3 * F_s) == pytest.approx(3.62, rel=0.01)
    # what metrics.jsonl counts: the real shapes (16 heads x 128 = 2048 != H = 1024), causal attention everywhere
    real_s, real_t = (utils.forward_flops(qwen3(name), lengths) / 1e12 for name in as_paper)
    head = 2 * 32 * 128 * 2560 * 151936 / 1e12                           # a cached teacher's head, at response tokens
    assert (real_s, real_t, head) == pytest.approx((8.57, 57.09, 3.19), rel=0.002)
    assert (4 * real_s + real_t) / (3 * real_s) == pytest.approx(3.55, rel=0.002)
    assert (4 * real_s + real_t) / (3 * real_s + head) == pytest.approx(3.16, rel=0.002)
    # by hand: q, k, v and output projections, MLP, LM head, then causal attention
    tiny = Qwen3Config(hidden_size=4, num_hidden_layers=1, intermediate_size=3, vocab_size=10, head_dim=2,
                       num_attention_heads=2, num_key_value_heads=1)
    assert utils.forward_flops(tiny, [6]) == 6 * (2 * 4 * (4 + 4) + 2 * 4 * 4 + 6 * 4 * 3 + 2 * 4 * 10) + 2 * 4 * 36


@pytest.mark.parametrize("path, teacher, prefix, lam", [
    ("opd_4b", "4B", "student", 1.0), ("opd_8b", "8B", "student", 1.0), ("sft_4b", "4B", "teacher", 0.0),
    ("dagger_4b", "4B", "student", 0.0), ("offline_4b", "4B", "teacher", 1.0), ("mix_4b", "4B", "student", 0.2),
    ("hard_sft_4b", None, "teacher", 0.0)])
def test_paper_settings(path, teacher, prefix, lam):
    cfg, _ = utils.load_config(train_distill.Config, [f"configs/{path}.py"])
    assert (cfg.teacher, cfg.prefix, cfg.reverse_weight) == (teacher and f"Qwen/Qwen3-{teacher}", prefix, lam)
    assert cfg.trajectories == (None if prefix == "student" else "out/sample_4b")
    assert (cfg.learning_rate, cfg.batch_size, cfg.max_steps, cfg.warmup_steps, cfg.seed) == (5e-7, 32, 1000, 50, 42)
    assert (cfg.temperature, cfg.top_p, cfg.top_k, cfg.max_new_tokens) == (1.0, 0.95, 20, 4096)
    assert (cfg.eval_every, cfg.save_every, cfg.keep, cfg.eval_temperature, cfg.eval_top_p) == (30, 40, 10, 0.6, 0.95)


# ------------------------------------------------------------------------------------------------------------- the toy world

def test_problems_are_the_shipped_ones():
    files = toy.make_problems()
    for name, rows in files.items():
        assert utils.load_problems(f"data/toy/{name}.jsonl") == rows, f"{name}.jsonl: run python data/toy.py"
    digits = {name: {tuple(sorted(r["problem"][:-1].split("+"))) for r in rows} for name, rows in files.items()}
    for a in digits:
        assert all(not digits[a] & digits[b] for b in digits if b != a)
    for rows in files.values():
        for row in rows:
            assert row["answer"] == str(sum(map(int, row["problem"][:-1].split("+"))) % 10)
            assert grade.grade(row["solution"], row["answer"]) == (True, "same text")
            for line in row["solution"].split("\\boxed")[0].split("\n"):
                steps = [step for step in line.split(";") if step]
                assert sorted([steps[0][0], *(step[2] for step in steps)]) == sorted(row["problem"][:-1].split("+"))
                assert all((int(s[0]) + int(s[2])) % 10 == int(s[4]) for s in steps)
    tok = toy.make_encoding()
    lengths = sorted(len(tok.encode(row["solution"])) + 1 for row in files["middle"])
    assert lengths[int(0.9 * len(lengths))] >= 6 * 16    # the longest tenth against a short horizon of 16


def test_tokenizer_and_export_agree():
    """tiktoken, the exported tokenizer.json and a decode round trip, on 3,000 random strings."""
    encoding, rng = toy.make_encoding(), random.Random(0)
    tokenizers = [AutoTokenizer.from_pretrained(f"data/toy/{name}") for name in ("student", "teacher")]
    pieces = ["\\boxed{", "\\boxed", "\\", "b", "{", "}", "é", "🙂", "\n", "\r\n", " ", "  ", "\t", "\u0300", "漢", "\x00",
              "3", "+", "<|im_end|>", "<|", "<|user|>", "|>"]
    for _ in range(3000):
        text = "".join(rng.choice(pieces) if rng.random() < 0.8 else chr(rng.randrange(0xD800))
                       for _ in range(rng.randrange(25)))
        ids = encoding.encode(text, allowed_special="all")
        for tok in tokenizers:
            assert tok.encode(text, add_special_tokens=False) == ids and tok.decode(ids) == text
    assert encoding.n_vocab == 261 and utils.encode_prompt(tokenizers[0], "3+4?") == [258, 51, 43, 52, 63, 259]


def test_toy_checkpoints(student, teacher, tokenizer):
    """Ordinary Qwen3 folders: small, padded to different sizes, two stop ids, at most a third, 2 MB together."""
    assert type(student).__name__ == type(teacher).__name__ == "Qwen3ForCausalLM"
    sizes = [len(m.get_output_embeddings().weight) for m in (student, teacher)]
    assert sizes == [272, 288] and len(tokenizer) == 261
    assert 3 * student.num_parameters() <= teacher.num_parameters()
    assert utils.stop_ids(student.generation_config, tokenizer) == [257]
    assert utils.stop_ids(teacher.generation_config, tokenizer) == [260]
    assert all(m.config.head_dim == 32 and m.config.max_position_embeddings >= 2048 for m in (student, teacher))
    assert sum(p.stat().st_size for p in Path("data/toy").glob("*/model.safetensors")) <= 2e6
    utils.check_tokenizers(tokenizer, utils.load_tokenizer("data/toy/teacher"), "a", "b")


def test_toy_models_are_as_good_as_they_should_be(student, teacher, tokenizer):
    """Middle set at T = 1: the student has room to grow, the teacher has little."""
    problems = utils.load_problems("data/toy/middle.jsonl")[:96]
    encoded = [utils.encode_prompt(tokenizer, p["problem"]) for p in problems]
    sampling = Sampling(256, (257, 260), vocab_size=272)
    scores = [grade.evaluate(HFEngine(m), m, tokenizer, problems, encoded, sampling, 4, 0, 8192)[0]
              for m in (student, teacher)]
    assert 0.2 <= scores[0]["avg_at_k"] <= 0.5 and scores[1]["avg_at_k"] >= 0.95
    assert 0.8 < scores[0]["stop_reasons"]["<|endoftext|>"] < 0.97       # a tenth ends as a chat
    assert scores[1]["stop_reasons"]["<|im_end|>"] > 0.9
    assert scores[0]["entropy"] > scores[1]["entropy"] and scores[1]["tokens_after_box"] == pytest.approx(3, abs=0.2)


def test_recipe_still_learns():
    """On two-digit sums: the loss falls to the entropy of the data (order of two digits, passes), not just to unigrams."""
    spec = dict(toy.SPECS["student"], steps=120)
    _, loss = toy.pretrain(spec, batch_size=32, digits=(2,), learning_rate=4e-3)
    assert loss < 0.6


# --------------------------------------------------------------------------------------------- prompts, grading, small things

def test_reads_gsm8k(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "6*7=<<6*7=42>>42\n#### 1,042"}) + "\n\n"
                    + json.dumps({"problem": "x?", "answer": 27.0}) + "\n")
    rows = utils.load_problems(path)
    assert rows[0] == {"problem": "How many?", "answer": "1,042", "solution": "6*7=<<6*7=42>>42\n#### 1,042"}
    assert rows[1]["answer"] == "27.0" and len(rows) == 2
    assert grade.grade("so it is #### 1042", rows[0]["answer"])[0] and grade.grade("\\boxed{27}", rows[1]["answer"])[0]


def test_pass_at_k():
    """Against enumeration of all k-subsets."""
    import itertools
    for n, c in [(5, 2), (6, 0), (4, 4), (8, 1)]:
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert grade.pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    with pytest.raises(ValueError, match="k=9: Pass@k needs 1 <= k <= n=8"):
        grade.pass_at_k(8, 3, 9)


def test_tokens_after_box(tokenizer):
    ids = tokenizer.encode("1+2=3;\\boxed{3}<|im_end|>zz", add_special_tokens=False)
    assert grade.tokens_after_box(tokenizer, ids) == 5 and grade.tokens_after_box(tokenizer, ids[:4]) is None


def test_prompt_order():
    """Every epoch is a permutation, and any window can be had without the ones before it."""
    stream = utils.prompt_order(7, 0, 21, seed=3)
    assert all(sorted(stream[i:i + 7]) == list(range(7)) for i in (0, 7, 14)) and stream[:7] != stream[7:14]
    assert utils.prompt_order(7, 5, 9, seed=3) == stream[5:14] and utils.prompt_order(7, 0, 21, seed=4) != stream


def test_stages_import_only_utils_and_kernels():
    ours = {p.stem for p in Path(".").glob("*.py")} | {"configs", "data", "tests", "kernels"}
    for path in Path(".").glob("*.py"):
        imported = {(node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
                    for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
                    for alias in node.names}
        allowed = {"plot", "configs"} if path.name == "cells.py" else {"utils", "kernels", "engine", "grade", "trajectories"}         # it only starts stages
        assert imported & ours <= allowed, path


@pytest.mark.parametrize("path, budget", [("utils.py", 1460), ("train_distill.py", 505), ("sample.py", 380),
                                          ("eval_math.py", 380), ("rl_grpo.py", 380), ("kernels/linear_kl.py", 250)])
def test_line_budgets(path, budget):
    assert sum(bool(line.strip()) for line in Path(path).read_text().splitlines()) <= budget
