"""Settings: one declaration, its flags, and the refusal of contradictions."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpt2_generate
import gpt2_tinystories as project

pytestmark = pytest.mark.packages

ROOT = Path(project.__file__).parent


@pytest.mark.parametrize("module", [project, gpt2_generate])
def test_help_shows_the_description_and_every_flag_with_its_default(module, capsys):
    with pytest.raises(SystemExit) as stop:
        project.parse(module.Settings, module.__doc__, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert module.__doc__.strip() in shown
    words = " ".join(shown.split())
    for field in dataclasses.fields(module.Settings):
        assert f"--{field.name.replace('_', '-')} " in words
        assert field.metadata["help"] in words
        if not isinstance(field.default, tuple):
            assert f"{field.metadata['help']} (default: {field.default})" in words


def test_flags_fill_the_settings_with_their_types():
    settings = project.parse(
        project.Settings, "", ["--n-embd", "96", "--learning-rate", "1e-3", "--overwrite", "--data", "x.txt"]
    )
    assert (settings.n_embd, settings.learning_rate, settings.overwrite, settings.data) == (96, 1e-3, True, "x.txt")
    assert project.parse(project.Settings, "", []) == project.Settings()
    repeated = project.parse(gpt2_generate.Settings, "", ["--prompt", "A", "--prompt", "B"])
    assert repeated.prompt == ["A", "B"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--n-embd 100 --n-head 12", "--n-embd 100"),
        ("--n-embd 7 --n-head 7", "--n-embd 7"),
        ("--n-head 0", "--n-head 0"),
        ("--n-layer -1", "--n-layer -1"),
        ("--n-positions 1", "--n-positions 1"),
        ("--fraction 0", "--fraction 0"),
        ("--fraction 1.5", "--fraction 1.5"),
        ("--fraction nan", "--fraction nan"),
        ("--test-fraction 1", "--test-fraction 1"),
        ("--dropout 1", "--dropout 1"),
        ("--epochs 0", "--epochs 0"),
        ("--batch-size 0", "--batch-size 0"),
        ("--accum-steps 0", "--accum-steps 0"),
        ("--learning-rate 0", "--learning-rate 0"),
        ("--learning-rate inf", "--learning-rate inf"),
        ("--grad-clip -1", "--grad-clip -1"),
        ("--seed -1", "--seed -1"),
        ("--max-steps -5", "--max-steps -5"),
        ("--epochs five", "--epochs"),
        ("--device tpu", "--device"),
        ("--precision int8", "--precision"),
        ("--precision fp16 --device cpu", "--precision fp16"),
        ("--lr 1e-3", "--lr"),
        ("--epoch 3", "--epoch"),
        ("train", "train"),
    ],
)
def test_a_bad_flag_is_refused_by_name_before_anything_is_read(arguments, named, workspace, refused):
    line = refused(project.main, arguments)
    assert named in line
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize("name", sorted(project.NOT_WITH_INIT))
def test_what_the_model_of_init_brings_is_refused_also_where_it_is_the_default(name, workspace, refused):
    """The default of --n-layer is 2, that of gpt2 12: to pass it over would train another model than was asked for."""
    name, default = "--" + name.replace("_", "-"), getattr(project.Settings, name)
    assert f"{name} {default}: " in refused(project.main, f"--init gpt2 {name} {default}")
    assert list(workspace.iterdir()) == []


def test_an_empty_prompt_is_refused(workspace, refused):
    assert "--prompt" in refused(project.main, ["--prompt", " "])


def test_a_device_that_is_not_there_is_refused(workspace, refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "--device cuda" in refused(project.main, "--device cuda")


def test_the_script_itself_ends_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, ROOT / "gpt2_tinystories.py", "--n-head", "5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gpt2_tinystories.py: --n-embd 768: must be even, and a multiple of --n-head 5\n"


def test_importing_is_light_and_trains_nothing(tmp_path):
    code = (
        "import sys, gpt2_tinystories, gpt2_generate\n"
        "print([name for name in ('transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("has_instructions", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_cpu_computes_in_bf16_only_where_it_has_instructions_for_it(has_instructions, precision, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_instructions)
    assert project.pick_device("cpu", "auto") == ("cpu", precision)
    assert project.pick_device("cpu", "bf16") == ("cpu", "bf16")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert project.pick_device("mps", "auto") == ("mps", "fp32")


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif("[madvise]" not in (HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""), reason="no huge pages")
@pytest.mark.parametrize(("precision", "chosen", "is_huge"), [("bf16", None, True), ("fp32", None, False),
                                                              ("bf16", "0", False)])  # fmt: skip
def test_products_in_bf16_have_huge_pages(precision, chosen, is_huge, tmp_path):
    """They are faster with them, those in fp32 slower. What the user has chosen stays."""
    code = (
        "import gpt2_tinystories as project, torch\n"
        "def start_processes(device):\n"
        "    weights = torch.ones(1 << 24)\n"
        "    lines = [line.split() for line in open('/proc/self/smaps')]\n"
        "    raise SystemExit(sum(int(line[1]) for line in lines if line[0] == 'AnonHugePages:') > 30_000)\n"
        "project.start_processes = start_processes\n"
        f"project.main(['--device', 'cpu', '--precision', '{precision}'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"THP_MEM_ALLOC_ENABLE": chosen} if chosen else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == is_huge, done.stdout + done.stderr  # 30,000 kB of 64 MB


def test_a_gpu_that_is_listed_but_cannot_be_used_is_not_taken(monkeypatch, capsys, refused):
    """The driver lists it, and is too old for PyTorch."""
    text = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver"

    def fail(*_, **__):
        raise RuntimeError(text)

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", fail)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert project.pick_device("auto", "auto") == ("cpu", "fp32")
    first = text.splitlines()[0]
    assert capsys.readouterr().out == f"warning    the GPU is not used: {first}\n"
    assert project.pick_device("cpu", "auto") == ("cpu", "fp32") and capsys.readouterr().out == ""
    wrong = f"gpt2_tinystories.py: --device cuda: {first}; use cpu"
    assert refused(project.main, "--device cuda").partition(": ")[2] == wrong.partition(": ")[2]
    # A GPU that another program uses is no reason to train on the CPU for days.
    for text in ("CUDA error: out of memory", "CUDA error: all CUDA-capable devices are busy or unavailable"):
        assert f"--device cuda: {text}; use cpu" in refused(project.main, "--device auto")
    # Of several processes one alone must not take the CPU, and it says why itself.
    text = "The NVIDIA driver is too old"
    monkeypatch.setattr(project, "WORLD_SIZE", 2)
    monkeypatch.setattr(project, "RANK", 1)
    with pytest.raises(project.InputError, match="too old"):
        project.pick_device("auto", "auto")
    assert capsys.readouterr().err == f"process 1: {text}\n"
    # The last look is a computation: a GPU that PyTorch was not built for is listed, and can be chosen.
    text = "CUDA error: no kernel image is available for execution on the device"
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.ones", fail)
    assert project.problem_of_gpu() == text


def test_the_names_of_settings_that_are_listed_are_settings():
    names = {field.name for field in dataclasses.fields(project.Settings)}
    assert names >= project.NOT_WITH_INIT and names >= project.MAY_CHANGE


def test_a_choice_that_is_none_is_refused_in_python_too():
    with pytest.raises(project.InputError, match="--compile On: must be one of auto, on, off"):
        project.Settings(compile="On")
