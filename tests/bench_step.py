"""
Seconds of an on-policy step, and of decoding, beside other people's code; medians, all in one run.

    python tests/bench_step.py            # or: make bench; `pip install trl==1.16.0` for TRL's row

The step: 64 toy prompts, at most 96 new tokens, reverse KL, fp32, the toy student (0.12M
parameters) and a teacher of 0.36M with random weights (timing does not depend on them). The
learning rate is 1e-6, so that response lengths stay what they are. Ours run as they are and with
`compile = True`; TRL's DistillationTrainer gets the same models, prompts and sampling; in
alternating rounds.

Then teacher prefixes from disk: the toy teacher (0.6M) runs in every step, or its hidden states
are cached; beside it the ratio of FLOPs for Qwen3-4B and -0.6B. Prints a table and writes
out/bench.json.
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
from bench_decode import CASES, decoding, plain_attention  # noqa: E402  (beside this file)

import models  # noqa: E402
import sample  # noqa: E402  (needs the repository on the path)
import train_distill  # noqa: E402
import utils  # noqa: E402
from data import toy  # noqa: E402
from data.problems import load_problems, load_tokenizer  # noqa: E402
from estimate import without_weights  # noqa: E402
from models import forward_flops  # noqa: E402

PROMPTS, NEW_TOKENS = 64, 96
ROUNDS, STEPS, WARMUP = 3, 10, 2
STOPS = (257, 260)                                       # of the toy student, of the toy teacher
PHASES = ("rollout", "teacher", "student", "optimizer")


def make_models(folder):
    """The toy student and a 0.36M teacher, vocabularies of the same size (TRL asks for that)."""
    torch.manual_seed(0)
    teacher = toy.make_model(96, 3, 3, 272, 260)
    teacher.save_pretrained(folder / "teacher")
    tokenizer = toy.export_tokenizer(toy.make_encoding(), toy.TEACHER_STOP)
    tokenizer.save_pretrained(folder / "teacher")
    return "data/toy/student", str(folder / "teacher")


def quietly(main, *argv):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(list(argv))


def train(out, config, *argv):
    """Lines of metrics.jsonl of a run of ours, after the warm-up, and the seconds of its steps."""
    quietly(train_distill.main, config, f"--max_steps={WARMUP + STEPS}", "--eval_every=0",
            "--save_every=1000", f"--out_dir={out}", "--overwrite", *argv)
    rows = utils.read_lines(out / "metrics.jsonl")[WARMUP:]
    return rows, [sum(row[f"{phase}_seconds"] for phase in PHASES) for row in rows]


def our_steps(student, teacher, folder, *options):
    """Rows of the metrics of on-policy steps, and the seconds of each step."""
    return train(
        folder / "ours", "configs/toy_opd.py", f"--student={student}", f"--teacher={teacher}",
        "--learning_rate=1e-6", f"--batch_size={PROMPTS}", f"--max_new_tokens={NEW_TOKENS}",
        *options)


def trl_steps(student, teacher, path, batch_size, new_tokens, steps, dtype, folder, stops=None):
    """
    Seconds of each of TRL's steps, reverse KL on problems of `path`; dtype "float32" or "bfloat16".
    Raises ImportError where TRL is not installed.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    model = models.load_model(student, torch.float32)
    model.generation_config.eos_token_id = stops or model.generation_config.eos_token_id
    prompts = Dataset.from_list([
        {"prompt": [{"role": "user", "content": problem["problem"]}]}
        for problem in load_problems(path)[:batch_size * (steps + 1)]])
    args = DistillationConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=batch_size, max_steps=steps,
        learning_rate=1e-6, max_completion_length=new_tokens, temperature=1.0, top_p=1.0, top_k=0,
        beta=1.0, bf16=dtype == "bfloat16", use_cpu=True, gradient_checkpointing=False,
        lr_scheduler_type="constant", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True)
    trainer = DistillationTrainer(
        model=model, teacher_model=models.load_model(teacher, getattr(torch, dtype)), args=args,
        train_dataset=prompts, processing_class=load_tokenizer(student),
        callbacks=[Clock()])
    with plain_attention():
        trainer.train()
    return seconds


