"""The benchmarks run, in small; what they measure is not judged here."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "command, rows",
    [
        ("data_speed.py --stories 60 --tokenizer bpe:400", 2),
        ("generate_speed.py --tokenizer bpe:400 --max-length 5 --rounds 1", 2),
        ("train_speed.py --only ours --data sample --rounds 1 --steps 1 --batch-size 1 --device cpu --profile", 1),
        ("train_speed.py --data sample --rounds 1 --steps 1 --batch-size 1 --device cpu --only hf-default ours", 2),
    ],
)
def test_a_benchmark_prints_its_table(command, rows, tmp_path):
    pytest.importorskip("resource", reason="the benchmarks ask Unix how much memory a process has had")
    script, *arguments = command.split()
    if script.startswith("generate"):
        arguments += ["--device", "cpu"]
    ran = subprocess.run(
        [sys.executable, FOLDER / script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    _, *table = [line for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == rows
