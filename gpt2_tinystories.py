"""Train a small GPT-2 on TinyStories: one file, made to be read from top to bottom.

    python gpt2_tinystories.py                              train: ./tinystories_local, else downloaded, else built in
    python gpt2_tinystories.py --init gpt2 --learning-rate 1e-4 --checkpoints tuned --plots tuned   another GPT-2, tuned
    torchrun --nproc-per-node 8 gpt2_tinystories.py         train on 8 GPUs
    python gpt2_generate.py                                 write stories with the newest checkpoint

After every epoch it leaves checkpoints/epoch_N, a standard Hugging Face GPT-2 folder with a sample story in
sample.txt, and plots/training_metrics.png and .csv. The same command again continues an interrupted run.

Shapes in the comments: B stories in a batch, T tokens in a story, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import argparse
import csv
import errno
import http.client
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cache
from hashlib import blake2b, file_digest
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# transformers, datasets and matplotlib are imported where they are used: importing this file stays quick.

HUB_STORIES, LOCAL_STORIES = "roneneldan/TinyStories", "tinystories_local"
HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"
BUILT_IN, N_BUILT_IN = "built-in stories", 12_000
END_OF_STORY = "<|endoftext|>"
IGNORE = -100  # the target of padding
SUMS, WEIGHTS, STATE = "SHA256SUMS", "model.safetensors", "training_state.pt"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- Settings: a field is a flag, a row of the README's table and an entry of a checkpoint's training.json -----------


class InputError(ValueError):
    """A mistake that the user can mend: shown as one line, exit code 2."""


def require(condition, name, value, rule):
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} {value}: {rule}")


def setting(default, help, choices=None, free=False):
    """A field of a settings class. free: an interrupted run may be continued with another value."""
    return field(default=default, metadata={"help": help, "choices": choices, "free": free})


@dataclass(frozen=True)
class Settings:
    data: str = setting("auto", "auto, sample, a save_to_disk folder, a .txt, .jsonl or .parquet file, or a Hub id")
    fraction: float = setting(0.1, "share of the stories that is used")
    test_fraction: float = setting(0.1, "share of those that is held out for testing")
    tokenizer: str = setting("auto", "Hub name, folder or bpe:SIZE; auto is gpt2, for the built-in stories bpe:4096")
    init: str = setting("", "GPT-2 checkpoint to start from, a folder or a Hub id; it brings its sizes and tokenizer")
    n_positions: int = setting(256, "longest story in tokens; longer ones are cut")
    n_embd: int = setting(768, "width of the model")
    n_layer: int = setting(2, "decoder layers")
    n_head: int = setting(12, "attention heads of a layer")
    n_inner: int = setting(1536, "width of the feed-forward layers")
    dropout: float = setting(0.0, "share of the activations dropped in training")
    epochs: int = setting(5, "passes over the training stories")
    batch_size: int = setting(8, "stories in a batch, in each process")
    accum_steps: int = setting(2, "batches accumulated in an optimizer step", free=True)
    learning_rate: float = setting(3e-4, "peak rate of AdamW; tenfold for embedding and head, except with --init")
    muon_learning_rate: float = setting(0.02, "peak rate of Muon, for the matrices of the layers; not with --init")
    warmup_steps: int = setting(100, "steps of linear warm-up, at most a tenth of the run; then linear decay to zero")
    weight_decay: float = setting(0.1, "weight decay of the matrices")
    grad_clip: float = setting(1.0, "largest norm of the gradient")
    seed: int = setting(42, "seed of everything random")
    max_steps: int = setting(0, "stop after so many optimizer steps; 0: after all epochs")
    save_every: float = setting(10.0, "minutes between saves inside an epoch", free=True)
    device: str = setting("auto", "where to compute", ("auto", "cuda", "cpu", "mps"), free=True)
    precision: str = setting("auto", "format of the matrix products", ("auto", "fp32", "bf16", "fp16"), free=True)
    compile: str = setting("auto", "torch.compile; auto: on a CUDA GPU", ("auto", "on", "off"), free=True)
    checkpoints: str = setting("checkpoints", "folder of the checkpoints", free=True)
    plots: str = setting("plots", "folder of the plots", free=True)
    overwrite: bool = setting(False, "start over although a run is there", free=True)
    prompt: str = setting("Once upon a time, in a small village", "beginning of the samples", free=True)

    def __post_init__(self):
        for name in ("n_embd", "n_layer", "n_head", "n_inner", "epochs", "batch_size", "accum_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("warmup_steps", "weight_decay", "seed", "max_steps", "save_every"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must be a number of at least 0")
        for name in ("learning_rate", "muon_learning_rate", "grad_clip"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "must be a number above 0")
        require(self.seed < 2**32, "seed", self.seed, "must be below 2**32")
        require(self.n_positions >= 2, "n_positions", self.n_positions, "must be at least 2")
        require(0 < self.fraction <= 1, "fraction", self.fraction, "must be above 0 and at most 1")
        require(0 < self.test_fraction < 1, "test_fraction", self.test_fraction, "must be between 0 and 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be at least 0 and below 1")
        require(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"must be a multiple of --n-head {self.n_head}")
        require(self.n_embd % 2 == 0, "n_embd", self.n_embd, "must be even: sines and cosines come in pairs")
        require(self.prompt.strip(), "prompt", repr(self.prompt), "must not be empty")
        for name in ("tokenizer", "n_embd", "n_layer", "n_head", "n_inner") if self.init else ():
            value = getattr(self, name)
            require(value == getattr(Settings, name), name, value, f"the checkpoint of --init {self.init} has its own")
        unused = not self.init or self.muon_learning_rate == Settings.muon_learning_rate
        require(unused, "muon_learning_rate", self.muon_learning_rate, "is not used with --init")
        inside = Path(self.init).exists() and Path(self.checkpoints).resolve() in Path(self.init).resolve().parents
        require(not inside, "init", self.init, "lies in --checkpoints, which is for the new run: give another folder")


# --- Data: stories, tokenizer, token ids, batches of similar length --------------------------------------------------


def load_stories(data, cache_dir):
    """A datasets.Dataset with a column `text`, and the name of its source, for every form of --data."""
    if data == "auto":
        return load_default_stories(cache_dir)
    if data == "sample":
        return built_in_stories(), BUILT_IN
    path, files = Path(data), (".txt", ".jsonl", ".parquet")
    if path.exists():
        require(path.is_dir() or path.suffix in files, "data", data, f"neither a folder nor one of {', '.join(files)}")
        require(path.is_dir() or path.stat().st_size, "data", data, "is empty")
    else:
        hub_id = re.fullmatch(HUB_ID, data) and path.suffix not in files
        require(hub_id, "data", data, "no such file or folder")
        if not hub_answers():
            os.environ["HF_HUB_OFFLINE"] = "1"  # read by datasets when it is imported: it then asks its cache alone
    try:
        stories = read_stories(path, cache_dir)
    except Exception as error:  # each kind of broken file raises another exception; the message names the cause
        if getattr(error.__cause__ or error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"--data {data}: {error.__cause__ or error}") from error
        require(path.exists() or hub_answers(), "data", data, "not here, and the Hugging Face Hub cannot be reached")
        raise InputError(f"--data {data}: cannot be read as stories: {error.__cause__ or error}") from error
    if isinstance(stories, dict):  # a DatasetDict
        require("train" in stories, "data", data, f"has no split `train`, only {', '.join(stories)}")
        stories = stories["train"]
    kinds = {name: getattr(feature, "dtype", feature) for name, feature in stories.features.items()}
    is_text = kinds.get("text") in ("string", "large_string")
    require(is_text, "data", data, f"needs a column `text` of strings, has {kinds}")
    return stories, path.name if path.exists() else data


def read_stories(path, cache_dir):
    import datasets

    if path.is_dir():
        return datasets.load_from_disk(str(path))
    if path.suffix == ".txt":
        version = {"path": str(path), "size": path.stat().st_size, "changed": path.stat().st_mtime_ns}
        return datasets.Dataset.from_generator(read_text_file, gen_kwargs=version, cache_dir=str(cache_dir))
    if path.exists():
        kind = "json" if path.suffix == ".jsonl" else "parquet"
        return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache_dir))
    return datasets.load_dataset(path.as_posix(), split="train")


def load_default_stories(cache_dir):
    """./tinystories_local; else TinyStories from the Hub, saved there; else, with no network, the built-in stories."""
    if rank() and not Path(LOCAL_STORIES).exists():  # then process 0 has had to take these
        return load_stories("sample", cache_dir)
    if not Path(LOCAL_STORIES).exists():
        print(f"stories    looking for {HUB_STORIES} on the Hugging Face Hub (1 GB, kept here)", flush=True)
        try:
            stories, _ = load_stories(HUB_STORIES, cache_dir)
        except InputError as error:
            print(f"{'=' * 100}\nTHE BUILT-IN STORIES are used: no ./{LOCAL_STORIES} here, and no download possible.\n"
                  "For the real ones bring that folder, or a network, and run this again with --overwrite.\n"
                  f"({error})\n{'=' * 100}", flush=True)
            return load_stories("sample", cache_dir)
        shutil.rmtree(LOCAL_STORIES + ".tmp", ignore_errors=True)
        stories.save_to_disk(LOCAL_STORIES + ".tmp")
        for path in Path(LOCAL_STORIES + ".tmp").rglob("*"):
            flush(path)
        os.rename(LOCAL_STORIES + ".tmp", LOCAL_STORIES)  # the folder is whole or absent
    return load_stories(LOCAL_STORIES, cache_dir)


def built_in_stories():
    from datasets import Dataset

    from sample_stories import sample_stories

    return Dataset.from_dict({"text": list(sample_stories(N_BUILT_IN))})


def read_text_file(path, size, changed):
    """Yield the stories of a text file, separated by <|endoftext|>. size and changed tell the cache its version."""
    rest = ""
    with open(path, encoding="utf-8") as file:
        while part := file.read(1 << 20):
            *stories, rest = (rest + part).split(END_OF_STORY)
            yield from ({"text": story} for story in stories)
    if rest.strip():
        yield {"text": rest}


def split_stories(stories, settings):
    """(train, test, counts): a seeded random slice, without empty stories and duplicates, split in two."""
    rng = np.random.default_rng(settings.seed)
    n_chosen = max(1, round(settings.fraction * len(stories))) if len(stories) else 0
    chosen = stories.select(np.sort(rng.choice(len(stories), n_chosen, replace=False)))
    texts = ((text or "").strip() for rows in chosen.iter(1000) for text in rows["text"])
    digests = np.fromiter((int(digest(text), 16) if text else 0 for text in texts), np.uint64, n_chosen)
    _, first = np.unique(digests, return_index=True)  # the first story of each text
    kept = rng.permutation(np.sort(first[digests[first] != 0]))
    n_test = max(1, round(settings.test_fraction * len(kept)))
    require(n_test < len(kept), "data", settings.data, f"{len(stories)} stories, of which --fraction "
            f"{settings.fraction} leaves {len(kept)}: too few to train and test (--fraction 1 takes all; a .txt needs "
            f"{END_OF_STORY} between)")
    test, train = np.sort(kept[:n_test]), np.sort(kept[n_test:])
    n_empty = int((digests == 0).sum())
    counts = {"stories": len(stories), "train_stories": len(train), "test_stories": n_test, "empty": n_empty,
              "duplicates": n_chosen - n_empty - len(kept),
              "fingerprint": digest(digests[np.concatenate((train, test))].tobytes())}
    return chosen.select(train), chosen.select(test), counts


def digest(content):
    content = content.encode() if isinstance(content, str) else content
    return blake2b(content, digest_size=8).hexdigest()


def load_tokenizer(name, stories):
    """A Hugging Face tokenizer by its Hub name or folder; bpe:SIZE trains a byte-level BPE on the stories."""
    if name.startswith("bpe:"):
        return train_tokenizer(name, stories)
    try:  # the local cache first: with no network transformers would retry for minutes
        return open_tokenizer(name, local_files_only=True)
    except Exception as error:  # each kind of broken file raises another exception; the message names the cause
        require(not Path(name).exists(), "tokenizer", name, f"cannot be loaded: {error}")
    require(hub_answers(), "tokenizer", name, "not in the local cache, and the Hugging Face Hub cannot be reached; "
            "run once with a network, or use --tokenizer bpe:4096")
    try:
        return open_tokenizer(name, local_files_only=False)
    except Exception as error:
        raise InputError(f"--tokenizer {name}: cannot be loaded from the Hub: {error}") from error


def open_tokenizer(name, local_files_only):
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only, trust_remote_code=False)
    # Where files are missing, some versions of transformers return an empty tokenizer.
    if len(tokenizer) <= 256 or not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"not usable: {len(tokenizer)} tokens, end of text {tokenizer.eos_token}")
    return tokenizer


def train_tokenizer(name, stories):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    size = int(name[4:]) if name[4:].isdecimal() else 0
    require(size > 256, "tokenizer", name, "needs a size of at least 257, for 256 bytes and the end of a story")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_STORY], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # Of a story 10,000 characters: the time goes with the square of a word's length.
    bpe.train_from_iterator(([text[:10_000] for text in rows["text"]] for rows in stories.iter(1000)), trainer)
    model = json.loads(bpe.to_str())["model"]
    return GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def encode(tokenizer, texts):
    """Token ids of texts. <|endoftext|> inside a text is read as plain characters, never as the end of a story."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


