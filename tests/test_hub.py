"""`--data auto` with and without a network, against a small Hub of our own on the loopback address."""

import hashlib
import http.server
import io
import json
import multiprocessing.forkserver
import os
import re
import subprocess
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

import datasets
import pytest
from child import work
from conftest import train_in

from sample_stories import sample_stories

pytestmark = pytest.mark.packages

REPO, COMMIT, FILE = "roneneldan/TinyStories", "0123456789abcdef" * 2 + "01234567", "data/train-00000-of-00001.parquet"
MODEL = "somebody/tiny-gpt2"
STORIES = list(sample_stories(40))
ARGUMENTS = "--fraction 1 --tokenizer bpe:300 --n-positions 64 --n-embd 16 --n-head 2 --n-inner 16 --max-steps 2"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as `datasets` asks for to load one Parquet file, and a snapshot of a model."""

    content = b""
    model = {}  # the files of MODEL
    stuck = None  # an Event: set when half of the file is sent, and no more comes then

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self, head=False):
        path = unquote(urlparse(self.path).path)
        entry = {"type": "file", "path": FILE, "size": len(self.content), "oid": hashlib.sha1(self.content).hexdigest()}
        body, headers = b"", {}
        if path in ("", "/"):
            body = b"hub"
        elif path == f"/datasets/{REPO}/resolve/{COMMIT}/{FILE}":
            body = self.content
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        elif re.match(f"/{MODEL}/resolve/(main|{COMMIT})/", path) and Path(path).name in self.model:
            body = self.model[Path(path).name]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        elif path == f"/api/models/{MODEL}/tree/{COMMIT}":
            files = [{"type": "file", "path": "pytorch_model.bin", "size": 1, "oid": COMMIT}]
            files += [{**files[0], "path": name, "size": len(content)} for name, content in self.model.items()]
            body = json.dumps(files).encode()
        elif path == f"/api/models/{MODEL}/revision/main":
            body = json.dumps({"id": MODEL, "sha": COMMIT, "siblings": [], "tags": []}).encode()
        elif path.startswith(f"/api/datasets/{REPO}/tree/"):
            inside = path.removeprefix(f"/api/datasets/{REPO}/tree/").partition("/")[2] == "data"
            folder = {"type": "directory", "path": "data", "size": 0, "oid": COMMIT}
            body = json.dumps([entry if inside else folder]).encode()
        elif path.startswith(f"/api/datasets/{REPO}/paths-info/"):
            body = json.dumps([entry]).encode()
        elif path in (f"/api/datasets/{REPO}", *(f"/api/datasets/{REPO}/revision/{name}" for name in ("main", COMMIT))):
            body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": FILE}], "tags": []}).encode()
        else:
            headers = {"X-Error-Code": "EntryNotFound"}
        self.send_response(200 if body else 404)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head and body == self.content and self.stuck and not self.stuck.is_set():
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.stuck.set()
            self.rfile.read()  # until the other side is gone
        elif not head:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    parquet = io.BytesIO()
    datasets.Dataset.from_dict({"text": STORIES}).to_parquet(parquet)
    handler = type("FilledHub", (Hub,), {"content": parquet.getvalue()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.endpoint, server.handler = f"http://127.0.0.1:{server.server_port}", handler
    yield server
    server.shutdown()


server = multiprocessing.forkserver.ForkServer()  # whose processes have not read HF_ENDPOINT and HF_HOME yet
server.set_forkserver_preload("torch torch._dynamo pyarrow.parquet matplotlib.figure".split())


def train(folder, endpoint, arguments=ARGUMENTS):
    process = start(folder, endpoint, arguments)
    process.join(200)
    output, errors = ((folder / name).read_text() for name in ("output.txt", "errors.txt"))
    return subprocess.CompletedProcess(arguments, process.exitcode, output, errors)


def start(folder, endpoint, arguments=ARGUMENTS):
    environment = {"HF_HOME": str(folder / "hf_home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    for name in ("output.txt", "errors.txt"):
        (folder / name).unlink(missing_ok=True)
    values = (folder, "gpt2_tinystories", arguments.split(), environment, "output.txt", "errors.txt", None, ())
    process = multiprocessing.get_context("forkserver").Process(target=work, args=values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiprocessing.forkserver.connect_to_new_process", server.connect_to_new_process)
        process.start()
    return process


def source(folder):
    return json.loads((folder / "checkpoints" / "epoch_1" / "training.json").read_text())["data"]["source"]


def foreign_bars(errors):
    """The progress bars that are neither of the tokens nor of the training."""
    bars = [line for line in re.split("[\r\n]+", errors) if "%|" in line]
    return [bar for bar in bars if not re.match(r"tokenising:|\s*\d+%\|", bar)]


def test_auto_downloads_tinystories_once_and_keeps_them(hub, tmp_path, capsys):
    """The first start is killed while it downloads, and another one seems to have been while it saved."""
    hub.handler.stuck = threading.Event()
    killed = start(tmp_path, hub.endpoint)
    assert hub.handler.stuck.wait(60)
    killed.kill()
    killed.join()
    assert not (tmp_path / "tinystories_local").exists()
    (tmp_path / "tinystories_local.tmp").mkdir()
    (tmp_path / "tinystories_local.tmp" / "part").write_text("half")
    done = train(tmp_path, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert source(tmp_path) == "tinystories_local"
    assert list(datasets.load_from_disk(tmp_path / "tinystories_local")["text"]) == STORIES
    assert not (tmp_path / "tinystories_local.tmp").exists()
    train_in(tmp_path, base=ARGUMENTS)  # in this process, which has no Hub: it is the same run
    assert "finished" in capsys.readouterr().out
    train_in(tmp_path, "--checkpoints again", base=ARGUMENTS)
    assert "36 to train, 4 to test, of 40 from tinystories_local" in capsys.readouterr().out


def test_any_dataset_of_the_hub_can_be_named(hub, tmp_path):
    assert train(tmp_path, hub.endpoint, f"{ARGUMENTS} --data {REPO}").returncode == 0
    assert source(tmp_path) == REPO
    (tmp_path / "gone").mkdir()
    os.rename(tmp_path / "hf_home", tmp_path / "gone" / "hf_home")
    other = train(tmp_path, hub.endpoint, f"{ARGUMENTS} --data somebody/nothing")
    assert other.returncode == 2 and "somebody/nothing" in other.stderr  # although a finished run is there
    assert other.stderr.count("\n") == 1
    cached = train(tmp_path / "gone", "http://127.0.0.1:9", f"{ARGUMENTS} --data {REPO}")
    assert cached.returncode == 0, cached.stderr


def test_a_checkpoint_of_the_hub_is_fetched_once(hub, finished, tmp_path):
    """Nothing that is not asked for, such as the pickled weights, which the server does not have."""
    epoch = finished / "checkpoints" / "epoch_2"
    hub.handler.model = {path.name: path.read_bytes() for path in epoch.iterdir()}
    arguments = f"--data sample --fraction 0.004 --max-steps 1 --n-positions 64 --init {MODEL}"
    done = train(tmp_path, hub.endpoint, arguments)
    assert done.returncode == 0, done.stderr
    assert not foreign_bars(done.stderr) and "Warning" not in done.stderr, done.stderr
    again = train(tmp_path, "http://127.0.0.1:9", f"{arguments} --checkpoints again")
    assert again.returncode == 0, again.stderr
    results = [json.loads((tmp_path / name / "epoch_1/training.json").read_text()) for name in ("checkpoints", "again")]
    assert results[0]["epochs"][0]["test_loss"] == results[1]["epochs"][0]["test_loss"]
    other = train(tmp_path, hub.endpoint, f"{arguments.replace(MODEL, 'somebody/nothing')} --checkpoints other")
    assert other.returncode == 2
    assert "somebody/nothing: no such file or folder; on the Hub: " in other.stderr
    assert other.stderr.count("\n") == 1, other.stderr


def test_without_a_network_the_built_in_stories_are_used_quietly_and_plainly(tmp_path):
    arguments = ARGUMENTS.replace("--fraction 1 ", "--fraction 0.01 ")
    done = train(tmp_path, "http://127.0.0.1:9", arguments)
    assert done.returncode == 0, done.stderr
    assert "THE BUILT-IN STORIES are used" in done.stdout
    assert "etry" not in done.stdout + done.stderr and "Warning" not in done.stderr
    assert not foreign_bars(done.stderr), done.stderr
    assert source(tmp_path) == "built-in stories"
    assert not (tmp_path / "tinystories_local").exists()
    last = [line for line in done.stdout.splitlines() if line.startswith("test perplexity")]
    assert len(last) == 1 and " on built-in stories, lowest in " in last[0]


def test_an_explicit_tokenizer_never_falls_back(tmp_path):
    done = train(tmp_path, "http://127.0.0.1:9", "--data sample --tokenizer gpt2")
    assert done.returncode == 2
    why = "no such file or folder, and the Hugging Face Hub cannot be reached; bpe:4096 needs no network"
    message = f"--tokenizer gpt2: {why}\n"
    assert done.stderr.endswith(message)
