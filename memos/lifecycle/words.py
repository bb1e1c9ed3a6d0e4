"""Words of statements, as the rules of this package compare them: plain tables, English."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


SPEAKER_KEYS = ("speaker", "user", "user_name", "user_id", "author", "sender", "from")
# Words that say how something is said, not what.
FILLERS = words("""
    a an the really very quite just actually basically simply well oh so um uh hey btw indeed
    truly totally definitely certainly please that
    """)
NEGATIONS = words("""
    not no never none nobody nothing neither nor without cannot hardly barely rarely seldom
    """)
_CONTRACTIONS = (
    (re.compile(r"\bcan['’]t\b"), "can not"),
    (re.compile(r"\bcannot\b"), "can not"),
    (re.compile(r"\bwon['’]t\b"), "will not"),
    (re.compile(r"\bshan['’]t\b"), "shall not"),
    (re.compile(r"n['’]t\b"), " not"),
    (re.compile(r"\bi['’]m\b"), "i am"),
    (re.compile(r"(?<=\w)['’]re\b"), " are"),
    (re.compile(r"(?<=\w)['’]ve\b"), " have"),
    (re.compile(r"(?<=\w)['’]ll\b"), " will"),
    # "he's" may be "he has" as well: it stays what it is, and equals only itself.
)
_NUMBER_WORDS = {
    **{"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12"},
}
_TOKEN = re.compile(r"\d+(?:[.,:/-]\d+)*%?|[^\W\d_]+(?:['’][^\W\d_]+)*|[$€£+<>=@#&*^-]")


def tokens_of(text: str) -> list[str]:
    """The words and numbers of a text in order: lower case, contractions spelled out."""
    low = unicodedata.normalize("NFKC", text).lower()
    for pattern, full in _CONTRACTIONS:
        low = pattern.sub(full, low)
    found = [token.replace("’", "'") for token in _TOKEN.findall(low)]
    found = [_NUMBER_WORDS.get(token, token) for token in found]
    return [token for token in found if token != "-"]


def content_of(text: str) -> tuple[str, ...]:
    """``tokens_of`` without the words that say how something is said."""
    return tuple(token for token in tokens_of(text) if token not in FILLERS)


def speaker_of(metadata: Mapping[str, Any]) -> str | None:
    """Who said it, where the metadata says so; "user" and "assistant" are roles, not names."""
    for key in SPEAKER_KEYS:
        value = metadata.get(key)
        if isinstance(value, str) and value.strip() and value.lower() not in ("user", "assistant"):
            return value.strip()
    return None
