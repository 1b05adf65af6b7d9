"""Training: gradients against a big batch, perplexity against transformers, whole runs, continued runs."""

import hashlib
import json
import math
import pickle
import re
import shutil
import tempfile
import time
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY, make_config, make_model, read_curve, read_run, same_runs, train
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import gpt2_generate
import gpt2_tinystories as project
from sample_stories import sample_stories

pytestmark = pytest.mark.packages

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def loader_of(encoded, batches):
    return list(project.make_loader(encoded[0], batches))


def backward(model, batches, *rest):
    """[summed loss, correct guesses, number of tokens] of all batches, as numbers; the gradients are in the model."""
    n_tokens = sum(int((targets != project.IGNORE).sum()) for _, targets in batches)
    loss, n_correct = project.backward(model, batches, n_tokens, *(rest or [nullcontext()]), NO_SCALER)
    return [loss.item(), n_correct.item(), n_tokens]


def gradients(model, batches, accum_steps):
    model.zero_grad()
    sums = backward(model, batches[:accum_steps])
    return [p.grad.clone() for p in model.parameters() if p.requires_grad], sums


@pytest.mark.parametrize("numbers", [list(range(8)), [5, 6, 7, 8, 9, 10, 11]], ids=["full window", "partial window"])
@pytest.mark.parametrize("unequal", [False, True])
def test_accumulated_batches_give_the_gradients_of_one_big_batch(numbers, unequal, model, encoded, tokenizer):
    big = loader_of(encoded, [numbers])
    small = loader_of(encoded, [numbers[:4], numbers[4:]])
    if unequal:  # the first four stories are only two tokens long
        for _, targets in (big[0], small[0]):
            targets[:4, 2:] = project.IGNORE
        small[0] = tuple(tensor[:, :2] for tensor in small[0])
    expected, expected_sums = gradients(model, big, 1)
    found, sums = gradients(model, small, 2)
    assert sums == pytest.approx(expected_sums, rel=1e-5)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_the_loss_and_its_gradients_are_those_of_transformers(model, encoded, tmp_path):
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_1").eval()
    input_ids, targets = loader_of(encoded, [[0, 1, 2]])[0]
    labels = torch.cat((torch.full((3, 1), project.IGNORE), targets), dim=1)  # transformers moves them by one itself
    inputs = torch.cat((input_ids, torch.zeros(3, 1, dtype=torch.long)), dim=1)[:, :64]
    loss = theirs(inputs, labels=labels[:, :64]).loss
    loss.backward()
    targets = targets.clone()
    targets[:, 63:] = project.IGNORE
    _, (loss_sum, _, n_tokens) = gradients(model.eval(), [(input_ids, targets)], 1)
    assert loss_sum / n_tokens == pytest.approx(loss.item(), rel=1e-5)
    one, two = model.transformer.h[1].mlp.c_fc.weight.grad, theirs.transformer.h[1].mlp.c_fc.weight.grad.T
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-3)
    sums = torch.zeros_like(model.lm_head.weight).index_add_(0, model.token_to_row, theirs.lm_head.weight.grad)
    torch.testing.assert_close(model.lm_head.weight.grad, sums, atol=1e-6, rtol=1e-3)


