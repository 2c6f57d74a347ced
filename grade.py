"""
Is an answer right, and how good is a model?

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
    Equal texts and integers are decided here, all else by math-verify in worker processes. Raises
    UserError where math-verify is needed and cannot be imported.
    """
    results = []
    undecided = {}                      # {(answer, gold), aligned: where they are in `results`}
    for row, (response, gold) in enumerate(pairs):
        answer = extract_answer(response) or ""
        pair = _align(normalise_answer(answer), normalise_answer(_last_box(gold) or gold))
        results.append(_compare(*pair))
        if results[-1] is None:
            undecided.setdefault(pair, []).append(row)
    if not undecided:
        return results

    with ThreadPoolExecutor(min(len(undecided), _workers())) as threads:
        verdicts = threads.map(lambda pair: _math_verify(*pair, seconds), undecided)
        for rows, verdict in zip(undecided.values(), verdicts):
            for row in rows:
                results[row] = verdict
    return results


def _workers():
    """The share of the machine's cores that this process may use: others may run under torchrun."""
    if hasattr(os, "sched_getaffinity"):                # on Linux, where a container may have fewer
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
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

# What JSON makes of \\b, \\f and \\v before the rest of a command, as in \\boxed.
_EATEN = str.maketrans({"\b": "\\b", "\f": "\\f", "\v": "\\v"})


def extract_answer(response):
    """
    The text of the answer in a response, or None. What follows a model's thoughts counts before the
    thoughts, and in each the first of these that there is:

    1. what is in the last \\boxed{} or \\fbox{}, nested braces included. Neighbouring boxes are one
       answer: "\\boxed{3} and \\boxed{5}" is "3, 5". Where the last box is empty or has no end, an
       answer was not given until there;
    2. what is in the last <answer></answer>;
    3. the line after the last "####" that is no heading: how GSM8K ends its solutions;
    4. to the end of its sentence, what follows the last "answer is", "Answer:", "# Answer" or "A:"
       behind which there is a value.
    """
    thoughts, _, rest = response.translate(_EATEN).rpartition("</think>")
    return _find(rest) or (_find(thoughts) if thoughts else None)


def _find(text):
    if answer := _last_box(text):
        return answer
    rest = re.split(r"\\(?:boxed|fbox)\b", text)[-1]
    tagged = re.findall(r"(?s)<answer>(.*?)</answer>", rest)
    return tagged[-1] if tagged else _after_hashes(rest) or _after_phrase(rest)


# All that matters for finding where a box ends.
_BOX_OR_BRACE = re.compile(r"""
    (?P<open> (?P<box> \\(?:boxed|fbox)\s* )? \{ )         # \boxed{ or {
  | \\(?:boxed|fbox)\s+ (?P<bare> [-+]?[\d.,/]*\d | [A-Z]\b )        # \boxed 5
  | \\.                                                 # an escaped character: \{ is no brace
  | (?P<close> \} )
    """, re.VERBOSE | re.DOTALL)
# What may stand between boxes that are one answer: a comma, "and", "or", and a name as in "x =".
_BETWEEN = re.compile(r"\$?\s*(?:,|,?\s*(?:and|or)\b)\s*\$?(?:[A-Za-z]\s*=\s*)?")


def _last_box(response):
    boxes = []                                          # (start, end, content)
    opened = []                                         # the braces that are open
    for token in _BOX_OR_BRACE.finditer(response):
        if token["open"]:
            opened.append(token)
        elif token["bare"]:
            boxes.append((token.start(), token.end(), token["bare"]))
        elif token["close"] and opened:
            left = opened.pop()
            if left["box"]:
                boxes.append((left.start(), token.end(), response[left.end():token.start()]))
    unfinished = any(left["box"] for left in opened)
    if unfinished or not boxes or not max(boxes)[2].strip():
        return None
    boxes.sort()
    start, _, answer = boxes.pop()
    while boxes and _BETWEEN.fullmatch(response[boxes[-1][1]:start]):
        start, _, before = boxes.pop()
        answer = f"{before}, {answer}"
    return answer


def _after_hashes(response):
    for tail in reversed(re.findall(r"(?<!#)####(?!#)[^\S\n]*([^\n]+)", response)):
        if not re.match(r"[^\w\\]*[A-Za-z]{3}", tail):  # "#### Step 2: add" is a heading
            return tail
    return None


