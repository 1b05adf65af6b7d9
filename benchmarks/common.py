"""What the benchmarks share. Importing this first is what lets them import gpt2_tinystories."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_tinystories as project


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


def make_parser(description):
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def prepare(settings):
    """(train_set, test_set, tokenizer, data): what the script makes of its stories before it trains, with its caches;
    data is what its record says of them."""
    folder = Path(settings.checkpoints, "data")
    stories, source = project.load_stories(settings.data, folder)
    train_stories, test_stories, data = project.split_stories(stories, settings)
    name = settings.tokenizer
    if name == "auto":
        name = "bpe:4096" if source == project.BUILT_IN else "gpt2"
    tokenizer = project.load_tokenizer(name, train_stories)
    data["source"] = source
    train_set, test_set = project.encode_split(train_stories, test_stories, tokenizer, data, settings)
    return train_set, test_set, tokenizer, data
