"""Question-answer pairs from a language model behind OpenAI's protocol, by the standard library."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from memos.cube.secret import Secret
from memos.errors import ArgumentError, BackendError

Generate = Callable[[str], str]

_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_ANSWER = 1 << 24
_LONGEST_WAIT_S = 30.0
_PROMPT = """\
Here is a text:

{text}

Write {count} questions that this text alone answers, in different wordings, each naming whom or \
what it asks about, with a short full-sentence answer taken from the text. Reply with a JSON list \
only: [{{"q": "...", "a": "..."}}]"""


class ChatEndpoint:
    """A model behind ``POST {base_url}/chat/completions``; called with a prompt it answers.

    Args:
        base_url:  up to and without "/chat/completions", such as "http://127.0.0.1:8000/v1".
        model:     its name there.
        api_key:   default: the environment's OPENAI_API_KEY; without any none is sent. It is in no
            repr and no error.
        timeout_s: the longest silence in a request.
        retries:   after 408, 429, 5xx, a broken connection or a timeout.
        backoff_s: before the first retry; doubled each time.
        extra:     more fields of the request, such as {"temperature": 0}.

    Raises:
        ArgumentError: an argument is out of contract.
    """

    def __init__(self, base_url: str, model: str, api_key: str | None = None, *,
                 timeout_s: float = 120.0, retries: int = 4, backoff_s: float = 0.5,
                 extra: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ArgumentError("base_url: http://... or https://... wanted")
        if parts.username is not None or parts.query or parts.fragment:
            raise ArgumentError("base_url: no user, query or fragment wanted; a key is api_key")
        if retries < 0 or not timeout_s > 0:
            raise ArgumentError("retries from 0 and timeout_s above 0 wanted")
        self._base, self._model = base_url.rstrip("/"), model
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
        if key and not (key.isascii() and key.isprintable()):
            raise ArgumentError("api_key: printable ASCII wanted")
        self._key = Secret(key or "")
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._extra = dict(extra or {})
        self._opener = urllib.request.build_opener(_NoRedirects())

    def __repr__(self) -> str:
        return f"ChatEndpoint({self._base!r}, {self._model!r})"

    def __call__(self, prompt: str) -> str:
        """The answer to one prompt.

        Raises:
            BackendError: the server cannot be reached, refuses, or answers something else.
        """
        messages = [{"role": "user", "content": prompt}]
        body = {**self._extra, "model": self._model, "messages": messages}
        try:
            answer = json.loads(self._post(json.dumps(body).encode()))
            content = answer["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise self._error("choices[0].message.content wanted, something else came") from None
        if not isinstance(content, str):
            raise self._error("a text wanted, something else came")
        return content

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        for attempt in range(self._retries + 1):
            request = urllib.request.Request(f"{self._base}/chat/completions", body, headers)
            try:
                with self._opener.open(request, timeout=self._timeout_s) as response:
                    answer: bytes = response.read(_LONGEST_ANSWER + 1)
                if len(answer) > _LONGEST_ANSWER:
                    raise self._error(f"an answer of more than {_LONGEST_ANSWER} bytes")
                if response.length:
                    raise http.client.IncompleteRead(answer, response.length)
                return answer
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code}"
                    if error.code not in _AGAIN:
                        raise self._error(problem) from None
            except (OSError, http.client.HTTPException) as error:
                problem = repr(getattr(error, "reason", error))
            if attempt < self._retries:
                time.sleep(min(self._backoff_s * 2**attempt, _LONGEST_WAIT_S))
        raise self._error(f"{problem}, after {self._retries + 1} attempts")

    def _error(self, problem: str) -> BackendError:
        if self._key:
            problem = problem.replace(self._key.reveal(), "***")
        return BackendError(f"questions of {self._model!r} at {self._base}: {problem}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key to wherever it leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


def pairs_by(generate: Generate, count: int = 8) -> Callable[[str], list[tuple[str, str]]]:
    """What asks a language model for ``count`` (question, answer) pairs of a text.

    The function that comes back raises BackendError where the model's reply has no pairs.
    """

    def pairs(text: str) -> list[tuple[str, str]]:
        reply = generate(_PROMPT.format(text=text, count=count))
        found = parse_pairs(reply)
        if not found:
            raise BackendError(
                'endpoint: a JSON list of {"q": ..., "a": ...} wanted, got ' + repr(reply[:200])
            )
        return found[:count]

    return pairs


def parse_pairs(reply: str) -> list[tuple[str, str]]:
    """The pairs in a reply that is a JSON list, with or without text or a fence around it."""
    match = re.search(r"\[.*\]", reply, re.DOTALL)
    try:
        listed = json.loads(match[0]) if match else []
    except ValueError:
        return []
    found = []
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, Mapping):
            q, a = one.get("q", one.get("question")), one.get("a", one.get("answer"))
            if isinstance(q, str) and isinstance(a, str) and q.strip() and a.strip():
                found.append((q.strip(), a.strip()))
    return found
