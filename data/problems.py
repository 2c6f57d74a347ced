"""
The problems that prompts are made of: JSONL files of one schema, which
data/benchmarks.py writes from the original benchmarks and data/toy.py for the toy world.
"""

import json
from pathlib import Path

from utils import as_user_error


def load_problems(path, answered=False):
    """
    Rows {"problem", "answer", "solution"} (str, str | None, str | None) of a JSONL file. GSM8K's
    {"question", "answer"}, whose answer is a worked solution ending in "#### 42", is read as well.
    Raises UserError that names the file and the line, with `answered` also where one has no answer.
    """
    with as_user_error(
        f'cannot read problems, {{"problem": ..., "answer": ...}} on each line, from {path}'
    ):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        if not any(map(str.strip, lines)):
            raise ValueError("it holds no problems")
    rows = []
    for number, line in enumerate(lines, 1):
        with as_user_error(f"{path}, line {number}"):
            if not line.strip():
                continue
            row = dict(json.loads(line))
            problem = row.get("problem", row.get("question"))
            answer, solution = row.get("answer"), row.get("solution")
            if not isinstance(problem, str) or not problem.strip():
                raise ValueError(f'no "problem" or "question" text; found the keys {sorted(row)}')
            if isinstance(answer, list | dict) or isinstance(solution, list | dict):
                raise ValueError('"answer" and "solution" must be text or a number')
            if isinstance(answer, str) and "####" in answer:
                solution, answer = answer, answer.split("####")[-1].strip()
            answer = None if answer is None else str(answer)
            if answered and not answer:
                raise ValueError("it has no answer to grade with; remove it")
            rows.append({"problem": problem, "answer": answer, "solution": solution})
    return rows
