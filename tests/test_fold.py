"""The folded vocabulary against the full one: the same model, trained, saved, loaded and written with."""

import importlib.util
import io
import math
import re
import sys
import tokenize
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY, make_config, make_model, read_run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import gpt2_tinystories as project
from sample_stories import sample_stories

pytestmark = pytest.mark.packages

V = 400
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def folded_and_full():
    """A model in float64 with rows for 100 tokens and one for 300, and the one with 400 rows that it stands for."""
    torch.manual_seed(1)
    has_own = torch.zeros(V, dtype=torch.bool)
    has_own[torch.randperm(V)[:100]] = True
    config = make_config(FakeTokenizer())
    folded, full = (project.GPT(config).double() for _ in range(2))
    folded = project.FoldedGPT(folded, has_own)
    assert folded.lm_head.weight.shape == (101, 32) and folded.n_shared == 300
    full.load_state_dict(unfolded(folded))
    return folded, full, has_own.nonzero()[:, 0]


class FakeTokenizer:
    eos_token_id = 0

    def get_vocab(self):
        return {str(i): i for i in range(V)}


def unfolded(model):
    """The state of the model with a row for each token."""
    state = model.state_dict()
    return state | {name: state[name][model.token_to_row] for name in ("transformer.wte.weight", "lm_head.weight")}


@pytest.mark.parametrize("grad_clip", [0.05, 1e9], ids=["clipped", "not clipped"])
def test_the_folded_model_learns_what_the_full_one_learns(grad_clip):
    """20 steps of two batches each, with Muon, AdamW and weight decay: the same losses, norms and weights."""
    folded, full, tokens = folded_and_full()
    settings = project.Settings(grad_clip=grad_clip, weight_decay=0.1)
    norms, losses = [], []
    for model in (folded, full):
        generator = torch.Generator().manual_seed(2)
        optimizers = project.make_optimizers(model, settings, torch.float64)
        for _ in range(20):
            ids = tokens[torch.randint(100, (2, 4, 21), generator=generator)]
            ids[0, :2, 15:] = project.IGNORE
            window = [(story[:, :-1].clamp(min=0), story[:, 1:]) for story in ids]
            n_tokens = int((ids[:, :, 1:] != project.IGNORE).sum())
            losses.append(project.backward(model, window, n_tokens, nullcontext(), NO_SCALER)[0].item() / n_tokens)
            norms.append(project.update(model, optimizers, grad_clip, NO_SCALER).item())
    assert losses[:20] == pytest.approx(losses[20:], abs=1e-9)
    assert norms[:20] == pytest.approx(norms[20:], rel=1e-9) and min(norms) > 0.05
    assert losses[19] < losses[0] - 0.5
    for name, weight in unfolded(folded).items():
        torch.testing.assert_close(weight, full.state_dict()[name], atol=1e-7, rtol=0)


def test_the_logits_and_the_loss_are_those_of_the_whole_vocabulary():
    """Also for targets that share a row. A guess that is that row is never a right one: it is one of many tokens."""
    folded, full, _ = folded_and_full()
    with torch.no_grad():
        folded.lm_head.weight[-1] *= 2
    full.load_state_dict(unfolded(folded))
    ids = torch.randint(V, (3, 30))
    targets = torch.randint(V, (3, 30))
    targets[1, 20:] = project.IGNORE
    logits = folded(ids)
    torch.testing.assert_close(logits, full(ids))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss, n_correct = folded(ids, targets)
    torch.testing.assert_close(loss, expected)
    guesses = logits.argmax(-1)
    has_own = folded.token_to_row[guesses] < 100
    assert folded(ids, guesses)[1] == has_own.sum() and 0 < has_own.sum() < 90
    assert n_correct == ((guesses == targets) & has_own).sum()


