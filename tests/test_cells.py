"""
cells.py: the paper's inequalities on numbers for which they hold, and with sides exchanged; the
scheduler with planted GPUs, and the paper's grid with planted stages.
"""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import cells
import eval_math
import rl_grpo
import sample
import train_distill
import utils
from cells import PREFIXES, Job, claims, name_of

PRICES = cells.small_world("prices")
SHORT, LONG, RUNGS, LAMS, STOPS = (
    PRICES.short, PRICES.long, PRICES.rungs, PRICES.lams, PRICES.stops)


def world(reverse=1, student=1, long=1):
    """
    Runs in which each claim holds. -1 exchanges forward and reverse KL, student and teacher
    prefixes, long and short.
    """
    def amount_of_reverse(lam):
        return lam if reverse == 1 else 1 - lam

    def run(prefix, lam, horizon):
        r = amount_of_reverse(lam)
        is_student = (prefix == "student") == (student == 1)
        is_long = (horizon == LONG) == (long == 1)
        last = {
            "avg_at_k": 0.3 + 0.15 * (r > 0) - 0.01 * (0 < r < 1), "pass_at_k": 0.8,
            "entropy": 0.3 - 0.2 * r ** 2, "length": 80.0, "entropy_before_box": None,
            "entropy_after_box": None, "tokens_after_box": None, "truncated": 0.0, "k": 8,
            "step": 200, "tflops": 2.0 if prefix == "student" else 1.0}
        if is_long:
            last["avg_at_k"] += 0.15 + 0.05 * (r == 0) + 0.1 * is_student
            last["pass_at_k"] += 0.08 * (r == 0) + 0.06 * is_student
            last["length"] = 255.0 if is_student and r > 0.2 else 100.0
        first = last | {"avg_at_k": 0.2, "step": 0, "tflops": 0.0}
        return {"student": [first, last]}

    runs = {
        name_of(prefix, lam, horizon, stop): run(prefix, lam, horizon)
        for prefix in PREFIXES for lam in LAMS for horizon in RUNGS for stop in STOPS}
    best = runs[name_of("student", 1, LONG, "union")]["student"][-1]
    better = best | {
        "avg_at_k": best["avg_at_k"] + 0.1, "pass_at_k": best["pass_at_k"] + 0.1, "length": 90.0}
    for stop in STOPS:
        runs[f"curriculum_{stop}"] = {"student": [better]}
    for name, (start, _) in cells.grpo_runs(PRICES, Path()).items():
        begin = runs[start]["student"][-1]
        gain = 0.1 if amount_of_reverse(int(start.split("_")[1])) == 0 else -0.1
        runs[name] = {"student": [begin, begin | {"avg_at_k": begin["avg_at_k"] + gain}]}
    return runs


def failed(runs, stop="union"):
    """The numbers of the claims that do not hold, were the numbers exact."""
    return {number for number, text, left, right in claims(PRICES, runs, stop, rl=True)
            if cells.verdict(text, np.full(3, left - right))[0] != "holds"}


def test_each_claim_holds_where_it_should():
    for stop in STOPS:
        assert failed(world(), stop) == set()
        assert {row[0] for row in claims(PRICES, world(), stop, rl=True)} == set(range(2, 14))


def test_each_claim_fails_with_the_sides_exchanged():
    assert {2, 3, 4, 10, 11, 12} <= failed(world(reverse=-1))
    assert {6, 9} <= failed(world(student=-1))
    assert {2, 5, 8} <= failed(world(long=-1))

    worse = world()
    reverse_kl = worse[name_of("student", 1, LONG, "union")]["student"][-1]
    worse["curriculum_union"] = {"student": [reverse_kl | {"length": 256.0}]}
    assert failed(worse) == {13}

    far = world()                                        # the prefix source moves H more than KL
    for name, run in far.items():
        if name.startswith("teacher"):
            run["student"][-1]["entropy"] += 1
    assert failed(far) == {7}


def test_table_and_report_over_seeds():
    """Means and ranges; and a claim of which two seeds say the opposite stays open."""
    results = {1: world(), 2: world(reverse=-1)}
    start = f"| `{name_of('student', 0, SHORT, 'union')}`"
    row = next(line for line in cells.table(results, [1, 2]) if line.startswith(start))
    assert row.split(" | ")[1] == "0.375 (0.300 - 0.450)"
    lines = cells.report(PRICES, results, [1, 2], False)
    line = next(line for line in lines if "A(R) > A(F), short" in line)
    assert "0.375, 0.375: open (-1.4 .. +1.4)" in line         # t is 12.7 for two seeds
    lines = cells.report(PRICES, results, [1], False)
    line = next(line for line in lines if "A(R) > A(F), s" in line)
    assert "0.45, 0.3: holds (+0.15 .. +0.15)" in line