class Tokens(NamedTuple):
    """Tokenised stories: ids is a memory-mapped Arrow column of the ids of each story."""

    ids: Any
    lengths: np.ndarray  # number of targets of each story: of its ids but the first
    n_cut: int  # tokens that were cut off, of all stories


def encode_stories(stories, tokenizer, n_positions, cache_file):
    """The Tokens of stories, kept in cache_file: the ids and then <|endoftext|>, cut to n_positions + 1 of them."""
    from datasets import Features, Sequence, Value

    def encode_rows(rows):
        ids = encode(tokenizer, [text.strip() for text in rows["text"]])
        ids = [story + [tokenizer.eos_token_id] for story in ids]
        return {"ids": [i[: n_positions + 1] for i in ids], "cut": [max(0, len(i) - n_positions - 1) for i in ids]}

    cache_file.parent.mkdir(parents=True, exist_ok=True)
    id_type = "uint16" if len(tokenizer) <= 1 << 16 else "int32"
    is_there = cache_file.exists()
    try:
        encoded = stories.map(encode_rows, batched=True, remove_columns=stories.column_names, desc="tokenising",
                              features=Features({"ids": Sequence(Value(id_type)), "cut": Value("int64")}),
                              cache_file_name=str(cache_file), new_fingerprint=cache_file.stem)
    except (OSError, ValueError) as error:
        if is_there:
            raise InputError(f"{cache_file} is damaged, delete it: {error}") from error
        raise OSError(f"{cache_file} cannot be written: {error.__context__ or error}") from error
    if not is_there:
        flush(cache_file)
    ids = encoded.data.column("ids")
    lengths = np.concatenate([np.diff(chunk.offsets) for chunk in ids.chunks]) - 1
    return Tokens(ids, lengths, int(np.sum(encoded.data.column("cut"))))


def prepare_stories(settings, before, tokenizer=None):
    """(train, test, tokenizer, data): the Tokens of both parts, and what the record says of them. before: the record of
    the run to continue, if any; one that was begun with the built-in stories does not look for others. tokenizer: the
    one to take instead of --tokenizer."""
    cache_dir = Path(settings.checkpoints) / "data"
    built_in = before and before["data"]["source"] == BUILT_IN
    stories, source = load_stories("sample" if built_in else settings.data, cache_dir)
    train_stories, test_stories, data = split_stories(stories, settings)
    print(f"stories    {data['train_stories']:,} to train, {data['test_stories']:,} to test, of {len(stories):,} from "
          f"{source}; dropped {data['empty']:,} empty ones and {data['duplicates']:,} duplicates", flush=True)
    name = settings.init or settings.tokenizer
    if name == "auto":
        name = "bpe:4096" if source == BUILT_IN else "gpt2"
    tokenizer = tokenizer or load_tokenizer(name, train_stories)
    tokenizer_digest = digest(tokenizer.backend_tokenizer.to_str())
    train, test = (
        encode_stories(part, tokenizer, settings.n_positions,
                       cache_dir / f"{label}-{data['fingerprint']}-{tokenizer_digest}-{settings.n_positions}.arrow")
        for label, part in (("train", train_stories), ("test", test_stories))
    )
    n_tokens, n_cut = int(train.lengths.sum() + test.lengths.sum()), train.n_cut + test.n_cut
    print(f"tokens     {n_tokens:,} of {name}, {len(tokenizer):,} in the vocabulary; {n_cut / (n_tokens + n_cut):.1%} "
          f"of all cut off at {settings.n_positions}", flush=True)
    return train, test, tokenizer, data | {"source": source, "tokenizer": tokenizer_digest, "tokens_cut": n_cut,
                                           "train_tokens": int(train.lengths.sum())}