def test_the_perplexity_of_tokens_that_no_training_story_has_is_that_of_transformers(tokenizer, tmp_path):
    """Of a model that was trained on none of them, and of the saved one, whose equal rows are folded again."""
    model = make_model(tokenizer)
    texts = ["Zoë's café: 7 × 8 = 56!", "Über uns ~ nichts.", *sample_stories(3, seed=5)]
    stories = datasets.Dataset.from_dict({"text": texts})
    tokens = project.encode_stories(stories, tokenizer, 64, tmp_path / "tokens.arrow")
    rows = model.token_to_row[sum(tokens.ids.to_pylist(), [])]
    assert (rows == len(model.lm_head.weight) - 1).sum() >= 10
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "epoch_1").double().eval()
    nats = 0
    for story in tokens.ids:
        story = torch.tensor([story.as_py()])
        logits = theirs(story[:, :-1]).logits[0].log_softmax(-1)
        nats -= logits.gather(1, story[0, 1:, None]).sum().item()
    loader = project.make_loader(tokens.ids, project.epoch_batches(tokens.lengths, 2, 0, 0))
    loaded = project.load_checkpoint(tmp_path / "epoch_1")
    assert len(loaded.lm_head.weight) == V
    for each in (model, loaded, project.fold_equal_rows(project.load_checkpoint(tmp_path / "epoch_1"))):
        assert each is loaded or len(each.lm_head.weight) < 300
        perplexity = project.compute_perplexity(each.double(), loader)
        assert perplexity == pytest.approx(math.exp(nats / tokens.lengths.sum()), rel=1e-6)


def test_a_saved_model_has_a_row_for_each_token_and_is_folded_again(model, tmp_path):
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_1").eval()
    assert theirs.lm_head.weight.shape == theirs.transformer.wte.weight.shape == (V, 32)
    loaded = project.fold_equal_rows(project.load_checkpoint(tmp_path / "epoch_1"))
    assert torch.equal(loaded.token_to_row, model.token_to_row) and loaded.n_shared == model.n_shared
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    whole = project.load_checkpoint(tmp_path / "epoch_1")
    assert type(whole) is project.GPT and len(whole.lm_head.weight) == V
    ids = torch.randint(V, (3, 50))
    torch.testing.assert_close(loaded(ids), whole(ids), atol=1e-5, rtol=1e-5)


