# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13,<2.14", "transformers>=5.24,<6", "datasets>=5.2,<6",
#                 "matplotlib>=3.11,<4", "tqdm>=4.70,<5"]
# ///
"""Train a small GPT-2 on TinyStories: one file, made to be read from top to bottom.

    python gpt2_tinystories.py                                                     the defaults
    python gpt2_tinystories.py --data my.txt --fraction 1 --tokenizer bpe:4096     your stories
    python gpt2_tinystories.py --init gpt2 --learning-rate 1e-4                    from a GPT-2
    torchrun --nproc-per-node 8 gpt2_tinystories.py                                8 GPUs

The stories are those in ./tinystories_local, else TinyStories, downloaded, else built-in ones. Each
epoch leaves checkpoints/epoch_N, a Hugging Face GPT-2 folder with a sample story, and plots/. The
same command again continues an interrupted run. python gpt2_generate.py writes stories.

Shapes in the comments: B stories in a batch, T tokens in a story, C = n_embd, H = n_head,
D = C / H, V = vocab_size, R <= V rows of the embedding: tokens of no story share one (GPT.fold).
"""

import argparse
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
from collections import namedtuple
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from hashlib import blake2b, file_digest
from itertools import count, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# transformers, datasets and matplotlib are imported where they are used: importing this is quick.
HUB_STORIES, LOCAL_STORIES = "roneneldan/TinyStories", Path("tinystories_local")
BUILT_IN, N_BUILT_IN = "built-in stories", 12_000
END_OF_STORY = "<|endoftext|>"
IGNORE = -100  # the target of padding
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANK = int(os.environ.get("RANK", 0))  # of this process: the first one alone prints and writes
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # processes

# --- Settings: a field is a flag, a row of the README's table, an entry in training.json --------

class InputError(ValueError):
    """A mistake that the user can mend: shown as one line, exit code 2."""

def require(condition, name, value, rule):
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} {value}: {rule}")

RULES = {
    "x >= 1": "n_embd n_layer n_head n_inner epochs batch_size accum_steps max_length num_samples",
    "x >= 2": "n_positions",
    "x % n_head == 0 and x % 2 == 0": "n_embd",
    "0 <= x < inf": "warmup_steps weight_decay max_steps save_every top_k",
    "0 < x < inf": "learning_rate muon_learning_rate grad_clip temperature repetition_penalty",
    "0 < x < 1": "test_fraction",
    "0 < x <= 1": "fraction top_p",
    "0 <= x < 1": "dropout",
    "x is None or 0 <= x < 2**32": "seed",
    "x in ('greedy', 'sample')": "method",
}

def check_rules(settings):
    """Raise InputError for the first of settings, a dict, that breaks its rule."""
    for rule, names in RULES.items():
        for name in settings.keys() & names.split():
            own = re.sub(r"\bx\b", name, rule)
            require(eval(own, vars(math) | settings), name, settings[name], f"the rule is {own}")

def flag(default, help):
    return field(default=default, metadata={"help": help})

@dataclass(frozen=True)
class Settings:
    data: str = flag("auto", "auto, sample, a save_to_disk folder, a file, or a Hub id")
    fraction: float = flag(0.1, "share of the stories that is used")
    test_fraction: float = flag(0.1, "share of those that is held out for testing")
    tokenizer: str = flag("auto", "Hub id, folder, bpe:SIZE; auto: gpt2, or bpe:4096 for sample")
    init: str = flag("", "GPT-2 to tune, folder or Hub id; it brings its sizes and tokenizer")
    n_positions: int = flag(256, "longest story in tokens; longer ones are cut")
    n_embd: int = flag(768, "width of the model")
    n_layer: int = flag(2, "decoder layers")
    n_head: int = flag(12, "attention heads of a layer")
    n_inner: int = flag(1536, "width of the feed-forward layers")
    dropout: float = flag(0.0, "share of the activations dropped in training")
    epochs: int = flag(5, "passes over the training stories")
    batch_size: int = flag(8, "stories in a batch, in each process")
    accum_steps: int = flag(2, "batches accumulated in an optimizer step")
    learning_rate: float = flag(3e-4, "peak rate of AdamW; tenfold for embedding and head")
    muon_learning_rate: float = flag(0.02, "peak rate of Muon, for the matrices of the layers")
    warmup_steps: int = flag(100, "steps of linear warm-up, at most a tenth; then linear decay")
    weight_decay: float = flag(0.1, "weight decay of the matrices")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    seed: int = flag(42, "seed of everything random")
    max_steps: int = flag(0, "stop after so many optimizer steps; 0: after all epochs")
    save_every: float = flag(10.0, "minutes between saves inside an epoch")
    device: Literal["auto", "cuda", "cpu", "mps"] = flag("auto", "where to compute")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "format of matrix products")
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile; auto: on a CUDA GPU")
    checkpoints: str = flag("checkpoints", "folder of the checkpoints")
    plots: str = flag("plots", "folder of the plots")
    overwrite: bool = flag(False, "start over although a run is there")
    prompt: str = flag("Once upon a time, in a small village", "beginning of the samples")

    def __post_init__(self):
        check_rules(asdict(self))
        for name in ("tokenizer", "n_embd", "n_layer", "n_head", "n_inner", "muon_learning_rate"):
            is_free = not self.init or getattr(self, name) == getattr(Settings, name)
            require(is_free, name, getattr(self, name), f"cannot be chosen with --init {self.init}")

# --- Data: stories, tokenizer, token ids, batches of similar length -----------------------------

NEEDED = ("; it must be a save_to_disk folder, a .txt or .jsonl file in UTF-8, .parquet files or a "
          "Hub id, with strings in a column `text`; of splits, `train` is taken")

def load_stories(data, cache_dir):
    """A datasets.Dataset of one column, `text`, and the name of its source."""
    from datasets import Dataset, concatenate_datasets, load_dataset
    if data == "auto":
        data = default_stories(cache_dir)
    if data == "sample":
        from sample_stories import sample_stories
        return Dataset.from_dict({"text": list(sample_stories(N_BUILT_IN))}), BUILT_IN
    path = Path(data)
    saved = path / "train" if (path / "train" / "state.json").exists() else path  # a DatasetDict
    is_saved = (saved / "state.json").exists()
    if path.exists() and not is_saved:
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        inside = ((file, file.relative_to(path).parts) for file in files)
        files = [file for file, parts in inside if "train" in [p[:5] for p in parts]] or files
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        file = Path(cache_dir, f"stories-{digest(repr(stats).encode())}.arrow")
        return arrow_file(file, {"text": "large_string"}, read_files(data, files)), path.name
    with reading(data, f"--data {data}", NEEDED if is_saved else ""):
        if is_saved:
            parts = json.loads((saved / "state.json").read_text("utf-8"))["_data_files"]
            parts = [Dataset.from_file(str(saved / part["filename"])) for part in parts]
            stories = concatenate_datasets(parts)
        else:
            stories = load_dataset(path.as_posix(), split="train")
        stories = stories.select_columns("text")
        if "string" not in getattr(stories.features["text"], "dtype", ""):
            raise ValueError(f"`text` has {stories.features['text']}")
    return stories, (path.name if is_saved else data)

def default_stories(cache_dir):
    """./tinystories_local, downloaded if need be; "sample" where that is not possible."""
    if RANK == 0 and not LOCAL_STORIES.exists():
        say(f"stories    looking for {HUB_STORIES} on the Hugging Face Hub (1 GB, kept here)")
        try:
            stories, _ = load_stories(HUB_STORIES, cache_dir)
            with whole_or_absent(LOCAL_STORIES) as folder:
                stories.save_to_disk(folder)
        except InputError as error:
            say(f"{'=' * 99}\nTHE BUILT-IN STORIES are used: no ./{LOCAL_STORIES} here and no "
                f"download:\n{error}\nOnce the folder is there, use --overwrite.\n{'=' * 99}")
    return str(LOCAL_STORIES) if LOCAL_STORIES.exists() else "sample"

