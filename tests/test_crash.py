"""Runs in processes of their own that are killed, stopped or run into a full disk; and checkpoints that are damaged.

The processes are forked from a server that has imported the slow packages once (multiprocessing's forkserver).
"""

import hashlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from child import work
from conftest import read_run, same_runs, train_in

import gpt2_tinystories as project

processes = multiprocessing.get_context("forkserver")
SLOW = "torch torch._dynamo datasets matplotlib.figure transformers.models.auto.tokenization_auto"
processes.set_forkserver_preload([*SLOW.split(), "transformers.models.gpt2.modeling_gpt2"])


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of the tiny run, which nothing disturbed."""
    return train_in(tmp_path_factory.mktemp("finished"), base=tiny)


def start(folder, arguments, prepare=None, *values, output="output.txt", script="gpt2_tinystories"):
    """Run a script in folder, its output in a file there; prepare(*values) is called before."""
    arguments = arguments.split() if isinstance(arguments, str) else arguments
    Path(folder, output).unlink(missing_ok=True)
    process = processes.Process(target=work, args=(folder, script, arguments, {}, output, output, prepare, values))
    process.start()
    return process


def run(folder, arguments, prepare=None, *values, **script):
    """(exit code, output): minus the signal's number for a process that was killed."""
    process = start(folder, arguments, prepare, *values, **script)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, read(folder)


def read(folder):
    return (folder / "output.txt").read_text() if (folder / "output.txt").exists() else ""


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def without_the_last_evaluation(finished, folder):
    """Make folder that of a run which was killed after its last step."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "checkpoints" / "epoch_2")
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    last["record"]["epochs"].pop()
    torch.save(last, folder / "checkpoints" / "last.pt")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "output.txt"}


# --- Killed


def kill_at(n_operations, event_wanted="", name=""):
    """Have this process kill itself before the nth time that it opens, renames or removes something in the folders of
    the run; given an event and a name, before the nth of just these."""
    left = [n_operations]

    def count(event, arguments):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and event_wanted in ("", event):
            path = os.path.abspath(os.fsdecode(arguments[0])) if isinstance(arguments[0], (str, bytes)) else ""
            if path.startswith((os.path.abspath("checkpoints"), os.path.abspath("plots"))) and path.endswith(name):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_a_run_that_is_killed_again_and_again_ends_like_an_unbroken_one(finished, tmp_path, tiny):
    """The evaluation of an epoch and its saves take some 60 operations, and a start some 20: one that is killed before
    is in vain."""
    rng, left, n_kills = random.Random(3), set(), 0
    while (code := run(tmp_path, tiny + " --save-every 0", kill_at, rng.randrange(15, 80))[0]) == -signal.SIGKILL:
        left |= {path.name for path in tmp_path.glob("checkpoints/*")}
        n_kills += 1
        assert n_kills < 60, "it does not get on"
    assert code == 0 and n_kills >= 10, n_kills
    assert left >= {"last.pt", "last.pt.tmp", "epoch_1"}  # they came in the middle of saves, too
    same_runs(tmp_path, finished)
    assert files(tmp_path) == files(finished)


def test_a_new_run_is_killed_in_its_first_epoch(finished, tmp_path, tiny):
    """In the tokenisation, its first save, the first epoch's checkpoint, and the save after that."""
    places = (
        (2, "os.rename", ".arrow.tmp"),
        (1, "os.rename", "last.pt.tmp"),
        (1, "os.rename", "epoch_1.tmp"),
        (2, "os.rename", "last.pt.tmp"),
    )
    for number, place in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert run(folder, tiny, kill_at, *place)[0] == -signal.SIGKILL
        assert (number >= 2) == (folder / "checkpoints" / "last.pt").exists()
        assert (number == 3) == (folder / "checkpoints" / "epoch_1").exists()
        assert run(folder, tiny)[0] == 0
        same_runs(folder, finished)
        assert files(folder) == files(finished)


