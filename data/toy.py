"""
The toy world: everything the demo reads, made from one seed, without a network.

    python data/toy.py              # problems and tokenizer, a second; compare with git diff
    python data/toy.py --rebuild    # teacher and base student as well, about 20 minutes on a core

A problem is "add these n digits modulo 10": the answer to "3+4+9?" is 6, and n is how hard it is. A
solution makes one addition at a time, in any order, and sometimes does the whole sum again in
another order before it answers:

    4+9=3;3+3=6;
    3+9=2;2+4=6;\\boxed{6}

So a problem has many right solutions of very different lengths. The teacher is multi-modal, and the
two directions of the KL have something to disagree about.

The script writes, under data/toy/:
    train.jsonl, easy.jsonl, middle.jsonl, hard.jsonl
        {"problem", "answer", "solution"} on each line; no problem is in two files
    teacher/, student/
        Qwen3 checkpoints (bf16), each with its tokenizer

As with a chat teacher and a Base student, the two models end a response with different ids: the
teacher writes <|im_end|>, the base student <|endoftext|>. The teacher was trained on some padding,
as happens where the pad id is the end id and is not masked, so after its end it says the end again
and again. The student has seen some chats, so it knows <|im_end|>, and <|endoftext|> after it. The
two embeddings are padded past the tokenizer, to different sizes.
"""

import argparse
import json
import math
import random
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parent / "toy"
SEED = 42
REDO = 0.5                  # the chance to do the whole sum again before answering ...
MAX_PASSES = 4              # ... which may happen until it has been done so many times
TRAIN_DIGITS = range(3, 9)
TEST_DIGITS = {"easy": (4,), "middle": (5, 6), "hard": (7, 8)}

SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|im_end|>")
STUDENT_STOP = SPECIAL[0]
TEACHER_STOP = SPECIAL[3]
PADDING = 8                 # how many <|im_end|> follow the teacher's own in its training data
CHATS = 0.1                 # the share of the student's training documents that end as a chat does
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# ends: how a document ends in training, as (tokens, chance).
SPECS = {
    "student": dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=272,
        stop=STUDENT_STOP,
        ends=[([STUDENT_STOP], 1 - CHATS), ([TEACHER_STOP, STUDENT_STOP], CHATS)],
        # Training stops early, at the full learning rate, so the student has room to grow.
        steps=1200,
        decay=False,
    ),
    "teacher": dict(
        hidden_size=128,
        num_hidden_layers=3,
        num_key_value_heads=1,
        vocab_size=288,
        stop=TEACHER_STOP,
        ends=[([TEACHER_STOP] * (1 + PADDING), 1)],
        steps=2400,
        decay=True,
    ),
}


# ----------------------------------------------------------------------------------------- problems

def solve(digits, rng):
    """
    One random solution: running sums modulo 10 in a random order, done again with probability REDO,
    then the box.
    """
    passes = []
    while not passes or (len(passes) < MAX_PASSES and rng.random() < REDO):
        order = rng.sample(digits, len(digits))
        total = order[0]
        steps = []
        for digit in order[1:]:
            after = (total + digit) % 10
            steps.append(f"{total}+{digit}={after};")
            total = after
        passes.append("".join(steps))
    return "\n".join(passes) + f"\\boxed{{{total}}}"


def make_problems(train=3000, test=256, seed=SEED):
    """
    {file name: rows}. Two problems of the same digits count as one, whatever their order, so a
    reordered training problem is not in a test file.
    """
    rng = random.Random(seed)
    plan = [(name, counts, test) for name, counts in TEST_DIGITS.items()]
    plan.append(("train", tuple(TRAIN_DIGITS), train))

    files = {}
    used = set()            # the sorted digits of all problems in the files before this one
    for name, counts, size in plan:
        rows = []
        texts = set()       # inside a file the same digits may recur in another order
        here = set()        # the sorted digits of the problems in this file
        while len(rows) < size:
            count = counts[len(rows) % len(counts)]
            digits = [rng.randrange(10) for _ in range(count)]
            problem = "+".join(map(str, digits)) + "?"
            key = tuple(sorted(digits))
            if key in used or problem in texts:
                continue
            texts.add(problem)
            here.add(key)
            solution = solve(digits, rng)
            answer = str(sum(digits) % 10)
            rows.append({"problem": problem, "answer": answer, "solution": solution})
        files[name] = rows
        used |= here
    return files


# ---------------------------------------------------------------------------------------- tokenizer

