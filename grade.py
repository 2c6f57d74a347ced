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
    asked = []
    for response, gold in pairs:
        pair = extract_answer(response) or "", _last_box(gold) or gold
        asked.append(pair if pair[0] == pair[1] else _align(*map(normalise_answer, pair)))
    verdicts = {pair: _compare(*pair) for pair in asked}
    undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
    if undecided:
        with ThreadPoolExecutor(min(len(undecided), _workers())) as threads:
            found = threads.map(lambda pair: _math_verify(*pair, seconds), undecided)
            verdicts.update(zip(undecided, found))
    return [verdicts[pair] for pair in asked]


def _workers():
    """The share of the machine's cores that this process may use: others may run under torchrun."""
    if hasattr(os, "sched_getaffinity"):                # on Linux, where a container may have fewer
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1


def main(argv):
    """
    `grade.py RESPONSE GOLD` shows how a verdict comes about; `grade.py --regrade FOLDER` grades the
    samples of eval_math.py again and shows what would change, without changing it.
    """
    if len(argv) != 2:
        sys.exit(f"error: two arguments are needed, {len(argv)} were given\n{main.__doc__}")
    records = [{"response": argv[0], "answer": argv[1]}]
    if argv[0] == "--regrade":
        from utils import read_lines

        records = read_lines(f"{argv[1]}/samples.jsonl")
    pairs = [(record["response"], record["answer"]) for record in records]
    for record, (response, gold), (verdict, why) in zip(records, pairs, grade_all(pairs)):
        if record.get("correct", "not yet") != verdict:
            answer = extract_answer(response)
            print(f"{answer!r}, in normal form {normalise_answer(answer or '')!r}; gold {gold!r}, "
                  f"{normalise_answer(gold)!r}; {verdict}: {why}; before: {record.get('correct')}")


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
    2. what is in the last <answer></answer>, or follows the last "####" that is no heading, as at
       the end of GSM8K's solutions;
    3. to the end of its sentence, what follows the last "answer is", "Answer:", "# Answer" or "A:"
       behind which there is a value.
    """
    thoughts, _, rest = response.translate(_EATEN).rpartition("</think>")
    return _find(rest) or _find(thoughts)


def _find(text):
    if answer := _last_box(text):
        return answer
    rest = re.split(r"\\(?:boxed|fbox)\b", text)[-1]
    # Behind the hashes of a heading, "#### Step 2: add", there is a word.
    marked = r"(?s)<answer>(.*?)</answer>|(?<!#)####(?!#)(?![^\w\\]*[A-Za-z]{3})[^\S\n]*([^\n]+)"
    found = ["".join(groups) for groups in re.findall(marked, rest)]
    return found[-1] if found else _after_phrase(rest)


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


_PHRASE = re.compile(r"""
    # "the answer is", "answer to the question is", "**answer:**", but not "to answer this: ..."
    (?<!to[ ]) \banswer\b (?: [ ](?:to|for|of)\b[^.:=\n]{0,60}? | [ ][a-z]{1,12} )?
    \**\s* (?: \bis\b | [:=] )
    # the heading "## Final answer"
  | ^\#+[ ]* (?:final[ ])? answer\b
    # the line "**Final answer**"
  | ^\** (?:final[ ])? answer \**$
    # "A:", unless it is a choice or a person, beside "B:"
  | ^A: (?! [\s\S]* ^B:)
    """, re.VERBOSE | re.IGNORECASE | re.MULTILINE)


def _after_phrase(response):
    ends = [match.end() for match in _PHRASE.finditer(response)]
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

# Patterns that the rules below have in common.
_PARTS = {
    # Digits with points and commas, then perhaps a fraction: -1,234.5 or 1\frac{4}{5} or \frac12.
    "NUMBER": r"[-+]?(?:\d[\d.,]*|\.\d+)?(?:(?<=[\d.])|\\[dt]?frac<PART><PART>)",
    "PART": r"\s*(?:\{[^{}]*\}|\d)",
    # What a unit may follow: a number, a product, power or quotient of numbers.
    "VALUE": r"<NUMBER>(?:(?:/|\*|\s*\\(?:times|cdot)\s*)<NUMBER>)?(?:\^\{?-?\d+\}?)?(?:\\pi)?",
    # Short units, fractions of units, words behind a space; then more of them, and powers.
    "UNIT": r"(?:\\mu\s*|/\s*)?(?:<SHORT>(?![A-Za-z])|\\Omega|\\frac<WORDS><WORDS>"
            r"|(?<=[\s/])[A-Za-z]{3,}\b)(?!.*\b(?:and|or|not)\b)"
            r"(?:[\sA-Za-z./-]|\\cdot|\^\s*\{?-?\d\}?|(?<=[A-Za-z])\d$)*",
    "WORDS": r"\s*\{[A-Za-z\s]+\}",
    "SHORT": r"(?:[kcmnu]?[mgslLNVAJW]|[KCFT]|[kM]?Hz|k?Pa|of|in|ft|sq|yd|oz|lb|mi|hr?)",
    # Words after a number that are no unit: "3 halves", "3 squared", "3 less than x".
    "OTHER": r"(?:(?:k|hundred|thousand|[mbtr]+illion|dozen)s?|half|halves|thirds?|quarters?"
             r"|(?:four|fif|six|seven|eigh|nin|ten)ths?|squared|cubed|factorial|plus|minus"
             r"|times(?= \S)|less than|more than|over|choose|out|to"
             r"|sin|cos|tan|log|ln|sqrt|and|or|mod|if|where|for)\b",
}
# What is written => what stands for it, in this order: a rule relies on those before it. <...> is
# one of the patterns above, and _ a space.
_RULES = r"""
Signs that math-verify does not read; "~" is a space in LaTeX.
    [−–] => -
    [÷⁄∕] => /
    · => \\cdot_
    ° => ^\\circ_
    ∞ => \\infty_
    ≈ => \\approx_
    ∪ => \\cup_
    ∩ => \\cap_
    ∈ => \\in_
    ∅|\\varnothing => \\emptyset_
    √\s*(\w+|\([^()]*\)) => \\sqrt{\1}
    ~ => _