def epoch_batches(lengths, batch_size, seed, epoch):
    """The batches of an epoch, arrays of story numbers, each story once: a pure function of its arguments. Stories of
    similar length come together, sorted inside windows of 100 batches, so that little of a batch is padding."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    batches = []
    for window in np.split(order, range(100 * batch_size, len(order), 100 * batch_size)):
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += np.split(window, range(batch_size, len(window), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def pad_batch(stories):
    """(input_ids, targets), both (B, T): the ids, and the same moved by one. Padding stands on the right, where causal
    attention never looks, and is masked by length: the <|endoftext|> that ends a story is a target like any other. No
    stories make one token of padding."""
    stories = [torch.from_numpy(story.values.to_numpy().astype(np.int64)) for story in stories]
    stories = stories or [torch.full((2,), IGNORE)]
    ids = nn.utils.rnn.pad_sequence(stories, batch_first=True, padding_value=IGNORE)
    return ids[:, :-1].clamp(min=0), ids[:, 1:]


def make_loader(ids, batches, pin_memory=False):
    """A DataLoader of (input_ids, targets) for batches of story numbers."""
    return torch.utils.data.DataLoader(ids, batch_sampler=batches, collate_fn=pad_batch, pin_memory=pin_memory)


# --- Model: GPT-2 (Radford et al., 2019) with its module names, as transformers.GPT2LMHeadModel computes it ----------


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
            cache.update(k=k, v=v)
        # With a filled cache T is 1, and the one new token may look at everything.
        dropout_p = self.attn_pdrop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)
        return self.resid_dropout(self.c_proj(x.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. config: a transformers.GPT2Config, whose tie_word_embeddings says whether the output head has weights of
    its own or those of the token embedding; tokenizer: for generate_text."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        std = config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # what a block adds to its input is scaled down, as there are 2 n_layer of them
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer) if "c_proj" in name else std)
        # A sinusoid's root mean square is sqrt(1/2). Scaled to 3 std, it is not drowned by token embeddings that grow.
        position = 3 * math.sqrt(2) * std * sinusoid(config.n_positions, config.n_embd)
        self.wpe.weight = nn.Parameter(position, requires_grad=False)
        self.fold(torch.arange(config.vocab_size, device="cpu"))

    def fold(self, row):
        """Keep one row of wte and lm_head for all tokens that have the same number in row (V,), a tensor on the CPU:
        the row of the first of them. Only the last row may stand for several tokens. To be called while each token has
        a row of its own, and before the model goes to its device."""
        _, first = np.unique(row.numpy(), return_index=True)
        n_tokens = row.bincount()
        self.n_shared = int(n_tokens[-1])
        self.register_buffer("row", row, persistent=False)
        self.register_buffer("log_n", n_tokens.to(self.wte.weight.dtype).log(), persistent=False)
        for layer in (self.wte, self.lm_head):
            layer.weight = nn.Parameter(layer.weight.detach()[first])
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, input_ids, targets=None):
        """Logits (B, T, V) for the token after each of input_ids (B, T), with T at most n_positions; given targets
        (B, T), cross-entropy in nats and number of right guesses, both summed over the real tokens (0-d tensors)."""
        logits = self.lm_head(self.hidden_states(input_ids))  # (B, T, R): R rows, which stand for V tokens
        if targets is None:
            return logits[..., self.row]
        is_real = targets != IGNORE
        target = self.row[targets * is_real]
        log_n = self.log_n[target]
        right = (logits.argmax(-1) == target) & is_real & (log_n == 0)  # a row of several tokens is no guess
        # A row of n tokens has n terms in the softmax's denominator, and each of them an n-th of its probability.
        loss = F.cross_entropy((logits + self.log_n).flatten(0, 1), target.flatten(), reduction="none")
        return ((loss.view_as(target) + log_n) * is_real).sum(), right.sum()

    def hidden_states(self, input_ids, cache=None):
        """What the head is applied to, (B, T, C). cache, a list of an empty dict for each layer at first, lets the next
        call go on from here with one more token."""
        seen = cache[0]["k"].size(2) if cache and cache[0] else 0
        positions = torch.arange(seen, seen + input_ids.size(1), device=input_ids.device)
        x = self.drop(self.wte(self.row[input_ids]) + self.wpe(positions))  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        return self.ln_f(x)


def sinusoid(n_positions, n_embd):
    """(n_positions, n_embd): sines in even columns, cosines in odd ones; "Attention Is All You Need", section 3.5."""
    frequencies = torch.exp(torch.arange(0, n_embd, 2) * (-math.log(10_000) / n_embd))
    angles = torch.arange(n_positions)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def rows_of(has_own):
    """The row of each token (V,) for GPT.fold: one of its own for each token of the mask has_own (V,), and the last one
    for all others."""
    return torch.where(has_own, has_own.cumsum(0) - 1, has_own.sum())


def rows_of_stories(parts, vocab_size):
    """The same for Tokens to train and test on: tokens that are in none of them share a row, but for up to 63. As no
    story has them, they get equal gradients, so if they are equal at first, they stay equal, and one row can stand for
    all of them."""
    is_there = torch.zeros(vocab_size, dtype=torch.bool)
    for chunk in (chunk for part in parts for chunk in part.ids.chunks):
        is_there[torch.from_numpy(chunk.flatten().to_numpy().astype(np.int64))] = True
    n_more = -(int(is_there.sum()) + 1) % 64  # in multiples of 64 rows the matrix products are faster
    is_there[(~is_there).nonzero()[:n_more]] = True
    return rows_of(is_there)


@contextmanager
def evaluation_mode(model):
    """No dropout inside; afterwards the mode that was there before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# --- Generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate_text(model, prompt, max_length=50, method="greedy", *, temperature=1.0, top_k=0, top_p=1.0,
                  repetition_penalty=1.0, stop=(), num_samples=1, seed=None, streamer=None):
    """The prompt and at most max_length new tokens, up to <|endoftext|> or to the token with which one of the texts in
    stop is in the new text: a str; if num_samples > 1, a list of so many; of a list of prompts, the list of all texts.

    method: "greedy" takes the likeliest token; "sample" divides the logits by temperature and draws from the top_k
    likeliest tokens (0: all), of those from the fewest that together have the probability top_p. repetition_penalty
    above 1 makes tokens that were there less likely, with both methods. Sample i of a prompt is drawn with seed + i,
    alone or among others. streamer, a transformers.TextStreamer, is given every token at once. When the context is
    full, its older half is dropped. Raises InputError for an empty prompt, one that is too long, and values out of
    range.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    require(method in ("greedy", "sample"), "method", method, "must be greedy or sample")
    require(max_length >= 1, "max_length", max_length, "must be at least 1")
    require(0 < temperature < math.inf, "temperature", temperature, "must be a number above 0")
    require(top_k >= 0, "top_k", top_k, "must be at least 0")
    require(0 < top_p <= 1, "top_p", top_p, "must be above 0 and at most 1")
    require(0 < repetition_penalty < math.inf, "repetition_penalty", repetition_penalty, "must be a number above 0")
    require(all(stop), "stop", stop, "must not be empty")
    require(num_samples >= 1, "num_samples", num_samples, "must be at least 1")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    require(prompts, "prompt", prompts, "must be at least one text")
    n_texts = len(prompts) * num_samples
    require(n_texts == 1 or streamer is None, "streamer", f"for {n_texts} texts", "it shows one at a time")

    def choose(logits, tokens, i):
        logits = penalize(logits, tokens, repetition_penalty)
        if method == "greedy":
            return logits.argmax(-1)
        return pick(next_probabilities(logits, temperature, top_k, top_p), numbers[:, i : i + 1])

    texts = []
    for ids in [encode_prompt(model, text) for text in prompts]:
        if method == "sample":
            seeds = [None if seed is None else seed + i for i in range(num_samples)]
            numbers = torch.stack([uniform_numbers(max_length, seed) for seed in seeds]).to(model.device)
        rows = continue_rows(model, ids, num_samples, max_length, choose, stop, streamer)
        texts += model.tokenizer.batch_decode(rows)
    return texts[0] if isinstance(prompt, str) and num_samples == 1 else texts


@torch.no_grad()
def continue_rows(model, ids, n_rows, max_length, choose, stop=(), streamer=None):
    """n_rows lists of ids, each with up to max_length more, as described for generate_text. choose makes new ids (B,)
    of logits (B, V), the tokens so far (B, T) and the number of new tokens before this one."""
    tokens = inputs = torch.tensor([ids] * n_rows, device=model.device)  # (B, T)
    end, cache = model.tokenizer.eos_token_id, [{} for _ in model.h]
    n_bytes = max((len(text.encode()) for text in stop), default=0)  # of the longest stop; a token has one at least
    done = torch.zeros(n_rows, dtype=torch.bool, device=model.device)
    if streamer:
        streamer.put(tokens.cpu())
    with evaluation_mode(model):
        for i in range(max_length):
            logits = model.lm_head(model.hidden_states(inputs, cache)[:, -1])[:, model.row]
            new = choose(logits, tokens, i).masked_fill(done, end)  # what is done goes on with ends, cut off below
            done = done | (new == end)
            tokens, inputs = torch.cat((tokens, new[:, None]), dim=1), new[:, None]
            if streamer and not done[0]:
                streamer.put(new.cpu())
            if stop:
                ends = model.tokenizer.batch_decode(tokens[:, max(len(ids), tokens.size(1) - n_bytes) :])
                done = done | torch.tensor([any(s in text for s in stop) for text in ends], device=done.device)
            if done.all():
                break
            if cache[0]["k"].size(2) == model.config.n_positions:  # full: go on with the newer half
                inputs, cache = tokens[:, -(model.config.n_positions // 2) :], [{} for _ in model.h]
    if streamer:
        streamer.end()
    return [row[: row.index(end, len(ids))] if end in row[len(ids) :] else row for row in tokens.tolist()]


def encode_prompt(model, prompt):
    require(prompt.strip(), "prompt", repr(prompt), "must not be empty")
    require(not re.search("[\ud800-\udfff]", prompt), "prompt", repr(prompt), "has bytes that are no UTF-8")
    ids, n_positions = encode(model.tokenizer, prompt), model.config.n_positions
    require(len(ids) <= n_positions, "prompt", repr(prompt[:30] + "…"), f"has {len(ids)} tokens, {n_positions} fit")
    return ids


def penalize(logits, tokens, penalty):
    """Logits (B, V) with those of the tokens (B, T) made smaller: divided by penalty, if negative multiplied with it
    (Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", section 4.1)."""
    if penalty == 1:
        return logits
    seen = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))


