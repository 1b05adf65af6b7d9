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
    """(train_set, test_set, tokenizer, counts): what the script makes of --data before it trains, with its caches."""
    return project.prepare_data(settings, settings.data)
