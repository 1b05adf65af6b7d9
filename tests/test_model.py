"""The model against transformers.GPT2LMHeadModel and against arithmetic by hand."""

import math

import pytest
import torch
from conftest import make_config, make_model
from transformers import AutoModelForCausalLM

import gpt2_tinystories as project

pytestmark = pytest.mark.packages


@pytest.fixture
def reference(model, tmp_path):
    """The same weights, read by transformers from a checkpoint folder."""
    project.save_checkpoint(tmp_path / "epoch_1", model, {})
    return AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_1").eval()


def test_logits_equal_those_of_transformers(model, reference):
    input_ids = torch.randint(0, model.config.vocab_size, (3, 64))
    ours, theirs = model.eval()(input_ids), reference(input_ids).logits
    assert theirs.std() > 1  # a model that says something
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_later_token_never_changes_earlier_logits(model):
    input_ids = torch.randint(0, model.config.vocab_size, (2, 20))
    changed = input_ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % model.config.vocab_size
    model.eval()
    before, after = model(input_ids), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-2)


def test_a_cache_with_tokens_takes_one_more_at_a_time(model):
    """Several at once would get a wrong mask."""
    cache = model.empty_cache(1)
    model.eval()(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="one more at a time"):
        model(torch.tensor([[3, 4]]), cache=cache)


def test_an_earlier_token_and_its_position_do_change_the_logits(model):
    model.eval()
    one, two = torch.tensor([[300, 301, 302]]), torch.tensor([[301, 300, 302]])
    assert not torch.allclose(model(one)[:, -1], model(two)[:, -1], atol=1e-3)


def test_with_a_cache_token_by_token_gives_the_same_logits(model):
    input_ids = torch.randint(0, model.config.vocab_size, (2, 64))
    model.eval()
    whole = model(input_ids)
    cache = model.empty_cache(2)
    inputs = [input_ids[:, :10]] + [input_ids[:, i : i + 1] for i in range(10, 64)]
    logits = torch.cat([model(one, cache=cache) for one in inputs], dim=1)
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-4)


def test_the_logits_after_the_last_token_alone_are_the_last_of_all(model):
    input_ids = torch.randint(0, model.config.vocab_size, (2, 20))
    whole = model.eval()(input_ids)
    torch.testing.assert_close(model(input_ids, last_only=True), whole[:, -1:], atol=1e-5, rtol=1e-4)
    cache = model.empty_cache(2)
    for part, last in ((input_ids[:, :13], 12), (input_ids[:, 13:14], 13)):
        logits = model(part, cache=cache, last_only=True)
        torch.testing.assert_close(logits, whole[:, [last]], atol=1e-5, rtol=1e-4)


def test_a_new_model_guesses_uniformly(tokenizer, encoded):
    model = project.GPT(make_config(tokenizer), tokenizer)
    loader = project.make_loader(encoded[0], project.epoch_batches(encoded[1], 8, 0, 0))
    loss, _ = project.evaluate(model, loader)
    assert loss == pytest.approx(math.log(len(tokenizer)), abs=0.05)


def test_the_defaults_make_86_million_parameters(tokenizer):
    settings = project.Settings()
    config = project.model_config(settings, tokenizer)
    config.vocab_size = 50_257
    with torch.device("meta"):
        model = project.GPT(config)
    d, f = 768, 1536
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    by_hand = 2 * 50_257 * d + 256 * d + 2 * block + 2 * d
    assert sum(weight.numel() for weight in model.parameters()) == by_hand == 86_846_976


def test_the_sinusoid_is_that_of_the_paper():
    table = project.sinusoid(10, 6)
    for position in (0, 1, 9):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_positions_are_three_times_as_large_as_token_embeddings_and_not_trained(tokenizer):
    model = project.GPT(make_config(tokenizer, n_embd=128), tokenizer)
    rms = {name: model.transformer[name].weight[:400].square().mean().sqrt().item() for name in ("wte", "wpe")}
    assert rms["wpe"] == pytest.approx(3 * rms["wte"], rel=0.05)
    assert not model.transformer.wpe.weight.requires_grad
    optimizers = project.make_optimizers(model, project.Settings(), torch.float32)
    trained = [id(p) for group in project.groups_of(optimizers) for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters() if p is not model.transformer.wpe.weight)


def test_dropout_works_in_training_and_only_there(tokenizer):
    model, input_ids = make_model(tokenizer, dropout=0.5), torch.randint(0, 400, (2, 10))
    assert not torch.equal(model.train()(input_ids), model(input_ids))
    assert torch.equal(model.eval()(input_ids), model(input_ids))
