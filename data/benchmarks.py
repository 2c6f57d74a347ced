"""
The real benchmarks and training prompts as JSONL with one schema: problem, answer, source.

    python data/benchmarks.py                         # all of them from the model hub, into data/ (pip install -e ".[data]")
    python data/benchmarks.py gsm8k math500                 # some of them
    python data/benchmarks.py --from-dir=DIR                # from local copies of the original files

Counts are checked (GSM8K test 1319, MATH500 500, MATH test 5000, AMC23 40, AIME24 30), and a checksum of every file's content
is written beside it and compared at the next run.
"""

import os
import sys

if __name__ == "__main__":                               # or this file would be everybody's `import math`
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import hashlib
import json
from pathlib import Path

from grade import extract_answer

HERE = Path(__file__).parent

# name: (rows, or None for any number; dataset on the hub, its configuration and split; names of local copies)
SOURCES = {
    "gsm8k": (1319, ("openai/gsm8k", "main", "test"), ["gsm8k_test.jsonl", "gsm8k.jsonl", "test.jsonl"]),
    "math500": (500, ("HuggingFaceH4/MATH-500", None, "test"), ["math500.jsonl", "MATH-500.jsonl"]),
    "math": (5000, ("DigitalLearningGmbH/MATH-lighteval", None, "test"), ["math.jsonl", "math_test.jsonl"]),
    "amc23": (40, ("math-ai/amc23", None, "test"), ["amc23.jsonl"]),
    "aime24": (30, ("HuggingFaceH4/aime_2024", None, "train"), ["aime24.jsonl", "aime_2024.jsonl"]),
    "deepscaler": (None, ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"), ["deepscaler.jsonl", "deepscaler.json"]),
}


class DataError(Exception):
    """What is wrong with a source, in one line."""


def convert(name, row, where):
    """One row of an original file in our schema; None for a training prompt without an answer."""
    problem = row.get("problem", row.get("question"))
    answer = row.get("answer")
    if name == "gsm8k" and isinstance(answer, str):      # a worked solution that ends in "#### 42"
        answer = answer.rpartition("####")[2].strip()
    if answer is None and row.get("solution"):           # MATH: only the solution, with a box
        answer = extract_answer(row["solution"])
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)                             # AMC23 has 27.0
    if name == "deepscaler" and answer in (None, ""):
        return None                                      # a prompt to train on needs an answer to be graded by
    if not problem or answer in (None, ""):
        raise DataError(f"{where}: no problem or no answer; found the keys {sorted(row)}")
    return {"problem": problem.strip(), "answer": str(answer).strip(), "source": name}


def read(path):
    """Rows of a .jsonl or .json (one list) file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def fetch(name):
    """Rows of the original dataset on the hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("fetching needs the datasets package: pip install -e '.[data]'; or use --from-dir") from error
    repo, configuration, split = SOURCES[name][1]
    try:
        return load_dataset(repo, configuration, split=split).to_list()
    except Exception as error:                           # whatever the network, the hub and the parsers of its files raise
        raise DataError(f"{name}: cannot fetch {repo}: {str(error).strip().splitlines()[0]}; copy its file here and use "
                        f"--from-dir") from error


def make(name, from_dir, out):
    """Write out/NAME.jsonl and its checksum; returns the number of rows, or None where from_dir has no copy of it."""
    count, _, local = SOURCES[name]
    if from_dir:
        found = [Path(from_dir) / file for file in local if (Path(from_dir) / file).is_file()]
        if not found:
            return None
        rows, where = read(found[0]), found[0]
    else:
        rows, where = fetch(name), name
    rows = list(filter(None, (convert(name, row, f"{where}, row {i}") for i, row in enumerate(rows, 1))))
    if count and len(rows) != count:
        raise DataError(f"{where}: {len(rows)} rows, {name} has {count}; is this another split, or a part of it?")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    digest, note = hashlib.sha256(text.encode()).hexdigest(), out / f"{name}.sha256"
    if note.is_file() and note.read_text().split()[0] != digest:
        raise DataError(f"{where}: its content is not what {note} was written for; delete that file if you want the new one")
    target = out / f"{name}.jsonl"
    target.with_suffix(".tmp").write_text(text, encoding="utf-8")
    target.with_suffix(".tmp").replace(target)
    note.write_text(f"{digest}  {name}.jsonl\n")
    return len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SOURCES)}; none: all")
    parser.add_argument("--from-dir", help="folder with the original files")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if unknown := set(args.names) - set(SOURCES):
        sys.exit(f"error: no dataset {sorted(unknown)[0]!r}; there are {', '.join(SOURCES)}")
    for name in args.names or SOURCES:
        try:
            rows = make(name, args.from_dir, args.out)
            done = f"{rows} rows -> {args.out / name}.jsonl" if rows else f"no copy in {args.from_dir}: left out"
            print(f"{name:<11} {done}")
        except DataError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