Currencies; LaTeX's brackets \( \) \[ \], its \! and sizes of brackets.
    (?:US)?\\?\$|USD\b|[£€¥₹¢] =>
    (?<!\\)\\(?:[][()!]|(?:left|right|[bB]ig+[lr]?|displaystyle)(?![A-Za-z])) =>
LaTeX's spaces.
    (?<!\\)\\(?:[,;:>\ ]|q?quad\b)|\{\s\} => _
Dots; brackets of a vector.
    \.{3}|\\c?dots => \\ldots_
    \\langle => (
    \\rangle => )
Python's power x**2.
    (?<=[\w)])\*\*(?=[\w({-]) => ^
Commands that only change looks: colours, then fonts and frames.
    \\(?:text|page)?color(?:box)?\s*(?:\{\w+\}|\w+) =>
    \\(?:text\w*|math(?!bb|cal)\w+|operatorname|\w*box)\s*\{([^{}]*)\} => _\1_
    \\(?:bm|emph|boldsymbol|underline|[lL]arge)\s*\{([^{}]*)\} => _\1_
Quotes and markup around the answer, punctuation after it; words before it.
    ^[\s*_`"':]+|[\s*_`"'.,;:\\]+$ =>
    (?i)^(?:(?:the\s)?(?:final\s)?answer(?:\sis|:)+|option|choice)\s*(?=\S) =>
    ^an?\s(?=[a-z]{2}) =>
    (?i)^(?:about|around|approximately|roughly|\\approx)\s*(?=\S) =>
Base ten and degrees say nothing, nor do brackets around another base. "percent" is a sign.
    _\{?10\}?$ =>
    ^\(([\dA-F]+)\)(?=_) => \1
    \s*(?:\^\s*(?:\{\s*(?:\\circ|o)\s*\}|\\circ)|\\degree)\s*[CFK]?\s*$ =>
    \s*per\s?cent\b => \\%
The mixed number 3 1/2; 3 out of 4; 2 to 3.
    ^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)\b => \1\\frac{\2}{\3}
    ^(\d+)\s+out\sof\s+(\d+)$ => \1/\2
    ^(\d+)\s+to\s+(\d+)$ => \1:\2
Words in brackets after a number, and units: 15 cm^2, 60 miles per hour, 5 [cm], 12.5/hour.
    ^(<VALUE>.*?)\s*[(\[][A-Za-z\s]+[)\]]$ => \1
    ^(<VALUE>(?::\d\d)?)\s*(?!<OTHER>)<UNIT>$ => \1
Python's exponent 1.5e3, and pi without a backslash.
    ^([-+]?[\d.]+)[eE]([-+]?\d{1,3})$ => \1\\times_10^{\2}
    (?<=\d)pi\b => \\pi
    \s+ => _
Separators of thousands: 1,234,567.5 or 1 234 567.5; in India 12,34,567.
    (?<=\d)[,\s'_](?=(?:\d{2,3}[,\s'_])*\d{3}(?:\.\d+)?$) =>
