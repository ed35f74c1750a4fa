"""Downloads FinLoRA's files at the pinned commit of data/sources.yaml and verifies them.

    python -m tools fetch                  every file
    python -m tools fetch sentiment,ner    what these tasks train on and are scored on

Files land in data/raw/train/… and data/raw/test/…, under a temporary name until their checksum is
right. An interrupted download resumes, in this call or the next; verified files are kept.
FINLORA_BASE_URL names a mirror (http, https or file:) with the layout of FinLoRA's repository. With
FINLORA_DATA nothing is downloaded: that copy is verified.
"""

import os
import queue
import random
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tools.common import JobFailed, WrongInput, check_name, digest, explain, git_blob, shown
from tools.data.rows import read_batches
from tools.sources import RAW, list_folders, tables

if TYPE_CHECKING:
    from httpx import Client, Response
    from tenacity import RetryCallState

WORKERS = 4
TRIES = 5  # without a byte gained between them
BACKOFF = 1.0  # seconds before the second try; doubles up to LONGEST_BACKOFF
LONGEST_BACKOFF = 30.0
LONGEST_WAIT = 300.0  # seconds that a server may ask for with Retry-After
TIMEOUT = 30.0  # seconds without a byte
LARGEST = 2**30  # bytes of a file without a size in the table

GITHUB = "https://raw.githubusercontent.com"
GITHUB_LFS = "https://media.githubusercontent.com/media"
# No `..`, no absolute path, no hidden file, nothing that a shell or a terminal would interpret.
PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*")
Result = tuple[str, Exception | None]  # a path and its error


@dataclass(frozen=True)
class PublishedFile:
    """A file of FinLoRA's repository, by its path under `data/`."""

    path: str
    digest: str  # hexadecimal: SHA-256 of a file in Git LFS, else git's blob SHA-1
    lfs: bool
    size: int | None  # bytes


class RetryableError(Exception):
    """A retryable error; `wait`: seconds that the server asks for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


# ---- What to fetch


def list_paths(tasks: list[str]) -> list[str]:
    """Lists the files that tasks train on and are scored on; every file without tasks."""
    task_table, files = tables()["tasks"], tables()["files"]
    if not tasks:
        return list(files)
    paths = []
    for task in tasks:
        check_name("task", task, task_table)
        paths.append(task_table[task]["train"])
        paths += [tables()["datasets"][name]["file"] for name in task_table[task]["eval"]]
    for path in paths:
        if path not in files:
            raise WrongInput(
                f'{path} is no file of FinLoRA: "files" of data/sources.yaml has no such row'
            )
    return list(dict.fromkeys(paths))


def look_up(path: str) -> PublishedFile | None:
    """Reads a file's row of the table; None if FinLoRA does not publish it."""
    row = tables()["files"][path]
    if not PATH.fullmatch(path):
        raise WrongInput(f"data/sources.yaml: {path!r} is no path inside of a folder")
    if row.get("published") is False:
        return None
    lfs, size = "sha256" in row, row.get("bytes")
    checksum, digits = str(row.get("sha256" if lfs else "blob")), 64 if lfs else 40
    if not re.fullmatch(f"[0-9a-f]{{{digits}}}", checksum):
        raise WrongInput(f"data/sources.yaml: {path} has no checksum of {digits} digits")
    if not (size is None or type(size) is int and size > 0):
        raise WrongInput(f"data/sources.yaml: {path} has {size!r} bytes")
    return PublishedFile(path, checksum, lfs, size)


def list_origins(paths: Iterable[str]) -> list[dict[str, Any]]:
    """Lists the origins of files: name, attribution, url, licence, commercial."""
    names = (name for path in paths for name in tables()["files"][path]["origins"])
    return [tables()["origins"][name] for name in dict.fromkeys(names)]


def read_mirror() -> str | None:
    """Reads FINLORA_BASE_URL; None stands for GitHub. Raises WrongInput if it is no address."""
    base = os.environ.get("FINLORA_BASE_URL")
    if not base:
        return None
    try:
        parts = urlsplit(base)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_plain = not parts.query and not parts.fragment and base.isprintable()
    except ValueError:  # a malformed port or IPv6 address
        is_web = is_plain = False
    if not (is_plain and (is_web or base.startswith("file:///"))):
        raise WrongInput(
            f"FINLORA_BASE_URL={hide_password(base)} is no address; use http://…, https://… or "
            "file:///…, without ? and #"
        )
    return base


