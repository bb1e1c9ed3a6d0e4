"""Embeddings from a server that speaks OpenAI's protocol, through the standard library."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memos.cube.secret import Secret
from memos.errors import ArgumentError, BackendError
from memos.records._embedding_shared import (
    KINDS,
    Floats,
    Progress,
    check_kind,
    check_texts,
    checked,
)

_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 30.0
_LONGEST_ANSWER = 1 << 28


class OpenAIEmbedder:
    """A model behind ``POST {base_url}/embeddings``.

    Args:
        base_url:   up to and without "/embeddings", such as "http://127.0.0.1:8000/v1".
        model:      its name there.
        api_key:    default: the environment's OPENAI_API_KEY; without any none is sent. It is in
            no repr, error or identity.
        dim:        what the vectors must have; None: as the first answer.
        timeout_s:  the longest silence in a request.
        batch_size: texts of one request.
        retries:    how often a request is made again after 408, 429, 5xx, a broken connection or
            a timeout.
        backoff_s:  before the first retry; doubled each time. A server's Retry-After is followed
            up to 30 s.
        prefixes:   what goes before texts of a kind, such as {"query": "search_query: "}.
        extra:      more fields of the request, such as {"dimensions": 256}.
        identity:   default: base_url, model, prefixes and extra.

    Raises:
        ArgumentError: an argument is out of contract.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        dim: int | None = None,
        *,
        timeout_s: float = 60.0,
        batch_size: int = 64,
        retries: int = 4,
        backoff_s: float = 0.5,
        prefixes: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
        identity: str | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ArgumentError("base_url: http://... or https://... wanted")
        if parts.username is not None or parts.query or parts.fragment:
            raise ArgumentError("base_url: no user, query or fragment wanted; a key is api_key")
        if batch_size < 1 or retries < 0 or not timeout_s > 0:
            raise ArgumentError("batch_size from 1, retries from 0 and timeout_s above 0 wanted")
        if unknown := set(prefixes or {}) - set(KINDS):
            raise ArgumentError(f"prefixes: of {', '.join(KINDS)} wanted, {unknown} came")
        self._base, self._model = base_url.rstrip("/"), model
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
        if key and not (key.isascii() and key.isprintable()):
            raise ArgumentError("api_key: printable ASCII wanted")
        self._key = Secret(key or "")
        self._dim, self._timeout_s, self._batch_size = dim, timeout_s, batch_size
        self._retries, self._backoff_s = retries, backoff_s
        self._prefixes, self._extra = dict(prefixes or {}), dict(extra or {})
        settings = json.dumps([self._prefixes, self._extra], sort_keys=True)
        self.identity = identity or f"openai:{self._base}:{model}:{settings}"
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirects())

    def __repr__(self) -> str:
        return f"OpenAIEmbedder({self._base!r}, {self._model!r}, dim={self._dim})"

    @property
    def dim(self) -> int:
        """Numbers of a vector; where none was given the server is asked."""
        if self._dim is None:
            self.embed(["dim"])
        assert self._dim is not None
        return self._dim

    def embed(
        self, texts: Sequence[str], kind: str = "document", progress: Progress | None = None
    ) -> Floats:
        """Vectors of texts, float32 [n, dim].

        Args:
            kind:     "document" or "query": which prefix goes before.
            progress: called with (done, total) texts after every request.

        Raises:
            ArgumentError: an argument is out of contract.
            BackendError: the server cannot be reached, refuses, or answers something else than
                one finite vector of dim numbers for each text.
        """
        wanted = check_texts(texts)
        check_kind(kind)
        if not wanted:
            return np.empty((0, self.dim), np.float32)
        prefix = self._prefixes.get(kind, "")
        answers = []
        for lo in range(0, len(wanted), self._batch_size):
            # Servers refuse an empty text.
            batch = [prefix + text or " " for text in wanted[lo : lo + self._batch_size]]
            answers.append(self._vectors(batch))
            if progress is not None:
                progress(min(lo + self._batch_size, len(wanted)), len(wanted))
        return np.concatenate(answers)

    def _vectors(self, batch: list[str]) -> Floats:
        body = {**self._extra, "model": self._model, "input": batch, "encoding_format": "float"}
        answer = self._post(json.dumps(body).encode())
        try:
            vectors = checked(_in_order(json.loads(answer), len(batch)), len(batch), self._dim)
        except ValueError as error:  # of json too
            raise self._error(str(error)) from None
        with self._lock:
            if self._dim is None:
                self._dim = vectors.shape[1]
        if vectors.shape[1] != self._dim:
            raise self._error(f"vectors of {self._dim} numbers wanted, of {vectors.shape[1]} came")
        return vectors

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        for attempt in range(self._retries + 1):
            request = urllib.request.Request(f"{self._base}/embeddings", body, headers)
            wait_s = self._backoff_s * 2**attempt * random.uniform(0.75, 1.25)
            try:
                with self._opener.open(request, timeout=self._timeout_s) as response:
                    answer: bytes = response.read(_LONGEST_ANSWER + 1)
                if len(answer) > _LONGEST_ANSWER:
                    raise self._error(f"an answer of more than {_LONGEST_ANSWER} bytes")
                if response.length:  # read with a limit does not say that the answer was cut off
                    raise http.client.IncompleteRead(answer, response.length)
                return answer
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code}{self._message(error)}"
                    if error.code not in _AGAIN:
                        raise self._error(problem) from None
                    wait_s = _retry_after(error.headers.get("Retry-After"), wait_s)
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                is_late = isinstance(reason, TimeoutError)
                problem = f"no answer within {self._timeout_s:g} s" if is_late else repr(reason)
            if attempt < self._retries:
                time.sleep(min(wait_s, _LONGEST_WAIT_S))
        raise self._error(f"{problem}, after {self._retries + 1} attempts")

    def _message(self, error: urllib.error.HTTPError) -> str:
        """The beginning of what the server said."""
        try:
            text = " ".join(error.read(2000).decode("utf-8", "replace").split())
        except (OSError, http.client.HTTPException):
            return ""
        return f": {self._without_key(text)[:300]}" if text else ""

    def _without_key(self, text: str) -> str:
        """Some servers send the key back."""
        return text.replace(self._key.reveal(), "***") if self._key else text

    def _error(self, problem: str) -> BackendError:
        problem = self._without_key(problem)
        return BackendError(f"embeddings of {self._model!r} at {self._base}: {problem}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key to wherever it leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _in_order(answer: Any, count: int) -> list[Any]:
    """The embeddings of an answer, by their index."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise ValueError("an object with a list 'data' of objects wanted, something else came")
    if len(data) != count:
        raise ValueError(f"{count} vectors wanted, {len(data)} came")
    indexes = [item.get("index") for item in data]
    if all(index is None for index in indexes):
        indexes = list(range(count))
    if not all(type(index) is int for index in indexes) or sorted(indexes) != list(range(count)):
        raise ValueError(f"indexes 0 to {count - 1} wanted, others came")
    by_index = dict(zip(indexes, data, strict=True))
    return [by_index[i].get("embedding") for i in range(count)]


def _retry_after(value: str | None, default: float) -> float:
    try:
        return max(0.0, float(value)) if value is not None else default
    except ValueError:  # a date
        return default
