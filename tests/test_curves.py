"""The figures inside and after the epochs: the part of the test stories, bits per byte, the table and the plots."""

import csv
import json
import math
import re
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from conftest import TINY, draw_figure, read_points, read_run, train, train_in
from matplotlib.figure import Figure
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import gpt2_tinystories as project

pytestmark = pytest.mark.packages

END = "<|endoftext|>"
COLUMNS = (
    "step epoch tokens minutes train_loss train_accuracy grad_norm learning_rate tokens_per_second test_part_loss "
    "test_part_accuracy test_loss test_accuracy test_perplexity test_bits_per_byte grad_norm_max"
).split()

# --- Bits per byte


def of_words(texts, decoder, pre_tokenizer, normalizer=None):
    """A tokenizer whose tokens are the words of some texts, in the way of an own family."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=["?", END]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="?")


def tokens_of(texts, tokenizer, n_positions=1000):
    return project.encode_stories(datasets.Dataset.from_dict({"text": texts}), tokenizer, n_positions)


def test_the_bytes_of_a_story_counted_by_hand(tokenizer):
    """The first token is no target, and <|endoftext|> has no bytes. Of a character in parts, the first one counts."""
    byte_by_byte = project.train_tokenizer(datasets.Dataset.from_dict({"text": ["q"]}), 257)
    texts = ["Zoë ate 7 cafés.", "“Hi!”  故事 🙂\n\nx", "a", "An <|endoftext|> inside."]
    n_bytes = [len(text.encode()) for text in texts]
    assert n_bytes == [18, 25, 1, 24]
    assert tokens_of(texts, byte_by_byte).n_bytes.tolist() == [17, 25 - 3, 0, 23]
    assert tokens_of(texts, byte_by_byte, 2).n_bytes.tolist() == [3, 0, 0, 2]  # "oë", nothing, nothing, "n "
    assert tokens_of(texts, byte_by_byte, 3).n_bytes.tolist() == [3, 1, 0, 3]  # "oë", "H"
    texts = ["Once upon a time", "Tom ran.\n\nHa!"]
    firsts = [len(tokenizer.tokenize(text)[0]) for text in texts]
    assert tokens_of(texts, tokenizer).n_bytes.tolist() == [16 - firsts[0], 13 - firsts[1]]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFD(), normalizers.Lowercase(), normalizers.Replace("é", "")])
def test_the_bytes_are_those_of_the_story_whatever_becomes_of_it(normalizer, stories):
    own = project.train_tokenizer(stories, 400)
    own.add_tokens(["cafés", "“ok"])
    if normalizer:
        own.backend_tokenizer.normalizer = normalizer
    text = "Zoë ate 7 cafés — “ok”."
    assert len(text.encode()) == 31 and own.tokenize(text)[0] in "Zz"
    assert tokens_of([text], own).n_bytes.tolist() == [30]


def test_the_bytes_of_other_tokenizers_are_those_of_the_stories():
    texts = ["Zoë saw  a café.", "Tom saw Zoë and\n\na big cat"]
    marked = of_words(texts, decoders.Metaspace(), pre_tokenizers.Metaspace())
    uncased = of_words(texts, decoders.WordPiece(), pre_tokenizers.BertPreTokenizer(), normalizers.Lowercase())
    assert tokens_of(texts, marked).n_bytes.tolist() == [18 - 4, 27 - 3]
    assert tokens_of(texts, uncased).n_bytes.tolist() == [18 - 4, 27 - 3]
    assert tokens_of(texts, marked, 2).n_bytes.tolist()[1] == len(" saw Zoë".encode()) == 9
    assert tokens_of(texts, uncased, 2).n_bytes.tolist() == [len(b" saw  a"), 9]


def test_two_tokenizers_have_the_same_bytes_of_the_same_stories(texts, stories, tokenizer):
    """But for the first tokens, which are no targets."""
    for each in (tokenizer, project.train_tokenizer(stories, 300), project.train_tokenizer(stories, 1000)):
        firsts = [len(each.decode(ids[:1])) for ids in project.encode(each, texts)]
        whole = tokens_of(texts, each).n_bytes + firsts
        assert whole.tolist() == [len(text.encode()) for text in texts]


def test_bits_per_byte_are_those_of_transformers(model, texts, tokenizer, tmp_path):
    """From its probabilities and the text that comes back from the targets; some stories are cut."""
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    theirs, bits, n_bytes = GPT2LMHeadModel.from_pretrained(tmp_path / "epoch_1").double().eval(), 0, 0
    for text in texts[:20]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:65]
        story = torch.tensor([ids])
        with torch.no_grad():
            logits = theirs(story[:, :-1]).logits[0].log_softmax(-1) / math.log(2)
        bits -= logits.gather(1, story[0, 1:, None]).sum().item()
        n_bytes += len(tokenizer.decode(ids[1:], skip_special_tokens=True).encode())
    tokens = tokens_of(texts[:20], tokenizer, 64)
    assert tokens.n_cut > 0 and tokens.n_bytes.sum() == n_bytes
    figures = project.score(model, tokens, 3)
    assert figures["test_bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-5)
    assert figures["test_perplexity"] == pytest.approx(2 ** (bits / tokens.lengths.sum()), rel=1e-5)
    assert figures["test_loss"] == pytest.approx(math.log(figures["test_perplexity"]))


@pytest.mark.parametrize("none", [[], [""], [None, " "]])
def test_where_no_stories_are_it_says_so(none, model, tokenizer):
    features = datasets.Features({"text": datasets.Value("string")})
    stories = datasets.Dataset.from_dict({"text": none}, features)
    with pytest.raises(project.InputError, match="no stories to score"):
        project.score(model, project.encode_stories(stories, tokenizer, 64))


def test_stories_of_no_bytes_have_infinitely_many_bits_per_byte(model, tokenizer):
    tokens = tokens_of(["a", "b"], tokenizer)
    assert tokens.n_bytes.sum() == 0 and tokens.lengths.tolist() == [1, 1]
    assert project.score(model, tokens)["test_bits_per_byte"] == math.inf


# --- A part of the test stories inside the epochs

LONGER = f"{TINY} --batch-size 4 --accum-steps 1"  # 72 stories in 2 epochs: 36 steps


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The folder of a finished run of 36 steps, with scores after the 12th, 24th and 36th."""
    return train_in(tmp_path_factory.mktemp("longer"), base=LONGER)


