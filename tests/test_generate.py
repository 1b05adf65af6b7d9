"""Generating text: against transformers' generate and samplers, and the command line of gpt2_generate.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import gpt2_generate
import gpt2_tinystories as project

pytestmark = pytest.mark.packages

PROMPT = "Once upon a time, in a small village"


@pytest.fixture
def checkpoint(model, workspace):
    folder = workspace / "checkpoints" / "epoch_1"
    project.save_checkpoint(folder, model, {"epochs": [{"test_loss": 1.0}]})
    return folder


@pytest.mark.parametrize("prompt", [PROMPT, "A", '"Hello," said Ben.\n'])
def test_greedy_text_equals_that_of_transformers(prompt, model, checkpoint):
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=40)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert project.generate_text(model, prompt, max_length=40) == expected
    assert len(expected) > len(prompt)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 9, 0.8), (1, 999, 1e-9)],
)
def test_sampling_probabilities_equal_those_of_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits.clone()).softmax(-1)
    sampling = project.Sampling("sample", temperature, top_k, top_p)
    torch.testing.assert_close(project.next_probabilities(logits, sampling), expected)


PROMPTS = [PROMPT, "A", '"Hello," said Ben.\n', "Tom and Lily went to the park and saw a big dog there. The dog"]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_texts_of_many_prompts_equal_those_of_transformers(penalty, model, checkpoint):
    """There the shorter prompts are padded on the left; here one is written after the other."""
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = {"do_sample": False, "max_new_tokens": 20}
    if penalty == 1:  # with left padding transformers makes the padding less likely, too
        expected = tokenizer.batch_decode(theirs.generate(**inputs, **options), skip_special_tokens=True)
        assert project.generate_text(model, PROMPTS, 20) == expected
    alone = [
        theirs.generate(**tokenizer(prompt, return_tensors="pt"), repetition_penalty=penalty, **options)[0]
        for prompt in PROMPTS
    ]
    texts = project.generate_text(model, PROMPTS, 20, repetition_penalty=penalty)
    assert texts == tokenizer.batch_decode(alone, skip_special_tokens=True)
    long = project.generate_text(model, PROMPTS, 150, repetition_penalty=penalty)
    assert long == [project.generate_text(model, prompt, 150, repetition_penalty=penalty) for prompt in PROMPTS]


def test_penalized_logits_equal_those_of_transformers(monkeypatch):
    logits, tokens, seen = 3 * torch.randn(4, 50), torch.randint(0, 50, (4, 30)), []
    expected = RepetitionPenaltyLogitsProcessor(1.7)(tokens, logits.clone())
    monkeypatch.setattr(project, "next_probabilities", lambda logits, *_: seen.append(logits) or logits.softmax(-1))
    sampled, greedy = (project.Sampling(method, repetition_penalty=1.7) for method in ("sample", "greedy"))
    project.next_ids(logits, tokens, sampled, torch.rand(4, 1))
    torch.testing.assert_close(seen[0], expected)
    greedy = project.next_ids(logits, tokens, greedy)
    assert torch.equal(greedy, expected.argmax(-1, keepdim=True))


def test_a_sample_is_the_same_alone_and_among_others(model):
    options = {"method": "sample", "temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    texts = project.generate_text(model, PROMPTS, 30, seed=5, num_samples=2, **options)
    alone = [project.generate_text(model, prompt, 30, seed=5 + i, **options) for prompt in PROMPTS for i in (0, 1)]
    assert texts == alone and len(set(texts)) == 8


def test_what_is_picked_is_where_the_sum_exceeds_the_number(monkeypatch):
    monkeypatch.setattr(project, "next_probabilities", lambda probabilities, *_: probabilities)

    def pick(probabilities, numbers):
        ids = torch.zeros(len(numbers), 1, dtype=torch.long)
        return project.next_ids(probabilities, ids, project.Sampling("sample"), numbers)

    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    numbers = {0.0: 1, 0.24: 1, 0.25: 3, 0.74: 3, 0.75: 4, 1 - 2**-24: 4}
    for number, expected in numbers.items():
        assert pick(probabilities, torch.tensor([[number]])).item() == expected
    rough = torch.rand(50, 5000).softmax(-1) * (torch.rand(50, 5000) < 0.5)  # sums are not quite 1, and half are 0
    assert rough.gather(1, pick(rough, torch.full((50, 1), 1 - 2**-24))).min() > 0


def test_samples_follow_the_probabilities(model):
    """The first token of 4,000 samples against the model's own distribution."""
    ids = torch.tensor([project.encode(model.tokenizer, "The")])
    expected = model.eval()(ids)[0, -1].softmax(-1)
    texts = project.generate_text(model, "The", 1, "sample", num_samples=4000, seed=0, top_p=1.0)
    likeliest = expected.argmax().item()
    share = sum(text == model.tokenizer.decode([*ids[0], likeliest]) for text in texts) / 4000
    assert share == pytest.approx(expected[likeliest].item(), abs=0.04)


