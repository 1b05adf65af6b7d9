"""What each ingredient of the recipe is worth: models trained on the same stories for as many steps, scored alike.

    python benchmarks/quality.py --only plain ours --seeds 1 2
    python benchmarks/quality.py --max-steps 500 --out quality_500            all recipes, short
    python benchmarks/quality.py --tokenizer gpt2 --n-embd 768 --n-head 12 --n-inner 1536 --epochs 5     on a GPU

Other flags are those of gpt2_tinystories.py. The default is a small model for a CPU: 2 epochs of all stories, a
tokenizer of 2048, 256 wide. `ours` is gpt2_tinystories.py as it is (without torch.compile), and the others are `ours`
but for what their names say. `plain` is a naive loop as tutorials have it: post-LayerNorm and ReLU, PyTorch's own first
weights, embeddings of N(0, 1) times sqrt(n_embd), AdamW with its default arguments at a constant --learning-rate, no
clipping, batches in random order whose mean losses are averaged, <|endoftext|> masked like padding, and dropout 0.1,
which is off from the second epoch on, as writing a sample has called model.eval(). `tuned-adamw` is what a careful
person trains with AdamW: learned positions, β 0.9 and 0.95, one rate for all, warm-up, and a decay down to zero.

Each run leaves a .json in --out and is not repeated while that is there; the table is made from all of them. Losses are
nats a token over the held-out stories, every token counted once: "own" without <|endoftext|>, which a plain model never
learns, "all" with it. Bits per byte are those of the own tokens, in a byte-level vocabulary. Where `plain` and `ours`
are both there, curves.png compares how they learn, and samples.md what they write.
"""

import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import make_parser, prepare
from torch import nn

import gpt2_tinystories as project

SMALL = ["--fraction", "1", "--epochs", "2", "--tokenizer", "bpe:2048", "--n-embd", "256", "--n-head", "4",
         "--n-inner", "512"]
PROMPTS = ["Once upon a time, in a small village", "Tom had a red kite", "Lily and Ben were in the park",
           "The big dog was very hungry", "One rainy day, a little frog", "Mia wanted to bake a cake",
           "There was an old tree in the garden", "The sun was hot and the cat", "Max found a shiny key",
           "\"Can we go to the beach?\" asked Anna"]
TEMPERATURE = 0.8

# --- The recipes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a model is made and trained; by default as gpt2_tinystories.py does it."""

    settings: dict = field(default_factory=dict)
    model: Callable = project.GPT
    change: Callable = lambda model: None  # something done to the new model
    optimizers: Callable = project.make_optimizers
    schedule: Callable = project.schedule
    batches: Callable = project.step_batches
    learner: Callable = lambda model: model  # what computes the loss
    average: float = 0.0  # of an exponential moving average of the weights: the share that a step keeps
    plain: bool = False  # the updates of the naive loop


class PlainBlock(project.Block):
    """Post-LayerNorm, as in "Attention Is All You Need", and ReLU."""

    def forward(self, x, cache=None):
        x = self.ln_1(x + self.drop(self.attn(x, cache)))
        return self.ln_2(x + self.drop(self.mlp.c_proj(F.relu(self.mlp.c_fc(x)))))


class Plain(project.GPT):
    """The naive model: PyTorch's own first weights, embeddings of N(0, 1) times sqrt(n_embd), a head with bias."""

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        gpt = self.transformer
        gpt.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        gpt.ln_f, self.lm_head = nn.Identity(), nn.Linear(config.n_embd, config.vocab_size)
        nn.init.normal_(gpt.wte.weight)
        gpt.wte.register_forward_hook(lambda module, args, output: output * math.sqrt(config.n_embd))
        position = project.sinusoid(config.n_positions, config.n_embd)
        gpt.wpe.weight = nn.Parameter(position, requires_grad=False)


def plain_optimizers(model, settings, dtype):
    return {"adamw": torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)}


def random_batches(lengths, settings, steps_per_epoch):
    """As project.step_batches, but for the order: any stories come together."""
    size = settings.batch_size
    for epoch in count(1):
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(lengths))
        for window in np.split(order, range(settings.accum_steps * size, len(order), settings.accum_steps * size)):
            yield np.split(window, range(size, len(window), size))