def next_probabilities(logits, temperature, top_k, top_p):
    """Probabilities (B, V) from logits (B, V): temperature, then the top_k likeliest, then the nucleus of top_p
    (Holtzman et al., "The Curious Case of Neural Text Degeneration"), in the order of transformers."""
    logits = logits / temperature
    if top_k:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    probabilities = logits.softmax(-1)
    if top_p == 1:
        return probabilities
    ranked, order = probabilities.sort(descending=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # the likelier tokens before this one are enough
    return torch.zeros_like(ranked).scatter(-1, order, ranked / ranked.sum(-1, keepdim=True))


def pick(probabilities, numbers):
    """Ids (B,) drawn from probabilities (B, V) with uniform numbers (B, 1): the first ones whose sum exceeds these."""
    sums = probabilities.float().cumsum(-1)
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True)[:, 0]


def uniform_numbers(n, seed):
    """n random numbers from [0, 1), made on the CPU: a seed gives the same ones for every device."""
    return torch.rand(n, generator=None if seed is None else torch.Generator().manual_seed(seed))


# --- Optimizers ------------------------------------------------------------------------------------------------------


def make_optimizers(model, settings, dtype):
    """AdamW, with ten times the rate for embedding and head, and Muon for the matrices of the layers, with products in
    dtype. With --init AdamW alone, at one rate: weights that it has made go on best with it, and with small steps."""
    matrices_of_blocks = ([weight for weight in block.parameters() if weight.dim() == 2] for block in model.h)
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    rate, decay, options = settings.learning_rate, settings.weight_decay, {"betas": (0.9, 0.99), "fused": True}
    vectors = {"params": vectors, "lr": rate, "weight_decay": 0.0}
    if settings.init:
        matrices = [weight for weight in model.parameters() if weight.dim() == 2]
        return [torch.optim.AdamW([{"params": matrices, "lr": rate, "weight_decay": decay}, vectors], **options)]
    outer = {"params": [model.wte.weight, model.lm_head.weight], "lr": 10 * rate, "weight_decay": decay}
    return [torch.optim.AdamW([outer, vectors], **options),
            Muon([{"params": list(same), "lr": settings.muon_learning_rate, "weight_decay": decay}
                  for same in zip(*matrices_of_blocks, strict=True)], dtype)]