_PHRASE = re.compile(r"""
    # "the answer is", "answer to the question is", "**answer:**", but not "to answer this: ..."
    (?<!to[ ]) \banswer\b (?: [ ](?:to|for|of)\b[^.:=\n]{0,60}? | [ ][a-z]{1,12} )?
    \**\s* (?: \bis\b | [:=] )
    # the heading "## Final answer"
  | ^\#+[ ]* (?:final[ ])? answer\b
    # the line "**Final answer**"
  | ^\** (?:final[ ])? answer \**$
    """, re.VERBOSE | re.IGNORECASE | re.MULTILINE)


def _after_phrase(response):
    found = list(_PHRASE.finditer(response))
    if not re.search("(?m)^B:", response):              # else "A:" is a choice or a person
        found += re.finditer("(?m)^A:", response)
    ends = sorted(match.end() for match in found)
    sentences = [_sentence(response[end:end + 500]) for end in ends]
    # "... where the answer is not given" comes after the answer; a word alone may be one, too.
    values = [s for s in sentences if re.search(r"[\d\\$]|\b[A-Z]\b", s)]
    return (values or sentences or [""])[-1] or None


def _sentence(tail):
    """The first sentence, or only the number in it where it is about one: "Janet makes $18"."""
    tail = re.sub(r"^(?:[\s:*]|[-•]\s|\$\$|\\\[)+", "", tail)
    # It ends with bold print, and at a comma or bracket with words behind it, but "and" and "or".
    end = r"(?<!\\)[.!?](?:\s|$)|\n|$|(?<=\S)\*\*|(?:[,;]\s+|\s\()(?!and\b|or\b)[a-z]{2,}\b"
    sentence = re.split(end, tail, maxsplit=1)[0]
    # Where words come before the first number, the last number is the answer.
    beginning = re.split(r"[\d\\]", sentence, maxsplit=1)[0]
    if len(re.findall("[A-Za-z]{3,}", beginning)) >= 2:
        numbers = re.findall(r"[-+]?\d[\d,./]*%?", sentence)
        sentence = numbers[-1] if numbers else sentence
    return sentence


# ----------------------------------------------------------------------------- one way of writing

# Signs, and how LaTeX or the keyboard writes them; "~" is a space in LaTeX.
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "⁄": "/", "∕": "/",
    "°": "^\\circ ", "∞": "\\infty ", "π": "\\pi ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ",
    "≈": "\\approx ", "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
    "∅": "\\emptyset ", "~": " "})

# Digits with points and commas, then perhaps a fraction: -1,234.5 or .5 or 1\frac{4}{5} or \frac12.
_PART = r"\s*(?:\{[^{}]*\}|\d)"                         # of a fraction
_NUMBER = rf"[-+]?(?:\d[\d.,]*|\.\d+)?(?:(?<=[\d.])|\\[dt]?frac{_PART}{_PART})"
# Number words, by which a number is multiplied.
_ZEROS = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "billion": 9, "trillion": 12}
_COUNT = rf"(?:{'|'.join(_ZEROS)}|dozen)"
# Words after a number that are no unit: "3 halves", "3 squared", "3 less than x".
_NO_UNIT = (rf"(?:{_COUNT}s?|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?"
            r"|squared|cubed|factorial|plus|minus|times(?= \S)|less than|more than|over|choose|out|to"
            r"|sin|cos|tan|log|ln|sqrt|and|or|mod|if|where|for)\b")
# What may be left of a unit: a number, a product, power or quotient of numbers.
_VALUE = rf"{_NUMBER}(?:(?:/|\*|\s*\\(?:times|cdot)\s*){_NUMBER})?(?:\^\{{?-?\d+\}}?)?(?:\\pi)?"
_SHORT_UNIT = r"(?:[kcmnu]?[mgslLNVAJW]|[KCFT]|[kM]?Hz|k?Pa|of|in|ft|yd|oz|lb|mi|hr?|[ap]\.?m)"