def warmup(step, n_steps, warmup_steps):
    """The share of the learning rate at the start, and the share of what follows that is done."""
    n_warmup = min(warmup_steps, n_steps // 10)
    return min(1, (step + 1) / (n_warmup + 1)), max(0, step - n_warmup) / (n_steps - n_warmup)


def constant(*arguments):
    return warmup(*arguments)[0]


def cosine(*arguments):
    share, done = warmup(*arguments)
    return share * (1 + math.cos(math.pi * done)) / 2


def cooldown(*arguments):
    share, done = warmup(*arguments)
    return share * min(1, 2 * (1 - done))


def to_a_tenth(*arguments):
    share, done = warmup(*arguments)
    return share * (1 - 0.9 * done)


def adamw_alone(factor=1):
    """AdamW for all, with a factor to the rate of embedding and head."""

    def make(model, settings, dtype):
        optimizers = project.make_optimizers(model, settings, dtype)
        adamw = optimizers["adamw"]
        embedding, head, vectors = adamw.param_groups
        embedding["lr"] = head["lr"] = factor * settings.learning_rate
        hidden = [weight for group in optimizers["muon"].param_groups for weight in group["params"]]
        adamw.add_param_group({"params": hidden, "lr": settings.learning_rate, "weight_decay": settings.weight_decay})
        return {"adamw": adamw}

    return make


def adamw_at_one_rate(model, settings, dtype):
    """AdamW as GPTs are usually trained with it."""
    groups = [{"params": [w for w in model.parameters() if w.requires_grad and w.dim() == n], "weight_decay": decay}
              for n, decay in ((2, settings.weight_decay), (1, 0.0))]
    return {"adamw": torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.95), fused=True)}


def other_groups(change):
    """gpt2_tinystories.py's optimizers; change is given their groups: embedding, head, vectors, and those of hidden
    matrices, of which the first is c_attn."""

    def make(model, settings, dtype):
        optimizers = project.make_optimizers(model, settings, dtype)
        change(*project.groups_of(optimizers))
        return optimizers

    return make


def rate_of(name, factor):
    i = ("embedding", "head", "vectors").index(name)
    return other_groups(lambda *groups: groups[i].update(lr=factor * groups[i]["lr"]))


def adam(**changes):
    return other_groups(lambda *groups: [group.update(changes) for group in groups[:3]])


def muon(**changes):
    return other_groups(lambda *groups: [group.update(changes) for group in groups[3:]])


def scaled(names, factor):
    """Other sizes of the first weights whose names hold one of these."""

    def change(model):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2 and any(part in name for part in names):
                    weight.mul_(factor)

    return change


def unscaled(model):
    scaled(("c_proj",), math.sqrt(2 * model.config.n_layer))(model)


def fan_in(model):
    for name, weight in model.transformer.h.named_parameters():
        if weight.dim() == 2:
            shrink = math.sqrt(2 * model.config.n_layer) if "c_proj" in name else 1
            nn.init.normal_(weight, std=1 / math.sqrt(weight.size(1)) / shrink)


def learned_positions(model):
    nn.init.normal_(model.transformer.wpe.weight, std=model.config.initializer_range)
    model.transformer.wpe.weight.requires_grad_(True)


def with_positions(model, settings, dtype):
    """Learned positions, too, in the group of the embedding."""
    optimizers = project.make_optimizers(model, settings, dtype)  # which refuses a weight that it does not know
    learned_positions(model)
    embedding, *_ = optimizers["adamw"].param_groups
    embedding["params"].append(model.transformer.wpe.weight)
    return optimizers


class ZLoss(nn.Module):
    """A model's loss with PaLM's: 1e-4 times the square of the log of the softmax's denominator."""

    def __init__(self, model):
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, input_ids, targets):
        logits = self.model(input_ids)
        denominators = logits.float().logsumexp(-1)[targets != project.IGNORE]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=project.IGNORE,
                               reduction="sum")
        return loss + 1e-4 * denominators.square().sum(), (logits.argmax(-1) == targets).sum()