def test_a_seed_repeats_a_sample_and_leaves_other_randomness_alone(model):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = project.generate_text(model, PROMPT, method="sample", seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert one == project.generate_text(model, PROMPT, method="sample", seed=7)
    assert one != project.generate_text(model, PROMPT, method="sample", seed=8)


def test_several_samples_are_a_list_of_texts_that_differ(model):
    texts = project.generate_text(model, PROMPT, method="sample", num_samples=3, seed=1)
    assert len(texts) == len(set(texts)) == 3
    assert all(text.startswith(PROMPT) for text in texts)


def force_end(monkeypatch, tokenizer, after):
    """Make every text that begins with PROMPT end after so many new tokens, and not before."""
    next_ids, n_tokens, end = project.next_ids, len(project.encode(tokenizer, PROMPT)) + after, tokenizer.eos_token_id

    def ending(logits, tokens, *arguments, **sampling):
        ids = next_ids(logits, tokens, *arguments, **sampling)
        return torch.full_like(ids, end) if tokens.size(1) == n_tokens else ids.where(ids != end, 5)

    monkeypatch.setattr(project, "next_ids", ending)


@pytest.mark.parametrize("method", ["greedy", "sample"])
def test_the_text_stops_at_the_end_of_the_story(method, model, monkeypatch):
    force_end(monkeypatch, model.tokenizer, after=5)
    text = project.generate_text(model, PROMPT, 50, method, seed=0)
    assert "<|endoftext|>" not in text
    assert text == project.generate_text(model, PROMPT, 5, method, seed=0)
    for one in project.generate_text(model, PROMPT, 50, "sample", num_samples=3, seed=0):
        assert "<|endoftext|>" not in one


def test_text_goes_on_when_the_context_is_full(model):
    """Against a plain loop without a cache that drops the older half of a full context in the same way."""
    ids, n_positions = project.encode(model.tokenizer, PROMPT), model.config.n_positions
    model.eval()
    tokens, start = list(ids), 0
    with torch.no_grad():
        for _ in range(150):
            if len(tokens) - start > n_positions:
                start = len(tokens) - n_positions // 2
            tokens.append(model(torch.tensor([tokens[start:]]))[0, -1].argmax().item())
            if tokens[-1] == model.tokenizer.eos_token_id:
                tokens.pop()
                break
    assert len(tokens) > 2 * n_positions
    assert project.generate_text(model, PROMPT, max_length=150) == model.tokenizer.decode(tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_formats_write(dtype, model):
    for method in ("greedy", "sample"):
        assert project.generate_text(model.to(dtype), PROMPT, 5, method).startswith(PROMPT)


def test_a_prompt_that_fills_the_context_is_read_and_a_longer_one_refused(model):
    n_positions = model.config.n_positions
    fitting = " a" * n_positions
    while len(project.encode(model.tokenizer, fitting)) > n_positions:
        fitting = fitting[2:]
    assert len(project.encode(model.tokenizer, fitting)) == n_positions
    assert project.generate_text(model, fitting, 3).startswith(fitting)
    with pytest.raises(project.InputError, match="has 65 tokens, 1 to 64 fit"):
        project.generate_text(model, fitting + " a")


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was_before(training, model):
    model.train(training)
    project.generate_text(model, PROMPT, 3)
    assert model.training is training
    with pytest.raises(ZeroDivisionError):

        class Broken:
            def put(self, value):
                if value.numel() == 1:
                    raise ZeroDivisionError

        project.generate_text(model, PROMPT, 3, streamer=Broken())
    assert model.training is training


def test_the_streamed_text_is_the_text(model, capsys):
    text = project.generate_text(model, PROMPT, 40, streamer=TextStreamer(model.tokenizer))
    assert capsys.readouterr().out == text + "\n"


def test_the_end_of_text_in_a_prompt_is_plain_text(model):
    prompt = "One<|endoftext|> day"
    assert project.generate_text(model, prompt, 3).startswith(prompt)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": ""},
        {"prompt": " \n"},
        {"max_length": 0},
        {"method": "beam"},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"num_samples": 0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"prompt": []},
        {"prompt": ["One", ""]},
        {"prompt": ["One", "word " * 100]},
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, model):
    with pytest.raises(project.InputError, match=f"--{next(iter(arguments)).replace('_', '-')} "):
        project.generate_text(model, **{"prompt": PROMPT} | arguments)


