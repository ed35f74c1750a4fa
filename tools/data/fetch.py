"""Fetches FinLoRA's files at the pinned commit of data/sources.yaml and verifies every one.

    python -m tools.data.fetch                  every file
    python -m tools.data.fetch sentiment,ner    what these tasks train on and are scored on

Files land in data/raw/train/… and data/raw/test/…, under a temporary name until their checksum is
right. What was cut off is resumed, by this call or by the next one; a file that is there and right
is not fetched again. FINLORA_BASE_URL names a mirror (http, https or file:) with the layout of
FinLoRA's repository. With FINLORA_DATA nothing is fetched: that copy is verified where it lies.
"""

import fcntl
import os
import queue
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tools.common import JobFailed, WrongInput, digest, explain, git_blob, nearest, shown
from tools.data.rows import batches
from tools.sources import RAW, folders, tables

if TYPE_CHECKING:
    from httpx import Client, Response

WORKERS = 4
TRIES = 5  # without a byte gained between them
BACKOFF = 1.0  # seconds before the second try; doubles up to LONGEST_BACKOFF
LONGEST_BACKOFF = 30.0
LONGEST_WAIT = 300.0  # seconds that a server may ask for with Retry-After
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 2**18  # bytes
LARGEST = 2**30  # bytes of a file whose size the table does not know

GITHUB = "https://raw.githubusercontent.com"
GITHUB_LFS = "https://media.githubusercontent.com/media"
# No `..`, no absolute path, no hidden file, nothing that a shell or a terminal would read.
PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*")
Finished = tuple[str, Exception | None]  # a path, and what went wrong


@dataclass(frozen=True)
class Published:
    """A file of FinLoRA's repository, by its path under `data/`."""

    path: str
    digest: str  # hexadecimal: SHA-256 of a file in Git LFS, else git's blob SHA-1
    lfs: bool
    size: int | None  # bytes


class Passing(Exception):
    """What may be gone at the next try."""

    def __init__(self, message: str, wait: str = "", date: str = "") -> None:
        super().__init__(message)
        self.wait, self.date = wait, date  # the answer's Retry-After and Date


def published(path: str) -> Published | None:
    """The table's row of a file; None where FinLoRA does not publish it."""
    entry = tables()["files"][path]
    if not PATH.fullmatch(path):
        raise WrongInput(f"data/sources.yaml: {path!r} is no path inside of a folder")
    if entry.get("published") is False:
        return None
    lfs = "sha256" in entry
    sha, size = str(entry.get("sha256" if lfs else "blob")), entry.get("bytes")
    if not re.fullmatch("[0-9a-f]{64}" if lfs else "[0-9a-f]{40}", sha):
        raise WrongInput(f"data/sources.yaml: {path} has no checksum of {64 if lfs else 40} digits")
    if not (size is None or type(size) is int and size > 0):
        raise WrongInput(f"data/sources.yaml: {path} has {size!r} bytes")
    return Published(path, sha, lfs, size)


def wanted(tasks: list[str]) -> list[str]:
    """The paths of what tasks train on and are scored on; without a task, every path there is."""
    known = tables()["tasks"]
    if not tasks:
        return list(tables()["files"])
    paths = []
    for task in tasks:
        if task not in known:
            raise WrongInput(f'unknown task "{task}"{nearest(task, list(known))}')
        paths.append(known[task]["train"])
        paths += [tables()["datasets"][name]["file"] for name in known[task]["eval"]]
    if own := next((path for path in paths if path not in tables()["files"]), None):
        raise WrongInput(
            f'{own} is no file of FinLoRA: "files" of data/sources.yaml has no such row'
        )
    return list(dict.fromkeys(paths))