def read_files(data, files):
    """Yield the stories of .txt, .jsonl or .parquet files, 100 at a time, as an Arrow column."""
    import pyarrow
    readers = {".txt": read_text, ".jsonl": read_lines, ".parquet": read_table}
    with reading(data, f"--data {data}", NEEDED):
        if not files or files[0].suffix.lower() not in readers:
            raise ValueError("no stories are there in a known format or split")
        texts = (text for file in files for text in readers[file.suffix.lower()](file))
        while batch := list(islice(texts, 100)):
            yield {"text": pyarrow.array(batch, pyarrow.large_string())}

def read_text(path):
    """Yield the stories of a text file, separated by <|endoftext|>."""
    rest = ""
    with open(path, encoding="utf-8") as file:
        while part := file.read(max(1 << 20, len(rest))):  # so that a long story takes linear time
            *stories, rest = (rest + part).split(END_OF_STORY)
            yield from stories
    yield from [rest] if rest.strip() else []

def read_lines(path):
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                yield from [json.loads(line)["text"]] if line.strip() else []
            except json.JSONDecodeError as error:  # which takes each line for the first
                raise ValueError(f"line {number}: {error.msg}") from None

def read_table(path):
    from pyarrow.parquet import ParquetFile
    with open(path, "rb") as file:
        for rows in ParquetFile(file).iter_batches(100, columns=["text"]):
            yield from rows.column("text").to_pylist()

def arrow_file(file, schema, batches):
    """The datasets.Dataset in an Arrow file, written from batches of columns if it is not there."""
    import pyarrow
    from datasets import Dataset
    if not file.exists():
        schema = pyarrow.schema(list(schema.items()))
        with (whole_or_absent(file) as new, pyarrow.OSFile(str(new), "wb") as sink,
              pyarrow.ipc.new_stream(sink, schema) as writer):
            for batch in batches:
                writer.write_batch(pyarrow.record_batch(batch, schema))
    with reading(file, file, "; delete it"):
        return Dataset.from_file(str(file))

def clean(text):
    """A story without white space, byte-order marks and written <|endoftext|> at its ends."""
    before = None
    while text != before:
        before, text = text, text.strip().strip("\ufeff")
        text = text.removeprefix(END_OF_STORY).removesuffix(END_OF_STORY)
    return text

def split_stories(stories, settings):
    """(train, test, counts): a seeded random slice, without empty stories and duplicates."""
    rng = np.random.default_rng(settings.seed)
    n_chosen = min(len(stories), max(1, round(settings.fraction * len(stories))))
    chosen = stories.select(np.sort(rng.choice(len(stories), n_chosen, replace=False)))
    hashes, n_marks = np.zeros(n_chosen, np.uint64), 0
    texts = (text or "" for rows in chosen.iter(100) for text in rows["text"])
    for i, (text, story) in enumerate((text.strip(), clean(text)) for text in texts):
        n_marks += story != text
        hashes[i] = int(digest(story.encode()), 16) if story else 0
    _, first = np.unique(hashes, return_index=True)  # the first story of each text
    kept = rng.permutation(np.sort(first[hashes[first] != 0]))  # without the empty ones
    n_test = max(1, round(settings.test_fraction * len(kept)))
    advice = "--fraction 1 takes all; " if settings.fraction < 1 else ""
    rule = (f"{len(stories)} stories, of which --fraction {settings.fraction} leaves {len(kept)}: "
            f"too few ({advice}a .txt needs {END_OF_STORY} between)")
    require(n_test < len(kept), "data", settings.data, rule)
    test, train = np.sort(kept[:n_test]), np.sort(kept[n_test:])
    n_empty = int((hashes == 0).sum())
    counts = {"stories": len(stories), "train_stories": len(train), "test_stories": n_test,
              "marks": n_marks, "empty": n_empty, "duplicates": n_chosen - n_empty - len(kept),
              "fingerprint": digest(hashes[np.concatenate((train, test))].tobytes())}
    return chosen.select(train), chosen.select(test), counts

def digest(content):
    return blake2b(content, digest_size=8).hexdigest()

def load_tokenizer(name, stories=None, what="--tokenizer"):
    """A Hugging Face tokenizer, by Hub id or folder; bpe:SIZE trains one like GPT-2's."""
    from transformers import AutoTokenizer, GPT2Tokenizer
    if name.startswith("bpe:"):
        size = int(name[4:]) if name[4:].isdecimal() else 0
        require(size > 256, "tokenizer", name, "needs a size above 256, the number of bytes")
        # Of a story 10,000 characters at most: a very long word takes quadratic time.
        texts = ([clean(text)[:10_000] for text in rows["text"]] for rows in stories.iter(100))
        return GPT2Tokenizer().train_new_from_iterator(texts, size, show_progress=False)
    with reading(name, f"{what} {name}", "; bpe:4096 needs no network" if stories else ""):
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Where files are missing, some versions of transformers return an empty tokenizer.
        if len(tokenizer) <= 1 or not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise ValueError(f"its files, such as tokenizer.json, are missing or not usable ("
                             f"{len(tokenizer)} tokens, end {tokenizer.eos_token}): copy them from "
                             "where the model comes from")
    return tokenizer

def n_rows(tokenizer):
    return max(tokenizer.get_vocab().values()) + 1  # there may be holes

