"""
A step is the same step on 1, 2 and 4 processes, sharded or not; a checkpoint does not know how
many there were; one process's error ends them all.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
import sample
import train_distill
import utils
from data.problems import load_tokenizer

# Several runs, one after the other, in the same processes: a start costs more than a run. Each
# rank notes how often it took part in a forward without a token of its own.
DRIVER = """
import json, train_distill
plain, empty = train_distill.response_hidden, []
def spy(model, sequences, dtype):
    empty.append([sequence[:2] for sequence in sequences] == [([0], [])])
    return plain(model, sequences, dtype)
train_distill.response_hidden = spy
def main(argv):
    for run in json.loads(argv[0]):
        train_distill.main(run)
    with open(f"{argv[1]}/empty_{os.environ['RANK']}.json", "w") as file:
        json.dump(sum(empty), file)
utils.run(main, "", train_distill.Config)
"""
TEN = ["--max_steps=10", "--batch_size=8", "--max_new_tokens=48", "--eval_every=0",
       "--save_every=1000", "--warmup_steps=2", "--max_tokens_per_microbatch=100",
       "--max_grad_norm=0.2", "--collective_timeout=100"]
CELLS = ["toy_sft", "toy_offline", "toy_dagger", "toy_opd"]


def write_script(folder, body):
    """A script in `folder` that finds this repository's modules."""
    path = folder / "script.py"
    start = f"import os, sys\nsys.path.insert(0, {os.getcwd()!r})\nimport utils\n"
    path.write_text(start + textwrap.dedent(body))
    return path


def launch(n, runs, folder):
    """Runs on n processes: how many empty forwards each rank made."""
    done = torchrun(n, write_script(folder, DRIVER), json.dumps(runs), folder)
    assert done.returncode == 0, done.stderr[:3000]
    return [json.loads((folder / f"empty_{rank}.json").read_text()) for rank in range(n)]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    out = tmp_path_factory.mktemp("trajectories") / "shards"
    sample.main(["configs/toy_sample.py", "--num_prompts=64", "--max_new_tokens=64",
                 f"--out_dir={out}"])
    return out


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The toy student with an LM head of its own."""
    out = tmp_path_factory.mktemp("models") / "untied"
    model = models.load_model("data/toy/student", torch.float32)
    model.config.tie_word_embeddings = False
    other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    other.save_pretrained(out)
    load_tokenizer("data/toy/student").save_pretrained(out)
    return out


def options(name, trajectories=None):
    from_disk = name in ("toy_sft", "toy_offline", "toy_hard_sft")
    argv = [f"configs/{name}.py", *TEN]
    return [*argv, f"--trajectories={trajectories}"] if from_disk else argv


def tensors_of(run):
    """Weights, and AdamW's moments, of its last checkpoint."""
    moments = torch.load(run / "last/optimizer.pt")
    flat = {(name, kind): tensor for name, kinds in moments.items()
            for kind, tensor in kinds.items()}
    return load_file(run / "last/model.safetensors"), flat


def assert_same(one, other, tolerance=2e-5):
    """
    Losses, norms and entropies of each step to 1e-5, counts exactly, weights of the last
    checkpoint to `tolerance`, moments to a thousandth of the tensor's largest.
    """
    a, b = (utils.read_lines(run / "metrics.jsonl") for run in (one, other))
    close = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "entropy")
    equal = ("step", "tokens", "max_length", "tflops", "truncated_share", "avg_at_k", "length")
    assert len(a) > 0
    for x, y in zip(a, b, strict=True):
        for key in close:
            assert x.get(key) == pytest.approx(y.get(key), abs=1e-5), (other, x["step"], key)
        for key in equal:
            assert x.get(key) == y.get(key), (other, x["step"], key)
        assert x.get("grad_norm", 0) == pytest.approx(y.get("grad_norm", 0), rel=1e-4)
    limits = (lambda tensor: tolerance, lambda tensor: 1e-3 * tensor.abs().max())
    for limit, x, y in zip(limits, tensors_of(one), tensors_of(other)):
        assert x.keys() == y.keys()
        for name in x:
            assert (x[name] - y[name]).abs().max() <= limit(x[name]), (other, name)


# ---------------------------------------------------------------------------- processes and shards

ROLLBACK = ["configs/toy_curriculum.py", *TEN, "--max_steps=5", "--horizons=(6, 12, 24)",
            "--steps_per_horizon=2", "--eval_prompts=12", "--on_gate_closed=rollback",
            "--entropy_floor=1.0"]


