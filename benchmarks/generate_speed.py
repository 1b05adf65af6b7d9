"""Generation speed of generate_text beside transformers' GPT2LMHeadModel.generate with its cache: the same weights.

    python benchmarks/generate_speed.py

Random weights of the default size, written by save_checkpoint and read by both. One prompt, greedy, and 8 samples at
once, in turn; the greedy texts are compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_tinystories as project

PROMPT = "Once upon a time, in a small village"


def tokens_per_second(write, n_tokens, device):
    started = time.perf_counter()
    written = write()
    if device == "cuda":
        torch.cuda.synchronize()
    return n_tokens / (time.perf_counter() - started), written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=project.HelpFormatter)
    parser.add_argument("--tokenizer", default="gpt2", help="as for gpt2_tinystories.py")
    parser.add_argument("--max-length", type=int, default=200, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=7, help="times that each of them writes")
    parser.add_argument("--device", default=project.pick_device("auto"), help="cpu or cuda")
    options = parser.parse_args()
    from transformers import GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    n, device = options.max_length, options.device
    tokenizer = project.load_tokenizer(options.tokenizer, project.built_in_stories())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "model"
        project.save_checkpoint(folder, project.GPT(project.model_config(project.Settings(), tokenizer), tokenizer), {})
        model = project.load_checkpoint(folder, device)
        reference = GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {n} tokens\n\n"
          "| | generate_text, tokens/s | generate, tokens/s | faster by |\n|---|---|---|---|")
    for title, rows in (("1 prompt, greedy", 1), ("8 samples at once", 8)):
        def ours(rows=rows):
            method = "sample" if rows > 1 else "greedy"
            return project.generate_text(model, PROMPT, max_length=n, method=method, num_samples=rows)

        def theirs(rows=rows):
            return reference.generate(**inputs, max_new_tokens=n, do_sample=rows > 1, top_k=0,
                                      num_return_sequences=rows)

        ours(), theirs()
        speeds = []
        for _ in range(options.rounds):
            speed, text = tokens_per_second(ours, rows * n, device)
            other_speed, ids = tokens_per_second(theirs, rows * n, device)
            speeds.append((speed, other_speed, speed / other_speed))
            if rows == 1 and text != tokenizer.decode(ids[0]):
                sys.exit(f"the texts differ:\n{text}\n\n{tokenizer.decode(ids[0])}")
        medians = [statistics.median(column) for column in zip(*speeds, strict=True)]
        print("| {} | {:,.0f} | {:,.0f} | {:.2f} x |".format(title, *medians), flush=True)


if __name__ == "__main__":
    project.run(main)
