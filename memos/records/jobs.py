"""Jobs as rows: what is to be done, unit by unit, and how far it is.

A unit's mark and its effect are written in one transaction, so that each is done once whatever
dies in between; two processes that work on one job share its units.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, func, select

from memos.cube.identity import canonical
from memos.errors import ArgumentError, NotFoundError, QuotaError
from memos.records.life_schema import job_units, jobs
from memos.records.links import chunks

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "QUEUED", "RUNNING", "DONE", "FAILED", "CANCELLED"
_OPEN = (QUEUED, RUNNING)
WAITING = "WAITING"  # a unit
_TRIES = 3


@dataclass(frozen=True)
class Job:
    """A job as it stands.

    Args:
        kind:   what is done; ``arguments``: with what.
        state:  QUEUED (not looked at), RUNNING (its units are known), DONE, FAILED (some units
            were given up), CANCELLED.
        units:  how many there are; done, failed: of them.
        result: what the units add up.
        error:  of the last unit that was given up.
    """

    id: int
    kind: str
    arguments: Mapping[str, Any]
    state: str
    units: int = 0
    done: int = 0
    failed: int = 0
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.state not in _OPEN


@dataclass(frozen=True)
class Unit:
    """One piece of a job, done as a whole or not at all."""

    job: int
    number: int
    key: str
    payload: Any


def submit(
    connection: Connection, kind: str, arguments: Mapping[str, Any], at: float, limit: int
) -> int:
    """Queue a job; returns its id. An equal one that waits already is that one.

    Raises QuotaError where ``limit`` jobs wait.
    """
    text = canonical(dict(arguments), "arguments")
    waiting = connection.execute(
        select(jobs.c.id, jobs.c.kind, jobs.c.arguments, jobs.c.state).where(
            jobs.c.state.in_(_OPEN)
        )
    ).all()
    for row in waiting:
        if (row.kind, row.arguments, row.state) == (kind, text, QUEUED):
            return int(row.id)
    if len(waiting) >= limit:
        raise QuotaError(f"jobs: at most {limit} may wait, and as many do")
    new = {"kind": kind, "arguments": text, "state": QUEUED, "result": "{}", "units": 0}
    new |= {"done": 0, "failed": 0, "created_at": at, "updated_at": at}
    made = connection.execute(jobs.insert().returning(jobs.c.id), new).scalar_one()
    return int(made)


def listed(connection: Connection, limit: int | None = None, *, waiting: bool = False) -> list[Job]:
    """Jobs, newest first; with ``waiting`` those that are not over, oldest first."""
    statement = select(jobs)
    if waiting:
        statement = statement.where(jobs.c.state.in_(_OPEN)).order_by(jobs.c.id)
    else:
        statement = statement.order_by(jobs.c.id.desc())
    return [_job(row) for row in connection.execute(statement.limit(limit))]


def one(connection: Connection, id: int) -> Job:
    """A job. Raises NotFoundError."""
    row = connection.execute(select(jobs).where(jobs.c.id == id)).first()
    if row is None:
        raise NotFoundError(f"jobs: no job {id!r}")
    return _job(row)


def plan(connection: Connection, id: int, units: Sequence[tuple[str, Any]], at: float) -> None:
    """Write down the units of a queued job: (key, payload); equal keys are one unit."""
    if one(connection, id).state != QUEUED:
        return  # another process was quicker
    different = dict(reversed(list(units)))
    rows = [
        (id, number, key, canonical(payload, "payload"), WAITING, 0)
        for number, (key, payload) in enumerate(reversed(different.items()))
    ]
    if rows:
        connection.exec_driver_sql("INSERT INTO job_units VALUES (?, ?, ?, ?, ?, ?)", rows)
    new = {"units": len(rows), "state": RUNNING, "updated_at": at}
    connection.execute(jobs.update().where(jobs.c.id == id).values(new))
    _settle(connection, id, at)


def next_unit(connection: Connection, id: int) -> Unit | None:
    """The first unit of a job that waits."""
    own = job_units.c
    row = connection.execute(
        select(own.number, own.key, own.payload)
        .where(own.job == id, own.state == WAITING)
        .order_by(own.tries, own.number)
        .limit(1)
    ).first()
    return None if row is None else Unit(id, row.number, row.key, json.loads(row.payload))


def is_waiting(connection: Connection, unit: Unit) -> bool:
    """Whether nobody has done this unit yet, and its job is still wanted."""
    state = connection.execute(_mine(select(job_units.c.state), unit)).scalar()
    return state == WAITING and one(connection, unit.job).state == RUNNING


def finish(connection: Connection, unit: Unit, result: Mapping[str, Any], at: float) -> None:
    """In the transaction of its effect: this unit is done, once."""
    connection.execute(_mine(job_units.update(), unit).values(state=DONE, payload="null"))
    job = one(connection, unit.job)
    whole = dict(job.result)
    for name, value in result.items():
        whole[name] = whole.get(name, 0) + value
    new = {"done": job.done + 1, "result": canonical(whole, "result"), "updated_at": at}
    connection.execute(jobs.update().where(jobs.c.id == unit.job).values(new))
    _settle(connection, unit.job, at)


def give_up(connection: Connection, unit: Unit, error: str, at: float) -> None:
    """A unit failed: it is tried again, three times in all, after the others."""
    if not is_waiting(connection, unit):
        return
    tries = connection.execute(_mine(select(job_units.c.tries), unit)).scalar_one() + 1
    state = FAILED if tries >= _TRIES else WAITING
    connection.execute(_mine(job_units.update(), unit).values(state=state, tries=tries))
    new: dict[str, Any] = {"error": error, "updated_at": at}
    if state == FAILED:
        new["failed"] = one(connection, unit.job).failed + 1
    connection.execute(jobs.update().where(jobs.c.id == unit.job).values(new))
    _settle(connection, unit.job, at)


def fail(connection: Connection, id: int, error: str, at: float) -> None:
    """A job whose units cannot be told is over."""
    new = {"state": FAILED, "error": error, "updated_at": at}
    connection.execute(jobs.update().where(jobs.c.id == id, jobs.c.state == QUEUED).values(new))


def cancel(connection: Connection, id: int, at: float) -> None:
    """What is not done of a job is not done any more. Raises NotFoundError, ArgumentError."""
    if one(connection, id).is_over:
        raise ArgumentError(f"jobs: job {id} is over")
    new = {"state": CANCELLED, "updated_at": at}
    connection.execute(jobs.update().where(jobs.c.id == id).values(new))
    connection.execute(
        job_units.update()
        .where(job_units.c.job == id, job_units.c.state == WAITING)
        .values(state=CANCELLED, payload="null")
    )


def retry(connection: Connection, id: int, at: float) -> None:
    """Try again what was given up. Raises NotFoundError, ArgumentError."""
    job = one(connection, id)
    if job.state != FAILED:
        raise ArgumentError(f"jobs: a job that FAILED wanted, job {id} is {job.state}")
    connection.execute(
        job_units.update()
        .where(job_units.c.job == id, job_units.c.state == FAILED)
        .values(state=WAITING, tries=0)
    )
    state = RUNNING if job.units else QUEUED
    new = {"state": state, "failed": 0, "error": None, "updated_at": at}
    connection.execute(jobs.update().where(jobs.c.id == id).values(new))


def done_before(connection: Connection, kind: str, keys: Sequence[str]) -> set[str]:
    """Those of these unit keys that any job of this kind has done."""
    return {
        row[0]
        for part in chunks(list(keys))
        for row in connection.execute(
            select(job_units.c.key)
            .join(jobs, jobs.c.id == job_units.c.job)
            .where(jobs.c.kind == kind, job_units.c.key.in_(part), job_units.c.state == DONE)
        )
    }


def _settle(connection: Connection, id: int, at: float) -> None:
    own = job_units.c
    left = connection.execute(
        select(func.count()).where(own.job == id, own.state == WAITING)
    ).scalar_one()
    job = one(connection, id)
    if left == 0 and job.state == RUNNING:
        state = FAILED if job.failed else DONE
        connection.execute(jobs.update().where(jobs.c.id == id).values(state=state, updated_at=at))


def _mine(statement: Any, unit: Unit) -> Any:
    return statement.where(job_units.c.job == unit.job, job_units.c.number == unit.number)


def _job(row: Row[Any]) -> Job:
    values = row._asdict()
    values["arguments"] = json.loads(row.arguments)
    values["result"] = json.loads(row.result)
    return Job(**values)
