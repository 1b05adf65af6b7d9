"""What a process of the tests does. This imports little, so that the environment can still be set."""

import importlib
import os
import signal
import sys


def save_no_picture(figure, path, **_):
    """In the place of matplotlib's Figure.savefig."""
    path.write_bytes(b"no picture")


def work(folder, script, arguments, environment, output, errors, prepare, values):
    """Run a script in a folder, with what it prints in files there; prepare(*values) is called before."""
    os.chdir(folder)
    if environment:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            del os.environ[name]
        os.environ |= environment
    for number, name in ((1, output), (2, errors)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [f"{script}.py", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without it
    importlib.import_module("matplotlib.figure").Figure.savefig = save_no_picture
    if prepare:
        prepare(*values)
    project = importlib.import_module("gpt2_tinystories")
    project.draw = lambda *_: importlib.import_module("matplotlib.figure").Figure()
    project.run(importlib.import_module(script).main)
