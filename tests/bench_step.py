"""
Seconds per on-policy step, and decoding, beside other people's code; medians, all in one run.

    python tests/bench_step.py            # or: make bench; `pip install trl==1.16.0` first to have TRL's row

The step: 64 toy prompts, at most 96 new tokens, reverse KL, fp32, the toy student (0.12M parameters) and a teacher of 0.36M
with random weights (timing does not depend on them). Learning rate 1e-6, so that response lengths stay what they are. The
same models, prompts and sampling for TRL's DistillationTrainer, in alternating rounds. Then teacher prefixes from disk, the toy
teacher (0.6M) run in every step or its hidden states cached; beside it the ratio of FLOPs for Qwen3-4B and -0.6B. Prints a
table, writes out/bench.json.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample  # noqa: E402  (needs the repository on the path)
import train_distill  # noqa: E402
import utils  # noqa: E402
from data import toy  # noqa: E402
from engine import HFEngine, Sampling  # noqa: E402

PROMPTS, NEW_TOKENS, ROUNDS, STEPS, WARMUP = 64, 96, 3, 10, 2


def make_models(folder):
    """The toy student and a 0.36M teacher, vocabularies of the same size (TRL asks for that)."""
    torch.manual_seed(0)
    teacher = toy.make_model(96, 3, 3, 272, 260)
    teacher.save_pretrained(folder / "teacher")
    toy.export_tokenizer(toy.make_encoding(), toy.TEACHER_STOP).save_pretrained(folder / "teacher")
    return "data/toy/student", str(folder / "teacher")


def our_steps(student, teacher, folder):
    out = folder / "ours"
    with contextlib.redirect_stdout(io.StringIO()):
        train_distill.main(["configs/toy_opd.py", f"--student={student}", f"--teacher={teacher}", "--learning_rate=1e-6",
                            f"--batch_size={PROMPTS}", f"--max_steps={WARMUP + STEPS}", "--eval_every=0",
                            f"--max_new_tokens={NEW_TOKENS}", "--save_every=1000", f"--out_dir={out}", "--overwrite"])
    rows = utils.read_lines(out / "metrics.jsonl")[WARMUP:]
    phases = ("rollout_seconds", "teacher_seconds", "student_seconds", "optimizer_seconds")
    return [sum(row[phase] for phase in phases) for row in rows], [row["mean_length"] for row in rows]


def trl_steps(student, teacher, folder):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Clock(TrainerCallback):
        times = []

        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.times.append(time.perf_counter() - self.start)

    model = utils.load_model(student, torch.float32)
    model.generation_config.eos_token_id = [257, 260]
    rows = utils.load_problems("data/toy/train.jsonl")[:PROMPTS * (WARMUP + STEPS + 1)]
    args = DistillationConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PROMPTS, max_steps=WARMUP + STEPS, learning_rate=1e-6,
        max_completion_length=NEW_TOKENS, temperature=1.0, top_p=1.0, top_k=0, beta=1.0, bf16=False, use_cpu=True,
        gradient_checkpointing=False, lr_scheduler_type="constant", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True)
    clock = Clock()
    clock.times.clear()
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row["problem"]}]} for row in rows])
    DistillationTrainer(model=model, teacher_model=utils.load_model(teacher, torch.float32), args=args, train_dataset=prompts,
                        processing_class=utils.load_tokenizer(student), callbacks=[clock]).train()
    return clock.times[WARMUP:]


def decoding(student):
    """Median seconds of our decode loop and of model.generate, and their mean response lengths."""
    model, tokenizer = utils.load_model(student, torch.float32), utils.load_tokenizer(student)
    rows = utils.load_problems("data/toy/train.jsonl")[:PROMPTS]
    prompts = [utils.encode_prompt(tokenizer, row["problem"]) for row in rows]
    engine, sampling = HFEngine(model), Sampling(NEW_TOKENS, (257, 260), vocab_size=272)
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")

    def theirs(seed):
        torch.manual_seed(seed)
        with torch.inference_mode():
            return model.generate(**padded, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=NEW_TOKENS,
                                  eos_token_id=[257, 260], pad_token_id=257)

    def ours(seed):
        return engine.generate(prompts, sampling, [seed * 1000 + i for i in range(PROMPTS)])
    times = {"ours": [], "model.generate": []}
    for seed in range(25):                               # in turn, so that a noisy machine is noisy for both
        for name, call in (("ours", ours), ("model.generate", theirs)):
            start = time.perf_counter()
            call(seed)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[4:]) for name, values in times.items()}


def cached_steps(folder, cached):
    """Seconds per teacher-prefix step, and of them for reading shards, from trajectories with or without hidden states."""
    shards, out = folder / f"shards_{cached}", folder / "cached"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sample.main(["configs/toy_sample.py", f"--out_dir={shards}", f"--cache_hidden={cached}", "--num_prompts=1000"])
        train_distill.main(["configs/toy_sft.py", f"--trajectories={shards}", f"--out_dir={out}", "--eval_every=0",
                            f"--max_steps={WARMUP + STEPS}", "--save_every=1000", "--overwrite"])
    rows = utils.read_lines(out / "metrics.jsonl")[WARMUP:]
    total = [sum(row[f"{phase}_seconds"] for phase in ("rollout", "teacher", "student", "optimizer")) for row in rows]
    return total, [row["rollout_seconds"] for row in rows]


def main():
    torch.set_num_threads(2)
    report = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        student, teacher = make_models(folder)
        report["decoding_seconds"] = decoding(student)
        ours, theirs, lengths = [], [], []
        for _ in range(ROUNDS):
            seconds, mean_lengths = our_steps(student, teacher, folder)
            ours, lengths = ours + seconds, lengths + mean_lengths
            try:
                theirs += trl_steps(student, teacher, folder)
            except ImportError:
                pass
        run, cached, loading = [], [], []
        for _ in range(ROUNDS):
            run += cached_steps(folder, False)[0]
            seconds, reading = cached_steps(folder, True)
            cached, loading = cached + seconds, loading + reading
    report["teacher_prefix_step_seconds"] = {"cached": statistics.median(cached), "run": statistics.median(run),
                                             "reading": statistics.median(loading)}
    report["step_seconds"] = {"ours": statistics.median(ours)} | ({"TRL": statistics.median(theirs)} if theirs else {})
    report["mean_response_tokens"] = statistics.mean(lengths)
    decode, step = report["decoding_seconds"], report["step_seconds"]
    print(f"\n{'seconds, median':<44}{'ours':>8}{'theirs':>8}{'theirs/ours':>13}")
    print(f"{'decode 64 rows (model.generate)':<44}{decode['ours']:>8.3f}{decode['model.generate']:>8.3f}"
          f"{decode['model.generate'] / decode['ours']:>13.2f}")
    if theirs:
        print(f"{'on-policy step (TRL DistillationTrainer)':<44}{step['ours']:>8.3f}{step['TRL']:>8.3f}"
              f"{step['TRL'] / step['ours']:>13.2f}")
    else:
        print(f"{'on-policy step (TRL is not installed)':<44}{step['ours']:>8.3f}")
    seconds = report["teacher_prefix_step_seconds"]
    print(f"{'teacher-prefix step, cached (teacher run)':<44}{seconds['cached']:>8.3f}{seconds['run']:>8.3f}"
          f"{seconds['run'] / seconds['cached']:>13.2f}")
    real_s, real_t = (utils.forward_flops(Qwen3Config(
        hidden_size=h, num_hidden_layers=n, intermediate_size=i, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        vocab_size=151936), [92 + 128] * 32) for h, n, i, heads in ((1024, 28, 3072, 16), (2560, 36, 9728, 32)))
    head = 2 * 32 * 128 * 2560 * 151936
    print(f"{'  FLOPs, Qwen3-4B -> 0.6B (B 32, P 92, R 128)':<60}{(3 * real_s + real_t) / (3 * real_s + head):>13.2f}")
    print(f"{'  of it reading the shards':<44}{seconds['reading']:>8.4f}{seconds['reading'] / seconds['cached']:>21.1%}")
    Path("out").mkdir(exist_ok=True)
    Path("out/bench.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
