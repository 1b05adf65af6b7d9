# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.7,<3", "transformers>=5.0,<6", "datasets>=4.0,<6",
#                 "matplotlib>=3.8,<4", "tqdm>=4.66.3,<5", "filelock>=3.21,<5"]
# ///
"""Train a small GPT-2 on TinyStories: one file, made to be read from top to bottom.

    python gpt2_tinystories.py                                                     the defaults
    python gpt2_tinystories.py --data my.txt --fraction 1 --tokenizer bpe:4096     your stories
    python gpt2_tinystories.py --init gpt2 --learning-rate 1e-4                    from a GPT-2
    torchrun --nproc-per-node 8 gpt2_tinystories.py                                8 GPUs

The stories are those in ./tinystories_local, else TinyStories, downloaded, else built-in ones. Each
epoch leaves checkpoints/epoch_N, a Hugging Face GPT-2 with a sample story, and plots/. The same
command continues an interrupted run. gpt2_generate.py writes stories.

Shapes: B stories in a batch, T tokens in a story, C = n_embd, H = n_head, D = C / H, V = vocab_size
"""

import argparse
import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter, OrderedDict, namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache
from glob import glob
from hashlib import blake2b, file_digest
from importlib.util import find_spec
from itertools import count, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from socket import socketpair
from threading import RLock, Thread
from typing import Literal, get_args
from unicodedata import normalize

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# transformers, datasets and matplotlib are imported where they are used, as they take seconds.

HUB_STORIES = "roneneldan/TinyStories"
LOCAL_STORIES = Path("tinystories_local")
BUILT_IN, N_BUILT_IN = "built-in stories", 12_000
END_OF_STORY = "<|endoftext|>"
IGNORE = -100  # the target of padding
PIECE, SHORTEST_PIECE = 2**23, 512  # logits of a piece, and its positions at least
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORLD_SIZE = max(1, int(os.environ.get("WORLD_SIZE") or 1))  # processes
RANK = int(os.environ.get("RANK") or 0) if WORLD_SIZE > 1 else 0  # process 0 prints and writes

# --- Settings: a field is a flag, a line of --help, an entry in training.json -------------------

class InputError(ValueError):
    """A user's mistake: shown as one line, exit code 2."""

def require(condition, name, value, rule):
    """Raise InputError for a flag unless the condition holds."""
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} {value}: {rule}")

def flag(default, help, is_allowed=lambda value: True, rule=""):
    """A field with its line of --help, and its rule as code and in words."""
    return field(default=default, metadata={"help": help, "is_allowed": is_allowed, "rule": rule})

FROM_1 = (lambda x: 1 <= x <= 1_000_000, "1 to 1,000,000")
FROM_2 = (lambda x: 2 <= x <= 1_000_000, "2 to 1,000,000")
AT_LEAST_0 = (lambda x: 0 <= x < math.inf, "0 or more")
ABOVE_0 = (lambda x: 0 < x < math.inf, "above 0")
TO_1 = (lambda x: 0 < x <= 1, "above 0, at most 1")
BELOW_1 = (lambda x: 0 < x < 1, "above 0, below 1")
FROM_0_BELOW_1 = (lambda x: 0 <= x < 1, "0 or more, below 1")
SEED = (lambda x: 0 <= x < 2**32, "0 to 2**32 - 1")
PENALTY = (lambda x: 0.01 <= x <= 100, "0.01 to 100")
NAME = (str.strip, "not empty")
TEXT = (lambda x: x.strip() and not re.search("[\ud800-\udfff]", x), "text in UTF-8, not empty")

class Flags:
    """The base of dataclasses of flags: checks each value by the rule of its field."""

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            is_choice = not choices or value in choices
            require(is_choice, f.name, value, f"must be one of {', '.join(choices)}")
            require(f.metadata["is_allowed"](value), f.name, value, f"must be {f.metadata['rule']}")

@dataclass(frozen=True)
class Settings(Flags):
    data: str = flag("auto", "auto, sample, a save_to_disk folder, a file, or a Hub id", *NAME)
    fraction: float = flag(0.1, "share of the stories that is used", *TO_1)
    test_fraction: float = flag(0.1, "share of those that is held out for testing", *BELOW_1)
    tokenizer: str = flag(
        "auto", "Hub id, folder, bpe:SIZE; auto: gpt2, or bpe:4096 for sample", *NAME)
    init: str = flag("", "GPT-2 to tune, folder or Hub id; it brings its sizes and tokenizer")
    n_positions: int = flag(256, "longest story in tokens; longer ones are cut", *FROM_2)
    n_embd: int = flag(768, "width of the model", *FROM_1)
    n_layer: int = flag(2, "decoder layers", *FROM_1)
    n_head: int = flag(12, "attention heads of a layer", *FROM_1)
    n_inner: int = flag(1536, "width of the feed-forward layers", *FROM_1)
    dropout: float = flag(0.0, "share of activations dropped in training", *FROM_0_BELOW_1)
    epochs: int = flag(5, "passes over the training stories", *FROM_1)
    batch_size: int = flag(8, "stories in a batch, in each process", *FROM_1)
    accum_steps: int = flag(2, "batches accumulated in an optimizer step", *FROM_1)
    learning_rate: float = flag(3e-4, "peak of AdamW; higher for embedding and head", *ABOVE_0)
    muon_learning_rate: float = flag(0.02, "peak of Muon, for the layers' matrices", *ABOVE_0)
    warmup_steps: int = flag(100, "linear warm-up, at most a tenth; then decay", *AT_LEAST_0)
    weight_decay: float = flag(0.1, "weight decay of the matrices", *AT_LEAST_0)
    grad_clip: float = flag(1.0, "largest norm of the gradient", *ABOVE_0)
    seed: int = flag(42, "seed of everything random", *SEED)
    max_steps: int = flag(0, "stop after so many steps; 0: after all epochs", *AT_LEAST_0)
    save_every: float = flag(10.0, "minutes between saves inside an epoch", *AT_LEAST_0)
    test_points: int = flag(20, "scores of a few test stories in a run; 0: none", *AT_LEAST_0)
    device: Literal["auto", "cuda", "cpu", "mps"] = flag("auto", "where to compute")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "format of matrix products")
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile; auto: on CUDA if it works")
    checkpoints: str = flag("checkpoints", "folder of the checkpoints", *NAME)
    plots: str = flag("plots", "folder of the plots", *NAME)
    overwrite: bool = flag(False, "start over although a run is there")
    prompt: str = flag("Once upon a time, in a small village", "beginning of the samples", *TEXT)

    def __post_init__(self):
        super().__post_init__()
        is_divisible = self.n_embd % 2 == 0 and self.n_embd % self.n_head == 0
        rule = f"must be even, and a multiple of --n-head {self.n_head}"
        require(is_divisible, "n_embd", self.n_embd, rule)

NOT_WITH_INIT = {"tokenizer", "n_embd", "n_layer", "n_head", "n_inner", "muon_learning_rate"}

# What may change when a run continues. The stories and the tokenizer are compared themselves, of
# accum_steps its product with the number of processes.
MAY_CHANGE = {"data", "tokenizer", "accum_steps", "save_every", "test_points", "device",
              "precision", "compile", "checkpoints", "plots", "overwrite", "prompt"}

# --- Data: stories, tokenizer, token ids, batches of similar length -----------------------------

NEEDED = ("; it must be a save_to_disk folder, a .txt, .jsonl or .parquet file, a folder of these "
          "two, or a Hub id, in UTF-8, with strings in a column `text`")
SPLIT = re.compile(
    "(?<![a-z])(train|test|valid|val|dev|eval)(?:ing|idation|uation|set|s)?(?![a-z])")

def load_stories(data, cache_dir=None):
    """The stories of --data, a datasets.Dataset of a column `text`, and their source's name. Those
    of files are kept in cache_dir; None: in memory."""
    from datasets import load_dataset
    if data == "auto":
        data = default_stories(cache_dir)
    if data == "sample":
        if Path(data).exists():
            say("warning    the built-in stories are used; --data ./sample is the one that is here")
        return built_in_stories(), BUILT_IN

    path = Path(data)
    source = path.absolute().name if path.exists() else data
    saved = [part for part in (path / "train", path) if (part / "state.json").exists()]
    if saved:
        stories = saved_stories(saved[0], data)
    elif path.exists() and not has_configurations(path):
        stories = stories_in_files(path, data, cache_dir)
    else:
        with reading(f"--data {data}", hub_name=data):
            stories = load_dataset(path.as_posix(), split="train")

    kind = stories.features.get("text")
    if "string" not in getattr(kind, "dtype", ""):
        raise InputError(f"--data {data}: its column `text` is {kind}{NEEDED}")
    return stories.select_columns("text"), source

def default_stories(cache_dir):
    """./tinystories_local, downloaded if need be; else "sample"."""
    if RANK == 0 and not LOCAL_STORIES.exists():
        say(f"stories    looking for {HUB_STORIES} on the Hugging Face Hub (1 GB, kept here)")
        try:
            stories, _ = load_stories(HUB_STORIES, cache_dir)
        except InputError as error:
            say(f"{'=' * 99}\nTHE BUILT-IN STORIES are used: no ./{LOCAL_STORIES} and no download:"
                f"\n{error}\nOnce the folder is there, use --overwrite.\n{'=' * 99}")
        else:
            with whole_or_absent(LOCAL_STORIES) as folder:
                stories.save_to_disk(folder)
    return str(LOCAL_STORIES) if LOCAL_STORIES.exists() else "sample"

def built_in_stories():
    from datasets import Dataset
    sys.path.append(str(Path(__file__).parent))  # missing under PYTHONSAFEPATH
    is_there = find_spec("sample_stories")
    require(is_there, "data", "sample", "sample_stories.py is not beside the script")
    from sample_stories import sample_stories
    return Dataset.from_dict({"text": list(sample_stories(N_BUILT_IN))})

def saved_stories(folder, data):
    """The stories of a save_to_disk folder. (load_from_disk takes "::" in a path for an address,
    and needs the package of the format they were saved with.)"""
    from datasets import Dataset, concatenate_datasets

    def read(files):
        paths = [str(folder / file["filename"]) for file in files]
        return concatenate_datasets([Dataset.from_file(path) for path in paths])

    with reading(f"--data {data}", NEEDED):
        state = json.loads((folder / "state.json").read_text("utf-8"))
        stories = read(state["_data_files"])
        if chosen := state.get("_indices_data_files"):  # the rows that count
            stories = stories.select(read(chosen)["indices"])
        return stories

def has_configurations(folder):
    """Whether a README.md says, as on the Hub, which files belong together."""
    from huggingface_hub import metadata_load
    readme = folder / "README.md"
    with reading(readme, "; mend it, or take it away"):
        return readme.is_file() and "configs" in (metadata_load(readme) or {})

def stories_in_files(path, data, cache_dir):
    """The stories of a file or a folder's files, kept in cache_dir under their sizes and times."""
    paths = train_files(path, data) if path.is_dir() else [path]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in paths]
    cache = cache_dir and Path(cache_dir, f"stories-{digest(repr(stats).encode())}.arrow")
    return arrow_file(cache, {"text": "large_string"}, read_files(paths))

