# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.7,<3", "transformers>=5.0,<6", "datasets>=4.0,<6",
#                 "matplotlib>=3.8,<4", "tqdm>=4.66.3,<5", "filelock>=3.21,<5"]
# ///
"""Write stories with a checkpoint of gpt2_tinystories.py.

    python gpt2_generate.py                                 the PROMPTS below, with the best epoch
    python gpt2_generate.py --prompt "Tom had a kite" --method sample --num-samples 3
    python gpt2_generate.py --model gpt2                    any GPT-2 of the Hub
    python gpt2_generate.py --interactive                   type beginnings, read stories
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent))  # missing under PYTHONSAFEPATH
from gpt2_tinystories import (
    FROM_1,
    SEED,
    InputError,
    Sampling,
    best_epoch,
    flag,
    fold_equal_rows,
    generate_text,
    load_checkpoint,
    parse,
    pick_device,
    require,
    run,
)

# Edit these two, or use --prompt and --model.
PROMPTS = (
    "Once upon a time, in a small village",
    "One day, a little girl named Lily found",
    "One sunny day, Tom and his dog",
)
MODEL = "checkpoints"  # a run, of which the best epoch is taken, or one epoch, or a Hub id

TEXTS = (PROMPTS,) if isinstance(PROMPTS, str) else tuple(PROMPTS or ())


@dataclass(frozen=True)
class Settings(Sampling):
    model: str = flag(str(MODEL or "checkpoints"), "folder of a run or of an epoch, or Hub id")
    prompt: tuple = flag(TEXTS, r"beginning of a story; can be repeated; \n: new line; --prompt=-x")
    max_length: int = flag(200, "most new tokens of a story", *FROM_1)
    num_samples: int = flag(1, "for sample: stories for each prompt", *FROM_1)
    seed: int = flag(
        42, "for sample: seed of the first story, the next one has the next seed", *SEED)
    batch: bool = flag(False, "write all samples of a prompt at once and show them then: faster")
    device: Literal["auto", "cuda", "cpu", "mps"] = flag("auto", "where to compute")
    interactive: bool = flag(False, "ask for prompts until an empty line")

    def __post_init__(self):
        super().__post_init__()
        is_text = self.prompt and all(isinstance(t, str) and t.strip() for t in self.prompt)
        require(is_text, "prompt", list(self.prompt), "must be texts, none of them empty")
        for_all = ("method", "repetition_penalty")
        of_sampling = [f for f in fields(Sampling) if f.name not in for_all]
        of_sampling += [f for f in fields(self) if f.name in ("num_samples", "seed")]
        for f in of_sampling:
            value = getattr(self, f.name)
            is_used = self.method == "sample" or value == f.default
            require(is_used, f.name, value, "needs --method sample")


def write_stories(model, prompt, settings):
    """Print stories: each word as soon as it is complete, or with --batch all of them together."""
    from transformers import TextStreamer
    prompt, n = prompt.replace(r"\n", "\n"), settings.num_samples
    options = {f.name: getattr(settings, f.name) for f in fields(Sampling)}
    options["max_length"] = settings.max_length
    if settings.batch:
        texts = generate_text(model, [prompt], num_samples=n, seed=settings.seed, **options)
        print(*texts, sep="\n\n", end="\n\n", flush=True)
        return
    for seed in range(settings.seed, settings.seed + n):
        generate_text(model, prompt, seed=seed, streamer=TextStreamer(model.tokenizer), **options)
        print(flush=True)


def prompts_typed():
    """Yield the prompts that somebody types, up to an empty line or the end of the input."""
    print("Type the beginning of a story; an empty line ends the program.")
    try:
        yield from iter(lambda: input("prompt> ").strip(), "")
    except EOFError:
        print()


def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    found = best_epoch(settings.model)
    if found == "checkpoints":
        raise InputError("no epoch in checkpoints/ yet: train first (python gpt2_tinystories.py)")
    device, _ = pick_device(settings.device, "fp32")
    model = fold_equal_rows(load_checkpoint(found)).to(device)
    why = ", of all epochs there the one with the lowest test loss"
    print(f"[{found}{'' if found == settings.model else why}; {settings.method}]\n")
    for prompt in prompts_typed() if settings.interactive else settings.prompt:
        try:
            write_stories(model, prompt, settings)
        except InputError as error:
            if not settings.interactive:
                raise
            print(error)


if __name__ == "__main__":
    run(main, after_no_memory="fewer --num-samples, or a smaller --max-length, or no --batch")