A repeating decimal gets more digits than are compared.
    (?<=\d)(\.\d*)\\(?:overline|bar)\{(\d+)\} => \1\2\2\2\2\2\2\2\2
Number words, as in 2.5 million dollars, but not in 3 thousand five.
    ^(<NUMBER>)\s*(?:k|thousand)s?(?:\s[a-z]+s)?$ => \1_\\times_10^{3}
    ^(<NUMBER>)\s*millions?(?:\s[a-z]+s)?$ => \1_\\times_10^{6}
    ^(<NUMBER>)\s*billions?(?:\s[a-z]+s)?$ => \1_\\times_10^{9}
    ^(<NUMBER>)\s*dozens?(?:\s[a-z]+s)?$ => \1_\\times_12
"""


def _expand(text):
    return re.sub("<([A-Z]+)>", lambda match: _expand(_PARTS[match[1]]), text)


def _read(table):
    rules = []
    for line in table.split("\n"):
        pattern, arrow, new = line.strip().partition(" =>")
        if arrow:
            rules.append((re.compile(pattern), new.strip().replace("_", " ")))
    return rules


_COMPILED = _read(_expand(_RULES))


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
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    return text.strip()


# ------------------------------------------------------------------------------------- comparing

# What names a value: x =, x_1 =, \theta =, f(2) =, f^{-1}(x) =.
_NAME = (r"(?:^|(?<=, )|(?<=,)|(?<=and ))(?:\\?[A-Za-z]\w*(?:_\{\w+\})?(?:\^\{-1\})?(?:\([^()]*\))?"
         r"|\([a-z](?:,\s*[a-z])*\))\s*=\s*")
# A choice, perhaps with its value: C, (C), (C) 12, C. 12; but not "A and B".
_CHOICE = r"\(?([A-Z])(?:\)|[.:]|$)\s*((?!.*(?:\b[A-Z]\b|\band\b|\bor\b)).*)"
# A word, but the name of a function.
_WORD = (r"(?<![\\A-Za-z])(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|exp|max|min|mod|gcd|lcm|sqrt"
         r"|and|.?matrix|pi\b)[A-Za-z]{3,}")
_INTEGER = r"[-+]?\d{1,100}"                            # int() refuses thousands of digits


def _align(a, b):
    """Two normal forms, made alike where each depends on the other."""
    # Where one side names its values, x = 1, y = 2, the order of the other counts.
    if ("=" in a) != ("=" in b):
        named = max(len(re.findall(_NAME, text)) for text in (a, b))
        a, b = (normalise_answer(re.sub(_NAME, "", text)) for text in (a, b))
        if named > 1:
            a, b = _ordered(a), _ordered(b)
    # math-verify skips dots. As a term of their own they stay in their place.
    if "\\ldots" in a + b:
        a, b = (_ordered(text.replace("\\ldots", "\\omega_{0}")) for text in (a, b))
    # Of a choice with its value, "(C) 12", that counts which the gold answer is.
    chosen, wanted = (re.fullmatch(_CHOICE, text) for text in (a, b))
    if chosen:
        a = chosen[1] if wanted else chosen[2] or a
    return a, wanted[1] if wanted else b


def _ordered(text):
    """Several things as a tuple."""
    return text if re.match(r"[(\[]|\\\{", text) else f"({text})"


def _compare(a, b):
    """(verdict, reason) where the normal forms decide; None where math-verify has to."""
    if not a:
        return False, "no answer"
    plain, wanted = (re.sub(r"(?<!\d)\s|\s(?!\d)", "", t).rstrip("\\%") for t in (a, b))
    # A per cent sign may be left out; whether 50% is 0.5 is for math-verify to say.
    if plain == wanted:
        return True, "same text"
    if re.fullmatch(_INTEGER, a) and re.fullmatch(_INTEGER, b):
        same = int(a) == int(b)
        return same, "same integer" if same else "different integer"
    if len(a) > 1000:
        return False, "too long for an answer"
    if re.fullmatch("[A-Z]", b):
        same = a.strip("()").upper() == b
        return same, "same choice" if same else "different choice"
    # Words are no product of their letters, as they are to math-verify.
    if re.search(_WORD, f"{a} {b}"):
        singular, wanted = (re.sub(r"s\b|[\s.,'-]", "", text.lower()) for text in (a, b))
        return singular == wanted, "compared as words"
    return None


# A worker is a process of its own that compares one pair a line: sympy, which math-verify uses, can
# hang or eat the memory, and math-verify's own time limit works in the main thread only.
_GRADER = r"""
import json, logging, os, re, resource, signal, sys
out, sys.stdout = sys.stdout, sys.stderr                # what libraries print is no verdict
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
logging.disable(logging.WARNING)
from math_verify import parse, verify
from sympy import Eq, Expr, FiniteSet, Float, Interval, N, Tuple, false, nan, oo, true, zoo
from sympy.core.relational import Relational

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

