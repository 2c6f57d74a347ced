"""
A language model: how it is loaded, run over responses, and told from others.

Shape suffixes: B sequences in a micro-batch, T tokens in the longest of them, N response tokens,
H hidden size, V vocabulary. A *sequence* is a tuple that begins with prompt ids and response ids,
two lists of ints. Tokens go in and tokens come out: no response is ever decoded and encoded again.
"""

import contextlib
import functools
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import cached_file

from kernels import cpu  # noqa: F401  (its attention takes the place of transformers')
from utils import FULL_STATE, UserError, as_user_error, fingerprint, model_folder, print0

# ---------------------------------------------------------------------------------------- loading


def load_model(path, dtype, device="cpu", recompute=False, compiled=False):
    """
    A causal LM in eval mode (no dropout), in `dtype`. With recompute a layer keeps its input only,
    and runs again in the backward. Compiled, torch.compile makes a program of each part of a layer,
    one for all layers and lengths; engines have their own. UserError when it is missing or
    damaged, or when its logits are more than hidden states times the LM head, for the losses need
    no more.
    """
    path = model_folder(path)
    with as_user_error(f"cannot load a model in {path}"):
        for file in Path(path).glob("adapter_*"):
            raise ValueError(f"{file.name} would not be read; merge it into the weights")
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"it lacks {min(info['missing_keys'])}, which would be random")
        for layer in model.base_model.layers if recompute or compiled else ():
            if recompute:
                layer.forward = functools.partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )
            # Not the layer as a whole, for around its forward are recomputation and FSDP.
            for part in layer.children() if compiled else ():
                part.compile(dynamic=True)
    check_head(model, path)
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        print0(
            f"warning: {path}: of its generation_config only the stop ids stay: "
            f"{textwrap.shorten(str(error), 160)}"
        )
        model.generation_config = GenerationConfig(
            eos_token_id=model.generation_config.eos_token_id
        )
    return model.to(device).eval()


