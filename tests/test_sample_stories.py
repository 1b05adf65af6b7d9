"""Tests of the stories: determinism, variety, and the English that a machine can check."""

import collections
import random
import re
import statistics
import subprocess
import sys

import pytest

import sample_stories
from sample_stories import PLOTS, SEPARATOR, pick, sample_story, tell

VILLAGE = "Once upon a time, in a small village, there "
SAYING = "said|asked|cried|called|shouted|he|she|they"  # what may follow a question in quotes without a capital letter


@pytest.fixture(scope="module")
def stories():
    return list(sample_stories.sample_stories(10_000))


def run(*arguments):
    command = [sys.executable, sample_stories.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_same_seed_same_stories(stories):
    assert list(sample_stories.sample_stories(100)) == stories[:100]
    assert sample_story(57) == stories[57]


def test_other_seed_other_stories(stories):
    assert not set(sample_stories.sample_stories(100, seed=1)) & set(stories)


def test_other_process_same_story(stories):
    assert run("1").stdout == f"{stories[0]}\n{SEPARATOR}\n"


def test_no_duplicates(stories):
    assert len(set(stories)) == 10_000
    assert len(set(sample_stories.sample_stories(10_000, seed=1))) == 10_000


def test_lengths_spread(stories):
    lengths = [len(story.split()) for story in stories]
    percentiles = statistics.quantiles(lengths, n=100)
    assert 115 < statistics.mean(lengths) < 145
    assert percentiles[4] < 110
    assert percentiles[94] > 175
    assert max(lengths) > 230


def test_plots(stories):
    names = collections.Counter(pick(random.Random(f"0:{index}"), PLOTS).name for index in range(1000))
    assert len(names) == len(PLOTS) >= 15
    assert min(names.values()) > 25


def test_village_opening(stories):
    village = [story for story in stories if story.startswith((VILLAGE + "was a ", VILLAGE + "lived a "))]
    assert 0.30 < len(village) / len(stories) < 0.37


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_openings_of_each_plot(plot):
    openings = {" ".join(tell(random.Random(seed), plot).split()[:3]) for seed in range(100)}
    assert len(openings) >= 4
    assert any(tell(random.Random(seed), plot).startswith(VILLAGE) for seed in range(50))


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_picks_are_used(plot):
    told = "\n".join(tell(random.Random(seed), plot) for seed in range(200))
    for options in plot.picks.values():
        for option in options:
            assert (option[0] if isinstance(option, tuple) else option) in told


@pytest.mark.parametrize(
    "wrong",
    [
        r"[^\n -~]",  # not ASCII
        r"[\[\]{}|<>_*]",  # a slot or a choice that was not filled
        r"\bOR\b",
        r"  |\t|\n\n|(?m:^ | $)|\A\n|\n\Z",  # white space
        r" [.,!?;:]",
        r"[,;:][^ \n\"]|[.!?][^ \n\"]",  # no space after punctuation
        r"[.,!?]{2}",
        r"(?m:^[^A-Z\"])|(?m:^\"[^A-Z])",  # a paragraph without a capital letter
        r"[.!?] [^A-Z\"]",  # a sentence without a capital letter
        r"\.\" [^A-Z\"]",
        rf"[!?]\" (?!{SAYING})[a-z]",
        r"[.,!?]\" \"[^A-Z]",  # a sentence in quotes without a capital letter
        r"(?m:[^.!?\"]$)|(?m:[^.,!?]\"$)",  # a paragraph without an end
        r"\b[Aa] [aeiouAEIOU]",
        r"\b[Aa]n [^aeiouAEIOU]",
        r"\b(\w+) \1\b",
    ],
)
def test_english(stories, wrong):
    found = [(match[0], story) for story in stories if (match := re.search(wrong, story))]
    assert not found, found[0]


def test_quotes_are_balanced(stories):
    """Quotes open after a space or a line break and close before one, in turn and within a paragraph."""
    for story in stories:
        for paragraph in story.split("\n"):
            assert re.fullmatch(r'(?:[^"]|(?<![^ ])"[^ "][^"]*[.,!?]"(?![^ ]))*', paragraph), paragraph


def test_pronouns_fit_names(stories):
    """In plots with one person, there are no pronouns of the other kind."""
    for index, story in enumerate(stories[:3000]):
        others = {name for name in sample_stories.GIRLS + sample_stories.BOYS if re.search(rf"\b{name}\b", story)}
        grownup = re.search(r"\b(?:mom|dad|grandma|grandpa|man|woman|mailman|farmer|boy)\b", story)
        if len(others) == 1 and not grownup:
            girl = next(iter(others)) in sample_stories.GIRLS
            wrong = r"\b[Hh](?:e|im|is)\b" if girl else r"\b(?:[Ss]he|[Hh]er)\b"
            assert not re.search(wrong, story), (index, story)


def test_command_line(stories):
    done = run("3")
    assert done.returncode == 0
    assert done.stdout.split(f"\n{SEPARATOR}\n") == [*stories[:3], ""]
    assert run("3", "--seed", "5").stdout == "".join(f"{sample_story(i, 5)}\n{SEPARATOR}\n" for i in range(3))
    assert run("0").stdout == ""


@pytest.mark.parametrize("count", ["-1", "many"])
def test_wrong_count(count):
    done = run(count)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_negative_count_is_one_line():
    assert len(run("-1").stderr.splitlines()) == 1


def test_closed_pipe():
    command = [sys.executable, sample_stories.__file__, "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_lazy(stories):
    assert next(sample_stories.sample_stories(10**9)) == stories[0]
    assert list(sample_stories.sample_stories(0)) == []
