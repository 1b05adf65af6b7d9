"""What only a CUDA GPU can show: python -m pytest -m gpu."""

import subprocess
import sys

import pytest
import torch
from conftest import TINY, make_model, read_curve

import gpt2_tinystories as project

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def test_logits_on_the_gpu_equal_those_on_the_cpu(tokenizer):
    model, input_ids = make_model(tokenizer).eval(), torch.randint(0, 400, (4, 64))
    expected = model(input_ids)
    torch.testing.assert_close(model.cuda()(input_ids.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compile", ["off", "auto"])
def test_a_run_learns_in_every_precision(precision, compile, workspace, capsys):
    project.main(f"{TINY} --device cuda --precision {precision} --compile {compile}".split())
    output = capsys.readouterr().out
    assert ("compile    took" in output) == (compile == "auto") and "compile    off" not in output
    assert f" in {precision}; " in output
    record = project.json.loads((workspace / "checkpoints/epoch_2/training.json").read_text())
    first, second = record["epochs"]
    assert second["test_perplexity"] < first["test_perplexity"] < 500


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("compile", ["off", "on"])
def test_two_gpus_learn_what_one_learns(compile, workspace):
    arguments = f"{TINY} --precision fp32 --compile {compile}".split()
    project.main([*arguments, "--checkpoints", "one/checkpoints", "--plots", "one/plots"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, project.__file__, *arguments, "--accum-steps", "1"], check=True)
    for (_, loss), (_, expected) in zip(read_curve(workspace), read_curve(workspace / "one"), strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)


def test_a_gpu_is_taken_where_there_is_one():
    assert project.pick_device("auto", "fp32") == ("cuda", "fp32") and project.problem_of_gpu() == ""


def test_batches_are_fetched_while_the_program_goes_on(encoded):
    batch = next(iter(project.make_loader(encoded.ids, [range(8)])))
    fetched = project.to_device(batch, torch.device("cuda"))
    torch.cuda.synchronize()
    for one, two in zip(fetched, batch, strict=True):
        assert one.is_cuda and one.stride() == two.stride() and torch.equal(one.cpu(), two)


def test_a_run_begun_on_the_gpu_goes_on_there(workspace, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(project, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            project.main(f"{TINY} --device cuda --compile off".split())
    project.main(f"{TINY} --device cuda --compile off".split())
    assert len(project.json.loads((workspace / "checkpoints/epoch_2/training.json").read_text())["epochs"]) == 2