def schedule(step, n_steps, warmup_steps):
    """The share of the peak learning rate at optimizer step `step`, from 0: linear warm-up, then linear decay to 0."""
    warmup = min(warmup_steps, n_steps // 10)
    return min((step + 1) / (warmup + 1), (n_steps - step) / (n_steps - warmup))


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, so that a matrix learns as fast in all directions (Jordan et al., "Muon: An optimizer
    for hidden layers in neural networks", 2024). As torch.optim.Muon, but for its products' format, which there is
    always bf16, very slow on a CPU that has no instructions for it, and for its five iterations, here four."""

    def __init__(self, groups, dtype):
        super().__init__(groups, {})
        self.dtype = dtype  # of the matrix products

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:  # matrices of one shape (M, N)
            weights, (n_out, n_in) = group["params"], group["params"][0].shape
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            gradients = [weight.grad for weight in weights]
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, momenta, 0.95)  # as Nesterov does
            updates = orthogonalize(torch.stack(ahead), self.dtype).to(weights[0].dtype)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates.unbind(), alpha=-group["lr"] * math.sqrt(max(1, n_out / n_in)))


# Each (a, b, c) is the polynomial a s + b s^3 + c s^5 that brings the values s, which the one before it leaves of
# [0.001, 1], closest to 1 (Amsel et al., "The Polar Express", 2025). All are stretched by 2 %: beyond 1 they soon grow
# without bounds, and rounding can get there. The last is taken 0.85 times: with that, the models learn a little better.
POLAR_EXPRESS = ((8.3042, -23.6599, 16.8731), (4.1026, -2.9311, 0.5262), (3.8958, -2.7935, 0.5115),
                 (2.7758, -2.0060, 0.3958))


def orthogonalize(x, dtype):
    """Matrices (L, M, N) with the singular vectors of x, and singular values s that are made of its own, divided by
    their norm: between 0.36 and 1.33 where these are above 0.001, and less than 400 times as large where not."""
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT, dtype).mT
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


# --- Training --------------------------------------------------------------------------------------------------------


def train(model, train_set, test_set, settings, record, precision):
    """Train to the last step, from where checkpoints/last stands; after every epoch save, evaluate, sample and plot."""
    device, folder, seed = model.device.type, Path(settings.checkpoints), settings.seed
    batches_a_step = settings.accum_steps * world_size()
    test_loader = make_loader(test_set.ids, share(epoch_batches(test_set.lengths, settings.batch_size, seed, 0)))
    model.train()
    prepare_backend(device, precision)
    autocast = torch.autocast(device, DTYPES[precision], enabled=precision != "fp32")
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    optimizers = make_optimizers(model, settings, DTYPES[precision])
    progress = restore_last(folder, optimizers, scaler)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    compiling = settings.compile == "on" or (settings.compile == "auto" and device == "cuda")
    learner = compile_model(model, next(iter(test_loader)), autocast) if compiling else model
    if world_size() > 1:
        learner = DistributedDataParallel(learner, gradient_as_bucket_view=True)
        learner.broadcast_buffers = False  # they never change
    n_steps, per_epoch, noted, saved_at = record["steps"], record["steps_per_epoch"], False, time.monotonic()
    for epoch in range(len(record["epochs"]) + 1, math.ceil(n_steps / per_epoch) + 1):
        start, stop = (epoch - 1) * per_epoch, min(epoch * per_epoch, n_steps)
        if progress["step"] == start:
            progress.update(loss=0.0, right=0, tokens=0, seconds=0.0)
        batches = epoch_batches(train_set.lengths, settings.batch_size, seed, epoch)
        batches = batches[(progress["step"] - start) * batches_a_step : (stop - start) * batches_a_step]
        token_counts = iter(count_tokens(train_set.lengths, batches, batches_a_step))
        loader = iter(make_loader(train_set.ids, share(batches), pin_memory=device == "cuda") if batches else ())
        pending, stopping, drained_at = [], 0, time.monotonic()
        bar = progress_bar(f"epoch {epoch}/{settings.epochs}", progress["step"] - start, stop - start)
        with signals_noted() as signals:
            while window := list(islice(loader, settings.accum_steps)):
                # Dropout depends on the step and the process alone.
                torch.manual_seed((seed * 1_000_003 + progress["step"]) * world_size() + rank())
                for group, peak in groups:
                    group["lr"] = peak * schedule(progress["step"], n_steps, settings.warmup_steps)
                n_tokens = next(token_counts)
                sums = update(model, learner, window, n_tokens, optimizers, settings.grad_clip, autocast,
                              scaler)
                pending.append((*sums, n_tokens))
                progress["step"] += 1
                bar.update()
                save_now = time.monotonic() - saved_at > 60 * settings.save_every
                stopping, save_now = largest(max(signals, default=0), save_now)
                at_point = progress["step"] % record["steps_per_point"] == 0
                if at_point or progress["step"] == stop or save_now or stopping:
                    loss = drain(pending, progress, record, scaler)
                    progress["seconds"] += time.monotonic() - drained_at
                    drained_at = time.monotonic()
                    whole = show_progress(bar, loss, progress, n_steps)
                    noted = noted or (bar.n - bar.initial >= 5 and note_if_long(whole, settings))
                if stopping:
                    break
                if save_now:
                    save_last(folder, model, record, progress, optimizers, scaler)
                    saved_at = time.monotonic()
            save_last(folder, model, record, progress, optimizers, scaler)
            saved_at = time.monotonic()
            bar.close()
            (stopping,) = largest(max(signals, default=stopping))
        if stopping:
            raise KeyboardInterrupt(int(stopping), f"saved after step {progress['step']:,} of {n_steps:,}")
        test_loss, test_accuracy = evaluate(model, test_loader)  # in fp32, on CUDA with TF32
        finish_epoch(model, epoch, test_loss, test_accuracy, settings, record, progress)


def count_tokens(lengths, batches, batches_a_step):
    """The number of real tokens of each step, in all processes."""
    windows = (batches[i : i + batches_a_step] for i in range(0, len(batches), batches_a_step))
    return [int(lengths[np.concatenate(window)].sum()) for window in windows]


def update(model, learner, window, n_tokens, optimizers, grad_clip, autocast, scaler):
    """Update the weights of model from a window of batches; learner is what backward takes. Returns (summed loss, right
    guesses, whether it or its gradient is not finite), all on the device: nobody waits to see them."""
    loss, right = backward(learner, window, n_tokens, autocast, scaler)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    # The head's last row has the sum of the gradients of n tokens, whose rows are equal, and so are their gradients:
    # divided by sqrt(n), it has the norm of all n together, and divided by n, it is the gradient of one of them.
    shared = model.lm_head.weight.grad[-1]
    shared /= math.sqrt(model.n_shared)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    shared /= math.sqrt(model.n_shared)
    if not scaler.is_enabled() or norm.isfinite():  # a gradient that overflows in fp16 is skipped, the scale reduced
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    scaler.update()
    return loss, right, ~torch.isfinite(loss if scaler.is_enabled() else norm)


def backward(learner, window, n_tokens, autocast=None, scaler=None):
    """Add up the gradients of a window, a list of batches: those of the mean loss over its n_tokens real tokens, in all
    processes, so that batches of any size and number make the same update. Returns (summed loss, right guesses) of this
    process. learner: a GPT, or torch.compile or DistributedDataParallel around it."""
    loss_sum = right_sum = 0
    for i, batch in enumerate(window):
        input_ids, targets = (tensor.to(learner.device, non_blocking=True) for tensor in batch)
        alone = isinstance(learner, DistributedDataParallel) and i < len(window) - 1
        with learner.no_sync() if alone else nullcontext():  # the processes exchange gradients with the last batch
            with autocast or nullcontext():
                loss, right = learner(input_ids, targets)
            mean = loss * (world_size() / n_tokens)  # DistributedDataParallel then takes the mean over the processes
            (scaler.scale(mean) if scaler else mean).backward()
        loss_sum, right_sum = loss_sum + loss.detach(), right_sum + right
    return loss_sum, right_sum


def compile_model(model, batch, autocast):
    """torch.compile(model), or model itself where the compiler fails on the batch: said once, and the run goes on."""
    compiled = torch.compile(model, dynamic=True)
    try:
        backward(compiled, [batch], 1, autocast)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways, and none of them has to stop the training
        print(f"compile    off: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
        compiled = model
    model.zero_grad()
    return compiled


def drain(pending, progress, record, scaler):
    """Add the latest steps, (loss, right, bad, tokens) each, to progress and curve, one by one: it does not matter how
    many come at once. Only here the steps wait for the device. Returns the loss a token of the last step."""
    sums = total(torch.stack([torch.stack([value.float() for value in step[:3]]) for step in pending])).tolist()
    always_too_large = scaler.is_enabled() and scaler.get_scale() < 1  # the gradient, for fp16
    first = progress["step"] - len(pending) + 1
    for step, ((loss, right, bad), (*_, n_tokens)) in enumerate(zip(sums, pending, strict=True), first):
        if bad or always_too_large:
            if rank():
                sys.exit(2)  # process 0 says the same
            raise InputError(f"step {step}: the loss or its gradient is not finite, the run stops; "
                             f"{last_save(record)}. Try smaller learning rates, or --precision fp32")
        for name, value in (("loss", loss), ("right", right), ("tokens", n_tokens)):
            progress[name] += value
        progress["point"] = [progress["point"][0] + loss, progress["point"][1] + n_tokens]
        if step % record["steps_per_point"] == 0 or step == record["steps"]:
            record["curve"].append([step, progress["point"][0] / progress["point"][1]])
            progress["point"] = [0.0, 0]
    pending.clear()
    return loss / n_tokens


def finish_epoch(model, epoch, test_loss, test_accuracy, settings, record, progress):
    """Add the epoch to the record, write its checkpoint with a sample, and the plots."""
    n_tokens, seconds = progress["tokens"], progress["seconds"]
    figures = {"epoch": epoch, "step": progress["step"], "train_loss": progress["loss"] / n_tokens,
               "train_accuracy": progress["right"] / n_tokens, "test_loss": test_loss,
               "test_perplexity": float(np.exp(test_loss)), "test_accuracy": test_accuracy,
               "tokens": n_tokens, "seconds": seconds}
    record["epochs"].append(figures)
    if rank():
        return
    print("epoch {epoch}/{0}  train loss {train_loss:.3f}, accuracy {train_accuracy:.1%}  test loss {test_loss:.3f}, "
          "accuracy {test_accuracy:.1%}, perplexity {test_perplexity:.2f}  {seconds:,.0f} s"
          .format(settings.epochs, **figures))
    folder = Path(settings.checkpoints) / f"epoch_{epoch}"
    sample = generate_text(model, settings.prompt, max_length=200)
    write_plots(Path(settings.plots), record)
    save_checkpoint(folder, model, record, sample)  # the last of all: that it is there says that the epoch is done
    print(f"saved {folder}, which begins a story like this:\n\n{sample}\n", flush=True)


@torch.no_grad()
def evaluate(model, loader):
    """(loss, accuracy) over all real tokens of the loader's batches: nats a token, share of right guesses. Of several
    processes each has a loader for its share of the batches, and all get the figures of the whole."""
    sums, n_tokens = [], 0
    with evaluation_mode(model):
        for input_ids, targets in loader:
            n_tokens += int((targets != IGNORE).sum())
            sums.append(torch.stack(model(input_ids.to(model.device), targets.to(model.device))))
    sums = torch.cat((torch.stack(sums).cpu().double().sum(0), torch.tensor([n_tokens])))
    loss, right, n_tokens = total(sums).tolist()
    return loss / n_tokens, right / n_tokens


def compute_perplexity(model, test_loader):
    """exp of the mean cross-entropy; each token counts the same, so that the batch size does not matter."""
    return float(np.exp(evaluate(model, test_loader)[0]))


# --- Checkpoints: Hugging Face GPT-2 folders, and the point from which an interrupted run continues ------------------


# What a config.json may say of how a GPT-2 computes, and what it is to say here.
GPT2_MATH = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in a GPT-2 file, (out, in) in nn.Linear


def gpt2_layout(model):
    """The model's tensors under the names and in the shapes of a GPT-2 file, with a row for each token."""
    layout = {f"transformer.{name}": w.T if name.endswith(TRANSPOSED) else w for name, w in model.state_dict().items()}
    layout["lm_head.weight"] = layout.pop("transformer.lm_head.weight")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        layout[name] = layout[name][model.row]
    if model.config.tie_word_embeddings:
        del layout["lm_head.weight"]
    return layout


def save_checkpoint(folder, model, record, sample=None, state=None):
    """Write the model and its tokenizer as Hugging Face does, training.json, SHA256SUMS, and if given sample.txt. With
    state, which holds the weights, too, training_state.pt takes the place of model.safetensors. All of it is written
    beside its final name, flushed and renamed: the folder is whole or absent."""
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        write_checkpoint(temporary, model, record, sample, state)
        publish(temporary, folder)
    except Exception as error:  # each library has another exception for a full disk
        shutil.rmtree(temporary, ignore_errors=True)  # which may be what filled it
        why = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{folder} cannot be saved, what was saved before is kept: {why}") from error


def write_checkpoint(folder, model, record, sample, state):
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    folder.mkdir(parents=True)
    eos = model.tokenizer.eos_token_id
    model.config.save_pretrained(folder)
    GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    if sample:
        (folder / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    if state:
        with open(folder / STATE, "wb") as file:  # given a path, torch.save does not say what was wrong with it
            torch.save(state, file)
    else:
        weights = {name: weight.contiguous() for name, weight in gpt2_layout(model).items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / WEIGHTS)  # only its owner could read it
    (folder / SUMS).write_bytes("".join(line + "\n" for line in checksums(folder)).encode())


def checksums(folder):
    """The lines that sha256sum prints for the files of a folder."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != SUMS:
            with open(path, "rb") as file:
                lines.append(f"{file_digest(file, 'sha256').hexdigest()}  {path.name}")
    return lines


def verify(folder):
    """Raise InputError where a file of a checkpoint is not the one that was saved. Other people's list no checksums."""
    if (folder / SUMS).is_file():
        saved = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
        listed = {line[66:] for line in saved}
        changed = {line[66:] for line in set(saved) - set(checksums(folder))}
        changed |= {"config.json", "tokenizer.json", STATE if STATE in listed else WEIGHTS} - listed
        if changed:
            raise InputError(f"{folder} is not as it was saved: {min(changed)} differs; if you changed that on "
                             f"purpose, delete {SUMS} there")


def publish(temporary, folder):
    """Give a complete folder its final name, in the place of what has that name."""
    for path in (*temporary.iterdir(), temporary):
        flush(path)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path):
    """Wait until a file or folder is on the disk."""
    if path.is_file() or os.name == "posix":  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)


def save_last(folder, model, record, progress, optimizers, scaler):
    """Save the point from which an interrupted run continues."""
    if not rank():
        moments = [optimizer.state_dict()["state"] for optimizer in optimizers]
        state = {"model": model.state_dict(), "row": model.row, "progress": progress, "moments": moments,
                 "scaler": scaler.state_dict()}
        try:
            save_checkpoint(folder / "last", model, record | {"step": progress["step"]}, state=state)
        except OSError as error:
            raise OSError(f"{error}; {last_save(record)}") from error
    record["step"] = progress["step"]


def last_save(record):
    step = record["step"]
    return f"{record['settings']['checkpoints']}/last is good, of step {step}" if step else "nothing was saved before"


def restore_last(folder, optimizers, scaler):
    """Load what save_last saved, but for the weights; returns the progress, at step 0 where nothing was saved."""
    path = folder / "last" / STATE
    progress = {"step": 0, "point": [0.0, 0], "loss": 0.0, "right": 0, "tokens": 0, "seconds": 0.0}
    if path.parent.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            progress = {name: type(first)(state["progress"][name]) for name, first in progress.items()}
            for optimizer, moments in zip(optimizers, state["moments"], strict=True):
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": moments, "param_groups": groups})
                names = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
                for weight, values in optimizer.state.items():
                    shapes = {values[name].shape for name in names - {"step"}}
                    if values.keys() != names or shapes != {weight.shape}:
                        raise ValueError("the optimizer's state is of other weights")
            if state["scaler"]:
                scaler.load_state_dict(state["scaler"])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each kind of broken file raises another exception; the message names the cause
            cause = str(error).partition(". ")[0]  # torch goes on to recommend weights_only=False
            raise InputError(f"{path}: cannot be read, --overwrite starts over: {cause}") from error
    return progress


def find_checkpoint(name):
    """The folder of a checkpoint: name itself, or where the files of that name on the Hub are kept."""
    if Path(name).exists():
        return Path(name)
    beside = Path(name).parent.is_dir() and len(Path(name).parts) > 1
    if beside or not re.fullmatch(HUB_ID, str(name)):
        raise InputError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    files = ["*.json", WEIGHTS, "merges.txt"]
    try:  # the local cache first, as for the tokenizer
        folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=True))
    except (OSError, ValueError):
        folder = Path(name)
    here = {path.name for path in folder.glob("*")}
    if not ({"config.json", WEIGHTS} <= here and here & {"tokenizer.json", "vocab.json"}):
        if not hub_answers():
            raise InputError(f"{name}: no folder, not in the local cache, and the Hugging Face Hub cannot be reached")
        try:
            folder = Path(snapshot_download(name, allow_patterns=files))
        except Exception as error:  # each kind of refusal is another exception; the message names the cause
            raise InputError(f"{name}: no such folder, and cannot be loaded from the Hub: {error}") from error
    return folder


