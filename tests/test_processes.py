"""Several processes, as torchrun starts them, against one with the same stories a step."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_curve, read_run, same_runs, train, train_in
from test_crash import start, wait_for

import gpt2_tinystories as project

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


@pytest.fixture(scope="module")
def tiny(tiny):
    """The tiny run in fp32: of its 9 batches an epoch, 4 a step, the last step has 1."""
    return f"{tiny} --precision fp32"


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The folder of that run in one process, 4 batches a step."""
    return train_in(tmp_path_factory.mktemp("alone"), "--accum-steps 4", tiny)


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """The folder of that run in two processes, 2 x 2 batches a step."""
    folder = tmp_path_factory.mktemp("pair")
    assert run_all(folder, tiny, 2) == [0, 0], output(folder, 0)
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_all(folder, arguments, n_processes, prepare=None, *values):
    port = free_port()
    return [
        start(folder, arguments, be_process, i, n_processes, port, prepare, *values, output=f"output_{i}.txt")
        for i in range(n_processes)
    ]


def be_process(i, n_processes, port, prepare, *values):
    names = {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": n_processes, "LOCAL_WORLD_SIZE": n_processes}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    project.RANK, project.WORLD_SIZE = i, n_processes
    if prepare:
        prepare(*values)


def run_all(folder, arguments, n_processes, prepare=None, *values):
    """The exit codes of all processes."""
    if "--accum-steps" not in arguments:
        arguments += f" --accum-steps {4 // n_processes}"
    started = start_all(folder, arguments, n_processes, prepare, *values)
    for process in started:
        process.join(120)
        assert process.exitcode is not None, "it hangs"
    return [process.exitcode for process in started]


def output(folder, i):
    return (folder / f"output_{i}.txt").read_text()


def assert_same_figures(one, two):
    """Equal but for the order in which sums were rounded."""
    _, record = read_run(one / "checkpoints")
    _, expected = read_run(two / "checkpoints")
    curve, expected_curve = read_curve(one), read_curve(two)
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    for (_, loss), (_, expected_loss) in zip(curve, expected_curve, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
    for epoch, expected_epoch in zip(record["epochs"], expected["epochs"], strict=True):
        assert epoch["test_loss"] == pytest.approx(expected_epoch["test_loss"], abs=1e-5)
        for name in ("train_accuracy", "test_accuracy"):
            assert epoch[name] == pytest.approx(expected_epoch[name], abs=1e-3)
        assert epoch["tokens"] == record["data"]["train_tokens"]


@pytest.mark.packages
def test_two_processes_learn_what_one_learns(pair, alone):
    assert_same_figures(pair, alone)
    assert output(pair, 1) == "" and "2 x cpu in fp32" in output(pair, 0)
    assert "6 steps" in output(pair, 0)
    assert not list(pair.rglob("*.tmp"))


def test_four_processes_learn_what_one_learns(tiny, alone, tmp_path):
    """In the last step of an epoch three of them have no story."""
    assert run_all(tmp_path, tiny, 4) == [0, 0, 0, 0]
    assert_same_figures(tmp_path, alone)


def test_each_story_is_seen_once_by_one_process(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 50, 77)
    settings = project.Settings(batch_size=4, accum_steps=2)
    for n_processes in (1, 3, 8):
        monkeypatch.setattr(project, "WORLD_SIZE", n_processes)
        seen = []
        n_steps = math.ceil(20 / (2 * n_processes))
        for window in islice(project.step_batches(lengths, settings, n_steps), n_steps):
            shares = []
            for i in range(n_processes):
                monkeypatch.setattr(project, "RANK", i)
                shares.append(project.own_share(window))
            assert len({len(part) for part in shares}) == 1
            of_step = [story for part in shares for batch in part for story in batch]
            assert sorted(of_step) == sorted(np.concatenate(window))  # the stories that its number of tokens is of
            seen += of_step
        assert sorted(seen) == list(range(77))


def test_an_empty_batch_changes_nothing(model):
    input_ids, targets = project.pad_batch([])
    assert input_ids.tolist() == [[0]] and targets.tolist() == [[project.IGNORE]]
    loss, n_correct = model.train()(input_ids, targets)
    loss.backward()
    assert loss == 0 and n_correct == 0
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.packages
def test_two_processes_learn_the_same_with_the_compiler(alone, tiny, tmp_path):
    """Their gradients are exchanged in parts while the backward pass goes on, and in the last step of an epoch one of
    them has no batch."""
    assert run_all(tmp_path, f"{tiny} --compile on", 2, note_the_order) == [0, 0], output(tmp_path, 0)
    assert_same_figures(tmp_path, alone)
    assert "compile    took" in output(tmp_path, 0) and "compile    off" not in output(tmp_path, 0)
    assert (tmp_path / "order").read_text() == "compiles a DistributedDataParallel"


def note_the_order():
    compile = torch.compile

    def noted(learner, **options):
        if not project.RANK:
            Path("order").write_text(f"compiles a {type(learner).__name__}")
        return compile(learner, backend="aot_eager", **options)  # all but the C++, which takes a minute

    torch.compile = noted


def test_only_the_preparation_may_take_hours(monkeypatch):
    """In training, a process that has lost the others waits for minutes, as PyTorch does by itself."""
    limits = {}
    monkeypatch.setattr(project, "WORLD_SIZE", 2)
    monkeypatch.setattr(project.dist, "init_process_group", lambda backend, **options: limits.update(options))
    monkeypatch.setattr(project.dist, "new_group", lambda backend, timeout: (backend, timeout.total_seconds()))
    groups = []
    monkeypatch.setattr(project.dist, "all_reduce", lambda tensor, group=None: groups.append(group))
    project.start_processes("cpu")
    with project.first_process_first():
        pass
    project.any_process(False)
    assert limits == {} and groups == [("gloo", 6 * 3600), None]


def kill_after_step(n):
    """Have this process kill itself when it begins step n + 1."""
    update, left = project.update, [n]

    def dying(*arguments):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*arguments)

    project.update = dying


@pytest.mark.packages
def test_killed_processes_continue_like_unbroken_ones(tiny, pair, tmp_path):
    assert run_all(tmp_path, f"{tiny} --save-every 0", 2, kill_after_step, 2) == [-signal.SIGKILL] * 2
    assert run_all(tmp_path, f"{tiny} --save-every 0", 2) == [0, 0]
    assert "continuing the interrupted run from its last save, after step 2\n" in output(tmp_path, 0)
    same_runs(tmp_path, pair)


def test_another_number_of_processes_continues_with_as_many_batches_a_step(tiny, alone, tmp_path, refused, monkeypatch):
    assert run_all(tmp_path, f"{tiny} --save-every 0", 2, kill_after_step, 4) == [-signal.SIGKILL] * 2
    monkeypatch.chdir(tmp_path)
    assert "accum_steps x processes was 4, is 2" in refused(project.main, f"{tiny} --accum-steps 2")
    train("--accum-steps 4", tiny)
    assert_same_figures(tmp_path, alone)


def test_a_signal_saves_and_stops_all(tiny, pair, tmp_path):
    """One process alone gets it, and all of them stop after the same step."""
    started = start_all(tmp_path, f"{tiny} --accum-steps 2", 2, slow_steps)
    wait_for(lambda: (tmp_path / "steps").exists())
    os.kill(started[1].pid, signal.SIGTERM)
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [143, 143]
    assert "saved after step" in output(tmp_path, 0).splitlines()[-1] and "saved" not in output(tmp_path, 1)
    assert run_all(tmp_path, tiny, 2) == [0, 0]
    same_runs(tmp_path, pair)


def test_a_signal_that_comes_twice_is_one_and_no_process_ends_before_the_save(tiny, pair, tmp_path):
    """Slurm and systemd signal every process, and torchrun does it again."""
    started = start_all(tmp_path, f"{tiny} --accum-steps 2", 2, slow_steps_and_saves)
    wait_for(lambda: (tmp_path / "steps").exists())
    for _ in range(2):
        for process in started:
            os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.3)
    wait_for(lambda: (tmp_path / "saving").exists())
    time.sleep(0.3)
    assert started[0].is_alive() and started[1].is_alive()  # both, until it is saved
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [143, 143]
    assert "saved after step" in output(tmp_path, 0).splitlines()[-1]
    assert (tmp_path / "checkpoints" / "last.pt").exists() and not list(tmp_path.rglob("*.tmp"))
    assert run_all(tmp_path, tiny, 2) == [0, 0]
    same_runs(tmp_path, pair)


