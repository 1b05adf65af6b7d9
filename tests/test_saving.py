"""A trained model is never lost to something beside it."""

import errno
import os
import shutil
import stat
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import SIZES, draw, draw_figure, read_run, same_runs, train
from matplotlib.figure import Figure

import gpt2_tinystories as project
from sample_stories import sample_stories

pytestmark = pytest.mark.packages

SHORT = f"--data s.txt --fraction 1 --tokenizer bpe:300 {SIZES} --max-steps 2 --epochs 1"


@pytest.fixture
def stories_here(workspace):
    Path("s.txt").write_text("<|endoftext|>".join(sample_stories(30)))
    project.say_once.cache_clear()
    return workspace


def fails_once(monkeypatch, place, name, error, is_meant=lambda *arguments: True, times=1):
    """Let the first call of place.name, of those that are meant, raise an error."""
    usual, calls = getattr(place, name), []

    def failing(*arguments, **options):
        if is_meant(*arguments) and len(calls) < times:
            calls.append(arguments)
            raise error
        return usual(*arguments, **options)

    monkeypatch.setattr(place, name, failing)
    return calls


def is_a_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def of(name):
    return lambda path: Path(path).name == name


REFUSED = OSError(errno.EPERM, "Operation not permitted")
PLACES = {
    "permissions": (os, "chmod", REFUSED),
    "flushing a folder": (os, "fsync", OSError(errno.EINVAL, "Invalid argument"), is_a_folder),
    "the lock": ("fcntl", "flock", OSError(errno.ENOLCK, "No locks available")),
    "plots": (project, "write_plots", RuntimeError("no plot today")),
    "drawing": (Figure, "savefig", RuntimeError("Failed to process string with tex: latex could not be found")),
    "legend": ("matplotlib.axes", "Axes.legend", ValueError("x")),
    "fonts": ("matplotlib.font_manager", "findfont", ValueError("no font")),
    "figures": (project, "whole_or_absent", OSError(errno.EROFS, "Read-only"), of("training_metrics.csv")),
    "memory for the plot": (Figure, "savefig", MemoryError()),
}


