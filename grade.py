"""
Is an answer right, and how good is a model?

    python grade.py 'so \\boxed{1/2}' 0.5                # what was found, compared, and the verdict
    python grade.py --regrade out/eval                  # what grading its samples anew would change

The first half finds the answer in a response and compares it with the reference answer of the
problem, the "gold" answer. It needs no torch: `from grade import grade` works anywhere.
The second half samples responses from a model, grades and measures them, and sums up: `evaluate`.
"""

import bisect
import functools
import itertools
import json
import math
import os
import queue
import re
import select
import statistics
import subprocess
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter

# ----------------------------------------------------------------------------------------- verdicts

def grade(response, gold):
    """(verdict, reason) of one response: `grade_all` of one."""
    return grade_all([(response, gold)])[0]


def grade_all(pairs, seconds=5.0):
    """
    [(verdict, reason)] for pairs (response, gold answer), all of them texts.

    The verdict is True, False, or None = ungraded: comparing took longer than `seconds` or crashed.
    Texts, integers, letters and words are decided here, all else in worker processes, which need
    math-verify: UserError where it cannot be imported.
    """
    results = [_compare(extract_answer(response) or "", _last_box(gold) or gold)
               for response, gold in pairs]
    undecided = list(dict.fromkeys(texts for verdict, texts in results if verdict is None))
    with ThreadPoolExecutor(min(len(undecided), _workers()) or 1) as threads:
        verdicts = threads.map(lambda texts: _math_verify(*texts, seconds), undecided)
    compared = dict(zip(undecided, verdicts))
    return [compared.get(reason, (verdict, reason)) for verdict, reason in results]


def _workers():
    """The share of the machine's cores that this process may use: others may run under torchrun."""
    affinity = getattr(os, "sched_getaffinity", None)   # Linux: a container may have fewer cores
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1


def pass_at_k(n, correct, k):
    """
    Unbiased estimate, from n samples, of P(at least one of k samples is right):
    1 - C(n - correct, k) / C(n, k). Raises ValueError unless 1 <= k <= n.
    """
    if not 0 < k <= n:
        raise ValueError(f"k={k}: Pass@k needs 1 <= k <= n={n} samples per problem")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


# ------------------------------------------------------------------------------ finding the answer

def extract_answer(response):
    """
    The text of the answer in a response, or None. The first of these that there is, looked for from
    the last <answer> on, else in what follows </think>, else in all before:

    1. what is in the last \\boxed{} or \\fbox{}, nested braces included. Boxes joined by a comma,
       "and" or "or" are one answer: "\\boxed{3} and \\boxed{5}" is "3, 5". Where the last box is
       empty or never closed, no box counts, only what follows it;
    2. the value after the last "answer is", "Answer:", "# Answer", "A:", <answer> or GSM8K's
       "####" that a value follows.
    """
    for text in reversed(re.split("</think>|(?=<answer>)", response)):
        answer = _last_box(text) or _after_phrase(_BOX.split(text)[-1])
        if answer or _BOX.search(text):
            return answer
    return None


# \boxed{ or \boxed 5, also where a string of Python or JSON ate the head: \b is one sign there.
_BOX = re.compile(r"(?:(?:\\b|\x08)oxed|(?:\\f|\x0c)box)\s*(?:\{|\s([-+]?[\d.,/]*\d|[A-Z]\b))")
_BRACE = re.compile(r"(?<!\\)(?:\\\\)*([{}])")           # an escaped brace is none
# What may stand between boxes that are one answer: a comma, "and", "or", and a name as in "x =".
_BETWEEN = re.compile(
    r"[\s$]*(?:[,;]|,?\s*(?:\\text\s*\{)?\s*(?:and|or)\b[\s}]*)[\s$]*(?:[A-Za-z]\s*=\s*)?")


def _last_box(text):
    contents, after = [], len(text)                     # and where the boxes that count begin
    for box in reversed(list(_BOX.finditer(text))):
        end = box.end() if box[1] else _closing(text, box.end())
        content = box[1] or text[box.end():end - 1]
        if not content.strip() or contents and not _BETWEEN.fullmatch(text[end:after]):
            break
        contents.insert(0, content)
        after = box.start()
    return ", ".join(contents)


