"""Documents as trees: Markdown and plain text into headings and blocks, and back.

Headings become sections; everything between blank lines becomes one block, with lists, tables,
quotes and code kept whole. Writing a document again gives the same lines: blocks are separated by
one blank line, or none where there was none; everything else is as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memos.errors import ArgumentError

FORMATS = ("markdown", "text")
PIECE = 1000  # characters of a paragraph, about; longer ones are split at ends of sentences


@dataclass
class Node:
    """A section or block.

    Args:
        parent: index of the node above it in the document's nodes; -1: the document itself.
    """

    parent: int
    content: str
    metadata: dict[str, Any]


@dataclass
class Document:
    """A document's nodes in order.

    Args:
        front:  metadata that its front matter gives.
        layout: metadata of its root: what is needed to write it again.
    """

    title: str
    front: dict[str, Any]
    layout: dict[str, Any]
    nodes: list[Node]


@dataclass
class _Block:
    line: int  # from 1
    raw: str
    level: int = 0  # of a heading
    title: str = ""
    is_prose: bool = False  # may be split


def parse(
    text: str, format: str = "markdown", title: str | None = None, name: str | None = None
) -> Document:
    """A document's tree.

    Args:
        format: "markdown" or "text".
        title:  of the document; None: of its front matter, or its only first-level heading where
            it begins with that, ``name``, or its first words.

    Raises:
        ArgumentError: an argument is out of contract, or there is nothing in the document.
    """
    if format not in FORMATS:
        raise ArgumentError(f"format: one of {', '.join(FORMATS)} wanted, got {format!r}")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    front, first = _front(lines) if format == "markdown" else ({}, 0)
    raw_front = "\n".join(lines[:first])
    if first and lines[first : first + 1] not in ([], [""]):
        raw_front += "\n"  # no blank line follows
    found = list(_markdown(lines, first) if format == "markdown" else _plain(lines))
    if not found and not raw_front:
        raise ArgumentError("text: a document that is not empty wanted")
    if title is None and isinstance(front.get("title"), str) and front["title"].strip():
        title = front["title"]
    heads = [block for block in found if block.level == 1]
    own = len(heads) == 1 and found[0] is heads[0] and title in (None, heads[0].title)
    layout: dict[str, Any] = {"type": "document", "format": format, "markup": ""}
    head = None
    if own:
        head, *found = found
        title = head.title
        layout |= {"markup": head.raw, "line": head.line}
    elif title is None:
        title = name
    if title is None or not title.strip():
        opening = next((block.title or block.raw for block in found), raw_front)
        title = " ".join(opening.split())[:80]
    if raw_front:
        layout["front"] = raw_front
    return Document(title, front, layout, _nodes(found, format, head))


def render(nodes: Sequence[tuple[int, str, Mapping[str, Any]]], format: str = "markdown") -> str:
    """The text of (depth, content, metadata) in document order; ends with a line end.

    A heading whose content was changed since the import is written in the usual form.
    """
    out, joint = "", ""
    before: Mapping[str, Any] = {}
    for depth, content, metadata in nodes:
        if "joint" in metadata and metadata.get("of") in (before.get("line"), before.get("of")):
            joint = str(metadata["joint"])
        front = metadata.get("front")
        if isinstance(front, str) and front:
            out += joint + front
            joint = "" if front.endswith("\n") else "\n\n"
        part = _written(depth, content, metadata, format)
        if part is not None:
            out += joint + part.strip("\n")
            joint = "\n\n"
        before = metadata
    return out + "\n" if out else ""


def sentences(text: str, near: int = PIECE) -> list[tuple[str, str]]:
    """(white space before, piece) of a long text, cut at ends of sentences about so far apart.

    Joined again they are the text. A sentence of more than twice the length is cut between words.
    """
    pieces: list[tuple[str, str]] = []
    start, space = 0, ""
    while len(text) - start > near:
        cuts = list(_SENTENCE_END.finditer(text, start + 1, start + 2 * near))
        good = [m for m in cuts if m.start(1) - start <= near] or cuts[:1]
        if good:
            cut = good[-1].span(1)
        else:
            words = list(_SPACE.finditer(text, start + near, start + 2 * near))
            if not words or len(text) - start <= 2 * near:
                break
            cut = words[0].span()
        if not text[cut[1] :].strip():
            break
        pieces.append((space, text[start : cut[0]]))
        space, start = text[cut[0] : cut[1]], cut[1]
    pieces.append((space, text[start:]))
    return pieces


_SENTENCE_END = re.compile(
    r"(?:[.!?\u2026][\"')\]\u201d\u2019]*(?=\s)|[\u3002\uff01\uff1f])(\s*)(?=\S)"
)
_SPACE = re.compile(r"\s+(?=\S)")

# Blocks into nodes, and nodes into text.


def _nodes(found: Sequence[_Block], format: str, before: _Block | None) -> list[Node]:
    nodes: list[Node] = []
    open_sections: list[tuple[int, int]] = []  # (level, index)
    for block in found:
        tight = before is not None and before.line + before.raw.count("\n") + 1 == block.line
        joint = {"joint": "\n", "of": before.line} if tight and before is not None else {}
        before = block
        if block.level:
            while open_sections and open_sections[-1][0] >= block.level:
                open_sections.pop()
        parent = open_sections[-1][1] if open_sections else -1
        if block.level:
            metadata: dict[str, Any] = {"type": "section", "level": block.level}
            metadata |= {"line": block.line, **joint}
            if block.raw != _heading(block.title, block.level, format):
                metadata["markup"] = block.raw
            open_sections.append((block.level, len(nodes)))
            nodes.append(Node(parent, block.title, metadata))
            continue
        line = block.line
        pieces = sentences(block.raw) if block.is_prose else [("", block.raw)]
        for i, (space, piece) in enumerate(pieces):
            line += space.count("\n")
            metadata = {"type": "text", "line": line, **joint}
            if i:
                metadata |= {"joint": space, "of": block.line}
            nodes.append(Node(parent, piece, metadata))
            line += piece.count("\n")
    return nodes


def _written(depth: int, content: str, metadata: Mapping[str, Any], format: str) -> str | None:
    kind, markup = metadata.get("type"), metadata.get("markup")
    if kind not in ("document", "section"):
        return content
    if kind == "document" and markup == "":
        return None  # its title stands nowhere in the text
    if isinstance(markup, str) and _title_in(markup, format) == content:
        return markup
    level = metadata.get("level")
    if not isinstance(level, int) or isinstance(level, bool) or not 1 <= level <= 6:
        level = min(depth + 1, 6)
    return _heading(" ".join(content.split("\n")), level, format)


def _heading(title: str, level: int, format: str) -> str:
    return title if format == "text" else f"{'#' * level} {title}"


def _title_in(markup: str, format: str) -> str:
    lines = markup.split("\n")
    reader = _markdown(lines, 0) if format == "markdown" else iter(())
    block = next(reader, None)
    return lines[0].strip() if block is None else block.title


# Markdown: CommonMark's blocks as far as they matter for where one ends.

_FENCE = re.compile(r" {0,3}(?:(`{3,})[^`]*|(~{3,}).*)$")
_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)$")
_UNDERLINE = re.compile(r" {0,3}(?:(=+)|(-+))[ \t]*$")
_RULE = re.compile(r" {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
_ITEM = re.compile(r"( *)(?:[-+*]|\d{1,9}[.)])(?:[ \t]+|$)")
_FIRST_ITEM = re.compile(r" {0,3}(?:[-+*]|1[.)])[ \t]+\S")  # one that may interrupt a paragraph
_HTML = re.compile(  # up to the next blank line
    r" {0,3}</?(?:address|article|aside|blockquote|body|center|dd|details|dialog|dir|div|dl|dt|"
    r"fieldset|figcaption|figure|footer|form|h[1-6]|head|header|hr|html|iframe|legend|li|link|"
    r"main|menu|nav|ol|optgroup|option|p|picture|section|source|summary|table|tbody|td|tfoot|th|"
    r"thead|title|tr|track|ul)(?:[\s/>]|$)",
    re.IGNORECASE,
)
_INDENTED = re.compile(r"(?: {4}| {0,3}\t)")
_RAW_HTML = (  # (start, end): blank lines do not end these
    (re.compile(r" {0,3}<!--"), re.compile(r"-->")),
    (re.compile(r" {0,3}<\?"), re.compile(r"\?>")),
    (re.compile(r" {0,3}<!\[CDATA\["), re.compile(r"\]\]>")),
    (re.compile(r" {0,3}<![A-Za-z]"), re.compile(r">")),
    (
        re.compile(r" {0,3}<(?:script|pre|style|textarea)(?:[\s>]|$)", re.IGNORECASE),
        re.compile(r"</(?:script|pre|style|textarea)>", re.IGNORECASE),
    ),
)


def _markdown(lines: Sequence[str], start: int) -> Iterator[_Block]:
    i = start
    while i < len(lines):
        if not lines[i].strip():
            i += 1
            continue
        block, end = _markdown_block(lines, i)
        yield block
        i = end


def _markdown_block(lines: Sequence[str], i: int) -> tuple[_Block, int]:
    """The block that begins in line i, and the line after it."""
    line = lines[i]
    end = _fenced(lines, i) or _raw_html(lines, i)
    if end:
        return _block(lines, i, end), end
    if _INDENTED.match(line):
        end = _while_indented(lines, i)
        return _block(lines, i, end), end
    atx = _ATX.match(line)
    if atx is not None and (title := _without_closing(atx[2])):
        return _Block(i + 1, line, len(atx[1]), title), i + 1
    if atx is not None or _RULE.match(line):
        return _block(lines, i, i + 1), i + 1
    if _ITEM.match(line):
        end = _list_end(lines, i)
        return _block(lines, i, end), end
    return _paragraph(lines, i)


def _without_closing(title: str) -> str:
    """A heading without the #s that may stand after it."""
    bare = title.rstrip(" \t")
    opened = bare.rstrip("#")
    return (opened if not opened or opened[-1] in " \t" else bare).strip()


