"""What every command shares: one-line errors with an exit status, paths, atomic writes, digests.

A command is a function decorated with `command`. It raises `WrongInput` (exit status 2) or
`JobFailed` (exit status 1), whose text says what is wrong, where, and what to do. Any other error
becomes one line too; `DEBUG=1` shows the traceback.
"""

import codecs
import errno
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent

# Nothing leaves the machine unasked; set before any dependency is imported.
QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts every load of a local file at its host
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_MODE": "disabled",
    "TRACKIO_DISABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # read when tqdm is imported
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

# Secrets (a password in a URL, a Hub or cloud key) are never printed. Prose contains "sk-" too
# ("risk-adjusted-return"), so a key must start at a word and have digits or be one long run.
SECRET = re.compile(
    r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"
    r"|(?<![A-Za-z0-9_-])sk-(?=[A-Za-z0-9_-]*(?:[0-9]|[A-Za-z]{24}))"
    r"(?=[A-Za-z0-9_-]*[A-Za-z0-9]{12})[A-Za-z0-9_-]{20,}"
    r"|(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{36}|(?<![A-Za-z0-9])github_pat_[A-Za-z0-9_]{22,}"
    r"|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
)


def quiet() -> None:
    """Silences the messages of libraries; this project prints what matters itself."""
    import logging
    import warnings

    if not shutil.which("nvidia-smi"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns that it finds no other
    libraries = ["torchao", "torch.utils._pytree", "lm_eval", "DeepSpeed", "transformers"]
    for name in [*libraries, "peft", "bitsandbytes"]:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|peft|bitsandbytes|torchao")
    # Packages are compiled when they are first imported, and some have invalid escape sequences.
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    from datasets import disable_progress_bars as no_data_bars
    from huggingface_hub.utils import disable_progress_bars as no_hub_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    no_data_bars()
    no_hub_bars()


class WrongInput(Exception):
    """The user's input is wrong: exit status 2."""


class JobFailed(Exception):
    """The input was right and the job failed: exit status 1."""


def command(function: Callable[[], None]) -> Callable[[], None]:
    """Wraps a command's `main`: errors become one line on stderr and an exit status."""

    @functools.wraps(function)
    def run() -> None:
        try:
            function()
            sys.stdout.flush()  # a full disk shows here, before the exit status is decided
        except KeyboardInterrupt:
            _stop("interrupted; the same command continues from here", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (WrongInput, JobFailed) as error:
            _stop(str(error), 2 if isinstance(error, WrongInput) else 1)
        except Exception as error:
            if os.environ.get("DEBUG"):
                raise
            if refusal := find_refusal(error):
                _stop(explain(refusal), 1)
            first_line = (str(error).strip().splitlines() or [""])[0]
            _stop(f"{type(error).__name__}: {first_line} (DEBUG=1 shows where)", 1)

    return run


# Errors of a disk or its permissions; a library's own words say more about other errors.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def find_refusal(error: BaseException) -> OSError | None:
    """The error of the operating system that caused `error`, if there is one.

    Libraries in Rust, such as safetensors and tokenizers, report it in their message only.
    """
    if isinstance(error, OSError) and error.errno:
        return error
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.errno in REFUSALS:
            return cause
        match = re.search(r"\(os error (\d+)\)", str(cause))
        if match and (number := int(match[1])) in REFUSALS:
            return OSError(number, os.strerror(number))
        cause = cause.__cause__
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds `path` to errors of the operating system that name no file, such as a full disk."""
    try:
        yield
    except (WrongInput, JobFailed):
        raise
    except Exception as error:
        if not (refusal := find_refusal(error)):
            raise
        refusal.filename = refusal.filename or str(path)
        raise refusal from (None if refusal is error else error)


def explain(error: OSError) -> str:
    """One line for an error of the operating system: what, where, and what to do."""
    name = error.filename2 or error.filename
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
    place = shown(path) if path else "the output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk for {place}; free some and run it again"
    if error.errno == errno.EROFS:
        return f"{place} is on a disk that is read-only; it cannot be written"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission for {place}{name_owner(path) if path else ''}"
    return f"{error.strerror or error}: {place}" if path else str(error.strerror or error)


def name_owner(path: Path) -> str:
    """A clause that names the owner of a path, or of its nearest parent, if not this user."""
    for place in (path, *path.absolute().parents):
        if os.path.exists(place):  # False where even looking is not permitted
            owner, user = place.stat().st_uid, os.geteuid()
            if owner == user:
                return ""
            return f": {shown(place)} belongs to {name_user(owner)}, you are {name_user(user)}"
    return ""


def name_user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # of another machine or container
        return f"user {number}"


# Spaces, and joiners of letters and emoji, which Python does not call printable.
HARMLESS = "\u00a0\u200c\u200d\u3000"


def spell_out(text: str, keep: str = "\n\t") -> str:
    """A text with control characters and the like spelled out, so that it steers no terminal."""
    kept = {*HARMLESS, *keep}
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def _stop(message: str, status: int) -> None:
    if os.environ.get("DEBUG") and sys.exc_info()[0] not in (None, KeyboardInterrupt):
        import traceback

        traceback.print_exc()
    line = spell_out(SECRET.sub("***", message), keep="")
    print(f"error: {line}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # otherwise the interpreter would try again, and print a second line
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def nearest(name: str, names: list[str], cutoff: float = 0.5) -> str:
    """A clause with the names nearest to a misspelt `name`: `; did you mean a, b?`."""
    close = get_close_matches(name, names, n=3, cutoff=cutoff)
    return f"; did you mean {', '.join(close)}?" if close else ""


def check_name(kind: str, name: str, names: Collection[str]) -> None:
    """Raises WrongInput where no `kind` (task, dataset) has that name."""
    if name not in names:
        raise WrongInput(f'unknown {kind} "{name}"{nearest(name, list(names))}')


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        # The error of a full disk has no file name, and the name of the part says little.
        if error.filename in (None, str(part)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):  # a read-only disk
            part.unlink(missing_ok=True)


def share(folder: Path) -> None:
    """Lets others read the files of a folder, as far as the umask permits.

    safetensors writes files that only their owner can read.
    """
    mask = os.umask(0o022)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~mask)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` at the end, unless an error came before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        work = Path(name)
        yield work
        share(work)
        shutil.rmtree(target, ignore_errors=True)
        work.chmod(target.parent.stat().st_mode)
        os.rename(work, target)
        work.mkdir()  # which the temporary directory removes


def write_text(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, f"{text}\n")


def update_page(path: Path, text: str, by: str, check: bool = False) -> None:
    """Writes a generated page; with `check`, raises JobFailed where the file holds another text.

    by: the command that writes it, for the message.
    """
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    if check:
        raise JobFailed(f"{shown(path)} is out of date; `{by}` writes it")
    write_text(path, text)


def insert_block(page: Path, begin: str, block: str, end: str) -> str:
    """A page's text with `block` between two marks; raises JobFailed where one is missing."""
    before, first, rest = page.read_text(encoding="utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise JobFailed(f"{shown(page)} has no lines {begin.strip()} and {end.strip()}")
    return before + begin + block + end + after


def format_markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table whose first columns, `texts` of them, are text and the others numbers."""
    ruler = ["---"] * texts + ["---:"] * (len(heads) - texts)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ruler, *rows))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The object in untrusted JSON; raises WrongInput that names `where` and the problem.

    Stricter than Python's parser: repeated keys, NaN and infinity are rejected.
    """
    refuse_other_content(content[:512], where)
    try:
        value = json.loads(content.decode(), object_pairs_hook=unique, parse_constant=refuse_number)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:80]
        if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            reason = "it begins with a byte order mark; save it as UTF-8 without one"
        raise WrongInput(f"{where}: not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise WrongInput(f"{where}: an object is needed")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; see `parse_json`."""
    return parse_json(path.read_bytes(), shown(path))


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON parser's pairs; raises ValueError where a key is repeated."""
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated_key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the key "{repeated_key}" is repeated')
    return content


def refuse_number(text: str) -> None:
    raise ValueError(f"JSON has no number {text}")


# How files start that are stored or downloaded in place of the expected one.
OTHER_CONTENT = {
    re.compile(rb"\Z"): "the file is empty; download it again",
    re.compile(rb"version https://git-lfs.github.com/spec/"): "this is a Git LFS pointer and not "
    "the file; `git lfs pull` downloads it",
    re.compile(rb"(?i)\s*<(!doctype )?html"): "this is a web page and not the file; download it "
    "again",
    # A safetensors file begins with eight bytes of length, which may look like a pickle, and "{".
    re.compile(rb"(?s)PK\x03\x04|\x80[\x02-\x05](?!.{6}\{)"): "this is a pickle or archive of "
    "PyTorch, which can run code; a safetensors file is needed",
}


def refuse_other_content(start: bytes, where: str) -> None:
    """Raises WrongInput where a file's first bytes show that it is something else."""
    for pattern, problem in OTHER_CONTENT.items():
        if pattern.match(start):
            raise WrongInput(f"{where}: {problem}")


def run_in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function that loads torch in a child process, whose gigabyte goes away with it.

    Where torch is loaded already there is nothing to save, and a child that is forked from its
    threads would wait for them for ever: the function is called here.
    """
    if "torch" in sys.modules:
        return function(*arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        return child.submit(function, *arguments).result()


def stop_group(process: subprocess.Popen[Any], seconds: float) -> None:
    """Ends the group of a process: SIGTERM first, SIGKILL after so many seconds.

    Even if a signal interrupts this, no process of the group is left.
    """
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def json_lines(path: Path) -> list[Any]:
    """The rows of a JSONL file; skips an unfinished last line. [] where there is no file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


DEEPEST_YAML = 100  # levels; PyYAML recurses in C, and some ten thousand levels end the process
LARGEST_YAML = 10**6  # values; a few hundred bytes of nested aliases stand for billions


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The content of untrusted YAML; raises WrongInput that names `where`, the line, the problem.

    Rejects repeated keys, which YAML forbids; PyYAML would take the last one.
    """
    import yaml

    try:
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise WrongInput(f"{where}: not UTF-8 at byte {error.start + 1}") from None
    loader = yaml.CSafeLoader(text)
    try:
        depth = 0
        for event in yaml.parse(text, yaml.CSafeLoader):  # does not recurse
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_YAML:
                raise WrongInput(f"{where}: nested deeper than {DEEPEST_YAML} levels")
        root = loader.get_single_node()
        if _count_values(root, where, {}) > LARGEST_YAML:
            raise WrongInput(f"{where}: its aliases expand to over {LARGEST_YAML:,} values")
        return None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of 2001-99-99
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise WrongInput(f"{where}{line}: not YAML") from None
    finally:
        loader.dispose()


def _count_values(node: Any, where: str, counts: dict[int, float]) -> float:
    """The values in a YAML tree with its aliases expanded; infinite where an alias is inside of
    its anchor. Raises WrongInput where a mapping has a key twice.
    """
    import yaml

    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)], parts = math.inf, node.value
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if first := lines.get((key.tag, key.value)):
                raise WrongInput(
                    f'{where}, line {line}: the key "{key.value}" is on line {first} already; '
                    "keep one of the two"
                )
            lines[key.tag, key.value] = line
    counts[id(node)] = 1 + sum(_count_values(part, where, counts) for part in parts)
    return counts[id(node)]


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; see `parse_yaml`."""
    return parse_yaml(path.read_bytes(), shown(path))


def format_yaml(content: Any) -> str:
    """YAML as this project writes it: keys in order, lists of plain values on one line."""
    import yaml

    return yaml.dump(
        content,
        Dumper=yaml.CSafeDumper,
        sort_keys=False,
        width=100,
        allow_unicode=True,
        default_flow_style=None,
    )


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(path: Path) -> str:
    """A path as a user types it: relative to the project if it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def slugify(title: str) -> str:
    """A title as part of a file's name: `1 x NVIDIA A40` becomes `1-x-nvidia-a40`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def format_table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Rows as aligned columns; `sides` has `<` or `>` for each column: aligned left or right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip(sides, widths, strict=True))
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True))
        for row in rows
    )


def git_blob(path: Path) -> str:
    """SHA-1 of a file as Git computes it: of `blob <size>\\0` and the content."""
    start = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: start).hexdigest()
