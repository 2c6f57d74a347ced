"""
What holds the house: how much there is to read, who may import whom, and keys that nobody reads.

Reading is counted in code tokens: Python's, without comments, docstrings and layout. White space is
free, so a line holds one thought.
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

import engine
import eval_math
import rl_grpo
import sample
import train_distill
import utils

BUDGETS = {"utils.py": 3450, "models.py": 1250, "engine.py": 3000, "grade.py": 2900,
           "trajectories.py": 1300,
           "train_distill.py": 3900, "rl_grpo.py": 3200, "sample.py": 2100, "eval_math.py": 2400}
PROMPTS = "data/problems.py"  # files of problems and their prompts; it counts in the sum too
PROMPTS_BUDGET = 1000
KERNELS = ["kernels/linear_kl.py", "kernels/linear_logp.py", "kernels/cpu.py"]
KERNELS_BUDGET = 4300
ALL_BUDGET = 27_000
LONGEST_FUNCTION = 1500

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}
FOLDERS = [".", "configs", "data", "kernels", "tests"]
SOURCES = sorted(path for folder in FOLDERS for path in Path(folder).glob("*.py"))


def code_tokens(source):
    tree, docstring_lines = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstring_lines.update(range(first.lineno, first.end_lineno + 1))
    tokens, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]  # Python 3.12 takes an f-string apart, 3.11 does not
        depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        inside = depth > 0 or kind == "FSTRING_START"
        if token.type not in LAYOUT and token.start[0] not in docstring_lines and not inside:
            tokens.append(token)
    return tokens


def count(path):
    return len(code_tokens(Path(path).read_text()))


def test_how_tokens_are_counted():
    source = '"""Free."""\nx = f(1)  # free\n\n\ndef g(y):\n    """Free."""\n    return y\n'
    assert len(code_tokens(source)) == len("x = f ( 1 ) def g ( y ) : return y".split())


@pytest.mark.parametrize("path", BUDGETS)
def test_budget_of_a_file(path):
    tokens = count(path)
    assert tokens <= BUDGETS[path], f"{path}: {tokens} code tokens; what comes in pushes out"


def test_budget_of_the_prompts():
    assert count(PROMPTS) <= PROMPTS_BUDGET


def test_budget_of_all():
    kernels = sum(map(count, KERNELS))
    assert kernels <= KERNELS_BUDGET
    assert sum(map(count, [*BUDGETS, PROMPTS])) + kernels <= ALL_BUDGET


@pytest.mark.parametrize("path", [*BUDGETS, *KERNELS])
def test_functions_and_lines(path):
    """The longest function, with those inside it; and the mean width of a line that has code."""
    source = Path(path).read_text()
    tokens, lines = code_tokens(source), source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            size = sum(node.lineno <= token.start[0] <= node.end_lineno for token in tokens)
            assert size <= LONGEST_FUNCTION, f"{path}: {node.name} has {size} code tokens"
    widths = [len(lines[number - 1]) for number in {token.start[0] for token in tokens}]
    assert sum(widths) / len(widths) <= 50, f"{path}: mean width of a line"


def test_at_most_100_columns():
    long = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text().split("\n"), 1):
            if len(line) > 100:
                long.append(f"{path}:{number}")
    assert not long


# ----------------------------------------------------------------------------------------- imports

STAGES = {"train_distill", "rl_grpo", "sample", "eval_math"}
TO_A_STAGE = {"data", "grade", "trajectories", "engine", "models", "utils", "kernels"}
MAY_IMPORT = {
    "utils": set(),
    "models": {"utils", "kernels"},
    "engine": {"models", "utils", "kernels"},
    "grade": {"engine", "utils", "kernels"},
    "trajectories": {"models", "utils"},
    **{stage: TO_A_STAGE for stage in STAGES},
    "eval_math": {*TO_A_STAGE, "plot"},  # for its table and intervals
    "cells": {"plot", "configs"},  # it starts stages as programs
    "stops": {"cells", "plot"},
    "plot": {"utils"},
    "estimate": {"train_distill", "rl_grpo", *TO_A_STAGE},  # for their configs
}


def imported_by(path):
    """The first parts of the names of modules, wherever in the file they are imported."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way():
    scripts = {path.stem: path for path in Path(".").glob("*.py")}
    assert set(scripts) == set(MAY_IMPORT)
    ours = {*scripts, *FOLDERS[1:]}
    for name, path in scripts.items():
        assert imported_by(path) & ours <= MAY_IMPORT[name], name
    for path in Path("kernels").glob("*.py"):
        assert imported_by(path) & ours <= {"kernels"}, path
    assert imported_by(Path("data/problems.py")) & ours == {"grade", "models", "utils"}


# -------------------------------------------------------------------------------------------- keys

@pytest.mark.parametrize("stage", [train_distill, rl_grpo, sample, eval_math],
                         ids=lambda stage: stage.__name__)
def test_every_config_key_is_read(stage):
    """By the stage, or by what it calls with its whole config; a check of ranges is no reading."""
    readers = inspect.getsource(engine.make_engine)
    if stage in (train_distill, rl_grpo):
        for function in (utils.start_run, utils.open_run, utils.save_checkpoint, utils.update):
            readers += inspect.getsource(function)
    script = inspect.getsource(stage).replace(inspect.getsource(stage.Config), "")
    if hasattr(stage, "validate"):
        script = script.replace(inspect.getsource(stage.validate), "")
    read = set(re.findall(r"\bcfg\.(\w+)", script + readers))
    keys = {field.name for field in dataclasses.fields(stage.Config)}
    assert keys - read == set()