# math-verify compares to six decimals, so 2^-60 is 2^-61 to it. A decimal stands for a number that
# is none, with which it has six digits in common.
def close(x, y):
    ours, theirs = values(x), values(y)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return True
    limit = {0: 1e-20, 1: 5e-6, 2: 1e-12}[x.has(Float) + y.has(Float)]
    return all(p == q or abs(p - q) <= limit * abs(q) for p, q in zip(ours, theirs))

# Of an equation its right side is taken. It is a value where a name or the same number is on its
# left. Other relations are none.
def is_value(x):
    equal = isinstance(x, Eq) and (x.lhs.is_Symbol or (x.lhs - x.rhs).doit().is_zero)
    return equal or not isinstance(x, Relational)

# What is in a tuple has an order; 1, 2 and \{1, 2\} have none.
def same_kind(x, y):
    kinds = isinstance(x, FiniteSet), isinstance(y, FiniteSet)
    return kinds[0] == kinds[1] or not isinstance(x if kinds[1] else y, (Tuple, Interval))

# math-verify ignores case, as in e and E, a relation without a left side, what is written below,
# as a base, and two letters behind a number, for it takes them for tonnes and at-bats.
def skipped(answer, gold):
    base = re.fullmatch(r"[\dA-F]+_\{?(\d+)\}?", answer)
    return (re.fullmatch("[a-z][A-Z]", gold + answer) or base and base[1] not in gold
            or re.search(r"\d(?:t|ab)$", answer) and not re.search("[a-z]", gold)
            or bool(re.match(_RELATION, answer)) != bool(re.match(_RELATION, gold)))
_RELATION = r"[<>]|\\[lg]eq?\b"

print("ready", file=out, flush=True)
for line in sys.stdin:
    signal.alarm(60)                                    # ends it where its parent is dead
    try:
        texts = json.loads(line)
        gold, answer = (parse("\\boxed{%s}" % x, parsing_timeout=None) for x in texts)
        result = (bool(answer and gold) and not skipped(texts[1], texts[0])
                  and infinite(answer) == infinite(gold)
                  and verify(gold, answer, timeout_seconds=None)
                  and close(answer[0], gold[0]) and same_kind(answer[0], gold[0])
                  and is_value(answer[0]) == is_value(gold[0]))
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


if __name__ == "__main__":
    main(sys.argv[1:])