def train_files(folder, data):
    """A folder's .parquet and .jsonl files of the split `train`, if there are splits; linked ones
    too, hidden ones not. (datasets would mix several sets, and enter no linked folders.)"""
    from datasets.data_files import FILES_TO_IGNORE
    there = sorted(glob("**/*", root_dir=folder, recursive=True))
    there = [name for name in there if not (folder / name).is_dir()]
    found = [name for name in there if name.lower().endswith((".parquet", ".jsonl"))]
    found = found or [name for name in there if name.lower().endswith(".json")
                      and Path(name).name not in FILES_TO_IGNORE]
    split = {name: SPLIT.findall(name.lower())[-1:] for name in found}
    chosen = [name for name in found if split[name] == ["train"]]
    chosen = chosen or [name for name in found if not split[name]]
    rule = f"no stories of a split `train` in its files ({', '.join(there[:5])}){NEEDED}"
    require(chosen, "data", data, rule)

    # Parts of one split, such as train-0-of-2-1f00a2, differ in numbers, and no two have one name.
    number = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?|(?<!v)[\W\d_]+")
    names = [Path(name).name for name in chosen]
    sets = {number.sub(" ", name) for name in names if SPLIT.search(name.lower())}
    is_one = len(sets) < 2 and len(set(names)) == len(names)
    rule = f"holds several sets of stories, name one: {', '.join(chosen[:5])}"
    require(is_one, "data", data, rule)
    others = sorted(set(there) - set(chosen)) or ["none"]
    say(f"files      {len(chosen)}: {', '.join(chosen[:5])}; not read: {', '.join(others[:5])}")
    numbers_of_parts = re.findall(r"-of-(\d+)", " ".join(names))
    n_parts = max(map(int, numbers_of_parts), default=0)
    if n_parts > len(names):
        say(f"warning    of {n_parts} parts, {data} holds {len(names)}")
    return [folder / name for name in chosen]

def read_files(paths):
    """Yield the stories of files, 100 at a time."""
    import pyarrow
    readers = {".txt": read_text, ".jsonl": read_lines, ".json": read_lines, ".parquet": read_table}
    for path in paths:
        try:
            if not (read := readers.get(path.suffix.lower())):
                raise InputError("its format is not known")
            texts = read(path)
            while some := list(islice(texts, 100)):
                yield {"text": pyarrow.array(some, pyarrow.large_string())}
        except MemoryError:  # Arrow's is an ArrowException, too
            raise
        except (InputError, OSError, UnicodeError, pyarrow.ArrowException) as error:
            raise InputError(f"--data {path}: cannot be read: {error}{NEEDED}") from error

def read_text(path):
    """Yield a text file's stories, separated by <|endoftext|>."""
    rest = ""
    with open(path, encoding="utf-8") as file:
        while part := file.read(max(1 << 20, len(rest))):  # long stories take linear time
            *stories, rest = (rest + part).split(END_OF_STORY)
            yield from stories
    if rest.strip():
        yield rest

def read_lines(path):
    """Yield the stories of JSON objects, one on a line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row.get("text", row) if isinstance(row, dict) else [row]
                if not isinstance(text, str | None):
                    raise ValueError("no string `text` in it")
                (text or "").encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError) as error:  # a JSONDecodeError has a msg
                raise InputError(f"line {number}: {getattr(error, 'msg', error)}") from None
            yield text

def read_table(path):
    from pyarrow.parquet import ParquetFile
    with open(path, "rb") as file:
        table = ParquetFile(file)
        if table.schema_arrow.names.count("text") != 1:
            raise InputError("no column `text` in it, or several")
        for rows in table.iter_batches(100, columns=["text"]):
            yield from rows.column("text").to_pylist()

def arrow_file(path, schema, columns):
    """The Dataset in an Arrow file, which is written from columns if it is not there; without a
    path, in memory. (Dataset.map would leave a temporary file where a run is killed.)"""
    import pyarrow
    from datasets import Dataset
    schema = pyarrow.schema(schema)
    batches = (pyarrow.record_batch(some, schema) for some in columns)
    if not path:
        return Dataset(pyarrow.Table.from_batches(batches, schema))
    if not path.exists():
        with (whole_or_absent(path) as new, pyarrow.OSFile(str(new), "wb") as sink,
              pyarrow.ipc.new_stream(sink, schema) as writer):
            for batch in batches:
                writer.write_batch(batch)
    with reading(path, "; delete it"):
        return Dataset.from_file(str(path))

def clean(text):
    """A story without white space, byte-order marks and <|endoftext|> at its ends; "" for None."""
    previous, text = None, text or ""
    while text != previous:
        previous, text = text, text.strip().strip("\ufeff")
        text = text.removeprefix(END_OF_STORY).removesuffix(END_OF_STORY)
    return text

def split_stories(stories, settings):
    """(train, test, counts): a random slice, without empty stories and duplicates."""
    rng = np.random.default_rng(settings.seed)
    n_chosen = min(len(stories), max(1, round(settings.fraction * len(stories))))
    chosen = stories.select(np.sort(rng.choice(len(stories), n_chosen, replace=False)))

    texts = (clean(text) for rows in chosen.iter(100) for text in rows["text"])
    hashes = (int(digest(text.encode()), 16) if text else 0 for text in texts)
    try:
        hashes = np.fromiter(hashes, np.uint64, n_chosen)
    except UnicodeError as error:
        raise InputError(f"--data {settings.data}: cannot be read: {error}") from error

    _, firsts = np.unique(hashes, return_index=True)  # the first story of each text
    kept = np.sort(firsts[hashes[firsts] != 0])  # without the empty ones
    kept = rng.permutation(kept)
    n_test = max(1, round(settings.test_fraction * len(kept)))
    rule = (f"{len(stories)} stories, of which --fraction {settings.fraction} leaves {len(kept)}: "
            f"too few (a .txt needs {END_OF_STORY} between)")
    require(n_test < len(kept), "data", settings.data, rule)

    test, train = np.sort(kept[:n_test]), np.sort(kept[n_test:])
    n_empty = int((hashes == 0).sum())
    fingerprint = digest(hashes[np.concatenate((train, test))].tobytes() + b"%d" % len(train))
    counts = {"stories": len(stories), "train_stories": len(train), "test_stories": n_test,
              "empty": n_empty, "duplicates": n_chosen - n_empty - len(kept),
              "fingerprint": fingerprint}
    return chosen.select(train), chosen.select(test), counts

def digest(content):
    return blake2b(content, digest_size=8).hexdigest()

def trained_tokenizer(name, stories, path):
    """The folder, path and size, of a tokenizer with a name such as bpe:4096, trained once."""
    size = int(name[4:]) if re.fullmatch("[0-9]{1,7}", name[4:]) else 0
    rule = "needs a size above 256, at most 1,000,000"
    require(256 < size <= 1_000_000, "tokenizer", name, rule)
    trained = Path(f"{path}-{size}")
    if not trained.exists():
        with whole_or_absent(trained) as folder:
            train_tokenizer(stories, size).save_pretrained(folder)
    return str(trained)

def train_tokenizer(stories, size):
    """A tokenizer like GPT-2's."""
    from transformers import GPT2Tokenizer
    # Of 10,000 characters at most: a very long word takes quadratic time.
    texts = ([clean(text)[:10_000] for text in rows["text"]] for rows in stories.iter(100))
    return GPT2Tokenizer().train_new_from_iterator(texts, size, show_progress=False)