# {what is written: what stands for it}, applied in this order: a rule relies on those before it.
_RULES = {
    # Currencies; LaTeX's brackets \( \) \[ \], its \! and sizes of brackets.
    r"(?:US)?\\?\$|USD\b|[£€¥₹¢]"
    r"|(?<!\\)\\(?:[][()!]|(?:left|right|[bB]ig+[lr]?|displaystyle)(?![A-Za-z]))": "",
    # LaTeX's spaces, and a comma in braces, which keeps LaTeX from adding a space after it.
    r"(?<!\\)\\(?:[,;:> ]|q?quad\b)|\{ \}": " ",
    r"\{,\}": ",",
    # Two commands for the empty set, and brackets of a vector.
    r"\\varnothing": r"\\emptyset",
    r"\\langle": "(",
    r"\\rangle": ")",
    # **bold**, then Python's power x**2, then asterisks without a partner.
    r"(?<![\w)])\*\*(.+?)\*\*": r"\1",
    r"(?<=[\w)])\*\*(?=[\w({-])": "^",
    r"\*\*": "",
    # Commands that only change looks: colours, fonts, frames.
    r"\\(?:text|page)?color(?:box)?\s*(?:\{\w+\}|\w+)": "",
    r"\\(?:text\w*|math(?!bb|cal)\w+|operatorname|\w*box|bm|boldsymbol|underline|emph|[lL]arge)"
    r"\s*\{([^{}]*)\}": r" \1 ",
    # Braces, quotes and markup around the answer, punctuation after it.
    r"^[\s*_`\"':]+|[\s*_`\"'.,;:\\]+$": "",
    r"^\{([^{}]*)\}$": r"\1",
    # Words before the answer that do not change it.
    r"(?i)^(?:(?:the )?(?:final )?answer(?: is|:)+|about|around|approximately|roughly|option|choice"
    r"|\\approx|an?(?= [a-z]))\s*(?=\S)": "",
    # "percent" is a sign; base ten and degrees say nothing, nor do brackets around another base.
    r"\s*per ?cent\b": r"\\%",
    r"_\{?10\}?$": "",
    r"^\(([\dA-F]+)\)(?=_)": r"\1",
    r"\s*(?:\^\s*(?:\{\s*(?:\\circ|o)\s*\}|\\circ)|\\degree)\s*[CFK]?\s*$": "",
    # The mixed number 3 1/2; 3 out of 4; 2 to 3.
    r"^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)\b": r"\1\\frac{\2}{\3}",
    r"^(\d+)\s+out of\s+(\d+)$": r"\1/\2",
    r"^(\d+)\s+to\s+(\d+)$": r"\1:\2",
    # Words in brackets after a number, and a unit: 15 cm^2, 60 miles per hour, 5 [cm], 12.5/hour.
    rf"^({_VALUE}.*?)\s*[(\[][A-Za-z\s]+[)\]]$": r"\1",
    rf"^({_VALUE}(?::\d\d)?)\s*(?!{_NO_UNIT})(?:\\(?:mu|Omega)\s*|/\s*)?"
    rf"(?:{_SHORT_UNIT}(?![A-Za-z])|\\Omega|(?<=[\s/])[A-Za-z]{{3,}}\b|(?<=Omega)|(?<=mu))"
    r"[\sA-Za-z./-]*\^?\{?\d?\}?$": r"\1",
    # Python's exponent 1.5e3, and pi without a backslash.
    r"^([-+]?[\d.]+)[eE]([-+]?\d{1,3})$": r"\1\\times 10^{\2}",
    r"(?<=\d)pi\b": r"\\pi",
    r"\s+": " ",
}
# Separators of thousands: 1,234,567.5 or 1 234 567.5.
_SEPARATED = r"[-+]?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?"
# A number and a number word, "2.5 \text{ million}" or "3 thousand eggs", but not "3 thousand five".
_NAMED = (rf"({_NUMBER})\s*({_COUNT})s?"
          rf"(?: (?!.*{_COUNT}|.*\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b)[a-z ]*)?")


@functools.lru_cache(maxsize=4096)
def normalise_answer(text):
    """
    The answer without what never changes it: markup, spaces of LaTeX, currency and units, degrees,
    separators of thousands; number words become powers of ten.
    """
    # Unicode has other forms of digits, letters and signs, and says what they stand for.
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", text)
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0> ", text)
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}", text).translate(_SYMBOLS)
    for pattern, new in _RULES.items():
        text = re.sub(pattern, new, text)
    text = text.strip()
    text = re.sub(r"(\d+)\.(\d*)\\overline\{(\d+)\}", _repeating, text)
    if re.fullmatch(_SEPARATED, text):
        text = re.sub("[, ]", "", text)
    if named := re.fullmatch(_NAMED, text):
        number, word = named.groups()
        factor = f"10^{{{_ZEROS[word]}}}" if word in _ZEROS else "12"
        text = f"{number} \\times {factor}"
    return text


