"""Times in English text: what a query asks for, how near a unit is to it, and whether a text
mentions one."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from memos.retrieval.source import Array

_MONTHS = "january february march april may june july august september october november december"
MONTHS = _MONTHS.split()
_DAYS = "monday|tuesday|wednesday|thursday|friday|saturday|sunday"
_SEASONS = {"spring": (3, 4, 5), "summer": (6, 7, 8), "autumn": (9, 10, 11), "winter": (12, 1, 2)}
_DAY_S = 86400.0
# People tell what happened soon after it happened, and seldom before.
_AFTER_S, _BEFORE_S = 10 * _DAY_S, 2 * _DAY_S
_MOST_YEARS = 40
_TIME_KEYS = ("timestamp", "datetime", "date", "time", "event_time", "said_at", "at", "day")

_AMBIGUOUS = ("may", "march")  # verbs too
_MENTION = re.compile(
    r"\b(yesterday|today|tonight|tomorrow|ago|last|next|recently|since|weekends?|weeks?|months?"
    r"|years?|this (?:morning|afternoon|evening|summer|winter|spring|fall|autumn)"
    rf"|{'|'.join(m for m in MONTHS if m not in _AMBIGUOUS)}|{_DAYS}"
    r"|(?:19|20)\d\d|\d+(?:st|nd|rd|th))\b",
    re.IGNORECASE,
)
_ISO = re.compile(r"\b(\d{4})-(\d\d)-(\d\d)\b")
_STAMP = re.compile(r"\d{4}-\d\d-\d\d(?!\d)")
_YEAR = re.compile(r"\b((?:19|20)\d\d)\b")
_MONTH = re.compile(rf"\b({'|'.join(MONTHS)})\b")
_DAY_AFTER = re.compile(r"\s+(\d{1,2})(?:st|nd|rd|th)?\b(?!:)")
_DAY_BEFORE = re.compile(r"\b(\d{1,2})(?:st|nd|rd|th)?(?: of)?,?\s*$")
_AS_MONTH = re.compile(r"\b(in|on|of|during|since|until|before|after|by|early|late|mid)[ -]$")
_AGO = re.compile(r"\b(\d+|an?|one|two|three|four|five|six) (day|week|month|year)s? ago\b")
_LAST_N = re.compile(r"\b(?:last|past) (\d+|two|three|four|five|six) (day|week|month|year)s\b")
_NEAR = re.compile(r"\b(last|this|past) (week|month|year)\b")
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_UNIT_DAYS = {"day": 1, "week": 7, "month": 30, "year": 365}


@dataclass(frozen=True)
class Span:
    """From ``start`` to before ``end``, seconds since 1970."""

    start: float
    end: float


@dataclass(frozen=True)
class Calendar:
    """A year, month or day; what is None may be any."""

    year: int | None = None
    month: int | None = None
    day: int | None = None

    def span(self, year: int) -> Span | None:
        """In this year; None where it has no such day."""
        try:
            if self.month is None:
                return Span(_seconds(year, 1, 1), _seconds(year + 1, 1, 1))
            start = _seconds(year, self.month, self.day or 1)
        except ValueError:
            return None
        if self.day is not None:
            return Span(start, start + _DAY_S)
        return Span(start, _seconds(year + self.month // 12, self.month % 12 + 1, 1))


def mentions_time(text: str) -> bool:
    """Whether a text says when: "yesterday", "in June", "two years ago"."""
    return _MENTION.search(text) is not None


def times_in(query: str, now: float) -> tuple[Span | Calendar, ...]:
    """The times a query names; relative ones are seen from ``now``."""
    low = query.lower()
    found: list[Span | Calendar] = []
    for year, month, day in _ISO.findall(low):
        found.append(Calendar(int(year), int(month), int(day)))
    low = _ISO.sub(" ", low)
    years = [int(year) for year in _YEAR.findall(low)]
    months = [match for match in _MONTH.finditer(low) if _is_month(match, low)]
    for match in months:
        after, before = low[match.end() : match.end() + 12], low[: match.start()][-12:]
        day_of = _DAY_AFTER.match(after) or _DAY_BEFORE.search(before)
        number = int(day_of[1]) if day_of is not None and 1 <= int(day_of[1]) <= 31 else None
        year = years[0] if years else None
        found.append(Calendar(year, MONTHS.index(match[1]) + 1, number))
    if not months:
        seasons = [name for name in _SEASONS if re.search(rf"\b{name}\b", low)]
        for name in seasons:
            year = years[0] if years else None
            found.extend(Calendar(year, month) for month in _SEASONS[name])
        if not seasons:
            found.extend(Calendar(year) for year in years)
    return (*found, *_relative(low, now))


def closeness(times: Sequence[Span | Calendar], at: Array) -> Array:
    """1 inside one of the times, less the further from it; [n] for seconds since 1970 [n]."""
    best = numpy.zeros(len(at))
    if not len(at) or not times:
        return best
    first, last = (_year(float(t)) for t in (at.min(), at.max()))
    years = range(max(first, last - _MOST_YEARS), last + 1)
    for time in times:
        if isinstance(time, Span):
            spans: list[Span | None] = [time]
        elif time.year is not None:
            spans = [time.span(time.year)]
        else:
            spans = [time.span(year) for year in years]
        for span in spans:
            if span is not None:
                early = numpy.maximum(span.start - at, 0) / _BEFORE_S
                late = numpy.maximum(at - span.end, 0) / _AFTER_S
                numpy.maximum(best, numpy.exp(-early - late), out=best)
    return best


def time_of(metadata: Mapping[str, Any]) -> float | None:
    """When the metadata says that it happened, in seconds since 1970; without a zone: UTC."""
    for key in _TIME_KEYS:
        value = metadata.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 1e8:
            return float(value)
        if isinstance(value, str) and _STAMP.match(value):
            try:
                date = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                continue
            return (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp()
    return None


def _is_month(match: re.Match[str], low: str) -> bool:
    if match[1] not in _AMBIGUOUS:
        return True
    before, after = low[: match.start()], low[match.end() :]
    return bool(
        _AS_MONTH.search(before)
        or _DAY_BEFORE.search(before)
        or re.match(r"(?:\s+\d{1,2}(?:st|nd|rd|th)?\b|,?\s+(?:19|20)\d\d\b)", after)
    )


def _relative(low: str, now: float) -> list[Span]:
    today = now - now % _DAY_S
    found = []
    if re.search(r"\byesterday\b", low):
        found.append(Span(today - _DAY_S, today))
    if re.search(r"\b(today|tonight|this morning|this afternoon|this evening)\b", low):
        found.append(Span(today, today + _DAY_S))
    for number, unit in _AGO.findall(low):
        length = _UNIT_DAYS[unit] * _DAY_S
        middle = now - (_NUMBERS.get(number) or int(number)) * length
        found.append(Span(middle - length / 2, middle + length / 2))
    for number, unit in _LAST_N.findall(low):
        found.append(
            Span(now - (_NUMBERS.get(number) or int(number)) * _UNIT_DAYS[unit] * _DAY_S, now)
        )
    for which, unit in _NEAR.findall(low):
        length = _UNIT_DAYS[unit] * _DAY_S
        found.append(Span(now - 2 * length, now) if which == "last" else Span(now - length, now))
    return found


def _seconds(year: int, month: int, day: int) -> float:
    return datetime.datetime(year, month, day, tzinfo=datetime.timezone.utc).timestamp()


def _year(seconds: float) -> int:
    return 1970 + int(seconds // (365.2425 * _DAY_S))
