"""What a query says about itself: who, when, and what kind of answer it wants."""

from __future__ import annotations

import datetime
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos.retrieval.query import parse
from memos.retrieval.times import Calendar, Span, closeness, mentions_time, time_of, times_in
from memos.retrieval.units import asks

DAY = 86400.0
UTC = datetime.timezone.utc


def at(year: int, month: int = 1, day: int = 1) -> float:
    return datetime.datetime(year, month, day, tzinfo=UTC).timestamp()


NOW = at(2024, 3, 15) + 3600


@pytest.mark.parametrize(
    ("pairs", "text", "subjects", "spoken"),
    [
        ([("speaker", "Ada")], "When did Ada swim?", ["Ada"], "When did I swim?"),
        ([("speaker", "Ada")], "What is Ada's dog called?", ["Ada"], "What is my dog called?"),
        ([("speaker", "ada")], "what does ADA like", ["ada"], "what does I like"),
        ([("speaker", "Ada Byron")], "Where does Ada live?", ["Ada Byron"], "Where does I live?"),
        ([("speaker", "Ada Byron")], "Ask Ada Byron", ["Ada Byron"], "Ask I"),
        ([("role", "user")], "What does the user eat?", ["user"], "What does I eat?"),
        ([("speaker", "Ada")], "What is an adapter?", [], "What is an adapter?"),
        ([("speaker", "Will")], "Where will he go?", [], "Where will he go?"),
        ([("speaker", "Will")], "Where did Will go?", ["Will"], "Where did I go?"),
        ([("speaker", "42")], "What is 42?", [], "What is 42?"),
        ([("speaker", "")], "Who?", [], "Who?"),
        ([("city", "Paris")], "Who is in Paris?", [], "Who is in Paris?"),
    ],
)
def test_a_speaker_named_in_the_query_is_its_subject(
    pairs: list[tuple[str, str]], text: str, subjects: list[str], spoken: str
) -> None:
    query = parse(text, pairs)
    assert [value for _, value in query.subjects] == subjects
    assert query.spoken == spoken


def test_other_metadata_is_named_by_all_its_words() -> None:
    pairs = [("city", "New York"), ("city", "York"), ("title", "New Year"), ("type", "the")]
    query = parse("Who lives in New York?", pairs)
    assert query.named == (("city", "New York"), ("city", "York"))
    assert query.subjects == ()


def test_terms_are_the_words_that_carry_meaning() -> None:
    assert parse("When did the dog go to Rome?").terms == "dog go rome"
    assert parse("who are you").terms == "who are you"  # nothing else is left to look up
    assert parse("").terms == ""


def test_kinds_of_answer() -> None:
    assert parse("When did it rain?").asks_when
    assert parse("What year was it?").asks_when
    assert parse("How many dogs?").asks_number
    assert not parse("How many dogs?").asks_when
    assert parse("What is her current job?").asks_recent
    assert not parse("Where is it?").asks_when


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("in 2022", [Calendar(2022)]),
        ("in May 2023", [Calendar(2023, 5)]),
        ("on 8 May 2023", [Calendar(2023, 5, 8)]),
        ("on October 13, 2023", [Calendar(2023, 10, 13)]),
        ("on the 3rd of July", [Calendar(None, 7, 3)]),
        ("on 2023-05-08", [Calendar(2023, 5, 8)]),
        ("this may march on", []),
        ("in march", [Calendar(None, 3)]),
        ("during the summer of 2021", [Calendar(2021, 6), Calendar(2021, 7), Calendar(2021, 8)]),
        ("room 2022b", []),
        ("yesterday", [Span(at(2024, 3, 14), at(2024, 3, 15))]),
        ("two weeks ago", [Span(NOW - 17.5 * DAY, NOW - 10.5 * DAY)]),
        ("last week", [Span(NOW - 14 * DAY, NOW)]),
        ("what is new", []),
    ],
)
def test_times_in_a_query(text: str, times: list[Span | Calendar]) -> None:
    assert list(times_in(text, NOW)) == times


@given(
    st.lists(
        st.one_of(
            st.builds(
                Calendar,
                st.one_of(st.none(), st.integers(1995, 2030)),
                st.one_of(st.none(), st.integers(1, 12)),
                st.none(),
            ),
            st.builds(
                Calendar,
                st.one_of(st.none(), st.integers(1995, 2030)),
                st.integers(1, 12),
                st.integers(1, 31),
            ),
            st.builds(lambda a, b: Span(a, a + b), st.floats(8e8, 1.8e9), st.floats(0, 1e7)),
        ),
        max_size=3,
    ),
    st.lists(st.floats(8e8, 1.8e9), min_size=1, max_size=6),
)
def test_closeness_is_that_of_a_plain_loop(
    times: list[Span | Calendar], stamps: list[float]
) -> None:
    got = closeness(times, numpy.array(stamps))
    for stamp, value in zip(stamps, got, strict=True):
        day = datetime.datetime.fromtimestamp(stamp, UTC)
        inside = False
        for time in times:
            if isinstance(time, Span):
                inside |= time.start <= stamp < time.end
            else:
                inside |= all(
                    want is None or want == have
                    for want, have in (
                        (time.year, day.year),
                        (time.month, day.month),
                        (time.day, day.day),
                    )
                ) and not (time.month is None and time.year is None)
        if any(t == Calendar() for t in times):
            continue
        assert 0 <= value <= 1
        assert (value == 1) >= inside
    if not times:
        assert not got.any()


def test_what_is_told_soon_after_is_near_and_what_is_told_before_is_not() -> None:
    days = numpy.array([at(2023, 4, 25), at(2023, 5, 20), at(2023, 6, 5), at(2023, 9, 1)])
    before, inside, after, late = closeness([Calendar(2023, 5)], days)
    assert inside == 1
    assert after == pytest.approx(math.exp(-0.4))
    assert before == pytest.approx(math.exp(-3))
    assert late < 0.001


def test_a_year_has_twelve_months() -> None:
    days = numpy.array([at(2023, 12, 1), at(2023, 12, 31), at(2024, 1, 20)])
    first, last, after = closeness([Calendar(2023, 12)], days)
    assert first == last == 1
    assert after == pytest.approx(math.exp(-1.9))
    assert closeness([Calendar(None, 2, 29)], numpy.array([at(2024, 2, 29)]))[0] == 1


def test_the_time_of_metadata() -> None:
    assert time_of({"timestamp": "2023-05-08T13:56"}) == at(2023, 5, 8) + 13 * 3600 + 56 * 60
    assert time_of({"timestamp": "2023-05-08T13:56:00Z"}) == at(2023, 5, 8) + 50160
    assert time_of({"date": "2023-05-08"}) == at(2023, 5, 8)
    assert time_of({"date": "2023-05-08T00:00:00+02:00"}) == at(2023, 5, 8) - 7200
    assert time_of({"time": 1.6e9}) == 1.6e9
    assert time_of({"time": True, "date": "soon", "day": "2023-99-99"}) is None
    assert time_of({}) is None


def test_texts_that_say_when_and_texts_that_ask() -> None:
    for text in ("I went yesterday", "two years ago", "in June", "on the 3rd", "Last Friday"):
        assert mentions_time(text), text
    for text in ("I may march on", "He is here", "room 12"):
        assert not mentions_time(text), text
    assert asks("Who? ")
    assert asks("Who? [image: a dog]")
    assert not asks("Who? Me.")
    assert not asks("")