def encode(tokenizer, texts):
    """Token ids of texts. A written <|endoftext|> is plain characters, not the end of a story."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return tokenizer(texts, **options)["input_ids"]

# ids: a memory-mapped Arrow column; lengths: an array of the number of targets of each story, its
# ids but the first; n_cut: how many tokens were cut off in all.
Tokens = namedtuple("Tokens", "ids lengths n_cut")

def encode_stories(stories, tokenizer, n_positions, file):
    """The Tokens of stories, kept in a file: ids and <|endoftext|>, n_positions + 1 at most. Of a
    very long story only the first part is looked at: there, n_cut is an estimate."""
    import pyarrow
    end, n_ids = [tokenizer.eos_token_id], n_positions + 1
    def batches():
        n_characters = max(10_000, n_ids * max(map(len, tokenizer.get_vocab())))
        for rows in tqdm(stories.iter(100), "tokenising", -(-len(stories) // 100)):
            texts = [clean(text) for text in rows["text"]]
            ids = encode(tokenizer, [text[:n_characters] for text in texts])
            whole = [max(1, len(text) / n_characters) for text in texts]  # to the part, in length
            found = [(i + end, n) for i, n in zip(ids, whole, strict=True) if i]
            yield {"ids": [i[:n_ids] for i, _ in found],
                   "n_cut": [max(0, round(len(i) * n) - n_ids) for i, n in found]}

    id_type = pyarrow.uint16() if n_rows(tokenizer) <= 1 << 16 else pyarrow.int32()
    table = arrow_file(file, {"ids": pyarrow.list_(id_type), "n_cut": "int64"}, batches()).data
    lengths = [np.diff(chunk.offsets) - 1 for chunk in table.column("ids").chunks]
    return Tokens(table.column("ids"), np.concatenate(lengths), int(np.sum(table.column("n_cut"))))

def encode_split(train_stories, test_stories, tokenizer, data, settings):
    """The Tokens of both parts, from their files where these are there. Completes the counts."""
    data["tokenizer"] = digest(tokenizer.backend_tokenizer.to_str().encode())
    n_positions, folder = settings.n_positions, Path(settings.checkpoints, "data")
    key = f"{data['fingerprint']}-{data['tokenizer']}-{n_positions}.arrow"
    train_set, test_set = (
        encode_stories(part, tokenizer, n_positions, folder / f"{name}-{key}")
        for name, part in (("train", train_stories), ("test", test_stories)))
    n_train, n_test = len(train_set.lengths), len(test_set.lengths)
    require(n_train and n_test, "tokenizer", settings.tokenizer, "knows nothing of the stories")
    data["empty"] += data["train_stories"] + data["test_stories"] - n_train - n_test
    data |= {"train_stories": n_train, "test_stories": n_test}
    data["train_tokens"] = int(train_set.lengths.sum())
    data["tokens_cut"] = n_cut = train_set.n_cut + test_set.n_cut
    share = n_cut / (n_cut + data["train_tokens"] + test_set.lengths.sum())
    if share > 1 / 3:
        say(f"warning    --n-positions {n_positions} cuts off about {share:.0%} of the tokens")
    return train_set, test_set

def epoch_batches(lengths, batch_size, seed, epoch):
    """The batches of an epoch, arrays of story numbers: a pure function of its arguments. Stories
    of similar length come together, so that little of a batch is padding."""
    rng = np.random.default_rng((seed, epoch))
    order, batches = rng.permutation(len(lengths)), []
    for window in np.split(order, range(100 * batch_size, len(order), 100 * batch_size)):
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += np.split(window, range(batch_size, len(window), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]

def step_batches(lengths, settings, first_step=0):
    """Yield the batches of each optimizer step, of all processes, from first_step on."""
    n_batches = math.ceil(len(lengths) / settings.batch_size)
    per_step = settings.accum_steps * WORLD_SIZE
    epochs_done, steps_done = divmod(first_step, math.ceil(n_batches / per_step))
    for epoch in count(epochs_done + 1):
        batches = epoch_batches(lengths, settings.batch_size, settings.seed, epoch)
        for first in range(steps_done * per_step, n_batches, per_step):
            yield batches[first : first + per_step]
        steps_done = 0

def pad_batch(stories):
    """(input_ids, targets), both (B, T): the ids, and the same moved by one. The target of padding
    is IGNORE; the <|endoftext|> that ends a story is a real one."""
    stories = [torch.from_numpy(story.values.to_numpy().astype(np.int64)) for story in stories]
    stories = stories or [torch.full((2,), IGNORE)]  # of no stories: one token of padding
    ids = nn.utils.rnn.pad_sequence(stories, batch_first=True, padding_value=IGNORE)
    return ids[:, :-1].clamp(min=0), ids[:, 1:]

def make_loader(ids, batches):
    """A DataLoader of (input_ids, targets) for batches of story numbers."""
    return torch.utils.data.DataLoader(ids, batch_sampler=batches, collate_fn=pad_batch)

# --- Model: GPT-2 (Radford et al., 2019), as transformers.GPT2LMHeadModel computes it -----------

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        x = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = x.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache:
            k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
        if cache is not None:  # one that is empty at first
            cache.update(k=k, v=v)
        # With a filled cache T is 1, and the one new token may look at everything.
        dropout_p = self.attn_pdrop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)
        return self.c_proj(x.transpose(1, 2).reshape(B, T, C))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = nn.Sequential()  # in this order
        self.mlp.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.mlp.act = nn.GELU(approximate="tanh")
        self.mlp.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.drop = nn.Dropout(config.resid_pdrop)

    def forward(self, x, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))

class GPT(nn.Module):
    """GPT-2 with fixed sinusoids as positions and a head of its own weights, not tied. config: a
    transformers.GPT2Config; tokenizer: for generate_text."""

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
        std, n_added = config.initializer_range, 2 * config.n_layer
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:  # what the blocks add up is scaled down
                nn.init.normal_(weight, std=std / math.sqrt(n_added if "c_proj" in name else 1))
        # A sine has a root mean square of 1 / sqrt(2); at 3 std, embeddings do not drown it.
        position = 3 * math.sqrt(2) * std * sinusoid(config.n_positions, config.n_embd)
        self.transformer.wpe.weight = nn.Parameter(position, requires_grad=False)
        self.fold(torch.ones(config.vocab_size, dtype=torch.bool, device="cpu"))  # a row for each

    def fold(self, has_own):
        """Let the tokens outside has_own, a mask (V,) on the CPU, share one row of wte and lm_head.
        No story has them, so training treats them alike: rows that are equal stay equal."""
        kept = torch.cat((has_own.nonzero(), (~has_own).nonzero()[:1])).flatten()
        row = torch.where(has_own, has_own.cumsum(0) - 1, len(kept) - 1)
        self.n_shared = max(1, int((~has_own).sum()))
        log_n = self.lm_head.weight.new_zeros(len(kept))
        log_n[-1] = math.log(self.n_shared)
        self.register_buffer("row", row, persistent=False)  # (V,), of each token
        self.register_buffer("log_n", log_n, persistent=False)  # (R,), of a row's tokens
        for layer in (self.transformer.wte, self.lm_head):
            layer.weight = nn.Parameter(layer.weight.detach()[kept])
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, input_ids, targets=None, cache=None):
        """Logits (B, T, V) for the token after each of input_ids (B, T), with T at most
        n_positions; given targets (B, T), cross-entropy in nats and number of right guesses, both
        summed over the real tokens. cache, at first a list of an empty dict for each layer, lets
        the next call go on with one more token; then the logits are those after the last one."""
        gpt = self.transformer
        seen = cache[0]["k"].size(2) if cache and cache[0] else 0
        positions = torch.arange(seen, seen + input_ids.size(1), device=input_ids.device)
        x = gpt.drop(gpt.wte(self.row[input_ids]) + gpt.wpe(positions))  # (B, T, C)
        for i, block in enumerate(gpt.h):
            x = block(x, cache[i] if cache else None)
        logits = self.lm_head(gpt.ln_f(x[:, -1:] if cache else x))  # (B, T, R)
        if targets is None:
            return logits[..., self.row]
        is_real = targets != IGNORE
        target = self.row[targets * is_real]
        log_n = self.log_n[target]
        right = (logits.argmax(-1) == target) & is_real & (log_n == 0)  # a shared row is no guess
        # n tokens of one logit z add n exp(z) = exp(z + log n) to the softmax's denominator, and
        # each of them has an n-th of that probability.
        logits = (logits + self.log_n).flatten(0, 1)
        loss = F.cross_entropy(logits, target.flatten(), reduction="none").view_as(target) + log_n
        return (loss * is_real).sum(), right.sum()

def sinusoid(n_positions, n_embd):
    """(n_positions, n_embd): sines and cosines by turns; "Attention Is All You Need", 3.5."""
    frequencies = torch.exp(torch.arange(0, n_embd, 2) * (-math.log(10_000) / n_embd))
    angles = torch.arange(n_positions)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)

def tokens_in(parts, vocab_size):
    """A mask (V,) of the tokens in some Tokens, and of up to 63 more: with the shared one they make
    a multiple of 64 rows, and matrix products of that size are faster."""
    is_in = torch.zeros(vocab_size, dtype=torch.bool)
    for chunk in (chunk for part in parts for chunk in part.ids.chunks):
        is_in[torch.from_numpy(chunk.flatten().to_numpy().astype(np.int64))] = True
    n_more = -(int(is_in.sum()) + 1) % 64
    is_in[(~is_in).nonzero()[:n_more]] = True
    return is_in

@contextmanager
def evaluation_mode(model):
    """No dropout inside; afterwards the mode that was there before."""
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)

# --- Generation ---------------------------------------------------------------------------------

def generate_text(model, prompt, max_length=50, method="greedy", *, temperature=1.0, top_k=0,
                  top_p=1.0, repetition_penalty=1.0, stop=(), num_samples=1, seed=None,
                  streamer=None):
    """The prompt and at most max_length new tokens, up to <|endoftext|> or to the token with which
    one of the texts in stop is in the new text: a str; if num_samples > 1, a list of so many; of a
    list of prompts, the list of all texts. InputError if a prompt is too long or a value wrong.

    method: "greedy" takes the likeliest token; "sample" divides the logits by temperature and draws
    from the top_k likeliest tokens (0: all), of those from the fewest that together have the
    probability top_p. repetition_penalty above 1 makes tokens that were there less likely. Sample i
    of a prompt is drawn with seed + i, alone or among others. streamer, a TextStreamer, gets each
    token at once. When the context is full, its older half is dropped."""
    check_rules(locals())
    stop = [stop] if isinstance(stop, str) else list(stop or ())
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    n_texts = len(prompts) * num_samples
    require(n_texts, "prompt", prompts, "must be at least one text")
    require(all(stop), "stop", stop, "must not be empty")
    require(not streamer or n_texts == 1, "streamer", f"for {n_texts} texts", "it shows one")
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_samples)]  # of the CPU
    numbers = torch.stack([torch.rand(max_length, generator=each) for each in generators])
    sampling = (method, temperature, top_k, top_p, repetition_penalty)
    texts = []
    for ids in [encode_prompt(model, text) for text in prompts]:
        rows = continue_ids(model, ids, numbers.to(model.device), sampling, stop, streamer)
        texts += model.tokenizer.batch_decode(rows)
    return texts[0] if isinstance(prompt, str) and num_samples == 1 else texts

def encode_prompt(model, prompt):
    """The ids of a prompt. Raises InputError if it is empty or does not fit."""
    is_text = prompt.strip() and not re.search("[\ud800-\udfff]", prompt)
    require(is_text, "prompt", repr(prompt), "is empty, or has bytes that are no UTF-8")
    ids, n_positions = encode(model.tokenizer, prompt), model.config.n_positions
    rule = f"has {len(ids)} tokens, 1 to {n_positions} fit"
    require(0 < len(ids) <= n_positions, "prompt", repr(prompt[:30] + "…"), rule)
    return ids

@torch.no_grad()
def continue_ids(model, ids, numbers, sampling, stop=(), streamer=None):
    """A list of ids for each row of the random numbers (B, n): ids, and up to n more."""
    tokens = inputs = torch.tensor([ids] * len(numbers), device=model.device)  # (B, T)
    n_positions, end = model.config.n_positions, model.tokenizer.eos_token_id
    cache, lengths = [{} for _ in model.transformer.h], {}
    if streamer:
        streamer.put(tokens.cpu())
    with evaluation_mode(model):
        for n, random_numbers in enumerate(numbers.unbind(1), len(ids) + 1):
            logits = model(inputs, cache=cache)[:, -1]  # (B, V)
            inputs = next_ids(logits, tokens, random_numbers[:, None], *sampling)  # (B, 1)
            tokens = torch.cat((tokens, inputs), dim=1)
            for row, token in enumerate(inputs[:, 0].tolist()):
                text = model.tokenizer.decode(tokens[row, len(ids) :]) if stop else ""
                if token == end or any(each in text for each in stop):
                    lengths.setdefault(row, n - (token == end))
            if streamer and inputs[0] != end:
                streamer.put(inputs[0].cpu())
            if len(lengths) == len(numbers):
                break
            if cache[0]["k"].size(2) == n_positions:  # full: go on with the newer half
                inputs, cache = tokens[:, -(n_positions // 2) :], [{} for _ in cache]
    if streamer:
        streamer.end()
    return [row[: lengths.get(i)] for i, row in enumerate(tokens.tolist())]  # None: whole

def next_ids(logits, tokens, numbers, method, temperature, top_k, top_p, repetition_penalty):
    """Ids (B, 1) after tokens (B, T), from logits (B, V) and random numbers (B, 1). The penalty is
    that of Keskar et al., "CTRL: A Conditional Transformer Language Model", section 4.1."""
    if repetition_penalty != 1:
        seen = logits.gather(1, tokens)
        seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
        logits = logits.scatter(1, tokens, seen)
    if method == "greedy":
        return logits.argmax(-1, keepdim=True)
    sums = next_probabilities(logits, temperature, top_k, top_p).float().cumsum(-1)
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True)  # the first larger sum

def next_probabilities(logits, temperature, top_k, top_p):
    """Probabilities (B, V) from logits (B, V): temperature, then the top_k likeliest, then the
    nucleus of top_p (Holtzman et al., "The Curious Case of Neural Text Degeneration")."""
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # 0 at most
    ranked, order = logits.softmax(-1).sort(descending=True)
    ranked[:, top_k or logits.size(-1) :] = 0
    most = top_p * ranked.sum(-1, keepdim=True)
    ranked[ranked.cumsum(-1) - ranked >= most] = 0  # the likelier tokens are enough
    return torch.zeros_like(ranked).scatter(-1, order, ranked / ranked.sum(-1, keepdim=True))

# --- Optimizers ---------------------------------------------------------------------------------

def make_optimizers(model, settings, dtype):
    """AdamW, at ten times the rate for embedding and head, and Muon for the layers' matrices, with
    products in dtype. With --init AdamW alone, at one rate, as it has trained those weights."""
    def group(weights, rate, decay=settings.weight_decay):
        return {"params": list(weights), "lr": rate, "peak_lr": rate, "weight_decay": decay}

    rate, options = settings.learning_rate, {"betas": (0.9, 0.99), "fused": True}
    vectors = group((w for w in model.parameters() if w.dim() == 1), rate, decay=0.0)
    if settings.init:
        matrices = group((w for w in model.parameters() if w.dim() == 2), rate)
        return [torch.optim.AdamW([matrices, vectors], **options)]
    outer = group((model.transformer.wte.weight, model.lm_head.weight), 10 * rate)
    blocks = ([w for w in block.parameters() if w.dim() == 2] for block in model.transformer.h)
    alike = zip(*blocks, strict=True)  # the same matrix of every layer
    inner = [group(weights, settings.muon_learning_rate) for weights in alike]
    return [torch.optim.AdamW([outer, vectors], **options), Muon(inner, dtype)]

def schedule(step, n_steps, warmup_steps):
    """The share of the peak rate at step `step`, from 0: linear warm-up, then linear decay to 0."""
    warmup = min(warmup_steps, n_steps // 10)
    return min((step + 1) / (warmup + 1), (n_steps - step) / (n_steps - warmup))

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, so that a matrix learns as fast in all directions (Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024). torch.optim.Muon computes in
    bf16 alone, which is very slow on many CPUs."""

    def __init__(self, groups, dtype):
        super().__init__(groups, {})
        self.dtype = dtype  # of the matrix products
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            self.state[weight]["momentum"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:  # matrices of one shape (M, N)
            weights, (n_out, n_in) = group["params"], group["params"][0].shape
            gradients = [weight.grad for weight in weights]
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, momenta, 0.95)  # Nesterov: one step ahead
            updates = orthogonalize(torch.stack(ahead), self.dtype).to(weights[0].dtype)
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

