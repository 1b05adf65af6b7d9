"""Training speed and memory of this project beside transformers' Trainer: the same stories, model and optimizer steps.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train_speed.py
    python benchmarks/train_speed.py --precision fp32 --only hf-default ours
    python benchmarks/train_speed.py --only ours --profile

hf-default  GPT2LMHeadModel and Trainer with default arguments: fp32, stories in random order, padded to the batch's
            longest one, the fused AdamW
hf-tuned    the same with --precision (bf16 where the hardware has it), torch.compile and the very batches of ours, so
            with stories of similar length
ours        gpt2_tinystories.py as it is, but with n_inner 3072, as GPT2LMHeadModel has it: the same model
not-folded  ours with a row of embedding and head for each of the tokens that no story has, too

Each is a process of its own. They train a block of steps in turn; the first blocks (warm-up, compilation) do not count.
Tokens are those of the stories, without padding. GFLOP a token are counted as 6 for every weight of a matrix product,
and 6 T n_embd in each layer for causal attention over T tokens. They stand there twice: those of the whole model for
the real tokens alone, and those that are really multiplied, for padding as well, with the rows that there are, and with
the products of Muon. The share of the machine's own rate of matrix products is of the latter.
"""

import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from common import make_parser, prepare
from torch.utils.flop_counter import FlopCounterMode

import gpt2_tinystories as project

# --- In a process of its own: train ----------------------------------------------------------------------------------


class Stopwatch:
    """Times blocks of optimizer steps; what it sends to the parent is (seconds, tokens, FLOPs of the whole model, FLOPs
    really multiplied, peak memory)."""

    def __init__(self, pipe, options):
        self.pipe, self.options = pipe, options
        self.n_steps, self.work = 0, []
        self.profiler = torch.profiler.profile()

    def before_step(self):
        block, rest = divmod(self.n_steps, self.options.steps)
        self.n_steps += 1
        if rest:
            return
        if block:
            sums = [float(sum(column)) for column in zip(*self.work, strict=True)]
            synchronize(self.options.device)
            seconds = time.perf_counter() - self.started
            if self.options.profile and block > self.options.rounds:
                self.profiler.stop()
                key = "self_device_time_total" if self.options.device == "cuda" else "self_cpu_time_total"
                table = self.profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=50)
                print(table, flush=True)
            self.pipe.send((seconds, *sums, peak_memory(self.options.device)))
        self.pipe.recv()  # until it is this one's turn
        self.work.clear()
        if self.options.profile and block == self.options.rounds:
            self.profiler.start()
        self.started = time.perf_counter()

    def add(self, config, n_tokens, shape, n_rows, muon=0):
        """Take down a batch of this shape with n_tokens that are no padding, for a head of n_rows."""
        layers = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * (config.n_inner or 4 * config.n_embd))
        layers += config.n_layer * config.n_embd * shape[1]  # attention
        whole = 6 * n_tokens * (layers + config.n_embd * config.vocab_size)
        self.work.append((n_tokens, whole, 6 * math.prod(shape) * (layers + config.n_embd * n_rows) + muon))


@cache
def muon_flops(model):
    """Those of Muon's products in a step."""
    muon = project.make_optimizers(model, project.Settings(), torch.float32)["muon"]
    with FlopCounterMode(display=False) as counter:
        for group in muon.param_groups:
            n_parts, (n_out, n_in) = group["n_parts"], group["params"][0].shape
            parts = torch.empty(len(group["params"]) * n_parts, n_out // n_parts, n_in, device="meta")
            project.orthogonalize(parts, torch.float32)
    return counter.get_total_flops()


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device):
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def settings_of(options, name="trainer"):
    # All stories and no saves inside an epoch: a block holds nothing but steps.
    return (f"--data {options.data} --tokenizer {options.tokenizer} --fraction 1 "
            f"--save-every 1e6 --test-points 0 --n-inner 3072 --epochs 1000 --device "
            f"{options.device} --batch-size {options.batch_size} --accum-steps {options.accum_steps} --precision "
            f"{options.precision} --compile {options.compile} --checkpoints {options.folder}/{name} --plots "
            f"{options.folder}/{name}").split()


def ours(options, stopwatch, name="ours"):
    train, step_batches = project.train, project.step_batches

    def timed_train(model, *rest):
        def timed_batches(lengths, *rest):  # a step is from one of these windows to the next
            for window in step_batches(lengths, *rest):
                stopwatch.before_step()
                for i, batch in enumerate(window):
                    n_tokens, shape = int(lengths[batch].sum()), (len(batch), int(lengths[batch].max()))
                    muon = 0 if i else muon_flops(model)
                    stopwatch.add(model.config, n_tokens, shape, len(model.lm_head.weight), muon)
                yield window

        project.step_batches = timed_batches
        train(model, *rest)

    project.train = timed_train
    project.main(settings_of(options, name))


def not_folded(options, stopwatch):
    project.fold_unused_tokens = lambda model, *token_sets: model
    ours(options, stopwatch, "not-folded")


