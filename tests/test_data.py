"""From stories to batches: reading, splitting, tokenising, batching, padding."""

import http.server
import socket
import threading

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, read_run, train
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2_tinystories as project
from sample_stories import sample_stories

pytestmark = pytest.mark.packages

STORIES = list(sample_stories(20))


def write_forms(folder):
    """The same stories in every form that --data reads; returns the paths."""
    stories = datasets.Dataset.from_dict({"text": STORIES})
    stories.save_to_disk(folder / "dataset")
    datasets.DatasetDict({"validation": stories.select([0]), "train": stories}).save_to_disk(folder / "dict")
    stories.to_json(folder / "stories.jsonl")
    stories.to_parquet(folder / "stories.parquet")
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES), encoding="utf-8")
    return ["dataset", "dict", "stories.jsonl", "stories.parquet", "stories.txt"]


def test_every_form_of_data_gives_the_same_stories(workspace):
    for form in write_forms(workspace):
        stories, source = project.load_stories(form, workspace / "cache")
        assert [text.strip() for text in stories["text"]] == STORIES, form
        assert source == form


def test_the_local_folder_comes_first(workspace, monkeypatch):
    datasets.Dataset.from_dict({"text": STORIES}).save_to_disk("tinystories_local")
    monkeypatch.setattr(project, "hub_answers", lambda: pytest.fail("the network was asked"))
    stories, source = project.load_stories("auto", workspace / "cache")
    assert list(stories["text"]) == STORIES and source == "tinystories_local"


