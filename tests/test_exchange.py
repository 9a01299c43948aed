"""Formats of others: llama.cpp control vectors, read back independently, and the Hub, against a small fake of its API."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from affectlens.calibration import Bounds, Calibration
from affectlens.control import export_gguf, read_gguf
from affectlens.engine import Steering, Where
from affectlens.errors import AffectlensError, EngineError, FormatError, MismatchError
from affectlens.exchange import FILES, from_hub, load_vectors, push_to_hub
from affectlens.vectors import ConceptVectors

NAMES = ("angry", "calm", "sad")
TOKEN = "hf_right"


def tiny(seed: int = 0) -> ConceptVectors:
    """Three concepts at layers 0 to 2, eight wide."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(3, 3, 8))
    return ConceptVectors(
        names=NAMES,
        layers=(0, 1, 2),
        layer=1,
        directions=(directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32),
        norms=random.uniform(1, 2, (3, 3)).astype(np.float32),
        centre=random.normal(size=(3, 8)).astype(np.float32),
        residual_norms=np.array([10, 20, 40], np.float32),
        neutral=(np.eye(8, dtype=np.float32)[:2], np.zeros((0, 8), np.float32), np.eye(8, dtype=np.float32)[:1]),
        baseline=random.uniform(size=(3, 3, 2)).astype(np.float32),
        stability=random.uniform(size=(3, 3)).astype(np.float32),
        counts=np.array([5, 6, 7]),
        model={"id": "org/model", "family": "qwen3", "n_layers": 3, "width": 8, "fingerprint": "ab12", "template": None},
        method={"share": 0.5, "seed": 0},
    )


def assert_equal(a: ConceptVectors, b: ConceptVectors) -> None:
    for name, value in vars(a).items():
        if name == "neutral":
            assert all(np.array_equal(x, y) for x, y in zip(a.neutral, b.neutral, strict=True))
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(b, name))
            assert value.dtype == getattr(b, name).dtype
        else:
            assert value == getattr(b, name)


# ------------------------------------------------------------------------------- control vectors


def test_gguf_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    vectors = tiny()
    mix = 0.1 * vectors["calm"].on(1, 2) - 0.05 * vectors["angry"]
    path = export_gguf(mix, tmp_path / "mix.gguf", model=vectors.model)

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "qwen3"
    assert fields["controlvector.layer_count"] == 2
    assert [(t.name, t.tensor_type, t.shape.tolist()) for t in reader.tensors] == [
        ("direction.1", GGMLQuantizationType.F32, [8]),
        ("direction.2", GGMLQuantizationType.F32, [8]),
    ]
    # strength x mean residual norm at the layer, the total divided evenly
    calm, angry = vectors.directions[:, 1], vectors.directions[:, 0]
    np.testing.assert_allclose(reader.tensors[0].data, 0.1 * 20 / 2 * calm[1] - 0.05 * 20 * angry[1], rtol=1e-6)
    np.testing.assert_allclose(reader.tensors[1].data, 0.1 * 40 / 2 * calm[2], rtol=1e-6)

    assert fields["affectlens.model.id"] == "org/model"
    assert fields["affectlens.model.fingerprint"] == "ab12"
    assert "every position" in fields["affectlens.positions"]
    assert "every position" in fields["general.description"]
    assert "multiples of the mean residual norm" in fields["affectlens.strength_unit"]
    assert json.loads(fields["affectlens.terms"]) == [
        {"name": "calm", "strength": 0.1, "layers": [1, 2], "divide": "even", "residual_norms": [20, 40]},
        {"name": "angry", "strength": -0.05, "layers": [1], "divide": "even", "residual_norms": [20]},
    ]


def test_gguf_round_trip(tmp_path: Path) -> None:
    vectors = tiny()
    mix = 0.3 * vectors["sad"].on(1, 2)
    path = export_gguf(mix, tmp_path / "new folder" / "sad.gguf", model=vectors.model)
    back = read_gguf(path)
    assert list(back) == [1, 2]
    for layer, direction in back.items():
        assert direction.dtype == np.float32 and direction.flags.writeable
        np.testing.assert_array_equal(direction, mix.at_layer(layer)[0][0].vector)
    again = export_gguf(mix, tmp_path / "again.gguf", model=vectors.model)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.gguf", "new folder"]  # nothing temporary stays