def _closing(text, start):
    """Where the brace ends that is open at `start`; `start` where it never does."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[1] == "{" else -1
        if not depth:
            return brace.end()
    return start


_PHRASE = re.compile(r"""
    # "the answer is", "answer to the question is", "**answer:**", but not "to answer this: ..."
    (?<!to[ ]) \banswer\b (?: [ ](?:to|for|of)\b[^.:=\n]{0,60}? | [ ][a-z]{1,12} )?
    \**\s* (?: \bis\b | [:=] )
    # the heading "## Final answer"
  | ^\#+[ ]* (?:final[ ])? answer\b
    # the line "**Final answer**"
  | ^\** (?:final[ ])? answer \**$
    # GSM8K's "#### 42", but not a heading "#### Step 2"
  | (?<!\#)\#{4}(?!\#) (?![^\w\\\n]{0,20}[a-z]{3})
    # a tag, and a line "A: 42" where no line "B: ..." says that A is a choice or a person
  | <answer> | ^A: (?! .*\n (?:.*\n){0,9}? B:)
    """, re.VERBOSE | re.IGNORECASE | re.MULTILINE)
# Before a value: colons, markup, the dash of a list's item, an opening of display mathematics.
_OPENING = re.compile(r"[\s:*]*(?:(?<=\n)[-•]\s+)?[\s:*]*(?:\$\$|\\\[)?\s*")
# After a value: the end of its sentence, of its line or of the bold face, or more words.
_ENDING = re.compile(r"(?<!\\)[.!?]\s|\n|[.!?]?$|(?<=\S)\*\*(?!\w)|</answer>"
                     r"|,\s+(?!and\b|or\b)[A-Za-z]{2,}|\s\([A-Za-z]{2,}"
                     r"|(?:(?<=\S\$)|(?<=\\\)))\s+(?!and\b|or\b)[A-Za-z]")
# Words before a number, as in "She makes $18".
_WORDY = re.compile(r"(?:(?:[^A-Za-z\d\\]|\b[A-Za-z]{1,2}\b)*+[A-Za-z]{3,}+){2}[^\d\\]*+\d")
# Words that are no value: more than three, or "not given", "it depends".
_NO_VALUE = re.compile(r"(?:not|it|that|correct|right|wrong)\b|(?:[A-Za-z]{2,}\s+){3}|$")


def _after_phrase(text):
    for phrase in reversed(list(_PHRASE.finditer(text))):
        start = _OPENING.match(text, phrase.end()).end()
        value = _ENDING.split(text[start:start + 500], maxsplit=1)[0]
        if _WORDY.match(value):
            value = re.findall(r"[-+]?\d[\d,./]*%?", value)[-1]
        if not _NO_VALUE.match(value):
            return value
    return None


# ----------------------------------------------------------------------------- one way of writing

# Signs that Unicode's database doesn't explain: each with what LaTeX writes.
_SIGNS = {ord(pair[0]): f"{pair[1:]} " for pair in (
    r"–- −- ×\times ·\cdot ÷/ ⁄/ °^\circ ∞\infty √\sqrt ≤\le ≥\ge ≠\ne ≈\approx ±\pm ∪\cup "
    r"∩\cap ∈\in ∅\emptyset").split()}
# How it makes a sign of others: ², ₂, ½.
_MADE = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": " %s "}


def _latex(found):
    """LaTeX, by Unicode's database, for a sign or raised ones: full-width, fractions, Greek."""
    signs = found[0]
    name = unicodedata.name(signs[0], "").lower()
    if name.startswith("greek"):
        return f"\\{name.split()[-1]} "
    made = unicodedata.decomposition(signs[0]).split(" ")[0]
    return _MADE.get(made, "%s") % unicodedata.normalize("NFKC", signs)


# Words that change the value of the number before them: "3 halves", "3 plus y" hold no unit.
_NO_UNIT = (
    r"(?<![A-Za-z])(?:(?:(?:hundred|thousand|million|billion|trillion)(?:th)?|dozen|score|half"
    r"|halve|third|quarter|(?:four|fif|six|seven|eigh|nin|ten)th)s?|squared|cubed|factorial|plus"
    r"|minus|times(?=\s*\w)|less|more|over|below|negative|choose|and|or|mod|if|where|for|not|to"
    r"|out|[knxyz]|(?<!\()(?:one|two|three|four|five|six|seven|eight|nine|ten))(?![A-Za-z])")
# Numbers and what may be between them, up to a digit or a closing bracket.
_VALUE = (r"(?:[-+\d.,/*^(){}: ]|\\(?:[dtc]?frac|sqrt|pi|times|cdot|%)(?![a-z]))*"
          r"(?:[\d)}]|\\%|\\pi)")
# A unit: a word, alone or behind a slash or in brackets, or what is short for one. Letters right
# after a number are a product, as in 2t or 12ab, but for the most usual units.
_UNIT = (
    r"(?:\s*(?:/\s*)?(?!sin|cos|tan|log|sqrt|exp)[A-Za-z]{4,}|\s+(?:/\s*)?[A-Za-z]{3}"
    r"|\s+[(\[][A-Za-z]{2}|\s*\\(?:mu|Omega)"
    r"|\s+(?:[CFKLhl]|[kM]?(?:[NJWV]|Hz|Pa)|in|mi|sq|of|an?\s+[A-Za-z]{3,})(?![A-Za-z])"
    r"|\s*(?:[kcm]?[mg]|s|m[lL]|k[NW]h?|[aApP]\.?[mM]|ft|yd|mph|lbs?|oz|hrs?|min|sec|st|nd|rd|th)"
    r"(?![A-Za-z]))")

# {what is written: what stands for it}, applied in this order: a rule relies on those before it.
_RULES = {
    # A command whose head was eaten by a string, as in _BOX.
    r"\x0c(?=rac)": r"\\f",
    # Money: a sign, or three capitals before the number.
    r"(?:US|[A-Z]{3})?\s*\\?[$¢£¥₠-⃀]|\b(?:[A-Z]{3}|Rs\.?)\s*(?=\d)": "",
    # Layout: brackets \( \) \[ \], their sizes, colours, fonts that last to the end.
    r"(?<!\\)\\(?:[][()]|!\s*|[a-z]*color(?:box)?\s*(?:\{\w+\}|\w+)"
    r"|(?:left|right|[bB]ig+[lr]?|[a-z]*style|[lL]arge|bf|rm|it)(?![A-Za-z]))": "",
    # Any command that only changes the looks of its content.
    r"\\(?:text|math(?!bb|cal)|[mhf]?box|bold|bm\b|under|emph)[a-z]*\s*"
    r"\{((?:[^{}]|\{[^{}]*\})*)\}": r" \1 ",
    # Spaces.
    r"(?<!\\)\\(?:[,;:> ]|q?quad\b)|~|\{ \}|\s+": " ",
    # Braces around everything or around a comma, which then has no space after it.
    r"^\s*\{([^{}]*)\}\s*$|\{(,)\}| (?=[_^])": r"\1\2",
    # Other ways to write the empty set, vectors, dots.
    r"\\varnothing": r"\\emptyset",
    r"\\langle(.*)\\rangle": r"(\1)",
    r"\.{3,}|\\[cdl]?dots[a-z]*": r"\\ldots ",
    # Python's power x**2; other pairs of asterisks are bold face.
    r"(?<=[\w)])\*\*(?=[\w({-])": "^",
    # Around the answer: markup, quotes, punctuation; that it is the answer, or nearly, or what it
    # is nearly.
    r"\*\*|^[\s*_`\"'“‘:=]+|[\s*_`\"'”’.,;:\\]+$|^(?i:(?:the )?(?:final )?answer(?: is|:)+"
    r"|(?:about|around|roughly|approximately|nearly|\\approx|\\sim)(?![a-z]))"
    r"|(?<=[\d}])\s*\\(?:approx|sim)(?![a-z]).*": "",
    # Several answers; a ratio; a name and its value.
    r"(?:,\s*)?(?<![A-Za-z])(?:and|or)(?![A-Za-z])|;": ",",
    r"^(\d+) (?:to|out of) (\d+)$": r"\1:\2",
    r"\\(?:approx|sim|equiv|in)(?![a-z])": "=",
    # "percent" is a sign; degrees and base ten say nothing; a base is in braces.
    r"\s*per ?cent\b|(?<!\\)%": r"\\%",
    r"\s*(?:\^\s*(?:\{\s*(?:\\circ|o|st|nd|rd|th)\s*\}|\\circ)|\\degree)|_\{?(?:10|ten)\}?$": " ",
    r"^\(?([\dA-F]+)\)?_\{?\s*(\w+)\s*\}?$": r"\1_{\2}",
    # The mixed number 3 1/2, exponents as in 1.5e3 and 10^-5, functions without a backslash.
    r"(?<![\d.,])(\d+)\s+(\d+)\s*/\s*(\d+)\b": r"\1\\frac{\2}{\3}",
    r"(?<=\d)[eE]([-+]?\d{1,3})(?![\w.])": r"\\times 10^{\1}",
    r"\^([-+]?\d+)": r"^{\1}",
    r"(?<![\\A-Za-z])(sqrt|pi|(?:arc)?(?:sin|cos|tan)|log|ln)(?![A-Za-z])": r"\\\1",
    r"\\sqrt\s*(?:\(([^()]*)\)|(\d+))": r"\\sqrt{\1\2}",
    # Number words.
    r"(?<=[\d}])\s*dozens?(?![a-z])": r" \\times 12",
    r"(?<=[\d}])\s*hundreds?(?![a-z])": r" \\times 10^{2}",
    r"(?<=[\d}])\s*thousands?(?![a-z])|(?<=^\d)k$|(?<=^\d\d)k$": r" \\times 10^{3}",
    r"(?<=[\d}])\s*millions?(?![a-z])": r" \\times 10^{6}",
    r"(?<=[\d}])\s*billions?(?![a-z])": r" \\times 10^{9}",
    r"(?<=[\d}])\s*trillions?(?![a-z])": r" \\times 10^{12}",
    # Units with their powers, after a value.
    rf"((?:^|=)\s*{_VALUE})(?!.*{_NO_UNIT}){_UNIT}"
    r"(?:[-A-Za-z\s./()\[\]']|\\cdot|(?<=[A-Za-z])\^?\{?-?[1-4]\}?(?!\d))*$": r"\1",
    # Separators of thousands outside brackets: comma, space, apostrophe; points if there are two.
    r"(?<=\d)(?<!\d{4})[ ,'_](?=(?:\d\d,)*\d{3}(?!\d)[^()\[\]{}]*$)"
    r"|(?<=\d)\.(?=\d{3}\.\d{3}(?!\d))|(?<=\.\d{3})\.(?=\d{3}(?!\d))": "",
}


@functools.lru_cache(maxsize=4096)
def normalise_answer(text):
    """
    The answer without what never changes it: markup, spaces of LaTeX, currency and units, degrees,
    separators of thousands; number words become powers of ten.
    """
    new = re.sub(r"[⁰-₎¹²³]+|[^\x00-\x7f]", _latex, text).translate(_SIGNS)
    for pattern, replacement in _RULES.items():
        new = re.sub(pattern, replacement, new)
    return new if new == text else normalise_answer(new)        # a rule may be of use to another


# ------------------------------------------------------------------------------------- comparing

def _compare(answer, gold):
    """(verdict, reason), or (None, texts) where math-verify has to compare these two texts."""
    if answer == gold != "":
        return True, "same text"
    if len(answer) > 1000:
        return False, "too long for an answer"
    a, b = normalise_answer(answer), normalise_answer(gold)
    if not a:
        return False, "no answer"
    if re.fullmatch(r"[A-Z]|\([A-Z]\)", b):             # a choice: Option C, (C) 12
        a, b = re.sub(_CHOICE, r"\1", a).upper(), b.strip("()")
    else:
        a = re.sub(r"^\([A-Z]\)[\s.:]*(?=.)", "", a)    # (C) 12, where the gold answer is 12
    # A per cent sign may be left out; whether 50% is 0.5 is for the worker to say.
    if _plain(a) == _plain(b):
        return True, "same text"
    for kind, pattern in _DECIDED.items():
        if re.fullmatch(rf"{pattern}\n{pattern}", f"{a}\n{b}"):
            return False, f"different {kind}"
    return None, (a, b)


# A letter, perhaps with its text, but not one of several.
_CHOICE = r"^(?i:option|choice|answer)?\s*\(?([A-Za-z])(?:\)|[.:]|$)(?!.*\b[A-Z]\b).*$"
# Texts that need no mathematics. A letter has its case: e is a number, E is none.
_DECIDED = {"integer": r"[-+]?\d+", "letter": "[A-Za-z]", "words": "[A-Za-z][A-Za-z' -]{2,}"}


def _plain(text):
    """The text without spaces, needless braces and zeros, a last per cent sign; words in brief."""
    if re.fullmatch(_DECIDED["words"], text):           # no case, articles, plural
        text = re.sub(r"\b(?:an?|the) |(?<=\w{3})s\b", "", text.lower())
    return re.sub(r"(?<!\d)\s|\s(?!\d)|(?<=[_^])\{(?=\w\})|(?<=[_^]\{\w)\}|\\%$"
                  r"|^\+|^-(?=0*$)|(?<![\d.])0+(?=\d)", "", text)


# A worker is a process of its own that compares one pair a line: sympy, which math-verify uses, can
# hang or eat the memory, and math-verify's own time limit works in the main thread only.
_GRADER = r"""
import functools, json, logging, os, re, resource, signal, sys
out, sys.stdout = sys.stdout, sys.stderr                # what libraries print is no verdict
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
logging.disable(logging.WARNING)
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Expr, FiniteSet, I, Interval, MatrixBase, N, Rational, Tuple, Union, nan, oo, zoo

CONFIG = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
DECIMAL = (r"(?<![\d.])(\d*)\.(?:(\d*)\\(?:overline|bar)\s*\{\s*(\d{1,99})\s*\}"
           r"|(\d{0,9}?)(\d{1,9}?)\5{2,}\s*\\ldots|(\d+)(?![\d.]))")
# What a value may be called: x, f(2), x_1, f^{-1}(x), Area, m\angle ABC, (x, y).
NAME = (r"(?:(?!\\(?:sqrt|frac|log|ln|sin|cos|tan))(?:[A-Za-z ]*\\)?[A-Za-z][A-Za-z ]*'*"
        r"(?:_\{?\w+\}?)?(?:\^\{-1\})?(?:\([\w, ]*\))?|\([a-z](?:, ?[a-z])+\))\s*=\s*")

# A decimal is a fraction, exact, where sympy has 15 digits: 0.1\overline{6} = (16 - 1) / 90.
def fraction(decimal):
    whole, fixed, period, fixed2, period2, digits = (group or "" for group in decimal.groups())
    start, period = whole + fixed + fixed2 + digits, period + period2
    top = int(start + period) - (int(start or 0) if period else 0)
    bottom = 10 ** (len(start) - len(whole)) * (10 ** len(period) - 1 if period else 1)
    return r"(\frac{%d}{%d})" % (top, bottom)

@functools.lru_cache(256)                               # parsing is what takes the time
def parse(text, real):
    if re.search(r"(?<![_\d])\d+\s+\d|-\s*-", text):    # the parser would add what is side by side
        raise ValueError
    text = normalize_latex(text, CONFIG)
    x = latex2sympy(text, is_real=real, convert_degrees=False, normalization_config=None)
    return x if real else x.subs({name: I for name in x.free_symbols if name.name == "i"})

# For sympy oo^9 - 17 is zero now and then, depending on what it has seen before.
def infinite(x):
    return isinstance(x, Expr) and x.has(oo, -oo, zoo, nan)

# Numbers that an answer consists of, in order; the members of a set, which has none, by size.
def leaves(x, point):
    if isinstance(x, MatrixBase):
        return [*x.shape, *(leaf for part in x.flat() for leaf in leaves(part, point))]
    if not isinstance(x, (FiniteSet, Interval, Tuple, Union)):
        return [x.subs(point).doit() if isinstance(x, Expr) else x]
    parts = [leaves(part, point) for part in x.args]
    if isinstance(x, (FiniteSet, Union)):
        parts.sort(key=lambda part: [N(leaf).as_real_imag() for leaf in part if leaf.is_number])
    return sum(parts, [])

# Whether a decimal of six right digits stands for the number, that is, for a fraction; for another
# number six right digits after the point do.
def rounded(decimal, number):
    places = next((k for k in range(1, 50) if 10 ** k % decimal.q == 0), None)
    if places is None or decimal.q == 1 or abs(decimal - number) * 2 * 10 ** places > 1:
        return False
    if not number.is_Rational:
        return places > 5
    ends = pow(10, number.q.bit_length(), number.q) == 0          # it is a decimal, too
    return not ends and abs(decimal.p * 10 ** places // decimal.q) > 99999

# Whether two numbers are the same to 25 of 30 digits.
def same(a, b):
    if a == b or not (getattr(a, "is_number", 0) and getattr(b, "is_number", 0)):
        return a == b or verify(b, a, timeout_seconds=None)
    if a.is_Rational and rounded(a, b) or b.is_Rational and rounded(b, a):
        return True
    if a.is_Rational and b.is_Rational:
        return False
    a, b = N(a, 30), N(b, 30)
    return bool(abs(a - b) <= abs(b) * Rational(1, 10 ** 25))

# Numbers by their values; where there are variables, math-verify and the values at a point.
def equal(answer, gold):
    real = not any(map(should_treat_as_complex, (answer, gold)))
    a, b = parse(answer, real), parse(gold, real)
    if infinite(a) or infinite(b):
        return a == b != zoo
    for x, y in (a, b), (b, a):                         # a tuple has an order, a set has none
        if isinstance(x, FiniteSet) and isinstance(y, (Tuple, Interval)):
            return False
    names = sorted({name for x in (a, b) for name in x.free_symbols}, key=str)
    point = {name: Rational(7 * i + 10, 13) for i, name in enumerate(names)}
    if type(a) is type(b) or isinstance(a, Expr) and isinstance(b, Expr):
        pairs = leaves(a, point), leaves(b, point)
        alike = len(pairs[0]) == len(pairs[1]) and all(map(same, *pairs))
        if not alike or not names:
            return alike
    return verify(b, a, allow_set_relation_comp=True, timeout_seconds=None)

# The names in "x = 1, y = 2" and their values, "1, 2"; no names where something else is in it.
def unnamed(text):
    parts = [re.fullmatch("(%s)(.+)" % NAME, part) for part in re.split(r",\s*(?=%s)" % NAME, text)]
    if not all(parts):
        return [], text
    named = sorted(part.groups() for part in parts)
    return [name.strip(" =") for name, _ in named], ", ".join(value for _, value in named)

def terms(text):
    text = text.replace(r"\ldots", r"\Delta").strip("\\{}")
    return "(%s)" % (text if "," in text else text.replace("+", ","))

def judge(answer, gold):
    if re.match(r"[\dA-F]+_", answer):                  # other digits, or the parser drops the base
        return False
    answer, gold = (re.sub(DECIMAL, fraction, text) for text in (answer, gold))
    (names, a), (wanted, b) = unnamed(answer), unnamed(gold)
    if names and wanted and names != wanted:
        return False
    if len({*names, *wanted}) > 1:                      # x = 1, y = 2 has the order of (1, 2)
        a, b = (text if text[0] + text[-1] == "()" else "(%s)" % text for text in (a, b))
    if ("=" in a) != ("=" in b):
        curve = re.search(r"(?<![\\a-z])[a-z](?![a-z])", b if "=" in a else a)
        if "=" in answer and "=" in gold and curve:     # y = 2x + 3 and 2x - y + 3 = 0
            a, b = answer, gold
        elif "=" in b or "," in a + b:                  # an equation is no value
            return False
        else:                                           # but 7/2 = 3.5 is, if its sides are
            a = a.replace("=", ",")
    if "mod" not in b:
        a = re.sub(r"\s*(?:\\pmod|\(mod).*", "", a)
    if r"\ldots" in a + b:                              # equal only term by term
        a, b = terms(a), terms(b)
    # A per cent sign on one side only is left out, or it is a hundredth.
    signs = ["", "/100"] if (r"\%" in a) != (r"\%" in b) else [""]
    return any(equal(a.replace(r"\%", sign), b.replace(r"\%", sign)) for sign in signs)

print("ready", file=out, flush=True)
for line in sys.stdin:
    signal.alarm(60)                                    # ends it where its parent is dead
    try:
        result = judge(*json.loads(line))
    except MemoryError:
        os._exit(3)
    except Exception:
        result = False
    signal.alarm(0)                                     # it may wait for the next pair for long
    print("equal" if result else "different", file=out, flush=True)
"""
_graders = queue.SimpleQueue()                          # idle workers


def _start_grader():
    process = subprocess.Popen([sys.executable, "-c", _GRADER], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if process.stdout.readline() != "ready\n":
        from utils import UserError
        raise UserError("grading needs math-verify, and cannot import it: "
                        "pip install 'math-verify>=0.9,<0.10'")
    return process


def _math_verify(answer, gold, seconds):
    """(verdict, reason) by math-verify, or (None, why there is no verdict)."""
    try:
        process = _graders.get_nowait()
    except queue.Empty:
        process = _start_grader()
    try:
        print(json.dumps([answer, gold]), file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else None
    except OSError:                                     # it died before this pair
        line = ""
    if line:
        _graders.put(process)
        return line == "equal\n", f"{line.strip()} for math-verify"
    process.kill()
    process.communicate()
    return None, "comparison crashed" if line == "" else f"no verdict in {seconds:g} s"


# -------------------------------------------------------------------------------- the command line

def main(args):
    if len(args) != 2:
        sys.exit("usage: python grade.py RESPONSE GOLD, or python grade.py --regrade out/eval")
    response, gold = args
    if response == "--regrade":
        return regrade(gold)
    found = extract_answer(response)
    print(f"extracted    {found}\nnormal form  {normalise_answer(found or '')}")
    print(f"of the gold  {normalise_answer(gold)}\nverdict      {grade(response, gold)}")


def regrade(folder):
    """Print what grading the samples of a finished evaluation anew would change."""
    from utils import read_lines

    try:
        samples = read_lines(f"{folder}/samples.jsonl")
    except OSError as error:
        sys.exit(f"--regrade takes the out_dir of an evaluation: {error}")
    records = [sample for sample in samples if sample["answer"] is not None]
    results = grade_all([(old["response"], old["answer"]) for old in records])
    changes = Counter()
    for old, (verdict, reason) in zip(records, results):
        if verdict is not old["correct"]:
            changes[old["correct"], verdict] += 1
            print(f"{old['benchmark']} {old['index']}, sample {old['sample']}: {old['correct']} -> "
                  f"{verdict}, {reason}: {old['extracted']!r} for {old['answer']!r}")
    print(f"{len(records)} graded. (Before, now): {dict(changes)}. samples.jsonl stays as it was.")


# ------------------------------------------------------------------------------ measuring a model

def respond(engine, tokenizer, problems, prompts, pairs, sampling, seed):
    """
    Sample, grade and measure responses of the engine's model: one record (a dict) for each of
    `pairs` = [(index of the problem, number of the sample)].

    problems[index]: {"problem", "answer"}, the answer None where there is no reference;
    prompts[index]: the problem as token ids. A response depends on seed and pair alone. Entropies
    are those of the full softmax at temperature 1, in nats, summed over a response's tokens.
    """
    from engine import score
    from utils import derive_seed, print_once

    if sampling.temperature == 0 and any(sample for _, sample in pairs):
        print_once("warning: at T = 0 all responses to a problem are the same: one is enough")
    asked = [prompts[index] for index, _ in pairs]
    seeds = [derive_seed(seed, "eval", index, sample) for index, sample in pairs]
    rollouts = engine.generate(asked, sampling, seeds)
    entropies, _ = score(engine, asked, rollouts)

    records = []
    for (index, sample), (tokens, _, reason), entropy in zip(pairs, rollouts, entropies):
        after = tokens_after_box(tokenizer, tokens)
        entropy_after = entropy[len(tokens) - (after or 0):]
        response = tokenizer.decode(tokens, skip_special_tokens=True)
        records.append({
            "index": index,
            "sample": sample,
            "problem": problems[index]["problem"],
            "answer": problems[index]["answer"],
            "response": response,
            "tokens": tokens,
            "extracted": extract_answer(response),
            "correct": None,
            "reason": "no reference answer",
            "length": len(tokens),
            "entropy_sum": entropy.sum().item(),
            "stop": tokenizer.decode(tokens[-1:]) if reason == "stop" else reason,
            "tokens_after_box": after,
            "entropy_after_box_sum": entropy_after.sum().item(),
        })

    graded = [record for record in records if record["answer"] is not None]
    results = grade_all([(record["response"], record["answer"]) for record in graded])
    for record, result in zip(graded, results):
        record["correct"], record["reason"] = result
    return records


def tokens_after_box(tokenizer, tokens):
    """How many tokens follow the one that completes the first "\\boxed"; None without a box."""
    length = bisect.bisect_left(range(len(tokens) + 1), True,
                                key=lambda n: "\\boxed" in tokenizer.decode(tokens[:n]))
    return len(tokens) - length if length <= len(tokens) else None


def verdicts_by_problem(records):
    """{index of the problem: [True or False for each graded response]}."""
    verdicts = {}
    for record in records:
        if record["correct"] is not None:
            verdicts.setdefault(record["index"], []).append(record["correct"])
    return verdicts


def _ratio(total, count):
    return total / count if count else None


def _mean(values):
    return _ratio(sum(values), len(values))


def summarise(records):
    """
    The numbers of one set of problems, from `respond`'s records; None where there is nothing to
    take a mean of.

    k                 responses to a problem
    avg_at_k          mean over problems of the share of right responses among the graded ones
    pass_at           {i: mean Pass@i over the problems with at least i graded responses}, i to k
    pass_at_k         pass_at[k]
    ungraded          responses whose comparison hung or crashed; they count for nothing above
    length, median_length              tokens of a response
    truncated, stop_reasons            shares of responses: without a stop token, by what ended them
    entropy, entropy_before_box, entropy_after_box     mean over tokens, in nats; before and after
                      the first \\boxed, over the responses with a box
    tokens_after_box  mean over the responses with a box
    """
    from utils import print0

    responses = Counter(record["index"] for record in records)
    k = max(responses.values())
    verdicts = verdicts_by_problem(records).values()
    pass_at = {}
    for i in range(1, k + 1):
        pass_at[i] = _mean([pass_at_k(len(v), sum(v), i) for v in verdicts if len(v) >= i])

    score = _mean([_mean(v) for v in verdicts])
    if score == 0:
        wrong = next(record for record in records if record["correct"] is False)
        print0(
            f"warning: not one response is right: are gold answers as they should be? One is "
            f"{wrong['answer']!r}, the answer found is {wrong['extracted']!r}"
        )

    lengths = [record["length"] for record in records]
    entropy = sum(record["entropy_sum"] for record in records)
    boxed = [record for record in records if record["tokens_after_box"] is not None]
    after = sum(record["tokens_after_box"] for record in boxed)
    before = sum(record["length"] for record in boxed) - after
    entropy_after = sum(record["entropy_after_box_sum"] for record in boxed)
    entropy_before = sum(record["entropy_sum"] for record in boxed) - entropy_after

    stops = Counter(record["stop"] for record in records)
    return {
        "avg_at_k": score,
        "pass_at_k": pass_at[k],
        "pass_at": pass_at,
        "k": k,
        "problems": len(responses),
        "responses": len(records),
        "ungraded": sum(record["correct"] is None and record["reason"] != "no reference answer"
                        for record in records),
        "length": _mean(lengths),
        "median_length": statistics.median(lengths),
        "truncated": stops["length"] / len(records),
        "stop_reasons": {stop: n / len(records) for stop, n in sorted(stops.items())},
        "entropy": _ratio(entropy, sum(lengths)),
        "entropy_before_box": _ratio(entropy_before, before),
        "entropy_after_box": _ratio(entropy_after, after),
        "tokens_after_box": _ratio(after, len(boxed)),
    }


def evaluate(engine, tokenizer, held_out, sampling, samples, seed):
    """
    Sample `samples` responses to each (problem, prompt ids) of `held_out` and measure them:
    (summary with the settings of sampling, records), the same on every rank. Each rank answers its
    share. Other arguments as in `respond`.
    """
    import torch.distributed as dist

    from utils import RANK, WORLD, as_user_error

    problems, prompts = zip(*held_out)
    pairs = [(index, sample) for index in range(len(problems)) for sample in range(samples)]
    records = respond(engine, tokenizer, problems, prompts, pairs[RANK::WORLD], sampling, seed)
    if WORLD > 1:
        parts = [None] * WORLD
        with as_user_error("another process has ended during an evaluation"):
            dist.all_gather_object(parts, records)
        records = list(itertools.chain(*parts))
    records.sort(key=itemgetter("index", "sample"))
    summary = summarise(records)
    for key in ("temperature", "top_p", "top_k", "max_new_tokens"):
        summary[key] = getattr(sampling, key)
    return summary, records


if __name__ == "__main__":
    main(sys.argv[1:])