def origins(paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name, attribution, url, licence and commercial (true, false, null) of the rows in files."""
    names = (name for path in paths for name in tables()["files"][path]["origins"])
    return {name: tables()["origins"][name] for name in dict.fromkeys(names)}


def fault(path: Path, file: Published) -> str | None:
    """What is wrong with a file, or None if it is the published one to the byte."""
    with open(path, "rb") as opened:
        start = opened.read(512).lstrip().lower()
    size = path.stat().st_size
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file; `git lfs pull` where it is from"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page in place of the file"
    if file.size is not None and size != file.size:
        return f"wrong size: {size:,} bytes, not {file.size:,}"
    found = digest(path) if file.lfs else git_blob(path)
    if found != file.digest:
        kind = "SHA-256" if file.lfs else "git blob SHA-1"
        return f"wrong checksum: {kind} {found}, not {file.digest}"
    return None


def address(file: Published, base: str) -> str:
    """Where a file is: at a mirror, or without one (`base` is empty) at GitHub."""
    if not base:
        name = urlsplit(tables()["repository"]).path
        base = f"{GITHUB_LFS if file.lfs else GITHUB}{name}/{tables()['commit']}"
    return f"{base.rstrip('/')}/data/{file.path}"


def mirror() -> str:
    """FINLORA_BASE_URL, checked; empty for GitHub."""
    base = os.environ.get("FINLORA_BASE_URL", "")
    try:
        parts = urlsplit(base)
        web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        plain = not parts.query and not parts.fragment and base.isprintable()
    except ValueError:  # no port, no IPv6 address
        web = plain = False
    if base and not (plain and (web or base.startswith("file:///"))):
        raise WrongInput(
            f"FINLORA_BASE_URL={bare(base)} is no address; http://…, https://… or file:///… is, "
            "without ? and #"
        )
    return base


def bare(url: str) -> str:
    """A URL as it is printed: without the user and password that it may hold."""
    return re.sub(r"(?<=://)[^/]*@", "", url)


def backoff(tries: int, asked: str, date: str = "") -> float:
    """Seconds until the next try: what Retry-After asks (seconds, or a date by the server's own
    clock, which `date` tells), else a doubling time, of which a random part is left out so that
    clients do not come back together."""
    if asked.strip().isdecimal():
        return float(asked)
    try:
        now = parsedate_to_datetime(date) if date else datetime.now(UTC)
        return max(0.0, (parsedate_to_datetime(asked) - now).total_seconds())
    except (ValueError, TypeError):
        return min(LONGEST_BACKOFF, BACKOFF * 2 ** (tries - 1)) * random.uniform(0.5, 1)


@dataclass
class Download:
    """One file on its way to `part`, where another call or process goes on with it."""

    file: Published
    url: str
    part: Path
    client: "Client"
    stop: threading.Event
    moved: Callable[[int], None]  # bytes gained, or lost (below 0) where it starts again
    sized: Callable[[int], None]  # the bytes of a file whose size the table does not know
    etag: str = ""

    def run(self) -> None:
        """Returns when the server has sent all it has; raises JobFailed."""
        best, tries = -1, 0
        with open(self.part, "ab") as file:
            self.moved(file.tell())
            while True:
                try:
                    self.receive(file)
                    file.flush()
                    os.fsync(file.fileno())
                    return
                except Passing as error:
                    file.flush()
                    tries = 1 if file.tell() > best else tries + 1
                    best = max(best, file.tell())
                    wait = backoff(tries, error.wait, error.date)
                    if tries == TRIES or wait > LONGEST_WAIT:
                        again = f"; it asks to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""
                        raise JobFailed(
                            f"{error}{again} ({bare(self.url)}, {best:,} bytes are kept); "
                            "the same command goes on from here"
                        ) from None
                if self.stop.wait(wait):
                    raise JobFailed("interrupted")

    def receive(self, file: IO[bytes]) -> None:
        """Appends what is missing, from one answer of the server or from the mirror's file."""
        import httpx

        have = file.tell()
        if self.url.startswith("file:"):
            source = Path(url2pathname(urlsplit(self.url).path))
            if not source.is_file():
                raise JobFailed(f"not found: {source}")
            with open(source, "rb") as opened:
                self.restart(file)
                self.append(file, iter(lambda: opened.read(CHUNK), b""))
            return
        # `identity`: a range counts bytes of the file, not of a compressed answer.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.etag:
                headers["If-Range"] = self.etag
        try:
            with self.client.stream("GET", self.url, headers=headers) as response:
                if response.status_code == 416 and have:
                    # Nothing is left to send, or what is kept is not of this file.
                    if response.headers.get("Content-Range") == f"bytes */{have}":
                        return
                    self.restart(file)
                    raise Passing("another file than the one that was begun")
                self.check(response)
                spans = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                if not (response.status_code == 206 and spans):
                    self.restart(file)
                if response.status_code == 206 and not spans:
                    raise Passing("another range than the one asked for")
                etag = response.headers.get("ETag", "")
                self.etag = "" if etag.startswith("W/") else etag
                length = response.headers.get("Content-Length", "")
                if self.file.size is None and length.isdecimal():
                    self.sized(file.tell() + int(length))
                self.append(file, response.iter_raw())
                if not length and file.tell() < (self.file.size or 0):
                    raise Passing("the connection was cut")
        except httpx.TimeoutException:
            raise Passing(f"no answer for {TIMEOUT:g} s") from None
        except httpx.ConnectError as error:
            raise Passing(f"no connection: {error}") from None
        except httpx.TransportError:
            raise Passing("the connection was cut") from None
        except httpx.TooManyRedirects:
            raise JobFailed(f"redirected without an end: {bare(self.url)}") from None

    def check(self, response: "Response") -> None:
        status = response.status_code
        if status == 429 or status >= 500:
            wait, date = (response.headers.get(name, "") for name in ("Retry-After", "Date"))
            raise Passing(f"the server answers {status}", wait, date)
        if status == 404:
            raise JobFailed(f"404, not found: {bare(self.url)}")
        if status in (401, 403):
            raise JobFailed(f"{status}, access denied: {bare(self.url)}")
        if status not in (200, 206):
            raise JobFailed(f"the server answers {status}: {bare(self.url)}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise JobFailed(f"an HTML page in place of the file: {bare(self.url)}")

    def restart(self, file: IO[bytes]) -> None:
        self.moved(-file.tell())
        file.seek(0)
        file.truncate()

    def append(self, file: IO[bytes], chunks: Iterator[bytes]) -> None:
        for chunk in chunks:
            if self.stop.is_set():
                raise JobFailed("interrupted")
            file.write(chunk)
            self.moved(len(chunk))
            if file.tell() > (self.file.size or LARGEST):
                return  # longer than the file is: the check afterwards says so


def fetch(target: Path, download: Download) -> None:
    """Fetches one file to `target`, whole and verified; raises JobFailed or OSError."""
    part = download.part
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():  # and wrong: it does not stay in place, and may be the start of the file
        os.replace(target, part)
    while True:
        kept = part.exists() and part.stat().st_size > 0
        download.run()
        wrong = fault(part, download.file)
        if not wrong:
            os.replace(part, target)
            return
        download.moved(-part.stat().st_size)
        part.unlink()
        if not kept:
            raise JobFailed(f"{wrong} ({bare(download.url)}; it was removed)")
        # What an earlier call left was not the start of this file: once more, from the start.


def finished(done: queue.SimpleQueue[Finished]) -> Finished:
    """The next file that is done with. A Ctrl-C that comes just as a wait begins is noticed when it
    ends (1 % of those that were timed to it, on CPython 3.11), so none is longer than a second."""
    while True:
        try:
            return done.get(timeout=1)
        except queue.Empty:
            continue


def fetch_all(files: list[Published], folder: Path, base: str) -> dict[str, str]:
    """Fetches files side by side; returns what went wrong, by path."""
    import httpx
    from rich import progress as bars
    from rich.console import Console

    todo: queue.SimpleQueue[Published] = queue.SimpleQueue()
    done: queue.SimpleQueue[Finished] = queue.SimpleQueue()
    for file in files:
        todo.put(file)
    stop, failed = threading.Event(), dict[str, str]()
    progress = bars.Progress(
        bars.TextColumn("fetch"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    sizes = {file.path: file.size or 0 for file in files}
    bar = progress.add_task("", total=sum(sizes.values()))

    moved = partial(progress.advance, bar)

    def sized(path: str, size: int) -> None:
        sizes[path] = size
        progress.update(bar, total=sum(sizes.values()))

    def work(client: httpx.Client) -> None:
        while not stop.is_set():
            try:
                file = todo.get_nowait()
            except queue.Empty:
                return

            target = folder / file.path
            part, url = target.with_name(f"{target.name}.part"), address(file, base)
            try:
                grown = partial(sized, file.path)
                fetch(target, Download(file, url, part, client, stop, moved, grown))
                done.put((file.path, None))
            except Exception as error:
                if part.is_file() and not part.stat().st_size:
                    part.unlink()
                done.put((file.path, error))

    # Daemons: Ctrl-C does not wait for an answer that does not come.
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client, progress:
        for _ in range(min(WORKERS, len(files))):
            threading.Thread(target=work, args=[client], daemon=True).start()
        try:
            for _ in files:
                path, error = finished(done)
                if isinstance(error, JobFailed):
                    failed[path] = str(error)
                elif isinstance(error, OSError):
                    error.filename = error.filename or str(folder / path)
                    failed[path] = explain(error)
                elif error:
                    raise error
        finally:
            stop.set()
    return failed


def own(path: Path) -> int:
    """Rows of a file that the user brought; raises WrongInput for the first of another shape."""
    rows = 0
    for batch in batches(path):
        batch.stop_at_first()
        rows += len(batch.prompts)
    if not rows:
        raise WrongInput(f"{shown(path)} holds no rows")
    return rows


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second call out of the folder: two would write to the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    # Read-only, so that the lock of another user of the folder can be taken, too.
    lock = os.open(folder / ".lock", os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobFailed(f"another fetch is at work in {shown(folder)}") from None
        yield
    finally:
        os.close(lock)


def licence(origin: dict[str, Any]) -> str:
    """One line: whose the rows are, and what may be done with them."""
    terms = origin["licence"] or "licence unknown"
    use = {True: "", False: ", NON-COMMERCIAL use only", None: ", ask before commercial use"}
    note = f" ({origin['note']})" if "note" in origin else ""
    return (
        f"licence    {origin['name']}: {terms}{use[origin['commercial']]}; "
        f"{origin['attribution']}; {origin['url']}{note}"
    )


def fetch_tasks(tasks: list[str]) -> None:
    """Fetches and verifies the files of `tasks`, of all without any; prints licences.

    Raises JobFailed where a file could not be had.
    """
    paths = wanted(tasks)
    table = {path: published(path) for path in paths}
    local, base = folders().get("FINLORA_DATA"), mirror()
    folder = local or RAW
    where = shown(local) if local else base or f"{tables()['repository']} at {tables()['commit']}"
    print(f"fetch      from {bare(where)}")

    state: dict[str, str] = {}
    failed: dict[str, str] = {}
    missing: list[Published] = []
    absent: list[str] = []
    for path, file in table.items():
        target = folder / path
        there = target.is_file()
        if file is None and there:
            try:
                state[path] = f"yours, {own(target)} rows"
            except WrongInput as error:
                failed[path] = str(error)
        elif file is None:
            absent.append(path)
        elif not (wrong := fault(target, file) if there else f"not in {shown(folder)}"):
            state[path] = "verified"
        elif local:
            failed[path] = wrong
        else:
            missing.append(file)
    if missing:
        with alone(folder):
            failed |= fetch_all(missing, folder, base)
        state |= {file.path: "fetched, verified" for file in missing if file.path not in failed}
    for path in paths:
        if path in state:
            print(f"fetch      {path:<50} {state[path]}")
    for origin in origins(absent).values():
        print(f"fetch      not published: {origin['name']}: {origin['note']}")
    for path in absent:
        print(f"fetch      put your own at {shown(folder / path)}")
    if absent:
        print('fetch      one row a line: {"context": <prompt>, "target": <answer>}')
    if state:
        for origin in [tables()["collection"], *origins(state).values()]:
            print(licence(origin))

    sys.stdout.flush()
    lines = [f"{path}: {failed[path]}" for path in paths if path in failed]
    if len(lines) == 1:
        raise JobFailed(lines[0])
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if lines:
        others = ", the others are right" if state else ""
        raise JobFailed(f"{len(lines)} of {len(lines) + len(state)} files failed{others}")