def plain_gradients(model, batches):
    """(sums, gradients) of the model's twin, whose loss is that of the definition, from the logits of all tokens."""
    model_class = type(model)

    class Plain(model_class):
        def forward(self, input_ids, targets):
            logits = super().forward(input_ids).float()
            nats = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
            return nats[targets >= 0].sum(), (logits.argmax(-1) == targets).sum()

    model.__class__ = Plain
    sums = backward(model, batches)
    model.__class__ = model_class
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return sums, expected


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_loss_of_rows_is_that_of_the_whole_vocabulary(dtype, tolerance, encoded, model):
    batches = loader_of(encoded, [range(10), range(10, 16)])
    for folded in (True, False):
        if not folded:
            model = project.GPT(make_config(model.tokenizer), model.tokenizer)
        (expected_loss, *rest), expected = plain_gradients(model, batches)
        loss, *rest_too = backward(model, batches, torch.autocast("cpu", dtype, enabled=dtype != torch.float32))
        assert loss == pytest.approx(expected_loss, rel=tolerance / 10)
        assert rest_too == rest or dtype != torch.float32
        for p, gradient in zip((p for p in model.parameters() if p.requires_grad), expected, strict=True):
            assert (p.grad - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_the_compiled_model_has_the_loss_and_gradients_of_the_plain_one(tokenizer, encoded, capsys):
    model = make_model(tokenizer, n_layer=1)
    batches = loader_of(encoded, [range(4), range(30, 33), [7], []])
    expected_sums, expected = plain_gradients(model, batches)
    torch._dynamo.reset()  # what it has learned of other models
    torch._dynamo.utils.counters.clear()
    compiled = project.make_learner(model, encoded, project.Settings(compile="on"), nullcontext(), NO_SCALER)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compile    the model, which may take a minute or two"
    assert re.fullmatch(r"compile    took \d+ s", lines[1]) and len(lines) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the model is compiled as a whole
    assert backward(compiled, batches) == pytest.approx(expected_sums)
    for p, gradient in zip((p for p in model.parameters() if p.requires_grad), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [8, 20])
def test_all_batches_but_the_oddest_are_compiled(batch_size, model, encoded, monkeypatch):
    """Whatever their sizes, also where the longest story is as long as a batch has stories. One story, or none, would
    be compiled again, where nobody expects that it may fail."""
    torch._dynamo.reset()  # what it has learned of sizes
    compiled, n_calls, compile = [], [], torch.compile

    def backend(graph, _inputs):
        compiled.append(1)
        return lambda *inputs: (n_calls.append(1), graph.forward(*inputs))[1]

    monkeypatch.setattr("torch.compile", lambda model, **options: compile(model, backend=backend, **options))
    short = project.Tokens([Story(row.as_py()[: 8 + i % 14]) for i, row in enumerate(encoded.ids)], None, None, 0)
    short = short._replace(lengths=np.array([len(story.ids) - 1 for story in short.ids]))
    assert max(short.lengths) == 20
    settings = project.Settings(compile="on", batch_size=batch_size)
    learner = project.make_learner(model, short, settings, nullcontext(), NO_SCALER)
    assert (compiled, n_calls) == ([1], [1])
    for numbers, is_compiled in ((range(8), True), (range(20), True), ([1, 2], True), ([3], False), ([], False)):
        n_calls.clear()
        project.backward(learner, loader_of(short, [numbers]), 1, nullcontext(), NO_SCALER)
        assert (compiled, n_calls) == ([1], [1] * is_compiled), numbers


class Story:
    """As of an Arrow column."""

    def __init__(self, ids):
        self.ids = ids

    @property
    def values(self):
        return self

    def to_numpy(self):
        return np.array(self.ids)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("kind", [project.GPT, project.FoldedGPT])
def test_pieces_of_any_size_give_the_same_loss_and_gradients(kind, dtype, tolerance, encoded, model, monkeypatch):
    if kind is project.GPT:
        model = project.GPT(make_config(model.tokenizer), model.tokenizer)
    batches = loader_of(encoded, [range(10), [11]])
    n_rows, n_positions = len(model.lm_head.weight), batches[0][0].numel()
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def of_pieces(n):
        sizes, loss = [], kind.loss
        with monkeypatch.context() as patch:
            patch.setattr(project, "PIECE", n * n_rows)
            patch.setattr(project, "SHORTEST_PIECE", 1)
            patch.setattr(kind, "loss", lambda model, logits, targets: (sizes.append(len(logits)),
                                                                        loss(model, logits, targets))[1])  # fmt: skip
            sums = backward(model, batches, autocast)
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return sizes, sums, found

    sizes, expected_sums, expected = of_pieces(n_positions)
    assert sizes == [n_positions, batches[1][0].numel()]
    for n in (100, n_positions - 1, *([1] if dtype == torch.float32 else [])):
        sizes, sums, found = of_pieces(n)
        assert max(sizes) == n and sum(sizes) == n_positions + batches[1][0].numel()
        assert sums == pytest.approx(expected_sums, rel=tolerance / 10)
        for one, two in zip(found, expected, strict=True):
            assert (one - two).norm() <= tolerance * two.norm()


def test_a_piece_of_logits_is_what_an_allocator_keeps(model):
    """32 MB of fp32; but of many rows, and on a GPU, larger."""
    for n_rows, n_expected in ((1_783, 4704), (10_432, 804), (16_384, 512), (50_257, 512)):
        with torch.device("meta"):
            model.lm_head = torch.nn.Linear(1, n_rows)
        n = model.positions_of_a_piece(torch.empty(10_000, 1))
        assert n == n_expected and (n == 512 or n * n_rows * 4 <= 2**25 < (n + 1) * n_rows * 4)
        assert model.positions_of_a_piece(torch.empty(10_000, 1, device="meta")) == 10_000  # as on a GPU


def test_the_longest_stories_are_tried_before_the_first_step(workspace, monkeypatch, refused):
    """Too little memory for them shows at once, with the right advice, and with the compiler, too."""
    sizes, forward = [], project.FoldedGPT.forward

    def counted(model, input_ids, targets=None, **options):
        sizes.append(input_ids.shape)
        if targets is not None and model.training and len(sizes) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(model, input_ids, targets, **options)

    monkeypatch.setattr(project.FoldedGPT, "forward", counted)
    monkeypatch.setattr("torch.compile", lambda model, **_: model)
    for arguments in (TINY, f"{TINY} --compile on"):
        sizes.clear()
        line = refused(project.main, arguments)
        assert "out of memory; halve --batch-size and double --accum-steps" in line
        assert {shape for shape in sizes} == {(8, 64)}
        assert not (workspace / "checkpoints" / "last.pt").exists()


def test_the_trial_is_on_the_longest_stories(workspace, monkeypatch):
    stories = [" ".join(["one day"] * n) for n in range(3, 63)]
    (workspace / "stories.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    sizes, forward = [], project.FoldedGPT.forward

    def counted(model, input_ids, targets=None, **options):
        if targets is not None and model.training:
            sizes.append(input_ids.shape)
        return forward(model, input_ids, targets, **options)

    monkeypatch.setattr(project.FoldedGPT, "forward", counted)
    train("--epochs 1", TINY.replace("sample --fraction 0.0067", "stories.txt --fraction 1"))
    first, *others = sizes
    assert len(others) == 7 and len({length for _, length in sizes}) > 3
    assert first[0] == 8 and all(length <= first[1] for _, length in others)


def test_padding_never_changes_a_loss(model, encoded):
    model.eval()
    input_ids, targets = (tensor[:, :30] for tensor in loader_of(encoded, [[3]])[0])
    alone, n_correct = model(input_ids, targets)
    for filler in (0, 9):  # whatever stands in the padding
        padded = torch.nn.functional.pad(input_ids, (0, 34), value=filler)
        more = torch.nn.functional.pad(targets, (0, 34), value=project.IGNORE)
        loss, n_correct_too = model(padded, more)
        assert loss.item() == pytest.approx(alone.item(), rel=1e-6) and n_correct_too == n_correct


def test_accuracy_counts_right_guesses_by_hand(model, encoded):
    input_ids, targets = loader_of(encoded, [[0, 1]])[0]
    guesses = model.eval()(input_ids).argmax(-1)
    by_hand = sum(g == t for g, t in zip(guesses.flatten().tolist(), targets.flatten().tolist(), strict=True) if t >= 0)
    loss, accuracy = project.evaluate(model, [(input_ids, targets)])
    assert accuracy == pytest.approx(by_hand / int((targets >= 0).sum()))


def test_perplexity_equals_that_of_transformers_for_every_batch_size(model, encoded, tmp_path):
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_1").eval()
    ids, lengths, *_ = encoded
    nats = tokens = 0
    for story in ids:
        story = torch.tensor([story.as_py()])
        logits = theirs(story[:, :-1]).logits[0].log_softmax(-1)
        nats -= logits.gather(1, story[0, 1:, None]).sum().item()
        tokens += story.size(1) - 1
    for batch_size in (1, 7, 60):
        loader = project.make_loader(ids, project.epoch_batches(lengths, batch_size, 0, 0))
        assert project.compute_perplexity(model, loader) == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_the_learning_rate_warms_up_and_decays_to_zero():
    rates = [project.schedule(step, 50, 4) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[27] == pytest.approx(0.5) and rates[49] == pytest.approx(1 / 46)
    assert min(rates) > 0
    assert project.schedule(0, 1, 4) == 1.0
    assert max(range(100), key=lambda step: project.schedule(step, 100, 1000)) == 10  # a tenth at most


def test_only_matrices_are_decayed(model):
    optimizers = project.make_optimizers(model, project.Settings(weight_decay=0.3), torch.float32)
    embedding, head, vectors, *inner = project.groups_of(optimizers)
    for group in (embedding, head, *inner):
        assert group["weight_decay"] == 0.3 and all(p.dim() == 2 for p in group["params"])
    assert vectors["weight_decay"] == 0 and all(p.dim() == 1 for p in vectors["params"])


def test_a_weight_that_no_optimizer_would_train_is_an_error_by_its_name(model):
    """It would never learn, and its growing gradient would clip those of all others. With --init it is trained."""
    model.transformer.wpe.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight"):
        project.make_optimizers(model, project.Settings(), torch.float32)
    optimizers = project.make_optimizers(model, project.Settings(init="gpt2"), torch.float32)
    trained = [id(p) for group in project.groups_of(optimizers) for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("init", ["", "gpt2"])
def test_a_weight_of_another_shape_than_all_others_is_not_forgotten(init, model):
    model.transformer.scale = torch.nn.Parameter(torch.ones(1, 1, 32))
    with pytest.raises(ValueError, match=r"transformer\.scale"):
        project.make_optimizers(model, project.Settings(init=init), torch.float32)


@pytest.mark.parametrize("twin", ["lm_head", "transformer.h.1.mlp.c_fc"])  # of AdamW, too; of Muon
def test_a_weight_that_would_be_trained_twice_a_step_is_an_error_by_its_name(twin, tokenizer):
    model = project.GPT(make_config(tokenizer), tokenizer)
    model.get_submodule(twin).weight = model.transformer.wte.weight
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        project.make_optimizers(model, project.Settings(), torch.float32)


def polar_factor(x):
    """What the iterations come near to, exactly."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has a Muon since 2.9")
@pytest.mark.parametrize(
    ("shape", "n_parts"), [((96, 32), 1), ((32, 64), 1), ((48, 48), 1), ((96, 32), 3), ((48, 32), 3), ((192, 32), 3)],
    ids=str)
def test_muon_is_that_of_pytorch_but_for_the_iterations(shape, n_parts, monkeypatch):
    """Two matrices in one group, with the exact result of the iterations in both. For PyTorch's, a part of a matrix is
    a matrix."""
    orthogonalize = project.orthogonalize

    def exact(x, dtype):
        like_ours = torch.empty_strided(x.shape, orthogonalize(x, dtype).stride(), dtype=x.dtype)
        return like_ours.copy_(polar_factor(x))

    monkeypatch.setattr(project, "orthogonalize", exact)
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda x, *_: polar_factor(x))
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(2)]
    theirs = [torch.nn.Parameter(part.detach().clone()) for weight in ours for part in weight.chunk(n_parts)]
    group = {"params": ours, "lr": 0.1, "weight_decay": 0.01}
    muon = project.Muon([group | {"momentum": 0.8, "n_parts": n_parts}], torch.float64)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, momentum=0.8)
    for _ in range(4):
        for weight in ours:
            weight.grad = torch.randn_like(weight)
        for twin, part in zip(theirs, torch.cat([weight.grad for weight in ours]).chunk(len(theirs)), strict=True):
            twin.grad = part.clone()
        muon.step()
        reference.step()
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs))


@pytest.mark.parametrize(("n_embd", "rate"), [(64, 0.03), (256, 0.03), (768, 0.01), (1536, 0.005)])
def test_a_wider_head_learns_more_slowly(n_embd, rate, tokenizer):
    model = project.GPT(make_config(tokenizer, n_embd=n_embd), tokenizer)
    optimizers = project.make_optimizers(model, project.Settings(learning_rate=0.001), torch.float32)
    rates = {id(weight): group["lr"] for group in project.groups_of(optimizers) for weight in group["params"]}
    assert rates[id(model.lm_head.weight)] == pytest.approx(rate)
    assert rates[id(model.transformer.wte.weight)] == pytest.approx(0.01)


def test_the_constants_of_the_recipe(model):
    optimizers = project.make_optimizers(model, project.Settings(muon_learning_rate=0.5), torch.float32)
    assert all(group["betas"] == (0.9, 0.99) for group in optimizers["adamw"].param_groups)
    assert all(group["momentum"] == 0.9 and group["lr"] == 0.5 for group in optimizers["muon"].param_groups)


def test_a_model_that_was_trained_by_adamw_learns_at_one_rate(model):
    settings = project.Settings(init="gpt2", learning_rate=0.001, weight_decay=0.3)
    optimizers = project.make_optimizers(model, settings, torch.float32)
    assert list(optimizers) == ["adamw"]
    for group in project.groups_of(optimizers):
        assert group["lr"] == 0.001
        assert all(group["weight_decay"] == (0.3 if weight.dim() == 2 else 0) for weight in group["params"])


def test_q_k_and_v_are_made_orthogonal_apart_and_nothing_else_is(model):
    muon = project.make_optimizers(model, project.Settings(), torch.float32)["muon"]
    n_parts = {id(weight): group["n_parts"] for group in muon.param_groups for weight in group["params"]}
    names = {name: n_parts.get(id(weight)) for name, weight in model.transformer.h.named_parameters()}
    assert {name for name, n in names.items() if n == 3} == {f"{i}.attn.c_attn.weight" for i in range(2)}
    assert sum(n == 1 for n in names.values()) == 6


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=str)
def test_orthogonalize_keeps_the_singular_vectors_of_each_matrix(shape, dtype, size):
    """One matrix has a single direction: its singular value is 1 after the division, the largest that there is."""
    batch = size * torch.stack((torch.randn(shape), torch.outer(*(torch.randn(n) for n in shape))))
    for x, found in zip(batch, project.orthogonalize(batch, dtype).float(), strict=True):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        values = u.T @ found @ v.T
        n = int((s > 0.02 * s.norm()).sum())  # smaller ones are noise in bf16
        large = values[:n, :n]
        assert (large - large.diag().diag()).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)
        assert large.diag().min() > 0.3 and torch.linalg.matrix_norm(found, 2) < 1.4


@pytest.mark.parametrize("spoiled", ["lm_head.weight", "transformer.h.0.attn.c_attn.weight"])  # of AdamW, of Muon
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_overflows_in_fp16_is_skipped_whole(value, spoiled, model, encoded):
    optimizers = project.make_optimizers(model, project.Settings(), torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    window = list(project.make_loader(encoded.ids, [[0, 1]]))

    def step():
        project.backward(model, window, 100, nullcontext(), scaler)
        return project.update(model, optimizers, 1.0, scaler)

    assert step() > 0
    before = [p.detach().clone() for p in model.parameters()]
    hook = model.get_parameter(spoiled).register_hook(lambda gradient: torch.full_like(gradient, value))
    norm = step()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 4.0 and norm == 0  # the run goes on, with a smaller scale
    hook.remove()
    step()
    assert not torch.equal(before[0], next(model.parameters()))
    model.get_parameter(spoiled).register_hook(lambda gradient: torch.full_like(gradient, value))
    norms = [step() for _ in range(3)]
    assert scaler.get_scale() == 0.5 and norms[:2] == [0, 0] and not norms[2].isfinite()  # it cannot help any more


# --- Whole runs


def test_a_run_leaves_what_the_readme_says(finished):
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert names - {".lock"} == {"data", "epoch_1", "epoch_2", "last.pt"}  # some releases remove their locks
    standard = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for epoch in (1, 2):
        folder = finished / "checkpoints" / f"epoch_{epoch}"
        assert {path.name for path in folder.iterdir()} == standard | {"training.json", "sample.txt"}
        assert (folder / "sample.txt").read_text().startswith("Once upon a time, in a small village")
    plots = {path.name for path in (finished / "plots").iterdir()}
    assert plots - {".lock"} == {"training_metrics.png", "training_metrics.csv"}
    assert (finished / "plots" / "training_metrics.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_record_holds_settings_data_epochs_and_versions(finished, monkeypatch):
    monkeypatch.chdir(finished)
    model, record = read_run()
    assert record["settings"]["n_embd"] == 32
    assert record["settings"].keys() == {f.name for f in project.fields(project.Settings)}
    data = record["data"]
    assert data["source"] == "built-in stories" and data["stories"] == project.N_BUILT_IN
    assert data["train_stories"] + data["test_stories"] == 80
    assert data["train_tokens"] > 0 and data["stories_cut"] > 0
    keys = "train_loss train_accuracy test_loss test_perplexity test_accuracy test_bits_per_byte tokens seconds".split()
    for number, epoch in enumerate(record["epochs"], 1):
        assert set(keys) <= epoch.keys() and epoch["epoch"] == number
        assert epoch["tokens"] == data["train_tokens"]  # every story once
        assert epoch["test_perplexity"] == pytest.approx(math.exp(epoch["test_loss"]))
    assert record["epochs"][1]["test_perplexity"] < record["epochs"][0]["test_perplexity"]
    assert {"python", "torch", "transformers", "datasets"} <= record["versions"].keys()
    files = {"script_sha256": project.__file__, "weights_sha256": "checkpoints/epoch_2/model.safetensors"}
    for name, path in files.items():
        assert record[name] == hashlib.sha256(project.Path(path).read_bytes()).hexdigest()
    steps = [step for step, _ in read_curve(finished)]
    assert steps == list(range(1, 11))  # 72 stories, 8 × 2 a step: 5 steps an epoch


def test_transformers_loads_a_checkpoint_and_writes_the_same_text(finished):
    folder = finished / "checkpoints" / "epoch_2"
    ours, theirs = project.load_checkpoint(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    input_ids = torch.randint(0, 400, (2, 30))
    torch.testing.assert_close(ours(input_ids), theirs(input_ids).logits, atol=1e-4, rtol=1e-4)
    assert theirs.dtype == torch.float32
    writer = pipeline("text-generation", model=str(folder))
    text = writer("Once upon a time", do_sample=False, max_new_tokens=20)[0]["generated_text"]
    assert text == project.generate_text(ours, "Once upon a time", 20)
    assert len(AutoTokenizer.from_pretrained(folder)) == 400


def test_the_recorded_test_loss_is_that_of_the_saved_model(finished, monkeypatch):
    monkeypatch.chdir(finished)
    model, record = read_run()
    ids = next((finished / "checkpoints" / "data").glob("test-*.arrow"))
    column = datasets.Dataset.from_file(str(ids)).data.column("ids")
    loader = project.make_loader(column, [[i] for i in range(len(column))])
    assert record["epochs"][1]["test_perplexity"] == pytest.approx(project.compute_perplexity(model, loader), rel=1e-5)


def test_dropout_is_on_again_after_a_sample(workspace, monkeypatch):
    modes, forward = [], project.GPT.forward

    def spy(model, *arguments, **options):
        if torch.is_grad_enabled():
            modes.append((model.training, model.transformer.h[0].attn.training))
        return forward(model, *arguments, **options)

    monkeypatch.setattr(project.GPT, "forward", spy)
    train("--precision fp32")
    assert len(modes) == 1 + 18 and set(modes) == {(True, True)}  # the first is the trial on the longest stories


def test_the_same_command_twice_gives_the_same_weights(finished, workspace):
    train()
    same_runs(workspace, finished)


@example(stops=[1, 3, 5, 8])
@given(stops=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True).map(sorted))
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
def test_a_continued_run_ends_like_an_unbroken_one(stops, finished):
    """Stopped after these of its 10 steps, in the middle of an epoch or at its end, with a save after every step."""
    save_last = project.save_last
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.chdir(folder)
        for stop_after in stops:

            def stopping(step, *rest, stop_after=stop_after):
                if step > stop_after:
                    raise KeyboardInterrupt
                return save_last(step, *rest)

            patch.setattr(project, "save_last", stopping)
            with pytest.raises(KeyboardInterrupt):
                train("--save-every 0")
        patch.setattr(project, "save_last", save_last)
        train("--save-every 0")
        same_runs(project.Path(folder), finished)


@pytest.fixture
def interrupted(workspace, monkeypatch):
    """last.pt of a run that was interrupted after its first epoch, before the evaluation."""
    with monkeypatch.context() as patch:
        patch.setattr(project, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train()
    return workspace / "checkpoints" / "last.pt"


def test_a_run_that_another_script_began_says_so_in_a_line_and_goes_on(interrupted, workspace, finished, capsys):
    last = torch.load(interrupted, weights_only=True)
    last["record"]["script_sha256"] = "0" * 64
    torch.save(last, interrupted)
    capsys.readouterr()
    train()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("script     has changed since the last save")]) == 1
    same_runs(workspace, finished)
    assert read_run()[1]["script_sha256"] == hashlib.sha256(project.Path(project.__file__).read_bytes()).hexdigest()


def test_a_run_that_the_same_script_began_says_nothing_of_the_script(interrupted, capsys):
    train()
    shown = capsys.readouterr().out
    assert "continuing" in shown and "script " not in shown


def test_a_continued_run_takes_the_constants_of_its_optimizers_from_the_script(interrupted, workspace, finished):
    """Not from last.pt: who changes betas in the script and continues would go on with the old ones unawares."""
    last = torch.load(interrupted, weights_only=True)
    last["adamw"]["param_groups"][0] |= {"betas": (0.5, 0.5), "eps": 0.1}
    last["adamw"]["param_groups"][1] |= {"betas": (0.5, 0.5), "weight_decay": 0.7}
    last["muon"]["param_groups"][0] |= {"weight_decay": 0.7}
    torch.save(last, interrupted)
    train()
    same_runs(workspace, finished)


def test_changed_betas_take_effect_when_a_run_goes_on(interrupted, monkeypatch):
    saved = torch.load(interrupted, weights_only=True)["adamw"]["state"]
    update, betas = project.update, []

    class Changed(torch.optim.AdamW):
        def __init__(self, groups, betas, **options):
            super().__init__(groups, betas=(0.6, 0.7), **options)

    def spy(model, optimizers, *rest):
        betas.append([group["betas"] for group in optimizers["adamw"].param_groups])
        if len(betas) == 1:  # the state of the first step is what was saved
            found = optimizers["adamw"].state.values()
            for one, two in zip(found, saved.values(), strict=True):
                assert torch.equal(one["exp_avg"], two["exp_avg"]) and one["exp_avg"].norm() > 0
        return update(model, optimizers, *rest)

    monkeypatch.setattr("torch.optim.AdamW", Changed)
    monkeypatch.setattr(project, "update", spy)
    train()
    assert betas == [[(0.6, 0.7)] * 3] * 5


@pytest.mark.parametrize("broken", ["evaluate", "generate_text"])
def test_what_fails_after_an_epoch_loses_nothing(broken, finished, workspace, monkeypatch):
    def failing(*_, **__):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(project, broken, failing)
        with pytest.raises(ZeroDivisionError):
            train()
    train()
    same_runs(workspace, finished)


def test_a_save_that_is_cut_short_leaves_the_checkpoint_before_it(workspace, model, monkeypatch):
    def save(number):
        project.save_checkpoint(folder / "epoch_1", model, {"number": number})

    def save_last(number):
        project.save_last(number, project.Settings(), {}, {"model": model}, torch.zeros(9, 5))

    folder = workspace / "checkpoints"
    save(1)
    save_last(1)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("no space left on device")))
        for saving in (save, save_last):
            with pytest.raises(OSError, match="cannot be saved, what was saved before is kept: no space"):
                saving(2)
    assert json.loads((folder / "epoch_1" / "training.json").read_text())["number"] == 1
    project.load_checkpoint(folder / "epoch_1")
    assert torch.load(folder / "last.pt", weights_only=True)["record"]["step"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["epoch_1", "last.pt"]


def test_only_the_weights_of_an_epoch_are_guarded(finished, tmp_path):
    """Who edits, adds or removes another file of its folder does no harm."""
    folder = shutil.copytree(finished / "checkpoints" / "epoch_2", tmp_path / "epoch_2")
    expected = project.load_checkpoint(folder).state_dict()
    (folder / "sample.txt").write_text("edited")
    (folder / "README.md").write_text("added")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("added")
    (folder / "generation_config.json").unlink()
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"note": "mine"}, indent=4))
    for removed in (None, "sample.txt", "training.json"):
        if removed:
            (folder / removed).unlink()
        found = project.load_checkpoint(folder).state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_in_the_weights_is_noticed_unless_it_is_wanted(place, finished, tmp_path, refused):
    folder = shutil.copytree(finished / "checkpoints" / "epoch_2", tmp_path / "epoch_2")
    content = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")  # of the tensors; before it is their header
    end = len(content) - 4
    content[{"first": start, "middle": start + (end - start) // 8 * 4, "last": end}[place]] ^= 1  # the lowest bit
    before = project.load_checkpoint(folder).state_dict()
    (folder / "model.safetensors").write_bytes(content)

    line = refused(lambda _: project.load_checkpoint(folder), "")
    assert "model.safetensors is not as it was saved" in line and "weights_sha256" in line

    record = json.loads((folder / "training.json").read_text())
    del record["weights_sha256"]
    (folder / "training.json").write_text(json.dumps(record))
    after = project.load_checkpoint(folder).state_dict()
    assert sum(int((after[name] != weight).sum()) for name, weight in before.items()) == 1


def test_a_broken_training_json_is_refused_in_one_line(finished, tmp_path, refused):
    folder = shutil.copytree(finished / "checkpoints" / "epoch_2", tmp_path / "epoch_2")
    for content in (b"", b"{", b"\xff\xfe", b"[]", b"7"):
        (folder / "training.json").write_bytes(content)
        assert "training.json: cannot be read" in refused(lambda _: project.load_checkpoint(folder), "")


def test_a_finished_run_is_reported_and_left_alone(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)

    def times():
        files = [path for path in finished.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    train("--device cpu --compile off --prompt Hello")  # these may change
    assert "finished" in capsys.readouterr().out
    assert times() == before


def test_another_run_in_the_same_folder_is_refused_unless_it_may_overwrite(workspace, refused, capsys):
    train()
    line = refused(project.main, TINY + " --learning-rate 1e-3 --epochs 1")
    assert "learning_rate was 0.0003, is 0.001" in line and "epochs was 2, is 1" in line and "--overwrite" in line
    assert len(read_run()[1]["epochs"]) == 2
    train("--epochs 1 --overwrite")
    assert not (workspace / "checkpoints" / "epoch_2").exists()
    assert len(read_run(epoch=1)[1]["epochs"]) == 1


def test_a_run_whose_data_changed_is_refused(workspace, refused, monkeypatch):
    stories = list(sample_stories(40))
    arguments = TINY.replace("sample", "stories.txt").replace("0.0067", "1") + " --max-steps 3"
    (workspace / "stories.txt").write_text("<|endoftext|>".join(stories))
    with monkeypatch.context() as patch:
        patch.setattr(project, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            project.main(arguments.split())
    (workspace / "stories.txt").write_text("<|endoftext|>".join(stories[:-1]))
    assert "stories was 40, is 39" in refused(project.main, arguments)


@pytest.mark.parametrize("spoiled", ["cut", "empty", "no zip", "pickle", "missing", "damaged"])
def test_a_broken_last_save_is_refused_in_one_line(spoiled, finished, workspace, refused):
    shutil.copytree(finished, workspace, dirs_exist_ok=True)
    last = workspace / "checkpoints" / "last.pt"
    content = last.read_bytes()
    place = content.index(torch.load(last, weights_only=True)["model"]["lm_head.weight"].numpy().tobytes())
    contents = {"cut": content[:1000], "empty": b"", "no zip": b"x" * 1000, "damaged": content[:place] + b"damaged"}
    contents |= {"pickle": b"cos\nsystem\n(S'touch owned'\ntR."}
    contents["damaged"] += content[len(contents["damaged"]) :]
    last.unlink()
    if spoiled in contents:
        last.write_bytes(contents[spoiled])
    line = refused(project.main, TINY)
    assert "checkpoints/last.pt: " in line and "--overwrite" in line
    assert ("no such file" if spoiled == "missing" else "cannot be read") in line.lower()
    assert "weights_only" not in line and "Hub" not in line
    assert not (workspace / "owned").exists()


class Owned:
    def __reduce__(self):
        return project.os.mkdir, ("owned",)


RECORD = {"settings": {}, "data": {"source": ""}, "epochs": [{}]}


@pytest.mark.parametrize("content", [[], {}, {"record": {}}, {"record": RECORD}, {"record": Owned()}], ids=range(5))
def test_a_last_save_of_something_else_is_refused_in_one_line(content, workspace, refused):
    (workspace / "checkpoints").mkdir()
    torch.save(content, workspace / "checkpoints" / "last.pt")
    line = refused(project.main, TINY)
    assert "checkpoints/last.pt: cannot be read" in line and "--overwrite" in line
    assert "weights_only" not in line
    assert not (workspace / "owned").exists()


@pytest.mark.parametrize("spoiled", ["model", "optimizer", "no optimizer"])
def test_a_last_save_of_another_model_is_refused_in_one_line(spoiled, interrupted, refused):
    last = torch.load(interrupted, weights_only=True)
    if spoiled == "model":
        del last["model"]["lm_head.weight"]
    elif spoiled == "optimizer":
        last["muon"]["param_groups"].pop()
    else:
        del last["muon"]
    torch.save(last, interrupted)
    line = refused(project.main, TINY)
    assert "checkpoints/last.pt: cannot be read" in line and "--overwrite" in line


def test_the_seconds_of_an_epoch_have_the_waits_for_the_device_in_them_and_not_the_saves(workspace, monkeypatch):
    """Where the figures are looked at, the work of the steps before has to be finished."""
    check_finite, save_last = project.check_finite, project.save_last
    monkeypatch.setattr(project, "check_finite", lambda *arguments: (time.sleep(0.2), check_finite(*arguments)))
    monkeypatch.setattr(project, "save_last", lambda *arguments: (time.sleep(1.5), save_last(*arguments)))
    train("--epochs 1 --precision fp32")
    (epoch,) = read_run(epoch=1)[1]["epochs"]
    assert 0.4 < epoch["seconds"] < 3  # two looks, after the first and the last step; two saves of 1.5 s


def test_a_mistake_in_the_optimizers_does_not_cost_the_run_that_would_be_overwritten(finished, workspace, monkeypatch):
    shutil.copytree(finished, workspace, dirs_exist_ok=True)
    monkeypatch.setattr(project, "check_that_all_are_trained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("--overwrite")
    assert len(read_run()[1]["epochs"]) == 2 and (workspace / "checkpoints" / "last.pt").exists()


def test_max_steps_ends_the_run_and_the_decay_there(workspace, capsys):
    train("--max-steps 7")
    _, record = read_run()
    assert [epoch["step"] for epoch in record["epochs"]] == [5, 7]
    assert record["epochs"][1]["tokens"] < record["epochs"][0]["tokens"]
    train("--max-steps 7")
    assert "finished" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(workspace, refused, monkeypatch):
    forward, calls = project.FoldedGPT.forward, []

    def poisoned(model, input_ids, targets=None, **options):
        if targets is None:
            return forward(model, input_ids, **options)
        loss, n_correct = forward(model, input_ids, targets)
        calls.append(torch.is_grad_enabled())
        return (loss * float("nan") if sum(calls) == 15 else loss), n_correct

    with monkeypatch.context() as patch:
        patch.setattr(project.FoldedGPT, "forward", poisoned)
        line = refused(project.main, [*TINY.split(), "--save-every", "0"])  # it tries to save after every step
    assert "step 8" in line and "not finite" in line and "last.pt is good, of step 7" in line
    weights = torch.load("checkpoints/last.pt", weights_only=True)["model"]
    assert all(weight.isfinite().all() for weight in weights.values())
    train("--save-every 0")
    _, record = read_run()
    assert record["epochs"][-1]["step"] == 10


def test_a_compiler_that_fails_is_reported_whole(finished, workspace, monkeypatch, capsys, refused):
    """`on` means on; `auto`, which is on where there is a GPU, goes on without it."""

    def broken(learner, **_):
        def fail(*_):
            raise RuntimeError("no working compiler\nlong story")

        fail.device = learner.device
        return fail

    monkeypatch.setattr("torch.compile", broken)
    line = refused(project.main, f"{TINY} --compile on")
    assert line.endswith("--compile on: PyTorch fails: RuntimeError: no working compiler long story")
    assert not list(workspace.glob("checkpoints/epoch_*"))

    make_learner, model_class = project.make_learner, project.FoldedGPT

    def as_on_a_gpu(model, *rest):
        with monkeypatch.context() as patch:
            patch.setattr(model_class, "device", property(lambda model: Device()))
            return make_learner(model, *rest)

    class Device:
        type = "cuda"

    monkeypatch.setattr(project, "to_device", lambda batch, device: batch)
    monkeypatch.setattr(project, "make_learner", as_on_a_gpu)
    train("--compile auto")
    assert capsys.readouterr().out.count("compile    off: RuntimeError: no working compiler\nlong story\n") == 1
    same_runs(workspace, finished)


def test_a_run_that_learned_its_stories_by_heart_names_its_best_epoch(workspace, capsys, monkeypatch):
    losses = iter([2.0, 3.0])
    monkeypatch.setattr(project, "evaluate", lambda *_: (next(losses), 0.5))
    train("--test-points 0")
    shown = capsys.readouterr().out
    assert "test perplexity 20.09" in shown and "lowest in epoch 1, 7.39" in shown
    assert shown.endswith("next: python gpt2_generate.py --model checkpoints/epoch_1\n")


def test_a_run_that_will_replace_the_plots_of_another_one_says_so(workspace, capsys):
    train("--max-steps 1")
    train("--max-steps 1 --overwrite")
    assert "another run" not in capsys.readouterr().out
    for options in ("", "--overwrite"):
        train(f"--max-steps 1 --checkpoints others{options} {options}")
        assert "warning    replaces the plots of another run in plots" in capsys.readouterr().out


def test_out_of_memory_is_one_line_with_a_way_out(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …\nmany lines")

    with pytest.raises(SystemExit):
        project.run(main)
    assert re.fullmatch(r".*out of memory; .*halve --batch-size and double --accum-steps.*\n", capsys.readouterr().err)


def test_a_trained_model_learns_to_end_its_stories(tokenizer):
    """Two stories by heart: text and end come out exactly."""
    texts = ["Tom had a red ball. He lost it. He was sad.", "Lily saw a cat. The cat was big. They played all day."]
    ids = project.encode_stories(datasets.Dataset.from_dict({"text": texts}), tokenizer, 64).ids
    model = project.GPT(make_config(tokenizer, n_embd=64), tokenizer)
    optimizers = project.make_optimizers(model, project.Settings(), torch.float32)
    for _ in range(150):
        backward(model, list(project.make_loader(ids, [[0], [1]])))
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert project.generate_text(model, "Tom had", max_length=60) == texts[0]
    assert project.generate_text(model, "Lily saw", max_length=60) == texts[1]


def test_a_prompt_that_does_not_fit_is_refused_before_the_training(workspace, refused):
    assert "--prompt" in refused(project.main, [*TINY.split(), "--prompt", "word " * 100])
    assert not (workspace / "checkpoints" / "last.pt").exists()


def test_learning_rates_and_clipping_reach_the_optimizers(workspace, monkeypatch):
    rates, squares, shared_squares = [], [], []

    def spy(optimizer_class):
        step = optimizer_class.step

        def spied(optimizer, *arguments):
            rates.append([group["lr"] for group in optimizer.param_groups])
            squares.append(sum(p.grad.square().sum().item() for g in optimizer.param_groups for p in g["params"]))
            if optimizer_class is torch.optim.AdamW:
                (lm_head,) = optimizer.param_groups[1]["params"]
                shared_squares.append(lm_head.grad[-1].square().sum().item())
            return step(optimizer, *arguments)

        monkeypatch.setattr(optimizer_class, "step", spied)

    spy(torch.optim.AdamW)
    spy(project.Muon)
    train("--grad-clip 0.01 --warmup-steps 1 --learning-rate 0.001 --muon-learning-rate 0.03")
    shares = [project.schedule(step, 10, 1) for step in range(10)]
    assert rates[::2] == [pytest.approx([0.01 * share, 0.03 * share, 0.001 * share]) for share in shares]
    assert rates[1::2] == [pytest.approx([0.03 * share] * 4) for share in shares]
    more = project.fold_equal_rows(read_run()[0]).n_shared - 1  # tokens that have the gradient of the last row, too
    squares = zip(squares[::2], squares[1::2], shared_squares, strict=True)
    norms = [math.sqrt(a + b + more * c) for a, b, c in squares]
    assert norms == pytest.approx([0.01] * 10, rel=1e-3)


def test_other_folders_among_the_checkpoints_are_left_alone(workspace, capsys):
    mine = [workspace / "checkpoints" / name for name in ("epoch_1.good", "epoch_best", "last.1", "epoch_2.zip")]
    for path in mine:
        path.mkdir(parents=True)
    left = workspace / "checkpoints" / "epoch_1.tmp"
    left.mkdir()
    train("--epochs 1")
    train("--epochs 1 --overwrite")
    assert all(path.exists() for path in mine) and not left.exists()


def test_more_epochs_than_points_of_the_curve(workspace):
    arguments = TINY.replace("sample", "two.txt").replace("0.0067", "1").replace("--epochs 2", "--epochs 1001")
    project.Path("two.txt").write_text("<|endoftext|>".join(["Tom ran."] + ["Lily sat."]))
    write_plots = project.write_plots

    def stop(*arguments):
        write_plots(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "write_plots", stop)
        with pytest.raises(KeyboardInterrupt):
            project.main(arguments.split())
    assert [step for step, _ in read_curve(workspace)] == [1]


def test_a_prompt_that_does_not_fit_is_refused_when_a_run_goes_on(interrupted, refused):
    assert "--prompt" in refused(project.main, [*TINY.split(), "--prompt", "word " * 100])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_out_of_memory_without_a_gpu_is_one_line_too(error, refused):
    def main(_):
        raise error

    assert "halve --batch-size" in refused(main, "")


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        project.run(main)


def test_a_run_begun_with_the_built_in_stories_goes_on_with_them(workspace, monkeypatch, capsys):
    arguments = TINY.replace("--data sample ", "").split()
    monkeypatch.setattr(project, "hub_answers", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(project, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            project.main(arguments)
    assert "THE BUILT-IN STORIES" in capsys.readouterr().out
    datasets.Dataset.from_dict({"text": list(sample_stories(40, seed=9))}).save_to_disk("tinystories_local")
    project.main(arguments)
    shown = capsys.readouterr().out
    assert "continuing" in shown and "THE BUILT-IN STORIES" not in shown
    assert read_run()[1]["data"]["source"] == "built-in stories"


# --- Mistakes of a programmer, who changes the script and has to see where it fails


def plant(monkeypatch, place, good_calls=0):
    """The function at place, such as GPT.__init__, raises an AttributeError, but for its first good_calls calls."""
    *owner, name = place.split(".")
    owner = getattr(project, owner[0]) if owner else project
    function, calls = getattr(owner, name), []

    def planted(*arguments, **options):
        calls.append(place)
        if len(calls) > good_calls:
            raise AttributeError(f"planted in {place}")
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, planted)


IN_MODEL = "GPT.__init__ GPT.init_weights GPT.forward Block.forward FoldedGPT.__init__ FoldedGPT.forward".split()


@pytest.mark.parametrize("place", IN_MODEL)
def test_a_mistake_in_the_model_shows_where_it_is(place, workspace, monkeypatch):
    plant(monkeypatch, place)
    with pytest.raises(AttributeError, match=f"planted in {place}"):
        project.run(lambda: project.main(TINY.split()))


IN_READING = {"read_text": "my.txt", "read_lines": "my.jsonl", "read_table": "my.parquet", "saved_stories": "saved"}


IN_ENCODING = ["clean", "encode", "bytes_of_targets", "pad_batch", "make_test_loader", "step_batches"]


@pytest.mark.parametrize("place", [*IN_READING, "built_in_stories", *IN_ENCODING])
def test_a_mistake_in_the_code_of_the_data_shows_where_it_is(place, stories, workspace, monkeypatch):
    data = IN_READING.get(place, "my.txt")
    if data == "my.txt":
        project.Path(data).write_text("<|endoftext|>".join(stories["text"]))
    elif data == "saved":
        stories.save_to_disk(data)
    elif data == "my.jsonl":
        stories.to_json(data)
    else:
        stories.to_parquet(data)
    data = "sample" if place == "built_in_stories" else data
    plant(monkeypatch, place)
    with pytest.raises(AttributeError, match=f"planted in {place}"):
        project.run(lambda: project.main(TINY.replace("sample", data).replace("0.0067", "1").split()))


IN_SAVING = {"to_gpt2": 1, "GPT.gpt2_state_dict": 1, "transposed": 1, "sha256": 1}  # good calls before the training
IN_SAVING |= {"save_checkpoint": 0, "save_last": 0, "Muon.state_dict": 0, "score": 0, "curve_points": 0}


@pytest.mark.parametrize(("place", "good_calls"), [*IN_SAVING.items(), ("flush", 0), ("flush", 4), ("flush", 8)])
def test_a_mistake_in_the_saving_shows_where_it_is_and_loses_nothing(
    place, good_calls, finished, workspace, monkeypatch
):
    """flush is called four times for the data, twice for last.pt, and then for each file of a checkpoint."""
    with monkeypatch.context() as patch:
        plant(patch, place, good_calls)
        with pytest.raises(AttributeError, match=f"planted in {place}"):
            project.run(lambda: project.main(TINY.split()))
    assert (workspace / "checkpoints").is_dir() and not list(workspace.rglob("*.tmp"))
    train()
    same_runs(workspace, finished)


def test_what_cannot_be_pickled_shows_so_and_what_was_saved_before_is_kept(model, workspace):
    def save(record):
        project.run(lambda: project.save_last(1, project.Settings(), record, {"model": model}, torch.zeros(9, 5)))

    save({"good": True})
    content = (workspace / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        save({"forgotten": lambda: 0})
    assert [path.name for path in (workspace / "checkpoints").iterdir()] == ["last.pt"]
    assert (workspace / "checkpoints" / "last.pt").read_bytes() == content


@pytest.mark.parametrize("place", ["GPT.__init__", "transposed", "FoldedGPT.__init__", "Block.forward", "next_ids"])
def test_a_mistake_in_the_model_shows_where_it_is_when_a_checkpoint_is_loaded(place, finished, monkeypatch):
    plant(monkeypatch, place)
    with pytest.raises(AttributeError, match=f"planted in {place}"):
        project.run(lambda: gpt2_generate.main(["--model", str(finished / "checkpoints")]))


@pytest.mark.parametrize("mistake", ["a name", "a shape"])
def test_the_compiler_hides_no_mistake_in_the_model(mistake, workspace, monkeypatch):
    def forward(block, x, cache=None):
        return x + block.no_such_layer(x) if mistake == "a name" else x @ block.mlp.c_proj.weight

    monkeypatch.setattr(project.Block, "forward", forward)
    kind, message = (AttributeError, "no_such_layer") if mistake == "a name" else (RuntimeError, "shapes")
    with pytest.raises(kind, match=message) as error:
        project.run(lambda: project.main(f"{TINY} --compile on".split()))
    assert type(error.value) is kind  # and none of the compiler's


def test_a_model_that_could_not_be_saved_is_an_error_before_the_first_step(tokenizer, workspace, monkeypatch):
    class Larger(project.GPT):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.scale = torch.nn.Parameter(torch.ones(32))

    steps = []
    monkeypatch.setattr(project, "GPT", Larger)
    monkeypatch.setattr(project, "update", lambda *_: steps.append(1))
    with pytest.raises(ValueError, match="its weights are not a GPT-2's") as error:
        project.run(lambda: project.main(TINY.split()))
    assert "scale" in str(error.value.__cause__)
    assert steps == [] and not (workspace / "checkpoints" / "last.pt").exists()
    with pytest.raises(ValueError, match="its weights are not a GPT-2's"):
        project.to_gpt2(Larger(make_config(tokenizer)))