def train(model, train_set, test_set, settings, record, last, precision):
    """Train to the last step. last: what save_last has saved of an interrupted run, or None."""
    device, folder, n_steps = model.device, Path(settings.checkpoints), record["steps"]
    autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    optimizers = make_optimizers(model, settings, DTYPES[precision])
    metrics = torch.zeros(n_steps, 5, device=device)  # loss, right, norm, tokens, seconds of steps
    state = {"model": model, "scaler": scaler} | dict(enumerate(optimizers))  # of last.pt
    if last:
        restore(last, folder, state, metrics)
    test_batches = epoch_batches(test_set.lengths, settings.batch_size, settings.seed, 0)
    test_loader = make_loader(test_set.ids, share(test_batches))
    learner = make_learner(model, next(iter(test_loader)), settings, autocast, scaler)
    steps = step_batches(train_set.lengths, settings, record["step"])
    say("stories    {train_stories:,} to train, {test_stories:,} to test, of {stories:,} from "
        "{source} (--fraction {fraction}); dropped {empty:,} empty ones, {duplicates:,} duplicates,"
        " marks at the ends of {marks:,}\ntokens     {train_tokens:,} to train; of all, about "
        "{tokens_cut:,} were cut off (--n-positions {n_positions})"
        .format(**record["settings"] | record["data"]))
    say(f"model      {record['parameters'] / 1e6:.1f} M parameters, on {WORLD_SIZE} x {device} in "
        f"{precision}; {n_steps:,} steps")
    bar = tqdm(total=n_steps, initial=record["step"], disable=RANK > 0, leave=False,
               dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60, miniters=1)
    signals, saved = [], time.monotonic()
    then = saved  # when the step before ended
    with bar, on_signals(signals.append):
        for step in range(record["step"], n_steps + 1):  # once more, to finish the last epoch
            if step == end_of_epoch(record):
                with on_signals(interrupt):  # at once: what is saved goes on with this evaluation
                    finish_epoch(model, test_loader, settings, record, metrics[:step])
                save_last(folder, step, record, state, metrics)
                then = time.monotonic()
            if step == n_steps:
                break
            # Dropout depends on the step and the process alone.
            torch.manual_seed((settings.seed * 1_000_003 + step) * WORLD_SIZE + RANK)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak_lr"] * schedule(step, n_steps, settings.warmup_steps)
            of_all = next(steps)
            n_tokens = sum(int(train_set.lengths[batch].sum()) for batch in of_all)
            batches = [pad_batch([train_set.ids[i] for i in batch]) for batch in share(of_all)]
            loss, right = total(backward(learner, batches, n_tokens, autocast, scaler))
            norm = update(model, optimizers, settings.grad_clip, scaler)
            metrics[step, :3] = torch.stack((loss, right, norm))
            now = time.monotonic()
            metrics[step, 3], metrics[step, 4] = n_tokens, now - then
            then, due = now, now - saved > 60 * settings.save_every
            stop, due = total(torch.tensor([len(signals), due])).tolist()
            due = due or stop or step + 1 == end_of_epoch(record)
            bar.update()
            if due or step % 10 == 0:
                check_and_show(metrics[: step + 1], record, bar)
            if due:
                save_last(folder, step + 1, record, state, metrics)
                saved = time.monotonic()
                stop = stop or int(total(torch.tensor(len(signals))))  # before an evaluation
            if stop:
                number = max(signals, default=signal.SIGTERM)  # another process may have got it
                raise KeyboardInterrupt(number, f"saved after step {step + 1:,} of {n_steps:,}")