def scores(folder):
    found = [(row["step"], row["test_part_loss"], row["test_part_accuracy"]) for row in read_points(folder)]
    return [(int(step), float(loss), float(accuracy)) for step, loss, accuracy in found if loss]


def test_the_scores_inside_a_run_change_nothing_in_it(longer, workspace):
    train("--test-points 0", base=LONGER)
    (model, record), (scored_model, scored_record) = read_run(), read_run(longer / "checkpoints")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, scored_model.state_dict()[name]), name
    for figures, scored in zip(record["epochs"], scored_record["epochs"], strict=True):
        assert figures | {"seconds": 0} == scored | {"seconds": 0}
    assert [step for step, _, _ in scores(longer)] == [12, 24, 36] and scores(workspace) == []


def train_and_stop(last_step, arguments):
    """Train until the save after a step."""
    save_last = project.save_last

    def stopping(step, *rest):
        save_last(step, *rest)
        if step == last_step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(project, "save_last", stopping)
        train(f"--save-every 0 {arguments}", base=LONGER)


def test_a_run_goes_on_with_other_points_of_its_curve(longer, workspace):
    """Without a score after the 12th step; the later ones are those of an unbroken run."""
    train_and_stop(14, "--test-points 1")  # a score after the last step alone
    train("", base=LONGER)
    assert scores(workspace) == scores(longer)[1:]


