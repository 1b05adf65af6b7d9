"""The README against the code: its table of settings, its commands, its files."""

import dataclasses
import re
import shlex
import typing
from pathlib import Path

import gpt2_generate
import gpt2_tinystories as project

ROOT = Path(project.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(settings_class):
    """The table as the README shows it."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(settings_class):
        default = " ".join(f.default) if isinstance(f.default, tuple) else str(f.default)
        choices = typing.get_args(f.type)
        meaning = f.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        rows.append(f"| `--{f.name.replace('_', '-')}` | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(rows)


def test_the_table_of_settings_is_that_of_the_code():
    assert table(project.Settings) in README, "the README should hold:\n" + table(project.Settings)


def commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_every_command_line_of_the_readme_can_be_parsed():
    parsed = 0
    for line in commands():
        for script, module in (("gpt2_tinystories.py", project), ("gpt2_generate.py", gpt2_generate)):
            if found := re.search(rf"(?:python|torchrun [\w -]+) {script}(.*?)(?:&&|#|$)", line):
                project.parse(module.Settings, "", shlex.split(found[1]))
                parsed += 1
    assert parsed >= 4


def test_the_files_that_the_readme_names_are_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / "".join(path)).exists(), path


def test_the_sections_of_the_script_are_those_that_the_readme_lists():
    sections = re.findall(r"^# --- ([\w ]+)", (ROOT / "gpt2_tinystories.py").read_text(encoding="utf-8"), flags=re.M)
    assert " → ".join(section.strip().lower() for section in sections) in README.lower()