# ------------------------------------------------------------------------------------ the bootstrap

def write_samples(path, right, lengths):
    """right, lengths: (problems, samples)."""
    rows = [
        {"index": i, "sample": j, "correct": bool(right[i][j]), "length": int(lengths[i][j]),
         "entropy_sum": 0.5 * int(lengths[i][j]), "stop": "length" if j else "<end>",
         "tokens_after_box": 2 if j == 0 else None,
         "entropy_after_box_sum": 0.25 if j == 0 else 0.0}
        for i in range(len(right)) for j in range(len(right[0]))]
    utils.write_lines(path, rows, mode="w")


def test_measured_by_hand(tmp_path):
    """Sums by problem; the first draw is the evaluation itself, the others follow the problems."""
    right, lengths = [[1, 0], [0, 0], [1, 1]], [[10, 20], [30, 40], [4, 6]]
    write_samples(tmp_path / "samples_student_000200.jsonl", right, lengths)
    arrays = cells.measured(tmp_path / "samples_student_000200.jsonl")
    assert arrays["avg_at_k"].tolist() == [[1, 0, 2], [2, 2, 2]]
    assert arrays["pass_at_k"].tolist() == [[1, 0, 1], [1, 1, 1]]
    assert arrays["entropy_after_box"].tolist() == [[0.25] * 3, [2] * 3]
    assert arrays["entropy_before_box"].tolist() == [[4.75, 14.75, 1.75], [8, 28, 2]]
    assert arrays["truncated"].tolist() == [[1, 1, 1], [2, 2, 2]]
    run = {"student": [{"step": 200, "tflops": 1.5}]}
    (found,) = cells.with_resamples(tmp_path, run)["student"]
    assert found["tflops"] == 1.5 and found["length"][0] == pytest.approx(110 / 6)
    assert found["avg_at_k"][0] == 0.5 and found["pass_at_k"][0] == pytest.approx(2 / 3)
    counts = cells.draws(3)[7]
    assert counts.sum() == 3
    assert found["length"][7] == pytest.approx(counts @ [30, 70, 10] / (2 * counts.sum()))


@pytest.mark.parametrize("gap, seeds, of_a_seed, least, most", [
    (0.0, 1, 0.0, 0.0, 0.05), (0.1, 1, 0.0, 0.7, 1.0),
    (0.0, 3, 0.05, 0.0, 0.05), (0.2, 3, 0.05, 0.6, 1.0)])
def test_how_often_a_difference_is_found(gap, seeds, of_a_seed, least, most):
    """
    64 problems x 8 samples, two models of which one is better by `gap`, and whose seeds differ by
    `of_a_seed` (a standard deviation): without a gap a claim holds in one of 40 trials by right, in
    at most one of 20 here, with one in most.
    """
    rng, held = np.random.default_rng(0), 0
    drawn = cells.draws(64)
    for _ in range(400):
        skill, sides = rng.beta(2, 2, 64), ([], [])
        for _ in range(seeds):
            for side, shift in zip(sides, (gap, 0)):
                shifted = np.clip(skill + shift + of_a_seed * rng.normal(), 0, 1)
                side.append((drawn @ rng.binomial(8, shifted)) / (8 * drawn.sum(1)))
        difference = cells.over_seeds(sides[0]) - cells.over_seeds(sides[1])
        held += cells.verdict("A > B", difference)[0] == "holds"
    assert least <= held / 400 <= most


def test_verdicts():
    """By the interval of the difference, not by its middle; equal within the margin."""
    def of(text, low, high):
        return cells.verdict(text, np.array([0, *np.linspace(low, high, 41)]))[0]
    assert of("A > B", 0.01, 0.2) == "holds" and of("A > B", -0.2, -0.01) == "**fails**"
    assert of("A > B", -0.1, 0.5) == "open"
    assert of("A about B", -0.03, 0.04) == "holds" and of("A about B", 0.06, 0.2) == "**fails**"
    assert of("A about B", 0.01, 0.2) == "open" and of("A about B", -0.2, 0.2) == "open"