def test_gguf_leaves_out_strength_zero(tmp_path: Path) -> None:
    vectors = tiny()
    here = Where(part="response")
    mix = 0.1 * vectors["calm"] + 0.0 * vectors["sad"].on(0, 2) + 0.0 * vectors["angry"].at(here)
    path = export_gguf(mix, tmp_path / "calm.gguf", model=vectors.model)
    assert list(read_gguf(path)) == [1]
    assert "sad" not in GGUFReader(path).fields["affectlens.terms"].contents()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda calm: calm.on(0), EngineError, "layer 0, which llama.cpp cannot steer: use .on() with 1 to 2"),
        (lambda calm: calm.on(0, 1), EngineError, "layer 0"),
        (lambda calm: calm.at(Where(part="response")), EngineError, "adds at every position"),
        (lambda calm: calm.at(Where(last=1)), EngineError, "adds at every position"),
        (lambda calm: calm.ablate(), EngineError, "'calm' is to ablate, but llama.cpp only adds"),
        (lambda calm: calm.clamp(0.0), EngineError, "'calm' is to clamp"),
        (lambda calm: 0.0 * calm, EngineError, "adds nothing"),
        (lambda calm: calm - calm, EngineError, "adds nothing"),
        (lambda calm: Steering(), EngineError, "adds nothing"),
        (lambda calm: float("nan") * calm, EngineError, "finite"),
        (lambda calm: Steering((replace(calm.terms[0], layers=(7,), available=(7, 8, 9)),)), MismatchError, "not 7"),
        (lambda calm: Steering((replace(calm.terms[0], directions=np.eye(3, 9)),)), MismatchError, "9 wide"),
    ],
)
def test_gguf_refusals(change: Any, error: type[Exception], says: str, tmp_path: Path) -> None:
    vectors = tiny()
    with pytest.raises(error) as caught:
        export_gguf(change(vectors["calm"]), tmp_path / "x.gguf", model=vectors.model)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_gguf_to_a_place_that_cannot_be(tmp_path: Path) -> None:
    vectors = tiny()
    with pytest.raises(AffectlensError, match="cannot write"):
        export_gguf(vectors["calm"], tmp_path, model=vectors.model)


def test_read_gguf_refuses_every_truncation(tmp_path: Path) -> None:
    vectors = tiny()
    whole = export_gguf(vectors["calm"].on(1, 2), tmp_path / "calm.gguf", model=vectors.model).read_bytes()
    cut = tmp_path / "cut.gguf"
    last_value = whole.rindex(np.float32(vectors["calm"].on(1, 2).at_layer(2)[0][0].vector[-1]).tobytes()) + 4
    for size in [*range(0, last_value, 37), last_value - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(FormatError) as caught:
            read_gguf(cut)
        assert "\n" not in str(caught.value)


def _gguf(path: Path, *, architecture: str = "controlvector", **tensors: np.ndarray) -> Path:
    writer = GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name.replace("_", "."), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_read_gguf_of_others(tmp_path: Path) -> None:
    one = np.arange(4, dtype=np.float32)
    assert list(read_gguf(_gguf(tmp_path / "a.gguf", direction_12=one, direction_3=one))) == [3, 12]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"architecture": "llama", "direction_1": np.ones(4, np.float32)}, "architecture 'llama'"),
        ({"direction_0": np.ones(4, np.float32)}, "'direction.0'"),
        ({"direction_x": np.ones(4, np.float32)}, "'direction.x'"),
        ({"other": np.ones(4, np.float32)}, "'other'"),
        ({"direction_1": np.ones(4, np.float16)}, "'direction.1'"),
        ({"direction_1": np.ones((2, 2), np.float32)}, "'direction.1'"),
        ({"direction_1": np.ones(4, np.float32), "direction_2": np.ones(5, np.float32)}, "different widths"),
        ({"direction_1": np.full(4, np.nan, np.float32)}, "not finite"),
        ({}, "no directions"),
    ],
)
def test_read_gguf_refuses_what_is_no_control_vector(content: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=says):
        read_gguf(_gguf(tmp_path / "x.gguf", **content))


