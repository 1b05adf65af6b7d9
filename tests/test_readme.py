"""The README against the code: its table of settings, its commands, its files."""

import dataclasses
import re
import shlex
from pathlib import Path

import gpt2_generate
import gpt2_tinystories as project

ROOT = Path(project.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = (ROOT / "docs" / "elsewhere.md").read_text(encoding="utf-8")


def row(f):
    """A field of the settings as a row of the README's table."""
    return f"| `--{f.name.replace('_', '-')}` | `{f.default}` | {f.metadata['help']} |"


def test_the_ten_settings_are_those_of_the_code():
    section = README.split("\n## Settings\n")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| `--")]
    assert len(shown) == 10
    assert set(shown) <= {row(f) for f in dataclasses.fields(project.Settings)}


def commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README + ELSEWHERE, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_every_command_line_of_the_readme_can_be_parsed():
    parsed = 0
    for line in commands():
        for script, module in (("gpt2_tinystories.py", project), ("gpt2_generate.py", gpt2_generate)):
            if found := re.search(rf"(?:python|(?:torchrun|distributed.run) [\w -]+) {script}(.*?)(?:&&|#|$)", line):
                project.parse(module.Settings, "", shlex.split(found[1]))
                parsed += 1
    assert parsed >= 4


def test_the_files_that_the_readme_names_are_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / "".join(path)).exists(), path


def test_the_functions_to_change_are_there():
    """The table "Change it" names functions of the script, and files of the tests."""
    section = README.split("\n## Change it\n")[1].split("\n## ")[0]
    names = re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)*)`", section)
    assert len(names) > 20
    for name in names:
        if name.endswith(".py"):
            assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
        elif name not in ("wte", "wpe", "lm_head", "main"):
            found = project
            for part in name.split("."):
                found = getattr(found, part)


def test_the_sections_of_the_script_are_those_that_the_readme_lists():
    sections = re.findall(r"^# --- ([\w ]+)", (ROOT / "gpt2_tinystories.py").read_text(encoding="utf-8"), flags=re.M)
    assert " → ".join(section.strip().lower() for section in sections) in README.lower()
