"""Backends: an endpoint that misbehaves is asked again and never scored as wrong, its key appears
nowhere, and vLLM is given the base and adapter as they were trained."""

import json
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from evals import backends, endpoint, page
from tests.conftest import GPU, run_first
from tests.test_eval import NF4, evaluate, trained, workplace  # noqa: F401
from tools import common, runs, sources, vllm
from tools import subjects as subject_of

KEY = "a-key-that-no-pattern-knows-0123"
KIND = ("application/json", "text/html")


class Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # five, the default, overflow where eight connect at once


class Server:
    """A real HTTP server: it answers with the row's key, unless `misbehave` has answered.

    misbehave: (handler, how many times this prompt was asked before, body) → whether it did.
    """

    def __init__(self):
        self.asked, self.bodies, self.keys, self.under_way, self.most = [], [], [], 0, 0
        self.misbehave = lambda handler, times, body: False
        self.models = ["teacher"]
        self.lock, self.over = threading.Lock(), threading.Event()
        rows = [json.loads(line)["messages"] for line in sources.test_path("fpb").open()]
        self.key = {row[0]["content"]: row[1]["content"] for row in rows}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def reply(self, content, status=200, kind=KIND[0], cut=0, **headers):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body) + cut))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = self.close_connection or bool(cut)

            def do_GET(self):
                self.reply({"object": "list", "data": [{"id": name} for name in outer.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
                with outer.lock:
                    times = outer.asked.count(text)
                    outer.asked.append(text)
                    outer.bodies.append((self.path, body))
                    outer.keys.append(self.headers["Authorization"])
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                try:
                    if not outer.misbehave(self, times, body):
                        self.reply(answered(outer.key[text], "prompt" in body))
                except OSError:
                    pass  # the client has gone
                finally:
                    with outer.lock:
                        outer.under_way -= 1

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def answered(text, completion=False, end="stop"):
    said = {"text": text} if completion else {"message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "x", "choices": [{"index": 0, "finish_reason": end, **said}]}


@pytest.fixture
def server(workplace, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Server()
    yield made
    made.over.set()
    made.http.shutdown()
    made.http.server_close()


def ask(monkeypatch, server, *more, url="", limit=8):
    arguments = ["--backend", "openai", "--base-url", url or server.url, "--model-name", "teacher"]
    evaluate(monkeypatch, *arguments, "--tasks", "fpb", "--limit", limit, *more)


def scored(name="fpb_sample8", model="teacher"):
    return json.loads((runs.RUNS / "endpoint" / model / "evals" / f"{name}.json").read_text())


def all_right(content):
    return [row["answered"] == row["expected"] for row in content["predictions"]] == [True] * 8


# ---- what goes wrong once is asked again

FAULTS = {
    "a rate limit": lambda handler: handler.reply({}, 429, Retry_After="1"),
    "a fault of the server": lambda handler: handler.reply({}, 500),
    "a gateway's page": lambda handler: handler.reply(b"<html>", 502, KIND[1]),
    "a page that says it is fine": lambda handler: handler.reply(b"<html>", 200, KIND[1]),
    "a connection that is cut": lambda handler: handler.reply(b'{"choices": [', cut=100),
    "a connection that is closed": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "JSON that is cut": lambda handler: handler.reply(b'{"choices": [{"ind'),
    "no choices": lambda handler: handler.reply({"choices": []}),
    "no choices at all": lambda handler: handler.reply({"error": {"message": "busy"}}),
    "no text": lambda handler: handler.reply(answered(None)),
    "a filter": lambda handler: handler.reply(answered("I am", end="content_filter")),
    "no end": lambda handler: handler.reply(answered("posi", end=None)),
    "only reasoning": lambda handler: handler.reply(answered("", end="length")),
}


@pytest.mark.parametrize("fault", run_first(3, FAULTS))
def test_a_fault_is_asked_again_and_not_scored(fault, server, monkeypatch):
    def once(handler, times, body):
        if times == 0:
            FAULTS[fault](handler)
        return times == 0

    server.misbehave = once
    ask(monkeypatch, server)
    assert all_right(scored())
    assert scored()["metrics"]["accuracy"]["value"] == 1
    assert len(server.asked) == 16 and len(set(server.asked)) == 8


def test_an_answer_that_does_not_come_is_asked_for_again(server, monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT", 1.0)

    def silent(handler, times, body):
        if times == 0:
            server.over.wait()
            handler.close_connection = True
        return times == 0

    server.misbehave = silent
    ask(monkeypatch, server)
    assert all_right(scored())
    assert len(server.asked) >= 16


def test_the_wait_is_what_the_server_says(server, monkeypatch):
    seen = {}

    def busy(handler, times, body):
        seen.setdefault(body["messages"][0]["content"], []).append(time.monotonic())
        if times == 0:
            handler.reply({}, 429, Retry_After="2")
        return times == 0

    server.misbehave = busy
    ask(monkeypatch, server)
    # The client's own first wait would be half a second at the most.
    assert all(again - first >= 2 for first, again in seen.values())


def test_a_wrong_an_empty_and_a_long_answer_are_answers(server, monkeypatch):
    said = iter([("no idea", "stop"), ("", "stop"), ("positive and so on", "length"), ("x", "eos")])

    def speak(handler, times, body):
        with server.lock:
            text, end = next(said, (None, None))
        if text is not None:
            handler.reply(answered(text, end=end))
        return text is not None

    server.misbehave = speak
    ask(monkeypatch, server)
    assert len(server.asked) == 8
    answers = [row["answer"] for row in scored()["predictions"]]
    assert {"no idea", "", "positive and so on", "x"} <= set(answers)


# ---- what goes on going wrong stops the job


PASSING = ("a rate limit", "a filter")  # a filter refuses a row, not the job


@pytest.mark.parametrize("fault", run_first(3, [name for name in FAULTS if name not in PASSING]))
def test_a_fault_that_stays_stops_the_job_and_the_same_command_goes_on(
    fault, server, monkeypatch, capsys
):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    monkeypatch.setattr(endpoint, "CONCURRENT", 1)
    spoken = []

    def from_the_sixth_on(handler, times, body):
        if len(spoken) == 5:
            FAULTS[fault](handler)
            return True
        spoken.append(body["messages"][0]["content"])
        return False

    server.misbehave = from_the_sixth_on
    with pytest.raises(SystemExit) as stopped:
        ask(monkeypatch, server)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {server.url}") and "the same command continues" in line
    assert not list(runs.RUNS.rglob("fpb*.json"))
    server.asked.clear()
    server.misbehave = lambda handler, times, body: False
    ask(monkeypatch, server)
    assert all_right(scored())
    assert len(server.asked) == 3 and not set(server.asked) & set(spoken)


@pytest.mark.parametrize(
    "status, code", run_first(2, [(401, 2), (402, 1), (403, 2), (404, 2), (405, 1)])
)
def test_what_no_retry_helps_is_asked_once(status, code, server, monkeypatch, capsys):
    monkeypatch.setattr(endpoint, "CONCURRENT", 1)
    refuse = {"error": {"message": "no\nway"}}
    server.misbehave = lambda handler, times, body: handler.reply(refuse, status) or True
    with pytest.raises(SystemExit) as stopped:
        ask(monkeypatch, server)
    assert stopped.value.code == code
    assert len(server.asked) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


REFUSALS = {
    "a prompt that is too long": lambda handler: handler.reply(refuse("context length"), 400),
    "a request that is too large": lambda handler: handler.reply(refuse("too large"), 413),
    "a row that cannot be processed": lambda handler: handler.reply(refuse("no"), 422),
    "a filter": FAULTS["a filter"],
}


def refuse(reason):
    return {"error": {"message": f"{reason}\nfor key {KEY}"}}


@pytest.mark.parametrize("kind", run_first(2, REFUSALS))
def test_a_refused_row_is_no_answer_and_the_others_count(kind, server, monkeypatch, capsys):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    chosen = []

    def refuse_one(handler, times, body):
        with server.lock:
            text = body["messages"][0]["content"]
            chosen[:] = chosen or [text]
        if text == chosen[0]:
            REFUSALS[kind](handler)
        return text == chosen[0]

    server.misbehave = refuse_one
    ask(monkeypatch, server)
    content = scored()
    refused = [row for row in content["predictions"] if "refused" in row]
    assert len(refused) == content["refused_rows"] == 1
    (row,) = refused
    assert row["answer"] == "" and row["values"]["accuracy"] == 0
    assert row["refused"] and "\n" not in row["refused"] and KEY not in row["refused"]
    assert content["metrics"]["accuracy"]["value"] == 7 / 8
    assert "1 rows were refused and count as no answer" in capsys.readouterr().out
    asked = len(server.asked)
    ask(monkeypatch, server)  # the score stands
    assert len(server.asked) == asked


@pytest.mark.parametrize("kind", run_first(1, REFUSALS))
def test_where_every_row_is_refused_the_job_ends_and_keeps_no_refusal(
    kind, server, monkeypatch, capsys
):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    server.misbehave = lambda handler, times, body: REFUSALS[kind](handler) or True
    with pytest.raises(SystemExit) as stopped:
        ask(monkeypatch, server, limit=40)
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()  # the server here complains of clients that go
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert "refuses every row" in line
    assert len(set(server.asked)) < 40  # it is not asked to the end
    server.misbehave = lambda handler, times, body: False
    ask(monkeypatch, server, limit=40)
    assert "refused_rows" in (content := scored("fpb_sample40")) and not content["refused_rows"]


def test_the_last_rows_of_a_job_that_goes_on_may_all_be_refused(server, monkeypatch):
    monkeypatch.setattr(endpoint, "CONCURRENT", 1)
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    answers = iter([False] * 6)

    def stop(handler, times, body):
        return next(answers, None) is None and (handler.reply({}, 500) or True)

    server.misbehave = stop
    with pytest.raises(SystemExit):
        ask(monkeypatch, server)
    server.misbehave = lambda handler, times, body: handler.reply(refuse("no"), 400) or True
    ask(monkeypatch, server)
    assert scored()["refused_rows"] == 2


def test_a_server_that_is_not_there_is_one_line(server, monkeypatch, capsys):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    server.http.server_close()
    with pytest.raises(SystemExit) as stopped:
        ask(monkeypatch, server)
    assert stopped.value.code == 1
    assert "cannot be reached" in capsys.readouterr().err


# ---- secrets


@pytest.mark.parametrize("debug", run_first(1, ["1", ""]))
def test_the_key_and_a_password_appear_nowhere(debug, server, workplace, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setenv("DEBUG", debug)
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    monkeypatch.setattr(endpoint, "CONCURRENT", 1)
    faults = iter([401, 400, 500, 500, 500, 500])  # a refused row does not end a job
    echo = {"error": {"message": f"bad key {KEY}"}}

    def tell(handler, times, body):
        status = next(faults, 0)
        handler.reply(echo if status else answered(f"positive {KEY}"), status or 200)
        return True

    server.misbehave = tell
    for _ in range(3):
        with pytest.raises(SystemExit):
            ask(monkeypatch, server)
    ask(monkeypatch, server)
    assert server.keys[0] == f"Bearer {KEY}"
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    secret = server.url.replace("http://", "http://me:a-password@")
    ask(monkeypatch, server, "--force", url=secret)
    server.http.server_close()
    server.http.shutdown()
    with pytest.raises(SystemExit):
        ask(monkeypatch, server, "--force", url=secret)
    assert scored()["evaluated"]["base_url"] == server.url
    printed = "".join(capfd.readouterr())
    assert server.url in printed
    files = [path.read_text() for path in (workplace / "runs").rglob("*") if path.is_file()]
    for text in (printed, *files):
        assert KEY not in text and "a-password" not in text


# ---- what is sent, and what a score depends on


def test_eight_requests_are_under_way_at_a_time(server, monkeypatch):
    together = threading.Barrier(endpoint.CONCURRENT)  # opens when all stand before it
    server.misbehave = lambda handler, times, body: together.wait(60) < 0
    ask(monkeypatch, server, limit=16)
    assert endpoint.CONCURRENT == 8
    assert server.most == 8 and len(server.asked) == 16


@pytest.mark.parametrize("form", ["chat", "finlora", "bare"])
def test_the_prompt_is_sent_as_a_turn_or_as_it_stands(form, server, monkeypatch):
    if form == "finlora":
        server.key = {f"[INST] {text} [/INST]": key for text, key in server.key.items()}
    ask(monkeypatch, server, "--prompt-format", form)
    name = "fpb_sample8" if form == "chat" else f"fpb_{form}_sample8"
    assert all_right(scored(name)) and scored(name)["evaluated"]["prompt_format"] == form
    path = "/v1/chat/completions" if form == "chat" else "/v1/completions"
    for result, body in server.bodies:
        text = body.pop("prompt", None) or body.pop("messages")[0]["content"]
        assert result == path and text in server.key
        assert body == {"model": "teacher", "temperature": 0, "max_tokens": 10}


def test_a_score_of_an_endpoint_is_kept_until_what_it_depends_on_changes(server, monkeypatch):
    ask(monkeypatch, server)
    evaluated = scored()["evaluated"]
    assert (evaluated["base_url"], evaluated["base_model"]) == (server.url, "teacher")
    assert evaluated["data_sha256"] == sources.manifest(sources.test_path("fpb"))["sha256"]
    ask(monkeypatch, server)
    assert len(server.asked) == 8
    (one,) = page.find_scored()
    assert (one.model, one.method, one.setting) == ("teacher", "endpoint", "as served, 8 rows")
    ask(monkeypatch, server, url=server.url.replace("/v1", "/v2"))
    assert len(server.asked) == 16


def test_the_only_model_of_a_server_needs_no_name(server, monkeypatch, capsys):
    arguments = ["--backend", "openai", "--base-url", server.url, "--model-name", ""]
    arguments += ["--tasks", "fpb", "--limit", 8]
    server.models = ["some/one"]
    evaluate(monkeypatch, *arguments)
    assert all_right(scored(model="some-one"))
    server.models = ["a", "b"]
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert "a, b" in capsys.readouterr().err


def test_a_models_name_leads_out_of_no_folder(workplace):  # noqa: F811
    for name in ("../../x", "/etc/x", "..", ".", "a/../b"):
        file = endpoint.Endpoint("http://h/v1", name, "chat").file("base", "fpb", None)
        assert file.resolve().parent.parent.parent == runs.RUNS / "endpoint"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backend", "gemini"], "BACKEND: 'gemini' is not one of"),
        (["--backend", "openai"], "needs BASE_URL"),
        (["--backend", "openai", "--base-url", "ftp://me:pass@h/v1"], "needs BASE_URL"),
        (["--backend", "openai", "--base-url", "https://h/v1?key=pass"], "needs BASE_URL"),
        (["--backend", "openai", "--base-url", "https://h:port/v1"], "needs BASE_URL"),
        (["--base-url", "https://h/v1"], "go with BACKEND=openai"),
        (["sentiment_r4", "--backend", "openai"], "do not go with BACKEND=openai"),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, *arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "pass" not in line


# ---- vLLM: what it is given; tests/test_vllm.py has what it answers


def test_vllm_gets_the_quantized_base_and_room_for_the_adapter(trained, tiny):  # noqa: F811
    path, _ = trained()
    result = backends.vllm_arguments(subject_of.find(str(path)), GPU)
    assert result["model"] == str(tiny)
    assert result["quantization"] == "bitsandbytes" and result["dtype"] == "bfloat16"
    assert result["enable_lora"] and result["max_lora_rank"] == 8
    result = backends.vllm_arguments(subject_of.find(str(path), precision="fp16"), GPU)
    assert "quantization" not in result and result["dtype"] == "float16"
    base = backends.vllm_arguments(subject_of.find(str(path), base_only=True), GPU)
    assert "enable_lora" not in base


def test_what_vllm_cannot_do_is_told(trained):  # noqa: F811
    path, _ = trained()
    with pytest.raises(common.WrongInput, match="int8"):
        backends.vllm_arguments(subject_of.find(str(path), precision="int8"), GPU)
    small = replace(GPU, ranks=[1, 2])
    with pytest.raises(common.WrongInput, match="no rank over 2, and this one has 4; BACKEND=tr"):
        backends.vllm_arguments(subject_of.find(str(path)), small)


def test_without_vllm_it_is_refused_in_one_line(trained, monkeypatch, capsys, tmp_path):  # noqa: F811
    path, _ = trained()
    monkeypatch.setattr(vllm, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, path, "--backend", "vllm", "--tasks", "fpb", "--limit", 2)
    assert stopped.value.code == 2
    assert "BACKEND=vllm needs vLLM; `make setup-vllm`" in capsys.readouterr().err


def test_a_reply_is_whole_or_nothing():
    for reply in (None, "<html>", SimpleNamespace(choices=["x"]), SimpleNamespace(choices=None)):
        assert endpoint.read_reply(reply)[0] is None