def check_head(model, name):
    """UserError unless logits are `hidden @ W.T` and nothing more."""
    found = [
        key
        for key in (
            "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
        if getattr(model.config, key, None) not in (None, 1.0)
    ]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        found = ["bias"]
    if found:
        raise UserError(
            f"{name}: its LM head has a {found[0]}; only logits = hidden @ W.T is supported"
        )


def lm_head(model):
    """W (V, H) of logits = hidden @ W.T."""
    return model.get_output_embeddings().weight


def load_checkpoint(path, model, optimizer):
    """Restore weights and AdamW's moments exactly, also of shards. The rate is the config's."""
    set_model_state_dict(model, load_model(path, torch.float32).state_dict(), options=FULL_STATE)
    moments = torch.load(f"{path}/optimizer.pt", mmap=True)
    if moments:  # there are none before the first update
        state = get_optimizer_state_dict(model, optimizer) | {"state": moments}
        set_optimizer_state_dict(model, optimizer, state, options=FULL_STATE)


def exchange_stops(model, own, theirs, prompt):
    """
    Let the rows of the model's own stop ids and those of another's change places, in order, so it
    ends as the other does, and is the same model otherwise. In place, before any training.

    It is done in the embedding and the LM head, which may be one matrix; but where a `prompt` (ids)
    has such an id, the model would read it in another way than it learned, so it is done in the
    head alone, which gets a matrix of its own. UserError where the ids form no pairs.
    """
    pairs = [(a, b) for a, b in zip(own, theirs) if a != b]
    ids = {*sum(pairs, ())}
    if not pairs or len(own) > len(theirs) or len(ids) < 2 * len(pairs):
        raise UserError(
            f"exchange_stops=True: stop ids {own} of the student and {theirs} of the teacher form "
            f"no pairs; set it False"
        )
    head = model.get_output_embeddings()
    weights = {head.weight, model.get_input_embeddings().weight}
    if ids & {*prompt}:
        model.config.tie_word_embeddings = False
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        weights = {head.weight}
    for weight in weights:
        for a, b in pairs:
            weight.data[[a, b]] = weight.data[[b, a]]
    print0(f"exchanged the rows of stop ids {pairs}; matrices: {len(weights)}")


def stop_ids(generation_config, tokenizer):
    """The ids that end a response: all of generation_config.eos_token_id, else the tokenizer's."""
    ids = generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    ids = [ids] if isinstance(ids, int) else ids
    if not ids or max(ids) >= len(tokenizer):
        raise UserError(
            f"{tokenizer.name_or_path}: stop ids are {ids}, and the tokenizer has {len(tokenizer)} "
            f"ids; set eos_token_id in generation_config.json, or give the model its own tokenizer"
        )
    return list(ids)


# ------------------------------------------------------------------------ forwards over responses


def base_model(model):
    """
    The part of a causal LM before its head; where FSDP shards the model, the method around which
    FSDP gathers the weights.
    """
    return getattr(model, "sharded_base_model", model.base_model)


def sequence_length(sequence):
    return sum(map(len, sequence[:2]))  # prompt and response


def microbatches(sequences, max_tokens):
    """
    Lists of these sequences, the longest first so that memory peaks at once, each with
    rows x longest <= max_tokens after padding. One that is longer than that is alone in its list.
    """
    batches = []
    for sequence in sorted(sequences, key=sequence_length, reverse=True):
        if not batches or (len(batches[-1]) + 1) * sequence_length(batches[-1][0]) > max_tokens:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def response_hidden(model, sequences, dtype=torch.float32):
    """
    Hidden states (N, H) in `dtype`, after the final norm, that predict the response tokens of the
    sequences, in order: from position len(prompt) - 1 on, one for each token.

    Rows are padded on the right and run without a mask: under causal attention no real token sees
    the padding, and positions, never token ids, say what is a response. Wider weights run under
    autocast; FSDP gathers them in `dtype`.
    """
    ids = [torch.tensor([*prompt, *response]) for prompt, response, *_ in sequences]
    ids = pad_sequence(ids, batch_first=True).to(model.device)  # (B, T)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response, *_) in zip(predicts, sequences):
        row[len(prompt) - 1 :][: len(response)] = True
    with torch.autocast(
        ids.device.type, dtype, enabled=model.dtype != dtype and not isinstance(model, FSDPModule)
    ):
        hidden = base_model(model)(ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[predicts].to(dtype)


@contextlib.contextmanager
def unsharded(model):
    """
    Inside, every rank holds the whole weights of a model that FSDP has sharded. They are gathered
    once, not once a token, and ranks need not run equally many forwards.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.unshard()
        shard.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
            if shard is not model:  # the root's weights stay after a forward, for the LM head
                shard.set_reshard_after_forward(True, recurse=False)


# ------------------------------------------------------------- which model it is, and what it costs


def model_revision(path):
    """
    Which weights these are: the hub's commit, or for a folder a fingerprint of its weight files,
    by the size and the last megabyte of each.
    """
    path = model_folder(path)
    if not Path(path).is_dir():
        return Path(cached_file(path, "config.json")).parent.name
    parts = {}
    for file in Path(path).iterdir():
        if file.suffix in (".safetensors", ".bin"):
            data = np.memmap(file, mode="r")
            parts[file.name] = len(data), data[-1 << 20 :].tobytes()
    return fingerprint(parts)


def forward_flops(model, lengths):
    """
    FLOPs of one forward over sequences of these lengths, multiply-add = 2 (arXiv 2605.16826,
    appendix H.1): every matrix and the LM head at every token, plus causal attention, in which a
    token attends to half the sequence on average. Counts the real shapes, where the paper takes
    heads x head_dim = H.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The embedding is no matrix product, but is as large as the LM head, which is not in this sum.
    matrices = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2)
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim
    return 2 * sum(n * (matrices + attention * n) for n in lengths)
