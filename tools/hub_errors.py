"""Turns the errors of the Hub's client into one line that says what to do."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tools.common import JobFailed, WrongInput

ADAPTER_CONFIG = "adapter_config.json"


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turns the client's errors about `what` into WrongInput and JobFailed."""
    import httpx
    from huggingface_hub import constants, errors

    # The client warns of a full disk, and then fails on it.
    warnings.filterwarnings("ignore", module="huggingface_hub")
    try:
        yield
    except RuntimeError as error:
        # An upload's thread wraps what happened; and a client that lost its connection is closed,
        # which its next attempt does not expect (huggingface_hub 1.17).
        closed = errors.OfflineModeIsEnabled() if "client has been closed" in str(error) else error
        raise plain(what, error.__cause__ or closed) from error
    except (httpx.HTTPError, errors.EntryNotFoundError, ConnectionError) as error:
        raise plain(what, error) from error
    except errors.LocalTokenNotFoundError as error:
        raise plain(what, error) from error
    except (errors.HFValidationError, errors.FileMetadataError, ValueError) as error:
        raise plain(what, error) from error
    except OSError as error:
        error.filename = error.filename or str(constants.HF_HUB_CACHE)  # a full disk has no name
        raise


def plain(what: str, error: BaseException) -> Exception:
    """What a person needs to know of an error of the client."""
    import httpx
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, WrongInput | JobFailed):
        return error
    if isinstance(error, errors.LocalTokenNotFoundError):
        return WrongInput("no token: `.venv/bin/hf auth login` stores one, or set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return WrongInput(f"{what}: the Hub has no such revision")
    if isinstance(error, errors.GatedRepoError):
        return WrongInput(f"{what} is gated: accept its terms on its page on the Hub, and log in")
    if isinstance(error, errors.RepositoryNotFoundError):
        return WrongInput(
            f"{what} is not on the Hub, or it is private and the token may not see it"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return WrongInput(f"{what} holds no PEFT adapter: {ADAPTER_CONFIG} is missing")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return JobFailed(f"{what} is not in the cache, and the Hub cannot be reached")
    if status == 401:
        return WrongInput(
            "the Hub does not know this token; `.venv/bin/hf auth login` stores another"
        )
    if status == 403:
        return WrongInput(f"{what}: the token has no right to do this on the Hub")
    if status is not None:
        told = str(error.response.headers.get("X-Error-Message") or "").strip()  # type: ignore[attr-defined]
        return JobFailed(f"{what}: the Hub answers {status}{f' ({told[:120]})' if told else ''}")
    if isinstance(error, errors.HFValidationError):
        return WrongInput(f"{what} is no name of a repository on the Hub: owner/name")
    if isinstance(error, httpx.HTTPError | ConnectionError | errors.FileMetadataError):
        kind = type(error).__name__
        # huggingface_hub 1.31 (Python 3.12 and 3.13) uploads with Xet and does not ask whether the
        # server has it.
        mirror = "; a mirror without Xet storage needs HF_HUB_DISABLE_XET=1"
        hint = mirror if os.environ.get("HF_ENDPOINT") else ""
        return JobFailed(f"{what}: the connection to the Hub broke ({kind}); run it again{hint}")
    return JobFailed(f"{what}: {' '.join(str(error).split())[:300]}")