# --- gpt2_generate.py


def test_the_script_writes_a_story_for_every_prompt(checkpoint, model, capsys):
    gpt2_generate.main(["--max-length", "20"])
    shown = capsys.readouterr().out
    for prompt in gpt2_generate.PROMPTS:
        assert project.generate_text(model, prompt, 20) in shown


def test_its_flags_reach_the_generator(checkpoint, model, capsys):
    arguments = "--method sample --num-samples 2 --seed 5 --top-k 7 --top-p 0.8 --temperature 0.9"
    gpt2_generate.main([*arguments.split(), "--max-length", "15", "--prompt", "One"])
    shown = capsys.readouterr().out
    options = {"temperature": 0.9, "top_k": 7, "top_p": 0.8}
    expected = [project.generate_text(model, "One", 15, "sample", seed=seed, **options) for seed in (5, 6)]
    assert expected[0] != expected[1]
    assert all(text in shown for text in expected)


def test_the_function_and_the_script_have_the_same_defaults(checkpoint, model, capsys):
    for method in ("greedy", "sample"):
        gpt2_generate.main(["--method", method, "--max-length", "30", "--prompt", "One"])
        assert capsys.readouterr().out.endswith(f"\n\n{project.generate_text(model, 'One', 30, method)}\n\n")
    plain = project.generate_text(model, "One", 30, "sample", seed=42, top_p=1.0)
    assert project.generate_text(model, "One", 30, "sample") != plain


def test_a_batch_of_stories_is_that_of_single_ones(checkpoint, model, capsys):
    arguments = "--max-length 15 --repetition-penalty 1.2 --prompt One --prompt".split() + ["A b"]
    for more in ([], ["--method", "sample", "--num-samples", "2", "--seed", "5"]):
        gpt2_generate.main([*arguments, *more])
        shown = capsys.readouterr().out
        gpt2_generate.main([*arguments, *more, "--batch"])
        assert capsys.readouterr().out == shown
    assert project.generate_text(model, "A b", 15, repetition_penalty=1.2) not in shown
    options = {"repetition_penalty": 1.2, "top_p": 0.9, "seed": 6}
    assert project.generate_text(model, "A b", 15, "sample", **options) in shown


def test_epochs_are_in_the_order_of_their_numbers(workspace, tokenizer):
    for name in ("epoch_9", "epoch_10", "epoch_11.tmp", "last"):
        (workspace / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in project.saved_epochs("checkpoints")] == ["epoch_9", "epoch_10"]


@pytest.mark.parametrize("losses", [(1.5, 2.5), (2.5, 1.5), (1.5, 1.5)])
def test_without_a_model_the_epoch_with_the_lowest_test_loss_is_taken(losses, finished, workspace, capsys, refused):
    shutil.copytree(finished / "checkpoints", "checkpoints")
    for epoch, loss in enumerate(losses, 1):
        file = workspace / "checkpoints" / f"epoch_{epoch}" / "training.json"
        record = json.loads(file.read_text())
        record["epochs"][-1]["test_loss"] = loss
        file.write_text(json.dumps(record))
    gpt2_generate.main(["--max-length", "3"])
    best = 1 if losses[0] <= losses[1] else 2
    says = "of all epochs there the one with the lowest test loss; greedy]"
    assert capsys.readouterr().out.startswith(f"[{Path('checkpoints', f'epoch_{best}')}, {says}\n")
    gpt2_generate.main(["--max-length", "3", "--model", "checkpoints/epoch_2"])
    assert capsys.readouterr().out.startswith("[checkpoints/epoch_2; greedy]\n")
    gpt2_generate.main(["--max-length", "3", "--model", str(workspace / "checkpoints")])  # any run's folder
    assert capsys.readouterr().out.startswith(f"[{workspace / 'checkpoints' / f'epoch_{best}'}, {says}\n")
    file.write_text("{}")
    assert "epoch_2" in refused(gpt2_generate.main, "--max-length 3")