def load_tokenizer(name, what="--tokenizer", hint=""):
    """A tokenizer, by Hub id or folder."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    with reading(f"{what} {name}", hint, hub_name=name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        try:
            own = PreTrainedTokenizerFast.from_pretrained(name)  # tokenizer.json as it is
        except (ValueError, OSError, ImportError):  # its files have an older format
            own = tokenizer
    # Where files are missing, transformers may return an empty one.
    if len(tokenizer) <= 1 or not tokenizer.is_fast:
        raise InputError(f"{what} {name}: its files, such as tokenizer.json, are missing or not "
                         f"usable ({len(tokenizer)} tokens): copy them")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{what} {name}: it has no token for the end of a text; name one as "
                         "eos_token in its tokenizer_config.json")

    # Classes such as GPT2Tokenizer have parts of their own in the place of the file's, and some
    # tokenizers add <s> or </s>: then the file's is taken, with a template that adds nothing.
    def parts_of(tokenizer):
        parts = tokenizer.backend_tokenizer
        return repr((parts.normalizer, parts.pre_tokenizer, parts.decoder))

    text = "Once upon a time,\n\n Zoé didn't  know 1999!"
    adds_tokens = encode(tokenizer, text, add_special_tokens=True) != encode(tokenizer, text)
    if adds_tokens or parts_of(tokenizer) != parts_of(own):
        special = own.special_tokens_map | {"eos_token": tokenizer.eos_token}
        own.backend_tokenizer.post_processor = TemplateProcessing("$A", "$A $B", [])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer, **special)
    return tokenizer

def some_texts(stories):
    """About 100 of the stories."""
    some = stories.select(range(0, len(stories), math.ceil(len(stories) / 100)))
    return [clean(text)[:10_000] for text in some["text"]]

def check_tokenizer(tokenizer, texts, what):
    """Raise InputError unless texts come back from a tokenizer as they were. Other case, and other
    white space that keeps the words apart, are usual in small vocabularies, and only said."""
    def part_after(n_letters, text):
        places = [i for i, letter in enumerate(text) if not letter.isspace()]
        place = (places[n_letters:] or [len(text)])[0]
        return repr(text[max(0, place - 20) : place + 20])

    changes = []
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        pair = [normalize("NFC", text.strip()) for text in (text, tokenizer.decode(ids))]
        if pair[0] == pair[1]:
            continue
        letters = ["".join(text.casefold().split()) for text in pair]
        n_words = [len(re.findall(r"\w+", text)) for text in pair]
        are_other_letters = letters[0] != letters[1]
        same = os.path.commonprefix(letters if are_other_letters else pair)
        n_same = len("".join(same.split()))
        changes.append(" comes back as ".join(part_after(n_same, text) for text in pair))
        if are_other_letters or n_words[0] > n_words[1]:
            raise InputError(f"{what}: it loses text: {changes[-1]}; bpe:4096 keeps all")
    if changes:
        say(f"warning    {what}: the stories are changed: {changes[0]}")

def check_saved_tokenizer(tokenizer, texts, what, cache_dir):
    """Raise InputError unless a tokenizer, saved and called plainly, gives the same ids."""
    from transformers import AutoTokenizer
    with whole_or_absent(cache_dir / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
        with reading(what):
            saved = AutoTokenizer.from_pretrained(folder)
    ids = encode(tokenizer, texts)
    if encode(saved, texts, add_special_tokens=True) != ids:
        raise InputError(f"{what}: once saved, transformers reads it as another one")
    if saved(texts, verbose=False)["input_ids"] != ids:
        say(f"warning    {what}: its special tokens are in the stories, where they are plain text")

def vocab_size_of(tokenizer):
    return max(tokenizer.get_vocab().values()) + 1  # there may be holes

def encode(tokenizer, texts, add_special_tokens=False):
    """Token ids of texts."""
    return tokenize(tokenizer, texts, add_special_tokens)["input_ids"]

def tokenize(tokenizer, texts, add_special_tokens=False):
    """A BatchEncoding. A written <|endoftext|> is plain characters, not the end of a story."""
    options = {"add_special_tokens": add_special_tokens, "split_special_tokens": True}
    return tokenizer(texts, verbose=False, **options)

def bytes_of_targets(text, encoding, n_ids):
    """The UTF-8 bytes of text that the first n_ids tokens stand for, without the very first, which
    is no target. A character of several tokens counts as the first of them."""
    _, start = encoding.token_to_chars(0)
    _, end = encoding.token_to_chars(min(n_ids, len(encoding)) - 1)
    return len(text[start:end].encode())

# ids: an Arrow column, memory-mapped; lengths: the targets of each story, its ids but the first;
# n_bytes: the UTF-8 bytes of text that these stand for; n_cut: how many stories were longer.
Tokens = namedtuple("Tokens", "ids lengths n_bytes n_cut")

def encode_stories(stories, tokenizer, n_positions, path=None):
    """The Tokens of stories, ids and <|endoftext|>, n_positions + 1 at most, kept in a file or, if
    path is None, in memory."""
    import pyarrow.compute
    end, n_ids = tokenizer.eos_token_id, n_positions + 1

    def columns():
        # The first part of a very long story has all the tokens that are kept.
        n_characters = max(10_000, n_ids * max(map(len, tokenizer.get_vocab())))
        for rows in tqdm(stories.iter(100), "tokenising", -(-len(stories) // 100)):
            texts = [clean(text)[:n_characters] for text in rows["text"]]
            pairs = zip(texts, tokenize(tokenizer, texts).encodings, strict=True)
            pairs = [(text, encoding) for text, encoding in pairs if encoding.ids]
            yield {"ids": [(encoding.ids + [end])[:n_ids] for _, encoding in pairs],
                   "n_bytes": [bytes_of_targets(*pair, n_ids) for pair in pairs],
                   "is_cut": [len(encoding.ids) >= n_ids for _, encoding in pairs]}

    id_type = pyarrow.uint16() if vocab_size_of(tokenizer) <= 1 << 16 else pyarrow.int32()
    schema = {"ids": pyarrow.list_(id_type), "n_bytes": pyarrow.int32(), "is_cut": pyarrow.bool_()}
    table = arrow_file(path, schema, columns()).data
    ids = table.column("ids")
    lengths = pyarrow.compute.list_value_length(ids).to_numpy() - 1
    n_bytes = table.column("n_bytes").to_numpy()
    return Tokens(ids, lengths, n_bytes, int(np.sum(table.column("is_cut"))))

def prepare_data(settings, data, tokenizer=None):
    """(train_set, test_set, tokenizer, counts): the Tokens of the stories that data names, by the
    tokenizer of --tokenizer or a given one, and the record's figures of them."""
    cache_dir, n_positions = Path(settings.checkpoints, "data"), settings.n_positions
    stories, source = load_stories(data, cache_dir)
    train_stories, test_stories, counts = split_stories(stories, settings)
    if not tokenizer:
        name, hint = settings.tokenizer, "; bpe:4096 needs no network"
        if name == "auto":
            name = "bpe:4096" if source == BUILT_IN else "gpt2"
        if name.startswith("bpe:"):
            path = cache_dir / f"bpe-{counts['fingerprint']}"
            name, hint = trained_tokenizer(name, train_stories, path), "; delete it"
        tokenizer = load_tokenizer(name, hint=hint)

    text = f"{tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}"
    counts |= {"source": source, "tokenizer": digest(text.encode())}
    key = f"tokens-{counts['fingerprint']}-{counts['tokenizer']}-{n_positions}.arrow"
    what = f"--init {settings.init}" if settings.init else f"--tokenizer {settings.tokenizer}"
    texts = [settings.prompt, *some_texts(train_stories)]
    check_tokenizer(tokenizer, texts, what)
    if RANK == 0 and not (cache_dir / f"test-{key}").exists():
        check_saved_tokenizer(tokenizer, texts, what, cache_dir)
    train_set = encode_stories(train_stories, tokenizer, n_positions, cache_dir / f"train-{key}")
    test_set = encode_stories(test_stories, tokenizer, n_positions, cache_dir / f"test-{key}")
    n_train, n_test = len(train_set.lengths), len(test_set.lengths)
    require(n_train and n_test, "tokenizer", settings.tokenizer, "knows nothing of the stories")

    counts["empty"] += len(train_stories) + len(test_stories) - n_train - n_test  # of no tokens
    counts |= {"train_stories": n_train, "test_stories": n_test,
               "train_tokens": int(train_set.lengths.sum()),
               "stories_cut": train_set.n_cut + test_set.n_cut}
    return train_set, test_set, tokenizer, counts

def epoch_batches(lengths, batch_size, seed, epoch):
    """The batches of an epoch, arrays of story numbers: a pure function of its arguments. Stories
    of similar length come together, so that little is padding."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    batches = []
    for part in np.split(order, range(100 * batch_size, len(order), 100 * batch_size)):
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]

def step_batches(lengths, settings, steps_per_epoch, first_step=0):
    """Yield each step's batches, of all processes, from first_step on."""
    per_step = settings.accum_steps * WORLD_SIZE  # batches
    epochs_done, steps_done = divmod(first_step, steps_per_epoch)
    for epoch in count(epochs_done + 1):
        batches = epoch_batches(lengths, settings.batch_size, settings.seed, epoch)
        for first in range(steps_done * per_step, len(batches), per_step):
            yield batches[first : first + per_step]
        steps_done = 0

def pad_batch(stories):
    """(input_ids, targets), both (B, T): the ids, and the same moved by one. The target of padding
    is IGNORE; the <|endoftext|> that ends a story is a real one."""
    stories = [torch.from_numpy(story.values.to_numpy().astype(np.int64)) for story in stories]
    stories = stories or [torch.full((2,), IGNORE)]  # none: one token of padding
    ids = nn.utils.rnn.pad_sequence(stories, batch_first=True, padding_value=IGNORE)
    return ids[:, :-1].clamp(min=0), ids[:, 1:].contiguous()  # a GPU waits for copies with gaps

def make_loader(ids, batches):
    """A loader of (input_ids, targets) for batches of story numbers."""
    return torch.utils.data.DataLoader(ids, batch_sampler=batches, collate_fn=pad_batch)

def make_test_loader(tokens, batch_size=8, n_stories=None):
    """A loader of the Tokens of all stories, or of n_stories at even distances, once; of several
    processes, each gets its share."""
    n_all = len(tokens.lengths)
    chosen = np.linspace(0, n_all - 1, n_stories or n_all, dtype=int)
    batches = epoch_batches(tokens.lengths[chosen], batch_size, seed=0, epoch=0)
    return make_loader(tokens.ids, own_share([chosen[batch] for batch in batches]))

def to_device(batch, device):
    """A batch on a device. CUDA fetches it from pinned memory while the CPU continues, which other
    memory is not safe for: it may have been released by then."""
    if device.type == "cuda":
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
    return [tensor.to(device) for tensor in batch]

# --- Model: GPT-2 (Radford et al., 2019), as transformers.GPT2LMHeadModel computes it -----------

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        x = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = x.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:  # the tokens before
            k = cache["k"] = torch.cat((cache["k"], k), dim=2)
            v = cache["v"] = torch.cat((cache["v"], v), dim=2)
        dropout_p = self.attn_pdrop if self.training else 0.0
        # With a filled cache there is one token, which may look at everything before it.
        is_causal = cache is None or T > 1
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
        return self.c_proj(x.transpose(1, 2).reshape(B, T, C))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(config.n_embd, config.n_inner),
            act=nn.GELU(approximate="tanh"),
            c_proj=nn.Linear(config.n_inner, config.n_embd),
        ))
        self.drop = nn.Dropout(config.resid_pdrop)

    def forward(self, x, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))