def cached_steps(folder, cached):
    """
    Seconds of each teacher-prefix step, and those of them for reading shards, from trajectories
    with or without hidden states.
    """
    shards = folder / f"shards_{cached}"
    quietly(sample.main, "configs/toy_sample.py", f"--out_dir={shards}",
            f"--cache_hidden={cached}", "--num_prompts=1000")
    rows, seconds = train(folder / "cached", "configs/toy_sft.py", f"--trajectories={shards}")
    return seconds, [row["rollout_seconds"] for row in rows]


def flops_ratio():
    """
    FLOPs with the teacher run in every step over those with its hidden states cached, for
    Qwen3-4B -> 0.6B, 32 prompts of 92 tokens and 128 response tokens (the paper's appendix H.1).
    """
    def forward(hidden, layers, inner, heads):
        config = Qwen3Config(
            hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner,
            num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=151936)
        return forward_flops(without_weights(config), [92 + 128] * 32)

    student = forward(1024, 28, 3072, 16)
    teacher = forward(2560, 36, 9728, 32)
    teacher_head = 2 * 32 * 128 * 2560 * 151936
    return (3 * student + teacher) / (3 * student + teacher_head)


def measure():
    """The report: medians of everything."""
    ours, rows = {"ours": [], "compiled": []}, {"ours": [], "compiled": []}
    theirs = []
    run, cached, reading = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student, teacher = make_models(folder)
        *toy, rounds = CASES[0]
        _, decoding_seconds, *_ = decoding(*toy, rounds=rounds)
        for _ in range(ROUNDS):
            for who, options in (("ours", []), ("compiled", ["--compile=True"])):
                of_steps, seconds = our_steps(student, teacher, folder, *options)
                ours[who] += seconds
                rows[who] += of_steps
            with contextlib.suppress(ImportError):
                theirs += trl_steps(student, teacher, "data/toy/train.jsonl", PROMPTS, NEW_TOKENS,
                                    WARMUP + STEPS, "float32", folder, list(STOPS))[WARMUP:]
        for _ in range(ROUNDS):
            seconds, _ = cached_steps(folder, False)
            run += seconds
            seconds, reading_seconds = cached_steps(folder, True)
            cached += seconds
            reading += reading_seconds

    step_seconds = {who: statistics.median(seconds) for who, seconds in ours.items()}
    if theirs:
        step_seconds["TRL"] = statistics.median(theirs)
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "decoding_seconds": decoding_seconds,
        "teacher_prefix_step_seconds": {
            "cached": statistics.median(cached), "run": statistics.median(run),
            "reading": statistics.median(reading)},
        "step_seconds": step_seconds,
        "phase_seconds": {
            who: {phase: statistics.median(row[f"{phase}_seconds"] for row in found)
                  for phase in PHASES}
            for who, found in rows.items()},
        "mean_response_tokens": statistics.mean(row["mean_length"] for row in rows["ours"])}


def print_row(what, ours, theirs):
    print(f"{what:<44}{ours:>8.3f}{theirs:>8.3f}{theirs / ours:>13.2f}")


def main():
    torch.set_num_threads(2)
    report = measure()
    decode = report["decoding_seconds"]
    step = report["step_seconds"]
    prefix = report["teacher_prefix_step_seconds"]
    print(f"\n{'seconds, median':<44}{'ours':>8}{'theirs':>8}{'theirs/ours':>13}")
    for name, who in (("", "ours"), (", compiled", "compiled")):
        print_row(f"decode 64 rows (model.generate){name}", decode[who], decode["model.generate"])
        if "TRL" in step:
            print_row(f"on-policy step (TRL){name}", step[who], step["TRL"])
        else:
            print(f"{f'on-policy step (no TRL installed){name}':<44}{step[who]:>8.3f}")
        for phase, seconds in report["phase_seconds"][who].items():
            print(f"  {phase:<42}{seconds:>8.3f}")
    print_row("teacher-prefix step, cached (teacher run)", prefix["cached"], prefix["run"])
    print(f"{'  FLOPs, Qwen3-4B -> 0.6B (B 32, P 92, R 128)':<60}{flops_ratio():>13.2f}")
    share = prefix["reading"] / prefix["cached"]
    print(f"{'  of it reading the shards':<44}{prefix['reading']:>8.4f}{share:>21.1%}")
    Path("out").mkdir(exist_ok=True)
    Path("out/bench.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
