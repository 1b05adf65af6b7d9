"""What the README and docs/elsewhere.md say of other programs that use a checkpoint: their code, run on a small one."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, read_points
from huggingface_hub import HfApi
from matplotlib.figure import Figure
from transformers import AutoTokenizer, GPT2LMHeadModel

import gpt2_tinystories as project

pytestmark = pytest.mark.packages

ROOT = Path(project.__file__).parent
PAGES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))


def block(language, word):
    """The one block of code that has this word in it."""
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", PAGES, flags=re.S) if word in code)
    return found.replace("epoch_5", "epoch_2")


@pytest.fixture
def example(finished, monkeypatch):
    """Run the Python block with a word, in the folder of a finished run of two epochs, 64 tokens long."""
    monkeypatch.chdir(finished)

    def run(word):
        names = {}
        exec(re.sub(r"(max_new_tokens|max_length)=\d+", r"\1=20", block("python", word)), names)
        return names

    return run


@pytest.fixture
def model(finished):
    return project.load_checkpoint(finished / "checkpoints" / "epoch_2")


def test_transformers_writes(example, capsys):
    names = example("AutoModelForCausalLM")
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert len(names["ids"][0]) <= 20 + len(names["tokenizer"]("Tom had a kite")["input_ids"])


def test_a_model_is_scored_on_other_stories(example, finished, capsys):
    """The perplexity and the bits per byte that are printed are those of transformers' probabilities."""
    texts = ["One day, a cat sat down.", "Tom had a red ball. He was happy."]
    (finished / "my_stories.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    example("encode_stories")
    perplexity, bits_per_byte = re.fullmatch(
        r"2 stories, 0 of them cut\nperplexity (.+), (.+) bits per byte\n", capsys.readouterr().out
    ).groups()
    folder = finished / "checkpoints" / "epoch_2"
    theirs, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    nats, n_tokens, n_bytes = 0, 0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        story = torch.tensor([[*ids, tokenizer.eos_token_id]])
        nats += theirs(story, labels=story).loss.item() * len(ids)
        n_tokens += len(ids)
        n_bytes += len(tokenizer.decode(ids[1:]).encode())
    assert float(perplexity) == pytest.approx(math.exp(nats / n_tokens), abs=0.01)
    assert float(bits_per_byte) == pytest.approx(nats / math.log(2) / n_bytes, abs=0.001)


def test_several_runs_are_drawn_in_one_picture(example, finished, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", draw)
    for name in ("a", "b"):
        shutil.copytree(finished / "plots", finished / "runs" / name, dirs_exist_ok=True)
    names = example("genfromtxt")
    lines = names["plt"].gca().get_lines()
    assert sorted(line.get_label() for line in lines) == [f"runs/{name}/training_metrics.csv" for name in "ab"]
    points = read_points(finished)
    for line in lines:
        assert line.get_xdata().tolist() == [float(row["tokens"]) for row in points]
        assert line.get_ydata().tolist() == [float(row["train_loss"]) for row in points]
    assert (finished / "runs.png").read_bytes()[:4] == b"\x89PNG"
    names["plt"].close()


def test_a_checkpoint_goes_to_the_hub(example, finished, monkeypatch):
    """All but the sending: what is sent are the files of the epoch, and the optimizer's state is not among them."""
    created, sent = [], []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, exist_ok: created.append(name))
    monkeypatch.setattr(HfApi, "create_commit", lambda _, operations, **options: sent.append((operations, options)))
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False, raising=False)
    example("upload_folder")
    ((operations, options),) = sent
    assert created == [options["repo_id"]] == ["your-name/tiny-stories"]
    names = {path.name for path in (finished / "checkpoints" / "epoch_2").iterdir()}
    assert {operation.path_in_repo for operation in operations} == names
    assert "model.safetensors" in names and "last.pt" not in names


def test_ctranslate2_computes_and_writes_the_same(example, finished, model, capsys):
    pytest.importorskip("ctranslate2")
    program, *arguments = block("sh", "ct2-").split()
    subprocess.run([Path(sys.executable).parent / program, *arguments, "--force"], cwd=finished, check=True)
    names = example("ctranslate2")
    assert capsys.readouterr().out.strip().startswith("Once upon a time")
    ids = torch.randint(1, 400, (1, 60))
    logits = torch.from_numpy(np.array(names["model"].forward_batch(ids.tolist())))
    torch.testing.assert_close(logits, model(ids).detach(), atol=1e-4, rtol=1e-4)
    story, n_prompt = names["story"].sequences_ids[0], len(project.encode(model.tokenizer, "Once upon a time"))

    (greedy,) = project.continue_ids(model, story[:n_prompt], 20, project.Sampling())
    new = greedy[n_prompt:]
    assert story[n_prompt:][: len(new)] == new[: len(story) - n_prompt]