def build_url(file: PublishedFile, mirror: str | None) -> str:
    """Builds the address of a file at a mirror, else at GitHub."""
    if not mirror:
        repository = urlsplit(tables()["repository"]).path
        mirror = f"{GITHUB_LFS if file.lfs else GITHUB}{repository}/{tables()['commit']}"
    return f"{mirror.rstrip('/')}/data/{file.path}"


def hide_password(url: str) -> str:
    """Removes user and password from a URL."""
    return re.sub(r"(?<=://)[^/]*@", "", url)


def find_fault(path: Path, file: PublishedFile) -> str | None:
    """Says what is wrong with a file; None if it is the published one to the byte."""
    with open(path, "rb") as opened:
        start = opened.read(512).lstrip().lower()
    size = path.stat().st_size
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file; `git lfs pull` at its source downloads it"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page in place of the file"
    if file.size is not None and size != file.size:
        return f"wrong size: {size:,} bytes, not {file.size:,}"
    checksum = digest(path) if file.lfs else git_blob(path)
    if checksum != file.digest:
        kind = "SHA-256" if file.lfs else "git blob SHA-1"
        return f"wrong checksum: {kind} {checksum}, not {file.digest}"
    return None


# ---- One download


def choose_wait(state: "RetryCallState") -> float:
    """Chooses the seconds until the next try: the server's Retry-After, else a doubling time.

    The latter varies at random, so that clients do not come back together.
    """
    from tenacity import wait_exponential

    error = state.outcome and state.outcome.exception()
    if isinstance(error, RetryableError) and error.wait is not None:
        return error.wait
    return wait_exponential(BACKOFF, LONGEST_BACKOFF)(state) * random.uniform(0.5, 1)


