"""
Is an answer right, and how good is a model: extracting and comparing answers, Pass@k, evaluations.
"""

import bisect
import functools
import json
import math
import os
import queue
import re
import select
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from engine import agree, check_gaps, score
from utils import UserError, derive_seed

# ------------------------------------------------------------------------------------------------------------- grading

def grade(response, gold):
    """(verdict, reason) of one response: `grade_all` of one."""
    return grade_all([(response, gold)])[0]


def grade_all(pairs, seconds=5.0):
    """
    [(verdict, reason)] for (response, gold answer) pairs. The verdict is True, False, or None = ungraded: comparing took longer
    than `seconds`, or crashed. Equal texts and integers are decided here, the rest by math-verify in worker processes.
    """
    results, undecided = [], {}
    for i, (response, gold) in enumerate(pairs):
        answer = extract_answer(response)
        results.append((False, "no answer") if answer is None else _compare(answer, gold))
        if results[i] is None:
            undecided.setdefault((normalise_answer(answer), normalise_answer(gold)), []).append(i)
    if undecided:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        with ThreadPoolExecutor(min(len(undecided), workers)) as threads:
            for rows, result in zip(undecided.values(), threads.map(lambda pair: _math_verify(*pair, seconds), undecided)):
                for i in rows:
                    results[i] = result
    return results


_BOX = re.compile(r"\\(?:boxed|fbox)")
_BRACES = re.compile(_BOX.pattern + r"(?:\s*\{|\s+([-+]?[\d.,/]*\d|[A-Z]\b))|\\.|[{}]", re.DOTALL)     # \{ is no brace
_BETWEEN = re.compile(r"\$?\s*(?:,|,?\s*(?:and|or)\b)\s*\$?(?:[A-Za-z]\s*=\s*)?")     # boxes that are one answer
_PHRASE = re.compile(r"(?im)(?<!to )\banswer\b(?: (?:to|for|of)\b[^.:=\n]{0,60}?| [a-z]{1,12})?\**\s*(?:\bis\b|[:=])"
                     r"|^#+ *(?:final )?answer\b|^\**(?:final )?answer\**$")


def extract_answer(response):
    """
    Text in the last whole \\boxed{} or \\fbox{}, nested braces included ("\\boxed{3} and \\boxed{5}" is one answer); else the
    line after the last "####" that is no heading; else, to the end of its sentence, what follows the last "answer is",
    "Answer:", "# Answer" or "A:"; else None.
    """
    boxes, opened = [], []                               # (start, end, content); for each open brace None, or a box's start
    first = _BOX.search(response)
    for token in _BRACES.finditer(response, first.start()) if first else ():
        if token[0] == "}":
            if opened and (box := opened.pop()) is not None and response[box.end():token.start()].strip():
                boxes.append((box.start(), token.end(), response[box.end():token.start()]))
        elif token[0][-1] == "{" and token[0] != "\\{":
            opened.append(None if token[0] == "{" else token)
        elif token[1]:                                   # \boxed 5
            boxes.append((token.start(), token.end(), token[1]))
    if boxes:
        boxes.sort()
        start, _, answer = boxes.pop()
        while boxes and _BETWEEN.fullmatch(response[boxes[-1][1]:start]):
            start, _, before = boxes.pop()
            answer = f"{before}, {answer}"
        return answer
    for tail in reversed(re.findall(r"(?<!#)####(?!#)[^\S\n]*([^\n]+)", response)):
        if not re.match(r"[^\w\\]*[A-Za-z]{3}", tail):    # "#### Step 2: add" is a heading
            return tail
    found = [*_PHRASE.finditer(response), *([] if re.search("(?m)^B:", response) else re.finditer("(?m)^A:", response))]
    if found:
        tail = response[max(match.end() for match in found):][:500].lstrip(" \n\t:*")
        tail = tail.removeprefix("$$").removeprefix("\\[").lstrip()
        sentence = re.split(r"(?<!\\)[.!?]\s|\n|[.!?]?$", tail, maxsplit=1)[0]
        if len(re.findall("[A-Za-z]{3,}", re.split(r"[\d\\]", sentence, maxsplit=1)[0])) >= 2:
            sentence = (re.findall(r"[-+]?\d[\d,./]*%?", sentence) or [sentence])[-1]       # "Janet makes $18 a day"
        return sentence or None
    return None