def test_the_script_itself_is_killed_and_then_stopped(finished, tmp_path, tiny):
    command = [sys.executable, project.__file__, *tiny.split(), "--save-every", "0"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        script = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(next_save(tmp_path / "checkpoints" / "last.pt"))
        script.send_signal(number)
        _, errors = script.communicate()
        assert script.returncode == (-number if number == signal.SIGKILL else 143)
    last_line = errors.splitlines()[-1]
    assert "saved after step" in last_line and "the same command, without --overwrite" in last_line, errors
    assert "Traceback" not in errors
    assert run(tmp_path, f"{tiny} --save-every 0")[0] == 0
    same_runs(tmp_path, finished)


def next_save(path):
    """A function that says whether the file was written anew since this call."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    return lambda: path.exists() and path.stat().st_mtime_ns != before


# --- Stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_after_the_step_and_the_run_goes_on(number, finished, tmp_path, tiny):
    arguments = tiny + " --save-every 1e6"
    process = start(tmp_path, arguments, slow_steps)
    wait_for(lambda: "a step begins" in read(tmp_path))
    os.kill(process.pid, number)
    process.join(60)
    output = read(tmp_path)
    assert process.exitcode == 128 + number and "Traceback" not in output
    assert "saved after step" in output.splitlines()[-1]
    assert (tmp_path / "checkpoints" / "last.pt").exists() and not (tmp_path / "checkpoints" / "epoch_1").exists()
    code, output = run(tmp_path, arguments)
    assert code == 0 and "continuing the interrupted run" in output
    same_runs(tmp_path, finished)


def slow_steps():
    """Make every step take 0.3 s, and say when it begins."""
    update = project.update

    def slow_update(*arguments):
        print("a step begins", flush=True)
        time.sleep(0.3)
        return update(*arguments)

    project.update = slow_update


def test_a_second_signal_ends_the_process_at_once(tmp_path, tiny):
    process = start(tmp_path, tiny, slow_saves)
    wait_for(lambda: (tmp_path / "checkpoints" / "last.pt.tmp").exists())
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)  # this soon, it is the same one, as systemd and torchrun send it again
    time.sleep(3.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(3)
    assert process.exitcode == 128 + signal.SIGINT
    assert not (tmp_path / "checkpoints" / "last.pt").exists()


def test_other_signals_end_nothing(tmp_path, tiny):
    """Such as those of a terminal whose size changes, for which a library may have a handler."""
    process = start(tmp_path, tiny, handle_sizes)
    wait_for(lambda: "a step begins" in read(tmp_path))
    for _ in range(2):
        os.kill(process.pid, signal.SIGWINCH)
        time.sleep(0.3)
    process.join(60)
    assert process.exitcode == 0 and read(tmp_path).count("another size") == 2


def handle_sizes():
    signal.signal(signal.SIGWINCH, lambda *_: print("another size", flush=True))
    slow_steps()
    project.SAME_SIGNAL = 0


def slow_saves():
    """Each is one call in which no handler of Python's is called, as in a large matrix product."""
    torch.save = lambda *_: hashlib.pbkdf2_hmac("sha256", b"a", b"b", 60_000_000)
    project.SAME_SIGNAL = 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_preparation_ends_the_process_at_once(number, finished, tmp_path, tiny):
    process = start(tmp_path, tiny, slow_tokenising)
    wait_for(lambda: "the tokenising begins" in read(tmp_path))
    os.kill(process.pid, number)
    process.join(20)
    output = read(tmp_path)
    assert process.exitcode == 128 + number and "Traceback" not in output
    assert "interrupted" in output.splitlines()[-1]
    assert run(tmp_path, tiny)[0] == 0
    same_runs(tmp_path, finished)


def slow_tokenising():
    def slow_encode(*_, **__):
        print("the tokenising begins", flush=True)
        time.sleep(30)

    project.encode = slow_encode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_evaluation_is_noted_and_a_second_one_ends_the_process_at_once(
    number, finished, tmp_path, tiny
):
    process = start(tmp_path, tiny, slow_evaluations, 30)
    wait_for(lambda: "an evaluation begins" in read(tmp_path))
    os.kill(process.pid, number)
    wait_for(lambda: "stopping after this step; once more: at once" in read(tmp_path))
    time.sleep(2)
    assert process.is_alive()
    os.kill(process.pid, number)
    process.join(5)
    assert process.exitcode == 128 + number
    code, output = run(tmp_path, tiny)
    assert code == 0 and "from its last save, after step 5\n" in output
    same_runs(tmp_path, finished)


def test_after_a_signal_during_an_evaluation_the_run_ends_with_the_next_step(finished, tmp_path, tiny):
    """The next one is the sixth of ten; after the second evaluation there is none."""
    for signalled, (code_wanted, words) in enumerate(((143, "saved after step 6 of 10"), (0, "test perplexity")), 1):
        process = start(tmp_path, tiny, slow_evaluations, 1)
        wait_for(lambda: "an evaluation begins" in read(tmp_path))
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        output = read(tmp_path)
        assert process.exitcode == code_wanted and words in output, output
        assert "once more: at once" in output and f"epoch {signalled}/2" in output and "Traceback" not in output
    same_runs(tmp_path, finished)


def slow_evaluations(seconds):
    """Make every evaluation take longer, and say when it begins."""
    evaluate = project.evaluate

    def slow_evaluate(*arguments):
        print("an evaluation begins", flush=True)
        time.sleep(seconds)
        return evaluate(*arguments)

    project.evaluate = slow_evaluate


# --- Two runs


@pytest.mark.parametrize("other", ["", " --checkpoints other", " --plots other"])
def test_a_second_run_in_the_same_folders_is_refused(other, tmp_path, tiny):
    endless = tiny.replace("--epochs 2", "--epochs 1000")
    first = start(tmp_path, endless)
    wait_for(lambda: (tmp_path / "checkpoints" / "last.pt").exists())
    folder = tmp_path / "second"
    folder.mkdir()
    for name in ("checkpoints", "plots"):
        (folder / name).symlink_to(tmp_path / name)
    code, output = run(folder, endless + other)
    assert code == 2 and "another run is writing there" in output and len(output.splitlines()) == 1
    first.kill()
    first.join()
    code, output = run(tmp_path, endless + " --max-steps 1")
    assert "max_steps was 0, is 1" in output  # the lock is gone with the process, the run is there


# --- A full disk


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_where_the_training_state_does_not_fit_it_says_so_and_goes_on_once_there_is_room(finished, tmp_path, tiny):
    size = (finished / "checkpoints" / "last.pt").stat().st_size
    code, output = run(tmp_path, tiny, limit_files, size - 5000)
    line = output.splitlines()[-1]
    assert code == 1 and "Traceback" not in output
    assert "last.pt cannot be saved" in line and not list(tmp_path.glob("checkpoints/last*"))
    assert run(tmp_path, tiny)[0] == 0
    same_runs(tmp_path, finished)


@pytest.mark.packages
def test_a_full_disk_leaves_the_checkpoints_as_they_were(finished, tmp_path, tiny):
    without_the_last_evaluation(finished, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("checkpoints/**/*") if path.is_file()}
    code, output = run(tmp_path, tiny, limit_files, 50_000)
    assert code == 1 and "cannot be saved, what was saved before is kept" in output.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("checkpoints/**/*") if path.is_file()} == before
    assert run(tmp_path, tiny)[0] == 0
    same_runs(tmp_path, finished)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full(small_disk, tiny):
    code, output = run(small_disk, tiny)
    line = output.splitlines()[-1]
    assert code == 1 and "Traceback" not in output and "No space left" in line
    for folder in project.saved_epochs(small_disk / "checkpoints"):
        project.load_checkpoint(folder)
    assert torch.load(small_disk / "checkpoints" / "last.pt", weights_only=True)
    assert not list(small_disk.glob("checkpoints/*.tmp"))