def _block(lines: Sequence[str], i: int, end: int) -> _Block:
    while end > i + 1 and not lines[end - 1].strip():
        end -= 1
    return _Block(i + 1, "\n".join(lines[i:end]))


def _paragraph(lines: Sequence[str], i: int) -> tuple[_Block, int]:
    is_quote = lines[i].lstrip().startswith(">")
    is_table = "|" in lines[i]
    end = i + 1
    if _HTML.match(lines[i]):
        while end < len(lines) and lines[end].strip():
            end += 1
        return _block(lines, i, end), end
    while end < len(lines) and (line := lines[end]).strip():
        underline = _UNDERLINE.match(line)
        if underline is not None and not is_quote and not _INDENTED.match(line):
            title = " ".join(part.strip() for part in lines[i:end])
            raw = "\n".join(lines[i : end + 1])
            return _Block(i + 1, raw, 1 if underline[1] else 2, title), end + 1
        if _RULE.match(line) or _ATX.match(line) or _FENCE.match(line) or _raw_html(lines, end):
            break
        if not is_quote and _FIRST_ITEM.match(line):
            end = _list_end(lines, end)
            return _block(lines, i, end), end
        is_table = is_table or line.lstrip().startswith("|")
        end += 1
    block = _block(lines, i, end)
    block.is_prose = not (is_quote or is_table)
    return block, end


