"""The script alone: its dependencies, its shape, and what it does with no other file beside it."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gpt2_tinystories as project
from sample_stories import sample_stories

ROOT = Path(project.__file__).parent
SIZES = "--fraction 1 --tokenizer bpe:300 --n-positions 64 --n-embd 16 --n-head 2 --n-inner 16 --max-steps 2"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def alone(tmp_path):
    """alone(arguments): the script run in a folder that holds nothing else but a file of stories."""
    shutil.copy(ROOT / "gpt2_tinystories.py", tmp_path)
    (tmp_path / "my.txt").write_text("<|endoftext|>".join(sample_stories(30)), encoding="utf-8")

    def run(arguments):
        command = [sys.executable, "gpt2_tinystories.py", *arguments.split()]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("name", ["gpt2_tinystories.py", "gpt2_generate.py"])
def test_the_dependencies_in_the_script_are_those_of_the_project(name):
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", read(name), flags=re.M)
    block = tomllib.loads("\n".join(line[2:] for line in block.splitlines()))
    assert block["dependencies"] == read("requirements.txt").split("\n")[:-1]
    target = tomllib.loads(read("pyproject.toml"))["tool"]["ruff"]["target-version"]
    assert block["requires-python"] == re.sub(r"py(\d)(\d+)", r">=\1.\2", target)


def test_the_oldest_packages_that_are_tested_are_the_oldest_that_are_allowed():
    lowest = dict(re.match(r"(\w+)>=([\d.]+),", line).groups() for line in read("requirements.txt").splitlines())
    tested = dict(re.findall(r"^(\w+)==([\d.]+)$", read("tests/oldest.txt"), flags=re.M))
    assert len(lowest) >= 5
    for name, version in lowest.items():
        assert tested[name] in (version, f"{version}.0")


def test_the_script_alone_trains_on_a_text_file(alone, tmp_path):
    done = alone(f"--data my.txt {SIZES}")
    assert done.returncode == 0, done.stderr
    assert "27 to train, 3 to test, of 30 from my.txt" in done.stdout
    assert (tmp_path / "checkpoints" / "epoch_1" / "model.safetensors").is_file()
    assert (tmp_path / "plots" / "training_metrics.png").is_file()


def test_the_script_alone_says_what_the_built_in_stories_need(alone):
    done = alone(f"--data sample {SIZES}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "sample_stories" in done.stderr


def functions():
    """(name, number of lines) of each function of the script, with its decorators."""
    for node in ast.walk(ast.parse(read("gpt2_tinystories.py"))):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, node.end_lineno - first + 1


def test_the_script_is_not_pressed_together():
    lines = read("gpt2_tinystories.py").splitlines()
    assert sum(not line.strip() for line in lines) >= 0.12 * len(lines)


def test_no_line_of_the_script_is_wide():
    assert not [line for line in read("gpt2_tinystories.py").splitlines() if len(line) > 100]


def test_no_function_of_the_script_is_long():
    assert not [(name, n) for name, n in functions() if n > (60 if name == "train" else 40)]
