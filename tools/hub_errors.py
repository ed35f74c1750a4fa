"""Turns the errors of the Hub's client into one line that says what to do."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tools.common import JobFailed, WrongInput

ADAPTER_CONFIG = "adapter_config.json"


@contextmanager
def explain_errors(subject: str) -> Iterator[None]:
    """Turns the client's errors about `subject` into WrongInput and JobFailed."""
    import httpx
    from huggingface_hub import constants, errors

    # The client warns of a full disk, and then fails on it.
    warnings.filterwarnings("ignore", module="huggingface_hub")
    try:
        yield
    except RuntimeError as error:
        # The thread of an upload wraps the cause. A client that lost its connection is closed, and
        # its next attempt fails with this message (huggingface_hub 1.17).
        closed = errors.OfflineModeIsEnabled() if "client has been closed" in str(error) else error
        raise explain_error(subject, error.__cause__ or closed) from error
    except (
        *(httpx.HTTPError, ConnectionError, ValueError, errors.EntryNotFoundError),
        *(errors.LocalTokenNotFoundError, errors.HFValidationError, errors.FileMetadataError),
    ) as error:
        raise explain_error(subject, error) from error
    except OSError as error:
        error.filename = error.filename or str(constants.HF_HUB_CACHE)  # a full disk has no name
        raise


def explain_error(subject: str, error: BaseException) -> Exception:
    """The WrongInput or JobFailed for one of the client's errors."""
    import httpx
    from huggingface_hub import errors

    if isinstance(error, WrongInput | JobFailed):
        return error
    # The first matching class decides: some are subclasses of later ones.
    wrong_input = {
        errors.LocalTokenNotFoundError: "no token: `.venv/bin/hf auth login` stores one, or set "
        "HF_TOKEN",
        errors.RevisionNotFoundError: f"{subject}: the Hub has no such revision",
        errors.GatedRepoError: f"{subject} is gated: accept its terms on its page on the Hub, and "
        "log in",
        errors.RepositoryNotFoundError: f"{subject} is not on the Hub, or it is private and the "
        "token may not see it",
        errors.RemoteEntryNotFoundError: f"{subject} holds no PEFT adapter: {ADAPTER_CONFIG} is "
        "missing",
        errors.HFValidationError: f"{subject} is no name of a repository on the Hub: owner/name",
    }
    for kind, message in wrong_input.items():
        if isinstance(error, kind):
            return WrongInput(message)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return JobFailed(f"{subject} is not in the cache, and the Hub cannot be reached")
    if isinstance(error, errors.HfHubHTTPError):
        return explain_status(subject, error.response.status_code, error.response.headers)
    if isinstance(error, httpx.HTTPError | ConnectionError | errors.FileMetadataError):
        # huggingface_hub 1.31 (Python 3.12 and 3.13) uploads with Xet even if the server lacks it.
        mirror = "; a mirror without Xet storage needs HF_HUB_DISABLE_XET=1"
        return JobFailed(
            f"{subject}: the connection to the Hub broke ({type(error).__name__}); run it again"
            f"{mirror if os.environ.get('HF_ENDPOINT') else ''}"
        )
    return JobFailed(f"{subject}: {' '.join(str(error).split())[:300]}")


def explain_status(subject: str, status: int, headers: Mapping[str, str]) -> Exception:
    """The WrongInput or JobFailed for an HTTP status without a class of its own."""
    if status == 401:
        return WrongInput(
            "the Hub does not know this token; `.venv/bin/hf auth login` stores another"
        )
    if status == 403:
        return WrongInput(f"{subject}: the token has no right to do this on the Hub")
    reason = headers.get("X-Error-Message", "").strip()[:120]
    return JobFailed(f"{subject}: the Hub answers {status}{f' ({reason})' if reason else ''}")
