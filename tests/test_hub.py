"""Hub ids, against a small server on this machine that speaks enough of the hub's interface."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moezip.checkpoint import hub
from moezip.checkpoint.hub import HubId, fetched
from moezip.errors import CheckpointError
from tests.command import Answer, Cli, process, tree

Tiny = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """One model, ``acme/tiny``, as a server.

    Attributes:
        requests: (method, path, range) of all that came. cut: break off the first answers with a shard in the middle.
    """

    def __init__(self, folder: Path):
        self.folder, self.requests, self.cut = folder, list[tuple[str, str, str | None]](), 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *given: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def answer(self, request: Any, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path, request.headers.get("Range")))
        if re.fullmatch(r"/api/models/acme/tiny(/revision/(main|v1|[0-9a-f]{40}))?", path):
            names = [{"rfilename": file.relative_to(self.folder).as_posix()} for file in self.files()]
            return self._json(request, 200, {"id": "acme/tiny", "sha": COMMIT, "siblings": names})
        if path.startswith("/api/models/acme/tiny/revision/"):
            return self._json(request, 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if path == f"/api/models/acme/tiny/tree/{COMMIT}":
            return self._json(request, 200, [self._entry(file) for file in self.files()])
        match = re.fullmatch(r"/acme/tiny/resolve/[^/]+/(.+)", path)
        if match is None:
            return self._json(request, 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        file = self.folder / match[1]
        if not file.is_file():
            return self._json(request, 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        return self._file(request, file, body)

    def _entry(self, file: Path) -> dict[str, Any]:
        size, digest = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
        entry = {"type": "file", "path": file.relative_to(self.folder).as_posix(), "size": size, "oid": digest[:40]}
        if file.suffix == ".safetensors":
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
        return entry

    def _file(self, request: Any, file: Path, body: bool) -> None:
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        whole, start = len(content), 0
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if wanted:
            start = int(wanted[1])
            content = content[start : int(wanted[2]) + 1 if wanted[2] else whole]
        request.send_response(206 if wanted else 200)
        tag = digest if file.suffix == ".safetensors" else digest[:40]
        headers = {
            "ETag": f'"{tag}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Length": len(content),
        }
        if file.suffix == ".safetensors":
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": whole}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{whole}"
        for key, value in headers.items():
            request.send_header(key, str(value))
        request.end_headers()
        if not body:
            return
        if self.cut and file.suffix == ".safetensors" and not (wanted and wanted[2]):
            self.cut -= 1
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            request.close_connection = True
            return
        request.wfile.write(content)

    def _json(self, request: Any, code: int, value: Any, more: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        request.send_response(code)
        for key, each in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(more or {}),
        }.items():
            request.send_header(key, each)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "published"
    shutil.copytree(tiny("qwen3_moe"), folder)
    for name in ("pytorch_model.bin", "modeling_own.py", "consolidated.safetensors", "original/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    hub = Hub(folder)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def moezip(*words: object, url: str, home: Path, offline: bool = False, before: str = "") -> Answer:
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    return process(*words, before=before, HF_HUB_DISABLE_PROGRESS_BARS="1", **settings)


def shard_gets(hub: Hub) -> list[str | None]:
    """Ranges of the shards that were asked for; None is a whole one."""
    return [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(".safetensors")]


def test_a_model_is_looked_at_fetched_and_found_again(served: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    looked = moezip("inspect", "acme/tiny", "--json", url=served.url, home=home)
    assert looked.code == 0, looked.err
    assert "only headers are read" in looked.err
    assert shard_gets(served) == ["bytes=0-100000"] * 3
    local = process("inspect", served.folder, "--json")
    assert looked.json == local.json
    assert not list(home.rglob("*.safetensors"))

    out = tmp_path / "out"
    prune = ("prune", "acme/tiny@v1", out, "--method", "router-norm", "--keep", "4", "--json")
    pruned = moezip(*prune, url=served.url, home=home)
    assert pruned.code == 0, pruned.err
    assert re.search(r"acme/tiny@v1: \d+ files, .* MB, are downloaded into ", pruned.err)
    (snapshot,) = home.glob("hub/models--acme--tiny/snapshots/*")
    assert [name for name in tree(snapshot) if name.endswith((".bin", ".py")) or "consolidated" in name] == []
    assert not (snapshot / "original").exists()
    assert (snapshot / "tokenizer.json").is_file()

    served.server.shutdown()  # from here on there is no hub
    again = moezip("inspect", "acme/tiny@v1", "--json", url="http://127.0.0.1:9", home=home)
    assert (again.code, again.json) == (0, local.json), again.err
    offline = moezip("verify", "acme/tiny@v1", url="http://127.0.0.1:9", home=home, offline=True)
    assert offline.code == 0, offline.err


def test_an_interrupted_download_goes_on(served: Hub, tmp_path: Path) -> None:
    served.cut = 1
    small = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1024"  # the shards are of kilobytes
    done = moezip("verify", "acme/tiny", url=served.url, home=tmp_path / "home", before=small)
    assert done.code == 0, done.err
    assert any(wanted is not None for wanted in shard_gets(served))  # the rest alone was asked for again


def test_what_cannot_be_fetched_is_one_clear_error(served: Hub, tmp_path: Path) -> None:
    for name, words in (("acme/none", "the hub shows no model of that name"), ("acme/tiny@v9", "no revision 'v9'")):
        answer = moezip("inspect", name, url=served.url, home=tmp_path / "home")
        assert (answer.code, words in answer.err) == (1, True), answer.err
        assert "Traceback" not in answer.err
    answer = moezip("inspect", "acme/tiny", url=served.url, home=tmp_path / "empty", offline=True)
    assert (answer.code, "HF_HUB_OFFLINE is set" in answer.err) == (1, True), answer.err
    assert "hf download acme/tiny" in answer.err


def test_a_folder_of_that_name_wins(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("qwen3_moe"), tmp_path / "acme" / "tiny")
    answer = process("inspect", "acme/tiny", "--json", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert answer.code == 0, answer.err


def pretend(monkeypatch: pytest.MonkeyPatch, files: list[Any]) -> list[dict[str, Any]]:
    """The fetching function replaced by one that lists ``files`` and says where it would put them."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> Any:
        calls.append({"name": name, **options})
        return files if options.get("dry_run") else "/somewhere"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return calls