@pytest.mark.parametrize("what", PLACES)
def test_whatever_fails_beside_the_model_costs_no_model(what, stories_here, monkeypatch, capsys):
    monkeypatch.setattr(project, "draw", draw_figure)
    place, name, *rest = PLACES[what]
    if isinstance(place, str):
        place = pytest.importorskip(place)
    if "." in name:
        owner, name = name.split(".")
        place = getattr(place, owner)
    n_folders = 2 if what == "the lock" else 1  # and each of them is tried more than once
    calls = fails_once(monkeypatch, place, name, *rest, times=9 if what == "the lock" else 1)
    train("", SHORT)
    model, record = read_run(epoch=1)
    assert calls and len(record["epochs"]) == 1
    assert Path("checkpoints/epoch_1/sample.txt").read_text().startswith("Once upon a time")
    shown = capsys.readouterr().out
    assert shown.count("warning    ") == n_folders, shown
    assert (getattr(rest[0], "strerror", None) or repr(rest[0])) in shown


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_what_a_file_system_refuses_each_time_is_said_once(number, stories_here, monkeypatch, capsys):
    chmod, open_file = os.chmod, os.open

    def no_chmod(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    def no_folders(path, *arguments, **options):  # as on Windows
        if os.path.isdir(path):
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", no_chmod)
        patch.setattr(os, "open", no_folders)
        train("", SHORT.replace("--epochs 1", "--epochs 2").replace("--max-steps 2", ""))
    assert os.chmod is chmod
    read_run(epoch=2)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == len(set(said)) == 2, said


@pytest.mark.parametrize(
    "name, error, is_meant",
    [
        ("generate_text", RuntimeError("a mistake"), lambda *_: True),
        ("whole_or_absent", OSError(errno.ENOSPC, "No space left"), of("sample.txt")),
        ("say", BrokenPipeError(), lambda text: text.startswith("epoch 1")),
        ("say", OSError(errno.ENOSPC, "the log's disk is full"), lambda text: text.startswith("saved ")),
    ],
)
def test_what_ends_a_run_after_the_model_is_saved_leaves_the_rest_to_the_next(
    name, error, is_meant, stories_here, monkeypatch, tmp_path_factory
):
    straight = tmp_path_factory.mktemp("straight")
    shutil.copy("s.txt", straight)
    with monkeypatch.context() as patch:
        patch.chdir(straight)
        train("", SHORT.replace("--epochs 1", "--epochs 2").replace("--max-steps 2", ""))
    two_epochs = SHORT.replace("--epochs 1", "--epochs 2").replace("--max-steps 2", "")

    with monkeypatch.context() as patch:
        calls = fails_once(patch, project, name, error, is_meant)
        with pytest.raises(type(error)):
            train("", two_epochs)
        assert calls
    read_run(epoch=1)
    train("", two_epochs)
    same_runs(straight, stories_here)
    for epoch in (1, 2):
        part = f"checkpoints/epoch_{epoch}/sample.txt"
        assert Path(part).read_text() == (straight / part).read_text()


def saved_rates():
    last = torch.load("checkpoints/last.pt", weights_only=True)
    return [group["lr"] for name in ("adamw", "muon") for group in last[name]["param_groups"]]


def test_a_finished_run_whose_last_sample_is_missing_makes_it_again(stories_here, capsys):
    train("", SHORT)
    sample = Path("checkpoints/epoch_1/sample.txt")
    text = sample.read_text()
    rates = saved_rates()
    sample.unlink()
    train("", SHORT)
    assert saved_rates() == rates
    assert sample.read_text() == text and "epoch 1/1" in capsys.readouterr().out
    train("", SHORT)
    assert "it is finished" in capsys.readouterr().out


def test_a_folder_that_nothing_can_be_written_to_is_refused_before_the_first_step(stories_here, monkeypatch):
    monkeypatch.setattr(project, "train", lambda *_: pytest.fail("trained for nothing"))
    fails_once(monkeypatch, project, "whole_or_absent", OSError(errno.EROFS, "Read-only"), of("tokenizer"))
    with pytest.raises(OSError, match="Read-only"):
        train("", SHORT)


def test_a_folder_that_cannot_be_written_any_more_is_refused_before_the_first_step(stories_here, monkeypatch):
    train("", SHORT)
    Path("checkpoints/epoch_1/sample.txt").unlink()  # there are tokens already
    monkeypatch.setattr(project, "train", lambda *_: pytest.fail("trained for nothing"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(project.InputError, match="checkpoints: cannot be written"):
        train("", SHORT)


# --- What is drawn does not depend on names and settings


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", draw)
    monkeypatch.setattr(project, "draw", draw_figure)
    epoch = {"epoch": 1, "step": 2, "tokens": 9}
    epoch |= {f"{part}_{name}": 0.5 for part in ("train", "test") for name in ("loss", "accuracy", "perplexity")}
    return {
        "n_steps": 2,
        "steps_per_epoch": 2,
        "parameters": 1,
        "settings": {"grad_clip": 1.0, "learning_rate": 1.0, "warmup_steps": 0},
        "data": {"train_stories": 1, "test_stories": 1, "source": "s"},
        "test_part_stories": 1,
        "epochs": [epoch | {"test_bits_per_byte": 0.5}],
    }


def picture(record, folder, source="s"):
    import numpy as np

    record["data"]["source"] = source
    points = project.curve_points(record, np.ones((2, len(project.COLUMNS))))
    project.write_plots(folder, record, points)
    return (folder / "training_metrics.png").read_bytes()


NAMES = ["cost_$5_and_$6", r"$\frac$", r"a\b^{c}_%&#~", "故事", "z\udce9", "a\nb", "🙂", "قصة", "x" * 255, "$$"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_every_name_can_be_in_the_title(name, record, tmp_path):
    picture(record, tmp_path, name)


def test_a_name_that_the_font_lacks_is_left_out(record, tmp_path):
    assert picture(record, tmp_path, "故事.txt") == picture(record, tmp_path, "z\udce9.txt")
    assert picture(record, tmp_path, "s.txt") != picture(record, tmp_path, "$s$.txt") != picture(record, tmp_path, "故")


@pytest.mark.parametrize(
    "setting",
    [
        {"text.usetex": True},
        {"font.family": ["No Such Font"], "axes.unicode_minus": False},
        {"savefig.format": "pdf", "savefig.bbox": "tight", "figure.constrained_layout.use": True},
        {"axes.prop_cycle": matplotlib.cycler(color=["k"]), "axes.facecolor": "k", "lines.linestyle": "none"},
        {"text.parse_math": True, "axes.formatter.use_mathtext": True, "mathtext.fontset": "stix"},
    ],
)
def test_the_users_settings_of_matplotlib_do_not_matter(setting, record, tmp_path):
    expected = picture(record, tmp_path)
    with matplotlib.rc_context(setting):
        assert picture(record, tmp_path) == expected
        assert all(matplotlib.rcParams[name] == value for name, value in setting.items())