def load_checkpoint(folder, device="cpu", fold=True, **changes):
    """The model in a folder of GPT-2's format, or in a run's last, with its tokenizer, in eval mode; fold: keep equal
    rows of embedding and head once, to write faster; changes: other values than those of its config.json. Raises
    InputError for anything unusable."""
    from transformers import GPT2Config

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no checkpoint, which is a folder with a config.json, as checkpoints/epoch_1")
    verify(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
        for name in ("auto_map", "task_specific_params"):  # a stranger's code and habits, not to be passed on
            values.pop(name, None)
        for name, usual in GPT2_MATH.items():
            if values.get(name, usual) != usual:
                raise ValueError(f"{name} is {values[name]}, and only {usual} is known here")
        weights = read_weights(folder, values.get("tie_word_embeddings", True))
        n_layer = sum(name.endswith(".ln_1.weight") for name in weights)
        if values["n_layer"] != n_layer:
            raise ValueError(f"{n_layer} layers of weights, {values['n_layer']} by config.json")
        if values["n_head"] < 1 or values["n_embd"] % values["n_head"]:
            raise ValueError(f"n_embd {values['n_embd']} is not a multiple of n_head {values['n_head']}")
        values["n_inner"] = values.get("n_inner") or 4 * values["n_embd"]
        with torch.device("meta"):  # no memory before the sizes are known to be those of the weights
            model = GPT(GPT2Config(**values), open_tokenizer(str(folder), local_files_only=True))
        check_weights(model, weights)
    except Exception as error:  # each kind of broken file raises another exception; the message names the cause
        cause = str(error).partition(". ")[0]  # torch goes on to recommend weights_only=False
        raise InputError(f"{folder}: cannot be read: {type(error).__name__}: {cause}") from error
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if fold:
        model.fold(rows_of(~equal_rows(model)))
    return model.to(device).eval()


def read_weights(folder, tied):
    """The tensors of a GPT's state_dict, not folded, in fp32, from a GPT-2 file or from the training state of a run.
    Older files, such as OpenAI's, call them without `transformer.`, and hold the causal mask of each layer besides."""
    from safetensors.torch import load_file

    if (folder / STATE).exists():
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        rows = {name: state["model"][name][state["row"]] for name in ("wte.weight", "lm_head.weight")}
        return state["model"] | rows
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"no {WEIGHTS}, the one file that weights are read from")
    weights = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")) and not (tied and name == "lm_head.weight"):
            if not weight.is_floating_point():
                raise ValueError(f"{name} holds {weight.dtype}")
            weight = weight.T if name.endswith(TRANSPOSED) else weight
            weight = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # not the mapped file
            weights[name.removeprefix("transformer.")] = weight
    if tied:
        weights["lm_head.weight"] = weights["wte.weight"]
    return weights


def check_weights(model, weights):
    n_known, vocab_size, expected = len(model.tokenizer), model.config.vocab_size, model.state_dict()
    if n_known != vocab_size:
        raise ValueError(f"{n_known} tokens in the tokenizer, {vocab_size} in the model")
    if strange := expected.keys() ^ weights.keys():
        raise ValueError(f"missing or unknown tensors, such as {min(strange)}")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}, by config.json {tuple(expected[name].shape)}")
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def equal_rows(model):
    """The tokens, a mask (V,), whose rows of embedding and head equal those of one of them: of one that has the most
    frequent first number in its row of the head, as the tokens have that training has folded."""
    layers = (model.wte, model.lm_head)
    values = model.lm_head.weight[:, 0]
    first = (values == values.mode().values).nonzero()[0]
    return torch.stack([(layer.weight == layer.weight[first]).all(1) for layer in layers]).all(0)