def test_four_cells_on_two_processes(tmp_path, trajectories, chats):
    """
    Every cell, ten steps, a curriculum that rolls back, and exchanged stop ids, whole and sharded,
    with ranks that have no token in a forward.
    """
    ways = {name: options(name, trajectories) for name in CELLS} | {"rollback": ROLLBACK}
    ways["exchanged"] = [  # the student's LM head becomes a matrix of its own
        *options("toy_opd", trajectories), f"--teacher={chats}", "--stop=student",
        "--exchange_stops", "--terminal=mask"]
    runs = [[*argv, f"--fsdp={fsdp}", f"--out_dir={tmp_path}/{name}_{fsdp}"]
            for name, argv in ways.items() for fsdp in (False, True)]
    empty = launch(2, runs, tmp_path)
    assert min(empty) >= 8 and sum(empty) >= 40, empty  # of 8 runs x 10 steps
    for name, argv in ways.items():
        train_distill.main([*argv, f"--out_dir={tmp_path}/{name}"])
        for fsdp in (False, True):
            assert_same(tmp_path / name, tmp_path / f"{name}_{fsdp}")
    for run in ("rollback", "rollback_False", "rollback_True"):
        rows = utils.read_lines(tmp_path / run / "metrics.jsonl")
        gates = [(row["step"], row["gate"], row["next_horizon"]) for row in rows if "gate" in row]
        assert gates == [(2, "open", 12), (4, "closed", 6)]


@pytest.mark.slow                                       # on two cores; two processes are not
def test_four_processes_and_resume(tmp_path):
    """
    Nine steps, with evaluations, are the same on one process and on four, whole and sharded, and
    where each three of them were made on another number of processes: 2, 1, 4.
    """
    nine = [*options("toy_opd"), "--max_steps=9", "--eval_every=3", "--eval_prompts=3",
            "--eval_samples=1", "--eval_max_new_tokens=16"]
    fours, parts = [], []
    for fsdp in (False, True):
        fours.append([*nine, f"--fsdp={fsdp}", f"--out_dir={tmp_path}/four_{fsdp}"])
        parts.append([*nine, f"--fsdp={fsdp}", f"--out_dir={tmp_path}/parts_{fsdp}"])
    launch(2, [[*argv, "--max_steps=3"] for argv in parts], tmp_path)
    for argv in parts:
        train_distill.main([*argv, "--max_steps=6", "--resume"])
    launch(4, [*fours, *([*argv, "--resume"] for argv in parts)], tmp_path)
    train_distill.main([*nine, f"--out_dir={tmp_path}/one"])
    for name in ("four", "parts"):
        for fsdp in (False, True):
            assert_same(tmp_path / "one", tmp_path / f"{name}_{fsdp}")


@pytest.mark.slow
def test_sharded_in_every_way(tmp_path, trajectories, untied):
    """
    On two processes: an LM head of its own, gradient checkpointing, compiled layers, hard labels, a
    teacher that writes in each step, means by sequence, bf16.
    """
    ways = {"untied": [*options("toy_opd"), f"--student={untied}",
                       "--gradient_checkpointing=True"],
            "compiled": [*options("toy_opd"), "--gradient_checkpointing=True", "--compile=True"],
            "hard": options("toy_hard_sft", trajectories),
            "writes": ["configs/toy_sft.py", *TEN, "--trajectories=None", "--loss_norm=sequence",
                       "--max_steps=3"]}
    runs = [[*argv, "--fsdp=True", f"--out_dir={tmp_path}/{name}_2"]
            for name, argv in ways.items()]
    half = [[*options("toy_opd"), "--dtype=bfloat16", f"--fsdp={fsdp}",
             f"--out_dir={tmp_path}/bf16_{fsdp}"] for fsdp in (False, True)]
    launch(2, [*runs, *half], tmp_path)
    for name, argv in ways.items():
        train_distill.main([*argv, f"--out_dir={tmp_path}/{name}"])
        assert_same(tmp_path / name, tmp_path / f"{name}_2")
    # In bf16 the sharded residual stream is bf16 too, where autocast keeps it in fp32.
    whole, sharded = (utils.read_lines(tmp_path / f"bf16_{fsdp}" / "metrics.jsonl")[0]["loss"]
                      for fsdp in (False, True))
    assert whole == pytest.approx(sharded, rel=0.1) and whole != sharded
    weights, _ = tensors_of(tmp_path / "bf16_True")
    assert weights["model.norm.weight"].dtype == torch.float32


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two torchruns of two processes each, as on two machines that share a folder."""
    argv, out = options("toy_opd"), tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
               "--master_addr=localhost", "--master_port=29671"]
    machines = [subprocess.Popen(
        [*command, f"--node_rank={node}", "train_distill.py", *argv, "--fsdp=True",
         f"--out_dir={out}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) for node in range(2)]
    assert [machine.wait(300) for machine in machines] == [0, 0]
    train_distill.main([*argv, f"--out_dir={tmp_path}/one"])
    assert_same(tmp_path / "one", out)


def test_gradient_checkpointing_changes_nothing(train):
    (rows, one), (other_rows, other) = (
        train("configs/toy_opd.py", "--max_steps=3", f"--gradient_checkpointing={on}")
        for on in (False, True))
    assert [row["loss"] for row in rows] == [row["loss"] for row in other_rows]
    for x, y in zip(tensors_of(one), tensors_of(other)):
        assert all(torch.equal(x[name], y[name]) for name in x)


# ---------------------------------------------------------------------------------- faults, errors

@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_chaos(quick):
    """No fault costs more than save_every steps, no resumed run differs from one left alone."""
    options = ["--quick", "--kills=4"] if quick else []
    done = subprocess.run([sys.executable, "tests/chaos.py", *options], text=True,
                          capture_output=True)
    faults = 7 if quick else 8
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" yes\n") == faults


def test_a_second_signal_ends_at_once():
    """Wherever the process is; chaos.py has two at once, which are one."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def work():
        utils.catch_signals()
        ready.set()
        for _ in range(3000):
            time.sleep(0.01)        # a signal that comes just before a sleep waits for its end

    process = fork.Process(target=work)
    process.start()
    ready.wait()
    process.terminate()
    process.join(2)
    assert process.is_alive()
    process.terminate()
    process.join(5)
    process.kill()
    assert process.exitcode == 128 + signal.SIGTERM