def backward(learner, batches, n_tokens, autocast, scaler):
    """Add up the gradients of batches: those of the mean loss over n_tokens real tokens, of all
    processes, so that batches of any size and number make the same update. Returns the summed loss
    and right guesses of this process (2,), on its device: nobody waits to see them."""
    sums = 0
    for i, batch in enumerate(batches):
        if learner.device.type == "cuda":
            batch = [tensor.pin_memory() for tensor in batch]
        input_ids, targets = (tensor.to(learner.device, non_blocking=True) for tensor in batch)
        more = isinstance(learner, DistributedDataParallel) and i < len(batches) - 1
        with learner.no_sync() if more else nullcontext():  # gradients are exchanged with the last
            with autocast:
                loss, right = learner(input_ids, targets)
            # The exchange divides by WORLD_SIZE.
            scaler.scale(loss * (WORLD_SIZE / n_tokens)).backward()
        sums = sums + torch.stack((loss.detach(), right))
    return sums

def update(model, optimizers, grad_clip, scaler):
    """Clip the gradients, take a step, clear them. Returns their norm. In fp16 it may overflow: the
    step is skipped, and the norm 0, as long as the scale can be reduced."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    # The gradient of the shared row is the sum of those of n equal rows. Divided by sqrt(n), it has
    # the norm of all of these, for clipping; by sqrt(n) again, it is that of one of them.
    shared = model.lm_head.weight.grad[-1]
    shared /= math.sqrt(model.n_shared)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    shared /= math.sqrt(model.n_shared)
    skipped = scaler.is_enabled() and not norm.isfinite()
    for optimizer in optimizers:
        if not skipped:
            optimizer.step()
        optimizer.zero_grad()
    scaler.update()
    return torch.zeros_like(norm) if skipped and scaler.get_scale() >= 1 else norm

def make_learner(model, batch, settings, autocast, scaler):
    """What backward takes: the model, compiled if that works on a batch, of all processes."""
    learner = model.train()
    if settings.compile == "on" or (settings.compile == "auto" and model.device.type == "cuda"):
        try:
            learner = torch.compile(model, dynamic=True)
            backward(learner, [batch], 1, autocast, scaler)
        except Exception as error:  # compilers fail in many ways, and the training can do without
            say(f"compile    off: {type(error).__name__}: {' '.join(str(error).split()):.80}")
            learner = model
        model.zero_grad()
    if WORLD_SIZE > 1:
        learner = DistributedDataParallel(learner, gradient_as_bucket_view=True)
        learner.broadcast_buffers = False  # row and log_n never change
    return learner

def end_of_epoch(record):
    """The step after which the present epoch is over."""
    return min((len(record["epochs"]) + 1) * record["steps_per_epoch"], record["steps"])

def check_and_show(metrics, record, bar):
    """Show the figures of the last steps. Raises InputError where one is not finite."""
    if len(bad := (~metrics.isfinite().all(1)).nonzero()):
        if RANK:
            sys.exit(2)  # process 0 says the same
        saved = f"last.pt is good, of step {record['step']}" if record["step"] else "none was saved"
        raise InputError(f"step {int(bad[0]) + 1}: the loss or its gradient is not finite, the run "
                         f"stops; {saved}. Try smaller learning rates, or --precision fp32")
    loss, _, _, n_tokens, seconds = metrics[-100:].sum(0).tolist()
    bar.set_postfix_str(f"loss {loss / n_tokens:.3f}, {n_tokens / seconds:,.0f} tokens/s", False)

def finish_epoch(model, test_loader, settings, record, metrics):
    """Evaluate, add the epoch to the record, and write its plots and its checkpoint."""
    epoch, metrics = len(record["epochs"]) + 1, metrics.cpu().double().numpy()
    test_loss, test_accuracy = evaluate(model, test_loader)  # in fp32, on CUDA with TF32
    sums = metrics[(epoch - 1) * record["steps_per_epoch"] :].sum(0)
    loss, right, _, n_tokens, seconds = sums.tolist()
    record["epochs"].append({
        "epoch": epoch, "step": len(metrics), "train_loss": loss / n_tokens,
        "train_accuracy": right / n_tokens, "test_loss": test_loss,
        "test_perplexity": float(np.exp(test_loss)), "test_accuracy": test_accuracy,
        "tokens": int(n_tokens), "seconds": seconds})
    say("epoch {epoch}/{0}  train loss {train_loss:.3f}, accuracy {train_accuracy:.1%}  test loss "
        "{test_loss:.3f}, accuracy {test_accuracy:.1%}, perplexity {test_perplexity:.2f}  "
        "{seconds:,.0f} s".format(settings.epochs, **record["epochs"][-1]))
    if RANK == 0:
        folder = Path(settings.checkpoints, f"epoch_{epoch}")
        sample = generate_text(model, settings.prompt, max_length=200)
        write_plots(Path(settings.plots), record, metrics)
        save_checkpoint(folder, model, record, sample)
        say(f"saved {folder}, which begins a story like this:\n\n{sample}\n")

@torch.no_grad()
def evaluate(model, loader):
    """(nats a token, share of right guesses) over a loader's real tokens, in all processes."""
    sums = 0
    with evaluation_mode(model):
        for batch in loader:
            input_ids, targets = (tensor.to(model.device) for tensor in batch)
            n_tokens = (targets != IGNORE).sum()
            sums = sums + torch.stack((*model(input_ids, targets), n_tokens)).cpu().double()
    loss, right, n_tokens = total(sums).tolist()
    return loss / n_tokens, right / n_tokens

