"""
The toy world: everything the demo reads, made from one seed, without a network.

    python data/toy.py                # problems and tokenizer, a second; compare with `git diff`
    python data/toy.py --rebuild      # teacher and base student as well, about 20 minutes on 2 cores

A problem is "add these n digits modulo 10": the answer to "3+4+9?" is 6. A solution makes one addition at a time, in any
order it likes, and sometimes does the whole sum again in another order before it answers:

    4+9=3;3+3=6;
    3+9=2;2+4=6;\\boxed{6}

So a problem has many right solutions of very different lengths. The teacher is multi-modal, and the two directions of the
KL have something to disagree about. n is the difficulty.

It writes, under data/toy/:
    train.jsonl, easy.jsonl, middle.jsonl, hard.jsonl    {"problem", "answer", "solution"}; no problem is in two files
    teacher/, student/                                   Qwen3 checkpoints (bf16), each with its tokenizer
As with a chat teacher and a Base student, the two end a response with different ids: the teacher writes <|im_end|>, the base
student <|endoftext|>. The teacher was trained on some padding (as where the pad id is the end id and is not masked), so that
after its end it says the end again and again; the student has seen some chats, so it knows <|im_end|>, and <|endoftext|> after
it. The two embeddings are padded past the tokenizer, to different sizes.
"""

import os
import sys

if __name__ == "__main__":                               # this folder has a math.py
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

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
REDO, MAX_PASSES = 0.5, 4                                # chance to do the whole sum again before answering; at most 4 times
TRAIN_DIGITS = range(3, 9)
TEST_DIGITS = {"easy": (4,), "middle": (5, 6), "hard": (7, 8)}
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|im_end|>")
STUDENT_STOP, TEACHER_STOP = SPECIAL[0], SPECIAL[3]
PADDING, CHATS = 8, 0.1              # <|im_end|>s after the teacher's; share of the student's documents that end as a chat
CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
                 "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SPECS = {
    "student": dict(hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, vocab_size=272, stop=STUDENT_STOP,
                    ends=[([STUDENT_STOP], 1 - CHATS), ([TEACHER_STOP, STUDENT_STOP], CHATS)],
                    steps=1200, decay=False),            # stopped in mid-flight, at its full learning rate: room to grow
    "teacher": dict(hidden_size=128, num_hidden_layers=3, num_key_value_heads=1, vocab_size=288, stop=TEACHER_STOP,
                    ends=[([TEACHER_STOP] * (1 + PADDING), 1)], steps=2400, decay=True),
}


# ------------------------------------------------------------------------------------------------------------ problems

def solve(digits, rng):
    """One random solution: running sums modulo 10 in a random order, redone with probability REDO, then the box."""
    passes = []
    while not passes or (len(passes) < MAX_PASSES and rng.random() < REDO):
        rest = rng.sample(digits, len(digits))
        total, steps = rest[0], []
        for d in rest[1:]:
            steps.append(f"{total}+{d}={(total + d) % 10};")
            total = (total + d) % 10
        passes.append("".join(steps))
    return "\n".join(passes) + f"\\boxed{{{total}}}"


def make_problems(train=3000, test=256, seed=SEED):
    """{name: rows}. A problem is known by the multiset of its digits, so a reordered training problem is no test problem."""
    rng, seen, files = random.Random(seed), set(), {}
    for name, counts, size in [*((n, c, test) for n, c in TEST_DIGITS.items()), ("train", tuple(TRAIN_DIGITS), train)]:
        rows = files[name] = []
        mine = set()                                     # digits in this file; they may recur inside it in another order
        while len(rows) < size:
            digits = [rng.randrange(10) for _ in range(counts[len(rows) % len(counts)])]
            problem = "+".join(map(str, digits)) + "?"
            if tuple(sorted(digits)) in seen or problem in mine:
                continue
            mine |= {problem, tuple(sorted(digits))}
            rows.append({"problem": problem, "answer": str(sum(digits) % 10), "solution": solve(digits, rng)})
        seen |= {key for key in mine if isinstance(key, tuple)}
    return files


# ----------------------------------------------------------------------------------------------------------- tokenizer