def _repeating(match):
    """0.1\\overline{6} as a fraction: (16 - 1) / 90."""
    whole, start, period = match.groups()
    numerator = int(whole + start + period) - int(whole + start)
    return f"\\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(start)}}}"


# ------------------------------------------------------------------------------------- comparing

# What names a value: x =, x_1 =, \theta =, f(2) =, f^{-1}(x) =.
_NAME = (r"(?:^|(?<=, )|(?<=,))(?:\\?[A-Za-z]\w*(?:_\{\w+\})?(?:\^\{-1\})?(?:\([^()]*\))?"
         r"|\([a-z](?:,\s*[a-z])*\))\s*=\s*")
_DOTS = r"\\[lc]?dots|\.{3}"
# A choice, perhaps with its value: C, (C), (C) 12, C. 12; but not "A and B".
_CHOICE = r"\(?([A-Z])(?:\)|[.:]|$)\s*((?!.*(?:\b[A-Z]\b|\band\b|\bor\b)).*)"
# A word, but the name of a function.
_WORD = (r"(?<![\\A-Za-z])(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|exp|max|min|mod|gcd|lcm|sqrt|and|.?matrix"
         r"|pi\b)[A-Za-z]{3,}")
_INTEGER = r"[-+]?\d{1,100}"                            # int() refuses thousands of digits
# What math-verify drops because it takes it for a unit, and so finds a number equal to more than a
# number: tonnes and at-bats, "3 halves", an inequality, the minutes after the hours.
_MORE_THAN_A_NUMBER = (rf"\d(?:t|ab)$|\d\s*(?:\\text\{{\s*)?{_NO_UNIT}|^(?:[<>]|\\[lg]eq?\b)"
                       r"|\d\s*\\text\{[^{}]*[A-Za-z][^{}]*\}[^\d^]*\d")


def _align(a, b):
    """Two normal forms, made alike where each depends on the other."""
    # Where one side names its values, x = 1, y = 2, the order of the other counts.
    if ("=" in a) != ("=" in b):
        named = max(len(re.findall(_NAME, text)) for text in (a, b))
        a, b = (normalise_answer(re.sub(_NAME, "", text)) for text in (a, b))
        if named > 1:
            a, b = _ordered(a), _ordered(b)
    # math-verify skips dots. As a term of their own they stay in their place.
    if re.search(_DOTS, a + b):
        a, b = (_ordered(re.sub(_DOTS, r"\\omega_{0}", text)) for text in (a, b))
    # A choice with its value, "(C) 12", is what the gold answer is: a letter or the value.
    if (choice := re.fullmatch(_CHOICE, a)) and not re.fullmatch(_CHOICE, b):
        a = choice[2] or a
    return a, b


def _compare(a, b):
    """(verdict, reason) where the normal forms decide; None where math-verify has to."""
    if not a:
        return False, "no answer"
    plain, wanted = (re.sub(r"\s", "", text).rstrip("\\%") for text in (a, b))
    # A per cent sign may be left out; whether 50% is 0.5 is for math-verify to say.
    if plain == wanted:
        return True, "same text"
    if re.fullmatch(_INTEGER, a) and re.fullmatch(_INTEGER, b):
        same = int(a) == int(b)
        return same, "same integer" if same else "different integer"
    if len(a) > 1000:
        return False, "too long for an answer"
    if wants := re.fullmatch(_CHOICE, b):               # the gold answer is C or (C)
        choice = re.fullmatch(_CHOICE, a) or re.fullmatch("([a-z])()", plain)
        same = bool(choice) and choice[1].upper() == wants[1]
        return same, "same choice" if same else "different choice"
    # Words are no product of their letters, as they are to math-verify.
    words = [[word.lower() for word in re.findall(_WORD, text)] for text in (a, b)]
    if any(words):
        same = [word.removesuffix("s") for word in words[0]] == [
            word.removesuffix("s") for word in words[1]]
        same = same and not re.search(r"\d", a + b)
        return same, "same words" if same else "different words"

    # What follows is where math-verify would find answers equal that are not.
    if re.fullmatch("[a-z][A-Z]", wanted + plain):      # E for e: it ignores case
        return False, "different letter"
    if re.fullmatch(_NUMBER, b) and "," not in b and re.search(_MORE_THAN_A_NUMBER, a):
        return False, "more than a number"
    if _base(a) and _base(a) != _base(b):               # it drops what is written below
        return False, "different base"
    if "=" in b and "=" not in a:                       # it would take the right side for a value
        return False, "an equation is no value"
    # It does not tell the tuple (1,2) from the numbers 1,2 or the set \{1,2\}.
    if {"tuple", "collection"} == {_kind(a), _kind(b)}:
        return False, "a tuple has an order"
    return None