def check_configs(work):
    """Every job's arguments are a valid config of its script."""
    scripts = {script.__name__ + ".py": script
               for script in (train_distill, rl_grpo, sample, eval_math)}
    for job in work:
        cfg = utils.load_config(scripts[job.script].Config, job.argv)
        check = getattr(scripts[job.script], "validate", lambda cfg, world: None)
        check(cfg, 1)


def test_the_world_of_the_real_model():
    """Its runs have valid configs; its verdicts come beside the toy's, claim by claim."""
    real = cells.small_world("smollm")
    assert len(cells.distillation_runs(real)) == 16
    assert "hard_64_union" in cells.distillation_runs(real)
    for a_world in (PRICES, real):
        check_configs(cells.jobs_of(a_world, [1], rl=True))

    lines = ["| claim | left, right side | stop = union |", "|---|---|---|",
             "| 2 | A(R) > A(F), long | 0.7, 0.6: holds |"]
    joined = cells.beside_the_toy(lines)
    toy = Path("docs/claims.md").read_text().strip().split("\n")
    assert joined[0] == toy[0] + " a real language model |" and joined[1] == toy[1] + "---|"
    added = [line.removeprefix(old) for old, line in zip(toy[2:], joined[2:], strict=True)]
    assert added.count(" 0.7, 0.6: holds |") == 1 and set(added) == {" 0.7, 0.6: holds |", " - |"}


# ------------------------------------------------------------------------------------ the scheduler

STAGE = """
    import json, os, sys, time
    from pathlib import Path
    out = Path(next(a for a in sys.argv if a.startswith("--out_dir=")).split("=")[1])
    out.mkdir(parents=True, exist_ok=True)
    name = out.name
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    Path(f"{out}.begun").open("a").write(f"{gpu} {time.time()} ")
    if (out.parent / f"{name}.dies").exists():
        sys.exit(3)
    time.sleep(0.15)
    Path(f"{out}.ended").open("a").write(f"{time.time()} ")
"""


@pytest.fixture
def stage(tmp_path):
    """A script in place of a stage, which notes when it runs and on which GPU."""
    path = tmp_path / "stage.py"
    path.write_text(textwrap.dedent(STAGE))
    return str(path)


def spans(folder, names):
    """{name: (GPU, began, ended)}"""
    found = {}
    for name in names:
        gpu, began = (folder / f"{name}.begun").read_text().split()
        found[name] = gpu, float(began), float((folder / f"{name}.ended").read_text())
    return found