# --- Plots -----------------------------------------------------------------------------------------------------------


def write_plots(folder, record):
    """training_metrics.csv and .png in folder: loss, accuracy and test perplexity, from the record of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "training_metrics.csv.tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, record["epochs"][0])
        writer.writeheader()
        writer.writerows([{"step": step, "train_loss": loss} for step, loss in record["curve"]] + record["epochs"])
    figure = draw_metrics(record)
    figure.savefig(folder / "training_metrics.png.tmp", format="png", dpi=120)
    for name in ("training_metrics.csv", "training_metrics.png"):
        os.replace(folder / f"{name}.tmp", folder / name)


def draw_metrics(record):
    from matplotlib.figure import Figure

    curve, epochs, data = record["curve"], record["epochs"], record["data"]
    at, last = [epoch["step"] for epoch in epochs], epochs[-1]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    size = f"{record['parameters'] / 1e6:.1f} M parameters"
    figure.suptitle(f"{size}, {data['train_stories']:,} training stories from {data['source']}")
    loss, accuracy, perplexity = figure.subplots(1, 3, sharex=True)
    steps, losses = np.array(curve).T
    width = max(1, len(curve) // 50)  # of the running mean
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    loss.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
    loss.plot(steps[width - 1 :], smooth, color="C0", label="training, running mean")
    loss.set(title="Loss", ylabel="cross-entropy, nats a token")
    train_accuracy = [epoch["train_accuracy"] for epoch in epochs]
    accuracy.plot(at, train_accuracy, "o-", color="C0", label="training, mean of the epoch")
    accuracy.set(title="Accuracy", ylabel="share of next tokens guessed right")
    perplexity.set(title="Perplexity", ylabel="test perplexity")
    for axes, key in ((loss, "test_loss"), (accuracy, "test_accuracy"), (perplexity, "test_perplexity")):
        axes.plot(at, [epoch[key] for epoch in epochs], "o-", color="C1", label=f"test, now {last[key]:.3g}")
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# --- Main ------------------------------------------------------------------------------------------------------------


def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    with process_group(device), nullcontext() if rank() else locked(settings.checkpoints, settings.plots):
        with first_process_first():
            prepared = prepare_run(settings, device)
        if not prepared:
            return
        model, train_set, test_set, record = prepared
        number = int(digest(json.dumps(record["data"])), 16) % 2**50
        if list(largest(number, -number)) != [number, -number]:
            raise InputError("the processes have found different stories: they need the same folders")
        n_stories = settings.batch_size * settings.accum_steps * world_size()
        where = f"on {device}" if world_size() == 1 else f"in {world_size()} processes on {device}"
        print(f"model      {record['parameters'] / 1e6:.1f} M parameters, {where} in {precision}\ntraining   "
              f"{record['steps']:,} steps of {n_stories} stories, {settings.batch_size} at a time", flush=True)
        train(model, train_set, test_set, settings, record, precision)
        newest = Path(settings.checkpoints) / f"epoch_{len(record['epochs'])}"
        print(f"test perplexity {record['epochs'][-1]['test_perplexity']:.2f}; the model is in {newest}, the plots are "
              f"in {settings.plots}")
        best = min(record["epochs"], key=lambda epoch: epoch["test_loss"])
        if best != record["epochs"][-1]:
            newest = newest.with_name(f"epoch_{best['epoch']}")
            print(f"It was lower in {newest}, {best['test_perplexity']:.2f}: since then the model has learned its "
                  "training stories by heart. More stories or fewer --epochs help, and --dropout may")
        print(f"next: python gpt2_generate.py --model {newest}")


def prepare_run(settings, device):
    """(model, train_set, test_set, record) of a new run or of the one to continue; None where that is finished."""
    folder, before = Path(settings.checkpoints), previous_run(settings)
    if before and before["finished"]:
        newest = folder / f"epoch_{len(before['epochs'])}"
        print(f"{folder} holds this run, and it is finished; next: python gpt2_generate.py --model {newest}")
        return None

    model = None
    if before:
        try:
            model = load_checkpoint(folder / "last", fold=False)
        except InputError as error:
            raise InputError(f"{error}; --overwrite starts over") from error
    elif settings.init:
        model = load_checkpoint(find_checkpoint(settings.init), fold=False, **dropout_rates(settings),
                                dtype="float32", architectures=["GPT2LMHeadModel"])
        n_positions = model.config.n_positions
        require(settings.n_positions <= n_positions, "n_positions", settings.n_positions,
                f"the checkpoint of --init {settings.init} has {n_positions}: give --n-positions {n_positions} or less")
    tokenizer = model.tokenizer if settings.init else None
    train_set, test_set, tokenizer, data = prepare_stories(settings, before, tokenizer)
    if before:
        refuse_changes(folder, before["data"], data)
        print(f"continuing the interrupted run from its last save, after step {before['step']:,}")
    torch.manual_seed(settings.seed)
    model = model or GPT(model_config(settings, tokenizer), tokenizer)
    if not settings.init:
        model.fold(rows_of_stories((train_set, test_set), model.config.vocab_size))
    model.to(device)
    model.wpe.weight.requires_grad_(bool(settings.init))
    encode_prompt(model, settings.prompt)  # better refused now than after an epoch
    if settings.overwrite and not rank():
        for stale in saved_folders(folder):
            shutil.rmtree(stale)
    record = new_record(settings, data, model)
    return model, train_set, test_set, record | {name: before[name] for name in ("step", "epochs", "curve") if before}


def model_config(settings, tokenizer):
    from transformers import GPT2Config

    sizes = {name: getattr(settings, name) for name in ("n_positions", "n_embd", "n_layer", "n_head", "n_inner")}
    eos = tokenizer.eos_token_id
    sizes["n_ctx"] = sizes["n_positions"]  # its older name, which llama.cpp's converter asks for
    return GPT2Config(vocab_size=len(tokenizer), **sizes, **dropout_rates(settings), bos_token_id=eos, eos_token_id=eos,
                      tie_word_embeddings=False, architectures=["GPT2LMHeadModel"], dtype="float32")


def dropout_rates(settings):
    return dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout)


def new_record(settings, data, model):
    """What training.json holds, before the first step."""
    import datasets
    import matplotlib
    import transformers

    per_epoch = math.ceil(data["train_stories"] / settings.batch_size)  # batches, and then steps
    per_epoch = math.ceil(per_epoch / (settings.accum_steps * world_size()))
    steps = min(settings.max_steps or math.inf, settings.epochs * per_epoch)
    per_point = min(per_epoch, math.ceil(steps / 1000))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, matplotlib)}
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in GPT(model.config).parameters())
    return {"settings": asdict(settings), "processes": world_size(), "data": data, "parameters": parameters,
            "steps": steps, "steps_per_epoch": per_epoch, "steps_per_point": per_point,
            "step": 0, "epochs": [], "curve": [], "versions": {"python": platform.python_version(), **versions}}


# --- Small print: earlier runs, command line, errors, signals, locks, devices, processes, network, progress ----------


def previous_run(settings):
    """training.json of the run in the checkpoints folder, or None. Raises InputError for a run with other settings.
    Removes what a killed process left half done there."""
    folder = Path(settings.checkpoints)
    if (folder / "last.old").exists() and not (folder / "last").exists():  # killed between the two renames of a save
        (folder / "last.old").rename(folder / "last")
    for leftover in saved_folders(folder, r"(epoch_\d+|last)\.(tmp|old)"):
        shutil.rmtree(leftover)
    for leftover in saved_folders(folder / "data", r"tmp\w+"):
        leftover.unlink()
    if settings.overwrite or not saved_folders(folder):
        return None
    try:
        record = read_record(folder / "last")
        newer = folder / f"epoch_{len(record['epochs']) + 1}"
        if newer.exists() and (whole := read_record(newer))["step"] == record["step"]:
            record = whole  # last was saved before that epoch was evaluated
        before, _ = dict(record["settings"]), (record["data"]["source"], record["step"], record["curve"])
        before["accum_steps x processes"] = before.get("accum_steps", 0) * record.get("processes", 1)
        finished = record["epochs"] and record["epochs"][-1]["step"] == record["steps"]
    except InputError:
        raise
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{folder} holds a run that cannot go on ({error!r}), --overwrite starts over") from error
    fixed = {f.name: getattr(settings, f.name) for f in fields(settings) if not f.metadata["free"]}
    fixed["accum_steps x processes"] = settings.accum_steps * world_size()
    refuse_changes(folder, before, fixed)
    return record | {"finished": finished}


def read_record(folder):
    verify(folder)
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def saved_folders(folder, pattern=r"epoch_\d+|last"):
    return [path for path in folder.glob("*") if re.fullmatch(pattern, path.name)]


def refuse_changes(folder, before, now):
    changes = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if changes:
        raise InputError(f"{folder} holds another run ({', '.join(changes)}): --overwrite starts over, "
                         "another --checkpoints and --plots keep it")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


def parse(settings_class, description, argv=None):
    """Read the command line into a settings class; a field whose default is a tuple is a flag that can be repeated."""
    parser = Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    for f in fields(settings_class):
        kind, choices = type(f.default), f.metadata["choices"]
        if kind is bool:
            reading = {"action": "store_true"}
        elif kind is tuple:
            reading = {"action": "append", "metavar": "TEXT", "default": argparse.SUPPRESS}
        else:
            metavar = None if choices else {str: "TEXT", int: "N", float: "X"}[kind]
            reading = {"type": kind, "default": f.default, "choices": choices, "metavar": metavar}
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"], **reading)
    return settings_class(**vars(parser.parse_args(argv)))


def run(main, interrupted=""):
    """Call main(); what a user can mend is shown as one line, without a traceback, and sets the exit code. SIGTERM
    and a lost terminal end the program like Ctrl-C, and a character that the terminal cannot show does not end it."""
    handle_signals(raise_interrupt)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        result = main()
        if world_size() > 1:  # a thread of gloo that is late aborts a Python that ends
            sys.stdout.flush()
            os._exit(0)
        return result
    except InputError as error:
        message, code = str(error), 2
    except UnicodeError as error:  # bytes in a file or in the command line that are no text
        message, code = f"not a text in UTF-8: {error}", 2
    except (MemoryError, RuntimeError) as error:  # on a CPU and with MPS, running out of memory is a RuntimeError
        if world_size() > 1 and re.search("gloo|NCCL", str(error)):
            handle_signals(signal.SIG_DFL)
            time.sleep(10)  # the process that failed has said why, and torchrun now ends this one
            message, code = f"no connection to the other processes: {error}", 1
        elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory|enough memory", str(error)):
            message = ("out of memory; in training, halve --batch-size and double --accum-steps: the same updates; in "
                       "writing, fewer stories at once")
            code = 2
        else:
            raise
    except BrokenPipeError:  # the reader of the output, such as head, has gone: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that cannot be written
        message, code = str(error), 1
    except KeyboardInterrupt as error:
        number, state = error.args or (signal.SIGINT, "interrupted")
        message, code = f"{state}{interrupted}", 128 + number
        if rank() or (world_size() > 1 and (number, state) == (signal.SIGTERM, "interrupted")):
            sys.exit(code)  # torchrun ends its processes like this when one has failed, and that one has said why
    if dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0":  # else all processes say the same
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def raise_interrupt(number, _frame):
    raise KeyboardInterrupt(number, "interrupted")


def handle_signals(handler):
    """Give Ctrl-C, SIGTERM and SIGHUP this handler, unless ignored, as under nohup. Returns the ones before it."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


