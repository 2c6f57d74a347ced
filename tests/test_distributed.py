"""One step is the same step on 1, 2 and 4 processes, sharded or not; checkpoints do not know how many there were; faults."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sample
import train_distill
import utils

# several runs, one after the other, in the same processes; each rank notes how often it took part without a token
DRIVER = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import train_distill, utils
plain, empty = utils.response_hidden, []
def spy(model, sequences, dtype):
    empty.append(sequences == [([0], [])])
    return plain(model, sequences, dtype)
utils.response_hidden = spy
def main(argv):
    for run in json.loads(argv[0]):
        train_distill.main(run)
    with open(f"{argv[1]}/empty_{os.environ['RANK']}.json", "w") as file:
        json.dump(sum(empty), file)
utils.run(main, "", train_distill.Config)
"""
TEN = ["--max_steps=10", "--batch_size=8", "--max_new_tokens=48", "--eval_every=0", "--save_every=1000", "--warmup_steps=2",
       "--max_tokens_per_microbatch=100", "--max_grad_norm=0.2"]
CELLS = ["toy_sft", "toy_offline", "toy_dagger", "toy_opd"]


def launch(n, runs, folder, env=()):
    """The empty micro-batches of each rank."""
    script = folder / "driver.py"
    script.write_text(DRIVER)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", str(script),
                           json.dumps(runs), str(folder)], capture_output=True, text=True, timeout=500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"empty_{rank}.json").read_text()) for rank in range(n)]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    out = tmp_path_factory.mktemp("trajectories") / "shards"
    sample.main(["configs/toy_sample.py", "--num_prompts=64", "--max_new_tokens=64", f"--out_dir={out}"])
    return out


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The toy student with an LM head of its own."""
    out, model = tmp_path_factory.mktemp("models") / "untied", utils.load_model("data/toy/student", torch.float32)
    model.config.tie_word_embeddings = False
    other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    other.save_pretrained(out)
    utils.load_tokenizer("data/toy/student").save_pretrained(out)
    return out


def options(name, trajectories):
    from_disk = [f"--trajectories={trajectories}"] if name in ("toy_sft", "toy_offline", "toy_hard_sft") else []
    return [f"configs/{name}.py", *TEN, *from_disk]


def assert_same(one, other, tolerance=2e-5):
    """Losses, norms and entropies of each step to 1e-5, counts exactly, weights of the last checkpoint to `tolerance`."""
    a, b = (utils.read_lines(folder / "metrics.jsonl") for folder in (one, other))
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for key in ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "entropy"):
            assert x.get(key) == pytest.approx(y.get(key), abs=1e-5), (other, x.get("step"), key)
        assert x.get("grad_norm", 0) == pytest.approx(y.get("grad_norm", 0), rel=1e-4)
        for key in ("tokens", "max_length", "tflops", "truncated_share", "avg_at_k", "length"):
            assert x.get(key) == y.get(key), (other, x.get("step"), key)
    for file in ("model.safetensors", "optimizer.safetensors"):
        x, y = load_file(one / "last" / file), load_file(other / "last" / file)
        assert x.keys() == y.keys()
        for key in x:                                    # moments are small: to a thousandth of the largest
            limit = tolerance if file == "model.safetensors" else 1e-3 * x[key].abs().max()
            assert (x[key] - y[key]).abs().max() <= limit, (other, file, key)


ROLLBACK = ["configs/toy_curriculum.py", *TEN, "--max_steps=5", "--horizons=(6, 12, 24)", "--steps_per_horizon=2",
            "--gate_prompts=12", "--on_gate_closed=rollback", "--entropy_floor=1.0"]


def test_four_cells_on_two_processes(tmp_path, trajectories):
    """Every cell, ten steps, and a curriculum that rolls back, whole and sharded, with ranks without a token in a forward."""
    ways = {name: options(name, trajectories) for name in CELLS} | {"rollback": ROLLBACK}
    empty = launch(2, [[*argv, f"--fsdp={fsdp}", f"--out_dir={tmp_path}/{name}_{fsdp}"]
                       for name, argv in ways.items() for fsdp in (False, True)], tmp_path)
    assert min(empty) >= 8 and sum(empty) >= 40, empty   # of 8 runs x 10 steps
    for name, argv in ways.items():
        train_distill.main([*argv, f"--out_dir={tmp_path}/{name}"])
        for fsdp in (False, True):
            assert_same(tmp_path / name, tmp_path / f"{name}_{fsdp}")
    for run in ("rollback", "rollback_False", "rollback_True"):
        gates = [row for row in utils.read_lines(tmp_path / run / "metrics.jsonl") if "gate" in row]
        assert [(row["step"], row["gate"], row["next_horizon"]) for row in gates] == [(2, "open", 12), (4, "closed", 6)]


def test_four_processes_and_resume(tmp_path):
    """Four are one, whole and sharded, with evaluations; and 2 -> 1 -> 4 processes, 3 steps each, are 9 steps on one."""
    evaluated = ["--eval_every=5", "--eval_prompts=3", "--eval_samples=1", "--eval_max_new_tokens=16"]
    ten, nine = options("toy_opd", None), [*options("toy_opd", None), "--max_steps=9"]
    launch(2, [[*nine, "--max_steps=3", "--fsdp=True", f"--out_dir={tmp_path}/parts"],
               [*nine, "--max_steps=3", f"--out_dir={tmp_path}/parts_whole"]], tmp_path)
    for parts in ("parts", "parts_whole"):
        train_distill.main([*nine, "--max_steps=6", "--resume", f"--out_dir={tmp_path}/{parts}"])
    launch(4, [*[[*ten, *evaluated, f"--fsdp={fsdp}", f"--out_dir={tmp_path}/{fsdp}"] for fsdp in (False, True)],
               [*nine, "--resume", "--fsdp=True", f"--out_dir={tmp_path}/parts"],
               [*nine, "--resume", f"--out_dir={tmp_path}/parts_whole"]], tmp_path)
    train_distill.main([*ten, *evaluated, f"--out_dir={tmp_path}/one"])
    train_distill.main([*nine, f"--out_dir={tmp_path}/nine"])
    for fsdp in (False, True):
        assert_same(tmp_path / "one", tmp_path / str(fsdp))
    for parts in ("parts", "parts_whole"):
        assert_same(tmp_path / "nine", tmp_path / parts)


@pytest.mark.slow
def test_sharded_in_every_way(tmp_path, trajectories, untied):
    """
    On two processes: an LM head of its own, gradient checkpointing, hard labels, a teacher that writes step by step, means by
    sequence, bf16.
    """
    ways = {"untied": [*options("toy_opd", None), f"--student={untied}", "--gradient_checkpointing=True"],
            "hard": options("toy_hard_sft", trajectories),
            "writes": ["configs/toy_sft.py", *TEN, "--trajectories=None", "--loss_norm=sequence", "--max_steps=3"]}
    launch(2, [[*argv, "--fsdp=True", f"--out_dir={tmp_path}/{name}_2"] for name, argv in ways.items()] + [
        [*options("toy_opd", None), "--dtype=bfloat16", f"--fsdp={fsdp}", f"--out_dir={tmp_path}/bf16_{fsdp}"]
        for fsdp in (False, True)], tmp_path)
    for name, argv in ways.items():
        train_distill.main([*argv, f"--out_dir={tmp_path}/{name}"])
        assert_same(tmp_path / name, tmp_path / f"{name}_2")
    # in bf16 the sharded residual stream is bf16 too, where autocast keeps it in fp32: close, not equal
    a, b = (utils.read_lines(tmp_path / f"bf16_{fsdp}" / "metrics.jsonl") for fsdp in (False, True))
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=0.1) and a[0]["loss"] != b[0]["loss"]
    assert load_file(tmp_path / "bf16_True/last/model.safetensors")["model.norm.weight"].dtype == torch.float32


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two torchruns of two processes each, as on two machines that share a folder."""
    argv, out = options("toy_opd", None), tmp_path / "two"
    machines = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=2",
         "--master_addr=localhost", "--master_port=29671", "train_distill.py", *argv, "--fsdp=True", f"--out_dir={out}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) for node in range(2)]
    assert [machine.wait(300) for machine in machines] == [0, 0]
    train_distill.main([*argv, f"--out_dir={tmp_path}/one"])
    assert_same(tmp_path / "one", out)


