"""Kill one run again and again, at random moments, and compare what it leaves with a run that nobody disturbed.

    python benchmarks/soak.py

The script itself is killed with SIGKILL, somewhere between its start and --longest seconds later, and started again.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import make_parser

import gpt2_tinystories as project

RUN = ("--data sample --tokenizer bpe:1024 --n-embd 128 --n-head 4 --n-inner 256 --epochs {} "
       "--save-every 0.02")


def start(folder, arguments):
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen([sys.executable, project.__file__, *arguments.split()], cwd=folder, stdout=output,
                                stderr=subprocess.STDOUT)


def finish(folder, arguments):
    if start(folder, arguments).wait():
        sys.exit(f"the run failed:\n{(folder / 'output.txt').read_text()}")


def result(folder, epochs):
    """(weights, figures of steps and epochs without their seconds, names of all files)"""
    newest = folder / "checkpoints" / f"epoch_{epochs}"
    record = json.loads((newest / "training.json").read_text())
    figures = [epoch | {"seconds": 0} for epoch in record["epochs"]]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    steps = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["metrics"][:, :4].tolist()
    return project.load_checkpoint(newest).state_dict(), (steps, figures), files


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=30, help="how many")
    parser.add_argument("--longest", type=float, default=14.0, help="most seconds from a start to its kill")
    parser.add_argument("--epochs", type=int, default=12, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    arguments, rng = RUN.format(options.epochs), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("unbroken", "killed")]
        for each in folders:
            each.mkdir()
        started = time.perf_counter()
        finish(folders[0], arguments)
        print(f"unbroken: {time.perf_counter() - started:.0f} s", flush=True)
        for number in range(1, options.kills + 1):
            process = start(folders[1], arguments)
            time.sleep(rng.uniform(0, options.longest))
            if process.poll() is not None:
                sys.exit(f"ended by itself before kill {number}:\n{(folders[1] / 'output.txt').read_text()}")
            process.kill()
            process.wait()
            last = folders[1] / "checkpoints" / "last.pt"
            step = torch.load(last)["record"]["step"] if last.exists() else 0
            print(f"kill {number}: saved up to step {step}", flush=True)
        finish(folders[1], arguments)
        unbroken, expected, expected_files = result(folders[0], options.epochs)
        weights, figures, files = result(folders[1], options.epochs)
    same = sum(weight.equal(unbroken[name]) for name, weight in weights.items())
    print(f"\n{options.kills} kills; {same} of {len(unbroken)} tensors equal, figures of all epochs "
          f"{'equal' if figures == expected else 'DIFFERENT'}, stray files: {sorted(files ^ expected_files) or 0}")
    if same < len(unbroken) or figures != expected or files != expected_files:
        sys.exit(1)


if __name__ == "__main__":
    project.run(main)
