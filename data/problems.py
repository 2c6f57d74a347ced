"""
Problems, the prompts made of them, and which of the prompts a step of training has.

Problems are in JSONL files of one schema. data/benchmarks.py writes them from the original
benchmarks, data/toy.py for the toy world and data/smollm.py for a real model.
"""

import functools
import json
import random
import re
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from grade import extract_answer
from models import stop_ids
from utils import (
    RANK,
    WORLD,
    UserError,
    as_user_error,
    derive_seed,
    fingerprint,
    model_folder,
    print0,
)


def load_problems(path, answered=False):
    """
    Rows {"problem", "answer", "solution"} (str, str | None, str | None) of a JSONL file; "question"
    is another name of a problem. Where the answer is a worked solution, ending in GSM8K's "#### 42"
    or with MATH's \\boxed{42} in it, or where there is only such a solution, the answer is taken
    out of it, and it is the solution where there is no other. Blanks are nothing.

    Raises UserError that names the file, the line and the remedy, with `answered` also where a
    problem has no answer.
    """
    if not Path(path).is_file():
        raise UserError(
            f"no prompt file {path}: `python data/benchmarks.py {Path(path).stem}` makes it where "
            f"it is a benchmark, data/toy.py and data/smollm.py make those of their worlds"
        )
    with as_user_error(
        f'{path} must be text with {{"problem": ..., "answer": ...}} on each line, in UTF-8; '
        f"unpack or convert it"
    ):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        with as_user_error(f"{path}, line {number}"):
            if line.strip():
                rows.append(_row(json.loads(line)))
                if answered and not rows[-1]["answer"]:
                    raise ValueError("it has no answer to grade with; remove it")
    if not rows:
        raise UserError(f"{path} holds no problems")
    return rows


def _row(found):
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}; give one object on each line")
    json.dumps(found, ensure_ascii=False).encode()      # fails on half of a surrogate pair
    problem = found.get("problem") or found.get("question")
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f'no "problem" or "question" text; found the keys {sorted(found)}')
    texts = []
    for key in ("answer", "solution"):
        value = found.get(key)
        if isinstance(value, list | dict):
            raise ValueError(f"{key!r} must be text or a number")
        texts.append(None if value is None else str(value).strip() or None)
    answer, solution = texts
    worked = answer or solution or ""
    if "####" in worked or "\\boxed" in worked:
        answer, solution = extract_answer(worked), solution or worked
    # Tabs and line ends are usual in a problem; a tab in an answer was the head of \theta.
    eaten = re.search(r"[\0-\x08\x0b\x0c\x0e-\x1f]", problem) or re.search(
        r"[\0-\x09\x0b-\x1f]", answer or ""
    )
    if eaten:
        raise ValueError(
            f"{eaten.string[:40]!r} holds the control character {eaten.group()!r}: where it was a "
            f"backslash and a letter, JSON wants two backslashes, as in \\\\frac"
        )
    return {"problem": problem, "answer": answer, "solution": solution}


def warn_of_overlap(problems, held_out):
    """Say how many problems of the evaluation are trained on too, by text in normal form."""
    known = {_normal(row) for row in problems}
    shared = sum(_normal(row) in known for row in held_out)
    if shared:
        print0(
            f"warning: {shared} of the {len(held_out)} problems of the evaluation are also among "
            f"those to train on"
        )


def _normal(row):
    return "".join(row["problem"].lower().split())


def load_tokenizer(path, template_kwargs=None):
    """
    The tokenizer of a local folder or hub name. template_kwargs: variables for its chat template,
    which are written into it as defaults, so they go wherever the tokenizer is saved, and every
    program that uses it makes the same prompts. None: those that are there, else enable_thinking is
    False. Raises UserError when it is missing.
    """
    path = model_folder(path, "tokenizer_config.json")
    with as_user_error(f"cannot read a tokenizer in {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        kwargs = template_kwargs or {"enable_thinking": False}
        for key, value in kwargs.items() if tokenizer.chat_template else ():
            if_unset = f"{{% if {key} is not defined %}}"
            default = f"{if_unset}{{% set {key} = {json.dumps(value)} %}}{{% endif %}}"
            if template_kwargs or if_unset not in tokenizer.chat_template:
                tokenizer.chat_template = default + tokenizer.chat_template
        return tokenizer


def tokenizer_revision(tokenizer):
    """A fingerprint of its vocabulary and chat template."""
    return fingerprint(tokenizer.get_vocab() | {"chat_template": tokenizer.chat_template})


def check_tokenizers(a, b, whose, others):
    """
    UserError unless two tokenizers map the same ids to the same text. End-of-text id, template and
    padding of the embeddings may differ, and one may have added tokens that the other lacks.
    """
    texts = [tokenizer.convert_ids_to_tokens(range(len(tokenizer))) for tokenizer in (a, b)]
    for i, (ours, theirs) in enumerate(zip(*texts)):
        if ours != theirs:
            raise UserError(
                f"incompatible tokenizers: id {i} is {ours!r} for {whose} and "
                f"{theirs!r} for {others}; choose two models of one family"
            )


def encode_chat(tokenizer, messages):
    """Token ids of a conversation [{"role", "content"}] by the chat template, ready to answer."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; "
            f"add a chat_template.jinja beside it"
        )
    with as_user_error(f"the chat template of {tokenizer.name_or_path} fails"):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def adopt_template(tokenizer, path, kwargs):
    """
    Give the tokenizer the chat template of the model at `path`, as `load_tokenizer` makes it.
    Returns the ids that end a response of that model.
    """
    other = load_tokenizer(path, kwargs)
    check_tokenizers(tokenizer, other, "the model", f"template={path!r}")
    tokenizer.chat_template = other.chat_template
    with as_user_error(f"template={path!r}"):
        return stop_ids(GenerationConfig.from_pretrained(model_folder(path)), other)


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
    skipped = len(prompts) - len(usable)
    if skipped:
        print0(f"warning: {path}: {skipped} of {len(prompts)} prompts skipped: they {limit}")
    return usable


def deal(n, step, size, seed, group=1):
    """
    This rank's share of a training step, [(place, index of the prompt, seed)]. A step has `group`
    responses to each of `size` prompts, and `place` is a response's number among them. Prompts come
    from an endless stream of epochs, each a permutation of range(n). Index and seed follow from
    step and place alone, so there is no cursor to save, and a step is the same on any number of
    ranks.
    """
    dealt = []
    for place in range(RANK, size * group, WORLD):
        epoch, i = divmod(step * size + place // group, n)
        index = _epoch(n, seed, epoch)[i]
        dealt.append((place, index, derive_seed(seed, "train", step, place)))
    return dealt


@functools.lru_cache(maxsize=2)
def _epoch(n, seed, epoch):
    return random.Random(derive_seed(seed, "epoch", epoch)).sample(range(n), n)
