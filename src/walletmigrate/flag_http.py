"""One call to the flag server, bounded in time and size; whatever goes wrong is told without a secret."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from walletmigrate.errors import ConfigError

if TYPE_CHECKING:
    import requests

MAX_BYTES: Final = 64 * 1024 * 1024


class NoAnswer(Exception):
    """Why a call gave no answer; never says a key. ``sent`` is whether the server may have done what was asked."""

    def __init__(self, detail: str, *, sent: bool = True) -> None:
        super().__init__(detail)
        self.sent: Final = sent


def call(
    method: str, url: str, headers: Mapping[str, str], timeout_seconds: float, body: object = None
) -> tuple[int, bytes]:
    """The status and the body of the answer. ``timeout_seconds`` bounds each wait, and the body as a whole.

    Raises `NoAnswer`. Errors are described here, not by their own text, which can quote a header with a key. No
    redirect is followed: it would take the key along.
    """
    # Not above: slow to load, and who reads flags from a file calls nobody.
    import requests
    from urllib3.exceptions import TimeoutError as WireTimeout

    deadline = time.monotonic() + timeout_seconds
    try:
        with requests.request(
            method,
            url,
            headers=dict(headers),
            json=body,
            timeout=timeout_seconds,
            stream=True,
            allow_redirects=False,
        ) as response:
            return response.status_code, _body(response, deadline)
    except NoAnswer:
        raise
    except requests.ConnectTimeout:
        raise NoAnswer(f"no connection within {timeout_seconds:g} s", sent=False) from None
    except (requests.Timeout, WireTimeout):
        raise NoAnswer(f"no answer within {timeout_seconds:g} s") from None
    except Exception as error:  # noqa: BLE001 - whatever it was, nobody who polls may be stopped by it
        raise NoAnswer(f"the connection failed ({type(error).__name__})", sent=not _refused(error)) from None


def server_name(api_url: str) -> str:
    """The server for people. Raises `ConfigError` for what is no address; neither repeats what stands before an @."""
    unusable = ConfigError("api_url is no http or https address", fix="write http://host:port/api/v1/")
    try:
        parts = urlsplit(api_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise unusable from None
    if not usable:
        raise unusable
    return f"flagsmith {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _refused(error: Exception) -> bool:
    """Whether there was no connection at all."""
    from urllib3.exceptions import NewConnectionError

    reasons = [getattr(one, "reason", None) for one in error.args]
    return any(isinstance(reason, NewConnectionError) for reason in reasons)


def _body(response: requests.Response, deadline: float) -> bytes:
    # The time-out bounds each wait, not their sum: a server that sends a byte a second would hold us forever.
    body = bytearray()
    while chunk := response.raw.read1(65536, decode_content=True):
        body += chunk
        if time.monotonic() > deadline:
            raise NoAnswer("the answer did not end in time")
        if len(body) > MAX_BYTES:
            raise NoAnswer(f"the answer is longer than {MAX_BYTES} bytes")
    return bytes(body)