class GPT(nn.Module):
    """GPT-2. A new one has sinusoids as positions, which are not trained. config: a
    transformers.GPT2Config, which says whether the head is tied; tokenizer: for generate_text."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        config.n_inner = config.n_inner or 4 * config.n_embd
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.n_positions, config.n_embd),
            "drop": nn.Dropout(config.embd_pdrop),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights(config.initializer_range)

    def init_weights(self, std):
        """Biases are 0, matrices N(0, std^2), and c_proj, whose results add up, smaller."""
        n_added = 2 * self.config.n_layer
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=std / math.sqrt(n_added if "c_proj" in name else 1))
        # A sine has a root mean square of 1 / sqrt(2); at 3 std, embeddings do not drown it.
        position = 3 * math.sqrt(2) * std * sinusoid(*self.transformer.wpe.weight.shape)
        self.transformer.wpe.weight = nn.Parameter(position, requires_grad=False)

    def forward(self, input_ids, targets=None, cache=None, last_only=False):
        """Logits (B, T, V) for the token after each of input_ids (B, T), T at most n_positions; or
        (B, 1, V), after the last one. Given targets (B, T): their cross-entropy in nats and the
        number of correct guesses, both summed over the real tokens. With a cache, at first an
        empty_cache, each further call takes one more token."""
        n_cached = 0 if cache is None else cache[0]["k"].size(2)
        if n_cached and input_ids.size(1) > 1:
            raise ValueError("a cache with tokens takes one more at a time")
        positions = torch.arange(n_cached, n_cached + input_ids.size(1), device=input_ids.device)
        x = self.transformer.wte(input_ids) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[i])
        if last_only:
            x = x[:, -1:]
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x)

        x, targets = x.flatten(0, 1), targets.flatten()
        n = self.positions_of_a_piece(x)
        pieces = zip(x.split(n), targets.split(n), strict=True)
        sums = [self.loss(self.lm_head(x), targets) for x, targets in pieces]
        losses, n_correct = zip(*sums, strict=True)
        return sum(losses), sum(n_correct)

    def loss(self, logits, targets):
        """The summed cross-entropy, and the number of correct guesses, of logits (N, V)."""
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        n_correct = (logits.argmax(-1) == targets).sum()
        return loss, n_correct

    def positions_of_a_piece(self, x):
        """Of how many positions logits are made at once. A CPU's memory allocator gives blocks
        above 32 MB back to the system at once, and gets new ones page by page. But each piece makes
        a gradient of the whole head: very short ones are no gain."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return len(x)
        return max(SHORTEST_PIECE, PIECE // self.lm_head.weight.size(0))

    def empty_cache(self, batch_size):
        """A cache for forward: each layer's keys and values (B, H, 0, D) of no tokens."""
        size = (batch_size, self.config.n_head, 0, self.config.n_embd // self.config.n_head)
        empty = self.lm_head.weight.new_empty(size)
        return [{"k": empty, "v": empty} for _ in self.transformer.h]

    def clip_gradients(self, max_norm):
        """Scale all gradients down to this norm, if theirs is larger; returns theirs. (This and the
        next are methods because the folded vocabulary, below, has its own.)"""
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def gpt2_state_dict(self):
        """The weights as transformers.GPT2LMHeadModel has them."""
        return transposed(self.state_dict())

    @property
    def device(self):
        return self.lm_head.weight.device

def sinusoid(n_positions, n_embd):
    """(n_positions, n_embd): sines and cosines by turns; "Attention Is All You Need", 3.5."""
    frequencies = torch.exp(torch.arange(0, n_embd, 2) * (-math.log(10_000) / n_embd))
    angles = torch.arange(n_positions)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :n_embd]

@contextmanager
def evaluation_mode(model):
    """No dropout inside; afterwards the mode that was there before."""
    was_training = model.training
    try:
        yield model.eval()
    finally:
        model.train(was_training)

# --- Generation ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sampling(Flags):
    """How the next token is chosen."""
    method: Literal["greedy", "sample"] = flag("greedy", "take the likeliest token, or draw one")
    temperature: float = flag(1.0, "for sample: below 1 plainer, above 1 wilder", *ABOVE_0)
    top_k: int = flag(0, "for sample: draw from so many likeliest tokens; 0: from all", *AT_LEAST_0)
    top_p: float = flag(
        0.9, "for sample: from the fewest tokens that together have this probability", *TO_1)
    repetition_penalty: float = flag(
        1.0, "above 1: tokens that were there become less likely", *PENALTY)

def generate_text(model, prompt, max_length=50, method="greedy", *, num_samples=1, seed=42,
                  streamer=None, **sampling):
    """The prompt and at most max_length new tokens, up to <|endoftext|>: a str; of several samples
    or a list of prompts, the list of all texts. InputError if a prompt is empty or too long.
    sampling: the other fields of Sampling. Sample i of a prompt is drawn with seed + i, alone or
    among others. streamer, a TextStreamer, gets each token at once. When the context is full, its
    older half is dropped."""
    sampling = Sampling(method=method, **sampling)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    require(prompts, "prompt", prompts, "must be at least one text")
    require(max_length >= 1, "max_length", max_length, "must be at least 1")
    require(num_samples >= 1, "num_samples", num_samples, "must be at least 1")
    n_texts = len(prompts) * num_samples
    require(not streamer or n_texts == 1, "streamer", f"for {n_texts} texts", "it shows one")

    texts = []
    for prompt_ids in [encode_prompt(model, text) for text in prompts]:
        found = continue_ids(model, prompt_ids, max_length, sampling, num_samples, seed, streamer)
        texts += model.tokenizer.batch_decode(found)
    return texts[0] if isinstance(prompt, str) and num_samples == 1 else texts

def encode_prompt(model, prompt):
    """The ids of a prompt, or InputError if it is empty or does not fit."""
    is_text, rule = TEXT
    require(is_text(prompt), "prompt", repr(prompt), f"must be {rule}")
    ids, n_positions = encode(model.tokenizer, prompt), model.config.n_positions
    rule = f"has {len(ids)} tokens, 1 to {n_positions} fit"
    require(0 < len(ids) <= n_positions, "prompt", repr(prompt[:30] + "…"), rule)
    return ids

@torch.no_grad()
def continue_ids(model, prompt_ids, max_length, sampling, num_samples=1, seed=42, streamer=None):
    """num_samples lists: prompt_ids, and up to max_length more."""
    n_positions, end = model.config.n_positions, model.tokenizer.eos_token_id
    ids = torch.tensor([prompt_ids] * num_samples, device=model.device)  # (B, T)
    uniform = None
    if sampling.method == "sample":
        uniform = uniform_numbers(num_samples, max_length, seed).to(model.device)
    if streamer:
        streamer.put(ids.cpu())

    inputs, cache = ids, model.empty_cache(num_samples)
    has_ended = torch.zeros(num_samples, dtype=torch.bool, device=model.device)
    with evaluation_mode(model):
        for i in range(max_length):
            logits = model(inputs, cache=cache, last_only=True)[:, -1]  # (B, V)
            inputs = next_ids(logits, ids, sampling, None if uniform is None else uniform[:, [i]])
            ids = torch.cat((ids, inputs), dim=1)
            has_ended |= inputs[:, 0] == end
            if has_ended.all():
                break
            if streamer:
                streamer.put(inputs[0].cpu())
            if cache[0]["k"].size(2) == n_positions:  # full: continue with the newer half
                inputs, cache = ids[:, -(n_positions // 2) :], model.empty_cache(num_samples)
    if streamer:
        streamer.end()
    new_ids = [row[len(prompt_ids) :] + [end] for row in ids.tolist()]
    return [prompt_ids + row[: row.index(end)] for row in new_ids]

def uniform_numbers(num_samples, n, seed):
    """(B, n) numbers from 0 to below 1. Row i is that of seed + i, on every device."""
    generator = torch.Generator()
    rows = [torch.rand(n, generator=generator.manual_seed(seed + i)) for i in range(num_samples)]
    return torch.stack(rows)

def next_ids(logits, ids, sampling, uniform=None):
    """The ids (B, 1) after ids (B, T), from logits (B, V) and, to sample, uniform numbers (B, 1).
    The penalty is that of Keskar et al., "CTRL: A Conditional Transformer Language Model", 4.1."""
    if sampling.repetition_penalty != 1:
        penalty, seen = sampling.repetition_penalty, logits.gather(1, ids)
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        logits = logits.scatter(1, ids, seen)

    if sampling.method == "greedy":
        return logits.argmax(-1, keepdim=True)
    cumulative = next_probabilities(logits, sampling).float().cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)

def next_probabilities(logits, sampling):
    """Probabilities (B, V) from logits (B, V): temperature, then the top_k likeliest, then the
    nucleus of top_p (Holtzman et al., "The Curious Case of Neural Text Degeneration")."""
    logits = logits - logits.amax(-1, keepdim=True)  # a cold one cannot overflow
    probabilities = (logits / max(sampling.temperature, 1e-30)).softmax(-1)
    ranked, order = probabilities.sort(descending=True)

    ranked[:, sampling.top_k or logits.size(-1) :] = 0
    nucleus = sampling.top_p * ranked.sum(-1, keepdim=True)
    is_out = ranked.cumsum(-1) - ranked >= nucleus  # the likelier tokens are enough
    ranked[:, 1:][is_out[:, 1:]] = 0  # a top_p that is 0 in fp32 leaves the first
    return torch.zeros_like(ranked).scatter(-1, order, ranked / ranked.sum(-1, keepdim=True))

# --- Optimizers ---------------------------------------------------------------------------------

def make_optimizers(model, settings, dtype):
    """Muon for the layers' matrices, AdamW for the rest, at higher rates for embedding and head.
    With --init AdamW alone, at one rate, as it has trained those weights."""
    def group_of(weights, rate, decay=settings.weight_decay):
        return {"params": list(weights), "lr": rate, "peak_lr": rate, "weight_decay": decay}

    def weights_of(module, n_dims):
        return [weight for weight in module.parameters() if weight.dim() == n_dims]

    rate = settings.learning_rate
    vectors = group_of(weights_of(model, n_dims=1), rate, decay=0.0)
    if settings.init:
        groups, muon_groups = [group_of(weights_of(model, n_dims=2), rate), vectors], []
    else:
        embedding = group_of([model.transformer.wte.weight], 10 * rate)
        # A step of all n_embd weights of a logit changes it more in a wider model, so that the rate
        # falls with the width (Yang et al., "Tensor Programs V", 2022, table 3), here beyond 256.
        head = group_of([model.lm_head.weight], min(30, 7_680 / model.config.n_embd) * rate)
        groups = [embedding, head, vectors]

        muon_groups = []
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            of_layers = [block.get_submodule(name).weight for block in model.transformer.h]
            n_parts = 3 if name == "attn.c_attn" else 1  # the matrices of q, k and v
            muon_groups += [group_of(of_layers, settings.muon_learning_rate) | {"n_parts": n_parts}]

    check_that_all_are_trained(model, groups + muon_groups)
    optimizers = {"adamw": torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)}
    if muon_groups:
        optimizers["muon"] = Muon(muon_groups, dtype)
    return optimizers

def check_that_all_are_trained(model, groups):
    """A weight of no group never learns, and its gradient clips the others'."""
    times = Counter(id(weight) for group in groups for weight in group["params"])
    for name, weight in model.named_parameters():
        if weight.requires_grad and times[id(weight)] != 1:
            raise ValueError(f"make_optimizers puts {name} into {times[id(weight)]} groups, not 1")

def groups_of(optimizers):
    return [group for optimizer in optimizers.values() for group in optimizer.param_groups]

def schedule(step, n_steps, warmup_steps):
    """The share of the peak rate at step `step`, from 0: linear warm-up, then linear decay to 0."""
    warmup = min(warmup_steps, n_steps // 10)
    return min((step + 1) / (warmup + 1), (n_steps - step) / (n_steps - warmup))

class Muon(torch.optim.Optimizer):
    """The mean of the last gradients, with all its singular values made about 1: directions that
    are rare in the gradients are learned as fast as common ones (Jordan et al., "Muon: An optimizer
    for hidden layers in neural networks", 2024). Each group is of L matrices of one shape, which
    are n_parts matrices (M, N) one below the other, each made orthogonal for itself.
    torch.optim.Muon computes in bf16 alone, which is very slow on many CPUs."""

    def __init__(self, groups, dtype):
        super().__init__(groups, {"momentum": 0.9, "n_parts": 1})
        self.dtype = dtype  # of the matrix products
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            self.state[weight]["momentum"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            gradients = [weight.grad for weight in weights]
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            # Nesterov's: the mean as if the same gradient had come once more.
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])

            whole = torch.stack(ahead)
            parts = whole.unflatten(1, (group["n_parts"], -1)).flatten(0, 1)  # (L * n_parts, M, N)
            updates = orthogonalize(parts, self.dtype).to(whole.dtype).reshape(whole.shape)

            # In a matrix of more rows than columns, a row would change less.
            n_out, n_in = parts.shape[1:]
            rate = group["lr"] * math.sqrt(max(1, n_out / n_in))
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates.unbind(), alpha=-rate)

# For each iteration (a, b, c): a s + b s^3 + c s^5 pushes singular values s from 0.001 on towards 1
# (Amsel et al., "The Polar Express", 2025). The last is scaled by 0.85: models learn a bit better.
POLAR_EXPRESS = ((8.3042, -23.6599, 16.8731), (4.1026, -2.9311, 0.5262),
                 (3.8958, -2.7935, 0.5115), (2.7758, -2.0060, 0.3958))

def orthogonalize(x, dtype):
    """Matrices (L, M, N) with the singular vectors of x and singular values between 0.36 and 1.33.
    Those below 0.001 of the norm are made at most 400 times as large."""
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT, dtype).mT
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x

# --- Training -----------------------------------------------------------------------------------

# The columns of metrics, which has a row for each optimizer step: sums over its tokens, in all
# processes; the norm of its gradient; its seconds; loss and accuracy on some test stories after it,
# 0 where these are not scored.
COLUMNS = range(7)
LOSS, N_CORRECT, N_TOKENS, NORM, SECONDS, TEST_LOSS, TEST_ACCURACY = COLUMNS

