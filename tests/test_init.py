"""--init: going on from checkpoints of other people's, against transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_run, same_runs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import gpt2_generate
import gpt2_tinystories as project

pytestmark = pytest.mark.packages

RUN = "--data sample --fraction 0.0067 --epochs 2 --n-positions 64 --precision fp32"


@pytest.fixture(scope="module")
def foreign(tokenizer, tmp_path_factory):
    """A GPT-2 as transformers makes and saves it: 12 layers, tied head, learned positions, n_inner left open."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("foreign") / "gpt2"
    sizes = {"vocab_size": 400, "n_positions": 96, "n_embd": 32, "n_layer": 12, "n_head": 4}
    config = GPT2Config(**sizes, initializer_range=0.2, task_specific_params={"text-generation": {"do_sample": True}})
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rewrite(source, folder, change_weights=None, **config):
    """A copy of a checkpoint with other weights or another config.json."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    if change_weights:
        save_file(change_weights(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def assert_equal_logits(model, theirs):
    input_ids = torch.randint(0, 400, (3, 96))
    torch.testing.assert_close(model.eval()(input_ids), theirs.eval()(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_the_logits_are_those_of_transformers(foreign):
    theirs = AutoModelForCausalLM.from_pretrained(foreign)
    model = project.load_checkpoint(foreign)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_equal_logits(model, theirs)
    text = project.generate_text(model, "Once upon a time", 30)
    inputs = model.tokenizer("Once upon a time", return_tensors="pt")
    eos = model.tokenizer.eos_token_id
    ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=30, eos_token_id=eos, pad_token_id=eos)[0]
    assert text == model.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_model_of_odd_width_is_read(tokenizer, tmp_path):
    sizes = {"vocab_size": 400, "n_positions": 96, "n_embd": 33, "n_layer": 1, "n_head": 3}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2))
    theirs.save_pretrained(tmp_path / "odd")
    tokenizer.save_pretrained(tmp_path / "odd")
    assert_equal_logits(project.load_checkpoint(tmp_path / "odd"), theirs)


def test_files_with_openais_names_are_read(foreign, tmp_path):
    """No `transformer.`, masks among the weights, half precision."""

    def rename(weights):
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 96, 96).tril() for i in range(12)}
        masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(12)}
        return masks | {name.removeprefix("transformer."): weight.half() for name, weight in weights.items()}

    folder = rewrite(foreign, tmp_path / "openai", rename)
    assert_equal_logits(project.load_checkpoint(folder), AutoModelForCausalLM.from_pretrained(folder).float())


@pytest.mark.parametrize("part", ["c_attn.bias", "mlp.c_proj.bias", "ln_1.weight"])
def test_a_checkpoint_that_lacks_a_part_is_refused(part, foreign, tmp_path):
    def without(weights):
        return {name: weight for name, weight in weights.items() if not name.endswith(part)}

    folder = rewrite(foreign, tmp_path / "partial", without)
    with pytest.raises(project.InputError, match=f"missing or unknown tensors, such as .*{part}"):
        project.load_checkpoint(folder)


def test_a_tuned_checkpoint_loads_in_transformers(foreign, workspace, capsys):
    project.main(f"{RUN} --init {foreign} --dropout 0.1".split())
    assert "tokens     4,608 to train; " in capsys.readouterr().out  # 72 stories cut at 64
    model, record = read_run()
    theirs, info = AutoModelForCausalLM.from_pretrained("checkpoints/epoch_2", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_logits(model, theirs)
    assert theirs.config.tie_word_embeddings and theirs.config.resid_pdrop == 0.1 and theirs.config.n_positions == 96
    assert theirs.generation_config.eos_token_id == theirs.config.pad_token_id == model.tokenizer.eos_token_id
    assert "lm_head.weight" not in load_file("checkpoints/epoch_2/model.safetensors")
    first, second = record["epochs"]
    assert second["test_loss"] < first["test_loss"]
    assert record["settings"]["init"] == str(foreign)
    config = json.loads((workspace / "checkpoints/epoch_2/config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and "task_specific_params" not in config
    assert record["parameters"] == sum(p.numel() for p in theirs.parameters())
    before = project.load_checkpoint(foreign)
    for name, weight in model.named_parameters():  # all of them learn, the positions, too
        assert not torch.equal(weight, before.get_parameter(name)), name


def test_the_first_loss_is_that_of_the_checkpoint(finished, workspace, monkeypatch):
    """One of our own, whose positions were fixed and whose head is its own."""
    init = finished / "checkpoints" / "epoch_2"
    model, record = read_run(finished / "checkpoints")
    losses, backward = [], project.backward  # the first is the trial on the longest stories

    def spy(learner, batches, n_tokens, *rest):
        sums = backward(learner, batches, n_tokens, *rest)
        losses.append(sums[0].item() / n_tokens)
        return sums

    monkeypatch.setattr(project, "backward", spy)
    project.main(f"{RUN} --max-steps 2 --init {init}".split())
    with torch.no_grad():
        expected = []
        settings = project.parse(project.Settings, "", f"{RUN} --init {init}".split())
        stories = project.split_stories(project.load_stories("sample", None)[0], settings)[0]
        ids = project.encode_stories(stories, model.tokenizer, 64, workspace / "tokens.arrow")
        for batch in project.epoch_batches(ids.lengths, 8, 42, 1)[:2]:
            loss, _ = model(*project.pad_batch([ids.ids[i] for i in batch]))
            expected.append((loss.item(), ids.lengths[batch].sum()))
    assert losses[1] == pytest.approx(sum(e[0] for e in expected) / sum(e[1] for e in expected), rel=1e-5)


@pytest.fixture
def base(finished, workspace):
    """A run's folder, whose first epoch is its best."""
    shutil.copytree(finished / "checkpoints", "base")
    for epoch, loss in ((1, 0.1), (2, 0.2)):
        record = json.loads(Path(f"base/epoch_{epoch}/training.json").read_text())
        record["epochs"][-1]["test_loss"] = loss
        Path(f"base/epoch_{epoch}/training.json").write_text(json.dumps(record))
    return Path("base")


