"""What a model is worth after so many minutes of training: by this project, transformers' Trainer and a naive loop.

    python benchmarks/time_to_quality.py
    python benchmarks/time_to_quality.py --minutes 10 40 --seeds 1 2 3 --data stories
    python benchmarks/time_to_quality.py --minutes 2 --only ours

Other flags are those of gpt2_tinystories.py. All three train a model of the same sizes (with a head of its own weights)
on the same stories with the same tokenizer, 8 x 2 stories a step, in the same --precision. It is meant for a CPU.

ours     gpt2_tinystories.py as it is, without torch.compile
trainer  GPT2LMHeadModel and Trainer as a careful person sets them up: torch.compile (not with --compile off), the very
         batches of ours, padding left out and <|endoftext|> learned, no dropout, the fused AdamW with β 0.9 and 0.99,
         no decay of biases and LayerNorms, warm-up and linear decay to zero, and for each number of minutes the best of
         --rates, chosen on the stories that it is then scored on. It multiplies all rows of the vocabulary.
naive    `plain` of quality.py, with the first seed

How long a step takes is measured first, and each run takes as many steps as should fit into its minutes: its learning
rate has come down when they are over. What they really took is in the table: the training alone, without the
preparation of the stories, without scores, and without the steps in which trainer compiles. Each run is a process of
its own, and nothing else should run beside. It leaves a .json in --out, and is not repeated while that is there; table
and picture are made from all of them.

The perplexity is that of the own tokens of 200 held-out stories, without <|endoftext|>, which `naive` never learns.
"""

import json
import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import quality
import torch
from common import make_parser

import gpt2_tinystories as project

CONTESTANTS = "ours", "trainer", "naive"
N_MEASURED = 12  # steps
N_POINTS, N_SCORED = 4, 25  # of a curve; batches of held-out stories


class Stories(torch.utils.data.Dataset):
    """What GPT2LMHeadModel takes: the ids of a story, cut at n_positions, are its labels, too."""

    def __init__(self, ids, n_positions):
        self.ids, self.n_positions = ids, n_positions

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = torch.tensor(self.ids[int(i)].as_py()[: self.n_positions])
        return {"input_ids": ids, "labels": ids}


def collate(stories):
    """No attention mask: behind a story nobody looks at the padding, and its labels do not count."""
    return {name: torch.nn.utils.rnn.pad_sequence([story[name] for story in stories], True, padding)
            for name, padding in (("input_ids", 0), ("labels", project.IGNORE))}