@pytest.mark.packages
def test_a_disk_that_is_too_full_for_the_tokens_or_the_tokenizer_is_one_line(finished, tmp_path, tiny):
    """The libraries that write them have exceptions of their own."""
    size_of_tokens = max(path.stat().st_size for path in finished.glob("checkpoints/data/*.arrow"))
    size_of_tokenizer = (finished / "checkpoints" / "epoch_1" / "tokenizer.json").stat().st_size
    limits = (("-400", limit_tokenizer, size_of_tokenizer - 1), (".arrow", limit_tokens, size_of_tokens - 1))
    for name, limit, size in limits:
        code, output = run(tmp_path, tiny, limit, size)
        line = output.splitlines()[-1]
        assert code == 1 and "Traceback" not in output and f"{name} cannot be saved" in line, output
        assert not list(tmp_path.rglob("checkpoints/**/*.tmp"))


def limit_tokens(size):
    import gpt2_tinystories

    encode_stories = gpt2_tinystories.encode_stories

    def limited(*arguments):
        limit_files(size)
        return encode_stories(*arguments)

    gpt2_tinystories.encode_stories = limited


def limit_tokenizer(size):
    from transformers import PreTrainedTokenizerBase

    save = PreTrainedTokenizerBase.save_pretrained

    def limited(*arguments, **options):
        limit_files(size)
        return save(*arguments, **options)

    PreTrainedTokenizerBase.save_pretrained = limited


