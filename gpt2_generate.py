"""Write stories with a checkpoint of gpt2_tinystories.py.

    python gpt2_generate.py                                 the PROMPTS below, with the best epoch
    python gpt2_generate.py --prompt "Tom had a kite" --method sample --num-samples 3
    python gpt2_generate.py --model gpt2 --stop "."         any GPT-2 of the Hub; up to a full stop
    python gpt2_generate.py --interactive                   type beginnings, read stories
"""

from dataclasses import asdict, dataclass
from typing import Literal

from gpt2_tinystories import (
    InputError,
    best_epoch,
    check_rules,
    flag,
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
class Settings:
    model: str = flag(str(MODEL or "checkpoints"), "folder of a run or of an epoch, or Hub id")
    prompt: tuple = flag(TEXTS, r"beginning of a story; can be repeated; \n: new line; --prompt=-x")
    method: Literal["greedy", "sample"] = flag("greedy", "take the likeliest token, or draw one")
    max_length: int = flag(200, "most new tokens of a story")
    temperature: float = flag(1.0, "for sample: below 1 plainer, above 1 wilder")
    top_k: int = flag(0, "for sample: draw from so many likeliest tokens; 0: from all")
    top_p: float = flag(0.9, "for sample: from the fewest that together have this probability")
    repetition_penalty: float = flag(1.0, "above 1: tokens that were there become less likely")
    stop: tuple = flag((), r"text that ends a story; can be repeated; \n: new line; --stop=-x")
    num_samples: int = flag(1, "for sample: stories for each prompt")
    seed: int = flag(42, "for sample: seed of the first story, the next one has the next seed")
    batch: bool = flag(False, "write all samples of a prompt at once and show them then: faster")
    device: Literal["auto", "cuda", "cpu", "mps"] = flag("auto", "where to compute")
    interactive: bool = flag(False, "ask for prompts until an empty line")

    def __post_init__(self):
        check_rules(asdict(self))
        texts = self.prompt and all(isinstance(text, str) and text.strip() for text in self.prompt)
        require(texts, "prompt", list(self.prompt), "must be texts, none of them empty")
        for name in ("temperature", "top_k", "top_p", "num_samples", "seed"):
            value, is_default = getattr(self, name), getattr(self, name) == getattr(Settings, name)
            require(self.method == "sample" or is_default, name, value, "needs --method sample")

def write_stories(model, prompt, settings):
    """Print stories: each word as soon as it is complete, or with --batch all of them together."""
    from transformers import TextStreamer
    names = "max_length method temperature top_k top_p repetition_penalty stop".split()
    options = {name: getattr(settings, name) for name in names}
    options["stop"] = [text.replace(r"\n", "\n") for text in settings.stop]
    prompt, seed, n = prompt.replace(r"\n", "\n"), settings.seed, settings.num_samples
    if settings.batch:
        texts = generate_text(model, [prompt], num_samples=n, seed=seed, **options)
        print(*texts, sep="\n\n", end="\n\n", flush=True)
    for i in range(0 if settings.batch else n):
        streamer = TextStreamer(model.tokenizer)
        generate_text(model, prompt, seed=seed + i, streamer=streamer, **options)
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
    model = load_checkpoint(found, pick_device(settings.device, "fp32")[0])
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
    run(main)
