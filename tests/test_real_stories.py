"""The real stories and the real GPT-2 tokenizer. Skipped where they are not: name a save_to_disk folder of TinyStories
in TINYSTORIES_DIR (default ./tinystories_local) and a folder with GPT-2's tokenizer in GPT2_TOKENIZER_DIR."""

import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import gpt2_tinystories as project

STORIES = Path(os.environ.get("TINYSTORIES_DIR") or "tinystories_local").resolve()
TOKENIZER = Path(os.environ.get("GPT2_TOKENIZER_DIR") or "missing").resolve()
pytestmark = [
    pytest.mark.packages,
    pytest.mark.skipif(not STORIES.is_dir(), reason=f"no real stories: {STORIES} is not there"),
    pytest.mark.skipif(not TOKENIZER.is_dir(), reason="no GPT-2 tokenizer: GPT2_TOKENIZER_DIR names no folder"),
]


@pytest.fixture(scope="module")
def stories():
    return project.load_stories(str(STORIES), None)[0]


def test_ten_percent_of_the_stories_become_batches(stories, tmp_path):
    settings = project.Settings()
    tokenizer = project.load_tokenizer(str(TOKENIZER))
    train, test, counts = project.split_stories(stories, settings)
    assert len(train) + len(test) + counts["duplicates"] + counts["empty"] == round(0.1 * len(stories))
    tokens = project.encode_stories(train, tokenizer, settings.n_positions, tmp_path / "tokens.arrow")
    ids, lengths, n_bytes, n_cut = tokens
    theirs = AutoTokenizer.from_pretrained(TOKENIZER)
    n_long = 0
    for first in range(0, len(train), 1000):
        texts = [text.strip() for text in train[first : first + 1000]["text"]]
        for i, expected in enumerate(theirs(texts)["input_ids"], first):
            if i % 50 == 0:
                assert ids[i].as_py() == [*expected, 50256][:257]
                kept = theirs.decode(expected[:257])
                if "\ufffd" not in kept:  # the half of a character that was cut
                    assert n_bytes[i] == len(kept.encode()) - len(theirs.convert_ids_to_tokens(expected[0]))
            n_long += len(expected) + 1 > 257
    assert n_cut == n_long and 0 < n_cut < len(train) / 4
    batches = project.epoch_batches(lengths, 8, 42, 1)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert lengths.sum() / padded > 0.97  # of batches of 8 in any order 0.75
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(train)))


def test_a_run_on_real_stories_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = "--n-positions 64 --n-embd 64 --n-head 2 --n-inner 128 --learning-rate 3e-3 --fraction 0.02 --epochs 2"
    project.main(f"--data {STORIES} --tokenizer {TOKENIZER} {sizes}".split())
    model = project.load_checkpoint("checkpoints/epoch_2")
    assert model.config.vocab_size == 50_257
    first, second = project.json.loads(Path("checkpoints/epoch_2/training.json").read_text())["epochs"]
    assert second["test_perplexity"] < first["test_perplexity"] < 5_000
