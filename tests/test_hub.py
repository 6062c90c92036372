"""Hub ids, against a local stand-in of the hub: the same addresses and headers, served from a folder."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commands import PROCESS, invoke
from conftest import make_checkpoint, make_store
from demo_scores import DEMO
from huggingface_hub import constants
from safetensors.torch import load_file
from test_store import as_pickle

from lowmem_icl.model.store import layer_file, open_store

REPOSITORY = "someone/opt-tiny"
COMMIT = "c" * 40


class Hub:
    """Serves one repository; counts what is asked for, can refuse a file, and takes commits."""

    def __init__(self, folder: Path, repository: str = REPOSITORY) -> None:
        self.folder, self.repository = folder, repository
        self.posted: list[str] = []
        # Names that no folder can hold, as a hostile repository may list them.
        self.listed: dict[str, bytes] = {}
        self.refused: set[str] = set()
        self.fetched: list[str] = []
        self.watched: Path | None = None
        self.seen_together: list[set[str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        repository = self.hub.repository
        if path.startswith(f"/api/models/{repository}"):
            files = [
                {"rfilename": f.name, "size": f.stat().st_size} for f in sorted(self.hub.folder.iterdir())
            ]
            files += [{"rfilename": name, "size": len(held)} for name, held in self.hub.listed.items()]
            self.reply(json.dumps({"id": repository, "sha": COMMIT, "siblings": files}).encode(), {}, body)
            return
        file = self.hub.folder / path.rsplit("/", 1)[-1]
        if not path.startswith(f"/{repository}/resolve/") or not file.is_file():
            self.send_error(404)
        elif file.name in self.hub.refused:
            self.send_error(403)
        else:
            if body:
                self.hub.fetched.append(file.name)
                if self.hub.watched is not None:
                    here = {found.name for found in self.hub.watched.glob("fetched/pytorch_model*")}
                    self.hub.seen_together.append(here)
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.reply(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

    def do_POST(self) -> None:
        """Make the repository, say that files come within commits, and take a commit's files."""
        path = self.path.split("?")[0]
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.posted.append(path)
        repository = self.hub.repository
        answer: dict[str, Any] = {}
        if path == "/api/repos/create":
            name = "/".join(filter(None, (json.loads(sent).get("organization"), json.loads(sent)["name"])))
            if name != repository:
                self.send_error(403)
                return
            answer = {"url": f"{self.hub.endpoint}/{repository}", "id": repository}
        elif path == f"/api/models/{repository}/preupload/main":
            names = [file["path"] for file in json.loads(sent)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            answer = {"files": files}
        elif path == f"/api/models/{repository}/commit/main":
            for line in sent.splitlines():
                if (step := json.loads(line))["key"] == "file":
                    content = base64.b64decode(step["value"]["content"])
                    (self.hub.folder / step["value"]["path"]).write_bytes(content)
            answer = {"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        self.reply(json.dumps(answer).encode(), {"Content-Type": "application/json"}, body=True)

    def reply(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, as the hub of this process too, whose client read the environment when it was
    imported.
    """
    folder = make_checkpoint(tmp_path / "repository", vocab_size=528)
    as_pickle(folder, "model.")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    with served(Hub(folder), tmp_path, monkeypatch) as serving:
        yield serving


@contextmanager
def served(serving: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Make a stand-in the hub of this process until the end."""
    monkeypatch.setattr(constants, "ENDPOINT", serving.endpoint)
    template = serving.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "home" / "hub"))
    yield serving
    serving.server.shutdown()
    serving.server.server_close()


SHARDS = ["pytorch_model-00001.bin", "pytorch_model-00002.bin"]


def test_shards_are_fetched_converted_and_deleted_one_by_one(hub: Hub, tmp_path: Path) -> None:
    store = hub.watched = tmp_path / "store"
    done = invoke("convert", REPOSITORY, store, "--delete-shards")
    assert done.exit_code == 0, done.stderr
    assert [name for name in hub.fetched if name in SHARDS] == SHARDS
    assert all(len(together) == 0 for together in hub.seen_together), "a shard goes before the next one comes"
    assert not (store / "fetched").exists()
    assert not list(store.rglob("*.piece"))
    assert "fetching pytorch_model-00001.bin (1 of 2" in done.stderr
    expected = make_store(hub.folder, tmp_path / "expected", "float32")
    made = open_store(store)
    assert made.manifest.source.revision == COMMIT
    assert made.manifest.source.digest == expected.manifest.source.digest


@pytest.mark.parametrize("spoiled", [False, True])
def test_a_fetch_that_fails_is_told_and_the_next_run_goes_on(spoiled: bool, hub: Hub, tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = ("convert", REPOSITORY, store, "--weights", "float32", "--delete-shards")
    hub.refused = {SHARDS[1]}
    failed = invoke(*arguments)
    assert failed.exit_code == 2
    assert "run the same command again" in failed.stderr
    assert not (store / "fetched" / SHARDS[0]).exists()
    (piece,) = store.rglob("*.piece")  # The layer that lies in two shards is kept as far as it was read.
    if spoiled:
        content = piece.read_bytes()
        piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    hub.refused, hub.fetched = set(), []
    assert invoke(*arguments).exit_code == 0
    assert (SHARDS[0] in hub.fetched) == spoiled
    assert not list(store.rglob("*.piece"))
    expected = make_store(hub.folder, tmp_path / "expected", "float32")
    for number in range(3):
        ours, theirs = load_file(store / layer_file(number)), load_file(expected.folder / layer_file(number))
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[name] == value).all()) for name, value in theirs.items())