def test_a_score_is_that_of_the_model_after_the_step_and_takes_none_of_its_time(longer, workspace, monkeypatch):
    """Stopped in the save after the 12th step: transformers' loss of these weights on the 8 test stories."""
    evaluate = project.evaluate
    monkeypatch.setattr(project, "evaluate", lambda *arguments: (time.sleep(2), evaluate(*arguments))[1])
    train_and_stop(12, "--precision fp32")
    last = torch.load("checkpoints/last.pt", weights_only=True)
    losses = last["metrics"][:, project.TEST_LOSS].tolist()
    model, _ = read_run(longer / "checkpoints")
    model = project.fold_equal_rows(model)
    model.load_state_dict(last["model"])
    column = datasets.Dataset.from_file(str(next(Path("checkpoints/data").glob("test-*.arrow")))).data.column("ids")
    theirs, nats, n_tokens = project.to_gpt2(model).eval(), 0, 0
    for ids in column:
        ids = torch.tensor(ids.as_py())
        logits = theirs(ids[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        n_tokens += len(ids) - 1
    assert len(column) == 8 and losses[:11] == [0.0] * 11
    assert losses[11:] == [pytest.approx(nats / n_tokens, rel=1e-5)]
    assert last["metrics"][:, project.SECONDS].sum() < 2


def test_a_score_that_is_not_finite_is_a_gap_in_the_curve(longer, workspace, monkeypatch):
    """As in fp16, where a story may overflow: the training goes on, and can be continued."""
    evaluate, calls = project.evaluate, []

    def overflowing(*arguments):
        calls.append(arguments)
        return (math.inf, 0.0) if len(calls) == 1 else evaluate(*arguments)

    monkeypatch.setattr(project, "evaluate", overflowing)
    train("--save-every 0", base=LONGER)
    points = [row for row in read_points(workspace) if row["test_part_loss"]]
    assert [row["test_part_loss"] for row in points][:1] == ["inf"] and scores(workspace)[1:] == scores(longer)[1:]


@pytest.mark.parametrize(
    "n_steps, points, expected",
    [
        (9, 20, []),
        (10, 20, [10]),
        (68, 20, [11, 22, 34, 45, 56, 68]),
        (68, 3, [22, 45, 68]),
        (68, 1, [68]),
        (68, 0, []),
        (59_620, 20, list(range(2981, 59_621, 2981))),
    ],
)
def test_some_twenty_scores_but_never_within_ten_steps(n_steps, points, expected, encoded):
    record = {"n_steps": n_steps, "test_part_stories": 16}
    settings = project.Settings(test_points=points)
    assert sorted(step + 1 for step in project.choose_part_of_test(encoded, settings, record)[1]) == expected


@pytest.mark.parametrize("epochs, n_test, expected", [(1, 900, 23), (5, 900, 119), (5, 60, 60), (50, 900, 256)])
def test_the_part_is_a_hundredth_of_the_work(epochs, n_test, expected):
    """Twenty times so many stories, at a third of a training step's cost each, are 1 % of 15,885 stories an epoch."""
    counts = {"stories": 17_650, "train_stories": 15_885, "test_stories": n_test, "fingerprint": "", "tokenizer": ""}
    record = project.new_record(project.Settings(epochs=epochs), counts, {})
    assert record["test_part_stories"] == expected


def test_the_part_is_the_same_each_time_and_from_all_over_the_test_stories(encoded):
    for batch_size in (5, 8, 100):
        loader, _ = project.choose_part_of_test(
            encoded, project.Settings(batch_size=batch_size), {"n_steps": 100, "test_part_stories": 16}
        )
        chosen = np.concatenate(list(loader.batch_sampler))
        assert sorted(chosen.tolist()) == [0, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59]


# --- The table


def test_the_table_has_the_figures_of_each_step(longer):
    """Counted from those of last.pt: 36 steps, so that each has a row, with means over the ten steps before."""
    with open(longer / "plots" / "training_metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    metrics = torch.load(longer / "checkpoints" / "last.pt", weights_only=True)["metrics"].double()
    _, record = read_run(longer / "checkpoints")
    assert [int(row["step"]) for row in rows] == list(range(1, 37))
    for step, row in enumerate(rows, 1):
        some = metrics[max(0, step - 10) : step]
        n_tokens = some[:, project.N_TOKENS].sum()
        expected = {
            "epoch": 1 if step <= 18 else 2,
            "tokens": metrics[:step, project.N_TOKENS].sum(),
            "minutes": metrics[:step, project.SECONDS].sum() / 60,
            "train_loss": some[:, project.LOSS].sum() / n_tokens,
            "train_accuracy": some[:, project.N_CORRECT].sum() / n_tokens,
            "grad_norm": some[:, project.NORM].mean(),
            "grad_norm_max": some[:, project.NORM].max(),
            "learning_rate": 3e-4 * project.schedule(step - 1, 36, 100),
            "tokens_per_second": n_tokens / some[:, project.SECONDS].sum(),
        }
        assert {name: float(row[name]) for name in expected} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, rel=1e-5
        )
        tested = {name: row[name] for name in COLUMNS if name.startswith("test_") and "part" not in name}
        if step % 18:
            assert set(tested.values()) == {""}
        else:
            epoch = record["epochs"][step // 18 - 1]
            assert {name: float(value) for name, value in tested.items()} == pytest.approx(
                {name: epoch[name] for name in tested}, rel=1e-6
            )


@pytest.mark.parametrize(
    "n_steps, per_epoch, first_steps, n_rows",
    [(1, 1, [1], 1), (50, 50, [1, 2], 50), (1001, 7, [6, 7, 12], 166 + 143 - 23), (60_000, 12_000, [300, 600], 200)],
)
def test_some_two_hundred_rows_and_the_ends_of_the_epochs(n_steps, per_epoch, first_steps, n_rows):
    ends = range(per_epoch, n_steps + 1, per_epoch)
    epochs = [{"step": end, "test_loss": 2} for end in ends]
    settings = {"learning_rate": 1, "warmup_steps": 0}
    record = {"n_steps": n_steps, "steps_per_epoch": per_epoch, "epochs": epochs, "settings": settings}
    metrics = np.ones((n_steps, len(project.COLUMNS)))
    metrics[:, project.LOSS] = metrics[:, project.NORM] = np.arange(n_steps)
    metrics[:, project.TEST_LOSS] = 0
    points = project.curve_points(record, metrics)
    steps = [point["step"] for point in points]
    assert steps[: len(first_steps)] == first_steps and len(steps) == n_rows and steps == sorted(set(steps))
    assert set(ends) <= set(steps) and steps[-1] == n_steps
    assert [point["step"] for point in points if point["test_loss"]] == list(ends)
    assert all(point["test_part_loss"] is None for point in points)
    n_before = max(10, math.ceil(n_steps / 200))
    for step, point in zip(steps, points, strict=True):
        mean = (step - 1 + max(0, step - n_before)) / 2  # of an arithmetic sequence
        assert point["train_loss"] == point["grad_norm"] == pytest.approx(mean) and point["grad_norm_max"] == step - 1


def test_the_last_save_of_an_older_version_is_refused_in_one_line(longer, workspace, refused):
    shutil.copytree(longer, workspace, dirs_exist_ok=True)
    last = torch.load("checkpoints/last.pt", weights_only=True)
    last["metrics"] = last["metrics"][:, :5]
    torch.save(last, "checkpoints/last.pt")
    shutil.rmtree("checkpoints/epoch_2")
    assert "last.pt: it is of another version of the script; --overwrite" in refused(project.main, LONGER.split())


# --- The plot


def shown(figure):
    """{title of a panel: {label: (x, y) of its line}}."""
    return {
        axes.get_title(): {line.get_label(): line.get_data() for line in axes.get_lines()} for axes in figure.axes
    }


def test_the_panels_show_the_figures_of_the_table(longer):
    record = json.loads((longer / "checkpoints" / "epoch_2" / "training.json").read_text())
    metrics = torch.load(longer / "checkpoints" / "last.pt", weights_only=True)["metrics"].double().numpy()
    panels = shown(draw_figure(record, project.curve_points(record, metrics)))
    epochs, last = record["epochs"], record["epochs"][-1]
    assert set(panels) == {"Loss", "Accuracy", "Perplexity", "Gradient and learning rate", ""}
    steps, losses = panels["Loss"][f"all 8, last {last['test_loss']:.3g}"]
    assert steps.tolist() == [18, 36] and losses.tolist() == [epoch["test_loss"] for epoch in epochs]
    part = panels["Loss"]["8 test stories"]
    assert part[0].tolist() == [12, 24, 36] and part[1] == pytest.approx([loss for _, loss, _ in scores(longer)])
    assert panels["Perplexity"]["8 test stories"][1] == pytest.approx(np.exp(part[1]))
    assert panels["Accuracy"]["8 test stories"][1] == pytest.approx([share for _, _, share in scores(longer)])
    assert panels["Accuracy"]["training"][0].tolist() == list(range(1, 37))
    (label,) = [label for label in panels["Perplexity"] if "bits" in label]
    assert f"last {last['test_perplexity']:.2f},\nor {last['test_bits_per_byte']:.3f} bits per byte" in label
    (rate,) = panels[""].values()
    assert max(rate[1]) == pytest.approx(3e-4, rel=1e-5) and len(rate[0]) == 36


@pytest.mark.parametrize("clip, is_shown", [(0.5, True), (1e6, False)])
def test_the_line_of_clipping_is_there_if_anything_was_clipped(clip, is_shown, longer):
    record = json.loads((longer / "checkpoints" / "epoch_2" / "training.json").read_text())
    metrics = np.ones((36, len(project.COLUMNS)))
    record["settings"]["grad_clip"] = clip
    lines = shown(draw_figure(record, project.curve_points(record, metrics)))["Gradient and learning rate"]
    assert ("clipped above" in lines) == is_shown


def test_one_point_can_be_seen_and_none_has_no_legend():
    axes = Figure().add_subplot()
    columns = {"step": np.arange(2), "some": np.array([np.nan, 3]), "none": np.full(2, np.nan)}
    project.draw_panel(axes, "Loss", "", columns, some=("C1.-", "some"), none=("C1o", "none"))
    (line,) = axes.get_lines()
    assert line.get_label() == "some" and line.get_marker() == "." and len(line.get_xdata()) == 1


@pytest.mark.parametrize("losses, scale", [([8, 1.9], "log"), ([3, 2], "linear"), ([0.9, 0.1], "linear")])
def test_a_loss_of_several_sizes_has_a_logarithmic_axis(losses, scale):
    axes = Figure().add_subplot()
    project.draw_panel(axes, "Loss", "", {"step": np.arange(2), "loss": np.array(losses)}, loss=("C0", "training"))
    assert axes.get_yscale() == scale
    axes.figure.canvas.draw()
    assert not re.search(r"[$^]", "".join(label.get_text() for label in axes.get_yticklabels()))