def train_with_trainer(rate, seed, settings, device, precision):
    """What quality.train returns, less the model."""
    import transformers

    train_set, test_set, tokenizer, counts = quality.prepared(settings)
    per_epoch = project.new_record(settings, counts, {})["steps_per_epoch"]
    test_batches = project.epoch_batches(test_set.lengths, settings.batch_size, settings.seed, 0)[:N_SCORED]
    config = project.model_config(settings, tokenizer)
    transformers.set_seed(seed)
    model, n_steps = transformers.GPT2LMHeadModel(config), settings.max_steps
    torch._dynamo.config.assume_static_by_default = False  # stories have many lengths: compile once for all

    def score():
        same = project.GPT(config, tokenizer)
        same.load_state_dict(project.transposed(model.state_dict()))
        return quality.score(same.to(device), test_set, test_batches)

    class Clock(transformers.TrainerCallback):
        def __init__(self):
            self.seconds, self.n_counted, self.n_graphs, self.curve = 0.0, 0, None, []

        def on_step_begin(self, *arguments, **rest):
            self.started = time.monotonic()

        def on_step_end(self, arguments, state, control, **rest):
            seconds, step = time.monotonic() - self.started, state.global_step
            n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            if n_graphs == self.n_graphs:  # nothing was compiled
                self.seconds, self.n_counted = self.seconds + seconds, self.n_counted + 1
            self.n_graphs = n_graphs
            if step % max(1, n_steps // N_POINTS) == 0:
                own = score()["own"]
                self.curve.append([step, math.nan, own, self.seconds / max(1, self.n_counted) * step])
                print(f"trainer, {step} of {n_steps}: {own:.3f}", flush=True)

    class BatchesOfOurs(transformers.Trainer):
        def get_train_dataloader(self):
            steps = project.step_batches(train_set.lengths, replace(settings, seed=seed), per_epoch)
            whole = (window for window in steps if len(window) == settings.accum_steps)
            batches = [batch.tolist() for window in islice(whole, n_steps) for batch in window]
            return torch.utils.data.DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=collate)

    arguments = transformers.TrainingArguments(
        str(Path(settings.checkpoints, "trainer")), max_steps=n_steps, learning_rate=rate, lr_scheduler_type="linear",
        warmup_steps=min(settings.warmup_steps, n_steps // 10), optim="adamw_torch_fused", adam_beta2=0.99,
        weight_decay=settings.weight_decay, max_grad_norm=settings.grad_clip,
        gradient_accumulation_steps=settings.accum_steps, bf16=precision == "bf16", fp16=precision == "fp16",
        torch_compile=settings.compile != "off", use_cpu=device == "cpu", seed=seed, save_strategy="no",
        report_to="none", disable_tqdm=True)
    clock, stories = Clock(), Stories(train_set.ids, settings.n_positions)
    BatchesOfOurs(model, arguments, train_dataset=stories, callbacks=[clock]).train()
    seconds = clock.seconds / clock.n_counted * n_steps
    return {"steps": n_steps, "seconds": seconds, "curve": clock.curve} | score()


def train(name, rate, seed, n_steps, options):
    """The figures of a run, in this process."""
    arguments = [*options.rest, "--max-steps", str(n_steps), "--checkpoints", str(options.out)]
    settings = project.parse(project.Settings, "", arguments)
    if name == "trainer":
        return train_with_trainer(rate, seed, settings, options.device, options.precision)
    recipe = "plain" if name == "naive" else name
    return quality.train(recipe, seed, settings, options.device, options.precision, N_POINTS, N_SCORED)[0]


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def result(options, name, minutes, seed, rate=0.0, n_steps=N_MEASURED):
    """The figures of a run, which are kept in a file: minutes 0 are the run that measures the time of a step."""
    label = f"{name} {rate:g}, {minutes:g} min, seed {seed}" if rate else f"{name}, {minutes:g} min, seed {seed}"
    file = options.out / f"{label}.json"
    if not file.exists():
        print(f"{label}: {n_steps} steps", flush=True)
        figures = in_a_process(train, name, rate, seed, n_steps, options)
        figures |= {"name": name, "rate": rate, "budget": minutes, "seed": seed, "settings": options.settings}
        file.with_suffix(".tmp").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        file.with_suffix(".tmp").replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", nargs="+", type=float, default=[2.5, 12.5], help="of training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of ours and trainer")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3], help="peak rates of trainer")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="contestants")
    parser.add_argument("--out", type=Path, default=Path("quality_time"), help="folder of the results")
    options, rest = parser.parse_known_args()
    options.rest = ["--fraction", "1", "--epochs", "1000", *rest]
    settings = project.parse(project.Settings, "", [*options.rest, "--checkpoints", str(options.out)])
    options.device, options.precision = project.pick_device(settings.device, settings.precision)
    options.settings = quality.fixed(settings)
    quality.read_results(options.out, options.settings)
    quality.prepare(settings)
    first, *others = options.seeds
    names = {name: options.rates if name == "trainer" else [0.0] for name in options.only}
    step_seconds = {}
    for name, rates in names.items():
        (step, *_, seconds), *_, (last_step, *_, last_seconds) = result(options, name, 0.0, first, rates[0])["curve"]
        step_seconds[name] = (last_seconds - seconds) / (last_step - step)  # without the first, slow ones
    for minutes in options.minutes:
        for name, rates in names.items():
            n_steps = max(N_POINTS, round(60 * minutes / step_seconds[name]))
            tried = [result(options, name, minutes, first, rate, n_steps) for rate in rates]
            best = min(tried, key=lambda run: run["own"])["rate"]
            if len(rates) > 1 and best in (min(rates), max(rates)):
                print(f"the best rate, {best:g}, is at the edge of those tried: another may be better", flush=True)
            seeds = () if name == "naive" else others
            tried += [result(options, name, minutes, seed, best, n_steps) for seed in seeds]
            # The first measurement is a short one, and may have been disturbed.
            step_seconds[name] = min(step_seconds[name], *(run["seconds"] / run["steps"] for run in tried))
    runs = [figures for figures in quality.read_results(options.out, options.settings) if figures["budget"]]
    report(runs, options)
    draw(options.out / "curves.png", best_runs(runs))


def best_runs(runs):
    """The runs of each contestant and budget, with trainer's best rate."""
    groups = {}
    for run in runs:
        groups.setdefault((run["name"], run["budget"], run["rate"]), []).append(run)
    best = {}
    for (name, budget, _), group in groups.items():
        if (name, budget) not in best or group[0]["own"] < best[name, budget][0]["own"]:
            best[name, budget] = group
    return best


def report(runs, options):
    print(f"\n{options.device}, {torch.get_num_threads()} threads, {options.precision}, torch {torch.__version__}\n\n"
          "| minutes | | peak rate | seed | steps | perplexity | took, minutes |\n|---|---|---|---|---|---|---|")
    for run in sorted(runs, key=lambda run: (run["budget"], run["name"], run["rate"], run["seed"])):
        print(f"| {run['budget']:g} | {run['name']} | {run['rate'] or ''} | {run['seed']} | {run['steps']} | "
              f"{math.exp(run['own']):.2f} | {run['seconds'] / 60:.2f} |")
    mean = {key: statistics.fmean(run["own"] for run in group) for key, group in best_runs(runs).items()}
    took = {key: statistics.fmean(run["seconds"] for run in group) for key, group in best_runs(runs).items()}
    if "ours" not in {name for name, _ in mean}:
        return
    for (name, budget), own in mean.items():
        if name == "ours":
            continue
        enough = [key for key in mean if key[0] == "ours" and mean[key] <= own]
        if enough:
            quickest = min(enough, key=took.get)
            print(f"\n{name} has {math.exp(own):.2f} after {took[name, budget] / 60:.1f} minutes, ours "
                  f"{math.exp(mean[quickest]):.2f} after {took[quickest] / 60:.1f}: "
                  f"at least {took[name, budget] / took[quickest]:.1f} times sooner")
        else:
            print(f"\n{name} has {math.exp(own):.2f} after {budget:g} minutes, ours nowhere")


def draw(path, best):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"naive": ("C3", "a naive loop"), "trainer": ("C1", "transformers: GPT2LMHeadModel and Trainer, tuned"),
              "ours": ("C0", "gpt2_tinystories.py")}
    for name, (color, label) in styles.items():
        for run in (run for (contestant, _), group in best.items() if contestant == name for run in group):
            points = [(seconds / 60, math.exp(own)) for step, _, own, seconds in run["curve"] if step < run["steps"]]
            end = run["seconds"] / 60, math.exp(run["own"])
            axes.plot(*zip(*points, end, strict=True), color=color, linewidth=1, alpha=0.6)
            axes.plot(*end, "o", color=color, label=label)
            label = None
    axes.set(xscale="log", yscale="log", xlabel="minutes of training", ylabel="perplexity of held-out stories",
             title="The same stories, tokenizer and size of model; each point is the end of a run")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    project.run(main)
