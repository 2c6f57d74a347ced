"""
Is an answer right, and how good is a model?

    python grade.py 'so \\boxed{1/2}' 0.5                # what was found, compared, and the verdict
    python grade.py --regrade out/eval                  # what grading its samples anew would change

The first half finds the answer in a response and compares it with the reference answer of the
problem, the "gold" answer. It needs no torch: `from grade import grade` works anywhere.
The second half samples responses from a model, grades and measures them, and sums up: `evaluate`.
"""

import bisect
import contextlib
import functools
import json
import math
import os
import re
import select
import statistics
import subprocess
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from operator import itemgetter

# ----------------------------------------------------------------------------------------- verdicts

def grade(response, gold):
    """(verdict, reason) of one response: `grade_all` of one."""
    return grade_all([(response, gold)])[0]


def grade_all(pairs, seconds=5.0):
    """
    [(verdict, reason)] for pairs (response, gold answer), all of them texts.

    The verdict is True, False, or None = ungraded: comparing took longer than `seconds` or crashed.
    Texts, integers and words are decided here, all else in worker processes, which need
    math-verify: UserError where it cannot be imported.
    """
    results = [_compare(extract_answer(response) or "", _last_box(gold) or gold)
               for response, gold in pairs]
    undecided = {texts: None for verdict, texts in results if verdict is None}
    with ThreadPoolExecutor(_workers()) as threads:
        for texts in undecided:
            undecided[texts] = threads.submit(_ask_worker, texts, seconds)
    return [undecided[reason].result() if verdict is None else (verdict, reason)
            for verdict, reason in results]


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

# What braces may hold, other braces to a depth of eight included; an escaped brace is none.
_INSIDE = ""
for _ in range(8):
    _INSIDE = rf"(?:[^{{}}\\]|\\.|\{{{_INSIDE}\}})*+"
# \boxed{ or \fbox{, also where a string of Python or JSON ate the head: \b is one sign there.
_OPEN = r"[\\\x08\x0c](?:b?oxed|f?box)\b"
# What is in it, up to its last brace; a number or a letter needs none, as in \boxed 5.
_BOX = (rf"{_OPEN}\s*\{{?(?=\s*[^\s}}])"
        rf"((?<=\{{){_INSIDE}(?=\}})|(?<=\s)(?:[-+]?[\d.,/]*\d|[A-Z]\b))")
# The last boxes: more than one are one answer where between them is a comma, "and" or "or", perhaps
# with a name as in "x =". Where a box that is empty or never closed comes last, none counts.
_LAST = re.compile(
    rf"(?s){_BOX}(?:\}}?[\s$]*+(?:[,;]|,?\s*+(?:\\text\s*\{{\s*)?(?:and|or)\b[\s}}]*+)"
    rf"[\s$]*+(?:[A-Za-z]\s*=\s*)?{_BOX})*\}}?+(?!.*{_OPEN})")


def extract_answer(response):
    """
    The text of the answer in a response, or None. It is looked for from the last <answer> on, else
    in what follows </think>, else in all before. Where there is a box:

    1. what is in the last \\boxed{} or \\fbox{}, nested braces included. Boxes joined by a comma,
       "and" or "or" are one answer: "\\boxed{3} and \\boxed{5}" is "3, 5". Where the last box is
       empty or never closed, there is no answer;

    else

    2. the value after the last "answer is", "Answer:", "# Answer", "A:", <answer> or GSM8K's
       "####" that a value follows.
    """
    for text in reversed(re.split("</think>|(?=<answer>)", response)):
        if re.search(_OPEN, text):
            return _last_box(text)
        values = _ANSWER.findall(text)
        if values:
            return values[-1]


def _last_box(text):
    found = _LAST.search(text)
    return found and ", ".join(re.findall(_BOX, found[0], re.DOTALL))


