"""The worker: long work in small units that survive a restart, each done once.

A kind of job says how it is cut into units, what takes long (``prepare``, outside of any
transaction: it may be called twice after a crash) and what is written (``apply``, in the
transaction that marks the unit as done).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.errors import ArgumentError, MemosError, StoreLockedError
from memos.records import jobs as rows
from memos.records.jobs import Job, Unit

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.store import Records

_LONGEST = 500  # characters of an error that is kept
_POLL_S = 1.0  # how often a thread looks for jobs of other processes
_JOIN_S = 60.0


def _nothing(payload: Any) -> Any:
    return None


@dataclass(frozen=True)
class Kind:
    """A kind of job.

    Args:
        plan:    (arguments) -> [(key, payload)]: the units; payload is JSON, keys differ.
        apply:   (connection, payload, prepared) -> {name: number}: the effect, all of it through
            this connection; the numbers of all units are added up.
        prepare: (payload) -> whatever ``apply`` wants; what takes long.
    """

    plan: Callable[[Mapping[str, Any]], Sequence[tuple[str, Any]]]
    apply: Callable[[Connection, Any, Any], Mapping[str, float]]
    prepare: Callable[[Any], Any] = _nothing


class Jobs:
    """The jobs of a store. Thread-safe; several processes may work on them. No thread runs before
    ``start``.

    Args:
        kinds: what can be done, by name.
        limit: jobs that may wait.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        records: Records,
        kinds: Mapping[str, Kind],
        clock: Callable[[], float],
        *,
        limit: int = 64,
    ) -> None:
        self._records, self._clock, self.limit = records, clock, limit
        self._kinds = dict(kinds)
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __iter__(self) -> Any:
        return iter(self.list())

    def __repr__(self) -> str:
        with self._records.database.read() as connection:
            waiting = rows.listed(connection, waiting=True)
        return f"Jobs: {len(waiting)} wait, {'a' if self._thread else 'no'} thread works"

    def register(self, name: str, kind: Kind) -> None:
        """Teach the worker another kind of job."""
        self._kinds[name] = kind

    def submit(self, kind: str, **arguments: Any) -> Job:
        """Queue a job; an equal one that waits already is that one.

        Raises:
            ArgumentError: an unknown kind.
            QuotaError:    ``limit`` jobs wait.
        """
        if kind not in self._kinds:
            raise ArgumentError(f"kind: one of {', '.join(sorted(self._kinds))} wanted")
        with self._records.database.write() as connection:
            id = rows.submit(connection, kind, arguments, self._clock(), self.limit)
            job = rows.one(connection, id)
        self._wake.set()
        return job

    def list(self, limit: int | None = 100) -> list[Job]:
        """Jobs, newest first."""
        with self._records.database.read() as connection:
            return rows.listed(connection, limit)

    def get(self, id: int) -> Job:
        """A job as it stands. Raises NotFoundError."""
        with self._records.database.read() as connection:
            return rows.one(connection, id)

    def cancel(self, id: int) -> Job:
        """Leave what is not done undone. Raises NotFoundError, ArgumentError: it is over."""
        with self._records.database.write() as connection:
            rows.cancel(connection, id, self._clock())
            return rows.one(connection, id)

    def retry(self, id: int) -> Job:
        """Try again what was given up. Raises NotFoundError, ArgumentError: it did not fail."""
        with self._records.database.write() as connection:
            rows.retry(connection, id, self._clock())
            job = rows.one(connection, id)
        self._wake.set()
        return job

    def run_until_empty(
        self, *, progress: Callable[[Job], object] | None = None, only: int | None = None
    ) -> int:
        """Work in this thread until no job waits.

        Args:
            progress: called with the job after each of its units.
            only:     id of the one job to work on.

        Returns:
            Units done. What fails is tried again and then given up: see ``Job.error``.
        """
        count = 0
        while not self._stop.is_set() and (job := self._next(only)) is not None:
            count += self._work(job)
            if progress is not None:
                progress(self.get(job.id))
        return count

    def start(self) -> None:
        """Work in a thread from now on, until ``stop``. Raises ArgumentError where one does."""
        with self._lock:
            if self._thread is not None:
                raise ArgumentError("jobs: a thread works already")
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="memos-jobs", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Let the thread finish its unit, and end it."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._stop.set()
            self._wake.set()
        if thread is not None:
            thread.join(_JOIN_S)
        self._stop.clear()

    # Inside.

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self.run_until_empty()
            except StoreLockedError:
                continue  # another process writes for long: the unit comes again
            self._wake.wait(_POLL_S)

    def _next(self, only: int | None) -> Job | None:
        with self._records.database.read() as connection:
            waiting = rows.listed(connection, waiting=True)
        for job in waiting:
            if job.kind in self._kinds and only in (None, job.id):
                return job
        return None

    def _work(self, job: Job) -> int:
        """Plan a job, or do one of its units; returns how many units were done."""
        kind, database = self._kinds[job.kind], self._records.database
        if job.state == rows.QUEUED:
            try:
                units = kind.plan(job.arguments)
            except Exception as error:  # a user's function may raise anything: it is kept
                self._raise_locked(error)
                with database.write() as connection:
                    rows.fail(connection, job.id, _told(error), self._clock())
                return 0
            with database.write() as connection:
                rows.plan(connection, job.id, units, self._clock())
            return 0
        with database.read() as connection:
            unit = rows.next_unit(connection, job.id)
        return 0 if unit is None else self._do(kind, unit)

    def _do(self, kind: Kind, unit: Unit) -> int:
        database = self._records.database
        try:
            prepared = kind.prepare(unit.payload)
            with database.write() as connection:
                if not rows.is_waiting(connection, unit):
                    return 0
                result = kind.apply(connection, unit.payload, prepared)
                rows.finish(connection, unit, result, self._clock())
            return 1
        except Exception as error:  # a user's function may raise anything: it is kept
            self._raise_locked(error)
            with database.write() as connection:
                rows.give_up(connection, unit, _told(error), self._clock())
            return 0

    @staticmethod
    def _raise_locked(error: Exception) -> None:
        """A store that is busy is no fault of the unit."""
        if isinstance(error, StoreLockedError):
            raise error


def _told(error: Exception) -> str:
    """An error in words; of one that is not ours its type too."""
    text = str(error) if isinstance(error, MemosError) else f"{type(error).__name__}: {error}"
    return text[:_LONGEST]