_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "°": "^\\circ ", "∞": "\\infty ", "π": "\\pi ",
    "√": "\\sqrt ", "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "∅": "\\emptyset ",
    "\xa0": " ", "~": " ", "£": "", "€": "", "¥": "", "₹": "", "¢": ""})
_NUMBER = r"[-+]?(?:\d[\d.,]*|\.\d+)?(?:(?<=[\d.])|\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d))"
_COUNT = r"(?:hundred|thousand|million|billion|trillion|dozen)"
# words after a number that are no unit: "3 halves", "3 squared", "3 less than x"
_NO_UNIT = (rf"(?:{_COUNT}s?|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?|squared|cubed|factorial|"
            r"plus|minus|times|less than|more than|over|choose|sin|cos|tan|log|ln|sqrt|and|or|mod|if|where|for)\b")
_RULES = [(re.compile(pattern), new) for pattern, new in (           # in this order
    (r"\\?\$|USD\b|(?<!\\)\\(?:[][()!]|(?:left|right|[bB]ig+[lr]?|displaystyle)(?![A-Za-z]))", ""),
    (r"(?<!\\)\\(?:[,;:> ]|q?quad\b)|\{ \}", " "), (r"\{,\}", ","), (r"\\varnothing", r"\\emptyset"),
    (r"(?<![\w)])\*\*(.+?)\*\*", r"\1"), (r"(?<=[\w)])\*\*(?=[\w({-])", "^"), (r"\*\*", ""),        # bold; Python's power
    (r"\\(?:underline|boxed|fbox|mathbf|textbf|textit|boldsymbol|mathsf|bm|[lL]arge)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\color\s*(?:\{\w+\}|\w+)", ""), (r"^\s*\\text\w*\s*\{([^{}]*\d[^{}]*)\}\s*$", r"\1"),
    (r"^[\s*_`\"':]+|[\s*_`\"'.,;:\\]+$", ""),
    (r"(?i)^(?:\\text\{)?(?:the )?(?:final )?answer(?: is|:)+\s*\}?", ""),
    (r"\s*per ?cent\b", r"\\%"), (r"_\{?10\}?$", ""),
    (r"\s*(?:\^\s*(?:\{\s*(?:\\circ|\\text\{o\})\s*\}|\\circ)|\\degree)\s*$", ""),
    (r"^([-+]?\d+)\s+(\d+)/(\d+)\b", r"\1\\frac{\2}{\3}"),                              # 3 1/2
    # "60 miles per hour", "15\text{ cm}^2", "5 km/h"
    (rf"^({_NUMBER})\s*\\(?:text|mathrm|mbox)\s*\{{\s*(?!{_NO_UNIT})[A-Za-z][^{{}}\d]*\}}"
     r"(?:\s*\^\s*\{?\d\}?)?$", r"\1"),
    (rf"^({_NUMBER})\s+(?!{_NO_UNIT})(?:(?:[A-Za-z]{{3,}}|of|in|ft|[ckm]m|[km]g|yd|oz|lb)\b[\sA-Za-z./-]*|"
     r"(?:[kcm]?[mg]|ft|mi)/\w+)(?:\^\s*\{?\d\}?)?$", r"\1"),
    (r"^([-+]?[\d.]+)[eE]([-+]?\d{1,3})$", r"\1\\times 10^{\2}"), (r"(?<=\d)pi\b", r"\\pi"), (r"\s+", " "))]


