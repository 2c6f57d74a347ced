"""
The real benchmarks and training prompts as JSONL files of one schema: problem, answer, source, and
the worked solution where there is one, for SFT on hard labels.

    python data/benchmarks.py                   # all of them, from the model hub, into data/
    python data/benchmarks.py gsm8k math500     # some of them
    python data/benchmarks.py --from-dir=DIR    # from local copies of the original files

Fetching needs `pip install -e ".[data]"`. The number of rows is checked (GSM8K test 1319, MATH500
500, MATH test 5000, AMC23 40, AIME24 30). A checksum of each file's content is written beside it,
and the next run refuses content that has changed.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))                    # the folder of grade.py

from grade import extract_answer


class Source(NamedTuple):
    rows: int | None                                    # how many there must be; None: any number
    hub: tuple                                          # (dataset, its configuration, its split)
    files: tuple                                        # names that a local copy may have


SOURCES = {
    "gsm8k": Source(
        1319, ("openai/gsm8k", "main", "test"),
        ("gsm8k_test.jsonl", "gsm8k.jsonl", "test.jsonl")),
    "math500": Source(
        500, ("HuggingFaceH4/MATH-500", None, "test"),
        ("math500.jsonl", "MATH-500.jsonl")),
    "math": Source(
        5000, ("DigitalLearningGmbH/MATH-lighteval", None, "test"),
        ("math.jsonl", "math_test.jsonl")),
    "amc23": Source(
        40, ("math-ai/amc23", None, "test"),
        ("amc23.jsonl",)),
    "aime24": Source(
        30, ("HuggingFaceH4/aime_2024", None, "train"),
        ("aime24.jsonl", "aime_2024.jsonl")),
    "deepscaler": Source(
        None, ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"),
        ("deepscaler.jsonl", "deepscaler.json")),
}


class DataError(Exception):
    """What is wrong with a source, in one line."""


def convert(name, row, where):
    """One row of an original file in our schema; None for a training prompt without an answer."""
    problem = row.get("problem", row.get("question"))
    answer, solution = row.get("answer"), (row.get("solution") or "").strip()
    if name == "gsm8k" and isinstance(answer, str):     # a worked solution that ends in "#### 42"
        solution = answer.strip()
        answer = answer.rpartition("####")[2].strip()
    if answer is None and solution:                     # MATH: only the solution, with a box
        answer = extract_answer(solution)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)                            # AMC23 has 27.0
    if name == "deepscaler" and answer in (None, ""):
        return None                                     # no answer to grade a response by
    if not problem or answer in (None, ""):
        raise DataError(f"{where}: no problem or no answer; found the keys {sorted(row)}")
    converted = {"problem": problem.strip(), "answer": str(answer).strip(), "source": name}
    return converted | ({"solution": solution} if solution else {})


def read(path):
    """The rows of a .jsonl file, or of a .json file that is one list."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def fetch(name):
    """The rows of the original dataset on the hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("fetching needs the datasets package: pip install -e '.[data]'; "
                        "or use --from-dir") from error
    repo, configuration, split = SOURCES[name].hub
    try:
        return load_dataset(repo, configuration, split=split).to_list()
    except Exception as error:          # whatever the network, the hub and its files' parsers raise
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{name}: cannot fetch {repo}: {reason}; copy its file here and use "
                        "--from-dir") from error


def make(name, from_dir, out):
    """
    Write out/NAME.jsonl and its checksum. Returns the number of rows, or None where from_dir has no
    copy of the file. Raises DataError where rows are missing or their content has changed.
    """
    source = SOURCES[name]
    if from_dir:
        copies = [Path(from_dir) / file for file in source.files]
        where = next((path for path in copies if path.is_file()), None)
        if where is None:
            return None
        originals = read(where)
    else:
        where = name
        originals = fetch(name)

    converted = [convert(name, row, f"{where}, row {i}") for i, row in enumerate(originals, 1)]
    rows = [row for row in converted if row is not None]
    if source.rows and len(rows) != source.rows:
        raise DataError(f"{where}: {len(rows)} rows, {name} has {source.rows}; "
                        "is this another split, or a part of it?")

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    digest = hashlib.sha256(text.encode()).hexdigest()
    checksum = out / f"{name}.sha256"
    if checksum.is_file() and checksum.read_text().split()[0] != digest:
        raise DataError(f"{where}: its content is not what {checksum} was written for; "
                        "delete that file if you want the new one")
    temporary = out / f"{name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out / f"{name}.jsonl")
    checksum.write_text(f"{digest}  {name}.jsonl\n")
    return len(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SOURCES)}; none: all")
    parser.add_argument("--from-dir", help="folder with the original files")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if unknown := set(args.names) - set(SOURCES):
        sys.exit(f"error: no dataset {sorted(unknown)[0]!r}; there are {', '.join(SOURCES)}")
    for name in args.names or SOURCES:
        try:
            rows = make(name, args.from_dir, args.out)
        except DataError as error:
            sys.exit(f"error: {error}")
        if rows is None:
            print(f"{name:<11} no copy in {args.from_dir}: left out")
        else:
            print(f"{name:<11} {rows} rows -> {args.out / name}.jsonl")


if __name__ == "__main__":
    main()