PLAIN = {"model": Plain, "optimizers": plain_optimizers, "schedule": lambda *arguments: 1, "batches": random_batches,
         "plain": True}
TUNED = {"change": learned_positions, "optimizers": adamw_at_one_rate}
RECIPES = {
    "plain": Recipe({"dropout": 0.1}, **PLAIN),
    "ours": Recipe(),
    **{f"plain, {rate:g}": Recipe({"learning_rate": rate, "dropout": 0.1}, **PLAIN) for rate in (1e-3, 3e-3)},
    **{f"tuned-adamw, {rate:g}, {name}":
       Recipe({"learning_rate": rate}, schedule=schedule, **TUNED)
       for rate in (3e-4, 1e-3, 2e-3, 3e-3, 5e-3)
       for name, schedule in (("linear", project.schedule), ("cosine", cosine))},
    **{f"tuned-adamw, {rate:g}, dropout 0.1": Recipe({"learning_rate": rate, "dropout": 0.1}, **TUNED)
       for rate in (1e-3, 2e-3, 3e-3, 5e-3)},
    "AdamW alone": Recipe(optimizers=adamw_alone()),
    "AdamW alone, dropout 0.1": Recipe({"dropout": 0.1}, optimizers=adamw_alone()),
    "AdamW alone, embedding and head x 10": Recipe(optimizers=adamw_alone(10)),
    **{f"AdamW alone, {rate:g}": Recipe({"learning_rate": rate}, optimizers=adamw_alone()) for rate in (1e-3, 3e-3)},
    **{f"learning rate {rate:g}": Recipe({"learning_rate": rate}) for rate in (1e-4, 6e-4, 1e-3, 3e-3)},
    **{f"Muon's rate {rate:g}": Recipe({"muon_learning_rate": rate}) for rate in (0.005, 0.01, 0.04)},
    **{f"{name}'s rate x {factor:g}": Recipe(optimizers=rate_of(name, factor))
       for name, factors in (("embedding", (0.1, 0.3, 2, 3)), ("head", (0.1, 0.33, 2))) for factor in factors},
    "vectors x 10": Recipe(optimizers=rate_of("vectors", 10)),
    **{f"warm-up {steps}": Recipe({"warmup_steps": steps}) for steps in (0, 20)},
    "constant rate": Recipe(schedule=constant),
    "cosine": Recipe(schedule=cosine),
    "cool-down over the last half": Recipe(schedule=cooldown),
    "down to a tenth": Recipe(schedule=to_a_tenth),
    "beta2 0.95": Recipe(optimizers=adam(betas=(0.9, 0.95))),
    "beta2 0.999": Recipe(optimizers=adam(betas=(0.9, 0.999))),
    "beta1 0.8": Recipe(optimizers=adam(betas=(0.8, 0.99))),
    "epsilon 1e-10": Recipe(optimizers=adam(eps=1e-10)),
    "weight decay 0": Recipe({"weight_decay": 0.0}),
    "weight decay 0.3": Recipe({"weight_decay": 0.3}),
    **{f"Muon's weight decay {decay:g}": Recipe(optimizers=muon(weight_decay=decay)) for decay in (0.0, 0.05, 0.2)},
    "no weight decay of the embedding": Recipe(
        optimizers=other_groups(lambda embedding, *others: embedding.update(weight_decay=0.0))),
    **{f"Muon's momentum {share}": Recipe(optimizers=muon(momentum=share)) for share in (0.85, 0.95)},
    "c_attn in one part": Recipe(optimizers=muon(n_parts=1)),
    "no clipping": Recipe({"grad_clip": 1e9}),
    "dropout 0.1": Recipe({"dropout": 0.1}),
    "dropout 0.2": Recipe({"dropout": 0.2}),
    **{f"embedding and sinusoid x {factor:g}": Recipe(change=scaled(("wte", "wpe"), factor))
       for factor in (0.3, 3, 10)},
    "embedding x 3": Recipe(change=scaled(("wte",), 3)),
    "head x 3": Recipe(change=scaled(("lm_head",), 3)),
    "a third of the sinusoid": Recipe(change=scaled(("wpe",), 1 / 3)),
    "sinusoid x 3": Recipe(change=scaled(("wpe",), 3)),
    "learned positions, as fast as the embedding": Recipe(optimizers=with_positions),
    "zero head": Recipe(change=scaled(("lm_head",), 0)),
    "zero c_proj": Recipe(change=scaled(("c_proj",), 0)),
    "c_proj not scaled by depth": Recipe(change=unscaled),
    "blocks of 1 over sqrt(fan-in)": Recipe(change=fan_in),
    "average 0.99": Recipe(average=0.99),
    "random batches": Recipe(batches=random_batches),
    "z-loss": Recipe(learner=ZLoss),
    # Those below differ in what a run costs.
    **{f"{8 * n} stories a step": Recipe({"accum_steps": n}) for n in (1, 4)},
    **{f"{width} wide": Recipe({"n_embd": width, "n_inner": 2 * width, "n_head": width // 64}) for width in (128, 512)},
    **{f"{n} layers": Recipe({"n_layer": n}) for n in (1, 4)},
}

# --- One run ---------------------------------------------------------------------------------------------------------


prepared = cache(prepare)


def train(name, seed, base, device, precision, n_points=20, n_scored=None):
    """Train a recipe, with n_points scores on the way, and score it on n_scored batches of the test stories; they are
    split by base.seed, whatever the seed. Returns (figures, model). Seconds are those of the training alone."""
    recipe = RECIPES[name]
    settings = replace(base, seed=seed, **recipe.settings)
    train_set, test_set, tokenizer, data = prepared(base)
    torch.manual_seed(seed)
    model = recipe.model(project.model_config(settings, tokenizer), tokenizer)
    if not recipe.plain:
        model = project.fold_unused_tokens(model, train_set, test_set)
    recipe.change(model)
    model.to(device).train()
    test_batches = project.epoch_batches(test_set.lengths, settings.batch_size, base.seed, 0)
    optimizers = recipe.optimizers(model, settings, project.DTYPES[precision])
    groups = [(group, group["lr"]) for group in project.groups_of(optimizers)]
    autocast = torch.autocast(device, project.DTYPES[precision], enabled=precision != "fp32")
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    learner = recipe.learner(model)
    record = project.new_record(settings, data, {})
    n_steps, per_epoch = record["n_steps"], record["steps_per_epoch"]
    curve, losses, average, seconds, started = [], [], [], 0.0, time.monotonic()
    for step, window in enumerate(islice(recipe.batches(train_set.lengths, settings, per_epoch), n_steps), 1):
        if recipe.plain and step == per_epoch + 1:
            model.eval()
        for group, peak in groups:
            group["lr"] = peak * recipe.schedule(step - 1, n_steps, settings.warmup_steps)
        batches = [project.pad_batch([train_set.ids[i] for i in batch]) for batch in window]
        if recipe.plain:
            losses.append(plain_update(model, batches, optimizers, settings.accum_steps, scaler, autocast))
        else:
            n_tokens = sum(int(train_set.lengths[batch].sum()) for batch in window)
            loss, _ = project.backward(learner, batches, n_tokens, autocast, scaler)
            project.update(model, optimizers, settings.grad_clip, scaler)
            losses.append(float(loss) / n_tokens)
        if recipe.average:
            average = average or [weight.detach().clone() for weight in model.parameters()]
            with torch.no_grad():
                torch._foreach_lerp_(average, list(model.parameters()), 1 - min(recipe.average, step / (step + 10)))
        if step % max(1, n_steps // n_points) == 0:  # on a part of the test stories
            seconds += time.monotonic() - started
            own = score(model, test_set, test_batches[: n_scored or 12])["own"]
            curve.append([step, statistics.fmean(losses), own, seconds])
            losses.clear()
            print(f"{name}, {step} of {n_steps}: {own:.3f}", flush=True)
            started = time.monotonic()
    for weight, mean in zip(model.parameters(), average, strict=False):
        weight.data.copy_(mean)
    figures = {"recipe": name, "seed": seed, "settings": fixed(base), "steps": n_steps,
               "seconds": seconds + time.monotonic() - started, "curve": curve}
    return figures | score(model, test_set, test_batches[:n_scored]), model


def fixed(settings):
    """The settings that change the results, as a .json has them."""
    may_change = project.MAY_CHANGE - {"data", "tokenizer", "precision", "accum_steps"}
    return {name: value for name, value in asdict(settings).items() if name not in may_change}


def plain_update(model, batches, optimizers, accum_steps, scaler, autocast):
    """The mean of the batches' means, and no gradient for the end of a story: that token was also the padding."""
    total = 0.0
    for input_ids, targets in batches:
        input_ids, targets = input_ids.to(model.device), targets.to(model.device)
        targets = targets.masked_fill(targets == model.tokenizer.eos_token_id, project.IGNORE)
        with autocast:
            logits = model(input_ids)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=project.IGNORE)
        scaler.scale(loss / accum_steps).backward()
        total += loss.item() / len(batches)
    for optimizer in optimizers.values():
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    return total


@torch.no_grad()
def score(model, test_set, batches):
    """Nats a token over the stories, in fp32: of their own tokens, and of all with <|endoftext|>; bits per byte."""
    eos, vocabulary = model.tokenizer.eos_token_id, model.config.vocab_size
    # In a byte-level vocabulary each character stands for a byte.
    sizes = torch.tensor([len(token) for token in model.tokenizer.convert_ids_to_tokens(list(range(vocabulary)))])
    own = end = n_own = n_end = n_bytes = 0
    with project.evaluation_mode(model):
        for input_ids, targets in project.make_loader(test_set.ids, batches):
            logits = model(input_ids.to(model.device)).float().flatten(0, 1)
            losses = F.cross_entropy(logits, targets.flatten().to(model.device), ignore_index=project.IGNORE,
                                     reduction="none").cpu()
            targets = targets.flatten()
            is_end, is_own = targets == eos, (targets != eos) & (targets != project.IGNORE)
            own, end = own + losses[is_own].double().sum(), end + losses[is_end].double().sum()
            n_own, n_end, n_bytes = n_own + is_own.sum(), n_end + is_end.sum(), n_bytes + sizes[targets[is_own]].sum()
    return {"own": float(own / n_own), "all": float((own + end) / (n_own + n_end)),
            "bits_per_byte": float(own / n_bytes) / math.log(2)}


@torch.no_grad()
def write_stories(model, length):
    """What a model writes: of each prompt a greedy and a sampled story, and two shares, taken over 5 sampled ones."""
    stories, ended, repeated = [], [], []
    for prompt in PROMPTS:
        ids, texts = project.encode_prompt(model, prompt), []
        for method, n_samples in (("greedy", 1), ("sample", 5)):
            sampling = project.Sampling(method, TEMPERATURE, top_p=1.0)
            rows = project.continue_ids(model, ids, length, sampling, n_samples, seed=1)
            texts += model.tokenizer.batch_decode(rows)
        ended += [len(row) < len(ids) + length for row in rows]
        repeated += [share_repeated(project.encode(model.tokenizer, text)) for text in texts[1:]]
        stories.append([prompt, *texts[:2]])
    return {"stories": stories, "ended": statistics.fmean(ended), "repeated": statistics.fmean(repeated)}


def share_repeated(ids):
    """The share of the 4-grams that were there before."""
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return 1 - len(set(grams)) / max(1, len(grams))


def work(name, seed, settings, device, precision, threads, options):
    torch.set_num_threads(threads)
    figures, model = train(name, seed, settings, device, precision, options.points)
    if name in ("plain", "ours"):
        figures |= write_stories(model, options.length) | {"length": options.length}
    file = options.out / f"{name}, seed {seed}.json"
    file.with_suffix(".tmp").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    file.with_suffix(".tmp").replace(file)


# --- All runs, and the report ----------------------------------------------------------------------------------------


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE", help="recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of weights and batches, not of the split")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--points", type=int, default=20, help="scores on the way")
    parser.add_argument("--length", type=int, default=300, help="tokens of a story that plain and ours write")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder of the results")
    options, rest = parser.parse_known_args()
    settings = project.parse(project.Settings, "", [*SMALL, "--checkpoints", str(options.out), *rest])
    device, precision = project.pick_device(settings.device, settings.precision)
    for name in ("jobs", "points"):
        project.require(getattr(options, name) >= 1, name, getattr(options, name), "must be at least 1")
    read_results(options.out, fixed(settings))
    prepare(settings)  # once, before many do
    runs = [(name, seed) for seed in options.seeds for name in options.only]
    runs = [(name, seed) for name, seed in runs if not (options.out / f"{name}, seed {seed}.json").exists()]
    threads = max(1, torch.get_num_threads() // options.jobs)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(work, *run, settings, device, precision, threads, options) for run in runs]
        for future in as_completed(futures):
            future.result()
    report(options.out, fixed(settings))


def read_results(out, settings):
    """The figures of all runs in a folder, which have to be of these settings."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*.json")]
    if any(result["settings"] != settings for result in results):
        raise project.InputError(f"{out} holds results of other settings; take another --out")
    return sorted(results, key=lambda result: result["seed"])


def report(out, settings):
    runs_of = {}
    for result in read_results(out, settings):
        runs_of.setdefault(result["recipe"], []).append(result)
    keys = "own", "all", "bits_per_byte", "seconds"
    mean = {name: {key: statistics.fmean(run[key] for run in runs) for key in keys} for name, runs in runs_of.items()}
    to = mean.get("ours", {"own": math.nan})["own"]
    print("| recipe | seeds | own: mean, lowest to highest | to ours | perplexity | all | bits per byte | time |\n"
          "|---|---|---|---|---|---|---|---|")
    for name in sorted(runs_of, key=lambda name: (math.isnan(mean[name]["own"]), mean[name]["own"])):
        losses, figures = [run["own"] for run in runs_of[name]], mean[name]
        print(f"| {name} | {len(losses)} | {figures['own']:.4f}, {min(losses):.4f} to {max(losses):.4f} | "
              f"{figures['own'] - to:+.4f} | {math.exp(figures['own']):.2f} | {figures['all']:.4f} | "
              f"{figures['bits_per_byte']:.4f} | {figures['seconds']:,.0f} s |")
    if {"plain", "ours"} <= runs_of.keys():
        plain, ours = runs_of["plain"], runs_of["ours"]
        ratio = math.exp(mean["ours"]["own"] - mean["plain"]["own"])
        print(f"\nperplexity of ours: {ratio:.3f} x that of plain")
        draw_curves(out / "curves.png", plain, ours)
        write_samples(out / "samples.md", plain, ours)


def draw_curves(path, plain, ours):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for runs, color, label in ((plain, "C3", "the naive loop"), (ours, "C0", "gpt2_tinystories.py")):
        for run in runs:
            steps, _, losses, *_ = zip(*run["curve"], strict=True)
            axes.plot(steps, np.exp(losses), color=color, label=label, linewidth=1.5)
            label = None
    axes.set(yscale="log", xlabel="optimizer step", ylabel="perplexity of held-out stories, own tokens",
             title="The same stories, tokenizer, sizes and number of steps")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def write_samples(path, plain, ours):
    seeds = {run["seed"] for run in plain} & {run["seed"] for run in ours}
    if not seeds:
        return
    plain, ours = (next(run for run in runs if run["seed"] == min(seeds)) for runs in (plain, ours))

    def cell(text, prompt):
        return text.removeprefix(prompt).replace("|", "/").replace("\n", "<br>")

    lines = ["# What the two write", "",
             f"Both are of seed {min(seeds)}. `plain` has not learned to end a story: it goes on until it is stopped.",
             "The two shares are of 5 sampled stories of each prompt.", "",
             "| | plain | ours |", "|---|---|---|"]
    for key, label in (("ended", f"stories that end by themselves within {ours['length']} tokens"),
                       ("repeated", "4-grams that were in the story before")):
        lines.append(f"| {label} | {plain[key]:.1%} | {ours[key]:.1%} |")
    for column, method in ((1, "Greedy"), (2, f"Sampled, temperature {TEMPERATURE}")):
        lines += ["", f"## {method}", "", "| prompt | plain | ours |", "|---|---|---|"]
        for a, b in zip(plain["stories"], ours["stories"], strict=True):
            lines.append(f"| {a[0]} | {cell(a[column], a[0])} | {cell(b[column], b[0])} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    project.run(main)