@functools.lru_cache(maxsize=4096)
def normalise_answer(text):
    """Without what never changes an answer: markup, spaces of LaTeX, currency and units, degrees, thousands separators."""
    text = text.translate(_SYMBOLS)
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    text = text.strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?", text):
        text = re.sub("[, ]", "", text)
    more = rf"(?: (?!.*{_COUNT}|.*\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b)[a-z ]*)?"
    if named := re.fullmatch(rf"({_NUMBER})\s*(?:\\text\s*\{{\s*)?({_COUNT})s?{more}\s*\}}?", text):
        zeros = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}.get(named[2])
        text = f"{named[1]} \\times " + (f"10^{{{zeros}}}" if zeros else "12")
    return text


def _compare(answer, gold):
    """(verdict, reason) where texts or integers decide, else None."""
    if answer == gold != "":
        return True, "same text"
    a, b = normalise_answer(answer), normalise_answer(gold)
    if not a:
        return False, "no answer"
    plain, wanted = (re.sub(r"\s", "", re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)) for text in (a, b))
    if plain == wanted or "%" in plain + wanted and plain.rstrip("\\%") == wanted.rstrip("\\%"):
        return True, "same text"
    if _INTEGER.fullmatch(a) and _INTEGER.fullmatch(b):
        return (True, "same integer") if int(a) == int(b) else (False, "different integer")
    if len(a) > 1000:
        return False, "too long for an answer"
    if re.fullmatch(r"[A-Z]|\([A-Z]\)", wanted):        # a choice: "(C)", "C: 5", "c"
        choice = re.fullmatch(r"\(?([A-Za-z])(?:\)|[.:]|$)(?!.*(?:\b[A-Z]\b|\band\b|\bor\b)).*",
                              re.sub(r"\\text\w*\s*\{|^\s+", "", a))
        return (True, "same choice") if choice and choice[1].upper() == wanted.strip("()") else (False, "different choice")
    if re.fullmatch("[a-z][A-Z]", wanted + plain):       # e and E; math-verify ignores case
        return False, "different letter"
    bases = [re.fullmatch(r"[\dA-F]+_\{?(\d+)\}?", text) for text in (a, b)]
    # math-verify drops what it takes for units: tonnes, at-bats, "halves", the minutes after the hours
    if re.fullmatch(_NUMBER, b) and "," not in b and re.search(
            rf"\d(?:t|ab)$|\d\s*(?:\\text\{{\s*)?{_NO_UNIT}|^(?:[<>]|\\[lg]eq?\b)|"
            r"\d\s*\\text\{[^{}]*[A-Za-z][^{}]*\}[^\d^]*\d", a):
        return False, "more than a number"
    if bases[0] and (not bases[1] or bases[0][1] != bases[1][1]):
        return False, "different base"                   # math-verify drops what is written below
    # "= 0" and the like: math-verify takes the right side of any equation for its value
    if "=" in b and "=" not in a and _is_relation(b) or "=" in a and b == "0" and _is_relation(a):
        return False, "an equation is no value"
    if {"tuple", "collection"} == {_kind(a), _kind(b)}:
        return False, "a tuple has an order"             # nor does it tell (1,2) from 1,2 and \{1,2\}
    return None


def _kind(text):
    if "," in text and "=" not in text:
        return "tuple" if re.fullmatch(r"\([^()]*\)", text) else None if re.search(r"[(\[]", text) else "collection"


def _is_relation(text):
    """Whether more than a name stands on the left: x = 5, f(2) = 5 and x_1 = 5 give a value, 2x + y = 5 does not."""
    return bool(re.search(r"[-+*/\d]", re.sub(r"_\{?\w+\}?|\([^()]*\)|\^\{-1\}", "", text.partition("=")[0])))


_INTEGER = re.compile(r"[-+]?\d{1,100}")                 # int() refuses thousands of digits