def compute_perplexity(model, test_loader):
    """exp of the mean cross-entropy: each token counts the same, whatever the batch size."""
    return float(np.exp(evaluate(model, test_loader)[0]))

# --- Checkpoints: Hugging Face GPT-2 folders, and the point from which a run continues ----------

def transposed(weights):
    """A GPT's weights as GPT2LMHeadModel's, or back: these matrices are (in, out) there."""
    names = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: w.T if name.endswith(names) else w for name, w in weights.items()}

def save_checkpoint(folder, model, record, sample):
    """Write the model, with a row for each token, and its tokenizer, as transformers does."""
    from transformers import GPT2LMHeadModel, logging
    logging.disable_progress_bar()
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(model.config)
    weights = transposed(model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][model.row]
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    with whole_or_absent(folder) as new:
        theirs.save_pretrained(new)
        shutil.copymode(new / "config.json", new / "model.safetensors")  # else its owner's alone
        model.tokenizer.save_pretrained(new)
        (new / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        (new / "sample.txt").write_text(sample + "\n", encoding="utf-8")
        (new / "SHA256SUMS").write_bytes("".join(checksums(new)).encode())

def checksums(folder):
    """The lines that sha256sum prints for the files of a folder."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            yield f"{file_digest(file, 'sha256').hexdigest()}  {path.name}\n"

# What a config.json may say of how a GPT-2 computes, and what it is to say here.
GPT2_MATH = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
NEEDED_MODEL = "; it must be an epoch's folder, a run's with an epoch, or a GPT-2's name on the Hub"

def load_checkpoint(name, device="cpu", fold=True, **changes):
    """The model of a GPT-2 folder or Hub id, with its tokenizer, in eval mode. fold: keep equal
    rows of embedding and head once, to write faster; changes: other values than in config.json."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with reading(name, name, "" if Path(name, "config.json").exists() else NEEDED_MODEL):
        if (sums := Path(name, "SHA256SUMS")).is_file():  # others' folders have none
            lines = sums.read_text("utf-8", "replace").splitlines(keepends=True)
            if changed := set(lines) - set(checksums(Path(name))):
                raise ValueError(f"{min(changed)[66:-1]} is not as it was saved; if it was changed "
                                 "on purpose, delete SHA256SUMS there")
        values = GPT2Config.get_config_dict(name)[0]
        for key, usual in GPT2_MATH.items():
            if values.get(key, usual) != usual:
                raise ValueError(f"{key} is {values[key]}, and only {usual} is known here")
        if not 0 < values.get("n_layer", 12) < 1000:
            raise ValueError(f"n_layer is {values['n_layer']}")
        for key in ("auto_map", "task_specific_params"):  # a stranger's code and habits
            values.pop(key, None)
        config = GPT2Config(**values | changes)
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        try:
            theirs, report = GPT2LMHeadModel.from_pretrained(name, config=config, **options)
        except RuntimeError:
            raise ValueError("its weights are not of the sizes in its config.json") from None
        strange = [*report["missing_keys"], *report["unexpected_keys"]]
        if strange := [key for key in strange if not key.endswith("attn.masked_bias")]:
            raise ValueError(f"missing or unknown tensors, such as {min(strange)}")
        weights = transposed(theirs.state_dict())
        if bad := [key for key, weight in weights.items() if not weight.isfinite().all()]:
            raise ValueError(f"{bad[0]} holds numbers that are not finite")
        config.tie_word_embeddings = theirs.lm_head.weight is theirs.transformer.wte.weight
        model = GPT(config, load_tokenizer(str(name), what="the tokenizer of"))
        model.load_state_dict(weights)
        if (n_ids := n_rows(model.tokenizer)) > config.vocab_size:
            raise ValueError(f"{n_ids} tokens in its tokenizer, {config.vocab_size} in the model")
    if fold:
        model.fold(~equal_rows(model))
    return model.to(device).eval()

def equal_rows(model):
    """A mask (V,) of the tokens that may share a row: of those whose row of the head begins with
    the most frequent number, all that have the same rows as the first of them."""
    layers, values = (model.transformer.wte, model.lm_head), model.lm_head.weight[:, 0]
    first = (values == values.mode().values).nonzero()[0]
    return torch.stack([(layer.weight == layer.weight[first]).all(1) for layer in layers]).all(0)

def save_last(folder, step, record, state, metrics):
    """Save the point from which an interrupted run continues."""
    record["step"] = step
    if RANK == 0:
        last = {name: part.state_dict() for name, part in state.items()}
        with whole_or_absent(folder / "last.pt") as path, open(path, "wb") as file:
            torch.save(last | {"record": record, "metrics": metrics[:step].clone()}, file)

def read_last(folder):
    """What save_last saved there; None where no run is."""
    path = folder / "last.pt"
    if not (path.exists() or saved_epochs(folder)):
        return None
    with reading(folder, path, "; --overwrite starts over"):
        with zipfile.ZipFile(path) as archive:  # whose checksums torch.load does not look at
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        last = torch.load(path, map_location="cpu", weights_only=True)
        if not last["record"].get("fixed"):
            raise ValueError("it is of another program, or of another version of this one")
        return last

def saved_epochs(folder):
    """The folders of the epochs in a checkpoints folder, in their order."""
    epochs = [path for path in Path(folder).glob("*") if re.fullmatch(r"epoch_\d+", path.name)]
    return sorted(epochs, key=lambda path: int(path.name[6:]))

def best_epoch(folder):
    """Of the epochs in a run's folder that of the lowest test loss; of another folder, itself."""
    def test_loss(epoch):
        with reading(epoch, epoch, "; another epoch can be named instead of the run"):
            return json.loads((epoch / "training.json").read_bytes())["epochs"][-1]["test_loss"]
    epochs = [] if Path(folder, "config.json").exists() else saved_epochs(folder)
    return min(epochs, key=test_loss, default=folder)

def restore(last, folder, state, metrics):
    metrics[: len(last["metrics"])] = last["metrics"]
    with reading(folder, folder / "last.pt", "; --overwrite starts over"):
        for name, part in state.items():
            part.load_state_dict(last[name] or part.state_dict())  # of a scaler not used it is {}
    say(f"continuing the interrupted run from its last save, after step {len(last['metrics']):,}")
    last.clear()  # to free its memory

@contextmanager
def whole_or_absent(path):
    """Inside, a file or folder is written under the name that this yields. Afterwards it is on the
    disk and has the name path; where anything fails, what has that name stays as it was."""
    new = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        yield new
        for each in (*new.rglob("*"), new):
            flush(each)
        if path.is_dir():
            remove(path)
        new.replace(path)
        flush(path.parent)
    except Exception as error:  # each library has another exception for a full disk
        remove(new)  # which may be what filled it
        if isinstance(error, InputError):  # of what was read meanwhile
            raise
        why = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path} cannot be saved, what was saved before is kept: {why}") from error