def _fenced(lines: Sequence[str], i: int, indent: int = 0) -> int:
    """The line after a fenced block that begins in line i; 0: none does."""
    match = _FENCE.match(lines[i][indent:])
    if match is None:
        return 0
    mark = match[1] or match[2]
    close = re.compile(rf"\s*{re.escape(mark[0])}{{{len(mark)},}}[ \t]*$")
    for end in range(i + 1, len(lines)):
        if close.match(lines[end]):
            return end + 1
    return len(lines)


def _raw_html(lines: Sequence[str], i: int) -> int:
    for start, stop in _RAW_HTML:
        match = start.match(lines[i])
        if match is None:
            continue
        if stop.search(lines[i], match.end()):
            return i + 1
        for end in range(i + 1, len(lines)):
            if stop.search(lines[end]):
                return end + 1
        return len(lines)
    return 0


def _while_indented(lines: Sequence[str], i: int) -> int:
    end = i + 1
    while end < len(lines) and (not lines[end].strip() or _INDENTED.match(lines[end])):
        end += 1
    return end


def _list_end(lines: Sequence[str], i: int) -> int:
    """The line after a list: over blank lines, as long as items or indented lines follow."""
    end = i
    after_blank = False
    while end < len(lines):
        line = lines[end]
        if not line.strip():
            after_blank = True
            end += 1
            continue
        indent = len(line) - len(line.lstrip(" \t"))
        is_item = _ITEM.match(line) is not None and not _RULE.match(line)
        if indent == 0 and not is_item:
            breaks = _ATX.match(line) or _RULE.match(line) or _FENCE.match(line)
            if after_blank or breaks or _raw_html(lines, end):
                break
        if indent < 2 and after_blank and not is_item:
            break
        after_blank = False
        end = (_fenced(lines, end, indent) if indent else 0) or end + 1
    return end


