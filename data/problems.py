"""
Problems and the prompts made of them. Problems are in JSONL files of one schema, which
data/benchmarks.py writes from the original benchmarks and data/toy.py for the toy world.
"""

import json
from pathlib import Path

from utils import UserError, as_user_error, print0


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


def encode_chat(tokenizer, messages):
    """Token ids of a conversation [{"role", "content"}] by the chat template, ready to answer."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; "
            f"add a chat_template.jinja beside it"
        )
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    return tokenizer.encode(text, add_special_tokens=False)


def encode_prompt(tokenizer, problem):
    """Token ids of one user message, ready to be answered."""
    return encode_chat(tokenizer, [{"role": "user", "content": problem}])


def usable_prompts(path, problems, tokenizer, horizon, positions, vocab_size):
    """
    {index: prompt ids} of the problems that leave room for `horizon` new tokens among `positions`;
    the others are counted in a warning. UserError where none does, or an id is past the vocabulary.
    """
    prompts = [encode_prompt(tokenizer, row["problem"]) for row in problems]
    usable = {i: ids for i, ids in enumerate(prompts) if len(ids) + horizon <= positions}
    limit = f"pass max_position_embeddings={positions} with {horizon} new tokens"
    if not usable:
        raise UserError(
            f"{path}: no usable prompt: {min(map(len, prompts))} tokens and more {limit};"
            f" lower max_new_tokens, eval_max_new_tokens or horizons"
        )
    largest = max(map(max, usable.values()))
    if largest >= vocab_size:
        raise UserError(
            f"{path}: the chat template writes id {largest}, the smaller vocabulary "
            f"ends at {vocab_size - 1}; choose models of one family"
        )
    if len(usable) < len(prompts):
        skipped = len(prompts) - len(usable)
        print0(f"warning: {path}: {skipped} of {len(prompts)} prompts skipped: they {limit}")
    return usable