def test_interactive_reads_prompts_and_survives_a_bad_one(checkpoint, model, capsys, monkeypatch):
    typed = iter(["Tom had", "word " * 100, "Lily saw", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    gpt2_generate.main(["--interactive", "--max-length", "10"])
    shown = capsys.readouterr().out
    assert all(project.generate_text(model, prompt, 10) in shown for prompt in ("Tom had", "Lily saw"))
    assert "--prompt 'word word" in shown


@pytest.mark.parametrize(
    ("prompts", "expected"), [(["One", "Two"], ("One", "Two")), (("One"), ("One",)), (("One",), ("One",))]
)
def test_prompts_and_model_can_be_edited_in_any_form(prompts, expected, tmp_path):
    source = Path(gpt2_generate.__file__).read_text(encoding="utf-8")
    start, end = source.index("PROMPTS = ("), source.index("TEXTS = ")
    edited = tmp_path / "edited_generate.py"
    edited.write_text(f"{source[:start]}PROMPTS = {prompts!r}\nMODEL = None\n\n{source[end:]}", encoding="utf-8")
    code = "import edited_generate as g; s = g.parse(g.Settings, '', []); print(s.prompt, repr(s.model))"
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(gpt2_generate.__file__).parent}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{expected} 'checkpoints'\n", done.stderr


@pytest.mark.parametrize("prompts", [(), ("One", ""), (1,), None])
def test_prompts_that_are_no_texts_are_refused(prompts):
    with pytest.raises(project.InputError, match="--prompt"):
        gpt2_generate.Settings(prompt=prompts or ())


def test_without_a_checkpoint_it_says_what_to_do(workspace, refused):
    assert "train first" in refused(gpt2_generate.main, "")
    assert "nowhere" in refused(gpt2_generate.main, "--model nowhere")
    (workspace / "checkpoints").mkdir()
    assert "train first" in refused(gpt2_generate.main, "")


def test_what_is_no_checkpoint_is_told_what_one_is(finished, workspace, refused):
    (workspace / "empty").mkdir()
    for name in ("empty", str(finished / "checkpoints/last.pt")):
        line = refused(gpt2_generate.main, ["--model", name])
        assert name in line and "must be an epoch's folder, a run's with an epoch, or" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", ""],
        ["--prompt", "word " * 100],
        ["--top-p", "2"],
        ["--num-samples", "0"],
        ["--num-samples", "2"],
        ["--temp", "1"],
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, checkpoint, refused):
    assert arguments[0] in refused(gpt2_generate.main, arguments)


def test_a_checkpoint_that_cannot_be_used_is_refused_in_one_line(checkpoint, workspace, tokenizer, refused, stories):
    from safetensors.torch import load_file, save_file

    def spoil(name, change):
        folder = workspace / name
        shutil.copytree(checkpoint, folder)
        (folder / "training.json").unlink()  # whose checksum would notice every change of the weights
        change(folder)
        line = refused(gpt2_generate.main, ["--model", str(folder)])
        assert name in line, line
        return line

    def edit_config(**values):
        def change(folder):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | values))

        return change

    def edit_weights(edit):
        def change(folder):
            weights = load_file(folder / "model.safetensors")
            edit(weights)
            save_file(weights, folder / "model.safetensors")

        return change

    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        spoil("without_" + file, lambda folder, file=file: (folder / file).unlink())
        spoil("cut_" + file, lambda folder, file=file: (folder / file).write_bytes((folder / file).read_bytes()[:100]))
    spoil("pickle", lambda folder: (folder / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR."))
    assert not (workspace / "owned").exists()
    assert "llama" in spoil("llama", edit_config(model_type="llama"))
    spoil("relu", edit_config(activation_function="relu"))
    assert "not of the sizes in its config.json" in spoil("wider", edit_config(n_inner=96))
    assert "transformer.h.2." in spoil("deeper", edit_config(n_layer=3))
    spoil("word", edit_config(n_embd="wide"))
    assert "weight" in spoil("vocabulary", edit_config(vocab_size=500))
    other = project.train_tokenizer(stories, 500)
    assert "500" in spoil("tokenizer", other.save_pretrained)
    assert "lm_head" in spoil("missing", edit_weights(lambda weights: weights.pop("lm_head.weight")))
    assert "extra" in spoil("unknown", edit_weights(lambda weights: weights.update(extra=torch.ones(1))))
    assert "finite" in spoil("nan", edit_weights(lambda weights: weights["transformer.ln_f.bias"].fill_(float("nan"))))


def test_a_saved_model_comes_back_bit_for_bit(checkpoint, model):
    loaded = project.load_checkpoint(checkpoint)
    assert type(loaded) is project.GPT  # with a row for each token
    assert not loaded.training and loaded.config.to_dict()["n_inner"] == model.config.n_inner
    same_weights(loaded.gpt2_state_dict(), make_model(model.tokenizer).gpt2_state_dict())
    folded = project.fold_equal_rows(loaded)
    same_weights(folded.state_dict(), model.state_dict())
    assert torch.equal(folded.token_to_row, model.token_to_row) and not folded.training


def same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