def test_rows_that_differ_are_not_folded(model, tmp_path):
    """Neither tokens with the same row of the head and others of the embedding, nor the other way round."""
    model = project.GPT(model.config, model.tokenizer)
    with torch.no_grad():
        model.lm_head.weight[100:200] = model.lm_head.weight[100]
        model.transformer.wte.weight[150:300] = model.transformer.wte.weight[150]
        model.transformer.wte.weight[120:130] = model.transformer.wte.weight[100]
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    loaded = project.fold_equal_rows(project.load_checkpoint(tmp_path / "epoch_1"))
    assert loaded.n_shared == 11 and len(loaded.lm_head.weight) == V - 10
    ids = torch.randint(V, (3, 50))
    torch.testing.assert_close(loaded(ids), model.eval()(ids), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("n_used, n_rows", [(1, 64), (63, 64), (64, 128), (130, 192), (399, 400), (400, 400)])
def test_the_tokens_of_the_stories_have_rows_of_their_own(n_used, n_rows, tmp_path):
    used = np.random.default_rng(0).permutation(V)[:n_used]
    column = datasets.Dataset.from_dict({"ids": [used[::2], used[1::2], used[:3]]}).data.column("ids")
    parts = [project.Tokens(column.slice(0, 1), None, None, 0), project.Tokens(column.slice(1), None, None, 0)]
    model = project.fold_unused_tokens(project.GPT(make_config(FakeTokenizer())), *parts)
    counts = model.token_to_row.bincount()
    assert len(model.token_to_row) == V and len(counts) == n_rows and set(counts[:-1].tolist()) <= {1}
    assert len(model.lm_head.weight) == n_rows and model.n_shared == counts[-1]
    assert len(set(model.token_to_row[used].tolist())) == n_used
    assert counts[model.token_to_row[used]].tolist() == [1] * n_used


def test_a_run_folds_what_its_stories_do_not_have(finished):
    """The tokenizer of 400 is of the training stories, and knows bytes that these do not have."""
    model, record = read_run(finished / "checkpoints")
    model = project.fold_equal_rows(model)
    last = torch.load(finished / "checkpoints/last.pt", weights_only=True)
    moments = last["adamw"]["state"][1]
    assert last["model"]["lm_head.weight"].shape == moments["exp_avg"].shape == (model.token_to_row.max() + 1, 32)
    assert len(model.lm_head.weight) % 64 == 0 and len(model.lm_head.weight) < V
    assert record["parameters"] == sum(p.numel() for p in GPT2LMHeadModel(model.config).parameters())
    assert torch.equal(last["model"]["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("n_used", [384, 390, 399, 400])
def test_a_checkpoint_is_folded_again_with_any_number_of_tokens_left(n_used, tokenizer, tmp_path):
    """Of 400, also where one alone has the last row, which is not its number."""
    has_own = torch.ones(V, dtype=torch.bool)
    has_own[torch.randperm(V)[: V - n_used]] = False
    model = project.FoldedGPT(project.GPT(make_config(tokenizer), tokenizer), has_own)
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    ids = torch.randint(V, (3, 50))
    for fold in (True, False):
        loaded = project.load_checkpoint(tmp_path / "epoch_1")
        loaded = project.fold_equal_rows(loaded) if fold else loaded
        torch.testing.assert_close(loaded(ids), model.eval()(ids))
        assert len(loaded.lm_head.weight) == (len(model.lm_head.weight) if fold else V)


def test_what_starts_from_another_run_is_not_folded(finished, workspace):
    """Other stories may have the tokens that shared a row there."""
    init = finished / "checkpoints" / "epoch_2"
    sizes = "--data sample --fraction 0.0067 --epochs 1 --max-steps 2 --n-positions 64"
    project.main(f"{sizes} --init {init}".split())
    last = torch.load("checkpoints/last.pt", weights_only=True)
    assert last["model"]["lm_head.weight"].shape == (V, 32)


def test_what_was_loaded_does_not_depend_on_the_file_any_more(model, tmp_path):
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    loaded, ids = project.load_checkpoint(tmp_path / "epoch_1"), torch.randint(V, (2, 9))
    before = loaded(ids)
    (tmp_path / "epoch_1" / "model.safetensors").write_bytes(b"")
    assert torch.equal(loaded(ids), before)


def test_a_new_model_begins_like_the_full_one(tokenizer):
    """Folding changes no first weight but those of the tokens that share a row."""
    torch.manual_seed(0)
    full = project.GPT(make_config(tokenizer), tokenizer)
    torch.manual_seed(0)
    has_own = torch.arange(V) % 3 > 0
    folded = project.FoldedGPT(project.GPT(make_config(tokenizer), tokenizer), has_own)
    for one, two in ((full.transformer.wte, folded.transformer.wte), (full.lm_head, folded.lm_head)):
        assert torch.equal(one.weight[has_own], two.weight[folded.token_to_row[has_own]])
        assert torch.equal(one.weight[0], two.weight[-1])


def test_only_a_model_with_a_row_for_each_token_can_be_folded(model, tokenizer):
    half = torch.arange(V) % 2 > 0
    plain = project.GPT(make_config(tokenizer), tokenizer)
    for mask in (half[:-1], torch.cat((half, half[:1]))):
        with pytest.raises(ValueError, match="a row for each token"):
            project.FoldedGPT(plain, mask)
    assert project.FoldedGPT(plain, half).n_shared == 200

    fewer = project.GPT(make_config(tokenizer), tokenizer)
    fewer.lm_head.weight = torch.nn.Parameter(fewer.lm_head.weight[:300].detach())
    with pytest.raises(ValueError, match="a row for each token"):
        project.FoldedGPT(fewer, half)


def test_a_folded_model_is_not_folded_again(model, encoded, tokenizer):
    """Its rows are no tokens, also where it happens to have as many of them as tokens."""
    all_own = project.FoldedGPT(project.GPT(make_config(tokenizer), tokenizer), torch.ones(V, dtype=torch.bool))
    assert len(all_own.lm_head.weight) == V
    for folded in (model, all_own):
        with pytest.raises(ValueError, match="only once"):
            project.FoldedGPT(folded, torch.arange(V) % 2 > 0)
        with pytest.raises(ValueError, match="only once"):
            project.fold_unused_tokens(folded, encoded)
        with pytest.raises(ValueError, match="only once"):
            project.fold_equal_rows(folded)


# --- The plain program, without the folding


def without_folding(source):
    """The script without the class and its functions, and without the line of main that calls them."""
    source = re.sub(r"^# --- The folded vocabulary.*?(?=^# --- )", "", source, flags=re.M | re.S)
    lines = source.splitlines(keepends=True)
    (call,) = (line for line in lines if "fold_unused_tokens(" in line)
    lines.remove(call)
    return "".join(lines)


def names_in(source):
    """All words of a program but for those in its comments."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return set(re.findall(r"\w+", " ".join(token.string for token in tokens if token.type != tokenize.COMMENT)))


def test_who_deletes_the_class_and_one_line_of_main_has_the_plain_program(tmp_path, monkeypatch):
    """It learns the same, if the tokens that share a row here begin with this row there."""
    source = project.Path(project.__file__).read_text(encoding="utf-8")
    plain_source = without_folding(source)
    assert {"FoldedGPT", "fold_unused_tokens", "fold_equal_rows", "token_to_row"} <= names_in(source)
    assert not {"FoldedGPT", "fold_unused_tokens", "fold_equal_rows", "token_to_row"} & names_in(plain_source)
    (tmp_path / "plain.py").write_text(plain_source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("plain", tmp_path / "plain.py")
    plain = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain", plain)
    spec.loader.exec_module(plain)

    def run(name, program):
        """(number of rows, is it of a token that shares a row, the epochs' figures) of a run in a folder."""
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        program.main(f"{TINY} --precision fp32 --learning-rate 0.003 --grad-clip 0.5".split())
        model, record = read_run()
        rows = project.fold_equal_rows(model).token_to_row
        n_rows = len(torch.load("checkpoints/last.pt", weights_only=True)["model"]["lm_head.weight"])
        return n_rows, rows == rows.max(), record["epochs"]

    def with_equal_rows(model, std):
        init_weights(model, std)
        for layer in (model.transformer.wte, model.lm_head):
            layer.weight.data[shares] = layer.weight.data[shares.nonzero()[0]]

    n_rows, shares, ordinary_epochs = run("ordinary", project)
    init_weights = plain.GPT.init_weights
    monkeypatch.setattr(plain.GPT, "init_weights", with_equal_rows)
    n_plain_rows, _, plain_epochs = run("plain", plain)
    assert n_rows < n_plain_rows == V and n_rows == V - shares.sum() + 1
    for ordinary, found in zip(ordinary_epochs, plain_epochs, strict=True):
        for figure in ("test_loss", "train_loss"):
            assert found[figure] == pytest.approx(ordinary[figure], abs=1e-4)
    assert plain_epochs[1]["test_loss"] < plain_epochs[0]["test_loss"] - 0.1


# --- What a step asks of the device


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside, but for views."""

    n = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.n += not function.is_view and "profiler" not in str(function)
        return function(*arguments, **options or {})


def test_muon_takes_few_operations_a_step():
    """A GPU waits for the launch of each. One matrix at a time, five iterations took 386."""
    _, model, _ = folded_and_full()
    muon = project.make_optimizers(model, project.Settings(), torch.float64)["muon"]
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Operations() as operations:
            muon.step()
    assert 0 < operations.n <= 120


def test_nothing_in_a_step_waits_for_the_device():
    """On the meta device there are shapes without numbers: whoever asks for a number fails."""
    model, _, _ = folded_and_full()
    model = model.float().to("meta").train()
    optimizers = project.make_optimizers(model, project.Settings(), torch.bfloat16)
    for group in optimizers["adamw"].param_groups:
        group["fused"] = False  # a kernel of real devices
    window = [(torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long))] * 2
    for _ in range(2):
        sums = project.backward(model, window, 36, nullcontext(), NO_SCALER)
        norm = project.update(model, optimizers, 1.0, NO_SCALER)
    assert (sums.shape, sums.device.type, norm.shape, norm.device.type) == ((2,), "meta", (), "meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        norm.item()