def train(model, train_set, test_set, settings, record, precision):
    """Train to the last step. record: what training.json is to hold, with the epochs so far."""
    device, dtype, n_steps = model.device, DTYPES[precision], record["n_steps"]
    autocast = nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    optimizers = make_optimizers(model, settings, dtype)
    metrics = torch.zeros(n_steps, len(COLUMNS), device=device)
    state = {"model": model, "scaler": scaler} | optimizers
    if record["step"]:
        restore(state, metrics, record)

    part_of_test, scored_steps = choose_part_of_test(test_set, settings, record)
    learner = make_learner(model, train_set, settings, autocast, scaler)
    clear_folders(settings, record)
    batches_of_steps = step_batches(
        train_set.lengths, settings, record["steps_per_epoch"], record["step"])

    signals, last_save = [], time.monotonic()
    with progress_bar(record) as bar, on_signals(signals.append):
        if record["step"] == end_of_epoch(record):  # it was interrupted before its evaluation
            finish_epoch(model, test_set, settings, record, state, metrics)

        for step in range(record["step"], n_steps):
            step_began = time.monotonic()
            # Dropout depends on the step and the process alone.
            torch.manual_seed((settings.seed * 1_000_003 + step) * WORLD_SIZE + RANK)
            for group in groups_of(optimizers):
                group["lr"] = group["peak_lr"] * schedule(step, n_steps, settings.warmup_steps)

            world_batches = next(batches_of_steps)  # those of all processes
            n_tokens = sum(int(train_set.lengths[batch].sum()) for batch in world_batches)
            batches = make_loader(train_set.ids, own_share(world_batches))
            sums = all_reduce_sum(backward(learner, batches, n_tokens, autocast, scaler))
            norm = update(model, optimizers, settings.grad_clip, scaler)
            metrics[step, LOSS], metrics[step, N_CORRECT] = sums
            metrics[step, N_TOKENS], metrics[step, NORM] = n_tokens, norm

            ended, scored = step + 1 == end_of_epoch(record), step in scored_steps
            is_time = step_began - last_save > 60 * settings.save_every
            # Several GPUs would wait for each other: they ask only now and then.
            is_asked = WORLD_SIZE == 1 or device.type == "cpu" or ended or step % 10 == 0
            stop, due = any_process(bool(signals), is_time) if is_asked else (False, False)
            if ended or scored or stop or due or step % 10 == 0:
                check_finite(metrics[: step + 1, :TEST_LOSS], record)  # waits for the device
            metrics[step, SECONDS] = time.monotonic() - step_began
            show_step(bar, step, metrics)

            if scored:
                with autocast:
                    loss, accuracy = evaluate(model, part_of_test)
                metrics[step, TEST_LOSS], metrics[step, TEST_ACCURACY] = loss, accuracy

            if ended or stop or due:  # before finish_epoch: a crash in that costs no training
                save_last(step + 1, settings, record, state, metrics)
                last_save = time.monotonic()
            if stop:
                number = max(signals, default=signal.SIGTERM)  # another process may have got it
                raise KeyboardInterrupt(number, f"saved after step {step + 1:,} of {n_steps:,}")
            if ended:
                finish_epoch(model, test_set, settings, record, state, metrics)

def backward(learner, batches, n_tokens, autocast, scaler):
    """Add up the gradients of the mean loss over n_tokens, the real tokens of all processes, so
    that batches of any size and number make the same update. Returns this process's summed loss and
    number of correct guesses (2,), on its device: nobody waits to see them."""
    sums = 0
    for i, batch in enumerate(batches, 1):
        input_ids, targets = to_device(batch, learner.device)
        is_early = WORLD_SIZE > 1 and i < len(batches)
        with learner.no_sync() if is_early else nullcontext():  # exchanged with the last batch
            with autocast:
                loss, n_correct = learner(input_ids, targets)
            # The exchange divides by WORLD_SIZE.
            scaler.scale(loss * (WORLD_SIZE / n_tokens)).backward()
        sums = sums + torch.stack((loss.detach(), n_correct))
    return sums

def update(model, optimizers, grad_clip, scaler):
    """Clip the gradients, take a step, clear them. Returns their norm: 0 where it overflows in fp16
    and the step is skipped, as long as the scale can be reduced."""
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    norm = model.clip_gradients(grad_clip)
    is_skipped = scaler.is_enabled() and not norm.isfinite()
    for optimizer in optimizers.values():
        if not is_skipped:
            optimizer.step()
        optimizer.zero_grad()
    scaler.update()

    return torch.zeros_like(norm) if is_skipped and scaler.get_scale() >= 1 else norm

def make_learner(model, train_set, settings, autocast, scaler):
    """The model, joined with those of other processes and, if that works, compiled. It is tried on
    the longest stories, so that most lacks of memory show before the first step."""
    learner = model.train()
    if WORLD_SIZE > 1:
        learner = DistributedDataParallel(model, gradient_as_bucket_view=True)
        learner.broadcast_buffers = False  # they never change; PyTorch warns of it as an argument
    longest = np.argsort(train_set.lengths)[-settings.batch_size :]
    batches = make_loader(train_set.ids, [longest])

    def try_out(learner):
        with learner.no_sync() if WORLD_SIZE > 1 else nullcontext():
            backward(learner, batches, 1, autocast, scaler)
        model.zero_grad()

    problem = ""
    if settings.compile == "on" or (settings.compile == "auto" and model.device.type == "cuda"):
        say("compile    the model, which may take a minute or two")
        began = time.monotonic()
        torch.compiler.set_stance("default")
        try:
            compiled = torch.compile(learner, dynamic=True)
            # B and T are two sizes, also if they are equal here.
            with torch.fx.experimental._config.patch(use_duck_shape=False):
                try_out(compiled)
        except RuntimeError as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            say(f"compile    took {time.monotonic() - began:.0f} s")
            torch.compiler.set_stance("eager_on_recompile")  # as for an epoch's smaller last batch
            return compiled

    try_out(learner)  # shows a mistake or a lack of memory, whatever the compiler makes of them
    if problem:
        require(settings.compile == "auto", "compile", "on", f"PyTorch fails: {problem}")
        say(f"compile    off: {problem}")
    return learner

def choose_part_of_test(test_set, settings, record):
    """(loader, steps): the test stories that are scored inside epochs, and after which steps."""
    n_steps = record["n_steps"]
    n_points = min(settings.test_points, n_steps // 10)
    steps = {n_steps * i // n_points - 1 for i in range(1, n_points + 1)}
    return make_test_loader(test_set, settings.batch_size, record["test_part_stories"]), steps

def end_of_epoch(record):
    """The step at which the present epoch ends."""
    return min((len(record["epochs"]) + 1) * record["steps_per_epoch"], record["n_steps"])

def check_finite(metrics, record):
    """Raise InputError if a figure is not finite."""
    if len(bad := (~metrics.isfinite().all(1)).nonzero()):
        if RANK:
            sys.exit(2)  # process 0 says the same
        saved = f"last.pt is good, of step {record['step']}" if record["step"] else "none was saved"
        raise InputError(f"step {int(bad[0]) + 1}: the loss or its gradient is not finite; {saved}"
                         ". Continue with --precision fp32, or --overwrite with smaller rates")

def show_step(bar, step, metrics):
    """Move the bar, and every ten steps show their mean loss and their speed."""
    bar.update()
    if step % 10 == 0:
        sums = metrics[max(0, step - 9) : step + 1].sum(0).tolist()
        loss, speed = sums[LOSS] / sums[N_TOKENS], sums[N_TOKENS] / sums[SECONDS]
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)

def finish_epoch(model, test_set, settings, record, state, metrics):
    """Evaluate, and save: the model before all else."""
    epoch, step = len(record["epochs"]) + 1, end_of_epoch(record)
    test_figures = score(model, test_set, settings.batch_size)  # in fp32 or, on CUDA, TF32
    metrics_so_far = metrics[:step].cpu().double().numpy()
    sums = metrics_so_far[(epoch - 1) * record["steps_per_epoch"] :].sum(0).tolist()
    record["epochs"].append({
        "epoch": epoch, "step": step, "train_loss": sums[LOSS] / sums[N_TOKENS],
        "train_accuracy": sums[N_CORRECT] / sums[N_TOKENS], **test_figures,
        "tokens": int(sums[N_TOKENS]), "seconds": sums[SECONDS]})

    folder = Path(settings.checkpoints, f"epoch_{epoch}")
    if RANK == 0:
        save_checkpoint(folder, model, record)
    save_last(step, settings, record, state, metrics)
    say("epoch {epoch}/{0}  train loss {train_loss:.3f}, accuracy {train_accuracy:.1%}  test loss "
        "{test_loss:.3f}, accuracy {test_accuracy:.1%}, perplexity {test_perplexity:.2f}, "
        "{test_bits_per_byte:.3f} bits per byte  {seconds:,.0f} s"
        .format(settings.epochs, **record["epochs"][-1]))

    if RANK == 0:
        points = curve_points(record, metrics_so_far)
        try:
            write_plots(Path(settings.plots), record, points)
        except Exception as error:  # whatever matplotlib or the disk raise
            say(f"warning    no new plots in {settings.plots}: {error!r}")
        sample = generate_text(model, settings.prompt, max_length=200)
        with whole_or_absent(folder / "sample.txt") as path:  # the last part of an epoch
            path.write_text(sample + "\n", encoding="utf-8")
        say(f"saved {folder}, which begins a story like this:\n\n{sample}\n")

@torch.no_grad()
def evaluate(model, loader):
    """(nats a token, share of correct guesses) over the real tokens, in all processes."""
    sums = 0
    with evaluation_mode(model):
        for batch in loader:
            input_ids, targets = to_device(batch, model.device)
            n_tokens = (targets != IGNORE).sum()
            sums = sums + torch.stack((*model(input_ids, targets), n_tokens)).cpu().double()
    loss, n_correct, n_tokens = all_reduce_sum(sums).tolist()
    return loss / n_tokens, n_correct / n_tokens

def score(model, tokens, batch_size=8):
    """The figures of a model on the stories of Tokens, as an epoch's record has them. Bits per byte
    of text compare models with different tokenizers, on the same stories."""
    if not len(tokens.lengths):
        raise InputError("there are no stories to score")

    loss, accuracy = evaluate(model, make_test_loader(tokens, batch_size))
    n_bits = loss / math.log(2) * tokens.lengths.sum()
    n_bytes = tokens.n_bytes.sum()
    return {"test_loss": loss, "test_perplexity": float(np.exp(loss)), "test_accuracy": accuracy,
            "test_bits_per_byte": float(n_bits / n_bytes) if n_bytes else math.inf}

def compute_perplexity(model, test_loader):
    """exp of the mean cross-entropy of a token, whatever the batch size."""
    return float(np.exp(evaluate(model, test_loader)[0]))

def say_what_is_trained(record, device, precision):
    say("stories    {train_stories:,} to train, {test_stories:,} to test, of {stories:,} from "
        "{source} (--fraction {fraction}); dropped {empty:,} empty ones and {duplicates:,} "
        "duplicates\ntokens     {train_tokens:,} to train; {stories_cut:,} stories were cut "
        "(--n-positions {n_positions})".format(**(record["settings"] | record["data"])))
    say(f"model      {record['parameters'] / 1e6:.3g} M parameters, on {WORLD_SIZE} x {device} in "
        f"{precision}; {record['n_steps']:,} steps")

def progress_bar(record):
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds
    return tqdm(total=record["n_steps"], initial=record["step"], disable=RANK > 0, leave=False,
                dynamic_ncols=True, mininterval=interval, miniters=1)

# --- The folded vocabulary: half the arithmetic. Not needed to understand the rest --------------

class FoldedGPT(GPT):
    """A GPT that keeps one row of embedding and head for all n tokens that no story has.

    Such a token is never an input and never a target: its row of wte gets no gradient, and that of
    its row of lm_head depends on this row alone, so rows that are equal at first stay equal. One
    row can stand for all n: n tokens of one logit z add n exp(z) = exp(z + log n) to the softmax's
    denominator, and the gradient of the row is the sum of their n equal ones. This needs a rule:
    whatever updates wte and lm_head treats all rows alike.

    has_own_row: a mask (V,) of the tokens that do not share, on the CPU like the model, whose
    layers this takes over. R rows are left."""

    def __init__(self, model, has_own_row):
        super(GPT, self).__init__()  # without GPT's own, as there are layers already
        if type(model) is not GPT or len(model.lm_head.weight) != len(has_own_row):
            raise ValueError("only a GPT with a row for each token can be folded, and only once")
        self.config, self.tokenizer = model.config, model.tokenizer
        self.transformer, self.lm_head = model.transformer, model.lm_head
        kept = torch.cat((has_own_row.nonzero(), (~has_own_row).nonzero()[:1])).flatten()
        for layer in (self.transformer.wte, self.lm_head):
            layer.weight = nn.Parameter(layer.weight.detach()[kept])
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

        self.n_shared = max(1, int((~has_own_row).sum()))
        row = torch.where(has_own_row, has_own_row.cumsum(0) - 1, len(kept) - 1)
        log_n = self.lm_head.weight.new_zeros(len(kept))
        log_n[-1] = math.log(self.n_shared)
        self.register_buffer("token_to_row", row, persistent=False)  # (V,)
        self.register_buffer("log_n", log_n, persistent=False)  # (R,), of a row's tokens

    def forward(self, input_ids, targets=None, **options):
        result = super().forward(self.token_to_row[input_ids], targets, **options)
        return result if targets is not None else result[..., self.token_to_row]  # (B, T, V)

    def loss(self, logits, targets):  # (N, R), (N,)
        is_real = targets != IGNORE
        target = self.token_to_row[targets * is_real]
        log_n = self.log_n[target]
        logits = logits.to(self.log_n.dtype)  # not bf16, of which CPUs are slow to find the largest
        # A guess that is the shared row, log n > 0, is one of many tokens, and never correct.
        n_correct = ((logits.argmax(-1) == target) & is_real & (log_n == 0)).sum()
        logits += self.log_n  # each of n tokens has an n-th of their row's probability
        loss = F.cross_entropy(logits, target, reduction="none") + log_n
        return (loss * is_real).sum(), n_correct

    def clip_gradients(self, max_norm):
        # Divided by sqrt(n), the shared row's gradient has the norm of n equal ones; by sqrt(n)
        # again, it is one of these.
        shared = self.lm_head.weight.grad[-1]  # a view
        shared /= math.sqrt(self.n_shared)
        norm = super().clip_gradients(max_norm)
        shared /= math.sqrt(self.n_shared)
        return norm

    def gpt2_state_dict(self):
        weights = super().gpt2_state_dict()
        for name in ("transformer.wte.weight", "lm_head.weight"):
            weights[name] = weights[name][self.token_to_row]
        return weights

def fold_unused_tokens(model, *token_sets):
    """The FoldedGPT of a new model, with a row for each token in some Tokens, and for some more: a
    multiple of 64 rows, whose matrix products are faster."""
    has_own_row = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    for chunk in (chunk for tokens in token_sets for chunk in tokens.ids.chunks):
        has_own_row[torch.from_numpy(chunk.flatten().to_numpy().astype(np.int64))] = True
    n_more = -(int(has_own_row.sum()) + 1) % 64
    has_own_row[(~has_own_row).nonzero()[:n_more]] = True
    return FoldedGPT(model, has_own_row)

def fold_equal_rows(model):
    """The FoldedGPT of a loaded model on the CPU, which writes faster. The largest group of equal
    rows is that with the most frequent number in it."""
    layers, values = (model.transformer.wte, model.lm_head), model.lm_head.weight[:, 0]
    first = (values == values.mode().values).nonzero()[0]
    is_equal = torch.stack([(layer.weight == layer.weight[first]).all(1) for layer in layers])
    return FoldedGPT(model, ~is_equal.all(0)).train(model.training)

# --- Checkpoints: Hugging Face GPT-2 folders, and the point from which a run continues ----------

def transposed(weights):
    """A GPT's weights as GPT2LMHeadModel's, whose matrices are (in, out), or back."""
    names = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: w.T if name.endswith(names) else w for name, w in weights.items()}

