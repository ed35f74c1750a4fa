"""Fetching from a real server on loopback that cuts, stalls, truncates, corrupts and refuses."""

import contextlib
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tenacity

from tools import common, sources
from tools.__main__ import main
from tools.data import fetch

Act = Callable[[Any, bytes, int], None]  # (handler, the whole file, first byte asked for)
FPB, FIQA, NER = "test/fpb_test.jsonl", "test/fiqa_test.jsonl", "test/ner_test.jsonl"
TRAIN, MULTI = "train/sentiment_train.jsonl", "train/multi/general_multi.jsonl"


def content(seed, rows=400):
    lines = ({"context": f"{seed} {n}: up or down? Answer:", "target": "up"} for n in range(rows))
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def send(handler, body, status=200, **headers):
    handler.send_response(status)
    for name, value in ({"Content_Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def serve(handler, body, start):
    """As a good server does: with ranges and a strong validator."""
    tag = f'"{hashlib.md5(body).hexdigest()}"'
    if start and handler.headers.get("If-Range", tag) == tag:
        if start >= len(body):
            return send(handler, b"", 416, Content_Range=f"bytes */{len(body)}")
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return send(handler, body[start:], 206, ETag=tag, Content_Range=span)
    send(handler, body, ETag=tag, Accept_Ranges="bytes")


def cut(at):
    """Closes the connection after `at` bytes of the answer."""

    def act(handler, body, start):
        handler.wfile, real = _Cut(handler.wfile, at), handler.wfile
        with contextlib.suppress(ConnectionAbortedError):
            serve(handler, body, start)
        handler.wfile = real
        handler.close_connection = True

    return act


class _Cut:
    """The first write holds the headers; of the second, the body, only a part goes out."""

    def __init__(self, real, at):
        self.real, self.at, self.writes = real, at, 0

    def write(self, data):
        self.writes += 1
        self.real.write(data if self.writes == 1 else data[: self.at])
        self.real.flush()

    def flush(self):
        self.real.flush()


def whole(handler, body, start):
    """A server without ranges."""
    send(handler, body)


def whole_cut(handler, body, start):
    send(handler, body[:1000], Content_Length=str(len(body)))
    handler.close_connection = True


def unsized_cut(handler, body, start):
    """Says no length, so that the end of the connection looks like the end of the file."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body[:1000])
    handler.close_connection = True


def short(handler, body, start):
    send(handler, body[:-100])


def corrupt(handler, body, start):
    send(handler, body[:50] + b"~" + body[51:])


def html(handler, body, start):
    send(handler, b"<html>log in</html>", Content_Type="text/html; charset=utf-8")


def disguised(handler, body, start):
    send(handler, b"\n<!DOCTYPE html><html>log in</html>", Content_Type="text/plain")


def pointer(handler, body, start):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n"
    send(handler, text.encode())


def answer(status, **headers):
    return lambda handler, body, start: send(handler, b"", status, **headers)


class Site:
    """The server: its files, what it does to the next requests of a path, and who asked what."""

    def __init__(self, raw, monkeypatch, capsys):
        self.raw, self.monkeypatch, self.capsys = raw, monkeypatch, capsys
        self.files = {path: content(n) for n, path in enumerate([FPB, FIQA, NER, TRAIN, MULTI])}
        self.next: dict[str, list[Act]] = {}
        self.always: dict[str, Act] = {}
        self.requests: list[tuple[str, str, str]] = []  # path, Range, If-Range
        self.released = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = self.path.removeprefix("/finlora/data/")
                span = self.headers.get("Range", "")
                site.requests.append((path, span, self.headers.get("If-Range", "")))
                if path not in site.files:
                    return send(self, b"", 404)
                queue = site.next.get(path)
                act = queue.pop(0) if queue else site.always.get(path, serve)
                start = int(span.removeprefix("bytes=").removesuffix("-") or 0)
                with contextlib.suppress(ConnectionError):
                    act(self, site.files[path], start)

            def handle(self):
                with contextlib.suppress(ConnectionError):  # the client went away
                    super().handle()

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.02])
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/finlora"

    def fetch(self, tasks=""):
        """`python -m tools fetch TASKS`: its exit status, stdout and stderr."""
        self.monkeypatch.setattr(sys, "argv", ["tools", "fetch", tasks])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        return status, *self.capsys.readouterr()

    def fetch_right(self, tasks="sentiment"):
        """A fetch that succeeds and puts every file of the tasks in place."""
        assert self.fetch(tasks)[0] == 0
        for path in fetch.list_paths([task.strip() for task in tasks.split(",") if task]):
            assert (fetch.RAW / path).read_bytes() == self.files[path]

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def stall(self, at):
        """Sends `at` bytes of the whole file and then nothing until the test is over."""

        def act(handler, body, start):
            send(handler, body[:at], Content_Length=str(len(body)))
            handler.wfile.flush()
            self.released.wait()

        return act

    def count_requests(self, path):
        return sum(name == path for name, _, _ in self.requests)

    def table(self):
        files: dict[str, Any] = {}
        for path, body in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            files[path] = {"blob": blob, "bytes": len(body), "origins": ["news"]}
        files[NER] = {"blob": files[NER]["blob"], "origins": ["bench"]}  # no size known
        sha = hashlib.sha256(self.files[MULTI]).hexdigest()
        files[MULTI] |= {"sha256": sha, "origins": ["news", "bench"]}
        files["test/exam_test.jsonl"] = {"published": False, "origins": ["exam"]}
        own = {"name": "", "attribution": "its authors", "url": "https://example.org"}
        return {
            "repository": "https://github.com/Open-Finance-Lab/FinLoRA",
            "commit": "7e1cf82803aa56a5f698d71e1528395e16b21093",
            "collection": own | {"name": "FinLoRA", "licence": "OpenMDW-1.0", "commercial": True},
            "datasets": {
                "fpb": {"file": FPB}, "fiqa": {"file": FIQA},
                "ner": {"file": NER}, "exam": {"file": "test/exam_test.jsonl"},
            },
            "tasks": {
                "sentiment": {"train": TRAIN, "eval": ["fpb", "fiqa"]},
                "ner": {"train": NER, "eval": ["ner"]},
                "general": {"train": MULTI, "eval": ["ner"]},
                "exam": {"train": "test/exam_test.jsonl", "eval": ["exam"]},
            },
            "files": files,
            "origins": {
                "news": own | {"name": "News", "licence": "MIT", "commercial": True},
                "bench": own | {"name": "Bench", "licence": "CC-BY-NC-4.0", "commercial": False},
                "exam": own
                | {"name": "Exam", "licence": None, "commercial": None, "note": "copyright"},
            },
        }  # fmt: skip


@pytest.fixture
def site(tmp_path, monkeypatch, capsys):
    """A mirror with five files; nothing is fetched yet and no try waits for the next."""
    site = Site(tmp_path / "raw", monkeypatch, capsys)
    table = site.table()
    monkeypatch.setattr(fetch, "tables", lambda: table)
    monkeypatch.setattr(fetch, "RAW", site.raw)
    monkeypatch.setattr(fetch, "BACKOFF", 0.0)
    monkeypatch.setenv("FINLORA_BASE_URL", site.url)
    monkeypatch.setenv("FINLORA_DATA", "")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield site
    site.close()


def list_files(site):
    """What lies in the folder, but for the lock."""
    return sorted(
        str(path.relative_to(site.raw))
        for path in site.raw.rglob("*")
        if path.is_file() and path.name != ".lock"
    )


def test_every_file_lands_in_finloras_layout_and_is_never_fetched_twice(site):
    assert site.fetch()[0] == 0
    assert list_files(site) == sorted(site.files)
    for path, body in site.files.items():
        assert (site.raw / path).read_bytes() == body
    assert sorted(path for path, _, _ in site.requests) == sorted(site.files)
    status, out, _ = site.fetch()
    assert status == 0 and len(site.requests) == 5
    assert out.count("verified") == 5 and "fetched" not in out


def test_a_task_fetches_what_it_trains_on_and_is_scored_on(site):
    site.fetch_right()
    assert list_files(site) == sorted([FPB, FIQA, TRAIN])
    assert site.fetch("general, ner")[0] == 0
    assert list_files(site) == sorted(site.files)


def test_an_unknown_task_is_named_with_its_neighbour_and_nothing_is_asked(site):
    status, _, err = site.fetch("sentmient")
    assert status == 2 and err == 'error: unknown task "sentmient"; did you mean sentiment?\n'
    assert not site.requests


def test_a_cut_connection_is_resumed_at_the_byte_and_only_of_the_same_file(site):
    site.next[TRAIN] = [cut(5000), cut(2000)]
    site.fetch_right()
    tag = f'"{hashlib.md5(site.files[TRAIN]).hexdigest()}"'
    ranges = [(range_, tag_) for path, range_, tag_ in site.requests if path == TRAIN]
    assert ranges == [("", ""), ("bytes=5000-", tag), ("bytes=7000-", tag)]


def older(handler, body, start):
    """Another version of the file, cut off."""
    cut(5000)(handler, content(99), start)


def another_range(handler, body, start):
    span = f"bytes 0-{len(body) - 1}/{len(body)}"
    send(handler, body[: len(body) - start], 206, Content_Range=span)


@pytest.mark.parametrize(
    ("acts", "count"),
    [
        ([answer(429), answer(500)], 3),
        ([answer(503)], 2),
        ([whole_cut, unsized_cut, whole], 3),
        ([older], 2),
        ([cut(5000), another_range, another_range], 3),
        ([cut(1500)] * (fetch.TRIES + 3), fetch.TRIES + 4),  # bytes are gained each time
    ],
    ids=["busy", "overloaded", "without ranges", "changed", "another range", "many cuts"],
)
def test_a_disturbed_download_ends_right(site, acts, count):
    site.next[TRAIN] = list(acts)
    site.fetch_right()
    assert site.count_requests(TRAIN) == count


def test_a_server_that_always_cuts_at_the_same_byte_is_given_up(site):
    site.always[FPB] = whole_cut
    status, _, err = site.fetch("sentiment")
    assert status == 1 and site.count_requests(FPB) == fetch.TRIES
    assert err == (
        f"error: {FPB}: the connection was cut ({site.url}/data/{FPB}, 1,000 bytes are kept); "
        "the same command continues from here\n"
    )
    assert list_files(site) == sorted([FIQA, f"{FPB}.part", TRAIN])
    del site.always[FPB]
    site.fetch_right()
    assert site.requests[-1] == (FPB, "bytes=1000-", "")
    assert list_files(site) == sorted([FIQA, FPB, TRAIN])


def test_what_another_version_left_half_done_is_fetched_anew(site):
    for stale in (content(99)[:3000], content(99), content(99, 900)):
        part = site.raw / f"{FPB}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(stale)
        (site.raw / FPB).unlink(missing_ok=True)
        site.fetch_right()
        assert not part.exists()


def test_a_complete_part_is_verified_and_put_in_place(site):
    part = site.raw / f"{FPB}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(site.files[FPB])
    site.fetch_right()
    assert site.count_requests(FPB) == 1 and list_files(site) == sorted([FIQA, FPB, TRAIN])


def test_a_torn_copy_in_place_is_completed_and_a_changed_one_replaced(site):
    (site.raw / "test").mkdir(parents=True)
    (site.raw / FPB).write_bytes(site.files[FPB][:4000])
    (site.raw / FIQA).write_bytes(site.files[FIQA].replace(b"down", b"DOWN"))
    site.fetch_right()
    assert (FPB, "bytes=4000-", "") in site.requests
    assert (site.raw / FIQA).read_bytes() == site.files[FIQA]


def test_a_stalled_answer_is_asked_again(site, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    site.next[TRAIN] = [site.stall(3000)]
    site.fetch_right()
    assert (TRAIN, "bytes=3000-", "") in site.requests
    assert (site.raw / TRAIN).read_bytes() == site.files[TRAIN]


def test_a_server_that_is_not_there_is_one_line(site, monkeypatch):
    monkeypatch.setenv("FINLORA_BASE_URL", "http://127.0.0.1:1/x")
    status, _, err = site.fetch("sentiment")
    assert status == 1 and err.count("no connection: [Errno 111] Connection refused") == 3
    assert list_files(site) == []


def test_a_redirection_is_followed_and_one_without_an_end_is_one_line(site):
    site.next[FPB] = [answer(302, Location=f"{site.url}/data/{FPB}")]
    site.fetch_right()
    assert site.count_requests(FPB) == 2
    (site.raw / FPB).unlink()
    site.always[FPB] = answer(302, Location=f"{site.url}/data/{FPB}")
    status, _, err = site.fetch("sentiment")
    assert status == 1 and f"{FPB}: redirected without an end" in err
    assert list_files(site) == sorted([FIQA, TRAIN])


def test_retry_after_is_kept_to(site, monkeypatch):
    # Without it the second try would come after a quarter of an hour at the earliest.
    monkeypatch.setattr(fetch, "BACKOFF", 1800.0)
    monkeypatch.setattr(fetch, "LONGEST_BACKOFF", 1800.0)
    site.next[FPB] = [answer(429, Retry_After="0")]
    site.fetch_right()
    began = time.monotonic()
    site.next[FPB] = [answer(429, Retry_After="1")]
    (site.raw / FPB).unlink()
    site.fetch_right()
    assert time.monotonic() - began >= 1


def test_a_server_that_asks_for_an_hour_is_not_waited_for(site):
    site.next[FPB] = [answer(429, Retry_After="3600")]
    status, _, err = site.fetch("sentiment")
    assert status == 1 and "the server answers 429; it asks to wait 3600 s" in err


def test_the_time_between_tries_doubles_up_to_a_limit_and_varies():
    def wait(tries, error):
        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = tries
        state.set_exception((type(error), error, None))
        return fetch.choose_wait(state)

    cut_off = fetch.RetryableError("the connection was cut")
    for tries, longest in [(1, 1), (2, 2), (3, 4), (5, 16), (9, fetch.LONGEST_BACKOFF)]:
        times = {wait(tries, cut_off) for _ in range(50)}
        assert len(times) > 1 and longest / 2 <= min(times) <= max(times) <= longest
    assert wait(1, fetch.RetryableError("busy", 7)) == 7


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (answer(404), "404, not found: "),
        (answer(403), "403, access denied: "),
        (answer(418), "the server answers 418: "),
        (html, "an HTML page in place of the file"),
        (disguised, "an HTML page in place of the file"),
        (pointer, "a Git LFS pointer in place of the file"),
        (corrupt, "wrong checksum: git blob SHA-1 "),
        (short, "wrong size: "),
        (lambda h, body, start: send(h, body + b"more"), "wrong size: "),
        (lambda h, body, start: send(h, b""), "wrong size: 0 bytes"),
    ],
)
def test_what_is_not_the_file_is_one_line_and_leaves_nothing_and_is_asked_for_once(
    site, act, message
):
    site.always[FPB] = act
    status, _, err = site.fetch("sentiment")
    assert status == 1 and err.startswith(f"error: {FPB}: {message}") and err.count("\n") == 1
    assert list_files(site) == sorted([FIQA, TRAIN])
    assert site.count_requests(FPB) == 1


def test_an_error_page_does_not_cost_what_was_already_fetched(site):
    site.next[FPB] = [cut(5000), html]
    assert "an HTML page" in site.fetch("sentiment")[2]
    assert (site.raw / f"{FPB}.part").read_bytes() == site.files[FPB][:5000]
    site.fetch_right()


def test_a_file_of_unknown_size_is_verified_all_the_same(site):
    site.next[NER] = [short]
    assert "wrong checksum: git blob SHA-1" in site.fetch("general")[2]
    assert not (site.raw / NER).exists()
    site.fetch_right("general")


def test_a_file_in_git_lfs_is_verified_by_its_sha256(site):
    site.next[MULTI] = [corrupt]
    assert "wrong checksum: SHA-256" in site.fetch("general")[2]
    site.fetch_right("general")


def test_an_answer_without_an_end_is_cut_off(site, monkeypatch):
    monkeypatch.setattr(fetch, "LARGEST", 2**20)
    sizes = []

    def endless(handler, body, start):
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        while not site.released.is_set():
            handler.wfile.write(b"x" * 2**16)
            sizes.append(2**16)

    site.always[NER] = endless
    status, _, err = site.fetch("general")
    assert status == 1 and "wrong checksum" in err and list_files(site) == [MULTI]
    assert sum(sizes) < 2**25


def test_when_several_fail_the_others_are_fetched_and_every_failure_is_named(site):
    site.always[FPB], site.always[TRAIN] = answer(404), html
    status, out, err = site.fetch()
    assert status == 1 and list_files(site) == sorted([FIQA, NER, MULTI])
    lines = err.splitlines()
    assert lines[0].startswith(f"error: {FPB}: 404") and lines[1].startswith(
        f"error: {TRAIN}: an H"
    )
    assert lines[2:] == ["error: 2 of 5 files failed, the others are right"]
    assert out.count("fetched, verified") == 3


def test_a_task_of_files_that_are_not_finloras_is_refused(site):
    table = fetch.tables()
    table["datasets"]["own"] = {"file": "/home/me/own.jsonl"}
    table["tasks"]["own"] = {"train": TRAIN, "eval": ["own"]}
    status, _, err = site.fetch("own")
    assert status == 2 and err.startswith("error: /home/me/own.jsonl is no file of FinLoRA")
    assert not site.requests


def test_files_come_side_by_side(site):
    together = threading.Barrier(3, timeout=20)

    def act(handler, body, start):
        together.wait()
        serve(handler, body, start)

    for path in (FPB, FIQA, TRAIN):
        site.next[path] = [act]
    site.fetch_right()
    assert not together.broken


@pytest.mark.parametrize(
    "path",
    ["../evil.jsonl", "test/../../evil", "/tmp/evil", "test//x", "te st", ".git/config",
     "test/.x", "a\\b", "x\n", "", "test/\x1b[31m", "C:/x", "~/x", "test/"],
)  # fmt: skip
def test_a_hostile_path_in_the_table_is_refused_before_anything_is_asked(site, path):
    fetch.tables()["files"][path] = fetch.tables()["files"][FPB]
    status, _, err = site.fetch()
    assert status == 2 and "is no path inside of a folder" in err and err.count("\n") == 1
    assert not site.requests and not site.raw.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blob": "d41d8cd9"}, "no checksum of 40 digits"),
        ({"blob": None}, "no checksum of 40 digits"),
        ({"bytes": -1}, "has -1 bytes"),
        ({"bytes": "many"}, "has 'many' bytes"),
    ],
)
def test_a_row_of_the_table_without_a_checksum_is_refused(site, change, message):
    fetch.tables()["files"][FPB] |= change
    status, _, err = site.fetch()
    assert status == 2 and message in err and not site.requests


def test_a_full_disk_is_one_line_and_the_next_call_goes_on(site, monkeypatch):
    small = site.raw.parent / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    try:
        monkeypatch.setattr(fetch, "RAW", small / "raw")
        big = content(7, 20_000)
        site.files[TRAIN] = big
        table = site.table()
        monkeypatch.setattr(fetch, "tables", lambda: table)
        status, _, err = site.fetch("sentiment")
        assert status == 1 and err.count("\n") <= 4
        assert f"error: {TRAIN}: no space left on the disk for {small}/raw/{TRAIN}" in err
        assert not (small / "raw" / TRAIN).exists()
        part = small / "raw" / f"{TRAIN}.part"
        assert big.startswith(part.read_bytes()) and part.stat().st_size > 0
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        site.fetch_right()
        assert (small / "raw" / TRAIN).read_bytes() == big
        assert any(path == TRAIN and range_ for path, range_, _ in site.requests)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def start(site, **options):
    """The command in a process of its own."""
    script = (
        "import json, sys; from pathlib import Path; from tools.data import fetch\n"
        "from tools.__main__ import main\n"
        "raw, table, task = sys.argv[1:]; table = json.loads(table)\n"
        "fetch.RAW, fetch.tables = Path(raw), lambda: table\n"
        "sys.argv = ['tools', 'fetch', task]\n"
        "main()\n"
    )
    task = options.pop("task", "sentiment")
    arguments = [sys.executable, "-c", script, str(site.raw), json.dumps(site.table()), task]
    return subprocess.Popen(arguments, cwd=common.ROOT, **options)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fetch_ends_at_once_and_the_next_one_resumes_it(site, how):
    site.files[TRAIN] = content(3, 8000)
    part = site.raw / f"{TRAIN}.part"
    site.next[TRAIN] = [site.stall(200_000)]
    process = start(site, stderr=subprocess.PIPE)
    # What the last chunk leaves in the file's buffer is not on the disk yet.
    wait_for(lambda: part.exists() and part.stat().st_size > 100_000)
    began = time.monotonic()
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < fetch.TIMEOUT / 2  # it does not wait for the answer
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err == b"error: interrupted; the same command continues from here\n"
    size = part.stat().st_size
    assert not (site.raw / TRAIN).exists() and site.files[TRAIN].startswith(part.read_bytes())
    again = start(site, stderr=subprocess.PIPE)
    assert again.wait(60) == 0
    assert size and (TRAIN, f"bytes={size}-", "") in site.requests
    assert (site.raw / TRAIN).read_bytes() == site.files[TRAIN]


def test_a_second_fetch_into_the_same_folder_is_kept_out(site):
    site.next[TRAIN] = [site.stall(1000)]
    process = start(site)
    wait_for(lambda: site.count_requests(TRAIN) == 1)
    status, _, err = site.fetch("sentiment")
    process.kill()
    process.wait()
    assert status == 1 and err == f"error: another fetch is at work in {site.raw}\n"
    site.fetch_right()


def test_a_large_file_takes_no_more_memory_than_a_small_one(site):
    def peak(size):
        site.files[NER] = bytes(size)
        (site.raw / NER).unlink(missing_ok=True)
        process = start(site, task="general", stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0 and (site.raw / NER).stat().st_size == size
        return usage.ru_maxrss * 1024

    assert peak(100 * 2**20) - peak(1000) < 15 * 2**20


def test_a_terminal_shows_one_progress_bar_in_bytes_and_a_log_none(site):
    site.files[TRAIN] = content(3, 20_000)
    outer, inner = pty.openpty()
    process = start(site, stderr=inner, stdout=subprocess.PIPE, env=os.environ | {"TERM": "xterm"})
    os.close(inner)
    output = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(outer, 4096):
            output += chunk
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and b"fetched, verified" in out and b"\x1b" not in out
    total = sum(len(site.files[path]) for path in (FPB, FIQA, TRAIN)) / 1e6
    assert f"/{total:.1f} MB".encode() in output


def test_a_copy_in_finlora_data_is_verified_where_it_lies(site, tmp_path, monkeypatch):
    copy = tmp_path / "checkout"
    for path in (FPB, FIQA, TRAIN):
        (copy / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / "data" / path).write_bytes(site.files[path])
    monkeypatch.setenv("FINLORA_DATA", str(copy))
    status, out, _ = site.fetch("sentiment")
    assert status == 0 and out.count(" verified") == 3 and f"from {copy}/data" in out
    (copy / "data" / FPB).write_bytes(b"mine\n")
    (copy / "data" / FIQA).unlink()
    status, _, err = site.fetch("sentiment")
    assert status == 1
    assert f"error: {FPB}: wrong size: 5 bytes, not {len(site.files[FPB]):,}\n" in err
    assert f"error: {FIQA}: not in {copy}/data\n" in err
    assert (copy / "data" / FPB).read_bytes() == b"mine\n"  # the user's own is not touched
    assert not site.requests and not site.raw.exists()
    monkeypatch.setenv("FINLORA_DATA", str(tmp_path))
    assert site.fetch("sentiment")[0] == 2


def test_a_folder_serves_as_a_mirror(site, tmp_path, monkeypatch):
    mirror = tmp_path / "a mirror"
    for path in (FPB, TRAIN):
        (mirror / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        (mirror / "data" / path).write_bytes(site.files[path])
    monkeypatch.setenv("FINLORA_BASE_URL", mirror.as_uri())
    status, _, err = site.fetch("sentiment")
    assert status == 1 and err == f"error: {FIQA}: not found: {mirror}/data/{FIQA}\n"
    assert list_files(site) == sorted([FPB, TRAIN])
    (mirror / "data" / FIQA).write_bytes(site.files[FIQA][:500])
    assert "wrong size: 500 bytes" in site.fetch("sentiment")[2]
    (mirror / "data" / FIQA).write_bytes(site.files[FIQA])
    site.fetch_right()
    assert not site.requests


@pytest.mark.parametrize(
    "base",
    ["ftp://example.org", "example.org", "/srv/mirror", "file:mirror", "file://mirror", "http://",
     "http://x:port", "http://[::1", "https://x/?a=1", "https://x/#a", "http://x\n"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(site, base, monkeypatch):
    monkeypatch.setenv("FINLORA_BASE_URL", base)
    status, _, err = site.fetch("sentiment")
    assert status == 2 and "is no address" in err and err.count("\n") == 1


def test_a_password_in_the_address_reaches_the_server_and_no_message(site, monkeypatch):
    seen = []

    def act(handler, body, start):
        seen.append(handler.headers.get("Authorization"))
        send(handler, b"", 403)

    for path in (FPB, FIQA, TRAIN):
        site.always[path] = act
    for user in ("reader:secret-word", "secret-word"):
        monkeypatch.setenv("FINLORA_BASE_URL", site.url.replace("//", f"//{user}@"))
        status, out, err = site.fetch("sentiment")
        assert status == 1 and "403" in err and "secret-word" not in out + err
    assert len(seen) == 6 and all(header.startswith("Basic ") for header in seen)


def test_licences_are_printed_of_what_is_there_and_non_commercial_ones_say_so(site):
    out = site.fetch("sentiment")[1]
    assert "licence    News: MIT; its authors; https://example.org\n" in out
    assert "licence    FinLoRA: OpenMDW-1.0" in out and "Bench" not in out
    assert (
        "licence    Bench: CC-BY-NC-4.0, NON-COMMERCIAL use only; its" in site.fetch("general")[1]
    )
    site.always[NER] = answer(404)
    (site.raw / NER).unlink()
    (site.raw / MULTI).unlink()
    site.always[MULTI] = answer(404)
    assert "licence" not in site.fetch("general")[1]


def test_the_exams_are_brought_by_the_user_and_their_shape_is_checked(site):
    status, out, _ = site.fetch("exam")
    own = site.raw / "test" / "exam_test.jsonl"
    assert status == 0 and f"put your own at {own}\n" in out and '{"context": <prompt>' in out
    own.parent.mkdir(parents=True)
    own.write_text('\ufeff{"context": "Which? A. x B. y", "target": "B. y"}\n\n')
    status, out, _ = site.fetch("exam")
    assert status == 0 and "yours, 1 rows" in out and "ask before commercial use" in out
    own.write_text('{"context": "Which?", "target": "B. y"}\n{"question": "Which?"}\n')
    status, _, err = site.fetch("exam")
    assert status == 1 and f'{own}, line 2: the key "context" is missing' in err
    own.write_text("\n")
    assert "holds no rows" in site.fetch("exam")[2]
    assert own.exists() and not site.requests


def test_every_file_of_every_dataset_and_task_has_a_row_with_its_origin():
    table = sources.tables()
    named = {row["file"] for row in table["datasets"].values()}
    named |= {row["train"] for row in table["tasks"].values()}
    assert named <= set(table["files"])
    assert set(fetch.list_paths([])) == set(table["files"])
    assert {MULTI, FPB, NER} <= set(fetch.list_paths(["general_multi"]))
    for path in table["files"]:
        file = fetch.look_up(path)
        for origin in fetch.list_origins([path]):
            assert origin["name"] and origin["attribution"]
            assert origin["url"].startswith("https://")
            assert origin["commercial"] in (True, False, None)
            assert (origin["licence"] is None) == (origin["commercial"] is None)
            assert origin["licence"] or origin["note"]
            assert ("-NC-" in (origin["licence"] or "")) == (origin["commercial"] is False)
        if file is None:
            assert set(table["files"][path]["origins"]) <= {"exams", "tfns"}
    assert table["origins"]["financebench"]["commercial"] is False
    repair = table["datasets"]["tfns"]["repair"]["blob"]
    assert repair == table["files"]["test/tfns_test.jsonl"]["blob"]


def test_without_a_mirror_files_are_asked_of_github_at_the_pinned_commit():
    base, commit = "Open-Finance-Lab/FinLoRA", sources.tables()["commit"]
    plain, lfs = fetch.look_up(FPB), fetch.look_up(MULTI)
    assert plain and lfs and not plain.lfs and lfs.lfs and len(commit) == 40
    raw = f"https://raw.githubusercontent.com/{base}/{commit}/data/{FPB}"
    media = f"https://media.githubusercontent.com/media/{base}/{commit}/data/{MULTI}"
    assert (fetch.build_url(plain, None), fetch.build_url(lfs, None)) == (raw, media)


@pytest.mark.skipif(not os.environ.get("FINLORA_DATA"), reason="FINLORA_DATA is not set")
def test_finloras_own_files_are_right_and_git_names_them_the_same():
    folder = Path(os.environ["FINLORA_DATA"]) / "data"
    there = [path for path in sources.tables()["files"] if (folder / path).is_file()]
    assert there
    for path in there:
        file = fetch.look_up(path)
        if file is None:
            continue
        assert fetch.find_fault(folder / path, file) is None
        if not file.lfs:
            git = ["git", "hash-object", "--no-filters", str(folder / path)]
            assert subprocess.check_output(git, text=True).strip() == file.digest
