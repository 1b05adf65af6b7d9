"""What other people's machines and files are like."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from conftest import SIZES, read_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import gpt2_generate
import gpt2_tinystories as project
from sample_stories import sample_stories

pytestmark = pytest.mark.packages

STORIES = list(sample_stories(30))
END = "<|endoftext|>"
SHORT = f"--fraction 1 --tokenizer bpe:300 {SIZES} --max-steps 2"


def texts_of(data):
    return project.load_stories(str(data), Path("cache"))[0]["text"][:]


def train(data, arguments=SHORT):
    project.main(["--data", str(data), *arguments.split()])
    return read_run(epoch=1)


# --- Paths


def write_parquet(path, texts):
    with open(path, "wb") as file:
        pq.write_table(pa.table({"text": texts}), file)


def write(name):
    """The stories in every form under a name that is a pattern to some; returns the paths."""
    stories = datasets.Dataset.from_dict({"text": STORIES})
    stories.save_to_disk("folder")
    datasets.DatasetDict({"train": stories, "test": stories.select([0])}).save_to_disk("dict")
    os.makedirs(f"{name}/data")
    for number, part in enumerate((STORIES[:20], STORIES[20:])):
        write_parquet(Path(name, f"data/train-{number}-of-2.parquet"), part)
    write_parquet(Path(name, "data/test-0-of-1.parquet"), ["of the other split"])
    for number, split in enumerate(("train", "validation")):
        os.makedirs(f"{name} 3/default/{split}")
        write_parquet(f"{name} 3/default/{split}/0000.parquet", (STORIES, ["of the other split"])[number])
    Path(f"{name}.txt").write_text(END.join(STORIES), encoding="utf-8")
    Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    write_parquet(f"{name}.parquet", STORIES)
    os.rename("folder", f"{name} 1")
    os.rename("dict", f"{name} 2")
    return [name + end for end in ("", ".txt", ".jsonl", ".parquet", " 1", " 2", " 3")]


@pytest.mark.parametrize("name", ["story[1]", "a*", "b?", "a::b", "{x,y}", "100%", "**", "~", "$HOME"])
def test_a_path_is_a_path(name, workspace):
    for decoy in ("story1", "ab", "bx", "x"):
        Path(f"{decoy}.jsonl").write_text('{"text": "WRONG FILE"}\n')
        Path(f"{decoy}.txt").write_text("WRONG FILE")
        pq.write_table(pa.table({"text": ["WRONG FILE"]}), f"{decoy}.parquet")
    for path in write(name):
        assert texts_of(path) == STORIES, path


def test_every_folder_may_have_any_name(workspace, monkeypatch):
    folder = workspace / "[old] a::b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    project.main([*f"--data s.jsonl {SHORT}".split(), "--checkpoints", "c::*[d]", "--plots", "p?::q"])
    assert (folder / "p?::q" / "training_metrics.csv").is_file()
    project.load_checkpoint("c::*[d]/epoch_1")


def test_the_stories_decide_whether_a_run_goes_on_and_not_their_path(workspace, capsys):
    Path("s.txt").write_text(END.join(STORIES))
    train("s.txt")
    for path in ("./s.txt", workspace / "s.txt", shutil.copy("s.txt", "copy.txt")):
        train(path)
        assert "finished" in capsys.readouterr().out


# --- Columns and types


def test_a_saved_format_and_other_columns_do_not_matter(workspace):
    stories = datasets.Dataset.from_dict({"text": STORIES, "n": range(30), "what": [{"a": [1]}] * 30})
    stories.with_format("torch", columns=["n"]).save_to_disk("torch")
    stories.with_format("arrow").save_to_disk("arrow")
    datasets.DatasetDict({"train": stories.with_format("numpy", columns=["n"])}).save_to_disk("dict")
    shutil.copytree("arrow", "tensorflow")
    state = json.loads(Path("tensorflow/state.json").read_text())
    Path("tensorflow/state.json").write_text(json.dumps(state | {"_format_type": "tensorflow"}))
    for folder in ("torch", "arrow", "dict", "tensorflow"):
        loaded, _ = project.load_stories(folder, Path("cache"))
        assert loaded["text"][:] == STORIES and loaded.column_names == ["text"]
    train("torch")


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_string_is_one(kind, workspace):
    kind = pa.dictionary(pa.int32(), pa.string()) if kind == "dictionary" else getattr(pa, kind)()
    try:
        pq.write_table(pa.table({"text": pa.array([*STORIES, None], kind)}), "s.parquet")
    except pa.ArrowNotImplementedError:
        assert kind == pa.string_view()
        pytest.skip("this pyarrow cannot write it")
    assert texts_of("s.parquet") == [*STORIES, None]


def test_another_column_may_change_its_type(workspace):
    rows = [{"text": text, "x": None} for text in STORIES] * 2000 + [{"x": "a", "text": "last"}, {"x": 1, "text": None}]
    Path("s.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert texts_of("s.jsonl")[-3:] == [STORIES[-1], "last", None]


# --- Marks at the ends of stories


@pytest.mark.parametrize(
    "text, story",
    [
        (f"A cat. {END}\n", "A cat."),
        (f"{END}{END} A cat. {END} \n {END}", "A cat."),
        ("\ufeffA cat.", "A cat."),
        (f" \ufeff{END}\ufeff\ufeff", ""),
        (f"A {END} cat.\ufeff \ufeff", f"A {END} cat."),
        ("\ufeff", ""),
    ],
)
def test_marks_at_the_ends_are_not_part_of_a_story(text, story):
    assert project.clean(text) == story


def test_stories_with_marks_are_duplicates_of_those_without(workspace):
    marked = [f"\ufeff{STORIES[0]}", f"{STORIES[1]}\n{END}", f"{END}", f"A {END} b."]
    Path("s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES + marked))
    _, record = train("s.jsonl")
    assert record["data"]["duplicates"] == 2 and record["data"]["empty"] == 1
    assert record["data"]["train_stories"] + record["data"]["test_stories"] == 31


def test_joined_files_with_byte_order_marks(workspace):
    Path("s.txt").write_text(END.join(f"\ufeff{text}" for text in [*STORIES, STORIES[0]]), encoding="utf-8")
    _, record = train("s.txt")
    assert record["data"]["duplicates"] == 1 and record["data"]["empty"] == 0
    assert record["data"]["train_stories"] + record["data"]["test_stories"] == 30


# --- Tokenizers


def test_ids_may_have_holes(workspace, tokenizer):
    tokenizer.save_pretrained("gap")
    content = json.loads(Path("gap/tokenizer.json").read_text())
    token = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][token] = 1009
    Path("gap/tokenizer.json").write_text(json.dumps(content))
    Path("s.txt").write_text(END.join(STORIES))
    model, _ = train("s.txt", SHORT.replace("bpe:300", "gap"))
    assert model.config.vocab_size == 1010
    text = model.tokenizer.decode([1009]) * 2
    assert 1009 in project.encode(model.tokenizer, text) and project.generate_text(model, text, 5).startswith(text)


@pytest.fixture
def letters(workspace):
    """A folder with a tokenizer that drops what is no letter."""
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate([END, *map(chr, range(97, 123))])}, [])
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), eos_token=END).save_pretrained("letters")
    return "letters"


def test_a_story_or_prompt_without_tokens(letters, refused, monkeypatch, capsys):
    monkeypatch.setattr(project, "check_tokenizer", lambda *_: None)  # which looks at some stories alone
    rows = STORIES + ["🙂🙂", "123", "🙂 4"]
    Path("s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    _, record = train("s.jsonl", SHORT.replace("bpe:300", letters))
    assert record["data"]["empty"] == 3 and record["data"]["train_stories"] + record["data"]["test_stories"] == 30
    arguments = "--model checkpoints/epoch_1 --max-length 3"
    assert "has 0 tokens" in refused(gpt2_generate.main, f"{arguments} --prompt 🙂")
    typed = iter(["🙂", "one day", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    gpt2_generate.main(f"{arguments} --interactive".split())
    shown = capsys.readouterr().out
    assert "has 0 tokens" in shown and "oneday" in shown.replace(" ", "")
    Path("none.jsonl").write_text("".join(json.dumps({"text": f"🙂 {i}"}) + "\n" for i in range(30)))
    arguments = f"--data none.jsonl {SHORT} --overwrite".replace("bpe:300", letters)
    assert "--tokenizer letters" in refused(project.main, arguments)


def test_a_checkpoint_without_its_tokenizer_says_what_is_missing(finished, tmp_path, refused):
    folder = shutil.copytree(finished / "checkpoints/epoch_2", tmp_path / "epoch_2")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    line = refused(gpt2_generate.main, ["--model", str(folder)])
    assert "tokenizer.json, are missing" in line and "copy them" in line


# --- Long stories


def test_of_a_very_long_story_no_more_is_tokenised_than_is_kept(tokenizer, tmp_path, monkeypatch):
    tokenize, longest = project.tokenize, []
    whole = [" ".join(STORIES * n) for n in (40, 1, 80)] + ["A cat."]
    expected = [ids + [tokenizer.eos_token_id] for ids in project.encode(tokenizer, whole)]

    def noted(tokenizer, texts):
        longest.append(max(map(len, texts)))
        return tokenize(tokenizer, texts)

    monkeypatch.setattr(project, "tokenize", noted)
    stories = datasets.Dataset.from_dict({"text": whole})
    ids, _, _, n_cut = project.encode_stories(stories, tokenizer, 64, tmp_path / "tokens.arrow")
    assert max(longest) == 10_000 < len(whole[1])
    assert [story.as_py() for story in ids] == [story[:65] for story in expected]
    assert n_cut == sum(len(story) > 65 for story in expected) == 3


def test_the_stories_that_are_cut_are_counted(workspace, capsys):
    texts = [f"{i} {STORIES[i]}" for i in range(16)] + [f"{i} cats." for i in range(14)]
    Path("s.txt").write_text(END.join(texts))
    _, record = train("s.txt", SHORT.replace("--n-positions 64", "--n-positions 32"))
    assert record["data"]["stories_cut"] == 16
    assert "; 16 stories were cut (--n-positions 32)" in capsys.readouterr().out


# --- File systems and environment


def test_a_folder_that_cannot_be_flushed_is_no_failure(workspace, monkeypatch):
    fsync = os.fsync

    def without_folders(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "fsync", without_folders)
    Path("s.txt").write_text(END.join(STORIES))
    train("s.txt")


def test_a_full_disk_is_no_reason_for_other_stories(workspace, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    monkeypatch.setattr(project, "hub_answers", lambda: True)
    with pytest.raises(OSError, match="No space left"):
        project.load_stories("auto", Path("cache"))


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO, errno.EPERM])
def test_a_folder_that_cannot_be_locked_is_said_and_used(number, workspace, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def no_lock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    Path("s.txt").write_text(END.join(STORIES))
    train("s.txt")
    shown = capsys.readouterr().out
    assert shown.count("warning") == 2  # of two folders
    for folder in ("checkpoints", "plots"):
        assert f"a second run in {folder} would not be noticed: {os.strerror(number)}" in shown


@pytest.mark.parametrize("backend", ["module://not.installed", "nonsense"])
def test_no_backend_of_matplotlib_that_the_environment_names_stops_a_plot(backend, tmp_path):
    code = (
        "import numpy, pathlib, gpt2_tinystories as project\n"
        "epoch = {'epoch': 1, 'step': 2, 'tokens': 9} | {f'{part}_{name}': 0.5 for part in ('train', 'test')"
        " for name in ('loss', 'accuracy', 'perplexity', 'bits_per_byte')}\n"
        "record = {'n_steps': 2, 'steps_per_epoch': 2, 'parameters': 1, 'epochs': [epoch]}\n"
        "record |= {'data': {'train_stories': 1, 'test_stories': 1, 'source': 's'}, 'settings': {'grad_clip': 1}}\n"
        "record['settings'] |= {'learning_rate': 1, 'warmup_steps': 0}\n"
        "record['test_part_stories'] = 1\n"
        "points = project.curve_points(record, numpy.ones((2, len(project.COLUMNS))))\n"
        "project.write_plots(pathlib.Path('plots'), record, points)\n"
    )
    environment = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(Path(project.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plots/training_metrics.png").read_bytes()[:4] == b"\x89PNG"


# --- Writing


@pytest.mark.parametrize("temperature", [1e-38, 1e-300])
def test_the_limit_of_a_cold_temperature_is_greedy_text(temperature, model):
    greedy = project.generate_text(model, "One day", 20)
    assert project.generate_text(model, "One day", 20, "sample", temperature=temperature, seed=1) == greedy


def test_new_lines_can_be_typed(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    seen = []

    def noted(model, prompt, **options):
        seen.append(prompt)

    monkeypatch.setattr(gpt2_generate, "generate_text", noted)
    gpt2_generate.main(["--model", "checkpoints/epoch_2", "--prompt", r"A cat.\nIt ran", "--prompt=-x"])
    assert seen == ["A cat.\nIt ran", "-x"]
    with pytest.raises(SystemExit):
        gpt2_generate.main(["--help"])
    assert "--prompt=-x" in capsys.readouterr().out


# --- Anything


def ends(data, arguments=SHORT):
    """Train on it: this ends well, or with one line and exit code 2."""
    shutil.rmtree("checkpoints", ignore_errors=True)
    try:
        project.main(["--data", data, *arguments.split()])
        assert np.isfinite(read_run(epoch=1)[1]["epochs"][0]["test_loss"])
    except project.InputError as error:
        assert str(error).startswith("--")


LIMITS = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
ODD = ["", END, "\ufeff", "\0", " \n", "\ud800", "A cat."]
ANY_TEXT = st.text(st.characters(codec=None), max_size=40) | st.sampled_from(ODD)
ANY_PART = ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))


@given(rows=st.lists(st.none() | ANY_TEXT, max_size=12))
@LIMITS
def test_any_rows(rows, workspace):
    Path("s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    ends("s.jsonl")


@given(content=st.binary(max_size=200) | st.lists(ANY_PART).map(END.encode().join))
@LIMITS
def test_any_bytes_as_a_text_file(content, workspace):
    Path("s.txt").write_bytes(content)
    ends("s.txt")


@given(prompt=ANY_TEXT)
@settings(LIMITS, max_examples=100)
def test_any_prompt(prompt, model):
    try:
        text = project.generate_text(model, prompt, 3)
        assert text.startswith(prompt) and torch.is_grad_enabled()
    except project.InputError as error:
        assert "--prompt" in str(error)