# Front matter: the flat part of YAML. What is not flat stays text and is written back as it was.

_KEY = re.compile(r"([A-Za-z_][\w .-]{0,60}?)\s{0,9}:(?:\s+(.*))?$")


def _front(lines: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Metadata of the front matter, and the line after it; ({}, 0): there is none."""
    if lines[0].rstrip() != "---":
        return {}, 0
    end = next((i for i in range(1, len(lines)) if lines[i].rstrip() in ("---", "...")), 0)
    body = lines[1:end]
    opening = next((line for line in body if line.strip()), "")
    if not end or not _KEY.match(opening):
        return {}, 0
    found: dict[str, Any] = {}
    key = ""
    for line in body:
        match = _KEY.match(line)
        if match is not None:
            key = match[1]
            found[key] = _scalar(match[2] or "")
        elif re.match(r"\s*- ", line) and key and (found[key] is None or _is_list(found[key])):
            found[key] = [*(found[key] or []), _scalar(line.strip()[2:])]
        elif line.strip() and not line.lstrip().startswith("#"):
            found.pop(key, None)  # deeper than one level
            key = ""
    return {key: value for key, value in found.items() if value is not None}, end + 1


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _scalar(text: str) -> Any:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        return [_scalar(item) for item in text[1:-1].split(",") if item.strip()]
    if text in ("", "null", "~"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[-+]?(?:0|[1-9]\d{0,17})", text):
        return int(text)
    if re.fullmatch(r"[-+]?\d{1,15}\.\d{1,15}", text):
        return float(text)
    return text


# Plain text.

_NUMBERED = re.compile(r"(?:\d{1,3}\.)+(?:\d{1,3})?\s+[A-Z\u00c0-\u00de].{0,78}$")
_CAPS = re.compile(r"[^a-z\u00df-\u00ff]{4,80}$")


def _plain(lines: Sequence[str]) -> Iterator[_Block]:
    """Paragraphs. A heading stands alone between blank lines, and something follows it."""
    paragraphs: list[_Block] = []
    i = 0
    while i < len(lines):
        end = i
        while end < len(lines) and lines[end].strip():
            end += 1
        if end > i:
            paragraphs.append(_block(lines, i, end))
            paragraphs[-1].is_prose = True
        i = max(end, i + 1)
    for block, after in zip(paragraphs, [*paragraphs[1:], None], strict=True):
        block.level = 0 if after is None else _plain_level(block.raw, after.raw)
        if block.level:
            block.title, block.is_prose = block.raw.split("\n")[0].strip(), False
        yield block


def _plain_level(raw: str, after: str) -> int:
    """Level of a heading; 0: it is none. Rather one too few than one too many."""
    title, *rest = (line.strip() for line in raw.split("\n"))
    if len(rest) == 1 and re.fullmatch(r"={3,}|-{3,}|~{3,}", rest[0]):
        return (1 if rest[0][0] == "=" else 2) if abs(len(rest[0]) - len(title)) <= 3 else 0
    if rest or title[-1] in ".,;:!?":
        return 0
    if _NUMBERED.match(title):
        number = title.split()[0].rstrip(".")
        following = after.strip().split()[0].rstrip(".")
        # Items of a list with blank lines between them look like headings without a text.
        is_list = "\n" not in after and following.count(".") == number.count(".")
        is_list = is_list and re.fullmatch(r"[\d.]+", following) is not None
        return 0 if is_list else number.count(".") + 1
    letters = [letter for letter in title if letter.isalpha()]
    if _CAPS.match(title) and len(letters) >= 4 and all(letter.isupper() for letter in letters):
        return 1
    return 0
