"""The benchmarks run, in small; what they measure is not judged here."""

import argparse
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SIZES, TINY, make_config, read_run

import gpt2_tinystories as project
from sample_stories import sample_stories

FOLDER = Path(__file__).parents[1] / "benchmarks"
TRAIN_SPEED = "train_speed.py --data stories.txt --tokenizer bpe:400 --rounds 1 --steps 1 --batch-size 1 --device cpu"


@pytest.mark.parametrize(
    "command, rows",
    [
        ("data_speed.py --stories 60 --tokenizer bpe:400", 2),
        ("generate_speed.py --model {finished}/checkpoints/epoch_2 --max-length 5 --rounds 1", 3),
        (f"{TRAIN_SPEED} --only ours --profile", 1),
        (f"quality.py --data stories.txt --fraction 1 --tokenizer bpe:400 {SIZES} --max-steps 2 --only plain ours "
         "--length 3", 2),
    ],
)
def test_a_benchmark_prints_its_table(command, rows, tmp_path, finished):
    pytest.importorskip("resource", reason="the benchmarks ask Unix how much memory a process has had")
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(sample_stories(60)))
    script, *arguments = command.format(finished=finished).split()
    if script.startswith(("generate", "quality")):
        arguments += ["--device", "cpu"]
    ran = subprocess.run(
        [sys.executable, FOLDER / script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    _, *table = [line for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == rows


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import quality

    return quality


@pytest.mark.parametrize("arguments", ["--precision fp32 --max-steps 8", "--precision bf16"])
def test_ours_in_the_benchmark_of_quality_is_what_the_script_does(arguments, quality, workspace):
    """The same seed in both: the same weights, the same batches, the same updates."""
    project.main([*TINY.split(), *arguments.split()])
    settings = project.parse(project.Settings, "", [*TINY.split(), *arguments.split()])
    figures, _ = quality.train("ours", settings.seed, settings, "cpu", settings.precision)
    _, record = read_run()
    assert figures["steps"] == record["n_steps"]
    assert figures["all"] == pytest.approx(record["epochs"][-1]["test_loss"], abs=1e-5)


def test_time_to_quality(quality, workspace, texts, monkeypatch, capsys):
    """A run of each contestant, and the arithmetic of what is said of them."""
    import time_to_quality

    (workspace / "stories.txt").write_text("<|endoftext|>".join(texts))
    monkeypatch.setattr(time_to_quality, "in_a_process", lambda function, *arguments: function(*arguments))
    shared = f"--data stories.txt --tokenizer bpe:400 {SIZES} --device cpu --compile off --rates 1e-3 2e-3"
    for arguments in ("--minutes 1e-4", "--minutes 2e-4 --only ours"):
        monkeypatch.setattr(sys, "argv", ["time_to_quality.py", *shared.split(), *arguments.split()])
        time_to_quality.main()
    last_table = capsys.readouterr().out.rpartition("|---|\n")[2]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in last_table.splitlines() if "|" in line]
    assert rows == [("0.0001", name) for name in ("naive", "ours", "ours", *["trainer"] * 3)] + [("0.0002", "ours")] * 2
    assert Path("quality_time", "curves.png").stat().st_size > 0

    def run(name, minutes, perplexity, rate=0.0, seed=1):
        return {"name": name, "budget": minutes, "rate": rate, "seed": seed, "seconds": 60 * minutes, "steps": 9,
                "own": math.log(perplexity)}

    runs = [run("ours", 2, 12, seed=1), run("ours", 2, 3, seed=2), run("ours", 4, 5), run("trainer", 10, 7, 1e-3),
            run("trainer", 10, 6, 2e-3), run("trainer", 10, 6, 2e-3, seed=2), run("naive", 10, 9), run("naive", 2, 4)]
    time_to_quality.report(runs, options=argparse.Namespace(device="cpu", precision="fp32"))
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "trainer has 6.00 after 10.0 minutes, ours 6.00 after 2.0: at least 5.0 times sooner", "",
        "naive has 9.00 after 10.0 minutes, ours 6.00 after 2.0: at least 5.0 times sooner", "",
        "naive has 4.00 after 2 minutes, ours nowhere"]


def test_every_recipe_differs_from_ours(quality, workspace):
    """All of them train, each weight by one optimizer, and end elsewhere than ours does."""
    arguments = f"{TINY} --max-steps 4 --grad-clip 0.1"
    settings = project.parse(project.Settings, "", arguments.split())
    losses = {}
    for name, recipe in quality.RECIPES.items():
        assert Path(name).name == name  # a result is kept in a file of this name
        torch.manual_seed(0)
        train_set, _, tokenizer, _ = quality.prepared(settings)
        model = recipe.model(project.model_config(settings, tokenizer), tokenizer)
        recipe.change(model)
        optimizers = recipe.optimizers(model, settings, torch.float32)
        trained = [id(p) for group in project.groups_of(optimizers) for p in group["params"]]
        expected = [id(p) for p in model.parameters() if p.requires_grad or recipe.plain]
        assert sorted(trained) == sorted(expected), name
        losses[name] = quality.train(name, 1, settings, "cpu", "fp32")[0]["all"]
    losses = {name: loss for name, loss in losses.items() if "warm-up" not in name}  # a run so short has none
    assert len(set(losses.values())) == len(losses), losses


def test_the_score_counts_each_token_once(quality, model, encoded):
    """Story by story, with and without <|endoftext|>; the bytes are those of the text."""
    own = end = n_own = n_bytes = 0
    for story in encoded.ids:
        ids = torch.tensor([story.as_py()])
        losses = -model(ids[:, :-1])[0].log_softmax(-1)[range(ids.size(1) - 1), ids[0, 1:]]
        is_end = ids[0, 1:] == model.tokenizer.eos_token_id
        own, end = own + losses[~is_end].sum().item(), end + losses[is_end].sum().item()
        n_own += (~is_end).sum().item()
        n_bytes += len(model.tokenizer.decode(ids[0, 1:][~is_end]).encode())
    scores = quality.score(model, encoded, project.epoch_batches(encoded.lengths, 7, 0, 0))
    assert scores["own"] == pytest.approx(own / n_own, rel=1e-5)
    assert scores["all"] == pytest.approx((own + end) / encoded.lengths.sum(), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(own / n_bytes / math.log(2), rel=1e-5)


def test_the_plain_model_is_that_of_pytorch(quality, tokenizer):
    """Post-LayerNorm with ReLU: nn.TransformerEncoderLayer with the same weights."""
    model = quality.Plain(make_config(tokenizer), tokenizer).eval()
    ids = torch.randint(0, 400, (2, 20))
    x = model.transformer.wte.weight[ids] * math.sqrt(32) + project.sinusoid(64, 32)[:20]
    for block in model.transformer.h:
        theirs = torch.nn.TransformerEncoderLayer(32, 2, 64, 0.0, "relu", batch_first=True).eval()
        for mine, other in (
            (block.attn.c_attn.weight, theirs.self_attn.in_proj_weight),
            (block.attn.c_attn.bias, theirs.self_attn.in_proj_bias),
            (block.attn.c_proj.weight, theirs.self_attn.out_proj.weight),
            (block.attn.c_proj.bias, theirs.self_attn.out_proj.bias),
            (block.mlp.c_fc.weight, theirs.linear1.weight),
            (block.mlp.c_fc.bias, theirs.linear1.bias),
            (block.mlp.c_proj.weight, theirs.linear2.weight),
            (block.mlp.c_proj.bias, theirs.linear2.bias),
        ):
            other.data.copy_(mine)
        x = theirs(x, torch.nn.Transformer.generate_square_subsequent_mask(20), is_causal=True)
    expected = x @ model.lm_head.weight.T + model.lm_head.bias
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