def to_gpt2(model):
    """The GPT2LMHeadModel of the same weights. ValueError if it has others."""
    from transformers import GPT2LMHeadModel
    with torch.device("meta"):  # without memory
        gpt2 = GPT2LMHeadModel(model.config)
    try:
        gpt2.load_state_dict(model.gpt2_state_dict(), assign=True)
    except RuntimeError as error:
        raise ValueError("the model cannot be saved: its weights are not a GPT-2's") from error
    gpt2.tie_weights()
    return gpt2

def save_checkpoint(folder, model, record):
    """Write model and tokenizer as transformers does, and the record of the run."""
    from transformers import logging
    logging.disable_progress_bar()
    with whole_or_absent(folder) as new:
        to_gpt2(model).save_pretrained(new)
        model.tokenizer.save_pretrained(new)
        weights = new / "model.safetensors"
        with if_possible("model.safetensors can be read by its owner alone"):
            shutil.copymode(new / "config.json", weights)
        record = record | {"weights_sha256": sha256(weights)}
        (new / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

def sha256(path):
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()

# What a config.json may say of how a GPT-2 computes.
GPT2_MATH = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
             "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
             "add_cross_attention": [False]}
NEEDED_MODEL = "; it must be an epoch's folder, a run's with an epoch, or a GPT-2's Hub id"

