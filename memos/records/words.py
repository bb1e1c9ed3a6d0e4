"""What full text reads of a cube: the text, and its metadata in words.

Dates are spelled out, so that "in May" finds a timestamp: 2023-05-08 becomes "Monday 8 May 2023".
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Any

_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)(?:[T ]\d\d:\d\d|$)")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_LONGEST = 200  # characters of one value: longer ones are content, not metadata


def context_of(metadata: Mapping[str, Any]) -> str:
    """The values of the metadata, one after the other."""
    return " ".join(_words(metadata))


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key in sorted(value):  # as it is read back
            yield from _words(value[key])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str) and len(value) <= _LONGEST:
        yield spelled(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def spelled(value: str) -> str:
    """A date as people write it; any other string as it is."""
    match = _DATE.match(value)
    if match is None:
        return value
    year, month, day = map(int, match.groups())
    try:
        date = datetime.date(year, month, day)
    except ValueError:
        return value
    return f"{_DAYS[date.weekday()]} {day} {_MONTHS[month - 1]} {year}"
