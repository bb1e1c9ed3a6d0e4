"""What commands print: JSON for programs, tables for people, nothing that a terminal obeys."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memos.cube import Hit, MemCube

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

# Control characters, those that change the direction of writing, lone surrogates.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def safe(text: str, keep: str = "") -> str:
    """The text with what a terminal would obey spelled out: an escape becomes ``\\x1b``.

    Args:
        keep: characters that stay, such as "\\n\\t".
    """
    return _UNSAFE.sub(
        lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode(),
        text,
    )


def one_line(text: str, width: int) -> str:
    """The text on one line of at most ``width`` characters."""
    line = safe(" ".join(text[: 8 * width + 200].split()))
    is_cut = len(line) > width or len(text) > 8 * width + 200
    return line[: max(width - 3, 0)].rstrip() + "..." if is_cut else line


def describe(cube: MemCube) -> str:
    """A cube's content in words."""
    content = cube.content
    if isinstance(content, dict):
        from memos.memories.graph_content import node_text, relationship_text

        if cube.kind == "node":
            return node_text(content)
        if cube.kind == "relationship":
            return relationship_text(content, content["source_id"], content["target_id"])
        if "vector" in content:
            numbers = f"vector of {len(content['vector']):,} numbers"
            return f"{content['text']} ({numbers})" if content.get("text") else numbers
    return content if isinstance(content, str) else json.dumps(content, default=_plain)


def when(seconds: float) -> str:
    """A time in UTC."""
    try:
        at = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    except (OverflowError, ValueError, OSError):  # beyond the calendar
        return f"{seconds:g} s after 1970"
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


# Standard output.


def write_json(value: Any) -> None:
    """One JSON document in ASCII, which every locale can carry."""
    sys.stdout.write(json.dumps(value, indent=2, default=_plain) + "\n")


def write_text(text: str) -> None:
    """A text as it is, in UTF-8; on a terminal without what that would obey."""
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        sys.stdout.write(safe(text, keep="\n\t"))
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def show(*parts: RenderableType, markup: bool = False) -> None:
    """Print for a person, in one piece: rich by itself would end the process at a closed pipe."""
    made = console(markup=markup)
    with made.capture() as captured:
        for part in parts:
            made.print(part)
    sys.stdout.write(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE))


def console(*, stderr: bool = False, markup: bool = False) -> Console:
    """Text reaches the terminal as it is: no markup, no emoji names, no guessed colours."""
    from rich.console import Console

    return Console(stderr=stderr, markup=markup, highlight=False, emoji=False)


def text(value: str, style: str = "", keep: str = "") -> Text:
    """Stored text, to be shown literally."""
    from rich.text import Text

    return Text(safe(value, keep), style=style, overflow="fold")


def complain(message: str) -> None:
    """One line on standard error."""
    line = safe(" ".join(message.split()))
    sys.stderr.write(f"memos: {line}\n")


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on standard error, where that is a terminal.

    Yields a function of how many are done, and of how many there are where that was not known.
    """
    if not sys.stderr.isatty():
        yield lambda done, total=None: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, Left(), console=console(stderr=True), transient=True) as bars:
        bar = bars.add_task(safe(what), total=total)
        yield lambda done, total=None: bars.update(bar, completed=done, total=total)


# Shapes of JSON; docs/cli.md lists them.


def cube_json(cube: MemCube) -> dict[str, Any]:
    """Every field of a cube."""
    found = {field.name: getattr(cube, field.name) for field in dataclasses.fields(MemCube)}
    found["relations"] = [dataclasses.asdict(relation) for relation in cube.relations]
    found["derived_from"] = list(cube.derived_from)
    return found


def hit_json(hit: Hit, *, ancestors: bool = False) -> dict[str, Any]:
    """A cube with its score and, where asked for, the cubes above it."""
    found = {**cube_json(hit), "score": hit.score}
    if ancestors:
        found["ancestors"] = [cube_json(cube) for cube in hit.ancestors]
    return found


def _plain(value: Any) -> Any:
    """An array as a list; anything else that JSON does not know as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