def test_one_process_has_a_bug(tmp_path):
    """Its traceback is printed, once; one that waits for it says so in a line; all end."""
    script = write_script(tmp_path, """
        def main(argv):
            utils.init_processes()
            if utils.RANK == 1:
                1 / 0
            utils.barrier()
        utils.run(main, "", dict)""")
    done = torchrun(2, script, timeout=60)
    assert done.returncode == 1
    for once in ("Traceback", "ZeroDivisionError: division by zero", "error: ",
                 "error: rank 0: another process has ended"):
        assert done.stderr.count(once) == 1, done.stderr


def test_words_as_an_exit_code(tmp_path):
    script = write_script(tmp_path, """
        utils.run(lambda argv: sys.exit("own words"), "", dict)""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "own words\n")


def test_an_engine_at_fault(tmp_path):
    """One rank finds in step 3 that its engine is stale: both save that step's student, and end."""
    script = write_script(tmp_path, """
        import train_distill
        from engine import HFEngine
        checks = []
        def in_sync(self):
            checks.append(0)
            return len(checks) < 3 or utils.RANK == 0
        HFEngine.in_sync = in_sync
        utils.run(train_distill.main, "", train_distill.Config)""")
    out = tmp_path / "run"
    done = torchrun(2, script, *options("toy_opd"), "--max_steps=9", "--check_sync_every=1",
                    "--save_every=100", f"--out_dir={out}", timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "error: rank 1: the engine's weights are not" in done.stderr
    assert "ends with code 1; step 2 is saved: --resume goes on" in done.stdout
    assert json.loads((out / "last/train_state.json").read_text())["step"] == 2
    assert len(utils.read_lines(out / "metrics.jsonl")) == 2


def test_a_signal_to_one_rank(tmp_path):
    """All end, with its code."""
    script = write_script(tmp_path, """
        def main(argv):
            utils.init_processes()
            if utils.RANK == 1:
                utils._noted.append((15, 0.0))
            utils.end_early(lambda: print("weights of", utils.RANK), 7)
        utils.run(main, "", dict)""")
    done = torchrun(2, script, timeout=60)
    assert "weights of 0" in done.stdout and "weights of 1" in done.stdout
    assert "ends with code 143; step 7 is saved" in done.stdout, done.stderr


def test_a_folder_that_is_not_shared(tmp_path):
    """
    A rank that does not see the checkpoint, here for working in another folder, says so in one
    line; a rank that would not come to a collective for ten minutes ends too.
    """
    train_distill.main([*options("toy_opd"), "--max_steps=1", f"--out_dir={tmp_path}/one/run"])
    script = write_script(tmp_path, f"""
        import time, train_distill
        def main(argv):
            utils.init_processes()
            os.chdir({str(tmp_path)!r} + ("/one" if utils.RANK == 0 else ""))
            cfg = train_distill.Config(student="data/toy/student", out_dir="run", resume=True)
            utils.start_run(cfg, (), {{"script": "train_distill"}})
            time.sleep(600)
        utils.run(main, "", dict)""")
    done = torchrun(2, script, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    for words in ("error: rank 1: ", "run/step_000001/train_state.json"):
        assert words in done.stderr, done.stderr


def test_a_folder_that_is_gone(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(utils.UserError, match="cannot write .*: its folder has been removed; "):
        utils.write_lines(path, [])
    assert not path.parent.exists()
