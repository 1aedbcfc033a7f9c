"""Pushing to a hub of the tests' own."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from running import client_of

from minilm_exp.errors import ExperimentError
from minilm_exp.pipeline import run_experiment
from minilm_exp.pushing import check_push, push
from minilm_exp.stages import Chain

TOKEN = "hf_thisTokenIsNobodys"


class Hub(ThreadingHTTPServer):
    """Takes commits whose files are all in the request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.role, self.status, self.files, self.created, self.commits = "write", 200, {}, [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.server.status != 200 or self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._say({"error": "no"}, max(self.server.status, 401))
        token = {"role": self.server.role}
        self._say({"type": "user", "name": "me", "orgs": [{"name": "us"}],
                   "auth": {"accessToken": token}})  # fmt: skip

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._say({"url": f"{constants.ENDPOINT}/us/student"})
        if self.path == "/api/validate-yaml":
            return self._say({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            plain = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in files]  # fmt: skip
            return self._say({"files": plain})
        if self.server.status != 200:
            return self._say({"error": "full"}, self.server.status)
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        self.server.commits += 1
        self._say({"commitUrl": f"{constants.ENDPOINT}/us/student/commit/1", "commitOid": "1" * 40})

    def _say(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "repository, words",
    [
        ("us/a b", "is no name of a repository"),
        ("us/../etc", "is no name of a repository"),
        ("student", "names no owner: give ORG/NAME"),
        ("others/student", "belongs to me, which may not write for others: use one of me, us"),
    ],
)
def test_wrong_repository(hub, repository, words):
    """A name that the hub refuses after training."""
    with pytest.raises(ExperimentError, match=words):
        check_push(repository)


def test_token_is_checked(hub, monkeypatch):
    """Hours of training for a student that may not be pushed; a token in a message."""
    check_push("us/student")
    hub.role = "read"
    with pytest.raises(ExperimentError, match=r"the token may only read.*hf auth login"):
        check_push("us/student")
    monkeypatch.setenv("HF_TOKEN", "hf_anotherTokenOfNobody")
    with pytest.raises(ExperimentError, match=r"does not accept the token.*HF_TOKEN") as refused:
        check_push("us/student")
    assert "anotherToken" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ExperimentError, match=r"needs a token.*hf auth login.*leave push_to out"):
        check_push("us/student")


def test_hub_is_not_there(hub, monkeypatch):
    """A traceback of the client, or a push tried against the user's will to be offline."""
    hub.status = 503
    with pytest.raises(ExperimentError, match="the hub cannot be asked"):
        check_push("us/student")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExperimentError, match="HF_HUB_OFFLINE forbids"):
        check_push("us/student")


def test_what_is_pushed(hub, tmp_path):
    """A public repository, half a model, or files of this framework's own."""
    for name in ("student/config.json", "student/1_Pooling/config.json", "student/finetuning_key",
                 "exports/onnx/model.onnx", "exports/onnx_int8.partial/model.onnx"):  # fmt: skip
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    url = push("us/student", tmp_path / "student", tmp_path / "exports")
    assert url == f"{constants.ENDPOINT}/us/student/commit/1"
    assert set(hub.files) == {"config.json", "1_Pooling/config.json", "exports/onnx/model.onnx"}
    assert hub.files["exports/onnx/model.onnx"] == b"exports/onnx/model.onnx"
    [created] = hub.created
    assert created.get("visibility") == "private" or created["private"] is True
    assert (created["organization"], created["name"]) == ("us", "student")


def test_run_is_pushed_once(hub, settings_of, monkeypatch, caplog):
    """A push that fails and takes the run with it, is forgotten, or is made again each time."""
    hub.status = 503
    with pytest.raises(ExperimentError, match="the hub cannot be asked"):
        run_experiment(settings_of(None, "push_to=us/student"))
    hub.status = 200
    with monkeypatch.context() as patched:
        patched.setattr("minilm_exp.delivery.push", _broken)
        with pytest.raises(ExperimentError, match="a full disk"):
            run_experiment(settings_of(None, "push_to=us/student"))
    monkeypatch.setattr(Chain, "run", lambda *_: pytest.fail("it is trained again"))
    for _ in range(2):
        result = run_experiment(settings_of(None, "push_to=us/student"))
        assert result.pushed_to == "us/student" and hub.commits == 1
    folder = Path(result.folder)
    assert hub.files["README.md"] == (folder / "student" / "README.md").read_bytes()
    assert hub.files["model.safetensors"] == (folder / "student/model.safetensors").read_bytes()
    tags = client_of(folder.parents[1]).get_run(result.run_id).data.tags
    assert tags["pushed_to"] == f"{constants.ENDPOINT}/us/student/commit/1"
    # The repository then lacks something.
    result = run_experiment(settings_of(None, "export=[torch_int8]"))
    assert result.pushed_to is None
    run_experiment(settings_of(None, "export=[torch_int8]", "push_to=us/student"))
    assert hub.commits == 2 and "exports/torch_int8/model.pt" in hub.files
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)
    assert TOKEN not in caplog.text


def _broken(*_):
    raise ExperimentError("a full disk")