def test_a_damaged_token_cache_is_named(finished, tokenizer, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    cache = next(tmp_path.glob("checkpoints/data/train-*.arrow"))
    stories = datasets.Dataset.from_dict({"text": ["a"]})
    for content in (b"", cache.read_bytes()[:1000]):
        cache.write_bytes(content)
        with pytest.raises(project.InputError, match=r"arrow: cannot be read: .*; delete it"):
            project.encode_stories(stories, tokenizer, 64, cache)


def limit_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))


@pytest.mark.skipif(sys.platform != "linux", reason="looks up under Linux how much memory the process has")
def test_out_of_memory_is_one_line_with_a_way_out(tmp_path, tiny):
    code, output = run(tmp_path, tiny + " --n-embd 8192 --n-inner 32768", limit_memory)
    line = output.splitlines()[-1]
    assert code == 2 and "Traceback" not in output
    assert "out of memory" in line and "halve --batch-size and double --accum-steps" in line


# --- Damaged checkpoints


def damage(path, rng):
    """Flip a bit of a file, or cut it off, at a random place."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        content[place] ^= 1 << rng.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)


@pytest.fixture
def epoch(finished, tmp_path):
    """A copy of an epoch's folder."""
    return shutil.copytree(finished / "checkpoints" / "epoch_2", tmp_path / "epoch_2")


@pytest.mark.parametrize("is_told", [True, False], ids=["with its checksum", "without"])
def test_damaged_weights_are_refused_or_equal(is_told, epoch):
    """At 100 places. Without their checksum a changed weight is not noticed, but nothing else may happen."""
    rng, path, n_refused = random.Random(0), epoch / "model.safetensors", 0
    expected, content = project.load_checkpoint(epoch).state_dict(), path.read_bytes()
    if not is_told:
        (epoch / "training.json").unlink()
    for _ in range(100):
        damage(path, rng)
        try:
            assert same_weights(project.load_checkpoint(epoch), expected) or not is_told
        except project.InputError as error:
            n_refused += 1
            assert str(path if is_told else epoch) in str(error)
        path.write_bytes(content)
    assert n_refused > (90 if is_told else 30)


def same_weights(model, expected):
    weights = model.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def test_where_another_file_is_damaged_the_checkpoint_is_refused_or_has_the_same_weights(epoch):
    """At 40 places of each."""
    rng, n_refused = random.Random(0), {}
    expected = project.load_checkpoint(epoch).state_dict()
    for path in sorted(epoch.iterdir()):
        if path.name == "model.safetensors":
            continue
        content, n_refused[path.name] = path.read_bytes(), 0
        for _ in range(40):
            damage(path, rng)
            try:
                assert same_weights(project.load_checkpoint(epoch), expected), path
            except project.InputError as error:
                n_refused[path.name] += 1
                assert str(epoch) in str(error) and "\n" not in str(error)
            path.write_bytes(content)
    assert n_refused.pop("sample.txt") == n_refused.pop("generation_config.json") == 0  # they are not looked at
    assert min(n_refused.values()) > 5, n_refused


