"""What the README and docs/elsewhere.md say of other programs that use a checkpoint: their code, run on a small one."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi

import gpt2_tinystories as project

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