_ANSWER = re.compile(r"""
    (?:
      # "the answer is", "answer to the question is", "**answer:**", but not "to answer this: ..."
        (?<!to[ ]) \banswer\b (?: [ ](?:to|for|of)\b[^.:=\n]{0,60}? | [ ][a-z]{1,12} )?
        \**\s* (?: \bis\b | [:=] )
      # the heading or line "## Final answer"
      | ^[#*]*[ ]* (?:final[ ])? answer [*:]*$
      # GSM8K's "#### 42", but not a heading "#### Step 2"
      | (?<!\#)\#{4}(?!\#) (?![^\w\\\n]{0,20}[a-z]{3})
      # a tag, and a line "A: 42" where no line "B: ..." says that A is a choice or a person
      | <answer> | ^A: (?! .*\n (?:.*\n){0,9}? B:)
    )
    # before the value: colons, markup, the dash of a list's item, an opening of display mathematics
    [\s:*]*+ (?:(?<=\n)[-•]\s+)? [\s:*]*+ (?:\$\$|\\\[)?+ \s*+
    # words that are no value: more than three, or "not given", "it depends"
    (?! [.!?](?:\s|\Z) | (?:not|it|that|correct|right|wrong)\b | (?:[A-Za-z]{2,}\s+){3} )
    # the value, to the end of its sentence, of its line or of the bold face, or to more words
    (?= (.{1,500}?) (?: (?<!\\)[.!?]\s | \n | [.!?]?\Z | (?<=\S)\*\*(?!\w) | </answer>
      | ,\s+(?!and\b|or\b)[A-Za-z]{2,} | \s\([A-Za-z]{2,}
      | (?:(?<=\S\$)|(?<=\\\)))\s+(?!and\b|or\b)[A-Za-z] ) )
    """, re.VERBOSE | re.IGNORECASE | re.MULTILINE)


# ----------------------------------------------------------------------------- one way of writing

# Signs that Unicode's normal form keeps: each with what LaTeX writes.
_SIGNS = {ord(pair[0]): f"{pair[1:]} " for pair in (
    r"–- −- ×\times ·\cdot ÷/ ⁄/ °^\circ ∞\infty √\sqrt ≤\le ≥\ge ≠\ne ≈\approx ±\pm ∪\cup "
    r"∩\cap ∈\in ∅\emptyset π\pi θ\theta").split()}
# Words that change the value of the number before them: "3 halves", "3 plus y" hold no unit.
_NO_UNIT = (
    r"(?<![A-Za-z])(?:(?:(?:hundred|thousand|[mbtr]+illion)(?:th)?|dozen|score|half|halve|third"
    r"|quarter|(?:four|fif|six|seven|eigh|nin|ten)th|ten|pair)s?|squared|cubed|factorial|plus|minus"
    r"|root|twice|double|inverse|prime|lakh|crore|binary|permille"
    r"|times(?=\s*\w)|less|more|over|below|negative|choose|and|or|mod|if|where|for|not|to|out"
    r"|[knxyz]|(?<!\()(?:one|two|three|four|five|six|seven|eight|nine))(?![A-Za-z])")
# Numbers and what may be between them, up to a digit or a closing bracket.
_VALUE = r"(?:[-+\d.,/*^(){}: ]|\\(?:[dtc]?frac|sqrt|pi|times|cdot|%)(?![a-z]))*(?:[\d)}%]|\\pi)"
# A unit: a word, alone or behind a slash or in brackets, or what is short for one. Letters right
# after a number are a product, as in 2t or 12ab, but for the most usual units.
_UNIT = (
    r"(?:\s*/|\s+[(\[])?\s*(?:(?!sin|cos|tan|log|exp)(?:[A-Za-z]{4,}|(?<=[\s/(\[])[A-Za-z]{3})"
    r"|(?:(?<=\s)(?:[CFKLhl]|[kM]?(?:[NJWV]|Hz|Pa)|in|mi|sq|of|an?\s+\w{3,})"
    r"|\\mu|\\Omega|[kcm]?[mg]|s|m[lL]|k[NW]h?|[aApP]\.?[mM]|ft|yd|lbs?|oz|hrs?|st|nd|rd|th)"
    r"(?![A-Za-z]))")