def test_a_text_file_may_have_a_separator_anywhere(workspace, monkeypatch):
    text = "<|endoftext|>".join(["a" * 7, "b" * 30, "", "é🙂" * 5, "c"])
    path = workspace / "stories.txt"
    path.write_text(text, encoding="utf-8")
    read = open

    class OneAtATime:
        """A file that gives three characters, however many are asked for."""

        def __init__(self, *args, **options):
            self.file = read(*args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            return self.file.read(3)

    monkeypatch.setattr("builtins.open", OneAtATime)
    assert "<|endoftext|>".join(project.read_text(path)) == text


def test_a_changed_text_file_is_read_again(workspace):
    path = workspace / "stories.txt"
    for words in ("one<|endoftext|>two", "three<|endoftext|>four!"):
        path.write_text(words)
        stories, _ = project.load_stories("stories.txt", workspace / "cache")
        assert "<|endoftext|>".join(stories["text"]) == words


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "no such file"),
        ("./missing/folder/of/stories", None, "no such file"),
        ("somebody/missing-dataset", None, "cannot be reached"),
        ("stories.csv", "text\nhello\n", "its format is not known; it must be a save_to_disk folder"),
        ("latin.txt", "caf\xe9<|endoftext|>b".encode("latin-1"), "'utf-8' codec can't decode"),
        ("empty.txt", "", "0 stories, of which --fraction 1.0 leaves 0: too few (a .txt needs"),
        ("one.txt", "Only one story.<|endoftext|>\n", "1 stories, of which --fraction 1.0 leaves 1: too few"),
        ("blank.txt", " \n<|endoftext|>\n<|endoftext|> ", "too few"),
        ("broken.jsonl", '{"text": "a"}\n\n{"text": ', "cannot be read: line 3: Expecting value; it must be"),
        ("numbers.jsonl", '{"text": 1}\n{"text": 2}\n', "line 1: no string `text` in it; it must be"),
        ("mixed.jsonl", '{"text": "a"}\n{"text": {"b": 2}}\n', "with strings in a column `text`"),
        ("other.jsonl", '{"story": "a"}\n{"story": "b"}\n', "read: line 1: no string `text` in it; it must be"),
        ("list.jsonl", '{"text": "a"}\n["text"]\n', "read: line 2: no string `text` in it; it must be"),
        ("deep.jsonl", '{"text": "a"}\n' + "[" * 100_000, "cannot be read: "),
        ("digits.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}", "cannot be read: "),
        ("broken.parquet", b"PAR1 this is not parquet", "cannot be read"),
    ],
)
def test_bad_data_is_refused_in_one_line(name, content, words, workspace, refused):
    if content is not None:
        (workspace / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(project.main, ["--data", name, "--fraction", "1"])
    assert name in line and words in line


def test_a_broken_data_folder_is_refused_in_one_line(workspace, refused):
    datasets.Dataset.from_dict({"text": STORIES}).save_to_disk("whole")
    arrow = (workspace / "whole" / "data-00000-of-00001.arrow").read_bytes()
    (workspace / "empty").mkdir()
    for name, files in {
        "no_arrow": {"state.json": None, "dataset_info.json": None},
        "no_state": {"data-00000-of-00001.arrow": arrow},
        "cut": {"state.json": None, "dataset_info.json": None, "data-00000-of-00001.arrow": arrow[: len(arrow) // 2]},
        "bad_json": {"state.json": b"{", "dataset_info.json": b"{", "data-00000-of-00001.arrow": arrow},
    }.items():
        (workspace / name).mkdir()
        for file, content in files.items():
            content = (workspace / "whole" / file).read_bytes() if content is None else content
            (workspace / name / file).write_bytes(content)
    for name in ("empty", "no_arrow", "no_state", "cut", "bad_json"):
        assert f"--data {name}: " in refused(project.main, ["--data", name])
    datasets.Dataset.from_dict({"story": STORIES}).to_parquet("other.parquet")
    line = refused(project.main, "--data other.parquet")
    assert "--data other.parquet: cannot be read: " in line and "text" in line.partition("; it must be")[0]
    (workspace / "folders" / "part.parquet").mkdir(parents=True)
    assert "no stories of a split `train` in its files ()" in refused(project.main, "--data folders")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": STORIES})}).save_to_disk("no_train")
    line = refused(project.main, "--data no_train")
    assert "no stories of a split `train` in its files (dataset_dict.json, test/data-" in line


def test_a_saved_story_that_is_no_text_is_refused_in_one_line(workspace, refused):
    datasets.Dataset.from_dict({"text": [f"Story {i} of a cat." for i in range(20)]}).save_to_disk("saved")
    (file,) = (workspace / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"Story 7", b"Stor\xff 7"))
    assert "--data saved: cannot be read: 'utf-8' codec" in refused(project.main, "--data saved --fraction 1")


def test_empty_stories_and_duplicates_are_dropped_and_counted():
    texts = ["a", "b ", " b", "", None, "  \n", "a", "c", "d"]
    stories = datasets.Dataset.from_dict({"text": texts})
    train, test, counts = project.split_stories(stories, project.Settings(fraction=1.0, test_fraction=0.25))
    assert sorted(text.strip() for text in [*train["text"], *test["text"]]) == ["a", "b", "c", "d"]
    assert (counts["train_stories"], counts["test_stories"]) == (3, 1)
    assert (counts["empty"], counts["duplicates"]) == (3, 2)


def test_the_split_is_a_seeded_random_slice():
    stories = datasets.Dataset.from_dict({"text": [f"story {i}" for i in range(2000)]})

    def split(**settings):
        train, test, counts = project.split_stories(stories, project.Settings(**settings))
        return list(train["text"]), list(test["text"]), counts["fingerprint"]

    train, test, fingerprint = split()
    assert (len(train), len(test)) == (180, 20)
    assert len({*train, *test}) == 200
    assert split() == (train, test, fingerprint)
    other_train, other_test, other_fingerprint = split(seed=1)
    assert other_train != train and other_test != test and other_fingerprint != fingerprint
    chosen = sorted(int(text.split()[1]) for text in train + test)
    assert chosen[0] < 100 and chosen[-1] > 1900  # from everywhere, not the first ones


def test_the_fingerprint_knows_every_story():
    texts = [f"story {i}" for i in range(20)]
    settings = project.Settings(fraction=1.0)

    def fingerprint(texts):
        return project.split_stories(datasets.Dataset.from_dict({"text": texts}), settings)[2]["fingerprint"]

    changed = [fingerprint([*texts[:i], "another story", *texts[i + 1 :]]) for i in range(20)]
    assert len({fingerprint(texts), *changed}) == 21


def test_a_story_is_its_tokens_and_the_end_cut_to_the_context(texts, tokenizer, encoded):
    ids, lengths, _, n_cut = encoded
    whole = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    assert [story.as_py() for story in ids] == [story[:65] for story in whole]
    assert lengths.tolist() == [min(len(story), 65) - 1 for story in whole]
    assert n_cut == sum(len(story) > 65 for story in whole) > 0
    assert str(ids.type.value_type) == "uint16"


def test_stories_are_tokenised_once(stories, tokenizer, tmp_path, monkeypatch):
    first = project.encode_stories(stories, tokenizer, 64, tmp_path / "tokens.arrow")
    in_memory = project.encode_stories(stories, tokenizer, 64)
    monkeypatch.setattr(project, "tokenize", lambda *_: pytest.fail("tokenised again"))
    again = project.encode_stories(stories, tokenizer, 64, tmp_path / "tokens.arrow")
    for each in (again, in_memory):
        assert each.ids.equals(first.ids) and each.n_cut == first.n_cut
        assert np.array_equal(each.lengths, first.lengths) and np.array_equal(each.n_bytes, first.n_bytes)


def test_the_end_of_text_inside_a_story_is_plain_text(tokenizer):
    ids = project.encode(tokenizer, "a<|endoftext|>b")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_batch_is_inputs_and_the_same_moved_by_one(encoded, tokenizer):
    ids = encoded[0]
    rows = [ids[i] for i in (0, 1, 2)]
    stories = [row.as_py() for row in rows]
    stories[1] = stories[1][:20] + [tokenizer.eos_token_id]

    class Row:
        def __init__(self, story):
            self.values = np.array(story, dtype=np.uint16)
            self.values = type("Values", (), {"to_numpy": lambda _, v=self.values: v})()

    input_ids, targets = project.pad_batch([Row(story) for story in stories])
    assert input_ids.shape == targets.shape == (3, 64)
    for row, story in enumerate(stories):
        n = len(story) - 1
        assert input_ids[row, :n].tolist() == story[:-1]
        assert targets[row, :n].tolist() == story[1:]
        assert (targets[row, n:] == project.IGNORE).all()
    assert targets[1, 19] == tokenizer.eos_token_id  # the end of a story is a target, its padding is not
    assert input_ids.min() >= 0
    # Pinned memory keeps the gaps of a view, and the copy to a GPU then waits.
    assert input_ids.is_contiguous() and targets.is_contiguous()
    assert input_ids.stride() == targets.stride() == (64, 1)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_only_pinned_memory_is_read_while_the_program_goes_on(device):
    """A Mac's GPU may read other memory after it was released."""

    class Batch:
        is_pinned = False

        def pin_memory(self):
            pinned = Batch()
            pinned.is_pinned = True
            return pinned

        def to(self, device, non_blocking=False):
            return self.is_pinned, non_blocking

    (found,) = project.to_device([Batch()], torch.device(device))
    assert found == ((True, True) if device == "cuda" else (False, False))


@pytest.mark.parametrize(("n", "batch_size"), [(1, 8), (8, 8), (83, 8), (2000, 4)])
def test_an_epoch_holds_every_story_once(n, batch_size):
    lengths = np.random.default_rng(0).integers(1, 256, n)
    batches = project.epoch_batches(lengths, batch_size, seed=1, epoch=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    whole, rest = divmod(n, batch_size)
    assert sorted(map(len, batches), reverse=True) == [batch_size] * whole + [rest] * (rest > 0)


def test_batches_depend_on_their_arguments_alone():
    lengths = np.random.default_rng(0).integers(1, 256, 500)

    def order(*arguments):
        return [batch.tolist() for batch in project.epoch_batches(lengths, *arguments)]

    first = order(8, 1, 1)
    np.random.default_rng().random(100)
    np.random.seed(5)
    torch.manual_seed(5)
    assert order(8, 1, 1) == first
    assert order(8, 1, 2) != first and order(8, 2, 1) != first


def test_little_of_a_batch_is_padding():
    lengths = np.random.default_rng(0).normal(200, 60, 8000).clip(20, 256).astype(int)
    batches = project.epoch_batches(lengths, 8, 0, 1)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert lengths.sum() / padded > 0.98
    firsts = [lengths[batch].mean() for batch in batches]
    assert np.corrcoef(firsts[:-1], firsts[1:])[0, 1] < 0.2  # short and long batches come mixed


def test_a_bpe_tokenizer_is_trained_to_its_size_and_reads_everything(stories, tokenizer, tmp_path):
    assert len(tokenizer) == 400
    text = "Zoë's 2 cats\n\n said: «naïve» 🙂\x00 <|endoftext|>"
    assert tokenizer.decode(project.encode(tokenizer, text)) == text
    again = project.train_tokenizer(stories, 400)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    reloaded = project.load_tokenizer(str(tmp_path))
    assert project.encode(reloaded, text) == project.encode(tokenizer, text)
    assert (reloaded.eos_token, reloaded.eos_token_id) == ("<|endoftext|>", tokenizer.eos_token_id)


def test_a_bpe_tokenizer_is_trained_once_for_the_same_stories(workspace, monkeypatch, refused):
    train("--max-steps 1")
    first = read_run(epoch=1)[1]["data"]["tokenizer"]
    trained, train_tokenizer = [], project.train_tokenizer

    def counted(stories, size):
        trained.append(size)
        return train_tokenizer(stories, size)

    monkeypatch.setattr(project, "train_tokenizer", counted)
    train("--max-steps 1 --overwrite")
    assert trained == [] and read_run(epoch=1)[1]["data"]["tokenizer"] == first
    train("--max-steps 1 --overwrite --seed 7")  # other stories
    train("--max-steps 1 --overwrite", TINY.replace("bpe:400", "bpe:410"))
    assert trained == [400, 410]
    assert not list((workspace / "checkpoints").rglob("*.tmp"))
    for file in (workspace / "checkpoints" / "epoch_1").glob("*.json"):
        assert "checkpoints" not in file.read_text() or file.name == "training.json", file
    (kept,) = (workspace / "checkpoints" / "data").glob("bpe-*-410")
    (kept / "tokenizer.json").write_text("{")
    line = refused(project.main, TINY.replace("bpe:400", "bpe:410") + " --max-steps 1 --overwrite")
    assert str(kept.name) in line and line.endswith("; delete it")


@pytest.mark.parametrize("name", ["bpe:256", "bpe:", "bpe:many", "bpe:-1", "missing-tokenizer", "./missing/folder"])
def test_a_bad_tokenizer_is_refused_in_one_line(name, workspace, refused):
    assert f"--tokenizer {name}" in refused(project.main, ["--data", "sample", "--tokenizer", name])


def test_an_unreadable_or_empty_tokenizer_folder_is_refused(workspace, tokenizer, refused, monkeypatch):
    tokenizer.save_pretrained(workspace / "broken")
    (workspace / "broken" / "tokenizer.json").write_text('{"version": "1.0", ')
    line = refused(project.main, "--data sample --tokenizer broken")
    assert "--tokenizer broken: the local folder cannot be read" in line

    from transformers import AutoTokenizer, GPT2Tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: GPT2Tokenizer())
    (workspace / "hollow").mkdir()
    assert "missing or not usable (1 tokens" in refused(project.main, ["--data", "sample", "--tokenizer", "hollow"])


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "no-scheme.example", "http://", "silence"])
def test_a_hub_that_does_not_answer_is_noticed(endpoint, monkeypatch):
    """silence: a port that takes connections and never says a word; without a time limit this test would hang."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", silent if endpoint == "silence" else endpoint)
        assert project.hub_answers() is False
        assert constants.HF_HUB_OFFLINE  # for the libraries of the Hub


def test_a_hub_that_answers_is_noticed(monkeypatch):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert project.hub_answers() is True and not constants.HF_HUB_OFFLINE


# --- Properties, for whatever hypothesis thinks of

PROPERTY = settings(deadline=None, derandomize=True, database=None)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=400), st.integers(1, 20), st.integers(0, 99), st.integers(0, 9)
)
@PROPERTY
def test_any_epoch_holds_every_story_once_in_batches_of_the_size(lengths, batch_size, seed, epoch):
    batches = project.epoch_batches(np.array(lengths), batch_size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)


TEXTS = st.one_of(st.none(), st.text(max_size=8), st.sampled_from(["a", "b", " a", "<|endoftext|>", "\0"]))


@given(st.lists(TEXTS, max_size=40), st.floats(0.01, 1), st.floats(0.01, 0.99), st.integers(0, 9))
@PROPERTY
def test_any_stories_are_split_without_loss_or_overlap(texts, fraction, test_fraction, seed):
    stories = datasets.Dataset.from_dict(
        {"text": texts}, features=datasets.Features({"text": datasets.Value("string")})
    )
    chosen = project.Settings(fraction=fraction, test_fraction=test_fraction, seed=seed)
    different = {text.strip() for text in texts if text and text.strip()}
    try:
        train, test, counts = project.split_stories(stories, chosen)
    except project.InputError:
        assert fraction < 1 or len(different) < 2 or round(test_fraction * len(different)) == len(different)
        return
    kept = [text.strip() for text in [*train["text"], *test["text"]]]
    assert len(kept) == len(set(kept)) and different >= set(kept) and len(train) and len(test)
    assert len(kept) + counts["empty"] + counts["duplicates"] == max(1, round(fraction * len(texts)))
    if fraction == 1:
        assert set(kept) == different


@given(
    st.text(max_size=200) | st.lists(st.sampled_from(["<|endoftext|>", "\0", "é", "👩‍👩‍👧", "\n", " a"])).map("".join)
)
@PROPERTY
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    ids = project.encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids and all(0 <= i < len(tokenizer) for i in ids)


def test_a_run_on_hostile_stories(workspace):
    """Not one of them may stop the run or end a story before its end."""
    odd = [
        "a\0b",
        "x" * 1_000_000,
        "\u202egnirts",
        "<|endoftext|> in <|endoftext|> the middle",
        " \t\n",
        None,
        "\U0010ffff",
    ]
    stories = [*odd, *STORIES * 3, *(f"{i} {'🦊' * i}" for i in range(30))]
    datasets.Dataset.from_dict({"text": stories}).to_parquet("odd.parquet")
    sizes = "--n-positions 64 --n-embd 32 --n-head 2 --n-inner 64"
    project.main(f"--data odd.parquet --fraction 1 --tokenizer bpe:300 --epochs 1 {sizes}".split())
    arrow = next((workspace / "checkpoints" / "data").glob("train-*.arrow"))
    eos = project.load_checkpoint("checkpoints/epoch_1").tokenizer.eos_token_id
    for ids in datasets.Dataset.from_file(str(arrow))["ids"]:
        assert eos not in ids[:-1]


def test_bytes_that_are_no_text_are_refused_in_one_line(workspace, refused):
    column = pa.array([b"good story", b"bad \xff story"] * 9, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), "bytes.parquet")
    assert refused(project.main, "--data bytes.parquet --fraction 1 --tokenizer bpe:300")
    (workspace / "surrogates.jsonl").write_text('{"text": "\\ud800 story"}\n' * 9)
    assert refused(project.main, "--data surrogates.jsonl --fraction 1 --tokenizer bpe:300")
