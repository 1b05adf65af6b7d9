"""Closed streams, odd environments and extreme values: a run that goes on, or one line."""

import errno
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SIZES, read_run, train

import gpt2_generate
import gpt2_tinystories as project
from sample_stories import sample_stories

SHORT = f"--data s.txt --fraction 1 --tokenizer bpe:300 {SIZES} --max-steps 2 --epochs 1"
ROOT = Path(project.__file__).parent


@pytest.fixture
def stories_here(workspace):
    Path("s.txt").write_text("<|endoftext|>".join(sample_stories(30)))
    return workspace


def run_script(script, arguments, redirect="", **environment):
    """Run a script in a shell and a process of its own; returns it when it has ended."""
    shutil.rmtree("checkpoints", ignore_errors=True)
    command = f'"{sys.executable}" "{ROOT / script}" {arguments} {redirect}'
    return subprocess.run(command, shell=True, env=os.environ | environment, capture_output=True, text=True)


# --- Streams


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdin"], ["stdin", "stdout", "stderr"]])
def test_without_a_stream_it_trains(closed, stories_here, monkeypatch):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    project.run(lambda: train("", SHORT))
    read_run(epoch=1)


def test_all_streams_closed_in_the_shell(stories_here):
    assert run_script("gpt2_tinystories.py", SHORT, "<&- >&- 2>&-").returncode == 0
    read_run(epoch=1)


def test_without_an_input_nothing_is_asked(finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    project.run(lambda: gpt2_generate.main(["--model", str(finished / "checkpoints"), "--interactive"]))
    assert "prompt>" in capsys.readouterr().out


class Full:
    """A stream on a disk that is full, or of a terminal that has gone."""

    def __init__(self, number):
        self.number = number

    def write(self, _):
        raise OSError(self.number, os.strerror(self.number))

    def flush(self):
        self.write("")

    def isatty(self):
        return True


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_log_that_cannot_be_written_costs_no_run(name, number, stories_here, monkeypatch, capfd):
    monkeypatch.setattr(sys, name, Full(number))
    project.run(lambda: train("", SHORT))
    read_run(epoch=1)


# --- Environment


def test_a_safe_path(finished, workspace, monkeypatch):
    arguments = f"--model {finished / 'checkpoints'} --max-length 2 --prompt One"
    done = run_script("gpt2_generate.py", arguments, PYTHONSAFEPATH="1")
    assert done.returncode == 0 and "One" in done.stdout
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != ROOT.resolve()])
    monkeypatch.delitem(sys.modules, "sample_stories")
    with monkeypatch.context() as patch:
        patch.setattr(project, "N_BUILT_IN", 20)
        assert len(project.built_in_stories()) == 20


def test_a_python_without_docstrings_is_one_line(stories_here):
    done = run_script("gpt2_tinystories.py", SHORT, PYTHONOPTIMIZE="2")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "-OO" in done.stderr


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "", "RANK": "3"}, {"WORLD_SIZE": "0", "RANK": ""}])
def test_empty_variables_of_processes_are_none(variables, monkeypatch):
    variables = variables | {"PYTHONPATH": str(ROOT)}
    code = "import gpt2_tinystories as project; print(project.WORLD_SIZE, project.RANK)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
    assert done.stdout == "1 0\n", done.stderr
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    assert project.pick_device("cpu", "fp32") == ("cpu", "fp32")


def test_a_folder_that_is_named_like_the_built_in_stories_is_said(stories_here, capsys):
    Path("sample").mkdir()
    shutil.copy("s.txt", "sample/s.txt")
    assert project.load_stories("sample", Path("cache"))[1] == project.BUILT_IN
    assert "--data ./sample is the one that is here" in capsys.readouterr().out
    with pytest.raises(project.InputError, match="s.txt"):
        project.load_stories("./sample", Path("cache"))


@pytest.mark.parametrize("flag", ["checkpoints", "plots", "data", "tokenizer", "prompt"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_name_is_refused(flag, value, workspace, refused):
    assert f"--{flag} : must be " in refused(project.main, [f"--{flag}", value])
    assert not list(workspace.iterdir())


@pytest.mark.parametrize("flag", ["checkpoints", "plots"])
@pytest.mark.parametrize("path", ["taken", "taken/below"])
def test_a_file_in_the_place_of_a_folder_is_one_line(flag, path, workspace, refused):
    Path("taken").write_text("")
    line = refused(project.main, f"--data sample --{flag} {path}")
    assert "--checkpoints or --plots: " in line and "taken" in line


@pytest.mark.parametrize("flag", ["epochs", "batch-size", "n-positions", "n-embd", "n-layer"])
@pytest.mark.parametrize("value", [10**9, 10**20])
def test_a_number_that_no_machine_has_room_for_is_refused(flag, value, workspace, refused):
    assert "to 1,000,000" in refused(project.main, f"--{flag} {value}")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("CUDA out of memory")])
def test_out_of_memory_names_the_flags_of_the_script_that_runs(error, finished, monkeypatch, capsys):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(project, "generate_text", failing)
    monkeypatch.setattr(sys, "argv", ["gpt2_generate.py", "--model", str(finished / "checkpoints")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "gpt2_generate.py"), run_name="__main__")
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and "--num-samples" in shown and "--batch-size" not in shown


# --- Models that are none


@pytest.mark.parametrize("name", ["m.gguf", "m.pt", "model.safetensors"])
def test_a_file_as_a_model_says_what_is_needed(name, workspace, refused):
    Path(name).write_bytes(b"GGUF" + bytes(100))
    for line in (refused(gpt2_generate.main, f"--model {name}"), refused(project.main, f"--data sample --init {name}")):
        assert name in line and "it must be an epoch's folder" in line


def test_a_pointer_of_git_lfs_is_named(finished, workspace, refused):
    shutil.copytree(finished / "checkpoints/epoch_2", "m")
    Path("m/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS" in refused(gpt2_generate.main, "--model m")


# --- Extremes of sampling


@pytest.mark.parametrize(
    "options",
    [{"top_p": x} for x in (1e-45, 1e-300, 5e-324, 1 - 1e-16, 1.0)]
    + [{"temperature": x} for x in (5e-324, 1e-38, 1e38, 1e308)]
    + [{"repetition_penalty": x} for x in (0.01, 100)]
    + [{"top_k": 10**9}, {"top_p": 1e-300, "temperature": 1e308, "repetition_penalty": 100, "top_k": 1}],
)
def test_extremes_are_right(options, model):
    texts = project.generate_text(model, "One day", 30, "sample", num_samples=3, **options)
    assert all(text.startswith("One day") for text in texts)
    if options.get("top_p", 1) < 1e-40 and len(options) == 1:
        assert set(texts) == {project.generate_text(model, "One day", 30)}  # the likeliest token alone is left
    logits = torch.randn(5, 400) * 50
    probabilities = project.next_probabilities(logits, project.Sampling(method="sample", **options))
    assert torch.isfinite(probabilities).all() and torch.allclose(probabilities.sum(-1), torch.ones(5))


@pytest.mark.parametrize(
    "flags", ["--repetition-penalty 1e-40", "--repetition-penalty 1e40", "--repetition-penalty nan", "--top-p 0"]
    + ["--top-p nan", "--temperature inf", "--temperature 0", "--max-length 99999999999999999999", "--num-samples 0"]
)
def test_what_cannot_be_right_is_refused(flags, finished, refused):
    line = refused(gpt2_generate.main, f"--model {finished / 'checkpoints'} --method sample {flags}")
    assert line.split(": ")[1].startswith(flags.split()[0])