@contextmanager
def signals_noted():
    """Inside, the signals are noted in the list that this yields, no more; a second one ends the process. A step that
    fails after one has lost a process that was ended at once."""
    noted = []

    def note(number, _frame):
        noted.append(number)
        handle_signals(signal.SIG_DFL)
        try:
            os.write(2, b"" if rank() else b"\nstopping after this step, to save it; once more: at once\n")
        except OSError:  # the terminal, or the program that reads this, has gone: nothing may fail for that now
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    before = handle_signals(note)
    try:
        yield noted
    except RuntimeError:
        if noted and world_size() > 1:
            raise KeyboardInterrupt(noted[0], "interrupted") from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(*folders):
    """Keep other runs out of folders. The system ends a lock with its process, however that ends."""
    from filelock import FileLock, Timeout

    with ExitStack() as locks:
        for folder in sorted({Path(folder).resolve() for folder in folders}):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder} is a file, and --checkpoints and --plots are folders")
            folder.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(folder / ".lock", blocking=False))
            except Timeout:
                raise InputError(f"{folder}: another run is writing there; give this one other --checkpoints and "
                                 "--plots") from None
        yield


def pick_device(name):
    """cuda, mps or cpu; of several GPUs each process of torchrun takes its own."""
    n_gpus, n_processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = {"cuda": n_gpus > 0, "mps": torch.backends.mps.is_available() and n_processes == 1, "cpu": True}
    if name == "auto":
        name = next(device for device in there if there[device])
    why = "is for one process" if name == "mps" and n_processes > 1 else "PyTorch finds none on this machine"
    require(there[name], "device", name, f"{why}; use auto or cpu")
    if name == "cuda":
        require(n_processes <= n_gpus, "device", name, f"{n_processes} processes on this machine, and {n_gpus} GPUs")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return name


def pick_precision(name, device):
    """auto: bf16 where the hardware multiplies it fast, fp16 on a CUDA GPU that has no bf16, fp32 elsewhere."""
    require(name != "fp16" or device == "cuda", "precision", name, f"works on a CUDA GPU, not on {device}")
    if name != "auto":
        return name
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if device == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16")) else "fp32"


def prepare_backend(device, precision):
    """Set what PyTorch keeps for the whole process."""
    if device == "cuda" and precision != "fp32":
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay fp32, those of evaluate
    if device == "cpu":  # despite its name: attention with dropout then stays in bf16
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def rank():
    """The number of this process, from 0. Process 0 alone prints and writes."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device):
    """Inside, the processes of torchrun can exchange tensors, and those but the first print nothing."""
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # the first process may have much to download
    except ValueError as error:
        raise InputError(f"WORLD_SIZE is {world_size()}, but this is not started by torchrun: {error}") from error
    with redirect_stdout(open(os.devnull, "w") if rank() else sys.stdout):
        yield
    largest(0)  # a process that ended before process 0 has saved its last epoch would end that, too
    dist.destroy_process_group()


def largest(*values):
    """Of each value the largest in any process, so that all of them decide alike."""
    if world_size() == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def total(tensor):
    """The sum of a tensor over all processes, in its place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def share(batches):
    """The batches of this process. Each process has as many: some get an empty one at the end."""
    missing = -len(batches) % world_size()
    return (batches + [batches[0][:0]] * missing)[rank() :: world_size()]


@contextmanager
def first_process_first():
    """Process 0 goes through the block alone; then the others do, and find what it has made there."""
    if rank():
        largest(0)
    yield
    if not rank():
        largest(0)


@cache
def hub_answers():
    """Whether the Hugging Face Hub can be reached: found out once, within 10 s, without retries and warnings."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answers = []

    def ask():
        url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        try:
            answers.append(urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=8))
        except (OSError, ValueError, http.client.HTTPException) as error:
            # A 404 is an answer, too, and so is a certificate that Python has no means to check.
            if isinstance(error, urllib.error.HTTPError) or isinstance(getattr(error, "reason", None), ssl.SSLError):
                answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # the look-up of the host's name has no time limit of its own
    thread.start()
    thread.join(10)
    return bool(answers)


def progress_bar(label, n_done, n_steps):
    return tqdm(desc=label, initial=n_done, total=n_steps, file=sys.stdout if rank() else sys.stderr, leave=False,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}{postfix}]", dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 60)


def show_progress(bar, loss, progress, n_steps):
    """Add to the bar how long the run will take, the loss and the speed. Returns the seconds of a whole run."""
    seconds = bar.format_dict["elapsed"] / (bar.n - bar.initial)  # of a step
    left = bar.format_interval(seconds * (n_steps - progress["step"]))
    speed = f"{progress['tokens'] / progress['seconds']:,.0f} tokens/s"
    bar.set_postfix_str(f"run {left} left, loss {loss:.3f}, {speed}", refresh=False)
    return seconds * n_steps


def note_if_long(seconds, settings):
    """Where the run takes more than 12 hours, say so, with a command that takes about one hour. Returns True."""
    if seconds > 12 * 3600:
        fraction = f"--fraction {settings.fraction * 3600 / seconds:.1g}"
        launcher = "python" if world_size() == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        command = f"{launcher} {shlex.join(sys.argv)} {fraction} --checkpoints hour/checkpoints --plots hour/plots"
        tqdm.write(f"This run takes about {seconds / 3600:,.0f} hours on this machine; about one hour: {command}")
    return True


if __name__ == "__main__":
    run(main, "; the same command, without --overwrite, continues from the last save, if there is one")