def load_checkpoint(name, device="cpu", **changes):
    """The GPT of a GPT-2's folder or Hub id, or of a run's best epoch, in eval mode. changes: other
    values than in its config.json."""
    from transformers import GPT2LMHeadModel, logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    name = best_epoch(name)
    hint = "" if Path(name, "config.json").exists() else NEEDED_MODEL
    config = load_config(name, changes, hint)
    check_sha256(Path(name))
    options = dict(use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    with reading(name, hint, hub_name=name):
        try:
            gpt2, report = GPT2LMHeadModel.from_pretrained(name, config=config, **options)
        except RuntimeError:
            raise ValueError("its weights are not of the sizes in its config.json") from None

    keys = [*report["missing_keys"], *report["unexpected_keys"]]
    if strange := [key for key in keys if not key.endswith((".attn.bias", ".masked_bias"))]:
        raise InputError(f"{name}: missing or unknown tensors, such as {min(strange)}")

    weights = transposed(gpt2.state_dict())
    if bad := [key for key, weight in weights.items() if not weight.isfinite().all()]:
        raise InputError(f"{name}: {bad[0]} holds numbers that are not finite")

    tokenizer = load_tokenizer(str(name), what="the tokenizer of")
    if (n_ids := vocab_size_of(tokenizer)) > config.vocab_size:
        raise InputError(f"{name}: {n_ids} tokens in its tokenizer, {config.vocab_size} in it")

    config.tie_word_embeddings = gpt2.lm_head.weight is gpt2.transformer.wte.weight
    model = GPT(config, tokenizer)
    model.load_state_dict(weights)
    return model.to(device).eval()

def load_config(name, changes, hint):
    from transformers import GPT2Config
    from transformers.utils.peft_utils import find_adapter_config_file
    with reading(name, hint, hub_name=name):
        if find_adapter_config_file(str(name)):
            raise ValueError("it holds an adapter; save PEFT's merge_and_unload() of it instead")
        values = GPT2Config.get_config_dict(name)[0] | changes
        for key in ("auto_map", "task_specific_params"):  # a stranger's code and habits
            values.pop(key, None)
        config = GPT2Config(**values)

    for key, known in GPT2_MATH.items():
        if values.get(key, known[0]) not in known:
            raise InputError(f"{name}: {key} is {values[key]}, but must be {known[0]}")
    if not 0 < config.n_layer < 1000:
        raise InputError(f"{name}: n_layer is {config.n_layer}")
    return config

def check_sha256(folder):
    """Raise InputError if a folder's weights are not those of its training.json."""
    training_json, weights = folder / "training.json", folder / "model.safetensors"
    if not (training_json.is_file() and weights.is_file()):  # somebody else's
        return
    hint = "; without this file, the weights are not checked"
    with reading(training_json, hint):
        expected = json.loads(training_json.read_bytes()).get("weights_sha256")
    if expected not in (None, sha256(weights)):
        raise InputError(f"{weights} is not as it was saved: a failed copy, a pointer of Git LFS? "
                         "If changed on purpose, delete weights_sha256 in training.json")

def save_last(step, settings, record, state, metrics):
    """Save the point from which an interrupted run continues."""
    record["step"] = step
    if RANK == 0:
        last = {name: part.state_dict() for name, part in state.items()}
        last |= {"record": record, "metrics": metrics[:step].clone()}
        last_pt = Path(settings.checkpoints, "last.pt")
        with whole_or_absent(last_pt) as path, open(path, "wb") as file:
            torch.save(last, file)
    any_process(False)  # all wait for process 0: the end of one may end the others

OVERWRITE = "; --overwrite starts over"

def read_last(folder):
    """What save_last saved; an empty record where no run is."""
    path = folder / "last.pt"
    if not (path.exists() or saved_epochs(folder)):
        return {"record": {}}
    with reading(path, OVERWRITE):
        with zipfile.ZipFile(path) as archive:  # whose checksums torch.load does not look at
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        last = torch.load(path, map_location="cpu", weights_only=True)
    record = last.get("record") if isinstance(last, dict) else None
    if not isinstance(record, dict) or "must_match" not in record:
        raise InputError(f"{path}: cannot be read: it is of another program, or version{OVERWRITE}")
    return last

def restore(state, metrics, record):
    """Continue from last.pt. The constants of the optimizers are those of the script."""
    folder = Path(record["settings"]["checkpoints"])
    last = read_last(folder)
    if last["metrics"].size(1) != len(COLUMNS):
        raise InputError(f"{folder}/last.pt: it is of another version of the script{OVERWRITE}")
    say(f"continuing the interrupted run from its last save, after step {record['step']:,}")
    if last["record"]["script_sha256"] != record["script_sha256"]:
        say("script     has changed since the last save, and trains as it is now")

    optimizers = {name: part for name, part in state.items()
                  if isinstance(part, torch.optim.Optimizer)}
    constants = [dict(group) for group in groups_of(optimizers)]
    for name, part in state.items():
        try:
            part.load_state_dict(last[name] or part.state_dict())  # of a scaler not used it is {}
        except (KeyError, ValueError, RuntimeError) as error:  # of another model
            raise InputError(f"{folder}/last.pt: cannot be read: {error}{OVERWRITE}") from error
    for group, values in zip(groups_of(optimizers), constants, strict=True):
        group.update(values, lr=group["lr"])

    metrics[: record["step"]] = last["metrics"]

def saved_epochs(folder):
    """The folders of a run's epochs, in their order."""
    epochs = [path for path in Path(folder).glob("*") if re.fullmatch(r"epoch_\d+", path.name)]
    return sorted(epochs, key=lambda path: int(path.name[6:]))

def best_epoch(folder):
    """A run's epoch of the lowest test loss; of another folder, itself."""
    def lowest(epoch):
        with reading(epoch, "; another epoch can be named instead of the run"):
            return json.loads((epoch / "training.json").read_bytes())["epochs"][-1]["test_loss"]

    epochs = [] if Path(folder, "config.json").exists() else saved_epochs(folder)
    return min(epochs, key=lowest, default=folder)

@contextmanager
def whole_or_absent(path):
    """Inside, a file or folder is written under the name that this yields; afterwards it is on the
    disk as path. Where anything fails, an older one stays."""
    new = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        yield new
        for part in (*new.rglob("*"), new):
            flush(part)
        if path.is_dir():
            remove(path)
        new.replace(path)
        flush(path.parent)
    except BaseException as error:
        remove(new)  # which may be what filled the disk
        # torch.save raises a RuntimeError while it handles the system's error; libraries in Rust
        # raise one with its text.
        why = error.__context__ if type(error) is RuntimeError else error
        if not isinstance(why, OSError) and not re.search(r"\(os error|Os \{", str(why)):
            raise
        message = f"{path} cannot be saved, what was saved before is kept: {why}"
        raise OSError(message) from error

def flush(path):
    """Wait until a file or, where that is possible, a folder is on the disk."""
    is_folder = path.is_dir()
    with if_possible("a power cut may undo a save") if is_folder else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

@contextmanager
def if_possible(consequence):
    """Around what a run can do without, if a file system refuses it: the consequence is said."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", "") or error  # without a path, to be said once
        say_once(f"warning    {consequence}: {why}")

def remove(path):
    shutil.rmtree(path, ignore_errors=True)  # which is for folders
    path.unlink(missing_ok=True)

# --- Plots --------------------------------------------------------------------------------------

def write_plots(folder, record, points):
    """Write a run's training_metrics.csv and .png."""
    with (whole_or_absent(folder / "training_metrics.csv") as path,
          open(path, "w", encoding="utf-8", newline="") as file):
        writer = csv.writer(file)
        writer.writerow(points[0])
        for point in points:
            writer.writerow(f"{value:.7g}" if isinstance(value, float) else value
                            for value in point.values())

    os.environ.pop("MPLBACKEND", None)  # none is needed, and this one may be missing
    import matplotlib.style
    with matplotlib.style.context("default"):  # whatever the user's settings are
        figure = draw(record, points)
        with whole_or_absent(folder / "training_metrics.png") as path:
            figure.savefig(path, format="png", dpi=120)

def curve_points(record, metrics):
    """The rows of training_metrics.csv, dicts: of some 200 steps, of the last ones of epochs, and
    of those with scores of test stories. The training's figures are means over the ten steps up to
    this one, or over more in a long run. Those that are not there are None."""
    n_steps, settings = record["n_steps"], record["settings"]
    every = math.ceil(n_steps / 200)
    epochs = {epoch["step"]: epoch for epoch in record["epochs"]}
    steps_scored = (np.flatnonzero(metrics[:, TEST_LOSS]) + 1).tolist()
    so_far = metrics.cumsum(0)

    points = []
    for step in sorted({*range(every, len(metrics) + 1, every), *steps_scored, *epochs}):
        some = metrics[max(0, step - max(10, every)) : step]
        sums, epoch = some.sum(0), epochs.get(step, {})
        scored = metrics[step - 1] if step in steps_scored else [None] * len(COLUMNS)
        rate = settings["learning_rate"] * schedule(step - 1, n_steps, settings["warmup_steps"])
        points.append({
            "step": step,
            "epoch": math.ceil(step / record["steps_per_epoch"]),
            "tokens": int(so_far[step - 1, N_TOKENS]),
            "minutes": so_far[step - 1, SECONDS] / 60,
            "train_loss": sums[LOSS] / sums[N_TOKENS],
            "train_accuracy": sums[N_CORRECT] / sums[N_TOKENS],
            "grad_norm": sums[NORM] / len(some),
            "learning_rate": rate,
            "tokens_per_second": sums[N_TOKENS] / sums[SECONDS],
            "test_part_loss": scored[TEST_LOSS],
            "test_part_accuracy": scored[TEST_ACCURACY],
            "test_loss": epoch.get("test_loss"),
            "test_accuracy": epoch.get("test_accuracy"),
            "test_perplexity": epoch.get("test_perplexity"),
            "test_bits_per_byte": epoch.get("test_bits_per_byte"),
            "grad_norm_max": some[:, NORM].max(),
        })
    return points

def draw(record, points):
    """The figure of a run: four panels of curves through its points."""
    from matplotlib.figure import Figure
    figure, last = Figure(figsize=(10, 7.5), layout="constrained"), record["epochs"][-1]
    figure.suptitle(title_of(record), parse_math=False)
    figure.supxlabel("optimizer step", size="medium")
    (loss, accuracy), (perplexity, rate) = figure.subplots(2, 2, sharex=True)
    norm = rate.twinx()
    columns = {name: np.array([point[name] for point in points], float) for name in points[0]}
    columns["test_part_perplexity"] = np.exp(columns["test_part_loss"])

    training, some = ("C0", "training"), ("C1.-", f"{record['test_part_stories']} test stories")
    all_last = f"all {record['data']['test_stories']:,}, last"
    draw_panel(loss, "Loss", "cross-entropy, nats a token", columns,
               train_loss=training, test_part_loss=some,
               test_loss=("C1o", f"{all_last} {last['test_loss']:.3g}"))
    draw_panel(accuracy, "Accuracy", "share of next tokens guessed right", columns,
               train_accuracy=training, test_part_accuracy=some,
               test_accuracy=("C1o", f"{all_last} {last['test_accuracy']:.1%}"))
    draw_panel(perplexity, "Perplexity", "exp of the test loss", columns,
               test_part_perplexity=some,
               test_perplexity=("C1o", f"{all_last} {last['test_perplexity']:.2f},\n"
                                       f"or {last['test_bits_per_byte']:.3f} bits per byte"))

    if (clip := record["settings"]["grad_clip"]) < columns["grad_norm_max"].max():
        norm.axhline(clip, color="grey", linewidth=1, label="clipped above")
    draw_panel(norm, "Gradient and learning rate", "norm of the gradient", columns,
               grad_norm_max=("C2:", "largest"), grad_norm=("C2", "mean"))
    rate.plot(columns["step"], columns["learning_rate"], "C3", linewidth=1)
    rate.set_ylabel("learning rate", color="C3")
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    return figure

def draw_panel(axes, title, unit, columns, **curves):
    """Draw columns, by name, where they have figures: each with its (style, label)."""
    for name, (style, label) in curves.items():
        is_there = np.isfinite(columns[name])
        steps, values = columns["step"][is_there], columns[name][is_there]
        if len(steps):
            size = min(4, 200 / len(steps))
            axes.plot(steps, values, style, linewidth=1, markersize=size, label=label)

    axes.set(title=title, ylabel=unit)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    low, high = axes.dataLim.intervaly
    if high > max(1, 3 * low) and low > 0:
        axes.set_yscale("log", subs=(2, 3, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")

def title_of(record):
    from matplotlib.font_manager import findfont, get_font
    text = "{0:.3g} M parameters, {train_stories:,} training stories"
    letters = get_font(findfont("DejaVu Sans")).get_charmap()
    if all(ord(letter) in letters for letter in record["data"]["source"]):
        text += " from {source:.80}"
    return text.format(record["parameters"] / 1e6, **record["data"])

# --- Main ---------------------------------------------------------------------------------------

def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    device, precision = pick_device(settings.device, settings.precision)
    if (device, precision) == ("cpu", "bf16"):  # fp32 is slower with huge pages
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at the first tensor
    start_processes(device)
    folder, plots = Path(settings.checkpoints), Path(settings.plots)
    with locked(folder), locked(plots):
        with first_process_first():  # the others find what it has downloaded and tokenised
            before = {} if settings.overwrite else read_last(folder)["record"]
            refuse_another_run(before, must_match(settings), folder)
            # A run that began with the built-in stories for want of others keeps to them.
            had_built_in = before and before["data"]["source"] == BUILT_IN
            data = "sample" if settings.data == "auto" and had_built_in else settings.data
            base = load_base(settings) if settings.init else None
            train_set, test_set, tokenizer, counts = prepare_data(
                settings, data, base and base.tokenizer)
            record = new_record(settings, counts, before)
            refuse_another_run(before, record["must_match"], folder)
        check_that_processes_agree([record["must_match"], record["step"]])
        if record["epochs"] and record["epochs"][-1]["step"] == record["n_steps"]:
            say(f"{folder} holds this run, and it is finished; {result(record)}")
            return

        require(os.access(folder, os.W_OK), "checkpoints", folder, "cannot be written")
        torch.manual_seed(settings.seed)
        model = base or GPT(model_config(settings, tokenizer), tokenizer)
        record["parameters"] = sum(weight.numel() for weight in model.parameters())
        # What would fail after an epoch had better fail now: the sample, saving, and loading.
        encode_prompt(model, settings.prompt)
        model.load_state_dict(transposed(to_gpt2(model).state_dict()))
        model = base or fold_unused_tokens(model, train_set, test_set)

        say_what_is_trained(record, device, precision)
        train(model.to(device), train_set, test_set, settings, record, precision)
        say(result(record))

def must_match(settings):
    """What may not change when a run continues, but for the stories."""
    kept = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    return kept | {"accum_steps x processes": settings.accum_steps * WORLD_SIZE}

def refuse_another_run(before, now, folder):
    """Raise InputError if the record before has other values than now."""
    then = before.get("must_match", now)
    differences = [f"{name} was {then.get(name)}, is {value}" for name, value in now.items()
                   if then.get(name) != value]
    if differences:
        raise InputError(f"{folder} holds another run ({', '.join(differences)}){OVERWRITE}, other "
                         "--checkpoints and --plots keep it")

def load_base(settings):
    """The model of --init, all of whose weights will be trained."""
    name, epochs = best_epoch(settings.init), saved_epochs(Path(settings.checkpoints).resolve())
    rule = "would be overwritten; take other --checkpoints and --plots"
    require(Path(name).resolve() not in epochs, "init", settings.init, rule)
    say(f"init       {name}")
    model = load_checkpoint(name, **dropout_rates(settings))
    n, most = settings.n_positions, model.config.n_positions
    require(n <= most, "n_positions", n, f"--init {settings.init} has {most}, which is the most")
    model.transformer.wpe.weight.requires_grad_()
    model.config.update(end_tokens(model.tokenizer))
    return model

def model_config(settings, tokenizer):
    from transformers import GPT2Config
    names = ("n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    return GPT2Config(  # n_ctx is for llama.cpp's converter
        **{name: getattr(settings, name) for name in names}, n_ctx=settings.n_positions,
        **dropout_rates(settings), **end_tokens(tokenizer), vocab_size=vocab_size_of(tokenizer),
        tie_word_embeddings=False)

def end_tokens(tokenizer):
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)

def dropout_rates(settings):
    return dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout)

def new_record(settings, counts, before):
    """What training.json holds; of a run that continues, with its step and epochs."""
    stories_per_step = settings.batch_size * settings.accum_steps * WORLD_SIZE
    steps_per_epoch = math.ceil(counts["train_stories"] / stories_per_step)
    n_steps = min(settings.max_steps or math.inf, settings.epochs * steps_per_epoch)
    # Scored 20 times, without a backward pass, these take about a hundredth of the run's time.
    n_scored = min(256, max(16, n_steps * stories_per_step // 667), counts["test_stories"])

    of_data = {"number of stories": counts["stories"],
               "fingerprint of the stories": counts["fingerprint"],
               "fingerprint of the tokenizer": counts["tokenizer"]}
    versions = {name: str(sys.modules[name].__version__)
                for name in ("torch", "transformers", "datasets")}

    step, epochs = before.get("step", 0), before.get("epochs", [])
    last_sample = Path(settings.checkpoints, f"epoch_{len(epochs)}", "sample.txt")
    if epochs and step == epochs[-1]["step"] and not last_sample.exists():
        epochs = epochs[:-1]  # interrupted while it was saved: it is evaluated and saved again
    return {
        "settings": asdict(settings), "processes": WORLD_SIZE, "data": counts,
        "must_match": must_match(settings) | of_data,
        "n_steps": n_steps, "steps_per_epoch": steps_per_epoch, "test_part_stories": n_scored,
        "step": step, "epochs": epochs,
        "script_sha256": sha256(__file__),
        "versions": versions | {"python": sys.version.split()[0]},
    }

def clear_folders(settings, record):
    """With --overwrite, remove the run that is there. Warn if it replaces another's plots."""
    plots, is_new = Path(settings.plots), not record["step"]
    if is_new and not saved_epochs(settings.checkpoints) and any(plots.glob("training_metrics.*")):
        say(f"warning    replaces the plots of another run in {plots}; other --plots keep them")
    if settings.overwrite and RANK == 0:
        for path in (Path(settings.checkpoints, "last.pt"), *saved_epochs(settings.checkpoints)):
            remove(path)

def result(record):
    """What to say at the end of a run."""
    final = record["epochs"][-1]["test_perplexity"]
    best = min(record["epochs"], key=lambda epoch: epoch["test_loss"])
    return ("test perplexity {0:.2f} on {source}, lowest in epoch {epoch}, {test_perplexity:.2f}; "
            "see {plots}\n"
            "next: python gpt2_generate.py --model {checkpoints}/epoch_{epoch}"
            .format(final, source=record["data"]["source"], **best, **record["settings"]))

# --- Small print: command line, errors, signals, lock, devices, processes, network ---------------

def parse(flags_class, description, argv=None):
    """The command line as a dataclass of flags; a tuple is a flag that can be repeated."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=description, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    kinds = {bool: {"action": "store_true"}, tuple: {"action": "append"}}
    for f in fields(flags_class):
        choices = get_args(f.type)
        kind = {"choices": choices} if choices else kinds.get(f.type, {"type": f.type})
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = vars(parser.parse_args(argv))
    if given.get("init"):
        rule = f"cannot be chosen with --init {given['init']}"
        for name in sorted(NOT_WITH_INIT):
            require(name not in given, name, given.get(name), rule)
    return flags_class(**given)

NO_MEMORY = "MemoryError|out of memory|(allocate|enough) memory|bad_alloc"  # also RuntimeErrors

@contextmanager
def reading(what, hint="", hub_name=None):
    """Around a library's call that reads something of the user's: an error becomes one line, from
    what to hint. hub_name: a path, or else a name on the Hub. Not around our own code, whose
    mistakes are to show where they are."""
    is_here = not hub_name or Path(hub_name).exists()
    is_offline = not is_here and not hub_answers()
    try:
        yield
    except Exception as error:  # each kind of broken file raises another
        if re.search(NO_MEMORY, repr(error)):
            raise
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"{what}: {cause}") from error
        why = f"no {cause} in it" if isinstance(cause, KeyError) else str(cause)
        why = why.partition(". ")[0]  # torch continues with bad advice
        problem = "cannot be read:" if is_here else "no such file or folder; on the Hub:"
        if hub_name and Path(hub_name).is_dir():  # which may hide a name on the Hub
            problem = "the local folder cannot be read:"
        if is_offline:
            problem, why = "no such file or folder,", "and the Hugging Face Hub cannot be reached"
        raise InputError(f"{what}: {problem} {why}{hint}") from error

def hub_answers():
    """Whether the Hub can be reached, within 10 s. If not, its libraries are told to use their
    caches alone, instead of trying again for minutes."""
    from huggingface_hub import constants, get_session
    try:  # in a thread, as the look-up of a host has no time limit
        ThreadPool(1).apply_async(get_session().head, [constants.ENDPOINT], {"timeout": 8}).get(10)
    except Exception:  # of its HTTP library, which changes
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE

def say(text):
    """Print, from process 0 alone, above a progress bar."""
    if RANK == 0:
        tqdm.write(text)

@lru_cache
def say_once(text):
    say(text)

class Output:
    """A stream that takes text even where the terminal has gone, or a log's disk is full."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno == errno.EPIPE:  # of a reader, such as head, that wants no more
                raise

    def flush(self):
        pass  # it is done

FEWER_TOKENS = "halve --batch-size and double --accum-steps (it is another run then: --overwrite)"

def run(main, after_interrupt="", after_no_memory=FEWER_TOKENS):
    """Call main(). A user's mistake is shown as one line; other errors show a traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # closed, or none, as in a service
        if hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(errors="replace")  # what a terminal cannot show or sent
        setattr(sys, name, stream if mode == "r" else Output(stream))
    tqdm.set_lock(RLock())  # its own one holds a semaphore, which os._exit would leave behind
    try:
        if sys.flags.optimize > 1:
            raise InputError("transformers needs docstrings: python -O, not -OO")
        # torchrun's SIGTERM, which ends the others when one has failed, needs no message.
        with on_signals(interrupt) if WORLD_SIZE == 1 else nullcontext():
            main()
        if dist.is_initialized():
            any_process(False)  # all wait for process 0, which may still be saving
            os._exit(0)  # a late thread of gloo would abort a usual end
        return
    except BrokenPipeError:  # the reader of the output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt as error:
        number, text = error.args or (signal.SIGINT, "interrupted")
        message, code = text + after_interrupt, 128 + number
    except (InputError, OSError) as error:  # OSError: a full disk
        message, code = str(error), 2 if isinstance(error, InputError) else 1
    except (MemoryError, RuntimeError) as error:
        if not re.search(NO_MEMORY, repr(error)):
            raise
        message, code = f"out of memory; {after_no_memory}", 2
    if RANK == 0 or (dist.is_initialized() and code < 128):  # at first, all say the same
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)

def interrupt(number):
    raise KeyboardInterrupt(number, "interrupted")

SAME_SIGNAL = 1  # seconds; another signal within them is the same one

@contextmanager
def on_signals(handle):
    """Inside, the first Ctrl-C, SIGTERM or SIGHUP calls handle, unless ignored, as under nohup. A
    second one ends the process at once; but within a second it is the same one, as torchrun, Slurm
    and systemd send one each."""
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    noted = []

    def handler(number, _frame):  # called when PyTorch has finished what it is computing
        if not noted:
            noted.append(number)
            handle(number)  # may raise
            try:
                os.write(2, b"" if RANK else b"\nstopping after this step; once more: at once\n")
            except OSError:  # the terminal has gone, and nothing may fail for that now
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def watch():  # a thread gets the number of each signal at once
        first = math.inf
        for number in iter(lambda: out.recv(1), b""):
            if number[0] not in heard:
                continue
            if time.monotonic() - first > SAME_SIGNAL:
                os._exit(128 + number[0])
            first = min(first, time.monotonic())
        out.close()

    into, out = socketpair()  # which Windows has, too
    into.setblocking(False)
    Thread(target=watch, daemon=True).start()
    earlier_fd = signal.set_wakeup_fd(into.fileno())
    earlier = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, earlier[number])
        signal.set_wakeup_fd(earlier_fd)
        into.close()  # ends the thread

@contextmanager
def locked(folder):
    """Keep other runs out of a folder. The lock ends with its process."""
    from filelock import FileLock, Timeout
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--checkpoints or --plots: {error}") from error
    lock = FileLock(folder.resolve() / ".lock", blocking=False, is_singleton=True)
    with if_possible(f"a second run in {folder} would not be noticed"):
        try:
            if RANK == 0:
                lock.acquire()
        except Timeout:
            rule = "another run is writing there; take other --checkpoints and --plots"
            raise InputError(f"{folder}: {rule}") from None
    try:
        yield
    finally:
        lock.release()

def pick_device(device, precision):
    """(device, precision) for auto: cuda, mps or cpu; bf16 where the hardware multiplies it fast,
    fp16 on a GPU without it, else fp32. Each process takes a GPU of its own."""
    n_gpus, n_processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    mps = torch.backends.mps.is_available() and n_processes == 1
    there = {"cuda": n_gpus >= n_processes, "mps": mps, "cpu": True}
    is_chosen = device != "auto"
    if not is_chosen:
        device = "cuda" if n_gpus else "mps" if mps else "cpu"
    rule = f"not for {n_processes} processes, as PyTorch finds {n_gpus} GPUs; use cpu"
    require(there[device], "device", device, rule)
    if device == "cuda" and (problem := problem_of_gpu()):
        if RANK:  # the others may have no problem
            print(f"process {RANK}: {problem}", file=sys.stderr)
        is_in_use = re.search(f"{NO_MEMORY}|busy", problem)  # by another program
        may_go_on = not is_chosen and not is_in_use and WORLD_SIZE == 1
        require(may_go_on, "device", device, f"{problem}; use cpu")
        say(f"warning    the GPU is not used: {problem}")
        device = "cpu"
    require(precision != "fp16" or device == "cuda", "precision", precision, f"not on {device}")

    # The function with a public name came with PyTorch 2.11. A CPU with AMX has AVX512_BF16, too.
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    best = "bf16" if device == "cpu" and has_bf16 else "fp32"
    if device == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")  # or TF32
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, best if precision == "auto" else precision

def problem_of_gpu():
    """Take this process's GPU; why it cannot be used, such as a driver that is too old, or ""."""
    try:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
        torch.ones(1, device="cuda").item()
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        return str(error).partition("\n")[0]
    return ""

def start_processes(device):
    """Let the processes of torchrun exchange tensors. In training, one that has lost the others
    waits for PyTorch's usual 30 minutes."""
    if WORLD_SIZE > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        try:
            dist.init_process_group(backend)
        except ValueError as error:
            raise InputError(f"WORLD_SIZE is set, but not by torchrun: {error}") from error

@contextmanager
def first_process_first():
    """Process 0 runs the block, then the others, unless it has failed."""
    patient = None
    if WORLD_SIZE > 1:
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6))  # of a download
    if RANK > 0 and any_process(False, group=patient) == [True]:
        sys.exit(1)  # process 0 says why
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        if RANK == 0:
            any_process(has_failed, group=patient)

def all_reduce_sum(tensor, group=None):
    """Sum a tensor over all processes, in its place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, group=group)
    return tensor

def any_process(*conditions, group=None):
    """Of each condition, whether it holds in any process."""
    n_processes = all_reduce_sum(torch.tensor(conditions, dtype=torch.int), group)
    return [n > 0 for n in n_processes.tolist()]

def check_that_processes_agree(prepared):
    """Raise InputError if processes have prepared different things."""
    found = [prepared] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(found, prepared)
    if any(other != prepared for other in found):
        raise InputError("the processes have found different stories: share the folders")

def own_share(batches):
    """The batches of this process. All have as many: some get an empty one at the end."""
    n_missing = -len(batches) % WORLD_SIZE
    return (batches + [batches[0][:0]] * n_missing)[RANK::WORLD_SIZE]

if __name__ == "__main__":
    run(main, "; the same command, without --overwrite, continues from the last save, if any")