def test_a_gpu_has_one_run_at_a_time(stage, tmp_path, monkeypatch):
    """Each process sees one GPU, no two at once the same, and both are used."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    names = [f"run{i}" for i in range(6)]
    cells.execute([Job(stage, tmp_path / name, []) for name in names], ["5", "7"])
    found = spans(tmp_path, names)
    assert {gpu for gpu, _, _ in found.values()} == {"5", "7"}
    for name, (gpu, began, _) in found.items():
        for other, (gpu_too, began_too, ended_too) in found.items():
            assert name == other or gpu != gpu_too or not began_too <= began < ended_too
    assert any(a[1] < b[1] < a[2] for a in found.values() for b in found.values())


def test_a_run_waits_for_what_it_needs(stage, tmp_path):
    """Also where GPUs are free all the time; what needs nothing does not wait."""
    slow = Path(stage).with_name("slow.py")
    slow.write_text(Path(stage).read_text().replace("sleep(0.15)", "sleep(1.5)"))
    cells.execute([
        Job(str(slow), tmp_path / "first", []),
        Job(stage, tmp_path / "second", [], (tmp_path / "first",)),
        Job(stage, tmp_path / "other", [])], ["0", "1", "2"])
    found = spans(tmp_path, ["first", "second", "other"])
    assert found["second"][1] > found["first"][2] > found["other"][2]


def test_a_run_that_dies(stage, tmp_path, capsys):
    """What needs it is left out, the rest is done; the same command does only what is missing."""
    work = [Job(stage, tmp_path / name, [], tuple(tmp_path / need for need in needs))
            for name, needs in {"a": (), "b": (), "of_a": ("a",), "of_of_a": ("of_a",),
                                "of_b": ("b",)}.items()]
    (tmp_path / "a.dies").touch()
    with pytest.raises(SystemExit, match="some runs failed; mend the cause and give the same"):
        cells.execute(work, ["0", "1"])
    printed = capsys.readouterr().out
    assert re.search(rf"{tmp_path}/a \d+ s: failed, see {tmp_path}/a.log\n", printed)
    assert f"{tmp_path}/of_of_a: left out, for what it needs has failed" in printed
    assert [name for name in ("a", "b", "of_a", "of_of_a", "of_b")
            if cells.is_finished(tmp_path / name)] == ["b", "of_b"]
    (tmp_path / "a.dies").unlink()
    cells.execute(work, ["0", "1"])
    assert "5 runs, 2 finished before" in capsys.readouterr().out
    assert len((tmp_path / "b.begun").read_text().split()) == 2         # it ran once
    assert all(cells.is_finished(job.folder) for job in work)


def test_a_machine_that_goes_away(stage, tmp_path):
    """
    The scheduler and its runs are killed; the same command begins them again.
    """
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.getcwd()!r})
        from pathlib import Path
        import cells
        folder = Path({str(tmp_path)!r})
        jobs = [cells.Job({stage!r}, folder / name, []) for name in ("x", "y", "z")]
        cells.execute(jobs, ["0"])
    """))
    Path(stage).write_text(Path(stage).read_text().replace("sleep(0.15)", "sleep(60)"))
    first = subprocess.Popen([sys.executable, str(driver)], start_new_session=True,
                             stdout=subprocess.DEVNULL)
    while not (tmp_path / "x.begun").exists():
        time.sleep(0.05)
    os.killpg(first.pid, 9)
    first.wait()
    Path(stage).write_text(Path(stage).read_text().replace("sleep(60)", "sleep(0.05)"))
    done = subprocess.run([sys.executable, str(driver)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "3 runs, 0 finished before" in done.stdout
    assert all(cells.is_finished(tmp_path / name) for name in ("x", "y", "z"))


def test_a_run_that_another_process_has(stage, tmp_path, capsys):
    """It is waited for, and begun when the other is gone; what that has finished is not."""
    slow = Path(stage).with_name("slow.py")
    slow.write_text(Path(stage).read_text().replace("sleep(0.15)", "sleep(1.5)"))
    holder = cells.start(Job(str(slow), tmp_path / "x", []), "0")
    while not (tmp_path / "x.begun").exists():
        time.sleep(0.05)
    cells.execute([Job(stage, tmp_path / "x", [])], ["1"])
    assert f"{tmp_path}/x: another process is running it" in capsys.readouterr().out
    assert holder.wait() == 0
    assert len((tmp_path / "x.begun").read_text().split()) == 4         # twice, one after the other
    first_end = float((tmp_path / "x.ended").read_text().split()[0])
    assert float((tmp_path / "x.begun").read_text().split()[3]) > first_end


def test_a_broken_gpu(stage, tmp_path, capsys):
    """It gets no third job, so it does not eat up all that wait for one."""
    broken = Path(stage).with_name("broken.py")
    broken.write_text(
        "import os, sys\nif os.environ['CUDA_VISIBLE_DEVICES'] == '1': sys.exit(1)\n"
        + Path(stage).read_text())
    with pytest.raises(SystemExit, match="some runs failed"):
        cells.execute([Job(str(broken), tmp_path / f"run{i}", []) for i in range(8)], ["0", "1"])
    assert "two in a row on GPU '1', which gets no more" in capsys.readouterr().out
    assert sum(cells.is_finished(tmp_path / f"run{i}") for i in range(8)) == 6


def test_other_arguments(stage, tmp_path):
    """A folder that was finished with other arguments is no result of these."""
    cells.execute([Job(stage, tmp_path / "x", ["--a=1"])], [""])
    cells.execute([Job(stage, tmp_path / "x", ["--a=1"])], [""])
    with pytest.raises(SystemExit, match="x was run with ..--a=1.., not ..--a=2..; delete it"):
        cells.execute([Job(stage, tmp_path / "x", ["--a=2"])], [""])


# ----------------------------------------------------------------------------------------- the grid

PLANTED = """
    import json, sys
    from pathlib import Path
    options = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("--") and "=" in a)
    out = Path(options["out_dir"])
    out.mkdir(parents=True, exist_ok=True)
    e = {"model": "student", "avg_at_k": 0.25, "pass_at_k": 0.5, "k": 3, "entropy": 0.3,
         "length": 100.0, "entropy_before_box": 0.3, "entropy_after_box": None,
         "tokens_after_box": None, "truncated": 0.0}
    rows = [{"step": 0, **e}]
    rows += [{"step": 1, "loss": 1.0, "tflops": 1.0, "horizon": 24}, {"step": 1, **e}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    for step in (0, 1):
        samples = [{"index": i, "correct": i == 1, "length": 100, "entropy_sum": 30.0,
                    "stop": "<end>", "tokens_after_box": None, "entropy_after_box_sum": 0.0}
                   for i in range(4)]
        (out / f"samples_student_{step:06d}.jsonl").write_text(
            "".join(json.dumps(row) + "\\n" for row in samples))
    seed = int(out.parent.name) if out.parent.name.isdigit() else 0
    number = seed + 100 * ("grpo" in out.name)
    results = {name: {"avg_at_k": x, "pass_at_k": 2 * x, "length": number}
               for name, x in (("easy", 0.1), ("hard", 0.3))}
    (out / "results.json").write_text(json.dumps({"results": results}))
"""


def test_the_papers_grid(tmp_path, monkeypatch, capsys):
    """
    Runs, evaluations before and after GRPO, and the paper's table with means over benchmarks and
    seeds. On the toy world, with planted stages.
    """
    stage = tmp_path / "stage.py"
    stage.write_text(textwrap.dedent(PLANTED))
    start = cells.start
    monkeypatch.setattr(cells, "start", lambda job, gpu: start(job._replace(script=stage), gpu))
    monkeypatch.setattr(cells.plot, "draw", lambda *args, **options: None)
    options = ["--base", "configs/toy_cells.py", "--sample", "configs/toy_sample.py", "--grpo",
               "configs/toy_grpo.py", "--eval", "configs/toy_eval.py", "--benchmarks",
               "data/toy/easy.jsonl,data/toy/hard.jsonl", "--short", "24"]
    world = cells.grid("configs/toy_cells.py", "configs/toy_sample.py", "configs/toy_grpo.py",
                       ["configs/toy_eval.py"], 24)
    assert world.rungs == (24, 48, 96, 160) and world.out == Path("out/cells_toy_cells")
    work = cells.jobs_of(world, [1, 2], rl=True)
    check_configs(work)
    # Trajectories, two models as they come, and of each seed 12 runs and 8 of GRPO, all evaluated.
    assert len(work) == 3 + 2 * 2 * (12 + 8)
    by_name = {job.folder.name: job for job in work if job.folder.parent.name == "1"}
    assert by_name["teacher_1_24_union"].after == (world.out / "trajectories",)
    assert by_name["eval_grpo_student_0_160"].after == (world.out / "1/grpo_student_0_160",)
    assert "--steps_per_horizon=48" in by_name["curriculum_union"].argv

    monkeypatch.setattr(cells, "grid", lambda *args: world)
    world.out = tmp_path / "out"
    cells.main([*options, "--rl", "--seeds", "1", "3", "--gpus", "0,1,2,3"])
    table = (world.out / "paper.md").read_text().splitlines()
    assert table[2] == ("| teacher prefixes, forward KL, 24 | 20.0 / 40.0 / 2 | 30.9 / 45.4 / 3710 "
                        "| 20.0 / 40.0 / 102 | 34.9 / 49.4 / 3879 |")
    assert table[9].endswith("| 36.4 / 48.3 / 8185 | 20.0 / 40.0 / 102 | 30.6 / 42.8 / 3853 |")
    assert "| curriculum to 160 | 20.0 / 40.0 / 2 | 40.0 / 54.1 / 2688 | - | - |" in table
    assert table[2] in capsys.readouterr().out
    claimed = (world.out / "claims.md").read_text()
    assert "| 2 | A(R) > A(F), short | 0.25, 0.25: open (+0 .. +0) |" in claimed
    with pytest.raises(SystemExit, match="made with other configs or models than there are now"):
        (world.out / "inputs.txt").write_text("other")
        cells.main([*options, "--seeds", "1", "--jobs", "1"])


def test_a_base_that_lacks_something(tmp_path):
    base = tmp_path / "base.py"
    base.write_text("student = 'a'\nteacher = 'b'\nprompts = 'c'\neval_data = 'd'\n")
    with pytest.raises(SystemExit, match="must set max_new_tokens, max_steps, eval_max_new_tokens"):
        cells.grid(str(base), "s", "g", ["e"], 128)
    base.write_text(base.read_text() + "max_new_tokens = max_steps = eval_max_new_tokens = 128\n")
    with pytest.raises(SystemExit, match="set max_new_tokens to more than 128, the short horizon"):
        cells.grid(str(base), "s", "g", ["e"], 128)
    with pytest.raises(SystemExit):                      # no 4B model on a thread of the CPU
        cells.main(["--base", "configs/opd_4b.py"])
