"""
The format of teacher trajectories: writer, reader, and the teacher's LM head for cached states.

A trajectory is a prompt with a response that the teacher wrote to it. sample.py writes them once,
train_distill.py reads them many times. They lie in one folder, in files called shards. A shard,
000_00000.safetensors (the rank that wrote it, its number), holds n of them, in all M tokens, R of
them tokens of responses:

    tokens          (M,)      int32   prompt, response, prompt, response, ...
    offsets         (n + 1,)  int64   where each prompt begins in tokens; the last entry is M
    prompt_lengths  (n,)      int32
    logps           (R,)      fp32    of the response tokens, under the full softmax at T = 1
    stopped         (n,)      uint8   1: the response ends with a stop id. 0: it was cut
    prompt_index    (n,)      int32   which prompt of the prompt file
    sample          (n,)      int32   which of the responses to that prompt
    hidden          (R, H_t)  bf16 or fp32, only with cache_hidden=True

hidden are the teacher's last hidden states (of size H_t) that predict the response tokens. Their
product with the teacher's LM head is its full distribution over the vocabulary of size V, so they
replace a forward of the teacher in training. They take 2 H_t bytes a token, not 2 V, and are exact.

The shard's metadata holds "settings", JSON of everything that decides what is in it, and "model",
the path of who wrote it, as it was given, for messages. The folder's tokenizer/ is the teacher's:

    tokenizer.decode(Trajectories("out/toy_sample", want_hidden=False)[0].tokens)    # to read one

A shard gets its name only when all of it is on the disk, so a kill at any time leaves whole shards.
Two shards belong together when their settings are equal. A byte that flips later is not noticed.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models import lm_head, load_model, model_revision
from utils import UserError, fingerprint, first_line, must_match

SHARDS = "[0-9][0-9][0-9]_[0-9][0-9][0-9][0-9][0-9]"     # their names, before the suffix


class Response(NamedTuple):
    """
    A prompt and one response to it, as training sees them, whoever wrote the response: the teacher
    (read from a shard, or written just now), the student, or the author of a prompt file.
    """
    prompt: list[int]                   # token ids, chat template included
    tokens: list[int]                   # token ids of the response, stop token included
    ended: bool                         # True: the last token is a stop id. False: it was cut
    hidden: torch.Tensor | tuple = ()   # (n, H_t): the teacher's state that predicts each of the n
                                        # tokens, or nothing where the teacher itself is run


class Sampled(NamedTuple):
    """A response on its way into a shard, with the log-probs and the place that a shard keeps."""
    prompt_index: int
    sample: int
    prompt: list[int]
    tokens: list[int]
    logps: list[float]
    stop_reason: str                    # "stop" or "length"


def write_shard(path, rows, hidden, metadata):
    """
    Write a whole shard, or nothing of it.

    path: a Path that ends in .safetensors. rows: [Sampled]. hidden: one (n, H_t) tensor a row, or
    []. metadata: {str: str}.
    Raises UserError where the disk is full or cannot be written; nothing is left behind then.
    """
    indices, samples, prompts, tokens, logps, stop_reasons = zip(*rows)
    int32 = torch.int32
    sequences = [torch.tensor([*p, *t], dtype=int32) for p, t in zip(prompts, tokens)]
    tensors = {
        "tokens": torch.cat(sequences),
        "offsets": torch.tensor([0, *map(len, sequences)]).cumsum(0),
        "prompt_lengths": torch.tensor([*map(len, prompts)], dtype=int32),
        "logps": torch.cat([*map(torch.tensor, logps)]),
        "stopped": torch.tensor([why == "stop" for why in stop_reasons], dtype=torch.uint8),
        "prompt_index": torch.tensor(indices, dtype=int32),
        "sample": torch.tensor(samples, dtype=int32),
    }
    if hidden:
        tensors["hidden"] = torch.cat(hidden)

    temporary = f"{path}.tmp"
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary) as file:
            os.fsync(file.fileno())     # a network disk may say only now that it is full
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {first_line(error)}; the shards before it are whole: make room "
            f"and start again with the same command"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


class Shard:
    """
    One shard, memory-mapped: a tensor is read from the disk where it is used. shard[row] is a
    Response. Raises UserError where the file is cut short, empty, or no shard at all.
    """

    def __init__(self, path):
        self.path = path
        try:
            file = safe_open(path, "pt")
            self.model = file.metadata()["model"]
            self.settings = json.loads(file.metadata()["settings"])
            self.tensors = tensors = {name: file.get_tensor(name) for name in file.keys()}
            self.offsets = tensors["offsets"]
            self.prompt_ends = self.offsets[:-1] + tensors["prompt_lengths"]
            # The (prompt index, sample) of each row.
            self.keys = [*zip(tensors["prompt_index"].tolist(), tensors["sample"].tolist())]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}); delete it and run sample.py again with "
                f"its command: what it held is sampled again"
            ) from error
        self.lengths = self.offsets[1:] - self.prompt_ends      # (n,) tokens of each response
        self.hidden_ends = self.lengths.cumsum(0)       # hidden has rows for response tokens only

    def __getitem__(self, row):
        tokens = self.tensors["tokens"]
        begin, end = self.offsets[row:row + 2]
        middle = self.prompt_ends[row]
        last = self.hidden_ends[row]
        hidden = self.tensors.get("hidden", ())[last - self.lengths[row]:last]
        return Response(
            prompt=tokens[begin:middle].tolist(),
            tokens=tokens[middle:end].tolist(),
            ended=bool(self.tensors["stopped"][row]),
            hidden=hidden,
        )


def shards(folder):
    """The shards of a folder in the order of their names, each opened when its turn comes."""
    return map(Shard, sorted(Path(folder).glob(f"{SHARDS}.safetensors")))


def finished(out_dir, settings):
    """
    {(prompt index, sample)} of all shards in out_dir. Raises UserError where a shard is damaged, or
    was made with other settings than these.
    """
    done = set()
    for shard in shards(out_dir):
        must_match(shard.settings, settings, shard.path, "choose another out_dir, or --overwrite")
        done.update(shard.keys)
    return done


class Trajectories:
    """
    The shards of a folder as one sequence: self[i] is a Response, in the order of prompts and
    samples, however they are spread over shards. Empty responses are left out: they teach nothing.

        settings    what made the shards
        revision    a fingerprint of which responses these are
        cached      whether a Response has hidden states: they are there, and want_hidden is True
        rows        [((prompt index, sample), number of the shard, row in it)], sorted

    Raises UserError where shards are damaged, have different settings or a sequence twice, or where
    there are none.
    """

    def __init__(self, folder, want_hidden):
        self.folder = Path(folder)
        self.shards = list(shards(folder))
        self.rows = []
        lengths = {}
        for number, shard in enumerate(self.shards):
            self.settings = self.shards[0].settings
            remedy = f"that is what the shards before it have: keep one kind in {folder}"
            must_match(shard.settings, self.settings, shard.path, remedy)
            for row, (key, length) in enumerate(zip(shard.keys, shard.lengths.tolist())):
                if length:
                    self.rows.append((key, number, row))
                    lengths[key] = length
        self.rows.sort()

        if not self.rows:
            raise UserError(
                f"no trajectories in {folder}: write them first: "
                f"python sample.py configs/toy_sample.py --out_dir={folder}"
            )
        if len(lengths) < len(self.rows):
            raise UserError(
                f"{folder} holds some sequences twice; keep the shards of one run of sample.py"
            )
        self.cached = self.settings["cache_hidden"] and want_hidden
        # It does not depend on how they lie in shards.
        self.revision = fingerprint(self.settings | {"lengths": sorted(lengths.items())})

    def check(self, cfg, horizon, positions, vocab_size):
        """
        UserError where the shards were sampled in another way than cfg says, or for a shorter
        horizon; and where a sequence does not fit the models: where its prompt and the first
        `horizon` tokens of its response pass `positions`, or an id is not below `vocab_size`.
        """
        wanted = {key: getattr(cfg, key) for key in ("temperature", "top_p", "top_k")}
        sampled = self.settings["max_new_tokens"]
        if horizon > sampled:
            raise UserError(
                f"{self.folder} was sampled with max_new_tokens={sampled}, the horizon is "
                f"{horizon}; lower max_new_tokens or horizons, or sample again"
            )
        for shard in self.shards:
            must_match(shard.settings, wanted, shard.path, "set that, or sample again")
            lengths = shard.tensors["prompt_lengths"] + shard.lengths.clamp(max=horizon)
            longest = lengths.max().item()
            if longest > positions:
                raise UserError(
                    f"{shard.path} has sequences of {longest} tokens, which pass "
                    f"max_position_embeddings={positions}; lower max_new_tokens or horizons"
                )
            largest = shard.tensors["tokens"].max().item()
            if largest >= vocab_size:
                raise UserError(
                    f"{shard.path} holds id {largest}, the smaller vocabulary ends at "
                    f"{vocab_size - 1}: choose models of one family, or sample with --student, "
                    f"which leaves such ids out"
                )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        _, number, row = self.rows[i]
        response = self.shards[number][row]
        return response if self.cached else response._replace(hidden=())


def load_head(path, data, dtype, device="cpu"):
    """
    (LM head (V, H_t), generation config) of the model at `path`, for the hidden states in `data`
    (Trajectories). Raises UserError where they are not this model's.
    """
    remedy = f"set teacher to {data.shards[0].model}, which made them, or sample again"
    must_match(data.settings, {"revision": model_revision(path)}, data.folder, remedy)
    model = load_model(path, dtype)                 # all of it goes but these two
    return lm_head(model).detach().to(device), model.generation_config