# {what is written: what stands for it}, applied in this order: a rule relies on those before it.
_RULES = {
    # Exponents are in braces. So are raised and lowered signs, and a fraction has a space before
    # it, which Unicode's normal form would only put in line: ², ₂, ½.
    r"([⁰¹²³⁴-⁾]+)|\^([-+]?\d+)": r"^{\1\2}",
    r"([₀-₎]+)": r"_{\1}",
    r"([¼-¾⅐-⅞])": r" \1 ",
    # Money: a sign, or three capitals before the number.
    r"(?:US|[A-Z]{3})?\s*\\?[$¢£¥₠-⃀]|\b[A-Z]{3}\s*(?=\d)": "",
    # Layout: brackets \( \) \[ \], their sizes, colours, fonts that last to the end.
    r"(?<!\\)\\(?:[][()]|!\s*|[a-z]*color(?:box)?\s*(?:\{\w+\}|\w+)"
    r"|(?:left|right|[bB]ig+[lr]?|[a-z]*style|[lL]arge|bf|rm|it)(?![A-Za-z]))": "",
    # Any command that only changes the looks of its content.
    r"\\(?:text|math(?!bb|cal)|[mhf]?box|bold|bm\b|under|emph)[a-z]*\s*"
    r"\{((?:[^{}]|\{[^{}]*\})*)\}": r" \1 ",
    # Spaces.
    r"(?<!\\)\\(?:[,;:> ]|q?quad\b)|~|\{ \}|\s+": " ",
    # Braces around everything or a comma, brackets around a letter or the digits before a base.
    r"^\s*\{([^{}]*)\}\s*$|\{(,)\}|^\(([A-Z])\)$|^\(([\dA-F]+)\)(?=_)| (?=[_^])": r"\1\2\3\4",
    # Other ways to write vectors and dots.
    r"\\langle(.*)\\rangle": r"(\1)",
    r"\.{3,}|\\[cdl]?dots[a-z]*": r"\\ldots ",
    # Around the answer: markup, quotes, punctuation; that it is the answer, or nearly, or what it
    # is nearly.
    r"^[\s*_`\"'“‘:=]+|[\s*_`\"”.,;:\\]+$|^(?i:(?:the )?(?:final )?answer(?: is|:)+"
    r"|(?:about|around|roughly|approximately|nearly|\\approx|\\sim|option|choice)(?![a-z]))"
    r"|(?<=[\d}])\s*\\(?:approx|sim)(?![a-z]).*": "",
    # Several answers; a ratio; a name and its value.
    r"(?:,\s*)?(?<![A-Za-z])(?:and|or)(?![A-Za-z])|;": ",",
    r"^(\d+) (?:to|out of) (\d+)$": r"\1:\2",
    r"\\(?:approx|sim|equiv|in)(?![a-z])": "=",
    # Degrees and the ending of an ordinal say nothing.
    r"\s*(?:\^\s*(?:\{\s*(?:\\circ|o|st|nd|rd|th)\s*\}|\\circ)|\\degree)": " ",
    # The mixed number 3 1/2, 1.5e3, functions without a backslash.
    r"(?<![\d.,])(\d+)\s+(\d+)\s*/\s*(\d+)\b": r"\1\\frac{\2}{\3}",
    r"(?<=\d)[eE]([-+]?\d{1,3})(?![\w.])": r"\\times 10^{\1}",
    r"(?<![\\A-Za-z])(sqrt|pi|(?:arc)?(?:sin|cos|tan)|log|ln)(?![A-Za-z])": r"\\\1",
    r"\\sqrt\s*(?:\(([^()]*)\)|(\d+))": r"\\sqrt{\1\2}",
    # Number words.
    r"(?<=[\d}])\s*dozens?(?![a-z])": r" \\times 12",
    r"(?<=[\d}])\s*thousands?(?![a-z])|(?<=^\d)k$|(?<=^\d\d)k$": r" \\times 10^{3}",
    r"(?<=[\d}])\s*millions?(?![a-z])": r" \\times 10^{6}",
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
    new = text
    for pattern, replacement in _RULES.items():
        new = re.sub(pattern, replacement, new)
    new = unicodedata.normalize("NFKC", new).translate(_SIGNS)
    return new if new == text else normalise_answer(new)        # a rule may be of use to another


# ------------------------------------------------------------------------------------- comparing

def _compare(answer, gold):
    """(verdict, reason), or (None, texts) where a worker has to compare these two texts."""
    if answer == gold != "":
        return True, "same text"
    if not answer or len(answer) > 1000:
        return False, "no answer, or too long for one"
    a, b = normalise_answer(answer), normalise_answer(gold)
    choice = re.fullmatch(_CHOICE, a)
    if _plain(b) in map(_plain, [a, *(choice.groups() if choice else [])]):
        return True, "same text"
    if re.fullmatch(_DECIDED, a) and re.fullmatch(_DECIDED, b):
        return False, "different integers or words"
    return None, (a, b)


# A choice with its text, "(C) 12", which is C and 12; but not one of several choices.
_CHOICE = r"\(?([A-Z])[).:]\s*(?!.*\b[A-Z]\b)(.*)"
# Words: no case, articles, plural. An e is none: it is a number, and E is not.
_WORDS = "[A-DF-Za-df-z]|[A-Za-z][A-Za-z' -]{2,}"
# Texts that need no mathematics.
_DECIDED = rf"[-+]?\d+|{_WORDS}"


def _plain(text):
    """The text without spaces, needless braces and zeros, a last per cent sign; words in brief."""
    if re.fullmatch(_WORDS, text):
        text = re.sub(r"\b(?:an?|the) |(?<=\w{3})s\b", "", text.lower())
    return re.sub(r"(?<!\d)\s|\s(?!\d)|(?<=[_^])\{(?=\w\})|(?<=[_^]\{\w)\}|\\?%$"
                  r"|^\+|^-(?=0*$)|(?<![\d.])0+(?=\d)", "", text)


# What a value may be called: x, f(2), x_1, Area, m\angle ABC, (x, y).
_NAME = (r"(?:^|,)\s*((?!\d)(?:(?!\\(?:sqrt|frac|log|ln|sin|cos|tan))[\w\\ '{}])+?"
         r"(?:\([\w, ]*\))?|\([a-z, ]+\))\s*=\s*")


def _judge(answer, gold):
    """Whether two normal forms have the same meaning."""
    (names, a), (wanted, b) = _named(answer), _named(gold)
    if "=" in answer and "=" in gold and (names != wanted or not names):
        a, b = _parse(answer), _parse(gold)             # y = 2x + 3 and 2x - y + 3 = 0
        ratio = ((a.lhs - a.rhs) / (b.lhs - b.rhs)).cancel()
        return len(a.free_symbols) > 1 and ratio.is_number and ratio.is_nonzero
    # Every side must equal every side of the gold: 2 + 3 = 5 is 5, x + 2 = 5 is not.
    return all(_equal(*map(_parse, pair)) or _rounded(pair)
               for pair in product(a.split("="), b.split("=")))


def _rounded(pair):
    """Whether one is a decimal of six right significant digits or more, the other a fraction."""
    number, decimal = sorted(pair, key=lambda text: "." in text)
    digits = len(decimal.replace(".", "").lstrip("-0"))
    return (digits > 5 and "." in decimal and "." not in number and _parse(number).is_Rational
            and _parse(decimal) == _parse(str(_parse(number).evalf(digits))))


def _named(text):
    """The names in "x = 1, y = 2" and their values, which have the order of the names: (1, 2)."""
    first, *rest = re.split(_NAME, text)
    if first or not rest:
        return (), text
    names, values = zip(*sorted(zip(rest[::2], rest[1::2])))
    text = ", ".join(values)
    return names, text if len(set(names)) == 1 else f"({text})"


@functools.lru_cache(256)                               # parsing is what takes the time
def _parse(text):
    """The value in sympy of a text of LaTeX."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from sympy import I, Symbol, sympify

    # Decimals are exact fractions, where the parser has 15 digits. 0.1[6] is sympy's 0.1666...
    text = re.sub(r"(\.\d*)\\overline\s*\{(\d+)\}", r"\1[\2]", text)
    text = re.sub(r"\d*\.[\d.]*(\[\d+\])?", lambda x: f"({sympify(x[0], rational=True)})", text)
    # The parser would multiply numbers or points that are side by side, and drop dots, bars,
    # primes, moduli, bases. A time of day is no ratio.
    if re.search(r"(?<![_\d])\d+\s+\d|-\s*-|\\ldots|mod|[A-Z]{2}|\d_|\d:\d\d|line|bar|'", text):
        raise ValueError(text)
    config = NormalizationConfig(malformed_operators=True)
    text = re.sub(r"\\?%", "/100", text)
    value = sympify(latex2sympy(text, is_real=True, normalization_config=config))
    return value.subs(Symbol("i", real=True), I).doit()


def _equal(a, b):
    """Whether two values of sympy are the same: numbers, or what consists of them."""
    from latex2sympy2_extended.sets import FiniteSet
    from sympy import Expr, zoo

    if a == b:
        return a != zoo
    if isinstance(a, Expr) and isinstance(b, Expr):     # proving takes longer than parsing
        return a.free_symbols == b.free_symbols and a.equals(b)
    if len(a.free_symbols | b.free_symbols) < 2:        # 0 < x < 5 is the set (0, 5), and 5 is {5}
        a, b = (x.as_set() if hasattr(x, "as_set") else FiniteSet(x) if isinstance(x, Expr) else x
                for x in (a, b))
    return (type(a) is type(b) and len(a.args) == len(b.args)
            and all(map(_equal, a.args, b.args)))


# -------------------------------------------------------------------------------- worker processes

# A worker is a process of its own that compares one pair a line: sympy can hang or eat the memory.
_WORKER = [sys.executable, __file__, "--worker"]
_idle = []                                              # workers that wait for a pair


def _work():
    """The life of a worker: a pair of texts comes in as a line of JSON, a line goes out."""
    import resource
    import signal

    out, sys.stdout = sys.stdout, sys.stderr            # what libraries print is no verdict
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    _parse("1")                                         # imports what takes two seconds
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_VIRTUAL, 60)     # seconds of work: its parent may be dead
        try:
            equal = _judge(*json.loads(line))
        except MemoryError:
            raise
        except Exception:
            equal = False
        print("equal" if equal else "different", file=out, flush=True)


def _start_worker():
    process = subprocess.Popen(_WORKER, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    if not process.stdout.readline():
        from utils import UserError
        raise UserError("grading needs math-verify, and cannot import it: "
                        "pip install 'math-verify>=0.9,<0.10'")
    return process


def _ask_worker(texts, seconds):
    """(verdict, reason) by a worker; the verdict is None where it hangs or dies."""
    try:
        process = _idle.pop()
    except IndexError:
        process = _start_worker()
    with contextlib.suppress(OSError):                  # it may have died before this pair
        print(json.dumps(texts), file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = ready and process.stdout.readline()
        if line:
            _idle.append(process)
            return line == "equal\n", f"{line.strip()} for sympy"
    process.kill()
    process.communicate()
    return None, "comparison hung or crashed"


# -------------------------------------------------------------------------------- the command line

def main(args):
    if args == ["--worker"]:
        return _work()
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
        records = [sample for sample in read_lines(f"{folder}/samples.jsonl")
                   if sample["answer"] is not None]
    except OSError as error:
        sys.exit(f"--regrade takes the out_dir of an evaluation: {error}")
    results = grade_all([(old["response"], old["answer"]) for old in records])
    for old, (verdict, reason) in zip(records, results):
        if verdict is not old["correct"]:
            print(f"{old['benchmark']} {old['index']}, sample {old['sample']}: {old['correct']} -> "
                  f"{verdict}, {reason}: {old['extracted']!r} for {old['answer']!r}")
    print(f"{len(records)} graded; samples.jsonl stays as it was")


# ------------------------------------------------------------------------------ measuring a model

def respond(engine, tokenizer, problems, prompts, pairs, sampling, seed):
    """
    Sample, grade and measure responses of the engine's model. Returns one record (a dict) for each
    of `pairs` = [(index of the problem, number of the sample)], and what `score` returns of gaps.

    problems[index]: {"problem", "answer"}, the answer None where there is no reference;
    prompts[index]: the problem as token ids. A response depends on seed and pair alone. Entropies
    are those of the full softmax at temperature 1, in nats, summed over a response's tokens.
    """
    from engine import score
    from utils import derive_seed

    asked = [prompts[index] for index, _ in pairs]
    seeds = [derive_seed(seed, "eval", index, sample) for index, sample in pairs]
    rollouts = engine.generate(asked, sampling, seeds)
    entropies, gaps = score(engine, asked, rollouts)

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
    return records, gaps


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
    (summary with the settings of sampling, records), the same on every rank but for the gaps, which
    are those of its own share of the responses. Other arguments as in `respond`.
    """
    import torch.distributed as dist

    from utils import RANK, WORLD, as_user_error

    problems, prompts = zip(*held_out)
    pairs = [(index, sample) for index in range(len(problems)) for sample in range(samples)]
    records, gaps = respond(
        engine, tokenizer, problems, prompts, pairs[RANK::WORLD], sampling, seed)
    if WORLD > 1:
        parts = [None] * WORLD
        with as_user_error("another process has ended during an evaluation"):
            dist.all_gather_object(parts, records)
        records = sum(parts, [])
    records.sort(key=itemgetter("index", "sample"))
    return summarise(records) | vars(sampling) | gaps, records


if __name__ == "__main__":
    main(sys.argv[1:])