def flush(path):
    """Wait until a file is on the disk, and a folder where the file system can do that."""
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else nullcontext(), ExitStack() as at_the_end:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        at_the_end.callback(os.close, descriptor)
        os.fsync(descriptor)

def remove(path):
    shutil.rmtree(path, ignore_errors=True)  # which is for folders
    path.unlink(missing_ok=True)

# --- Plots --------------------------------------------------------------------------------------

def write_plots(folder, record, metrics):
    """training_metrics.csv and .png: loss, accuracy and test perplexity, of a run's record and of
    some 100 points of its metrics (n_steps, 5)."""
    os.environ.pop("MPLBACKEND", None)  # may name one that is not installed, and none is needed
    from matplotlib.figure import Figure
    from pandas import DataFrame, concat
    starts = np.arange(0, len(metrics), math.ceil(record["steps"] / 100))
    sums, ends = np.add.reduceat(metrics, starts), np.append(starts[1:], len(metrics))
    curve = DataFrame({"step": ends, "train_loss": sums[:, 0] / sums[:, 3]})
    epochs, data = DataFrame(record["epochs"]), record["data"]
    with whole_or_absent(folder / "training_metrics.csv") as path:
        table = concat([curve, epochs])[epochs.columns]
        table.astype({"epoch": "Int64", "tokens": "Int64"}).to_csv(path, index=False)

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    size, n_stories = f"{record['parameters'] / 1e6:.1f} M", f"{data['train_stories']:,}"
    figure.suptitle(f"{size} parameters, {n_stories} training stories from {data['source']}")
    loss, accuracy, perplexity = figure.subplots(1, 3, sharex=True)
    loss.plot(curve.step, curve.train_loss, color="C0", label="training")
    accuracy.plot(epochs.step, epochs.train_accuracy, "o-", color="C0", label="training")
    for axes, key, unit in ((loss, "loss", "cross-entropy, nats a token"),
                            (accuracy, "accuracy", "share of next tokens guessed right"),
                            (perplexity, "perplexity", "test perplexity")):
        tested = epochs[f"test_{key}"]
        axes.plot(epochs.step, tested, "o-", color="C1", label=f"test, now {tested.iloc[-1]:.3g}")
        axes.set(title=key.capitalize(), xlabel="optimizer step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_or_absent(folder / "training_metrics.png") as path:
        figure.savefig(path, format="png", dpi=120)

# --- Main ---------------------------------------------------------------------------------------

def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    device, precision = pick_device(settings.device, settings.precision)
    folder, plots = Path(settings.checkpoints), Path(settings.plots)
    start_processes(device)
    with locked(folder), locked(plots):
        wait(RANK > 0)  # until process 0 has downloaded, written and checked what all need
        last = None if settings.overwrite else read_last(folder)
        before = last["record"] if last else {"data": {}, "fixed": {}, "epochs": [], "step": 0}
        model = load_base(settings) if settings.init else None
        refuse_changes(before["fixed"], fixed(settings), folder)
        goes_on = settings.data == "auto" and before["data"].get("source") == BUILT_IN
        stories, source = load_stories("sample" if goes_on else settings.data, folder / "data")
        train_stories, test_stories, data = split_stories(stories, settings)
        data["source"] = source
        usual = "bpe:4096" if source == BUILT_IN else "gpt2"
        name = usual if settings.tokenizer == "auto" else settings.tokenizer
        tokenizer = model.tokenizer if model else load_tokenizer(name, train_stories)
        parts = encode_split(train_stories, test_stories, tokenizer, data, settings)
        record = new_record(settings, data, before)
        refuse_changes(before["fixed"], record["fixed"], folder)  # the stories, too
        torch.manual_seed(settings.seed)
        model = model or GPT(model_config(settings, tokenizer), tokenizer)
        record["parameters"] = sum(weight.numel() for weight in model.parameters())
        encode_prompt(model, settings.prompt)  # better refused now than after an epoch
        wait(RANK == 0)  # now the others
        require_same(record["fixed"] | {"step": record["step"]})
        if record["epochs"] and record["epochs"][-1]["step"] == record["steps"]:
            say(f"{folder} holds this run, and it is finished; {result(record)}")
            return
        if not settings.init:  # where tokens of no story may have rows of their own
            model.fold(tokens_in(parts, model.config.vocab_size))
        if not (record["step"] or saved_epochs(folder)) and any(plots.glob("training_metrics.*")):
            say(f"warning    replaces the plots of another run in {plots}; other --plots keep them")
        if settings.overwrite and RANK == 0:
            for path in (*saved_epochs(folder), folder / "last.pt"):
                remove(path)
        train(model.to(device), *parts, settings, record, last, precision)
        say(result(record))

def load_base(settings):
    """The model of --init, all of whose weights will be trained."""
    name, epochs = best_epoch(settings.init), saved_epochs(Path(settings.checkpoints).resolve())
    rule = "would be overwritten there; take other --checkpoints and --plots"
    require(Path(name).resolve() not in epochs, "init", settings.init, rule)
    say(f"init       {name}")
    model = load_checkpoint(name, fold=False, **dropout_rates(settings))
    n, most = settings.n_positions, model.config.n_positions
    require(n <= most, "n_positions", n, f"--init {settings.init} has {most}, which is the most")
    model.transformer.wpe.weight.requires_grad_()
    model.config.update(ends(model.tokenizer))
    return model

def ends(tokenizer):
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)

def dropout_rates(settings):
    return dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout)

def model_config(settings, tokenizer):
    from transformers import GPT2Config
    names = ("n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    return GPT2Config(  # n_ctx is an older name, which llama.cpp's converter asks for
        **{name: getattr(settings, name) for name in names}, n_ctx=settings.n_positions,
        **dropout_rates(settings), **ends(tokenizer), vocab_size=n_rows(tokenizer),
        tie_word_embeddings=False)

# What may differ when a run goes on. Of the data, stories and tokenizer are compared, of
# accum_steps its product with the number of processes.
FREE = {"data", "tokenizer", "accum_steps", "save_every", "device", "precision", "compile",
        "checkpoints", "plots", "overwrite", "prompt"}

def fixed(settings):
    """What may not differ, but for the stories."""
    kept = {name: value for name, value in asdict(settings).items() if name not in FREE}
    return kept | {"accum_steps x processes": settings.accum_steps * WORLD_SIZE}

def new_record(settings, data, before):
    """What training.json holds; of a run that goes on with the step and the epochs it has."""
    per_step = settings.batch_size * settings.accum_steps * WORLD_SIZE
    per_epoch = math.ceil(data["train_stories"] / per_step)
    of_data = {name: data[name] for name in ("stories", "fingerprint", "tokenizer")}
    packages = ("torch", "transformers", "datasets")
    versions = {name: str(sys.modules[name].__version__) for name in packages}
    return {"settings": asdict(settings), "processes": WORLD_SIZE, "data": data,
            "fixed": fixed(settings) | of_data,
            "steps": min(settings.max_steps or math.inf, settings.epochs * per_epoch),
            "steps_per_epoch": per_epoch, "step": before["step"], "epochs": before["epochs"],
            "versions": versions | {"python": sys.version.split()[0]}}