def listed(filename: str, size: int, cached: bool = False) -> Any:
    return SimpleNamespace(filename=filename, file_size=size, will_download=not cached, commit_hash=COMMIT)


def test_the_disk_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, [listed("model.safetensors", 60 << 30), listed("config.json", 900)])
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: SimpleNamespace(free=40 << 30))
    with pytest.raises(CheckpointError, match=r"not enough disk space for acme/big: 64,424,510,340 bytes"):
        fetched(HubId("acme/big"))
    assert [call.get("dry_run") for call in calls] == [True]
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: SimpleNamespace(free=62 << 30))
    assert fetched(HubId("acme/big", "v2")) == Path("/somewhere")
    assert calls[-1]["revision"] == "v2"


def test_a_dry_run_downloads_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, [listed("model.safetensors", 60 << 30), listed("config.json", 900)])
    answer = cli("prune", "acme/big", "out", "--method", "router-norm", "--ratio", "0.5", "--dry-run")
    assert (answer.code, "2 files, 64.42 GB, are not cached" in answer.err) == (1, True), answer.err
    assert [call.get("dry_run") for call in calls] == [True]


def test_models_without_safetensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, [listed("config.json", 900)])
    with pytest.raises(CheckpointError, match=r"no \.safetensors files"):
        fetched(HubId("acme/pickled"))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("org/name", HubId("org/name")), ("org/name@v1", HubId("org/name", "v1")), ("o/na.me-1", HubId("o/na.me-1")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")), ("a/b/c", None), ("name", None), ("./name", None),
        ("/abs/name", None), ("../x", None), ("~/x", None), ("org/na me", None),
    ],
)  # fmt: skip
def test_what_a_hub_id_is(text: str, wanted: HubId | None) -> None:
    assert HubId.of(text) == wanted