@dataclass
class Download:
    """A download of one file to `part`, which another call or process can resume."""

    file: PublishedFile
    url: str
    part: Path
    client: "Client"
    stop: threading.Event
    count_bytes: Callable[[int], None]  # below 0 if the download restarts
    etag: str = ""

    def run(self) -> None:
        """Returns when the server has sent everything; raises JobFailed."""
        import tenacity

        most_bytes = -1

        def restart_count(state: "RetryCallState") -> None:
            nonlocal most_bytes
            file.flush()
            if file.tell() > most_bytes:  # only tries without progress count
                most_bytes, state.attempt_number = file.tell(), 1

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RetryableError),
            after=restart_count,
            wait=choose_wait,
            stop=lambda state: state.attempt_number >= TRIES or state.upcoming_sleep > LONGEST_WAIT,
            sleep=tenacity.sleep_using_event(self.stop),
            reraise=True,
        )
        with open(self.part, "ab") as file:
            self.count_bytes(file.tell())
            try:
                retrying(self.receive, file)
            except RetryableError as error:
                wait = error.wait or 0
                again = f"; it asks to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""
                raise JobFailed(
                    f"{error}{again} ({hide_password(self.url)}, {most_bytes:,} bytes are kept); "
                    "the same command continues from here"
                ) from None
            file.flush()
            os.fsync(file.fileno())

    def receive(self, file: IO[bytes]) -> None:
        """Appends what is missing, from one answer of the server or from the mirror's file."""
        import httpx

        self.check_stop()
        if self.url.startswith("file:"):
            source = Path(url2pathname(urlsplit(self.url).path))
            if not source.is_file():
                raise JobFailed(f"not found: {source}")
            self.restart(file)
            with open(source, "rb") as opened:
                shutil.copyfileobj(opened, file)
            self.count_bytes(file.tell())
            return
        # `identity`: a range counts bytes of the file, not of a compressed answer.
        headers = {"Accept-Encoding": "identity"}
        if file.tell():
            headers["Range"] = f"bytes={file.tell()}-"
            if self.etag:
                headers["If-Range"] = self.etag
        try:
            with self.client.stream("GET", self.url, headers=headers) as response:
                self.take(response, file)
        except httpx.TimeoutException:
            raise RetryableError(f"no answer for {TIMEOUT:g} s") from None
        except httpx.ConnectError as error:
            raise RetryableError(f"no connection: {error}") from None
        except httpx.TransportError:
            raise RetryableError("the connection was cut") from None
        except httpx.TooManyRedirects:
            raise JobFailed(f"redirected without an end: {hide_password(self.url)}") from None

    def take(self, response: "Response", file: IO[bytes]) -> None:
        """Appends an answer that continues the file; any other replaces the file."""
        start, answered_range = file.tell(), response.headers.get("Content-Range", "")
        if response.status_code == 416 and start:
            # Nothing is left to send, or these bytes are of another file.
            if answered_range == f"bytes */{start}":
                return
            self.restart(file)
            raise RetryableError("another file than the one that was begun")
        self.check(response)
        continues = answered_range.startswith(f"bytes {start}-")
        if not (response.status_code == 206 and continues):
            self.restart(file)
        if response.status_code == 206 and not continues:
            raise RetryableError("another range than the one asked for")
        etag = response.headers.get("ETag", "")
        self.etag = "" if etag.startswith("W/") else etag
        self.append(file, response.iter_raw())
        if "Content-Length" not in response.headers and file.tell() < (self.file.size or 0):
            raise RetryableError("the connection was cut")

    def check(self, response: "Response") -> None:
        """Raises RetryableError or JobFailed if the answer is not the file."""
        status, url = response.status_code, hide_password(self.url)
        if status == 429 or status >= 500:
            wait = response.headers.get("Retry-After", "")
            raise RetryableError(
                f"the server answers {status}", float(wait) if wait.isdecimal() else None
            )
        meanings = {401: "access denied", 403: "access denied", 404: "not found"}
        if status in meanings:
            raise JobFailed(f"{status}, {meanings[status]}: {url}")
        if status not in (200, 206):
            raise JobFailed(f"the server answers {status}: {url}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise JobFailed(f"an HTML page in place of the file: {url}")

    def restart(self, file: IO[bytes]) -> None:
        self.count_bytes(-file.tell())
        file.seek(0)
        file.truncate()

    def append(self, file: IO[bytes], chunks: Iterator[bytes]) -> None:
        for chunk in chunks:
            self.check_stop()
            file.write(chunk)
            self.count_bytes(len(chunk))
            if file.tell() > (self.file.size or LARGEST):
                return  # too long; the check afterwards says so

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise JobFailed("interrupted")


def place(download: Download, target: Path) -> None:
    """Downloads a file to `target`, whole and verified; raises JobFailed or OSError."""
    part = download.part
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():  # a wrong file, which may be the start of the right one
        os.replace(target, part)
    while True:
        resumed = part.exists() and part.stat().st_size > 0
        download.run()
        fault = find_fault(part, download.file)
        if not fault:
            os.replace(part, target)
            return
        download.count_bytes(-part.stat().st_size)
        part.unlink()
        if not resumed:
            raise JobFailed(f"{fault} ({hide_password(download.url)}; it was removed)")
        # What an earlier call left was not the start of this file: once more, from the start.


# ---- Many downloads


def download_all(files: list[PublishedFile], folder: Path, mirror: str | None) -> dict[str, str]:
    """Downloads files side by side; returns the errors, by path."""
    import httpx
    from rich import progress as bars
    from rich.console import Console

    results: queue.SimpleQueue[Result] = queue.SimpleQueue()
    stop, slots, faults = threading.Event(), threading.Semaphore(WORKERS), dict[str, str]()
    progress = bars.Progress(
        "fetch",
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    sizes = [file.size for file in files if file.size]
    bar = progress.add_task("", total=sum(sizes) if len(sizes) == len(files) else None)

    def work(file: PublishedFile, client: httpx.Client) -> None:
        target = folder / file.path
        part = target.with_name(f"{target.name}.part")
        count_bytes = partial(progress.advance, bar)
        with slots:
            try:
                url = build_url(file, mirror)
                place(Download(file, url, part, client, stop, count_bytes), target)
                results.put((file.path, None))
            except Exception as error:
                if part.is_file() and not part.stat().st_size:
                    part.unlink()
                results.put((file.path, error))

    # Daemon threads, so that Ctrl-C does not wait for an answer.
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client, progress:
        for file in files:
            threading.Thread(target=work, args=[file, client], daemon=True).start()
        try:
            for _ in files:
                path, error = wait_for_result(results)
                if error:
                    faults[path] = describe_error(error, folder / path)
        finally:
            stop.set()
    return faults


def wait_for_result(results: queue.SimpleQueue[Result]) -> Result:
    """Waits for the next result, a second at a time: CPython 3.11 may notice a Ctrl-C at the start
    of a wait only when the wait ends (1 % of those timed to it)."""
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            continue


def describe_error(error: Exception, target: Path) -> str:
    """Describes a failed download in one line; re-raises errors of this program."""
    if isinstance(error, JobFailed):
        return str(error)
    if not isinstance(error, OSError):
        raise error
    error.filename = error.filename or str(target)
    return explain(error)


# ---- The command


def fetch_tasks(tasks: list[str]) -> None:
    """Fetches and verifies the files of tasks (default: all) and prints their licences.

    Raises JobFailed if a file is missing or wrong in the end.
    """
    published = {path: look_up(path) for path in list_paths(tasks)}
    local, mirror = list_folders().get("FINLORA_DATA"), read_mirror()
    folder = local or RAW
    github = f"{tables()['repository']} at {tables()['commit']}"
    print(f"fetch      from {shown(local) if local else hide_password(mirror or github)}")

    states: dict[str, str] = {}
    faults: dict[str, str] = {}
    missing: list[PublishedFile] = []
    for path, file in published.items():
        target = folder / path
        try:
            if file is None:
                if target.is_file():
                    states[path] = f"yours, {count_rows(target)} rows"
                continue
            fault = find_fault(target, file) if target.is_file() else f"not in {shown(folder)}"
            if not fault:
                states[path] = "verified"
            elif local:
                faults[path] = fault
            else:
                missing.append(file)
        except WrongInput as error:
            faults[path] = str(error)
    if missing:
        faults |= download_locked(missing, folder, mirror)
        states |= {file.path: "fetched, verified" for file in missing if file.path not in faults}
    order = list(published)
    states = dict(sorted(states.items(), key=lambda state: order.index(state[0])))
    print_states(states, [path for path in order if path not in states | faults], folder)
    lines = [f"{path}: {faults[path]}" for path in order if path in faults]
    if len(lines) == 1:
        raise JobFailed(lines[0])
    if lines:
        print(*(f"error: {line}" for line in lines), sep="\n", file=sys.stderr)
        others = ", the others are right" if states else ""
        raise JobFailed(f"{len(lines)} of {len(lines) + len(states)} files failed{others}")


def download_locked(files: list[PublishedFile], folder: Path, mirror: str | None) -> dict[str, str]:
    """Calls `download_all`; raises JobFailed if another call is downloading into the folder."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0, mode=0o666):  # for every user of the folder
            return download_all(files, folder, mirror)
    except Timeout:
        raise JobFailed(f"another fetch is at work in {shown(folder)}") from None


def count_rows(path: Path) -> int:
    """Counts the rows of a file that the user brought; raises WrongInput for a malformed row."""
    rows = 0
    for batch in read_batches(path):
        batch.stop_at_first()
        rows += len(batch.prompts)
    if not rows:
        raise WrongInput(f"{shown(path)} holds no rows")
    return rows


def print_states(states: dict[str, str], absent: list[str], folder: Path) -> None:
    for path, state in states.items():
        print(f"fetch      {path:<50} {state}")
    for origin in list_origins(absent):
        print(f"fetch      not published: {origin['name']}: {origin['note']}")
    for path in absent:
        print(f"fetch      put your own at {shown(folder / path)}")
    if absent:
        print('fetch      one row a line: {"context": <prompt>, "target": <answer>}')
    uses = {True: "", False: ", NON-COMMERCIAL use only", None: ", ask before commercial use"}
    for origin in [tables()["collection"], *list_origins(states)] if states else ():
        note = f" ({origin['note']})" if "note" in origin else ""
        print(
            f"licence    {origin['name']}: {origin['licence'] or 'licence unknown'}"
            f"{uses[origin['commercial']]}; {origin['attribution']}; {origin['url']}{note}"
        )
    sys.stdout.flush()
