"""What a query says about itself: who, when, which, and what kind of answer it wants.

The words are English ones; a query in another language has no cues, and is answered by its
meaning and its words alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from memos.retrieval.times import MONTHS, Calendar, Span, times_in

# Metadata that says who speaks: what they say is in the first person.
_SPEAKERS = "speaker author user user_name username sender from role who"
SPEAKER_KEYS = frozenset(_SPEAKERS.split())
_STOP = """
    a about after again all also am an and any are as at be because been before being both but
    by can could d did do does doing don during each either for from further get got had has
    have having he her here hers herself him himself his how i if in into is it its itself just
    ll m me more most my myself no nor not now of off on once only or other our ours out over
    own re s same she should so some such t than that the their theirs them then there these
    they this those through to too under until up us ve very was we were what when where whether
    which while who whom whose why will with would you your yours yourself
"""
STOP_WORDS = frozenset(_STOP.split())
_WORD = re.compile(r"[^\W_]+")
_WHEN = re.compile(
    r"\b(when|(what|which) (year|month|date|day|time|week)|how long|how old|what age)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\bhow (many|much|often|long|old)\b", re.IGNORECASE)
_RECENT = re.compile(
    r"\b(latest|newest|most recent|recently|currently|current|these days|so far|right now)\b",
    re.IGNORECASE,
)
_HAS_NUMBER = re.compile(
    r"\b(\d+|one|two|three|four|five|six|seven|eight|nine|ten|once|twice|several|couple|few)\b",
    re.IGNORECASE,
)

Pair = tuple[str, str]


@dataclass(frozen=True)
class Query:
    """A query, read.

    Args:
        text:      as it was asked.
        words:     its different words, in lower case.
        terms:     what is looked up in the text index: the words that carry meaning.
        spoken:    what is embedded: a speaker's name is replaced by the first person, since what
            they said is nearer to it than what was said to them.
        subjects:  (key, value) of speakers that it names.
        named:     (key, value) of other metadata that it names.
        times:     the times that it names.
        asks_when, asks_number, asks_recent: the kind of answer it wants.
        now:       seconds since 1970.
    """

    text: str
    words: tuple[str, ...] = ()
    terms: str = ""
    spoken: str = ""
    subjects: tuple[Pair, ...] = ()
    named: tuple[Pair, ...] = ()
    times: tuple[Span | Calendar, ...] = ()
    asks_when: bool = False
    asks_number: bool = False
    asks_recent: bool = False
    now: float = 0.0


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, in order."""
    return _WORD.findall(text.lower())


def has_number(text: str) -> bool:
    """Whether a text says how many."""
    return _HAS_NUMBER.search(text) is not None


def parse(text: str, pairs: Iterable[Pair] = (), now: float = 0.0) -> Query:
    """Read a query.

    Args:
        text:  the query.
        pairs: (key, value) of the metadata that may be named in it.
        now:   seconds since 1970; "last week" is seen from there.
    """
    words = words_of(text)
    subjects: list[Pair] = []
    named: list[Pair] = []
    names: list[str] = []
    for key, value in sorted(set(pairs)):
        is_speaker = key.lower() in SPEAKER_KEYS
        name = _name_in(text, words, value, is_speaker)
        if name is not None:
            (subjects if is_speaker else named).append((key, value))
            if is_speaker:
                names.append(name)
    terms = [word for word in dict.fromkeys(words) if word not in STOP_WORDS]
    return Query(
        text=text,
        words=tuple(dict.fromkeys(words)),
        terms=" ".join(terms or words),
        spoken=_first_person(text, names),
        subjects=tuple(subjects),
        named=tuple(named),
        times=times_in(text, now),
        asks_when=_WHEN.search(text) is not None,
        asks_number=_NUMBER.search(text) is not None,
        asks_recent=_RECENT.search(text) is not None,
        now=now,
    )


def _name_in(text: str, words: list[str], value: str, is_speaker: bool) -> str | None:
    """The words of the query that name this value; a speaker's first or last name will do."""
    parts = words_of(value)
    if not parts or not any(part.isalpha() for part in parts):
        return None
    if _occurs(parts, words):
        if len(parts) > 1 or _is_name(text, value, parts[0]):
            return " ".join(parts)
    elif is_speaker and 1 < len(parts) <= 3:
        written = _WORD.findall(value)
        for part, spelling in ((parts[0], written[0]), (parts[-1], written[-1])):
            if part in words and len(part) > 2 and _is_name(text, spelling, part):
                return part
    return None


def _occurs(parts: list[str], words: list[str]) -> bool:
    n = len(parts)
    return any(words[i : i + n] == parts for i in range(len(words) - n + 1))


def _is_name(text: str, written: str, word: str) -> bool:
    """A word that is also an everyday one is a name only where it is written like one."""
    if len(word) < 2:
        return False
    if word not in STOP_WORDS and word not in MONTHS:
        return True
    return (
        written[:1].isupper() and re.search(rf"(?<=\S )\b{re.escape(written)}\b", text) is not None
    )


def _first_person(text: str, names: list[str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        pattern = r"\b(?:the\s+)?" + r"[\W_]+".join(map(re.escape, name.split()))
        text = re.sub(rf"{pattern}(?:['’]s|s['’])(?!\w)", "my", text, flags=re.IGNORECASE)
        text = re.sub(rf"{pattern}\b", "I", text, flags=re.IGNORECASE)
    return " ".join(text.split())
