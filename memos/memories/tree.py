"""TreeTextMemory: documents as trees, whose paragraphs are found with the headings above them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.cube.identity import digest, new_id
from memos.errors import ArgumentError, NotFoundError
from memos.memories import documents
from memos.memories.items import author_of
from memos.memories.tree_queries import TreeQueries

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.scope import Scope
    from memos.records.writes import Change, New

_SUFFIXES = {".md": "markdown", ".markdown": "markdown", ".mdown": "markdown", ".mkd": "markdown"}
_SUFFIXES |= {".txt": "text", ".text": "text", "": "text"}


@dataclass(frozen=True)
class _Place:
    """What a cube hands down to those below it."""

    thread: str
    titles: tuple[str, ...]  # of it and those above it, root first
    expires_at: float | None


class TreeTextMemory(TreeQueries):
    """Texts that stand above and below one another. Thread-safe once registered.

    The children of a cube keep the order in which they were added; one that was moved is the
    last of its new siblings. The short one-line texts up to eight levels above a cube - its
    headings - are words of its full text. ``thread`` of a cube is the id of its root. A cube
    lives no longer than those above it: deleting one deletes what is below it, and a ttl also
    counts there.
    """

    kind = "tree"

    # Changing the tree.

    def move(
        self, memory_id: str, new_parent_id: str | None, *, author: str | None = None
    ) -> MemCube:
        """Put a cube, and all below it, under another one; a new version of the cube.

        Args:
            new_parent_id: None: it becomes a root. It is the last of its new siblings, also
                where the parent stays.

        Raises:
            NotFoundError: either is not there.
            ArgumentError: the new parent is the cube itself or stands below it.
        """
        from memos.records.trees import ancestors_of
        from memos.records.writes import Change

        now, scope = self._clock(), self.scope()
        with self.records.database.write() as connection:
            seq = self.table.seq(connection, memory_id, scope)
            scope.check_cube(connection, "write", seq, memory_id)
            self.wake(connection, [seq], now)
            parent = None
            if new_parent_id is None:
                scope.check_memory(connection, "write", self.name)
            else:
                parent = self._parent(connection, "new_parent_id", new_parent_id, scope)
                self.wake(connection, [parent], now)
                if parent == seq or seq in ancestors_of(connection, [parent])[parent]:
                    raise ArgumentError(
                        f"new_parent_id: a cube that is not below {memory_id!r} wanted, got "
                        f"{new_parent_id!r}"
                    )
            place = None if parent is None else self._places(connection, [parent])[parent]
            thread = memory_id if place is None else place.thread
            _, position = self.records.database.allocate(connection, 1)
            change = Change(move=True, parent=parent, position=position, thread=thread)
            change.author = author_of(author)
            self.table.update(connection, seq, change, now)
            self._hand_down(connection, seq)
            return self._written(connection, seq, scope)

    # Documents.

    def add_document(
        self,
        text_or_path: str | os.PathLike[str],
        *,
        format: str | None = None,
        title: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        parent_id: str | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> MemCube:
        """Import a document as a tree: headings become sections, the blocks stand below them.

        Args:
            text_or_path: a text, or a ``pathlib.Path`` of a UTF-8 file. A string is never taken
                for a path.
            format:   "markdown" or "text"; None: by the file's suffix, "markdown" for a text.
            title:    of the document; None: of its front matter, its one first-level heading
                where it begins with that, the name of the file, or its first words.
            metadata: of the root, added to the front matter's.
            parent_id: the cube above the document.
            progress: called with the number of cubes stored.

        Returns:
            The root. It and all below it are stored in one transaction. A document that is there
            already - same text, title, metadata and parent - is that one, as it is now.

        Raises:
            ArgumentError: nothing in it, not UTF-8, or an argument out of contract.
            NotFoundError: no such file, or no such parent.
        """
        text, name, suffix = _text_of(text_or_path)
        if format is None:
            format = "markdown" if suffix is None else _SUFFIXES.get(suffix, "")
            if not format:
                raise ArgumentError(
                    f"format: 'markdown' or 'text' wanted for a file with suffix {suffix!r}"
                )
        if metadata is not None and not isinstance(metadata, Mapping):
            raise ArgumentError(f"metadata: a dict wanted, got {type(metadata).__name__}")
        if title is not None and (not isinstance(title, str) or not title.strip()):
            raise ArgumentError(f"title: a text that is not empty wanted, got {title!r}")
        found = documents.parse(text, format, title, name)
        whole = {**found.front, **dict(metadata or {}), **found.layout}
        whole["digest"] = digest(text).hex()
        root = {"content": found.title, "metadata": whole, "parent_id": parent_id}
        known = self._known(root)
        if known is not None:
            return known
        ids = [new_id() for _ in range(len(found.nodes) + 1)]
        items: list[dict[str, Any]] = [{**root, "id": ids[0]}]
        for node, id in zip(found.nodes, ids[1:], strict=True):
            item = {"content": node.content, "metadata": node.metadata}
            items.append({**item, "id": id, "parent_id": ids[node.parent + 1]})
        stored = self._store(items, {})
        if progress is not None:
            progress(len(stored))
        return stored[0]

    def export_text(self, memory_id: str) -> str:
        """The text of a cube and all below it; for an import, the document.

        Several blank lines between blocks become one, and the text ends with one line end;
        everything else is as it was imported or changed since. Raises NotFoundError.
        """
        from memos.records.trees import ancestors_of, descendants_of

        scope = self.scope()
        with self.records.database.read() as connection:
            seq = self.table.seq(connection, memory_id, scope)
            above = ancestors_of(connection, [seq])[seq]
            below = descendants_of(connection, [seq])[seq]
            depth = {seq: len(above)}
            for one, parent in below:
                depth[one] = depth[parent] + 1
            cubes = self.table.load(connection, {*depth, *above}, scope)
        format = next(
            (
                cubes[one].metadata["format"]
                for one in (seq, *above)
                if one in cubes and cubes[one].metadata.get("format") in documents.FORMATS
            ),
            "markdown",
        )
        nodes = [
            (depth[one], cubes[one].content, cubes[one].metadata) for one in depth if one in cubes
        ]
        return documents.render(nodes, format)

    # What the base asks for.

    def _place_all(
        self,
        connection: Connection,
        news: Sequence[New],
        items: Sequence[Mapping[str, Any]],
        names: Mapping[str, int],
    ) -> None:
        """Parents that are stored get their number; those of this batch -1 - their index."""
        scope = self.scope()
        here: dict[str, int] = {}
        known: dict[str, int] = {}
        for i, (new, item) in enumerate(zip(news, items, strict=True)):
            parent_id = item.get("parent_id")
            if parent_id in here:
                new.parent = -1 - here[parent_id]
            elif parent_id is not None:
                if parent_id not in known:
                    known[parent_id] = self._parent(
                        connection, "parent_id", parent_id, scope, names
                    )
                    self.wake(connection, [known[parent_id]], scope.now)
                new.parent = known[parent_id]
            here[new.id] = i

    def _duplicates(self, connection: Connection, news: Sequence[New]) -> list[int | None]:
        """As the base; also gives every new cube its parent's number and what that hands down.

        A cube's parent decides whether it is a duplicate, and the number of a new parent is
        known only after the duplicates before it: so one after the other.
        """
        from memos.records.trees import next_seq

        first = following = next_seq(connection)
        scope = self.scope()
        keep = self._keeps_all(news)
        outside = [new.parent for new in news if new.parent is not None and new.parent > 0]
        places = self._places(connection, list(dict.fromkeys(outside)))
        stored = {}
        if not keep:
            digests = [new.digest for new in news if new.parent is None or new.parent > 0]
            stored = self.table.duplicates(connection, digests, scope)
        known: list[int | None] = []
        seqs: list[int] = []
        seen: dict[bytes, int] = {}
        for new in news:
            looked_up = new.parent is None or new.parent > 0
            if new.parent is not None and new.parent < 0:
                new.parent = seqs[-1 - new.parent]
            name = b"" if keep else new.digest
            again = stored.get(name)
            if not keep and not looked_up and new.parent is not None and new.parent < first:
                again = self.table.duplicates(connection, [name], scope).get(name)
            if again is None and name in seen:
                seqs.append(seen[name])
                known.append(0)
                continue
            known.append(again)
            if again is not None:
                seqs.append(again)
                continue
            place = None
            if new.parent is not None:
                if new.parent not in places:
                    places |= self._places(connection, [new.parent])
                place = places[new.parent]
            places[following] = self._inherit(new, place)
            seqs.append(following)
            if not keep:
                seen[name] = following
            following += 1
        return known

    def _after_update(self, connection: Connection, seq: int, old: MemCube, change: Change) -> None:
        if change.text is not None or change.metadata is not None or change.expires_at is not None:
            self._hand_down(connection, seq)

    def _with_dependents(self, connection: Connection, seq: int) -> list[int]:
        from memos.records.trees import descendants_of

        return [seq, *(below for below, _ in descendants_of(connection, [seq])[seq])]

    def _hang_on(self, connection: Connection, seqs: Sequence[int]) -> list[int]:
        from memos.records.trees import ancestors_of

        return [one for above in ancestors_of(connection, seqs).values() for one in above]

    # Inside.

    def _parent(
        self,
        connection: Connection,
        what: str,
        id: Any,
        scope: Scope,
        names: Mapping[str, int] | None = None,
    ) -> int:
        if not isinstance(id, str):
            raise ArgumentError(f"{what}: the id of a cube wanted, got {id!r}")
        found = self.table.find(connection, id, scope)
        if found is None and names is not None and id in names:
            alive = self.table.load(connection, [names[id]], scope)
            found = next(iter(alive), None)
        if found is None:
            raise NotFoundError(f"{what}: memory {self.name!r} has no cube {id!r}")
        scope.check_cube(connection, "write", found, id)
        return found

    def _places(self, connection: Connection, seqs: Sequence[int]) -> dict[int, _Place]:
        """What these stored cubes hand down."""
        from memos.records.trees import TITLES, ancestors_of, title_of

        above = ancestors_of(connection, seqs, TITLES - 1)
        everything = {*above, *(seq for found in above.values() for seq in found)}
        rows = {row.seq: row for row in self.table.rows(connection, sorted(everything))}
        return {
            seq: _Place(
                rows[seq].thread or rows[seq].id,
                tuple(title_of(rows[one].text) for one in (*reversed(found), seq)),
                rows[seq].expires_at,
            )
            for seq, found in above.items()
        }

    def _inherit(self, new: New, place: _Place | None) -> _Place:
        """Give a new cube what the one above it hands down; returns what it hands down itself."""
        from memos.records.trees import TITLES, context_below, title_of

        titles = () if place is None else place.titles
        new.thread = new.id if place is None else place.thread
        new.expires_at = _earlier(new.expires_at, None if place is None else place.expires_at)
        new.context = context_below(new.metadata, titles)
        return _Place(new.thread, (*titles, title_of(new.text))[-TITLES:], new.expires_at)

    def _hand_down(self, connection: Connection, seq: int) -> None:
        """After a change of a cube: set right what it and those below it have from above."""
        from memos.records.trees import TITLES, context_below, descendants_of, settle, title_of

        below = descendants_of(connection, [seq])[seq]
        rows = {row.seq: row for row in self.table.rows(connection, [seq, *(s for s, _ in below)])}
        top = rows[seq]
        above = [] if top.parent is None else [top.parent]
        places: dict[int | None, _Place] = dict(self._places(connection, above).items())
        contexts: dict[int, str] = {}
        life: dict[int, float | None] = {}
        thread = places[top.parent].thread if top.parent is not None else top.id
        for one, parent in [(seq, top.parent), *below]:
            row, place = rows[one], places.get(parent)
            titles = () if place is None else place.titles
            expires_at = _earlier(row.expires_at, None if place is None else place.expires_at)
            contexts[one] = context_below(json.loads(row.metadata), titles)
            if (expires_at, thread) != (row.expires_at, row.thread):
                life[one] = expires_at
            places[one] = _Place(thread, (*titles, title_of(row.text))[-TITLES:], expires_at)
        self.table.reword(connection, contexts)
        if life:
            settle(connection, self.records.database.allocate(connection)[0], life, thread)

    def _known(self, item: Mapping[str, Any]) -> MemCube | None:
        """The living cube that this item repeats."""
        if self.on_duplicate == "keep":
            return None
        now, scope = self._clock(), self.scope()
        new = self._new(item, now)
        with self.records.database.read() as connection:
            if item["parent_id"] is not None:
                new.parent = self._parent(connection, "parent_id", item["parent_id"], scope)
            again = self.table.duplicates(connection, [new.digest], scope).get(new.digest)
            if again is None:
                return None
            if self.on_duplicate == "error":
                raise ArgumentError(f"memory {self.name!r}: the document is there already")
            return self.table.one(connection, again, scope)


def _earlier(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _text_of(source: Any) -> tuple[str, str | None, str | None]:
    """(text, name, suffix) of a document; the last two None where it is no file."""
    if isinstance(source, str):
        if "\n" not in source and source.lower().endswith(tuple(filter(None, _SUFFIXES))):
            raise ArgumentError(
                f"text_or_path: a text, or a pathlib.Path for a file, wanted, got {source!r}"
            )
        return source, None, None
    if not isinstance(source, os.PathLike):
        raise ArgumentError(
            f"text_or_path: a text or a pathlib.Path wanted, got {type(source).__name__}"
        )
    path = Path(source)
    try:
        return path.read_bytes().decode("utf-8-sig"), path.stem, path.suffix.lower()
    except FileNotFoundError as error:
        raise NotFoundError(f"text_or_path: no file {path}") from error
    except OSError as error:
        raise ArgumentError(f"text_or_path: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"text_or_path: {path} is not UTF-8 (byte {error.start:,}: {error.reason})"
        ) from error