@pytest.mark.parametrize("content", ["", "[]", "null", "7", '"text"', "{", '{"weights_sha256": 7}', "{}", "\ufeff{}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "training.json", "tokenizer_config.json"])
def test_a_file_of_other_content_is_refused_in_one_line(name, content, epoch):
    """But where nothing is missing: a record may be empty, and a tokenizer does without its config."""
    expected, is_refused = project.load_checkpoint(epoch).state_dict(), False
    (epoch / name).write_text(content, encoding="utf-8")
    try:
        assert same_weights(project.load_checkpoint(epoch), expected)
    except project.InputError as error:
        is_refused = str(epoch) in str(error) and "\n" not in str(error)
    assert is_refused or name == "tokenizer_config.json" or (name == "training.json" and "{}" in content)


@pytest.mark.parametrize("change", ["edited", "removed", "added"])
def test_the_other_files_of_a_checkpoint_may_be_changed(change, epoch):
    """A model card, a list of files, another sample: people add and edit them, and git may change ends of lines."""
    expected = project.load_checkpoint(epoch).state_dict()
    for name in ("sample.txt", "training.json", "generation_config.json"):
        content = (epoch / name).read_bytes()
        if change == "edited":
            (epoch / name).write_bytes(content.replace(b"\n", b"\r\n") + b"\r\n")
        elif change == "removed":
            (epoch / name).unlink()
        else:
            (epoch / f"{name}.bak").write_bytes(content[:10])
            (epoch / "SHA256SUMS").write_text("an older version wrote this one\n")
    assert same_weights(project.load_checkpoint(epoch), expected)


def test_a_damaged_last_save_is_refused_or_equal(finished, tmp_path):
    """At 100 places."""
    rng, path, refused = random.Random(0), tmp_path / "last.pt", 0
    shutil.copy(finished / "checkpoints" / "last.pt", path)
    content, expected = path.read_bytes(), written(project.read_last(tmp_path))
    for _ in range(100):
        damage(path, rng)
        try:
            assert written(project.read_last(tmp_path)) == expected
        except project.InputError as error:
            refused += 1
            assert "last.pt: cannot be read" in str(error)
        path.write_bytes(content)
    assert refused > 80


def written(last):
    file = io.BytesIO()
    torch.save(last, file)
    return file.getvalue()


def test_a_model_of_absurd_size_is_refused_before_it_takes_memory(finished, tmp_path):
    for name, value in (("n_layer", 10**9), ("n_embd", 10**7), ("n_inner", 10**12), ("n_positions", 10**12)):
        folder = tmp_path / name
        shutil.copytree(finished / "checkpoints" / "epoch_1", folder)
        config = folder / "config.json"
        before = {"n_layer": 2, "n_embd": 32, "n_inner": 64, "n_positions": 64}[name]
        text = config.read_text()
        assert f'"{name}": {before}' in text
        config.write_text(text.replace(f'"{name}": {before}', f'"{name}": {value}'))
        with pytest.raises(project.InputError):
            project.load_checkpoint(folder)


def test_the_checksum_in_the_record_is_that_of_sha256sum(finished):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    for folder in project.saved_epochs(finished / "checkpoints"):
        command = ["sha256sum", folder / "model.safetensors"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.split()[0] == read_run(finished / "checkpoints", folder.name[6:])[1]["weights_sha256"]


# --- Odd output and input


GENERATE = "--model checkpoints/epoch_2 --max-length 3 --prompt"


@pytest.mark.parametrize("script", ["gpt2_tinystories", "gpt2_generate"])
def test_output_that_nobody_reads_ends_the_program_quietly(script, finished, tiny):
    code, errors = run(finished, f"{GENERATE} Once" if "generate" in script else tiny, close_the_pipe, script=script)
    assert code == 1 and errors == ""


def close_the_pipe():
    """Make the output a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"))  # the one that is there remembers a place in a file


def test_a_terminal_that_shows_ascii_alone_and_a_prompt_that_is_no_text(finished):
    code, output = run(finished, f"{GENERATE} Zoë", show_ascii, script="gpt2_generate")
    assert code == 0 and "Zo?" in output
    code, output = run(finished, f"{GENERATE} {os.fsdecode(b'Zo' + bytes([255]))}", script="gpt2_generate")
    assert code == 2 and len(output.splitlines()) == 3  # the first two show the name of the checkpoint


def show_ascii():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def test_the_steps_of_an_epoch_are_not_done_again_for_its_evaluation(finished, tmp_path, monkeypatch, tiny):
    without_the_last_evaluation(finished, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(project, "update", None)
    project.main(tiny.split())
    assert read_run()[1]["epochs"][1]["step"] == 10
    same_runs(tmp_path, finished)