def make_encoding():
    """Bytes, one merge, "\\boxed{", and the special tokens: any text at all can be encoded."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks[b"\\boxed{"] = 256
    return tiktoken.Encoding(
        "toy",
        pat_str=r"\\boxed\{|[\s\S]",
        mergeable_ranks=ranks,
        special_tokens={token: 257 + i for i, token in enumerate(SPECIAL)},
    )


def export_tokenizer(encoding, eos_token):
    """The same encoding as a transformers tokenizer (tokenizer.json), for vLLM too."""
    letters = bytes_to_unicode()
    vocab = {}
    for i in range(257):
        token = encoding.decode_single_token_bytes(i)
        vocab["".join(letters[b] for b in token)] = i

    # With ignore_merges a piece that is in the vocabulary as a whole is one token, as in tiktoken.
    # There are no other merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(encoding._pat_str), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=STUDENT_STOP,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def bytes_to_unicode():
    """GPT-2's printable stand-ins for the 256 bytes, as tokenizer.json spells them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain}
    for i, b in enumerate(others):
        letters[b] = chr(256 + i)
    return letters


# ------------------------------------------------------------------------------------------- models

def make_model(hidden_size, num_hidden_layers, num_key_value_heads, vocab_size, eos_token_id):
    """A Qwen3 of this size with random weights."""
    config = Qwen3Config(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        vocab_size=vocab_size,
        head_dim=32,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=3 * hidden_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        # With the usual 0.02 a model as narrow as this one stays on a plateau.
        initializer_range=1 / math.sqrt(hidden_size),
    )
    return Qwen3ForCausalLM(config)


def sums(digits=tuple(TRAIN_DIGITS)):
    """
    A function of a random generator: (problem, solution) of a random problem, or None where that is
    in one of the test files.
    """
    held_out = set()
    for name, rows in make_problems().items():
        if name != "train":
            held_out |= {tuple(sorted(row["problem"][:-1].split("+"))) for row in rows}

    def draw(rng):
        numbers = [rng.randrange(10) for _ in range(rng.choice(digits))]
        if tuple(sorted(map(str, numbers))) in held_out:
            return None
        return "+".join(map(str, numbers)) + "?", solve(numbers, rng)

    return draw


def pretrain(spec, draw, batch_size=64, seed=SEED, learning_rate=2e-3):
    """
    Train a model of SPECS with next-token cross-entropy on new documents, (problem, solution), from
    `draw`; see `sums`. Returns (model, last loss in nats).
    """
    steps = spec["steps"]
    encoding = make_encoding()
    stop = encoding.encode_single_token(spec["stop"])
    endings = []
    chances = []
    for end, chance in spec["ends"]:
        endings.append([encoding.encode_single_token(token) for token in end])
        chances.append(chance)
    rng = random.Random(seed)
    end_rng = random.Random(seed + 1)

    def document():
        """(prompt ids, response ids), or None."""
        drawn = draw(rng)
        if drawn is None:
            return None
        problem, solution = drawn
        prompt = encoding.encode(f"<|user|>{problem}<|assistant|>", allowed_special="all")
        return prompt, encoding.encode(solution) + end_rng.choices(endings, chances)[0]

    torch.manual_seed(seed)
    model = make_model(
        spec["hidden_size"], spec["num_hidden_layers"], spec["num_key_value_heads"],
        spec["vocab_size"], stop,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    size = sum(p.numel() for p in model.parameters())
    bar = trange(steps, desc=f"pretraining {size / 1e6:.2f}M parameters")
    pool = []
    for step in bar:
        while not pool:     # sixteen batches, each of documents of similar lengths, in random order
            drawn = []
            while len(drawn) < 16 * batch_size:
                if (pair := document()) is not None:
                    drawn.append(pair)
            drawn.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
            tokens_per_batch = sum(len(response) for _, response in drawn) / 16
            pool = [drawn[i:i + batch_size] for i in range(0, len(drawn), batch_size)]
            rng.shuffle(pool)

        inputs = []
        targets = []
        for prompt, response in pool.pop():
            inputs.append(torch.tensor(prompt + response[:-1]))
            targets.append(torch.tensor([-100] * (len(prompt) - 1) + response))
        inputs = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)                  # (B, T)
        targets = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)

        # The learning rate warms up, then stays or falls along a cosine to a tenth.
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)) if spec["decay"] else 1.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 50, decay)

        # The sum is divided by a constant and not by this batch's tokens: a mean would give short
        # responses more weight.
        logits = model(inputs).logits                                                   # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss / tokens_per_batch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model, loss.item()


def build(description, root, files, specs, train):
    """
    A toy world's script: problems (`files`, as of `make_problems`) and tokenizers go to `root`;
    with --rebuild also a model for each of `specs`, which train(name, spec) returns.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="train teacher and base student again"
    )
    args = parser.parse_args()

    root.mkdir(exist_ok=True)
    for name, rows in files.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (root / f"{name}.jsonl").write_text("".join(lines))

    torch.set_num_threads(1)        # the same rounding, so the same weights, on any number of cores
    for name, spec in specs.items():
        if args.rebuild:
            train(name, spec).to(torch.bfloat16).save_pretrained(root / name)
        export_tokenizer(make_encoding(), spec["stop"]).save_pretrained(root / name)


if __name__ == "__main__":
    build(__doc__, ROOT, make_problems(), SPECS, lambda name, spec: pretrain(spec, sums())[0])
