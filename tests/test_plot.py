"""plot.py: what is drawn where, read from the figure itself, and the table."""

import json
import sys

import pytest

import plot


@pytest.fixture
def figure(monkeypatch, tmp_path, capsys):
    """Run plot.py on the command line given; returns (figure, what it printed)."""
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)

    def call(*argv):
        picture = tmp_path / "p.png"
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, argv), f"--out={picture}"])
        plot.main()
        assert picture.stat().st_size > 5000
        return figures[-1], capsys.readouterr().out
    return call


def evaluation(step, accuracy, entropy, model="student", **more):
    return {
        "step": step, "model": model, "avg_at_k": accuracy, "pass_at_k": 1.0, "k": 4,
        "entropy": entropy, "length": 40.0 + step, "entropy_before_box": 0.3,
        "entropy_after_box": None, "tokens_after_box": 3.0, "truncated": 0.0, **more}


@pytest.fixture
def run(tmp_path):
    """
    A run with evaluations at 0 and 20, an open gate at 10 and a closed one at 20; 0.5 TFLOPs a
    step. Its last line is cut.
    """
    rows = [evaluation(0, 0.9, 0.1, "teacher"), evaluation(0, 0.2, 0.4)]
    for step in range(1, 21):
        rows.append({"step": step, "loss": float(step), "horizon": 8, "tflops": step / 2,
                     "seconds": 1.5})
        if step in (10, 20):
            gate = "open" if step == 10 else "closed"
            rows.append(evaluation(step, None, 0.25, "gate", gate=gate))
    rows.append(evaluation(20, 0.6, 0.2))
    folder = tmp_path / "a"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 21, "lo')
    return folder


def points(axis, marker):
    found = [line.get_xydata() for line in axis.lines if line.get_marker() == marker]
    return [tuple(xy) for line in found for xy in line]


def test_evaluations_gates_and_teacher(run, figure):
    fig, text = figure(run)
    accuracy, entropy, length, loss = fig.axes
    assert points(accuracy, "o") == [(0, 0.2), (20, 0.6)]
    assert points(length, "o") == [(0, 40), (20, 60)]
    assert points(entropy, "o") == [(0, 0.4), (20, 0.2)]

    assert points(entropy, "^") == [(10, 0.25)] and points(entropy, "X") == [(20, 0.25)]
    assert not points(accuracy, "^") and not points(accuracy, "X")       # gates: one panel only
    dotted = [line for line in accuracy.lines if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in dotted] == [0.9]

    raw, mean = loss.lines
    assert list(raw.get_ydata()) == list(range(1, 21))
    assert mean.get_ydata()[4] == 3                                      # of 1 ... 5
    assert mean.get_ydata()[19] == 15.5                                  # of 11 ... 20

    rows = [line.split() for line in text.splitlines()[1:]]
    assert rows[0][:2] == ["Avg@4", "Pass@4"]
    assert [row[0] for row in rows[1:]] == ["base", "distilled", "teacher"]
    assert rows[1][2] == "0.200" and rows[2][2] == "0.600" and rows[2][-2:] == ["10", "30"]
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_rows_and_tflops(run, figure, tmp_path):
    other = tmp_path / "b"
    other.mkdir()
    metrics = (run / "metrics.jsonl").read_text().replace("0.6", "0.7")
    (other / "metrics.jsonl").write_text(metrics)
    fig, _ = figure(run, "--row", other, run, "--y", "accuracy", "horizon", "--x", "tflops")
    assert len(fig.axes) == 4                            # two rows of two panels
    first, horizon, second, _ = fig.axes
    assert points(first, "o") == [(0, 0.2), (10, 0.6)] and first.get_xlabel() == "TFLOPs"
    assert points(second, "o") == [(0, 0.2), (10, 0.7), (0, 0.2), (10, 0.6)]
    assert list(horizon.lines[0].get_xdata())[:2] == [0.5, 1]
    labels = [label.get_text() for label in second.get_legend().get_texts()]
    assert labels == [str(other), "teacher", str(run)]


def test_mistakes_are_one_line(run, figure, tmp_path):
    with pytest.raises(SystemExit, match="no run has 'acuracy'; known here: accuracy, entropy"):
        figure(run, "--y", "acuracy")
    with pytest.raises(SystemExit, match="metrics.jsonl; give run folders"):
        figure(tmp_path / "nothing")