def test_a_run_is_tuned_further_from_its_best_epoch(base, capsys):
    project.main(f"{RUN} --max-steps 1 --init base".split())
    assert capsys.readouterr().out.startswith("init       base/epoch_1\n")


def test_of_a_run_the_best_epoch_is_loaded(base):
    loaded, best = project.load_checkpoint("base").state_dict(), project.load_checkpoint("base/epoch_1").state_dict()
    other = project.load_checkpoint("base/epoch_2").state_dict()
    assert all(torch.equal(weight, best[name]) for name, weight in loaded.items())
    assert not all(torch.equal(weight, other[name]) for name, weight in loaded.items())


def test_a_model_that_has_epochs_inside_is_that_model(base):
    shutil.copytree(base / "epoch_2", "model")
    shutil.copytree(base / "epoch_1", "model/epoch_1")
    assert project.best_epoch("model") == "model"


@pytest.mark.parametrize("init", ["base", "base/epoch_2", "./base/../base"])
def test_a_run_does_not_overwrite_what_it_starts_from(init, base, refused):
    files = sorted(base.rglob("*"))
    assert "would be overwritten" in refused(project.main, f"{RUN} --init {init} --checkpoints base --overwrite")
    assert {path.name for path in base.rglob("*") if path not in files} <= {".lock"}
    assert all(path.exists() for path in files)


def test_a_tuning_that_was_interrupted_continues(foreign, workspace, monkeypatch):
    (workspace / "unbroken").mkdir()
    for folder in (workspace / "unbroken", workspace):
        monkeypatch.chdir(folder)
        rewrite(foreign, folder / "base")
        if folder == workspace:
            with monkeypatch.context() as patch:
                patch.setattr(project, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    project.main(f"{RUN} --init base".split())
        project.main(f"{RUN} --init base".split())
    same_runs(workspace, workspace / "unbroken")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--init {} --n-layer 3", "--n-layer 3: cannot be chosen with --init {}"),
        ("--init {} --muon-learning-rate 0.01", "--muon-learning-rate 0.01: cannot be chosen with --init {}"),
        ("--init {}/..", "/..: the local folder cannot be read: Error no file named model.safetensors"),
        ("--init {} --tokenizer bpe:300", "--tokenizer bpe:300: cannot be chosen with --init {}"),
        ("--init {} --n-positions 97", "--n-positions 97: --init {} has 96, which is the most"),
        ("--init nowhere/at_all", "nowhere/at_all: no such file or folder, and the Hugging Face Hub"),
        ("--init ../nowhere", "../nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_started_from_is_refused(arguments, message, foreign, workspace, refused):
    line = refused(project.main, f"{RUN} {arguments.replace('{}', str(foreign))}")
    assert message.replace("{}", str(foreign)) in line
    assert not (workspace / "checkpoints" / "data").exists()  # before anything is tokenised


@pytest.mark.parametrize(
    "config",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"model_type": "llama"},
        {"tie_word_embeddings": False},
    ],
)
def test_checkpoints_that_compute_otherwise_are_refused(config, foreign, tmp_path, refused):
    folder = rewrite(foreign, tmp_path / "other", **config)
    line = refused(gpt2_generate.main, ["--model", str(folder)])
    assert ("lm_head.weight" if "tie_word_embeddings" in config else next(iter(config))) in line