def slow_steps_and_saves():
    """In which no handler of a signal can run."""
    save, update = torch.save, project.update

    def computing_update(*arguments):
        if not project.RANK:
            Path("steps").write_text("step")
        compute()
        return update(*arguments)

    def slow_save(*arguments):
        Path("saving").write_text("save")
        compute()
        save(*arguments)

    torch.save, project.update = slow_save, computing_update


def compute():
    """One call of some 1.5 seconds."""
    np.sort(np.random.default_rng(0).random(15_000_000))


def slow_steps():
    """Make every step take 0.3 s, and note in a file that it begins."""
    update = project.update

    def slow_update(*arguments):
        if not project.RANK:
            Path("steps").write_text("step")
        time.sleep(0.3)
        return update(*arguments)

    project.update = slow_update


def poison_the_fourth_step():
    backward, left = project.backward, [1 + 4]  # the first is the trial on the longest stories

    def poisoned(learner, *rest):
        left[0] -= 1
        if not left[0] and project.RANK:
            learner.module.transformer.ln_f.bias.data[0] = float("nan")
        return backward(learner, *rest)

    project.backward = poisoned


def test_a_loss_that_is_not_finite_is_told_once(tiny, tmp_path):
    assert run_all(tmp_path, f"{tiny} --save-every 0", 2, poison_the_fourth_step) == [2, 2]
    assert "step 4: the loss or its gradient is not finite" in output(tmp_path, 0).splitlines()[-1]
    assert "last.pt is good, of step 3" in output(tmp_path, 0).splitlines()[-1]
    assert output(tmp_path, 1) == ""


