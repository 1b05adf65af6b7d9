"""Accidents: a run that is killed again and again, the same with two processes, and checkpoints that are damaged.

    python benchmarks/soak.py
    python benchmarks/soak.py --kills 30 --torchrun-kills 5 --damages 100

The script is killed with SIGKILL somewhere between its start and --longest seconds later, and started again; before one
start in four its tokens are removed, so that some kills meet the tokenising. Whenever the run has come to its end, what
it leaves is compared with an undisturbed run, and another one begins. With torchrun all processes are killed at once.
Then a file of a checkpoint, or last.pt, is damaged: a bit turned, a block of zeros, cut off, emptied, removed, or put
there from another epoch. It has to be refused with one line, or the weights to be read as they were.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from common import make_parser

import gpt2_tinystories as project
from sample_stories import sample_stories

RUN = ("--data stories.txt --fraction 1 --tokenizer bpe:1024 --n-positions 128 --n-embd 128 --n-head 4 --n-inner 256 "
       "--save-every 0.01 --device cpu --epochs")

# --- Kills -----------------------------------------------------------------------------------------------------------


def start(folder, epochs, n_processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    command = [sys.executable, *(torchrun if n_processes > 1 else []), project.__file__, *RUN.split(), str(epochs)]
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)


def kill(process):
    """Kill a process and all that it has started, which are stopped first, so that none starts another meanwhile."""
    everyone = [process.pid]
    for pid in everyone:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGSTOP)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                everyone += [int(child) for child in children.read_text().split()]
    for pid in everyone:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2 * (len(everyone) > 1))  # until the system has taken the locks of the others away


def finish(process, folder):
    if process.wait():
        sys.exit(f"the run failed:\n{(folder / 'output.txt').read_text()}")


def result(folder):
    """What has to be the same: the checksums of all epochs' files, their training.json and last.pt without seconds, and
    the names of all files."""

    def without_seconds(record):
        return record | {"epochs": [epoch | {"seconds": 0} for epoch in record["epochs"]]}

    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    last["metrics"][:, project.SECONDS] = 0
    last["record"] = without_seconds(last["record"])
    files = [file for epoch in project.saved_epochs(folder / "checkpoints") for file in sorted(epoch.iterdir())]
    sums = [project.sha256(file) for file in files if file.name != "training.json"]
    records = [without_seconds(json.loads(file.read_text())) for file in files if file.name == "training.json"]
    return sums, records, last, {str(path.relative_to(folder)) for path in folder.rglob("*")}


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def moment(folder, started):
    """What a run that began at the time started was doing when it was killed."""
    output, last = (folder / "output.txt").read_text(), folder / "checkpoints" / "last.pt"
    being_written = [path for path in folder.rglob("*.tmp") if path.stat().st_mtime > started]
    if any(path.parent.name == "data" for path in being_written):
        return "preparing the stories"
    if being_written:
        return "saving"
    if "model  " not in output:
        return "starting"
    record = torch.load(last, weights_only=True)["record"] if last.exists() else None
    return "evaluating" if record and record["step"] == project.end_of_epoch(record) else "training"


def soak(folder, n_kills, n_processes, options, rng):
    """Kill a run n_kills times. Returns the folder of the undisturbed one."""
    folders = [folder / f"{name} {n_processes}" for name in ("unbroken", "killed")]
    for each in folders:
        each.mkdir()
    unbroken, killed = folders
    (unbroken / "stories.txt").write_text("<|endoftext|>".join(sample_stories(400)), encoding="utf-8")
    shutil.copy2(unbroken / "stories.txt", killed)  # with its time, which is in the name of a file
    started = time.perf_counter()
    finish(start(unbroken, options.epochs, n_processes), unbroken)
    print(f"{n_processes} x unbroken: {time.perf_counter() - started:.0f} s", flush=True)
    expected, moments, n_done, n_continued = result(unbroken), Counter(), 0, 0
    while moments.total() < n_kills or n_done == 0 or (killed / "checkpoints").exists():
        if rng.random() < 0.25:
            shutil.rmtree(killed / "checkpoints" / "data", ignore_errors=True)
        started, is_saved = time.time(), (killed / "checkpoints" / "last.pt").exists()
        process = start(killed, options.epochs, n_processes)
        try:
            process.wait(rng.uniform(0, options.longest * n_processes) if moments.total() < n_kills else None)
        except subprocess.TimeoutExpired:
            kill(process)
            moments[moment(killed, started)] += 1
            print(f"{n_processes} x kill {moments.total()}: {moments.most_common()}", flush=True)
        output = (killed / "output.txt").read_text()
        if "model  " in output and is_saved != ("continuing the interrupted run" in output):
            sys.exit(f"the run in {killed} has not gone on from its last.pt:\n{output}")
        n_continued += is_saved and "model  " in output
        if process.returncode == -signal.SIGKILL:
            continue
        finish(process, killed)
        n_done += 1
        if not same(expected, result(killed)):
            sys.exit(f"{killed} has other weights, figures or files than {unbroken}")
        for name in ("checkpoints", "plots"):
            shutil.rmtree(killed / name)
    print(f"{n_processes} x {n_kills} kills of {n_done} runs ({', '.join(f'{n} {m}' for m, n in moments.items())}), "
          f"{n_continued} starts went on from a save: all files of all epochs equal, and no others there", flush=True)
    if "training" not in moments:
        sys.exit("none of the kills met the training: take a larger --longest")
    return unbroken


# --- Damages ---------------------------------------------------------------------------------------------------------


def turn_a_bit(content, rng):
    content = bytearray(content)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def zero_a_block(content, rng):
    first = rng.randrange(len(content))
    return content[:first] + bytes(len(content[first : first + 512])) + content[first + 512 :]


DAMAGES = {"a bit turned": turn_a_bit, "a block of zeros": zero_a_block, "emptied": lambda content, rng: b"",
           "cut off": lambda content, rng: content[: rng.randrange(len(content))]}


def damage(file, other, rng):
    """Damage a file; other is the same one of another epoch. Returns what was done."""
    kinds = [*DAMAGES, "removed", *(["swapped"] if other.exists() else [])]
    kind, content = rng.choice(kinds), file.read_bytes()
    if kind == "removed":
        file.unlink()
    else:
        file.write_bytes(other.read_bytes() if kind == "swapped" else DAMAGES[kind](content, rng))
    return kind


def read(checkpoints, name):
    """All that is in last.pt, or the weights of an epoch: its other files may be edited."""
    if name == "last.pt":
        return project.read_last(checkpoints)
    return project.load_checkpoint(checkpoints / name).state_dict()


def damage_again_and_again(checkpoints, n_damages, rng):
    """Each of n_damages to a checkpoint, one after the other, has to be refused, or to leave the weights alone."""
    outcomes, n_epochs = Counter(), len(project.saved_epochs(checkpoints))
    expected = {name: read(checkpoints, name) for name in (f"epoch_{n_epochs}", "last.pt")}
    files = [checkpoints / "last.pt", *sorted((checkpoints / f"epoch_{n_epochs}").iterdir())]
    for _ in range(n_damages):
        file = rng.choice(files)
        name = file.relative_to(checkpoints).parts[0]
        content = file.read_bytes()
        what = f"{file.name}: {damage(file, checkpoints / 'epoch_1' / file.name, rng)}"
        try:
            outcome = "equal" if same(read(checkpoints, name), expected[name]) else "DIFFERENT"
        except project.InputError as error:
            outcome = "refused" if str(error).strip() else "refused without a word"
        file.write_bytes(content)
        outcomes[outcome] += 1
        if outcome not in ("refused", "equal"):
            sys.exit(f"{what}: {outcome}")
    print(f"{n_damages} damages: {dict(outcomes)}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of one process")
    parser.add_argument("--torchrun-kills", type=int, default=20, help="of two processes")
    parser.add_argument("--damages", type=int, default=1000, help="of checkpoints")
    parser.add_argument("--longest", type=float, default=10.0, help="most seconds from a start to its kill, a process")
    parser.add_argument("--epochs", type=int, default=6, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and damages")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))  # which stays there if something goes wrong
    unbroken = soak(folder, options.kills, 1, options, rng)
    damage_again_and_again(unbroken / "checkpoints", options.damages, rng)
    if options.torchrun_kills:
        soak(folder, options.torchrun_kills, 2, options, rng)
    shutil.rmtree(folder)


if __name__ == "__main__":
    project.run(main)
