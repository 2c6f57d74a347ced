"""
A second toy world, for the paper's comparisons: none of their claims is decided before the run.

    python data/prices.py              # problems and tokenizers, a second; compare with git diff
    python data/prices.py --rebuild    # teacher and base student too, about 10 minutes on a core

A shop has 26 things, a to z, and a model has to know by heart what each costs, 1 to 9. A problem
is a sum of money and six or seven things: "47+k+b+d?" (here three, for short). A solution adds
their prices one at a time, modulo 100, in any order, and does it all again in another:

    k+4=51b+5=56d+2=58
    d+2=49k+4=53b+5=58\\boxed{58}

Every step is the same operation, so a prefix of one step, six tokens, teaches something that
counts in the 12 or 14 steps of a response. Some things had a right and a wrong price in
pretraining, each with a chance of its own (UNSURE). A problem with several of them is rarely
solved, so Pass@k stays below 1. The teacher, too, is unsure of four, which bounds what imitation
can reach. Lengths are the same for all who solve a problem: they differ where responses do not end.

The script writes, under data/prices/: train.jsonl and test.jsonl, no two problems of which have the
same things; teacher/ and student/. Tokenizer, stop ids and padding are those of data/toy.py. After
a change to prices or problems give --rebuild. Weights repeat on the same CPU and torch.
"""

import math
import random
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a program, it finds the repository
import kernels  # noqa: E402, F401  (before transformers, which imports a package of that name)
from data import toy  # noqa: E402

ROOT = Path(__file__).parent / "prices"
SEED = 42
THINGS = string.ascii_lowercase
COUNTS = (6, 7)                     # of things in a problem; in pretraining also fewer
PRETRAINING_COUNTS = range(2, max(COUNTS) + 1)
PASSES = 2
# The chances that a document has the right price, of the things that a model knows in part. They
# are drawn in turn: after a change to the student's, rebuild the teacher too.
UNSURE = {"student": (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95),
          "teacher": (0.15, 0.15, 0.85, 0.85)}

# As in data/toy.py, but the student trains longer: its room is in the prices.
SPECS = {
    "student": dict(toy.SPECS["student"], steps=3500),
    "teacher": toy.SPECS["teacher"],
}
BATCH_SIZE = 32
LEARNING_RATE = 3e-3


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
    for name, chances in UNSURE.items():
        things = rng.sample(THINGS, len(chances))
        known[name] = dict.fromkeys(THINGS, 1.0) | dict(zip(things, chances))
    return prices, wrong, known


PRICES, WRONG, KNOWN = make_prices()


def draw_problem(rng, counts=COUNTS):
    """(sum of money, things)."""
    return rng.randrange(100), rng.sample(THINGS, rng.choice(counts))


def text_of(money, things):
    return "+".join([f"{money:02d}", *things]) + "?"


def solve(money, things, rng, prices=PRICES):
    """One random solution."""
    passes = []
    for _ in range(PASSES):
        total = money
        steps = []
        for thing in rng.sample(things, len(things)):
            total = (total + prices[thing]) % 100
            steps.append(f"{thing}+{prices[thing]}={total:02d}")
        passes.append("".join(steps))
    return "\n".join(passes) + f"\\boxed{{{total:02d}}}"


def make_problems(train=3000, test=256, seed=SEED):
    """{file name: rows}; no two problems have the same things."""
    sets = sum(math.comb(len(THINGS), count) for count in COUNTS)
    if train + test > sets / 2:
        raise ValueError(
            f"{train + test} problems of {COUNTS} things each: there are {sets} sets of these, and "
            f"drawing more than half of them takes long; add THINGS, or make fewer problems")
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
    """
    What the model of this name is pretrained on: a function of a random generator that gives
    (problem, solution), or None for what is held out.
    """
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


def pretrain(name, spec):
    return toy.pretrain(
        spec, documents(name), batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)[0]


if __name__ == "__main__":
    toy.build(__doc__, ROOT, make_problems(), SPECS, pretrain)
