"""
The format of teacher trajectories: writer and reader of shards, and the teacher's head for cached states.
"""

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

import utils
from utils import UserError

SHARDS = "[0-9][0-9][0-9]_[0-9][0-9][0-9][0-9][0-9]"     # their names, before the suffix



def finished(out_dir, settings):
    """{(prompt index, sample)} of all shards in out_dir. UserError where one is damaged, or was made with other settings."""
    done = set()
    for path in sorted(Path(out_dir).glob(f"{SHARDS}.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                made_with = json.loads(shard.metadata()["settings"])
                ids = list(zip(shard.get_tensor("prompt_index").tolist(), shard.get_tensor("sample").tolist()))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and start again: what it held is sampled again") from error
        for key, value in settings.items():
            if made_with.get(key) != value:
                raise UserError(f"{path} was made with {key}={made_with.get(key)!r}, not {value!r}; choose another out_dir, or "
                                f"--overwrite")
        done |= set(ids)
    return done


def write_shard(path, rows, hidden, metadata, records):
    """
    rows: (prompt index, sample, prompt ids, response ids, logps, stop reason); hidden: one (n, H_t) a row, or None. The JSON
    lines first, then the shard under its name at once: a shard is whole or is not there.
    """
    tensors = {
        "tokens": torch.cat([torch.tensor([*row[2], *row[3].tolist()], dtype=torch.int32) for row in rows]),
        "offsets": torch.tensor([0] + [len(row[2]) + len(row[3]) for row in rows]).cumsum(0),
        "prompt_lengths": torch.tensor([len(row[2]) for row in rows], dtype=torch.int32),
        "logps": torch.cat([row[4] for row in rows]),
        "stopped": torch.tensor([row[5] == "stop" for row in rows], dtype=torch.uint8),
        "prompt_index": torch.tensor([row[0] for row in rows], dtype=torch.int32),
        "sample": torch.tensor([row[1] for row in rows], dtype=torch.int32)}
    if hidden:
        tensors["hidden_crc"] = torch.tensor([zlib.crc32(h.view(torch.uint8).numpy()) for h in hidden])
    metadata = {**metadata, "checksum": utils.fingerprint(tensors)}
    if hidden:
        tensors["hidden"] = torch.cat(hidden)
    temporary, jsonl = f"{path}.tmp", path.with_suffix(".jsonl")
    try:
        utils.write_lines(jsonl, records, mode="w")
        save_file(tensors, temporary, {key: value if isinstance(value, str) else json.dumps(value) for key, value in
                                       metadata.items()})
        with open(temporary) as file:
            os.fsync(file.fileno())                      # a network disk may say only now that it is full
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        for leftover in (temporary, jsonl, f"{jsonl}.tmp"):
            Path(leftover).unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; the shards before it are whole: make room and start again with the "
                        f"same command") from error


class Trajectories:
    """
    The shards of sample.py (its header has the format), memory-mapped: self[i] = (prompt ids, response ids, ended by itself,
    hidden states (n, H_t) or None), in the order of prompts and samples however they are spread over shards.
    """

    def __init__(self, folder, want_hidden):
        self.folder, self.shards, self.rows = Path(folder), [], []
        for path in sorted(self.folder.glob("[0-9]*_[0-9]*.safetensors")):
            try:
                shard = safe_open(path, "pt")
                small = {key: shard.get_tensor(key) for key in shard.keys() if key != "hidden"}
                settings = json.loads(shard.metadata()["settings"])
                if shard.metadata()["checksum"] != utils.fingerprint(small):
                    raise ValueError("its checksum is wrong")
                ids = zip(small["prompt_index"].tolist(), small["sample"].tolist())
                small["prompt_ends"] = small["offsets"][:-1] + small["prompt_lengths"]
                small["hidden_begins"] = small["offsets"][:-1] - small["prompt_lengths"].cumsum(0) + small["prompt_lengths"]
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise self.damaged(path, error) from error
            for key, value in (self.settings if self.shards else settings).items():
                if settings.get(key) != value:
                    raise UserError(f"{path} was made with {key}={settings.get(key)!r}, shards before it with {value!r}; keep "
                                    f"one kind in {folder}")
            self.settings = settings
            filled = (small["offsets"][1:] > small["prompt_ends"]).tolist()      # an empty response teaches nothing
            self.rows += [(key, len(self.shards), row) for row, key in enumerate(ids) if filled[row]]
            self.shards.append((path, shard, small))
        if not self.rows:
            raise UserError(f"no trajectories in {folder}: write them first: python sample.py configs/toy_sample.py "
                            f"--out_dir={folder}")
        self.rows.sort()
        if len({key for key, _, _ in self.rows}) < len(self.rows):
            raise UserError(f"{folder} holds some sequences twice; keep the shards of one run of sample.py")
        self.cached = self.settings["cache_hidden"] and want_hidden

    @staticmethod
    def damaged(path, error):
        return UserError(f"{path} is damaged ({str(error).splitlines()[0]}); delete it and run sample.py again with its "
                         f"command: what it held is sampled again")

    def check(self, horizon, positions, vocab_size):
        """UserError where a sequence does not fit these models."""
        for path, _, small in self.shards:
            begins, ends, prompt_ends = small["offsets"][:-1], small["offsets"][1:], small["prompt_ends"]
            longest = (torch.minimum(ends, prompt_ends + horizon) - begins).max().item()
            if longest > positions:
                raise UserError(f"{path} has sequences of {longest} tokens, which pass max_position_embeddings={positions}; "
                                f"lower max_new_tokens or horizons")
            if (largest := small["tokens"].max().item()) >= vocab_size:
                raise UserError(f"{path} holds id {largest}, the smaller vocabulary ends at {vocab_size - 1}: choose models of "
                                f"one family, or sample with --student, which leaves such ids out")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        _, number, row = self.rows[i]
        path, shard, small = self.shards[number]
        (begin, end), middle = small["offsets"][row:row + 2].tolist(), small["prompt_ends"][row].item()
        tokens, hidden = small["tokens"][begin:end].tolist(), None
        if self.cached:
            first = small["hidden_begins"][row].item()                           # hidden has rows for response tokens only
            hidden = shard.get_slice("hidden")[first:first + end - middle]
            if zlib.crc32(hidden.contiguous().view(torch.uint8).numpy()) != small["hidden_crc"][row]:
                raise self.damaged(path, "the hidden states' checksum is wrong")
        return tokens[:middle - begin], tokens[middle - begin:], bool(small["stopped"][row]), hidden


def load_head(path, data):
    """The LM head (V, H_t) of `path`, without the rest. UserError where the hidden states in `data` are another model's."""
    made_by = data.settings["model"]
    utils.check_weights(path)
    try:
        index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        files = json.loads(Path(index).read_text())["weight_map"] if index else {}
        tied = utils.load_model_config(path).tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        with safe_open(cached_file(path, files.get(name, "model.safetensors")), "pt") as weights:
            head = weights.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read its LM head: {str(error).splitlines()[0]}") from error
    if head.shape[1] != data.settings["hidden_size"]:
        raise UserError(f"{data.folder} holds hidden states of {made_by}, of size {data.settings['hidden_size']}, the LM head "
                        f"of {path} takes {head.shape[1]}; set teacher={made_by!r}")
    ours, theirs = utils.model_revision(path), data.settings["revision"]
    if ours != theirs and len(ours) == len(theirs):      # a hub's commit and a folder's fingerprint cannot be compared
        raise UserError(f"{data.folder} holds hidden states of {made_by}, revision {theirs}; {path} is {ours}; set teacher to "
                        f"that one, or sample again")
    return head
