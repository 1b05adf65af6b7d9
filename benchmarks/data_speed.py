"""Speed and memory of the way from stories to batches, the first time and from the cache.

    python benchmarks/data_speed.py

Stories of the built-in grammar, saved as a datasets folder; all of them are tokenised. Each line is a process of its
own: from its start to the first batch, then the other batches of an epoch. Its peak memory is without the pages of
mapped files, which the system may drop at any time (looked up under Linux only), and with them.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import make_parser, prepare

import gpt2_tinystories as project

MEASURE = "measure"  # the first argument of the processes that are measured


def write_stories(n_stories, folder):
    import datasets

    from sample_stories import sample_stories

    def rows():
        return ({"text": f"{text} {i}"} for i, text in enumerate(sample_stories(n_stories)))  # no two alike

    datasets.Dataset.from_generator(rows, cache_dir=f"{folder}/cache").save_to_disk(folder / str(n_stories))


def watch_memory(peak):
    """Keep in peak[0] the most memory, in MB, that this process has had for itself."""
    while True:
        own = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
        peak[0] = max(peak[0], int(own[0]) / 1024)
        time.sleep(0.02)


def measure(data, tokenizer, folder):
    """What a start does, up to its first batch; then all batches of an epoch. Prints figures for the parent."""
    peak = [0]
    if sys.platform == "linux":
        threading.Thread(target=watch_memory, args=(peak,), daemon=True).start()
    checkpoints = f"{folder}/runs/{Path(data).name}"
    settings = project.Settings(data=data, fraction=1.0, tokenizer=tokenizer, checkpoints=checkpoints)
    train_set, *_ = prepare(settings)
    loader = project.make_loader(train_set.ids, project.epoch_batches(train_set.lengths, settings.batch_size, 0, 1))
    next(iter(loader))
    first_batch, started = time.time(), time.perf_counter()
    n_batches = sum(1 for _ in loader)
    batches = n_batches / (time.perf_counter() - started)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1024)
    print(json.dumps({"first_batch": first_batch, "batches": batches, "own": peak[0], "resident": resident}))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--stories", nargs="+", type=int, default=[20_000, 200_000], help="how many")
    parser.add_argument("--tokenizer", default="gpt2", help="as for gpt2_tinystories.py")
    options = parser.parse_args()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    print("| stories | start | first batch after | stories/s | batches/s then | peak memory | with mapped files |\n"
          "|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for n_stories in options.stories:
            write_stories(n_stories, Path(folder))
            for start in ("first", "second"):
                started = time.time()
                arguments = [sys.executable, __file__, MEASURE, f"{folder}/{n_stories}", options.tokenizer, folder]
                output = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout
                figures = json.loads(output.splitlines()[-1])
                figures["seconds"] = figures["first_batch"] - started
                print("| {:,} | {} | {seconds:.1f} s | {:,.0f} | {batches:,.0f} | {own:,.0f} MB | {resident:,.0f} MB |"
                      .format(n_stories, start, n_stories / figures["seconds"], **figures), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(*sys.argv[2:])
    else:
        project.run(main)