def refuse_changes(before, now, folder):
    """Raise InputError where what is fixed in a run was something else in the one before."""
    changes = [f"{name} was {before.get(name)}, is {value}" for name, value in now.items()
               if before.get(name) != value]
    if before and changes:
        raise InputError(f"{folder} holds another run ({', '.join(changes)}): --overwrite starts "
                         "over, other --checkpoints and --plots keep it")

def result(record):
    """What to say at the end of a run."""
    final = record["epochs"][-1]["test_perplexity"]
    best = min(record["epochs"], key=lambda epoch: epoch["test_loss"])
    return ("test perplexity {0:.2f}, lowest in epoch {epoch}, {test_perplexity:.2f}; see {plots}\n"
            "next: python gpt2_generate.py --model {checkpoints}/epoch_{epoch}"
            .format(final, **best, **record["settings"]))

# --- Small print: command line, errors, signals, lock, devices, processes, network ---------------

def parse(settings_class, description, argv=None):
    """Read the command line into a settings class; a tuple is a flag that can be repeated."""
    parser = argparse.ArgumentParser(
        None, argparse.SUPPRESS, description, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    kinds = {bool: {"action": "store_true"}, tuple: {"action": "append"}}
    for f in fields(settings_class):
        choices = get_args(f.type)
        kind = {"choices": choices} if choices else kinds.get(f.type, {"type": f.type})
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    return settings_class(**vars(parser.parse_args(argv)))

NO_MEMORY = "MemoryError|out of memory|allocate memory|enough memory"  # on a CPU in a RuntimeError

@contextmanager
def reading(name, what, hint=""):
    """Inside, something of the user's is read, from a path or, where there is none, from the Hub.
    Whatever is wrong with it is an InputError of one line that begins with what."""
    here = Path(name).exists()
    offline = not here and not hub_answers()
    try:
        yield
    except Exception as error:  # each kind of broken file raises another; the message names it
        if isinstance(error, InputError) or re.search(NO_MEMORY, repr(error)):
            raise
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"{what}: {cause}") from error
        why = f"something is missing: {cause}" if isinstance(cause, KeyError) else str(cause)
        why = why.partition(". ")[0]  # torch goes on with bad advice
        problem = "cannot be read:" if here else "no such file or folder; on the Hub:"
        if offline:
            problem, why = "no such file or folder,", "and the Hugging Face Hub cannot be reached"
        raise InputError(f"{what}: {problem} {why}{hint}") from error

def hub_answers():
    """Whether the Hugging Face Hub can be reached, found out within 10 s. If not, its libraries are
    told to look into their caches alone, instead of trying again for minutes."""
    from huggingface_hub import constants, get_session
    try:  # in a thread, as the look-up of a host's name has no time limit of its own
        ThreadPool(1).apply_async(get_session().head, [constants.ENDPOINT], {"timeout": 8}).get(10)
    except Exception:  # of its HTTP library, which has been another one before: there is no answer
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE

def say(text):
    """Print, from process 0 alone, above a progress bar if there is one."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()

def run(main, hint=""):
    """Call main(); what a user can mend is shown as one line, and sets the exit code."""
    for stream in (sys.stdin, sys.stdout):  # which a notebook replaces
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show
    try:
        # torchrun's SIGTERM ends the others when one has failed, which has said why.
        with on_signals(interrupt) if WORLD_SIZE == 1 else nullcontext():
            main()
        if dist.is_initialized():
            wait(True)  # one that ended now would end process 0, which may still be saving
            os._exit(0)  # a thread of gloo that is late aborts a Python that ends as usual
        return
    except BrokenPipeError:  # the reader of the output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt as error:
        number, state = error.args or (signal.SIGINT, "interrupted")
        message, code = state + hint, 128 + number
    except (InputError, OSError, UnicodeError, ImportError) as error:  # OSError: a full disk
        message, code = str(error), 1 if isinstance(error, OSError) else 2
    except (MemoryError, RuntimeError) as error:
        if re.search(NO_MEMORY, repr(error)):
            message, code = "out of memory; halve --batch-size and double --accum-steps", 2
        elif WORLD_SIZE > 1 and re.search("gloo|NCCL", str(error)):
            message, code = f"no connection to the other processes: {error}", 1
            time.sleep(10)  # the one that failed has said why, and torchrun ends this one
        else:
            raise
    if RANK == 0 or (dist.is_initialized() and code < 128):  # else all say the same
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)

def interrupt(number):
    raise KeyboardInterrupt(number, "interrupted")

@contextmanager
def on_signals(handle):
    """Inside, Ctrl-C, SIGTERM and SIGHUP call handle with their number, unless they are ignored, as
    under nohup. Where it returns, the step is finished and saved; a second one ends the process."""
    def handler(number, _frame):
        signal.signal(number, signal.SIG_DFL)
        handle(number)
        try:
            os.write(2, b"" if RANK else b"\nstopping after this step; once more: at once\n")
        except OSError:  # the terminal has gone, and nothing may fail for that now
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    with ExitStack() as at_the_end:
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) != signal.SIG_IGN:
                at_the_end.callback(signal.signal, number, signal.signal(number, handler))
        yield

@contextmanager
def locked(folder):
    """Keep other runs out of a folder. The system ends the lock with its process."""
    from filelock import FileLock, Timeout
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / ".lock", blocking=False, is_singleton=True)
    try:
        if RANK == 0:
            lock.acquire()
    except Timeout:
        way_out = "give this one other --checkpoints and --plots"
        raise InputError(f"{folder}: another run is writing there; {way_out}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # of file systems that lock nothing
            raise
        say(f"warning    {folder}: {error.strerror}; a second run there would not be noticed")
    try:
        yield
    finally:
        lock.release()

def pick_device(device, precision):
    """(device, precision) for auto: cuda, mps or cpu; bf16 where the hardware multiplies it fast,
    fp16 on a GPU without it, else fp32. Of several GPUs each process of torchrun takes its own."""
    n_gpus, n_processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mps = torch.backends.mps.is_available() and n_processes == 1
    there = {"cuda": n_gpus >= n_processes, "mps": mps, "cpu": True}
    if device == "auto":
        device = "cuda" if n_gpus else "mps" if mps else "cpu"
    rule = f"not for {n_processes} processes here, where PyTorch finds {n_gpus} GPUs; use cpu"
    require(there[device], "device", device, rule)
    require(precision != "fp16" or device == "cuda", "precision", precision, f"not on {device}")
    has = torch.cpu.get_capabilities() if device == "cpu" else {}
    best = "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")  # or TF32
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, best if precision == "auto" else precision

def start_processes(device):
    """Let the processes of torchrun, if there are some, exchange tensors."""
    if WORLD_SIZE > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=6))  # a download takes long
        except ValueError as error:
            raise InputError(f"WORLD_SIZE is set, but not by torchrun: {error}") from error

def total(tensor):
    """The sum of a tensor over all processes, in its place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor

def require_same(data):
    """Raise InputError if the processes have prepared different data."""
    number = int(digest(repr(data).encode()), 16) >> 16  # 48 bits, so that the sum has 63
    if int(total(torch.tensor(number))) != WORLD_SIZE * number:
        raise InputError("the processes have found different stories: they need the same folders")

def wait(here):
    """If here, wait until all other processes wait, too, here or elsewhere."""
    if here:
        total(torch.zeros(1))

def share(batches):
    """The batches of this process. Each process has as many: some get an empty one at the end."""
    missing = -len(batches) % WORLD_SIZE
    return (batches + [batches[0][:0]] * missing)[RANK::WORLD_SIZE]

if __name__ == "__main__":
    run(main, "; the same command, without --overwrite, goes on from the last save")