def test_checkpointing_changes_nothing(train):
    a, b = (train("configs/toy_opd.py", "--max_steps=3", f"--gradient_checkpointing={on}") for on in (False, True))
    assert [row["loss"] for row in a[0]] == [row["loss"] for row in b[0]]
    assert all(torch.equal(x, y) for x, y in zip(*(load_file(run / "last/model.safetensors").values() for _, run in (a, b))))


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_chaos(quick):
    """tests/chaos.py: no fault costs more than save_every steps, and no resumed run differs from one that was left alone."""
    done = subprocess.run([sys.executable, "tests/chaos.py", *(["--quick", "--kills=4"] if quick else [])], text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.count(" yes\n") == (13 if quick else 18), done.stdout + done.stderr


@pytest.mark.parametrize("apart, code", [(0.0, 0), (1.2, 128 + signal.SIGTERM)])
def test_second_signal(apart, code):
    """
    At once is once: a scheduler signals torchrun and its processes. Later, the second ends the process where it is, were it in
    a collective, where Python's own handlers do not run.
    """
    process = subprocess.Popen([sys.executable, "-c", """if True:
        import contextlib, datetime, torch, utils
        utils.catch_signals()
        print(1, flush=True)
        with contextlib.suppress(RuntimeError):
            torch.distributed.HashStore().wait(["never"], datetime.timedelta(seconds=3))
        print(utils.signal_received(), flush=True)"""], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.terminate()
    time.sleep(apart)
    process.terminate()
    assert process.wait() == code and process.stdout.read() == ("15\n" if not code else "")


@pytest.mark.parametrize("processes, broken, shown", [
    (4, "raise utils.UserError('a mistake')", "error: a mistake"),
    (2, "raise OSError(28, 'No space left', 'x')", "No space left"),
    (2, "1 / 0 if os.environ['RANK'] == '1' else time.sleep(60)", "ZeroDivisionError"),
    (4, "1 / 0 if os.environ['RANK'] == '2' else torch.distributed.barrier()", "ZeroDivisionError")])
def test_one_error_for_all_processes(tmp_path, processes, broken, shown):
    """All processes meet it, or one does and the others wait or fail for it: the first is shown, once."""
    script = tmp_path / "broken.py"
    script.write_text(f"import os, sys, time, torch\nsys.path.insert(0, {os.getcwd()!r})\nimport utils\n"
                      f"def main(argv):\n    utils.init_processes(30)\n    {broken}\nutils.run(main, '', Sampling)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                           str(script)], capture_output=True, text=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})
    own = done.stderr.split("torch/distributed/elastic")[0]
    assert done.returncode == 1 and own.count("Traceback") == ("Zero" in shown), own
    assert done.stderr.count(shown) == 1 and done.stderr.count("error: ") == ("Zero" not in shown), done.stderr


def test_folder_that_is_not_shared(tmp_path, monkeypatch):
    """A machine that does not see the checkpoint says so: here the second rank works in another folder."""
    train_distill.main([*options("toy_opd", None), "--max_steps=1", f"--out_dir={tmp_path}/one/run"])
    script = tmp_path / "elsewhere.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {os.getcwd()!r})\nimport utils\n"
                      f"rank, _, _ = utils.init_processes(30)\nos.chdir({str(tmp_path)!r} + ('/one' if rank == 0 else ''))\n"
                      "utils.run(lambda argv: utils.prepare_out_dir('run', True, False), '', Sampling)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "error: run/step_000001 is not on this machine: all of them need the same out_dir\n" in done.stderr


def test_several_machines_do_not_restart(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(utils.UserError, match="--max-restarts=3: on several machines .* give the same command again with"):
        utils.prepare_out_dir(tmp_path, True, False)


def test_a_fork_does_not_signal_its_parent():
    """A worker that is terminated dies, and the run goes on; SIGALRM stops nothing."""
    done = subprocess.run([sys.executable, "-c", """if True:
        import multiprocessing, os, signal, time, utils
        utils.catch_signals()
        signal.signal(signal.SIGALRM, lambda *_: None)
        os.kill(os.getpid(), signal.SIGALRM)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.2)
        child.terminate()
        child.join()
        print(child.exitcode, utils.signal_received())"""], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{-signal.SIGTERM} 0\n", done