def no_hub_in_process_0():
    """As if it answered the others: they may not ask it."""
    os.environ["HF_HUB_OFFLINE"] = "" if project.RANK else "1"
    project.hub_answers = lambda: project.RANK > 0


def test_all_processes_take_the_stories_that_the_first_one_found(tiny, tmp_path):
    arguments = tiny.replace(tiny.split()[1], "auto").replace("--fraction 1 ", "--fraction 0.002 ")
    assert run_all(tmp_path, arguments, 2, no_hub_in_process_0) == [0, 0]
    assert "from built-in stories" in output(tmp_path, 0) and not (tmp_path / "tinystories_local").exists()


def other_stories_in_process_1():
    split_stories = project.split_stories

    def other(*arguments):
        train, test, counts = split_stories(*arguments)
        return train, test, counts | {"fingerprint": f"of process {project.RANK}"}

    project.split_stories = other


def test_processes_with_other_stories_are_refused(tiny, tmp_path):
    assert set(run_all(tmp_path, tiny, 2, other_stories_in_process_1)) == {2}
    assert "have found different stories" in output(tmp_path, 0).splitlines()[-1]


def fail_in_process_1():
    update = project.update

    def failing(*arguments):
        if project.RANK:
            raise torch.OutOfMemoryError("out of memory")
        return update(*arguments)

    project.update = failing


def test_a_process_that_fails_says_why_and_the_others_end(tiny, tmp_path):
    """Without torchrun, which would end the others itself, they end by themselves."""
    codes = run_all(tmp_path, tiny, 2, fail_in_process_1)
    assert codes[1] == 2 and codes[0] not in (0, None)
    assert "halve --batch-size" in output(tmp_path, 1).splitlines()[-1]
    assert "Traceback" not in output(tmp_path, 1)


@pytest.mark.parametrize("wrong", ["--data nowhere.txt", "--dropout 2"])
def test_torchrun_shows_a_mistake_in_one_line(wrong, tmp_path):
    command = [*TORCHRUN, str(free_port()), project.__file__, *wrong.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("gpt2_tinystories.py: ")]
    assert len(lines) == 1 and wrong in lines[0], done.stderr
    assert f'File "{project.__file__}"' not in done.stderr


@pytest.mark.packages
def test_torchrun_trains(tiny, pair, tmp_path):
    command = [*TORCHRUN, str(free_port()), project.__file__, *tiny.split(), "--accum-steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1 and "Warning" not in done.stderr
    same_runs(tmp_path, pair)
    record = json.loads((tmp_path / "checkpoints" / "epoch_2" / "training.json").read_text())
    assert record["processes"] == 2
