"""Generation speed of generate_text beside transformers' GPT2LMHeadModel.generate with its cache: the same weights.

    python gpt2_tinystories.py --max-steps 100
    python benchmarks/generate_speed.py

One prompt, greedy and sampled, and 8 samples at once, in turn; the greedy texts are compared. Tokens are those that the
head was asked for, up to the end of the longest story. Measure with a checkpoint of real stories: the fewer tokens its
stories had, the fewer rows of the head are read for each new one.
"""

import statistics
import sys
import time
from itertools import count

import torch
from common import make_parser

import gpt2_tinystories as project

PROMPT = "Once upon a time, in a small village"


def tokens_per_second(write, head, n_rows, device):
    calls = []
    hook = head.register_forward_hook(lambda *_: calls.append(1))
    started = time.perf_counter()
    written = write()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    hook.remove()
    return n_rows * len(calls) / seconds, written


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="checkpoints", help="folder of a run or of an epoch, or Hub id")
    parser.add_argument("--max-length", type=int, default=200, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=7, help="times that each of them writes")
    parser.add_argument("--device", default="auto", help="cpu or cuda")
    options = parser.parse_args()
    from transformers import GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    n, (device, _) = options.max_length, project.pick_device(options.device, "fp32")
    folder = project.best_epoch(options.model)
    model = project.fold_equal_rows(project.load_checkpoint(folder, device))
    tokenizer = model.tokenizer
    reference = GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, up to {n} tokens, a head of "
          f"{len(model.lm_head.weight):,} rows for {model.config.vocab_size:,} tokens\n\n"
          "| | generate_text, tokens/s | generate, tokens/s | faster by |\n|---|---|---|---|")
    seeds = count()
    for title, method, rows in (("1 prompt, greedy", "greedy", 1), ("1 prompt, sampled", "sample", 1),
                                ("8 samples at once", "sample", 8)):
        def ours(method=method, rows=rows):
            return project.generate_text(model, PROMPT, max_length=n, method=method, num_samples=rows, seed=next(seeds),
                                         top_p=1.0)

        def theirs(method=method, rows=rows):
            return reference.generate(**inputs, max_new_tokens=n, do_sample=method == "sample", top_k=0, top_p=1.0,
                                      num_return_sequences=rows)

        ours(), theirs()
        speeds = []
        for _ in range(options.rounds):
            speed, text = tokens_per_second(ours, model.lm_head, rows, device)
            other_speed, ids = tokens_per_second(theirs, reference.lm_head, rows, device)
            speeds.append((speed, other_speed, speed / other_speed))
            expected = tokenizer.decode(ids[0], skip_special_tokens=True)
            if method == "greedy" and text != expected:
                sys.exit(f"the texts differ:\n{text}\n\n{expected}")
        medians = [statistics.median(column) for column in zip(*speeds, strict=True)]
        print("| {} | {:,.0f} | {:,.0f} | {:.2f} x |".format(title, *medians), flush=True)


if __name__ == "__main__":
    project.run(main)