def test_without_deletion_shards_stay_in_the_hubs_cache_and_the_network_is_needed_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, stores = tmp_path / "home", tmp_path / "stores"
    arguments = ("convert", REPOSITORY, "--store-dir", str(stores), "--weights", "float32")
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        [*PROCESS, *arguments], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert first.returncode == 0, first.stderr
    assert len(list(home.rglob("snapshots/*/pytorch_model*"))) == 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = invoke(*arguments)
    assert again.stdout == first.stdout
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other" / "hub"))
    without_cache = invoke(*arguments)
    assert without_cache.stdout == first.stdout, without_cache.stderr


def test_planning_a_hub_id_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"context": "cat", "options": [" dog", " wug"], "gold": 1}\n' * 4)
    arguments = ("--tasks", own, "--shots", "0", "--store-dir", tmp_path / "stores", "--json")
    planned = invoke("plan", "--model", REPOSITORY, *arguments)
    assert planned.exit_code == 0, planned.stderr
    shard_bytes = sum((hub.folder / name).stat().st_size for name in SHARDS)
    assert json.loads(planned.stdout)["convert_bytes"] == shard_bytes
    assert "config.json" in hub.fetched
    assert not set(SHARDS) & set(hub.fetched)
    assert [path.name for path in (tmp_path / "stores").iterdir()] == ["texts"]
    missing = invoke("plan", "--model", "someone/else", *arguments)
    assert missing.exit_code == 2
    assert "someone/else" in missing.stderr


def test_deleting_shards_of_a_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    refused = invoke("convert", hub.folder, tmp_path / "store", "--delete-shards")
    assert refused.exit_code == 2
    assert "only what was fetched from the hub" in refused.stderr.replace("\n", " ")
    assert all((hub.folder / name).is_file() for name in SHARDS)


def test_a_store_of_another_form_comes_of_the_hubs_cache_alone(hub: Hub, tmp_path: Path) -> None:
    """And where the cache is gone, the command that fetches again is told."""
    stores = ("--store-dir", tmp_path / "stores")
    first = invoke("convert", REPOSITORY, "--weights", "float32", *stores)
    assert first.exit_code == 0, first.output
    store = Path(first.stdout.strip())
    hub.refused |= {path.name for path in hub.folder.iterdir()}
    hub.fetched.clear()
    second = invoke("convert", store, "--weights", "nf4", *stores)
    assert (second.exit_code, hub.fetched) == (0, []), second.output
    sources = [open_store(Path(done.stdout.strip())).manifest.source for done in (first, second)]
    assert sources[0] == sources[1]
    assert sources[1].revision == COMMIT
    shutil.rmtree(tmp_path / "home")
    told = " ".join(invoke("convert", store, "--weights", "bfloat16", *stores).output.split())
    assert f"lowmem-icl convert {REPOSITORY} --revision {COMMIT} --weights bfloat16" in told