def make_encoding():
    """Bytes, then one merge, "\\boxed{", then the special tokens: any text at all can be encoded."""
    ranks = {bytes([b]): b for b in range(256)} | {b"\\boxed{": 256}
    return tiktoken.Encoding("toy", pat_str=r"\\boxed\{|[\s\S]", mergeable_ranks=ranks,
                             special_tokens={token: 257 + i for i, token in enumerate(SPECIAL)})


def export_tokenizer(encoding, eos_token):
    """The same encoding as a transformers tokenizer (`tokenizer.json`), for AutoTokenizer and vLLM."""
    letters = bytes_to_unicode()
    vocab = {"".join(letters[b] for b in encoding.decode_single_token_bytes(i)): i for i in range(257)}
    # ignore_merges: a whole piece that is in the vocabulary is one token, as in tiktoken; there are no other merges
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(encoding._pat_str), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token, pad_token=STUDENT_STOP,
                                   chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def bytes_to_unicode():
    """GPT-2's printable stand-ins for the 256 bytes, as `tokenizer.json` spells them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


# -------------------------------------------------------------------------------------------------------------- models

def make_model(hidden_size, num_hidden_layers, num_key_value_heads, vocab_size, eos_token_id):
    config = Qwen3Config(
        hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, vocab_size=vocab_size, head_dim=32,
        num_attention_heads=hidden_size // 32, num_key_value_heads=num_key_value_heads, intermediate_size=3 * hidden_size,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=eos_token_id,
        initializer_range=1 / math.sqrt(hidden_size))    # with the usual 0.02 a model this narrow stays on a plateau
    return Qwen3ForCausalLM(config)


def pretrain(spec, batch_size=64, seed=SEED, digits=tuple(TRAIN_DIGITS), learning_rate=2e-3):
    """Next-token cross-entropy on fresh solutions of problems outside the test sets. Returns (model, last loss in nats)."""
    steps = spec["steps"]
    encoding = make_encoding()
    stop = encoding.encode_single_token(spec["stop"])
    held_out = {tuple(sorted(row["problem"][:-1].split("+"))) for name, rows in make_problems().items()
                if name != "train" for row in rows}
    endings, chances = zip(*[([encoding.encode_single_token(t) for t in end], chance) for end, chance in spec["ends"]])
    rng, end_rng = random.Random(seed), random.Random(seed + 1)
    torch.manual_seed(seed)
    model = make_model(spec["hidden_size"], spec["num_hidden_layers"], spec["num_key_value_heads"], spec["vocab_size"], stop)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    pool = []
    bar = trange(steps, desc=f"pretraining {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    for step in bar:
        while not pool:                                  # sixteen batches of similar lengths, in random order
            drawn = []
            while len(drawn) < 16 * batch_size:
                numbers = [rng.randrange(10) for _ in range(rng.choice(digits))]
                if tuple(sorted(map(str, numbers))) not in held_out:
                    prompt = encoding.encode(f"<|user|>{'+'.join(map(str, numbers))}?<|assistant|>", allowed_special="all")
                    drawn.append((prompt, [*encoding.encode(solve(numbers, rng)), *end_rng.choices(endings, chances)[0]]))
            drawn.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
            tokens_per_batch = sum(len(response) for _, response in drawn) / 16
            pool = [drawn[i:i + batch_size] for i in range(0, len(drawn), batch_size)]
            rng.shuffle(pool)
        inputs, targets = zip(*[(torch.tensor(p + r[:-1]), torch.tensor([-100] * (len(p) - 1) + r)) for p, r in pool.pop()])
        inputs = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        targets = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        for group in optimizer.param_groups:             # warm-up, then constant or cosine to a tenth
            decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)) if spec["decay"] else 1.0
            group["lr"] = learning_rate * min((step + 1) / 50, decay)
        # over a constant, not this batch's tokens: a mean would give short responses more weight
        loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens_per_batch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model, loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rebuild", action="store_true", help="train teacher and base student again")
    args = parser.parse_args()
    ROOT.mkdir(exist_ok=True)
    for name, rows in make_problems().items():
        (ROOT / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.set_num_threads(1)                             # the same rounding, so the same weights, on any number of cores
    for name, spec in SPECS.items():
        if args.rebuild:
            model, _ = pretrain(spec)
            model.to(torch.bfloat16).save_pretrained(ROOT / name)
        export_tokenizer(make_encoding(), spec["stop"]).save_pretrained(ROOT / name)


if __name__ == "__main__":
    main()
