"""
A second toy world, for the paper's comparisons: in it none of the claims is decided before the run.

    python data/prices.py              # problems and tokenizers, a second; compare with git diff
    python data/prices.py --rebuild    # teacher and base student too, about 30 minutes on 2 cores

A shop has 80 things, a1 to p5, and a model has to know by heart what each costs, 1 to 9. A problem
is a sum of money and twelve to fourteen things: "47+k7+b2+d0?" (with three). A solution takes the
things in any order; a step is a thing, its price, and the sum so far modulo 100:

    k7+4=51b2+3=54d0+9=63\\boxed{63}
    d0+9=56b2+3=59k7+4=63\\boxed{63}

So every step is the same operation, and seven tokens of a response teach something that counts in all
of it. A thing whose price a model does not know is in every solution of a problem, whatever the
order: so some problems are out of its reach, and Pass@k is less than 1. Such things were in its
pretraining with a right and a wrong price, in a proportion of their own, for each thing and model.
The teacher has some, too.

The script writes, under data/prices/: train.jsonl and test.jsonl, no problem of which has the same
things; teacher/ and student/. Tokenizer, stop ids and padding are those of data/toy.py.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a program, it finds the repository
import kernels  # noqa: E402, F401  (before transformers, which looks for a package of that name)
from data import toy  # noqa: E402

ROOT = Path(__file__).parent / "prices"
SEED = 42
LETTERS = "abcdefghijklmnop"
THINGS = [f"{letter}{digit}" for letter in LETTERS for digit in range(1, 6)]
COUNTS = range(12, 15)              # of things in a problem; in pretraining also fewer
PRETRAINING_COUNTS = range(2, 15)
UNSURE = {"student": 16, "teacher": 6}  # how many things a model knows the price of in part

SPECS = {
    "student": dict(
        toy.SPECS["student"],
        hidden_size=96,
        num_key_value_heads=3,
        vocab_size=528,
        steps=2400,
    ),
    "teacher": dict(
        toy.SPECS["teacher"],
        vocab_size=544,
        steps=2000,
    ),
}


def make_prices(seed=SEED):
    """
    ({thing: price}, {thing: wrong price}, {model: {thing: the chance that a document of its
    pretraining has the right price}}).
    """
    rng = random.Random(seed)
    prices = {}
    wrong = {}
    for thing in THINGS:
        prices[thing], wrong[thing] = rng.sample(range(1, 10), 2)
    known = {}
    for name, count in UNSURE.items():
        known[name] = dict.fromkeys(THINGS, 1.0)
        for thing in rng.sample(THINGS, count):
            known[name][thing] = rng.random()
    return prices, wrong, known


PRICES, WRONG, KNOWN = make_prices()


def draw_problem(rng, counts=COUNTS):
    """(sum of money, things), no two of one letter."""
    letters = rng.sample(LETTERS, rng.choice(counts))
    return rng.randrange(100), [f"{letter}{rng.randint(1, 5)}" for letter in letters]


def text_of(money, things):
    return "+".join([f"{money:02d}", *things]) + "?"


def solve(money, things, rng, prices=PRICES):
    """One random solution."""
    total = money
    steps = []
    for thing in rng.sample(things, len(things)):
        total = (total + prices[thing]) % 100
        steps.append(f"{thing}+{prices[thing]}={total:02d}")
    return "".join(steps) + f"\\boxed{{{total:02d}}}"


def make_problems(train=3000, test=256, seed=SEED):
    """{file name: rows}; no two problems have the same things."""
    rng = random.Random(seed)
    files = {}
    used = set()
    for name, size in (("test", test), ("train", train)):
        files[name] = rows = []
        while len(rows) < size:
            money, things = draw_problem(rng)
            if frozenset(things) in used:
                continue
            used.add(frozenset(things))
            rows.append({
                "problem": text_of(money, things),
                "answer": f"{(money + sum(PRICES[thing] for thing in things)) % 100:02d}",
                "solution": solve(money, things, rng)})
    return files


def documents(name):
    """For `toy.pretrain`: what the model of this name is trained on."""
    held_out = {frozenset(row["problem"][:-1].split("+")[1:]) for row in make_problems()["test"]}
    known = KNOWN[name]

    def draw(rng):
        money, things = draw_problem(rng, PRETRAINING_COUNTS)
        if frozenset(things) in held_out:
            return None
        prices = {thing: (PRICES if rng.random() < known[thing] else WRONG)[thing]
                  for thing in things}
        return text_of(money, things), solve(money, things, rng, prices)

    return draw


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="train teacher and base student again"
    )
    args = parser.parse_args()

    ROOT.mkdir(exist_ok=True)
    for name, rows in make_problems().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (ROOT / f"{name}.jsonl").write_text("".join(lines))

    torch.set_num_threads(1)        # the same rounding, so the same weights, on any number of cores
    for name, spec in SPECS.items():
        if args.rebuild:
            model, _ = toy.pretrain(spec, documents(name))
            model.to(torch.bfloat16).save_pretrained(ROOT / name)
        toy.export_tokenizer(toy.make_encoding(), spec["stop"]).save_pretrained(ROOT / name)


if __name__ == "__main__":
    main()
