"""A connection to a Redis-protocol server that may go away: retries, and errors in one line without passwords."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from tinyonn_lib.errors import BenchError

_T = TypeVar("_T")
# A server that never answered is a typo, and waiting for it is rude.
_FIRST_SECONDS = 1.0
CA_VARIABLE = "TINYONN_REDIS_CA"


class Connection:
    """A redis-py client with one way to call it.

    Args:
        where: a redis URL (`redis://`, `rediss://`, `unix://`) or the path of a unix socket. With `rediss://` the
            server's certificate is checked: against the authorities of this machine, or against the file that the
            environment variable `TINYONN_REDIS_CA` names.
        retry_seconds: how long a connection that once worked is retried.

    Attributes:
        redis: the client; call it through `attempt`.
        address: the URL without user and password, fit for messages and manifests.
        url: the URL as given: only for processes of our own, in their environment.

    Raises:
        BenchError: URL that cannot be understood, or no such file of authorities.
    """

    def __init__(self, where: str | Path, retry_seconds: float) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        text = str(where)
        url = text if "://" in text else f"unix://{quote(text)}"
        self.address, self.url = safe_url(url), url
        self.retry_seconds = retry_seconds
        self._reached = False
        try:
            # Retrying is ours: redis-py's own knows neither transactions nor what is safe to repeat.
            self.redis: Any = redis.Redis.from_url(
                url, socket_timeout=10.0, socket_connect_timeout=3.0, retry=Retry(NoBackoff(), 0), **_tls(url)
            )
        except (ValueError, TypeError):
            raise BenchError(
                f"{self.address} is not a redis URL: write redis://host:port/0, rediss://..., or unix:///path/to/socket"
            ) from None

    def attempt(self, call: Callable[[], _T], *, safe: str = "", patience: float | None = None) -> _T:
        """Run `call`, again after a lost connection, until time is over. `call` must be idempotent.

        Args:
            call: commands on `redis`.
            safe: what is safe should the server be gone for good, for the message.
            patience: seconds to retry, `retry_seconds` unless told; 0 for a single try.

        Raises:
            BenchError: server gone, password refused, command refused. `redis.WatchError` passes through.
        """
        from redis import exceptions as errors

        patience = self.retry_seconds if patience is None else patience
        deadline = time.monotonic() + (patience if self._reached else min(patience, _FIRST_SECONDS))
        pause = 0.05
        while True:
            try:
                value = call()
            except (errors.AuthenticationError, errors.AuthorizationError):
                raise BenchError(self._refused()) from None
            except errors.WatchError as error:
                if "occurred while watching" not in str(error):  # redis-py's words for a connection lost meanwhile
                    raise
                problem: Exception = error
            except (errors.ConnectionError, errors.TimeoutError, OSError) as error:  # BusyLoadingError too
                if untrusted := _untrusted(error):
                    raise BenchError(
                        f"the certificate of {self.address} is not accepted ({untrusted}): let {CA_VARIABLE} name the "
                        "file of the authority that signed it, and use the host name that it was made for"
                    ) from None
                problem = error
            except errors.ResponseError as error:
                if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
                    raise BenchError(self._refused()) from None
                raise BenchError(f"{self.address} refused a command: {error}") from None
            else:
                self._reached = True
                return value
            if time.monotonic() + pause > deadline:
                raise BenchError(self._lost(problem, safe)) from None
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _refused(self) -> str:
        return (
            f"{self.address} refuses this user or password: check the user in redis_url and the password in "
            "TINYONN_REDIS_PASSWORD"
        )

    def _lost(self, problem: Exception, safe: str) -> str:
        if not self._reached:
            return f"no Redis server answers at {self.address} ({_reason(problem)}): start it, or correct redis_url"
        what = f"; {safe}" if safe else ""
        return (
            f"the Redis server at {self.address} went away ({_reason(problem)}){what}; run the same command again to "
            "go on from there"
        )


def safe_url(url: str) -> str:
    """The URL without its password and query, fit for messages and manifests."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "the given redis_url"
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _tls(url: str) -> dict[str, str]:
    """Options for redis-py: which authorities may have signed the server's certificate."""
    file = os.environ.get(CA_VARIABLE, "")
    if not file or not url.startswith("rediss://"):
        return {}
    if not Path(file).is_file():
        raise BenchError(f"{CA_VARIABLE} names {file}, and there is no such file: give it the authority's certificate")
    return {"ssl_ca_certs": file}


def _untrusted(problem: BaseException) -> str:
    """Why the certificate was refused, empty when that was not the problem."""
    for cause in _causes(problem):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
    return ""


def _reason(problem: Exception) -> str:
    import redis

    if isinstance(problem, redis.exceptions.TimeoutError):
        return "timeout"
    for cause in _causes(problem):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return "connection lost"


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__