def _base(text):
    """The base of a number such as 52_8 or 1A_{16}, as text, or None."""
    number = re.fullmatch(r"[\dA-F]+_\{?(\d+)\}?", text)
    return number and number[1]


def _ordered(text):
    """Several things as a tuple."""
    return f"({text})" if _kind(text) == "collection" else text


def _kind(text):
    """Of several things: a "tuple" in parentheses, an unordered "collection", or None = unclear."""
    if "," not in text or "=" in text:
        return None
    if re.fullmatch(r"\([^()]*\)", text):
        return "tuple"
    return None if re.search(r"[(\[]", text) else "collection"


# A worker is a process of its own that compares one pair a line: sympy, which math-verify uses, can
# hang or eat the memory, and math-verify's own time limit works in the main thread only.
_GRADER = r"""
import json, logging, os, resource, signal, sys
out, sys.stdout = sys.stdout, sys.stderr                # what libraries print is no verdict
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
logging.disable(logging.WARNING)
from math_verify import parse, verify
from sympy import (Eq, Expr, FiniteSet, Float, Interval, N, Tuple, false, nan, oo, true, zoo)

# For sympy oo^9 - 17 is zero now and then, depending on what it has seen before.
def infinite(parsed):
    return any(isinstance(x, Expr) and x.has(oo, -oo, zoo, nan) for x in parsed)

# The values in it, in order; None where it has variables.
def values(x):
    if isinstance(x, (Tuple, FiniteSet, Interval)):
        found = [values(part) for part in x.args if part not in (true, false)]
        found = None if None in found else sum(found, [])
        sort = isinstance(x, FiniteSet) and found and all(v.is_real for v in found)
        return sorted(found) if sort else found
    return [N(x.doit(), 30)] if isinstance(x, Expr) and not x.free_symbols else None

# math-verify compares to six decimals, so 2^-60 is 2^-61 to it. A decimal stands for a number with
# which it has six digits in common.
def close(x, y):
    ours, theirs = values(x), values(y)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return True
    limit = 5e-6 if x.has(Float) or y.has(Float) else 1e-20
    return all(p == q or abs(p - q) <= limit * abs(q) for p, q in zip(ours, theirs))

# Of an equation its right side is taken. It is the value only where a name stands on the left, or
# the same number.
def is_value(x):
    return not isinstance(x, Eq) or x.lhs.is_Symbol or (x.lhs - x.rhs).doit().is_zero

print("ready", file=out, flush=True)
for line in sys.stdin:
    signal.alarm(60)                                    # ends it where its parent is dead
    try:
        gold, answer = (parse("\\boxed{%s}" % x, parsing_timeout=None) for x in json.loads(line))
        result = (bool(answer and gold) and infinite(answer) == infinite(gold)
                  and verify(gold, answer, timeout_seconds=None)
                  and close(answer[0], gold[0])
                  and (isinstance(gold[0], Eq) or is_value(answer[0])))
    except MemoryError:
        os._exit(3)
    except Exception:
        result = False
    signal.alarm(0)                                     # it may wait for the next pair for long
    print(json.dumps(bool(result)), file=out, flush=True)
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
        process.stdin.write(json.dumps([gold, answer]) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else None
    except OSError:                                     # it died before this pair
        line = ""
    if line:
        _graders.put(process)
        equal = line == "true\n"
        return equal, f"{'equal' if equal else 'different'} for math-verify"
    process.kill()
    process.communicate()
    return None, "comparison crashed" if line == "" else f"no verdict in {seconds:g} s"


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
