"""
The grader against what fools others: real gold answers, every notation, hostile strings, workers
that hang or die.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import grade
import utils
from data import benchmarks
from data.problems import load_problems

# (answer in the box, gold answer, equal?, what is special about it). math-verify alone is right
# about these, ...
CASES = [
    ("42", "42", True, "the same"), ("016", "16", True, "leading zeros"),
    ("1,234", "1234", True, "thousands separator"),
    ("10,\\!080", "10,080", True, "a thin space in it"),
    ("1,234,567.50", "1234567.5", True, "two separators and cents"),
    ("3, 5, 7", "3,5,7", True, "a list, not a number"),
    ("1,234", "1, 234", False, "a number, not a list"),
    ("1{,}000", "1000", True, "a separator in braces"), ("1.000", "1000", False, "a decimal point"),
    ("\\$18.90", "18.90", True, "money"), ("$36", "\\$36", True, "money"),
    ("50\\%", "50", True, "percent left out"), ("50%", "0.5", True, "percent as a fraction"),
    ("50%", "5", False, "percent"), ("6", "0.06", False, "no percent"),
    ("12 apples", "12", True, "a unit in words"), ("5.4 \\text{ cents}", "5.4", True, "unit"),
    ("864", "864 \\mbox{ inches}^2", True, "unit with a power"),
    ("15 \\text{ cm}^2", "15\\mbox{ cm}^2", True, "unit"),
    ("27 \\text{ m/s}", "27", True, "unit with a slash"), ("5 \\text{ cm}", "5", True, "unit"),
    ("5x", "5", False, "no unit"), ("5 hours and 3 minutes", "5", False, "two units"),
    ("3 dozen", "3", False, "a number word is no unit"),
    ("2 million", "2", False, "a number word is no unit"), ("90^\\circ", "90", True, "degrees"),
    ("90^{\\circ}", "90^\\circ", True, "degrees"),
    ("\\frac{270}{7}", "\\frac{270}7\\text{ degrees}", True, "degrees in words"),
    ("90 degrees", "90", True, "degrees"), ("\\dfrac{1}{2}", "\\frac12", True, "fractions"),
    ("\\frac{1}{2}", "0.5", True, "fraction and decimal"), ("1/2", "\\tfrac{1}{2}", True, "slash"),
    ("\\frac 59", "\\frac{5}{9}", True, "a space"), ("{3\\over 4}", "3/4", True, "over"),
    ("-\\frac{1}{2}", "-0.5", True, "sign"),
    ("\\frac{-1}{2}", "-\\frac{1}{2}", True, "sign inside"), (".5", "0.5", True, "no zero"),
    ("5.0", "5", True, "a zero more"), ("0.333", "\\frac{1}{3}", False, "rounded"),
    ("1\\frac{4}{5}", "\\frac{9}{5}", True, "mixed number"),
    ("137.5", "137 \\frac{1}{2}", True, "mixed number with a space"),
    ("3\\frac{1}{2}", "3/2", False, "not a product"), ("x=5", "5", True, "the variable named"),
    ("- 5", "-5", True, "a space"), ("5", "x=5", True, "named in the gold answer"),
    ("y = 2x + 3", "2x+3", True, "a function named"),
    ("[-2,7]", "x \\in [-2,7]", True, "membership"),
    ("6.72 \\times 10^{-5}", ".0000672", True, "powers of ten"),
    ("−5", "-5", True, "a typographic minus"), ("+5", "5", True, "a plus"),
    ("5.", "5.", True, "a full stop"), ("\\(73\\)", "73", True, "LaTeX parentheses"),
    ("= 73", "73", True, "an equals sign"), ("73!", "73", False, "a factorial"),
    ("\\text{(C)}", "C", True, "a choice"), ("(C)", "\\text{(C)}", True, "a choice"),
    ("C", "\\text{(B)}", False, "a choice"), ("\\text{Evelyn}", "Evelyn", True, "a name"),
    ("evelyn", "\\text{Evelyn}", True, "a name in lower case"),
    ("Angela", "\\text{Evelyn}", False, "another name"),
    ("\\text{odd}", "\\text{even}", False, "another word"),
    ("\\text{draw}", "\\text{ward}", False, "an anagram: words are no products"),
    ("yes", "\\text{Yes}", True, "a word"), ("(3,4]", "(3,4]", True, "interval"),
    ("(3, 4]", "\\left(3,4\\right]", True, "interval"), ("[3,4]", "(3,4]", False, "closed"),
    ("(3,4)", "(3,4]", False, "open"), ("(2,\\infty)", "(2, \\infty)", True, "infinity"),
    ("\\infty", "-\\infty", False, "infinity"), ("+\\infty", "\\infty", True, "infinity"),
    ("\\infty^9", "17", False, "no number"),
    ("(-\\infty,\\infty)", "\\mathbb{R}", True, "all real numbers"),
    ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2) \\cup (3, \\infty)", True, "union"),
    ("(2,3)\\cup(0,1)", "(0,1)\\cup(2,3)", True, "a union in another order"),
    ("(1,2)", "(2,1)", False, "a tuple has an order"),
    ("(1,2)", "(1,2,3)", False, "a longer tuple"),
    ("\\left( \\frac{3}{2}, -13 \\right)", "(1.5,-13)", True, "tuple"),
    ("\\{1,2\\}", "\\{2,1\\}", True, "a set has none"), ("-2,1", "1,-2", True, "two solutions"),
    ("1", "1,-2", False, "one of two"), ("x=5, x=7", "5,7", True, "solutions named"),
    ("5 and 7", "5,7", True, "two solutions in words"), ("\\pm 2", "2,-2", True, "both signs"),
    ("\\pm 2", "2", False, "one sign"),
    ("\\begin{pmatrix} -2 \\\\ -14 \\end{pmatrix}",
     "\\begin{pmatrix}-2\\\\-14\\end{pmatrix}", True, "matrix"),
    ("\\begin{pmatrix} -2 \\\\ 14 \\end{pmatrix}",
     "\\begin{pmatrix}-2\\\\-14\\end{pmatrix}", False, "matrix"),
    ("\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}",
     "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", True, "other brackets"),
    ("3\\sqrt{13}", "\\sqrt{117}", True, "root"),
    ("11\\sqrt2", "11\\sqrt{2}", True, "root without braces"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}", True, "root"),
    ("2\\pi + 18", "18+2\\pi", True, "another order"), ("3.14159", "\\pi", False, "rounded"),
    ("(b+2)(a+5)", "(a+5)(b+2)", True, "factors"), ("E", "E", True, "a letter"),
    ("x^3-6+3x", "x^3+3x-6", True, "polynomial"), ("x^3+3x+6", "x^3+3x-6", False, "polynomial"),
    ("6 - 5i", "-5i+6", True, "complex"), ("6+5i", "6-5i", False, "complex"),
    ("x > 5", "5 < x", True, "an inequality"),
    ("1 \\pm \\sqrt{19}", "1\\pm\\sqrt{19}", True, "plus or minus"),
    ("52_8", "52_{8}", True, "base"), ("53_8", "52_8", False, "base"),
    ("52", "52_8", True, "base left out"), ("2x+3y=6", "4x+6y=12", True, "an equation"),
    ("2x+3y=7", "2x+3y=6", False, "an equation"), ("0", "x + y = 0", False, "no equation"),
    ("5^2", "25", True, "a power"), ("10^{100}", "10^{101}", False, "a power"),
    ("100000000000000000001", "100000000000000000000", False, "more digits than a float"),
    ("", "5", False, "nothing"), ("{}", "5", False, "braces"), ("?", "5", False, "a question mark"),
]
# ... and wrong about these, given what is in the box.
MATH_VERIFY_FAILS = [
    ("€12.50", "12.5", True, "it knows no euros"),
    ("USD 5", "5", True, "nor currencies in letters"),
    ("60 miles per hour", "60", True, "units of several words"),
    ("5 dollars", "5", True, "units it does not list"), ("5 km/h", "5", True, "units with a slash"),
    ("5 million", "5000000", True, "number words"),
    ("1 000 000", "1000000", True, "spaces between thousands"),
    ("1\\,000\\,000", "1000000", True, "thin spaces, too"),
    ("90°", "90^\\circ", True, "the degree sign"), ("90\\degree", "90", True, "\\degree"),
    ("5.", "5", True, "a full stop"), ("73,", "73", True, "a comma"),
    ("73;", "73", True, "a semicolon"), ("**73**", "73", True, "bold"),
    ("**73.**", "73", True, "bold with a full stop"), ("*73*", "73", True, "italics"),
    ("`73`", "73", True, "code"), ("\\underline{73}", "73", True, "underlined"),
    ("\\color{red}{73}", "73", True, "coloured"), ("~73", "73", True, "a tie"),
    ("Answer: 73", "73", True, "says so again"), ("the answer is 73", "73", True, "says so again"),
    ("73\\\\", "73", True, "a line break"), ("–5", "-5", True, "a dash for a minus"),
    ("3 1/2", "7/2", True, "mixed number"), ("(2,∞)", "(2,\\infty)", True, "the sign of infinity"),
    ("√2", "\\sqrt{2}", True, "the root sign"), ("3pi", "3\\pi", True, "pi"),
    ("x²", "x^2", True, "a raised 2"), ("x**2", "x^2", True, "Python's power"),
    ("½", "1/2", True, "the sign for a half"), ("1.5e3", "1500", True, "Python's exponent"),
    ("2·3", "6", True, "the sign for times"),
    ("\\emptyset", "\\varnothing", True, "two empty sets"),
    ("C: 5", "C", True, "a choice with its text"),
    ("\\textbf{(C) }5", "C", True, "a choice with its text"),
    ("C.", "C", True, "a choice with a full stop"),
    ("E", "e", False, "it ignores case: a letter is not Euler's number"),
    ("11_2", "11_3", False, "it drops the base"), ("40_9", "40", False, "it drops the base"),
    ("\\{1,2\\}", "(1,2)", False, "a set is no point"),
    ("-2,1", "(-2,1)", False, "two numbers are no interval"),
    ("(2,1)", "\\{1,2\\}", False, "a point is no set"),
    ("5x - 7y + 11z + 4 = 0", "0", False, "it takes the right side of an equation for a value"),
    ("12ab", "12", False, "variables that it takes for units"), ("2t", "2", False, "another"),
]


def mistakes(pairs, wanted):
    """(pair, verdict, reason) of each pair (response, gold) whose verdict is not the wanted one."""
    results = grade.grade_all(pairs)
    return [(pair, *result) for pair, result, verdict in zip(pairs, results, wanted)
            if result[0] is not verdict]


@pytest.mark.parametrize("cases", [CASES, MATH_VERIFY_FAILS])
def test_grader(cases):
    """Every case in a box, in one call."""
    pairs = [(f"So it is $\\boxed{{{answer}}}$.", gold) for answer, gold, _, _ in cases]
    assert mistakes(pairs, [equal for _, _, equal, _ in cases]) == []


def test_math_verify_alone():
    """If it learns to read some of these, our own rules for them can go."""
    from math_verify import parse, verify
    for answer, gold, right, _ in MATH_VERIFY_FAILS:
        a, b = (parse(f"\\boxed{{{text}}}") for text in (answer, gold))
        assert verify(b, a) is not right, (answer, gold)


@pytest.mark.parametrize("response, answer", [
    ("first \\boxed{1}, then \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\boxed{5}}", "5"), ("\\boxed{1} and then \\boxed{2", None), ("\\fbox{3}", "3"),
    ("\\boxed {7}", "7"), ("\\boxed 5.", "5"), ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("\\boxed{a\\\\}", "a\\\\"), ("} \\boxed{1} {", "1"), ("\\boxed{}", None),
    ("I use \\boxed{}. The answer is 5.", "5"), ("12 \n#### 1,234\nDone.", "1,234"),
    ("#### 5 \\boxed{6}", "6"), ("The answer is 42. I am sure.", "42"),
    ("**Final answer:** $\\frac{1}{2}$", "$\\frac{1}{2}$"), ("Answer: 3.5\n", "3.5"),
    ("# Answer\n\n42", "42"), ("A: 26", "26"), ("the answer is 1. No, the answer is 2.", "2"),
    ("The answer to the question is $5$.", "$5$"), ("Answer = 7", "7"),
    ("The final answer is: $11,\\! 111$", "$11,\\! 111$"), ("The answer is:\n\n$$42$$", "42$$"),
    ("x = 42", None), ("I do not know", None), ("", None), ("\\boxed", None), ("\\boxed{", None),
    ("\\boxed{42", None),
])
def test_extraction(response, answer):
    assert grade.extract_answer(response) == answer


@pytest.mark.parametrize("response, gold", [
    ("The answer is:\n\n$$42$$", "42"), ("Final Answer\n\\[ 7 \\]", "7"),
    ("The answer is **7**", "7"), ("the answer is 1,234.", "1234"),
    ("so the answer is $18 per day.", "18"), ("**Answer: 18 dollars**", "18"),
    ("The answer is x = 5", "5"), ("answer: (C).", "C"),
    ("The answer is $\\frac{1}{2}$ of the cake.", "1/2"), ("#### 16.00", "16"),
    ("#### Answer: 7", "7"),
])
def test_answers_in_sentences(response, gold):
    assert grade.grade(response, gold)[0] is True


# What a reader of the grader tried to fool it with: whole responses, and answers in a box.
RESPONSES = [
    ("#### Step 2: Total\n9*2 = 18\n\nThe answer is 18.", "18", True),
    ("#### Step 2: Total\n9*2 = 18\n\n**Final Answer: $18**", "18", True),
    ("#### Final Answer\n18", "18", True), ("#### Final Answer: **18**", "18", True),
    ("The answer is **18** eggs.", "18", True), ("**Answer:** **$18** per day", "18", True),
    ("So the answer is: **Janet makes $18 every day**.", "18", True),
    ("### Final Answer\n\nJanet makes **$18** every day.", "18", True),
    ("To answer this, note that each egg is $2. She sells 9. She makes $18.", "2", False),
    ("A: 20 eggs\nB: 30 eggs\nTotal: 50 eggs", "20", False), ("x\nA: 20", "20", True),
    ("#### \\frac{1}{2}", "0.5", True), ("#### 18 dollars", "18", True),
    ("#### $1,800", "1800", True), ("### 18\n#### -3", "-3", True),
    ("The answer is Tuesday.", "Tuesday", True),
    ("The two values are \\boxed{3} and \\boxed{5}.", "3,5", True),
    ("$x=\\boxed{3}$ or $x=\\boxed{5}$", "3,5", True),
    ("$x=\\boxed{3}$ or $x=\\boxed{5}$", "5", False), ("the correct answer is (B).", "B", True),
    ("The answer would be 7.", "7", False), ("answer therefore is 7", "7", True),
    ("My final answer: 7", "7", True), ("To answer: 7", "7", False),
]
BOXED = [
    ("5 \\text{ million}", "5", False), ("5 \\text{ million}", "5000000", True),
    ("3\\text{ thousand}", "3", False), ("3\\text{ thousand}", "3000", True),
    ("2\\text{ dozen}", "2", False), ("2\\text{ dozen}", "24", True),
    ("\\$2.5\\text{ million}", "2500000", True), ("3 thousand five hundred", "3000", False),
    ("3 halves", "3", False), ("3\\text{ halves}", "3", False), ("3 squared", "3", False),
    ("3\\text{ squared}", "3", False), ("3 factorial", "3", False), ("3 minus y", "3", False),
    ("3 times n", "3", False), ("2 thirds", "2", False), ("2 cos x", "2", False),
    ("5 plus x", "5", False), ("5 less than x", "5", False),
    ("5 \\text{ hours } 30 \\text{ minutes}", "5", False),
    ("6\\text{ feet }2\\text{ inches}", "6", False),
    ("3 \\text{ boys}, 4 \\text{ girls}", "3", False), ("> 5", "5", False), ("\\ge 5", "5", False),
    ("7 \\text{ (not } 8)", "8", False), ("A, B", "A", False), ("A and B", "A", False),
    ("A + B", "A", False), ("A cat", "A", False), ("A = 5", "A", False),
    ("\\text{(A) and (C)}", "A", False), ("\\text{A or B}", "\\text{(A)}", False),
    ("\\text{B and C}", "\\text{(B)}", False), ("\\text{(A)}", "A", True), ("(B) 12", "B", True),
    ("B: The cat", "B", True), ("\\text{18 dollars}", "18", True),
    ("\\text{\\$18 per day}", "18", True), ("\\text{5 hours}", "5", True),
    ("\\text{033}", "33", True), ("\\text{58,500}", "58,500", True),
    ("\\text{y = 2x + 3}", "y = 2x + 3", True), ("\\text{3, 5, 7}", "3, 5, 7", True),
    ("\\text{A, C, D}", "A,C,D", True), ("\\boldsymbol{113}", "113", True),
    ("\\mathsf{113}", "113", True), ("\\Large{113}", "113", True), ("113_{10}", "113", True),
    ("12.5\\%", "12.5", True), ("7.5\\%", "7.5", True), ("0.5\\%", "0.5", True),
    ("99.5%", "99.5", True), ("0.125", "12.5\\%", True), ("12.5\\%", "0.125", True),
    ("90^{\\text{o}}", "90", True), ("18 ft^3", "18", True), ("2 1/2 hours", "2.5", True),
    ("18¢", "18", True), ("₹18", "18", True), ("\\bigl(1,2\\bigr)", "(1,2)", True),
    ("5 \\text{ cm}^2", "5", True), ("x = 5\\text{ cm}^2", "5", True),
    ("12 \\text{ square units}", "12", True), ("15 fifths", "15", False), ("4 months", "4", True),
    ("4\\text{ months}", "4", True), ("7 teeth", "7", True), ("5 forks", "5", True),
    ("5 overalls", "5", True), ("6 cloths", "6", True),
]


def test_answers_of_models():
    cases = RESPONSES + [(f"\\boxed{{{answer}}}", gold, right) for answer, gold, right in BOXED]
    pairs = [(response, gold) for response, gold, _ in cases]
    assert mistakes(pairs, [right for _, _, right in cases]) == []


GOLD = Path(os.environ.get("BENCHMARK_DIR", "data"))
FORMS = ["\\boxed{%s}", "Therefore we find $\\boxed{%s}$, as required.", "\n#### %s",
         "The answer is $%s$. Done."]


@pytest.mark.parametrize("name", ["gsm8k", "math500", "amc23", "aime24"])
def test_gold_answers(name, tmp_path):
    """
    Each gold answer is right for itself, alone, in a sentence, and after "####" or a phrase; for
    another problem it is wrong. Runs where the files are: with BENCHMARK_DIR=folder of the original
    files, or after `python data/benchmarks.py`.
    """
    if benchmarks.make(name, GOLD, tmp_path) is None:
        pytest.skip(f"no {name} in {GOLD}")
    golds = [row["answer"] for row in load_problems(tmp_path / f"{name}.jsonl")]
    for form in FORMS:
        assert mistakes([(form % gold, gold) for gold in golds], [True] * len(golds)) == []
    for shift in (1, 7):
        others = golds[shift:] + golds[:shift]
        pairs = [(f"\\boxed{{{a}}}", b) for a, b in zip(golds, others)
                 if a.split("=")[-1] != b.split("=")[-1]]       # x=5 and 5 are the same answer
        assert mistakes(pairs, [False] * len(pairs)) == []


def test_without_torch():
    """Grading needs no torch, not even one that is broken; the answer below needs a worker."""
    code = ("import sys; sys.modules['torch'] = None\n"
            "import grade; print(grade.grade('so \\\\boxed{x+1}', '1+x'))")
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout == "(True, 'equal for math-verify')\n", finished.stderr


# -------------------------------------------------------------------------------------- robustness

def hostile(n, seed=0):
    """Unclosed braces, towers of exponents, bytes that are no text, in any order."""
    rng = random.Random(seed)
    parts = [
        "\\frac", "{", "}", "\\boxed{", "^", "9", "^9", "\\sqrt", "(", ")", ",", "!", "\\infty",
        "x", "=", "%", "$", "\\text{", " ", "\udcff", "\x00", "10^{10^{10}}", "####", "a" * 50,
        "1,", "\\left(", "_", "é", "\\begin{pmatrix}", "&", "\\\\", "/0", "answer is", "\n",
    ]
    strings = []
    for _ in range(n):
        content = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 25)))
        strings.append("\\boxed{" + content + rng.choice(["}", ""]))
    return strings


HUGE = [
    "\\boxed{" + "\\frac" * 20000 + "}", "{" * 100000, "\\boxed{" * 20000, "\\boxed" * 20000,
    "\\boxed{" + "9^" * 300 + "9}", "\\boxed{" + "(" * 5000 + "}", "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{" + "1" * 99 + "}", "\\boxed{" + "1" * 9999 + "}", "\\boxed{100000000!}", "#" * 100000,
    "\n#" * 50000, "\\boxed{1/" + "0" * 90 + "}", "answer is " * 10000,
    "answer is" + " " * 100000 + "x", "**answer" * 10000, "\\boxed{" + "a " * 4000 + "!}",
    "\\boxed{" + "1," * 400 + "}", "\\boxed{1" + " " * 900 + "1}",
    "\\boxed{12 " + "aaa " * 200 + "!}", "\\boxed{" + "\\text{" * 150 + "}" * 150 + "}",
    "\\boxed{" + "\\frac{1}" * 100 + "}", "\\boxed{" + "{ }" * 300 + "}",
    b"\\boxed{\xff\xfe 12}".decode("utf-8", "replace"),
    b"\\boxed{\xff\xfe 12}".decode("utf-8", "surrogateescape"),
]


def check_hostile(n):
    strings = HUGE + hostile(n)
    start = time.perf_counter()
    results = grade.grade_all([(text, "17") for text in strings], seconds=1.0)
    seconds = time.perf_counter() - start
    verdicts = [verdict for verdict, _ in results]
    assert len(verdicts) == len(strings) and True not in verdicts
    hung = verdicts.count(None)
    assert seconds < 30 + 1.5 * hung + 0.02 * n                 # no time but the limit's
    assert grade.grade("\\boxed{x+1}", "1+x")[0] is True        # the workers still work


def test_hostile_strings():
    check_hostile(300)


@pytest.mark.slow
def test_ten_thousand_hostile_strings():
    check_hostile(10_000)


def test_hung_and_crashed_workers(monkeypatch):
    """A comparison that hangs or dies is "ungraded"; its worker is replaced."""
    bad = grade._GRADER.replace("    try:\n", """
    import os, time
    if 'h' in line: time.sleep(60)
    if 'k' in line: os._exit(3)
    try:
""")
    assert bad != grade._GRADER
    monkeypatch.setattr(grade, "_GRADER", bad)
    monkeypatch.setattr(grade, "_graders", grade.queue.SimpleQueue())
    pairs = [(f"\\boxed{{{letter}+1}}", f"1+{letter}") for letter in "hkx"]
    assert grade.grade_all(pairs, seconds=1.0) == [
        (None, "no verdict in 1 s"), (None, "comparison crashed"), (True, "equal for math-verify")]


def test_idle_workers_stay(monkeypatch):
    """
    A worker's limit is for one comparison. One that waits longer for its next pair must still be
    there, or that pair is lost.
    """
    impatient = grade._GRADER.replace("signal.alarm(60)", "signal.alarm(2)")
    assert impatient != grade._GRADER
    monkeypatch.setattr(grade, "_GRADER", impatient)
    monkeypatch.setattr(grade, "_graders", grade.queue.SimpleQueue())
    assert grade._math_verify("1,234,567.50", "1234567.5", 2) == (True, "equal for math-verify")
    time.sleep(2.5)
    assert grade._math_verify("1/2", "0.5", 2) == (True, "equal for math-verify")


def test_equal_texts_and_integers_need_no_worker(monkeypatch):
    monkeypatch.setattr(grade, "_math_verify", None)
    results = grade.grade_all([(f"\\boxed{{{i}}}", f"{i + i % 2:,}") for i in range(2000)])
    assert [verdict for verdict, _ in results] == [i % 2 == 0 for i in range(2000)]


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr(grade, "_GRADER", "import no_such_module")
    monkeypatch.setattr(grade, "_graders", grade.queue.SimpleQueue())
    with pytest.raises(utils.UserError, match="grading needs math-verify"):
        grade.grade("\\boxed{x}", "y+1")


# ----------------------------------------------------------------------------- kinds of notation

# (answer, gold): what a policy would find and farm if it were right.
DIFFERENT = [
    ("not 5", "5"), ("5 or 6", "5"), ("5, 6", "5"), ("5x", "5"), ("5i", "5"), ("5!", "5"),
    ("5^2", "5"), ("-5", "5"), (r"5 \times 10^3", "5"), ("5/6", "5"), ("5 apples or 6", "5"),
    (r"5 \pm 1", "5"), ("more than 5", "5"), (r"\geq 5", "5"), ("5+", "5"), ("5 and 7", "5"),
    ("x>5", "5"), (r"5\text{ or }6", "5"), ("5k", "5"), ("5 million", "5"), (r"50\%", "50.5"),
    ("live", "evil"), ("even", "odd"), ("not even", "even"), ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"),
    ("(1,2]", "(1,2)"), (r"\{1,2\}", "(1,2)"), ("1,2,3", "1,2"), ("A, B", "A"), ("A and B", "A"),
    ("B", "A"), ("(A) or (B)", "A"), (r"\frac{1}{3}", "0.3"), ("0.33", "1/3"), ("3.14", r"\pi"),
    ("10^{10}", "10^{9}"), ("2^{100}", "2^{100}+1"), ("1_2", "1_3"), ("101_2", "101"),
    ("1:30", "1:31"), ("5 a.m.", "5 p.m."), ("10:30 a.m.", "10:30 p.m."), ("x=1,y=2", "x=2,y=1"),
    ("x=5", "y=5"), ("a=1, b=2", "2, 1"), ("1,000", "1"), ("1.000", "1000"), (r"\sqrt{2}", "2"),
    (r"\sqrt2", r"\sqrt3"), ("x+1", "x"), (r"\text{no solution}", "0"),
    ("0", r"\text{no solution}"), (r"\infty", r"-\infty"), ("2 halves", "2"), ("3 squared", "3"),
    ("5 feet 6 inches", "5"), ("5 minutes 30 seconds", "5"), ("1 hour 5 minutes", "1"),
    ("2 dozen", "2"), ("5 less than x", "5"), ("5 over 6", "5"), (r"0.1\overline{6}", "0.16"),
    ("5 times n", "5"), ("x = 5 or x = 6", "5"), (r"5 \text{ and } 6", "5"),
    (r"5 \text{ is wrong}", "5"), ("5 (not 6)", "5"), ("5 (or 6)", "5"), ("5 [or 6]", "5"),
    ("7 if x = 2", "7"), (r"\text{5 or 6}", "5"), ("1...9", "1"), ("1, 2, ...", "1, 2"),
    (r"1, 2, \ldots", "1, 2"), ("2n", "2"), ("2 N", "2n"), ("3a", "3"), ("3 a", "3"), ("3m", "3n"),
    ("y=x+1", "y=x+2"), ("x^2=25", "x=25"), ("C", "c"), ("(C) 12", "13"), ("(C) 12", "D"),
    ("C. 12", "12.5"), ("12 or 13", "12"), (r"1\frac{1}{2}", r"\frac{11}{2}"), ("1 1/2", "11/2"),
    (r"\emptyset", "0"), (r"\{\}", "0"), ("1e-9", "1e-8"), ("1.6e-19", "9e-19"),
    (r"\frac{10^{-9}}{1}", "0"), ("0.0000001", "0"), ("10^{-30}", "10^{-31}"),
    (r"\{10^{-9}, 1\}", r"\{10^{-8}, 1\}"), ("(10^{-9},1)", "(0,1)"),
    (r"\begin{pmatrix}10^{-9}\end{pmatrix}", r"\begin{pmatrix}10^{-8}\end{pmatrix}"),
    ("10^{-9}x", "10^{-8}x"), ("x+10^{-9}", "x"), (r"5\text{ }6", "56"), ("5 6", "56"),
    ("5 and a half", "5"), ("five", "6"), ("1 out of 5", "1/6"), ("2 to 3", "2/4"),
    ("sin x", "cos x"), (r"\sin x", r"\sin y"), ("f(x)=x", "g(y)=y"), ("4 or more", "4"),
    ("at least 4", "4"), ("about 5", "6"), ("approximately 5.2", "5"), ("answer 5 6", "5"),
]
# (answer, gold) in notations of one kind each.
SAME = [
    ("5", "5.0"), ("5 apples", "5"), ("five", "five"), (r"\text{Yes}", "yes"), ("x=5", "5"),
    ("5", "x = 5"), ("{5}", "5"), ("$5$", "5"), ("5.00", "5"), ("1/2", "0.5"),
    (r"\dfrac12", r"\frac{1}{2}"), ("2 hours", "2"), ("60 mph", "60"), ("18 ft^3", "18"),
    ("18 cubic feet", "18"), (r"3 \text{ meters per second}", "3"), ("9.8 m/s^2", "9.8"),
    (r"9.8\,\mathrm{m/s^2}", "9.8"), (r"\$1,234.50", "1234.5"), ("1 234 567", "1234567"),
    ("12,34,567", "1234567"), (r"\frac{3}{4}\text{ cup}", "3/4"),
    (r"3\sqrt{2}\text{ cm}", r"3\sqrt{2}"), ("(A)", "A"), (r"\text{A}", "A"),
    (r"\textbf{(A)}\ 5", "A"), (r"\text{(A) 5}", "5"), ("a", "A"), ("A.", "A"), ("2π", r"2\pi"),
    ("x ∈ [0,1]", "[0,1]"), (r"x\in[0,1]", "[0,1]"), ("[0,1]", r"x\in[0,1]"),
    ("√3/2", r"\frac{\sqrt{3}}{2}"), ("½", "0.5"), ("2½", "2.5"), ("x²+1", "x^2+1"),
    ("10⁻³", "0.001"), ("−5", "-5"), (r"\left(1,2\right)", "(1,2)"), ("3:4", "3:4"),
    (r"90^\circ", "90"), ("90°", "90"), (r"0.\overline{3}", "1/3"), (".5", "1/2"),
    ("1.5e3", "1500"), (r"1.5 \times 10^3", "1500"), ("25 percent", "25"), (r"25\%", "25"),
    (r"\boxed{7}", "7"), ("5 dollars", "5"), ("5 USD", "5"), ("€5", "5"), ("N=5", "5"),
    (r"\theta = 30^\circ", "30"), ("P(A) = 1/2", "0.5"), (r"\mathbf{5}", "5"),
    (r"\color{red}{5}", "5"), (r"\textcolor{red}{5}", "5"), (r"\underline{5}", "5"), ("5 km", "5"),
    ("5km", "5"), (r"5\ \text{kg}", "5"), ("10 kg/m^3", "10"), ("7 days", "7"),
    (r"\text{7 days}", "7"), ("2 people", "2"), ("approximately 3.5", "3.5"),
    ("x = 2, x = 3", "2, 3"), ("x=2 or x=3", "2,3"), ("2 and 3", "2,3"), (r"\{2,3\}", "3,2"),
    (r"\pm 2", "2,-2"), (r"x=\pm 2", r"\pm 2"), ("y=2x+3", "2x+3"), ("1+2i", "2i+1"),
    ("16_{10}", "16"), ("FF_{16}", "FF_{16}"), ("２５", "25"), ("7 units", "7"),
    ("7 square units", "7"), (r"24\pi\text{ cubic inches}", r"24\pi"), (r"\frac{1}{2}x", "x/2"),
    ("1 million", "1000000"), ("2.5 million", "2500000"), ("45 minutes", "45"), ("30 mins", "30"),
    ("$0.50", "0.5"), ("50 cents", "50"), ("100 people", "100"), (r"\text{Tuesday}", "Tuesday"),
    ("12 eggs left", "12"), ("12 more", "12"), ("an ellipse", "ellipse"),
    ("No solutions", "no solution"),
]


def boxed(pairs):
    return grade.grade_all([(f"So it is $\\boxed{{{answer}}}$.", gold) for answer, gold in pairs])


def test_different_answers_are_never_right():
    found = zip(DIFFERENT, boxed(DIFFERENT), strict=True)
    assert [pair for pair, (verdict, _) in found if verdict is not False] == []


def test_other_notations_are_right():
    found = zip(SAME, boxed(SAME), strict=True)
    assert [(pair, why) for pair, (verdict, why) in found if verdict is not True] == []


def test_properties():
    """
    A normal form is its own. Equality has no sides, but where the gold answer is a choice or has a
    base. No verdict depends on what was graded before.
    """
    pairs = DIFFERENT + SAME
    texts = {text for pair in pairs for text in pair}
    forms = {grade.normalise_answer(text) for text in texts}
    assert {form: grade.normalise_answer(form) for form in forms} == {form: form for form in forms}
    verdicts = [verdict for verdict, _ in boxed(pairs)]
    swapped = [verdict for verdict, _ in boxed([pair[::-1] for pair in pairs])]
    sided = [pair for pair, x, y in zip(pairs, verdicts, swapped) if x != y]
    assert sided == [("101_2", "101"), ("C", "c"), (r"\text{(A) 5}", "5"), ("a", "A")]
    assert [verdict for verdict, _ in boxed(pairs[::-1])] == verdicts[::-1]


@pytest.mark.parametrize("response, answer", [
    ("<think>maybe \\boxed{7}? no.</think>\nThe answer is 8.", "8"),
    ("<think>\\boxed{7}</think>\nI am done.", "7"),
    ("The box is \\boxed{6}. Wait. \\boxed{}", None), ("\\boxed{5} hmm, so \\boxed{", None),
    ("The answer is 10. I know where the answer is not given", "10"),
    ("The answer is 72, in total, so he earns that.", "72"),
    ("The answer is 3, 5 and 7.", "3, 5 and 7"),
    ("the answer is x = 3, y = 4", "x = 3, y = 4"), ("The answer is 8 (eight).", "8"),
    ("**Answer: 25%** of the class", "25%"), ("### Final Answer:\n- 8", "8"),
    ("<answer> 5 </answer> is it", "5"), ("\x08oxed{5}", "5")])
def test_where_the_answer_is(response, answer):
    found = grade.extract_answer(response)
    assert (found and found.strip()) == answer


def test_terminal(tmp_path, capsys):
    grade.main([r"It is \boxed{\frac{3}{6}\text{ cups}}.", "1/2"])
    printed = capsys.readouterr().out
    assert r"normal form '\\frac{3}{6}'; gold '1/2'" in printed
    assert "True: equal for math-verify" in printed
    records = [{"response": "\\boxed{5}", "answer": "5", "correct": True},
               {"response": "\\boxed{6}", "answer": "5", "correct": True}]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = path.read_text()
    grade.main(["--regrade", str(tmp_path)])
    line, = capsys.readouterr().out.splitlines()
    assert "'6'" in line and "False: different integer; before: True" in line
    assert path.read_text() == before
    with pytest.raises(SystemExit, match="error: two arguments are needed, 1 were given"):
        grade.main(["5"])