def test_read_gguf_refuses_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model, but long enough to look at")
    for path in (tmp_path / "text.gguf", tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(FormatError, match="is not a whole GGUF file"):
            read_gguf(path)


# ------------------------------------------------------------------------------------- the Hub


class FakeHub:
    """Enough of the Hub for a commit and a snapshot: repositories are {path: bytes}, and each commit is kept."""

    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.broken: tuple[int, str] | None = None  # status for everything, and X-Error-Code
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def sha(self, repo: str, revision: str) -> str | None:
        known = {_sha(repo, i): i for i in range(len(self.commits.get(repo, [])))}
        return _sha(repo, len(known) - 1) if revision == "main" and known else revision if revision in known else None

    def files(self, repo: str, sha: str) -> dict[str, bytes]:
        return next(files for i, files in enumerate(self.commits[repo]) if _sha(repo, i) == sha)

    def put(self, repo: str, files: dict[str, bytes], *, private: bool = True) -> None:
        self.commits.setdefault(repo, []).append(files)
        self.private[repo] = private

    def downloaded(self) -> set[str]:
        return {path.rsplit("/", 1)[1] for path in self.requests if "/resolve/" in path}


def _sha(repo: str, index: int) -> str:
    return hashlib.sha1(f"{repo} {index}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        self.hub.requests.append(path)
        if self.hub.broken:
            self.answer({"error": "broken"}, self.hub.broken[0], X_Error_Code=self.hub.broken[1])
        elif path.startswith("/api/models/"):
            self.repository(path.split("/")[3:])
        else:
            owner, name, _, revision, *rest = path.split("/")[1:]
            sha = self.hub.sha(f"{owner}/{name}", revision)
            content = self.hub.files(f"{owner}/{name}", sha)["/".join(rest)] if sha else b""
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha or "")

    def repository(self, parts: list[str]) -> None:
        repo, rest = "/".join(parts[:2]), parts[2:]
        private = self.hub.private.get(repo)
        if private is None or (private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.answer({"error": "Repository not found"}, 401 if private is None else 404, X_Error_Code="RepoNotFound")
        sha = self.hub.sha(repo, "/".join(rest[1:]) or "main")
        if sha is None and self.hub.commits[repo]:
            return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        files = self.hub.files(repo, sha) if sha else {}
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]
            return self.answer(tree)
        self.answer({"id": repo, "sha": sha, "private": private, "siblings": [{"rfilename": p} for p in files]})

    def do_POST(self) -> None:
        body = self.body()
        self.hub.requests.append(self.path)
        if self.hub.broken:
            self.answer({"error": "broken"}, self.hub.broken[0], X_Error_Code=self.hub.broken[1])
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            exists = repo in self.hub.commits
            self.hub.commits.setdefault(repo, [])
            self.hub.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
            self.answer({"url": f"{self.hub.url}/{repo}"}, 409 if exists else 200)
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer({"files": files})
        else:
            repo = "/".join(self.path.split("/")[3:5])
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            self.hub.messages.append(lines[0]["value"]["summary"])
            added = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            before = self.hub.commits[repo][-1] if self.hub.commits[repo] else {}
            gone = {x["value"]["path"] for x in lines if x["key"] == "deletedFile"}
            self.hub.commits[repo].append({path: content for path, content in (before | added).items() if path not in gone})
            oid = _sha(repo, len(self.hub.commits[repo]) - 1)
            self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub of our own with a cache of our own; no token or cache of the machine takes part."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeHub()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def saved(vectors: ConceptVectors, folder: Path) -> dict[str, bytes]:
    vectors.save(folder)
    return {name: (folder / name).read_bytes() for name in FILES}


def refused(*args: Any, call: Any = from_hub, error: type[Exception] = AffectlensError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    return str(caught.value)


def test_push_then_pull(hub: FakeHub, tmp_path: Path) -> None:
    vectors = tiny()
    url = push_to_hub(vectors, "me/emotions", token=TOKEN, endpoint=hub.url)
    assert hub.commits["me/emotions"] == [saved(vectors, tmp_path / "here")]  # byte for byte, and nothing else
    assert hub.private["me/emotions"]
    assert hub.messages == ["Vectors of 3 concepts of org/model"]
    assert_equal(from_hub("me/emotions", token=TOKEN, endpoint=hub.url), vectors)

    push_to_hub(tiny(1), "me/emotions", token=TOKEN, message="better", endpoint=hub.url)
    assert hub.messages[1] == "better"
    assert_equal(from_hub("me/emotions", token=TOKEN, endpoint=hub.url), tiny(1))
    pinned = url.rsplit("/", 1)[1]
    assert_equal(from_hub("me/emotions", revision=pinned, token=TOKEN, endpoint=hub.url), vectors)


def test_push_without_a_namespace_goes_to_ones_own(hub: FakeHub) -> None:
    assert "/me/emotions/commit/" in push_to_hub(tiny(), "emotions", token=TOKEN, endpoint=hub.url)


def test_a_calibration_travels_with_its_vectors_and_goes_with_them(hub: FakeHub) -> None:
    vectors, at = replace(tiny(), model={**tiny().model, "fingerprint": "f00d"}), {"token": TOKEN, "endpoint": hub.url}
    found = Calibration(*vectors.layers[:2], dict.fromkeys(vectors.names, (-0.1, 0.2)), vectors.names, Bounds(), "f00d")
    push_to_hub(vectors.with_calibration(found), "me/calibrated", **at)
    assert from_hub("me/calibrated", **at).calibration == found and hub.downloaded() == {*FILES, "calibration.json"}
    push_to_hub(vectors, "me/calibrated", **at)
    assert set(hub.commits["me/calibrated"][-1]) == set(FILES)  # it belonged to the vectors that were there
    assert from_hub("me/calibrated", **at).calibration is None


def test_push_keeps_other_files(hub: FakeHub) -> None:
    hub.put("me/emotions", {"notes.txt": b"mine"})
    push_to_hub(tiny(), "me/emotions", token=TOKEN, endpoint=hub.url)
    assert set(hub.commits["me/emotions"][-1]) == {*FILES, "notes.txt"}


def test_push_does_not_publish_by_accident(hub: FakeHub) -> None:
    hub.put("me/open", {}, private=False)
    says = refused(tiny(), "me/open", token=TOKEN, endpoint=hub.url, call=push_to_hub)
    assert says == "me/open is public: give private=False (--public) to publish there, or name another"
    assert hub.commits["me/open"] == [{}]
    push_to_hub(tiny(), "me/open", private=False, token=TOKEN, endpoint=hub.url)
    push_to_hub(tiny(), "me/new", private=False, token=TOKEN, endpoint=hub.url)
    assert set(hub.commits["me/open"][-1]) == set(FILES) and hub.private["me/new"] is False


def test_pull_never_downloads_anything_else(hub: FakeHub, tmp_path: Path) -> None:
    bait = {"pytorch_model.bin": b"\x80\x04pickle", "vectors.pkl": b"\x80", "evil.py": b"x", "deep/config.json": b"{}"}
    hub.put("me/emotions", {**bait, **saved(tiny(), tmp_path / "here")}, private=False)
    assert_equal(from_hub("me/emotions", endpoint=hub.url), tiny())
    assert hub.downloaded() == set(FILES)
    assert not any("deep" in path for path in hub.requests)
    names = {file.name for file in (tmp_path / "cache").rglob("*") if "snapshots" in file.parts and not file.is_dir()}
    assert names == set(FILES)


def test_pull_refuses_changed_vectors(hub: FakeHub, tmp_path: Path) -> None:
    files = saved(tiny(), tmp_path / "here")
    files["vectors.safetensors"] = files["vectors.safetensors"][:-1] + b"\x01"
    hub.put("me/tampered", files, private=False)
    says = refused("me/tampered", endpoint=hub.url, error=FormatError)
    assert says.startswith("me/tampered on the Hub: ") and "sha256 differs" in says


@pytest.mark.parametrize("files", [{}, {"config.json": b"{}"}, {"config.json": b"{}", "model.safetensors": b"x", "a.bin": b"x"}])
def test_pull_refuses_other_repositories(files: dict[str, bytes], hub: FakeHub) -> None:
    hub.put("me/model", files, private=False)
    says = refused("me/model", endpoint=hub.url, error=FormatError)
    assert says.startswith("me/model on the Hub holds no affectlens vectors")
    assert hub.downloaded() <= set(FILES)


def test_without_a_network_the_cache_will_do(hub: FakeHub, tmp_path: Path) -> None:
    hub.put("me/emotions", saved(tiny(), tmp_path / "here"), private=False)
    from_hub("me/emotions", endpoint=hub.url)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, but nobody listens
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert_equal(from_hub("me/emotions", endpoint=dead), tiny())
        says = refused("me/other", endpoint=dead)
        assert says.startswith("cannot reach the Hub, and me/other is not in the cache: check the network")
        says = refused(tiny(), "me/emotions", token=TOKEN, endpoint=dead, call=push_to_hub)
        assert "me/emotions" in says and "check the network" in says
    hub.broken = (500, "")
    assert_equal(from_hub("me/emotions", endpoint=hub.url), tiny())


def test_offline_mode(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("me/other", endpoint=hub.url)
    assert "HF_HUB_OFFLINE" in refused(tiny(), "me/other", token=TOKEN, endpoint=hub.url, call=push_to_hub)
    assert hub.requests == []


def test_pull_failures(hub: FakeHub, tmp_path: Path) -> None:
    hub.put("me/secret", saved(tiny(), tmp_path / "here"))
    nothing = "that you may see on the Hub: check the name, or run hf auth login"
    assert nothing in refused("me/missing", endpoint=hub.url)
    assert nothing in refused("me/secret", endpoint=hub.url)
    assert nothing in refused("me/secret", token="hf_wrong", endpoint=hub.url)
    assert "has no revision 'v9': name one of its branches" in refused("me/secret", revision="v9", token=TOKEN, endpoint=hub.url)
    assert "write org/name" in refused("a/b/c", endpoint=hub.url)
    for status, code, says in [
        (401, "", "hf auth login"),
        (403, "GatedRepo", "is gated: accept its conditions"),
        (403, "", "the Hub answered 403, and me/secret is not in the cache: run hf auth login"),
        (404, "RepoNotFound", nothing),
        (500, "", "the Hub answered 500, and me/secret is not in the cache"),
    ]:
        hub.broken = (status, code)
        assert says in refused("me/secret", token=TOKEN, endpoint=hub.url), (status, code)


def test_push_failures(hub: FakeHub) -> None:
    login = "run hf auth login, or set HF_TOKEN to a token with the right to do this"
    assert login in refused(tiny(), "me/x", endpoint=hub.url, call=push_to_hub)
    assert login in refused(tiny(), "me/x", token="hf_wrong", endpoint=hub.url, call=push_to_hub)
    assert "write org/name" in refused(tiny(), "a/b/c", token=TOKEN, endpoint=hub.url, call=push_to_hub)
    for status, says in [(403, login), (404, "answered 404 about me/x"), (500, "answered 500 about me/x: try again later")]:
        hub.broken = (status, "")
        assert says in refused(tiny(), "me/x", token=TOKEN, endpoint=hub.url, call=push_to_hub), status
    assert hub.commits == {}


def test_an_answer_that_is_not_the_hubs(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Handler, "do_GET", lambda self: self.answer(b"<html>log in to the hotel</html>"))
    assert "check the network, HF_ENDPOINT" in refused("me/x", endpoint=hub.url)


# -------------------------------------------------------------------------------- load_vectors


def test_load_vectors_from_a_folder(tmp_path: Path) -> None:
    tiny().save(tmp_path / "run" / "vectors")
    for name in (tmp_path / "run" / "vectors", str(tmp_path / "run")):
        assert_equal(load_vectors(name), tiny())
    for name in ("nowhere", "a/b/c", tmp_path / "none", "../x/y"):
        with pytest.raises(FormatError, match="no vectors in"):
            load_vectors(name)


def test_load_vectors_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    hub.put("me/emotions", saved(tiny(), tmp_path / "here"), private=False)
    hub.put("me/emotions", saved(tiny(1), tmp_path / "there"), private=False)
    script = (
        "from affectlens.exchange import load_vectors\n"
        f"for name in ('me/emotions', 'me/emotions@{_sha('me/emotions', 0)}', 'me/local'):\n"
        "    print(load_vectors(name).norms[0, 0])\n"
    )
    tiny(2).save(tmp_path / "me" / "local")  # what exists here wins
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=clean | settings, capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.split() == [str(tiny(seed).norms[0, 0]) for seed in (1, 0, 2)]