# One comparison a line, in a process of its own: math-verify limits its time by signals, and sympy can hang or eat the memory.
_GRADER = r"""
import json, logging, os, resource, signal, sys
out, sys.stdout = sys.stdout, sys.stderr
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
logging.disable(logging.WARNING)
from math_verify import parse, verify
from sympy import Expr, nan, oo, zoo
def infinite(parsed):                                    # oo^9 - 17 is zero for sympy now and then, by what it has seen before
    return any(isinstance(x, Expr) and x.has(oo, -oo, zoo, nan) for x in parsed)
print("ready", file=out, flush=True)
for line in sys.stdin:
    signal.alarm(60)                                     # hanging on after its parent is dead
    try:
        gold, answer = (parse("\\boxed{%s}" % text, parsing_timeout=None) for text in json.loads(line))
        result = bool(answer and gold) and infinite(answer) == infinite(gold) and verify(gold, answer, timeout_seconds=None)
    except MemoryError:
        os._exit(3)
    except Exception:
        result = False
    signal.alarm(0)                                      # waiting for the next pair, it may take as long as it likes
    print(json.dumps(bool(result)), file=out, flush=True)
"""
_graders = queue.SimpleQueue()                           # idle processes


def _math_verify(answer, gold, seconds):
    """(verdict, reason) by math-verify, or (None, why not)."""
    try:
        process = _graders.get_nowait()
    except queue.Empty:
        process = subprocess.Popen([sys.executable, "-c", _GRADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        if process.stdout.readline() != "ready\n":
            raise UserError("grading needs math-verify, and cannot import it: pip install 'math-verify>=0.9,<0.10'") from None
    try:
        process.stdin.write(json.dumps([gold, answer]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline() if select.select([process.stdout], [], [], seconds)[0] else None
    except OSError:                                      # it died before this pair
        line = ""
    if line:
        _graders.put(process)
        return (True, "equal for math-verify") if line == "true\n" else (False, "different for math-verify")
    process.kill()
    process.communicate()
    return None, "comparison crashed" if line == "" else f"no verdict in {seconds:g} s"


def pass_at_k(n, correct, k):
    """Unbiased estimate of P(at least one of k samples is right) from n samples: 1 - C(n - c, k) / C(n, k)."""
    if not 0 < k <= n:
        raise ValueError(f"k={k}: Pass@k needs 1 <= k <= n={n} samples per problem")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


# ---------------------------------------------------------------------------------------------------------- evaluation

def tokens_after_box(tokenizer, tokens):
    """Response tokens after the one that completes the first "\\boxed"; None when there is no box."""
    first = bisect.bisect_left(range(len(tokens) + 1), True, key=lambda n: "\\boxed" in tokenizer.decode(tokens[:n]))
    return len(tokens) - first if first <= len(tokens) else None


def repetition(tokens, n=8):
    """1 - distinct n-grams / n-grams: 0 where nothing is said twice, near 1 in a loop."""
    grams = [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def respond(engine, model, tokenizer, problems, prompts, pairs, sampling, seed, max_tokens, dtype=torch.float32, generate=None):
    """
    A record for each (index, sample) of `pairs`: the response of `model` to problems[index], of prompt ids prompts[index],
    graded and measured. Entropies are of the full softmax at T = 1, in nats, summed over tokens. generate: engine.generate, or
    what stands for it.
    """
    asked = [prompts[i] for i, _ in pairs]
    rollouts = (generate or engine.generate)(asked, sampling, [derive_seed(seed, "eval", i, j) for i, j in pairs])
    entropy, gaps = score(model, asked, rollouts, sampling.vocab_size, dtype, max_tokens)
    check_gaps(engine, model, gaps)
    responses = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _, _ in rollouts]
    golds = [problems[i]["answer"] for i, _ in pairs]
    verdicts = iter(grade_all([(response, gold) for response, gold in zip(responses, golds) if gold is not None]))
    records = []
    for (i, j), (tokens, _, reason), response, gold, h in zip(pairs, rollouts, responses, golds, entropy):
        verdict, why = (None, "no reference answer") if gold is None else next(verdicts)
        after = tokens_after_box(tokenizer, tokens)
        records.append({
            "index": i, "sample": j, "problem": problems[i]["problem"], "answer": gold, "response": response,
            "extracted": extract_answer(response), "correct": verdict, "reason": why, "length": len(tokens),
            "entropy_sum": h.sum().item(), "stop": tokenizer.decode(tokens[-1:]) if reason == "stop" else reason,
            "tokens_after_box": after, "entropy_after_box_sum": h[len(tokens) - after:].sum().item() if after else 0.0,
            "repetition": repetition(tokens)})
    return records


def summarise(records):
    """
    The numbers of one set of problems, from `respond`'s records.

    k = responses to a problem. avg_at_k: over problems with graded responses, pass_at: {k': Pass@k'} over those with at least
    k' graded responses, pass_at_k the last of these (None without any); ungraded responses count nowhere else. length and
    median_length in tokens; entropy = mean over tokens (nats), also before and after the first \\boxed; truncated = share of
    responses without a stop id; stop_reasons = shares; tokens_after_box over responses with a box; repetition = mean over
    responses.
    """
    counts = {}                                          # index: (responses, graded ones, right ones)
    for r in records:
        n, g, c = counts.get(r["index"], (0, 0, 0))
        counts[r["index"]] = n + 1, g + (r["correct"] is not None), c + (r["correct"] is True)
    shares, k = [c / g for _, g, c in counts.values() if g], max(n for n, _, _ in counts.values())
    whole = {i: [(g, c) for _, g, c in counts.values() if g >= i] for i in range(1, k + 1)}
    pass_at = {i: sum(pass_at_k(g, c, i) for g, c in rows) / len(rows) if rows else None for i, rows in whole.items()}
    boxed = [r for r in records if r["tokens_after_box"] is not None]
    tokens, after = sum(r["length"] for r in records), sum(r["tokens_after_box"] for r in boxed)
    before = sum(r["length"] for r in boxed) - after
    entropy_after = sum(r["entropy_after_box_sum"] for r in boxed)
    entropy_before = sum(r["entropy_sum"] for r in boxed) - entropy_after
    stops = [r["stop"] for r in records]
    return {
        "avg_at_k": sum(shares) / len(shares) if shares else None, "pass_at_k": pass_at[k], "pass_at": pass_at,
        "k": k, "problems": len(counts), "responses": len(records),
        "ungraded": sum(r["correct"] is None and r["reason"] != "no reference answer" for r in records),
        "length": tokens / len(records), "median_length": statistics.median(r["length"] for r in records),
        "truncated": stops.count("length") / len(stops),
        "stop_reasons": {stop: stops.count(stop) / len(stops) for stop in sorted(set(stops))},
        "entropy": sum(r["entropy_sum"] for r in records) / tokens,
        "entropy_before_box": entropy_before / before if before else None,
        "entropy_after_box": entropy_after / after if after else None,
        "tokens_after_box": after / len(boxed) if boxed else None,
        "repetition": sum(r["repetition"] for r in records) / len(records)}


def evaluate(engine, model, tokenizer, problems, prompts, sampling, samples, seed, max_tokens, rank=0, world=1,
             dtype=torch.float32, rescue=None):
    """
    Sample `samples` responses a problem and measure them: (summary with the sampling settings, records), on every rank. rescue:
    as in `agree`.
    """
    pairs = [(i, j) for i in range(len(problems)) for j in range(samples)][rank::world]
    records = respond(engine, model, tokenizer, problems, prompts, pairs, sampling, seed, max_tokens, dtype,
                      functools.partial(agree, rescue, engine.generate))
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, records)
        records = [record for part in parts for record in part]
    records.sort(key=lambda r: (r["index"], r["sample"]))
    return summarise(records) | {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
                                 "max_new_tokens": sampling.max_new_tokens}, records
