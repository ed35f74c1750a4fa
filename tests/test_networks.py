"""Networks that are not open: a proxy, a mirror of the Hub, and none at all."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import run, serve_files, write_recipe
from tests.hub_server import Hub
from tools import common, sources
from tools.data import fetch

# Appended to by every Python process of a job: hosts that it looks up or connects to.
WATCH = """
import os, sys

def watch(event, args):
    host = None
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    if isinstance(host, bytes):
        host = host.decode()
    if host and host not in ("localhost", "::1", "0.0.0.0", "::") and not host.startswith("127."):
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{host} {sys.argv}\\n")

sys.addaudithook(watch)
"""


class Proxy:
    """An HTTP proxy on loopback that knows the way to some hosts; `hosts` are those asked for."""

    def __init__(self, routes: dict[str, str]):
        self.hosts: list[str] = []
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                proxy.hosts.append(parts.netloc)
                inner = urlsplit(routes[parts.netloc])
                target = parts._replace(scheme="http", netloc=inner.netloc).geturl()
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                request = urllib.request.Request(target, headers=headers, method=self.command)
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)
                try:
                    reply = opener.open(request)
                except urllib.error.HTTPError as error:
                    reply = error
                body = reply.read()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: object) -> None:
        return None


@pytest.fixture
def no_network():
    """Skips where this machine gives no network namespaces."""
    probe = subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this machine gives no network namespaces")


@pytest.fixture
def proxied(monkeypatch):
    """Takes the variables of a proxy out of the environment, which tests then set."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return lambda proxy: monkeypatch.setenv("HTTP_PROXY", proxy.url)


def test_files_are_fetched_by_way_of_a_proxy(tmp_path, proxied):
    folder = tmp_path / "web"
    content = b'{"context": "Is it good?", "target": "Yes"}\n'
    (folder / "data" / "test").mkdir(parents=True)
    (folder / "data" / "test" / "fpb_test.jsonl").write_bytes(content)
    sha = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    published = fetch.PublishedFile("test/fpb_test.jsonl", sha, lfs=False, size=None)
    with serve_files(folder) as url:
        proxy = Proxy({"mirror.example": url})
        proxied(proxy)
        assert fetch.download_all([published], tmp_path / "raw", "http://mirror.example") == {}
    assert (tmp_path / "raw" / "test" / "fpb_test.jsonl").read_bytes() == content
    assert set(proxy.hosts) == {"mirror.example"}


def test_a_mirror_of_the_hub_is_asked_by_way_of_a_proxy(tmp_path, proxied):
    with Hub() as hub:
        proxy = Proxy({"hub.example": hub.url})
        proxied(proxy)
        own = {"HF_ENDPOINT": "http://hub.example", "HF_TOKEN": hub.user("me")}
        done = run("adapters", "--namespace", "me", HF_HOME=str(tmp_path), **own)
    assert done.returncode == 0, done.stderr
    assert set(proxy.hosts) == {"hub.example"}


def isolated(*arguments: object, connections: Path) -> subprocess.CompletedProcess[str]:
    """Runs `python -m …` in a network namespace that has a loopback device and no route."""
    watch = connections.parent / "watch"
    watch.mkdir(exist_ok=True)
    (watch / "sitecustomize.py").write_text(WATCH)
    online = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {
        k: v for k, v in os.environ.items() if k not in online and "proxy" not in k.lower()
    }
    environment |= {"PYTHONPATH": str(watch), "CONNECTIONS": str(connections)}
    environment |= {"HF_HOME": str(connections.parent / "hf")}
    program = [sys.executable, "-m", *map(str, arguments)]
    script = 'ip link set lo up 2>/dev/null; exec "$@"'
    return subprocess.run(
        ["unshare", "--net", "--map-root-user", "sh", "-c", script, "sh", *program],
        cwd=common.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_training_scoring_and_chat_without_a_network_try_no_connection(
    no_network, tiny, chat_rows, tmp_path
):
    connections = tmp_path / "connections"
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, max_steps=2, save_steps=2, eval_steps=2)
    done = isolated("tools", "train", recipe, connections=connections)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "r4" / "run.json").read_text())["steps"] == 2
    done = isolated("tools", "chat", recipe, "Is the sentiment positive?", connections=connections)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not connections.exists(), connections.read_text()
    if not sources.test_path("fpb").is_file():
        pytest.skip("trained and chatted; fpb is not converted here, so nothing is scored")
    arguments = ("--adapter", tmp_path / "r4", "--tasks", "fpb", "--limit", 2)
    done = isolated("tools", "eval", *arguments, connections=connections)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not connections.exists(), connections.read_text()


def test_the_watch_of_these_tests_sees_a_connection(no_network, tmp_path):
    connections = tmp_path / "connections"
    code = tmp_path / "watch" / "asks.py"
    code.parent.mkdir()
    code.write_text(
        "import urllib.request\ntry:\n    urllib.request.urlopen('http://hub.example')\n"
        "except OSError:\n    pass\n"
    )
    isolated("asks", connections=connections)
    assert "hub.example" in connections.read_text()
