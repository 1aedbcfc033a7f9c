"""The server, database and artifact store of deploy/, as far as that goes without containers."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest
import yaml
from conftest import REPOSITORY, new_database
from test_run import environment

DEPLOY = REPOSITORY / "deploy"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_ports_are_of_this_machine_only(services):
    """A database that the whole network can reach."""
    ports = [port for service in services.values() for port in service["ports"]]
    assert len(ports) == 2 and all(port.startswith("127.0.0.1:") for port in ports)


def test_no_password_is_given(services):
    """A password that everybody knows, or an empty one that nobody notices."""
    for service in services.values():
        names = [name for name in service["environment"] if "PASSWORD" in name]
        assert names
        for name in names:
            assert re.fullmatch(r"\$\{POSTGRES_PASSWORD:\?.+\}", service["environment"][name])
        assert "assword" not in " ".join(service.get("command", []))
    assert "POSTGRES_PASSWORD=\n" in (DEPLOY / ".env.example").read_text(encoding="utf-8")
    ignored = subprocess.run(["git", "check-ignore", "-q", "deploy/.env"], cwd=REPOSITORY)
    assert ignored.returncode == 0


def test_versions_are_those_of_the_lock(services):
    """A server that is older than its clients, or another one after the next pull."""
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert f"mlflow=={services['mlflow']['image'].split(':')[1]}" in lock
    assert re.fullmatch(r"postgres:\d+\.\d+", services["database"]["image"])
    docker = (DEPLOY / "mlflow.Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"FROM python:3\.11\.\d+-", docker) and "requirements.lock" in docker
    assert all("healthcheck" in service for service in services.values())


@pytest.mark.integration
def test_server_keeps_runs_and_artifacts(services, postgres, tmp_path):
    """A command that MLflow does not know, or artifacts on the disk of whoever sends them."""
    from mlflow import MlflowClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = services["mlflow"]["command"]
    own = {
        "--host": "127.0.0.1",
        "--port": port,
        "--backend-store-uri": new_database(postgres).replace("://", "+psycopg://"),
        "--artifacts-destination": tmp_path / "artifacts",
        "--workers": 1,
    }
    options = dict(option.partition("=")[::2] for option in given[2:])
    assert set(own) <= set(options)
    words = [f"{name}={value}" if value else name for name, value in (options | own).items()]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words], env=environment(), cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health") as answer:
                assert answer.status == 200
                break
            time.sleep(0.2)
        client = MlflowClient(tracking_uri=address)
        run = client.create_run(client.create_experiment("x"))
        client.log_metric(run.info.run_id, "score", 0.5)
        client.log_text(run.info.run_id, "text", "file.txt")
        assert client.get_run(run.info.run_id).data.metrics == {"score": 0.5}
        assert [path.read_text() for path in tmp_path.rglob("file.txt")] == ["text"]
    finally:
        server.terminate()
        server.wait(30)