def hf_default(options, stopwatch, batches_of_ours=False, **arguments):
    import datasets
    import transformers

    class TimedTrainer(transformers.Trainer):
        n_batches = 0

        def training_step(self, model, inputs, *rest):
            if self.n_batches % options.accum_steps == 0:
                stopwatch.before_step()
            self.n_batches += 1
            mask = inputs["attention_mask"]
            n_tokens = mask.sum() - len(mask)  # the first token of a story is no target
            stopwatch.add(config, n_tokens, mask.shape, config.vocab_size)
            return super().training_step(model, inputs, *rest)

        def _get_train_sampler(self, *rest):
            if not batches_of_ours:
                return super()._get_train_sampler(*rest)
            batches = project.epoch_batches(train_set.lengths, options.batch_size, settings.seed, 1)
            return [story for batch in batches if len(batch) == options.batch_size for story in batch.tolist()]

    settings = project.parse(project.Settings, "", settings_of(options))
    train_set, _, tokenizer, _ = prepare(settings)
    tokenizer.pad_token = tokenizer.eos_token
    config = project.model_config(settings, tokenizer)
    stories = datasets.Dataset.from_dict({"input_ids": [ids.as_py()[: settings.n_positions] for ids in train_set.ids]})
    arguments = transformers.TrainingArguments(
        f"{options.folder}/trainer", per_device_train_batch_size=options.batch_size, num_train_epochs=1000,
        gradient_accumulation_steps=options.accum_steps, use_cpu=options.device == "cpu", disable_tqdm=True,
        **arguments)
    TimedTrainer(transformers.GPT2LMHeadModel(config), arguments, train_dataset=stories,
                 data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)).train()


def hf_tuned(options, stopwatch):
    hf_default(options, stopwatch, batches_of_ours=True, torch_compile=True, bf16=options.precision == "bf16",
               fp16=options.precision == "fp16")


RUNS = {"hf-default": hf_default, "hf-tuned": hf_tuned, "not-folded": not_folded, "ours": ours}


def work(name, options, pipe):
    """What a process does, until its parent ends; what it prints goes to a file."""
    with open(log_file(name, options), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    RUNS[name](options, Stopwatch(pipe, options))


# --- In the parent: let them take turns, and report ------------------------------------------------------------------


def log_file(name, options):
    return Path(options.folder) / f"{name}.txt"


def start(name, options):
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    context.Process(target=work, args=(name, options, end), daemon=True).start()
    end.close()
    return pipe


def train_block(name, pipe, options):
    try:
        pipe.send("go")
        return pipe.recv()
    except (EOFError, ConnectionError):
        sys.exit(f"{name} failed:\n{log_file(name, options).read_text()}")


def matmul_rate(device, dtype):
    """FLOPs a second of this machine in the product of two square matrices."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    product, times = torch.empty_like(a), []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b, out=product)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(times)


def main():
    parser = make_parser(__doc__)
    local = project.LOCAL_STORIES if Path(project.LOCAL_STORIES).exists() else "sample"
    parser.add_argument("--data", default=local, help="as for gpt2_tinystories.py")
    parser.add_argument("--tokenizer", default="auto", help="as for gpt2_tinystories.py")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="which of them to run")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each that count")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a block")
    parser.add_argument("--batch-size", type=int, default=8, help="stories in a batch")
    parser.add_argument("--accum-steps", type=int, default=2, help="batches in a step")
    parser.add_argument("--device", default="auto", help="cpu or cuda")
    parser.add_argument("--precision", default="auto", help="of ours and hf-tuned: fp32, bf16 or fp16")
    parser.add_argument("--compile", default="auto", help="of ours: on or off")
    parser.add_argument("--profile", action="store_true", help="of ours: show where the time of the last block goes")
    options = parser.parse_args()
    options.device, options.precision = project.pick_device(options.device, options.precision)
    rates, blocks = [], {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as options.folder:
        pipes = {}
        for name in options.only:  # the first block of each alone: its start, its compilation, its warm-up
            started, pipes[name] = time.perf_counter(), start(name, options)
            train_block(name, pipes[name], options)
            seconds = time.perf_counter() - started
            print(f"{name}: its first {options.steps} steps were done {seconds:.0f} s after the start", flush=True)
        for _ in range(options.rounds):
            rates.append(matmul_rate(options.device, project.DTYPES[options.precision]))
            for name in options.only:
                blocks[name].append(train_block(name, pipes[name], options))
        if options.profile:
            print(log_file("ours", options).read_text())
    report(options, blocks, statistics.median(rates))


def report(options, blocks, rate):
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.batch_size} x "
          f"{options.accum_steps} stories of {options.data}, {options.precision} products {rate / 1e9:,.0f} GFLOP/s\n\n"
          "| | tokens/s: median, lowest to highest | ours faster by | peak memory | GFLOP a token: whole model | "
          "really multiplied | of the products' rate |\n|---|---|---|---|---|---|---|")
    speeds = {name: [tokens / seconds for seconds, tokens, *_ in blocks[name]] for name in options.only}
    for name, speed in speeds.items():
        ratios = [a / b for a, b in zip(speeds["ours"], speed, strict=True)] if "ours" in speeds else [math.nan]
        _, tokens, whole, real, _ = (sum(column) for column in zip(*blocks[name], strict=True))
        share = statistics.median(block[3] / block[0] for block in blocks[name]) / rate
        memory = max(block[4] for block in blocks[name]) / 2**30
        print(f"| {name} | {statistics.median(speed):,.0f}, {min(speed):,.0f} to {max(speed):,.0f} | "
              f"{statistics.median(ratios):.2f} x | {memory:.2f} GiB | {whole / tokens / 1e9:.3f} | "
              f"{real / tokens / 1e9:.3f} | {share:.0%} |")


if __name__ == "__main__":
    project.run(main)
