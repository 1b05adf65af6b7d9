"""Shared pieces of the tests: no network, nothing outside pytest's temporary folders."""

import csv
import functools
import json
import os
import tempfile
from pathlib import Path

# Before anything is imported: an empty cache and no network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="gpt2-tinystories-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and pytest runs a process on each core

import child
import datasets
import pytest
import torch
from matplotlib.figure import Figure

import gpt2_tinystories as project
import sample_stories as grammar
from sample_stories import sample_stories

# Drawing takes half a second, so that most runs here do without.
draw, draw_figure = Figure.savefig, project.draw
Figure.savefig, project.draw = child.save_no_picture, lambda *_: Figure()
# The built-in stories take seconds each time.
built_in_stories = functools.cache(lambda: list(sample_stories(project.N_BUILT_IN)))
grammar.sample_stories = lambda n, **seed: built_in_stories() if n == project.N_BUILT_IN else sample_stories(n, **seed)

SIZES = "--n-positions 64 --n-embd 32 --n-head 2 --n-inner 64"
TINY = f"--data sample --fraction 0.0067 --epochs 2 --tokenizer bpe:400 {SIZES}"


@pytest.fixture(scope="session")
def texts():
    return list(sample_stories(60))


@pytest.fixture(scope="session")
def stories(texts):
    return datasets.Dataset.from_dict({"text": texts})


@pytest.fixture(scope="session")
def tokenizer(stories):
    return project.train_tokenizer(stories, 400)


@pytest.fixture
def encoded(stories, tokenizer, tmp_path):
    """The Tokens of the 60 stories, cut at 64 tokens."""
    return project.encode_stories(stories, tokenizer, 64, tmp_path / "tokens.arrow")


def make_config(tokenizer, dropout=0.0, **sizes):
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 64} | sizes
    settings = project.Settings(dropout=dropout, **sizes)
    return project.model_config(settings, tokenizer)


@pytest.fixture
def model(tokenizer):
    """A tiny model with weights ten times the usual size, so that its attention and its logits are far from uniform.
    The tokens that the 60 stories do not have share a row."""
    return make_model(tokenizer)


def make_model(tokenizer, dropout=0.0, **sizes):
    torch.manual_seed(4)
    model = project.GPT(make_config(tokenizer, dropout, **sizes), tokenizer)
    is_there = torch.zeros(len(tokenizer), dtype=torch.bool)
    is_there[[tokenizer.eos_token_id, *sum(project.encode(tokenizer, list(sample_stories(60))), [])]] = True
    model = project.FoldedGPT(model, is_there)
    assert model.n_shared > 100 and len(model.lm_head.weight) == 401 - model.n_shared
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
            else:  # biases and LayerNorms that are not at their first values
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty folder to run the scripts in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(capsys):
    """refused(main, command line): checks that it ends with exit code 2 and one line, and returns the line."""

    def check(main, arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            project.run(lambda: main(arguments.split() if isinstance(arguments, str) else arguments))
        error = capsys.readouterr().err
        assert stop.value.code == 2
        *progress_bars, line, end = error.replace("\r", "\n").split("\n")
        assert end == "" and "Traceback" not in error
        assert all("%|" in bar or "examples" in bar or not bar.strip() for bar in progress_bars), error
        return line

    return check


def train(arguments="", base=TINY):
    project.main(f"{base} {arguments}".split())


def train_in(folder, arguments="", base=TINY):
    """Train in a folder, and return it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(arguments, base)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished tiny run, made once for the tests that only look at it. Its plots are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", draw)
        patch.setattr(project, "draw", draw_figure)
        return train_in(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The arguments of a tiny run on 80 saved stories, of which 72 make 9 batches: 10 steps in 2 epochs."""
    folder = tmp_path_factory.mktemp("stories") / "stories"
    datasets.Dataset.from_dict({"text": list(sample_stories(80))}).save_to_disk(folder)
    return f"--data {folder} --fraction 1 --epochs 2 --tokenizer bpe:400 {SIZES}"


def read_run(folder="checkpoints", epoch=2):
    """(model, record) of an epoch."""
    record = json.loads(Path(folder, f"epoch_{epoch}", "training.json").read_text())
    return project.load_checkpoint(Path(folder, f"epoch_{epoch}")), record


def read_points(folder):
    """The points of the curves, from the CSV file beside the plots, but for how long they took."""
    with open(folder / "plots" / "training_metrics.csv", encoding="utf-8", newline="") as file:
        return [row | {"minutes": "", "tokens_per_second": ""} for row in csv.DictReader(file)]


def read_curve(folder):
    """[step, training loss] of the points."""
    return [[int(row["step"]), float(row["train_loss"])] for row in read_points(folder)]


def same_runs(one, two, epoch=2):
    """The runs in two folders have the same weights, bit for bit, and the same figures but for the time it took."""
    (model, record), (unbroken_model, unbroken) = (read_run(folder / "checkpoints", epoch) for folder in (one, two))
    weights = unbroken_model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert read_points(one) == read_points(two)
    for figures, unbroken_figures in zip(record["epochs"], unbroken["epochs"], strict=True):
        assert figures | {"seconds": 0} == unbroken_figures | {"seconds": 0}
