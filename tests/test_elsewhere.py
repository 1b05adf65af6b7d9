"""What the README says of other programs that use a checkpoint: its own code, run on a small one."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi

import gpt2_tinystories as project

README = (Path(project.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def section(finished, monkeypatch):
    """Run the nth Python block of the section, in the folder of a finished run of two epochs, 64 tokens long."""
    text = README.split("\n## Use it elsewhere\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    monkeypatch.chdir(finished)

    def run(n):
        code = re.sub(r"(max_new_tokens|max_length)=\d+", r"\1=20", blocks[n].replace("epoch_5", "epoch_2"))
        names = {}
        exec(code, names)
        return names

    return run


@pytest.fixture
def model(finished):
    return project.load_checkpoint(finished / "checkpoints" / "epoch_2")


def test_transformers_writes(section, capsys):
    names = section(0)
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert len(names["ids"][0]) <= 20 + len(names["tokenizer"]("Tom had a kite")["input_ids"])


def test_a_checkpoint_goes_to_the_hub(section, finished, monkeypatch):
    """All but the sending: what is sent are the files of the epoch, and the optimizer's state is not among them."""
    created, sent = [], []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, exist_ok: created.append(name))
    monkeypatch.setattr(HfApi, "create_commit", lambda _, operations, **options: sent.append((operations, options)))
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False, raising=False)
    section(1)
    ((operations, options),) = sent
    assert created == [options["repo_id"]] == ["your-name/tiny-stories"]
    names = {path.name for path in (finished / "checkpoints" / "epoch_2").iterdir()}
    assert {operation.path_in_repo for operation in operations} == names
    assert "model.safetensors" in names and "last.pt" not in names


def test_ctranslate2_computes_and_writes_the_same(section, finished, model, capsys):
    pytest.importorskip("ctranslate2")
    (command,) = re.findall(r"```sh\n(ct2-.*?)\n```", README)
    program, *arguments = command.replace("epoch_5", "epoch_2").split()
    subprocess.run([Path(sys.executable).parent / program, *arguments, "--force"], cwd=finished, check=True)
    names = section(2)
    assert capsys.readouterr().out.strip().startswith("Once upon a time")
    ids = torch.randint(1, 400, (1, 60))
    logits = torch.from_numpy(np.array(names["model"].forward_batch(ids.tolist())))
    torch.testing.assert_close(logits, model(ids).detach(), atol=1e-4, rtol=1e-4)
    story, n_prompt = names["story"].sequences_ids[0], len(project.encode(model.tokenizer, "Once upon a time"))

    (greedy,) = project.continue_ids(model, story[:n_prompt], torch.zeros(1, 20), ("greedy", 1.0, 0, 1.0, 1.0))
    new = greedy[n_prompt:]
    assert story[n_prompt:][: len(new)] == new[: len(story) - n_prompt]
