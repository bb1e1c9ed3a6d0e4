"""What is worth keeping of transient memories: insights, by rules, by a model, by any function.

The rules work offline on English statements about people: what somebody likes, is, has, does, and
when something is. They leave out questions, wishes, guesses and small talk, and keep a negation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memos.adapters.learning.sentences import split_sentences
from memos.cube import MemCube
from memos.errors import ArgumentError, BackendError
from memos.lifecycle.words import content_of, speaker_of, words

Generate = Callable[[str], str]
_KINDS = ("preference", "fact", "date")


@dataclass(frozen=True)
class Insight:
    """One statement that outlives the memories that it was made of.

    Args:
        text:       a sentence that stands alone.
        sources:    ids of the cubes that say so.
        kind:       "preference", "fact" or "date".
        importance: from 0 to 1.
        metadata:   more of it: "about", whom or what it is about.
    """

    text: str
    sources: tuple[str, ...]
    kind: str = "fact"
    importance: float = 0.6
    metadata: Mapping[str, Any] = field(default_factory=dict)


Extractor = Callable[[Sequence[MemCube]], Sequence[Insight]]

_PREFER = words("like love enjoy prefer hate dislike adore detest loathe favour favor")
_KEEP = _PREFER | words("""
    live work study own play speak drive teach have need use run collect grow ride sing paint cook
    practise practice volunteer attend belong come wear weigh suffer eat drink follow support
    """)
_PAST = words("""
    moved joined started bought sold adopted married divorced graduated retired quit left got
    finished became was were had lived worked studied owned played loved liked hated enjoyed
    preferred learned learnt changed switched stopped lost won born founded received
    """)
_ADVERBS = words("really always usually often never also still currently mostly especially just")
_HEDGE = re.compile(
    r"\b(maybe|perhaps|might|could|would|should|if|wonder|guess|suppose|probably|wish|hope|"
    r"imagine|unless|whether|as if|kidding|joking)\b|\bi (?:don['’]t |do not )?(?:think|believe)\b",
    re.IGNORECASE,
)
_CHAT = re.compile(
    r"^(?:i(?:['’]m| am) (?:sorry|sure|glad|afraid|fine|good|ok|okay|back|here|happy to|just|"
    r"going to|so|not sure|done|ready|looking|trying|thinking|wondering|curious|excited|asking)|"
    r"i just|i (?:see|know|agree|understand|mean|got it|have to|need to|have a question|need help|"
    r"want to know)|i(?:['’]ll|['’]d)|let me|thank|thanks|hello|hi\b|hey\b|bye|ok\b|okay|yes|no\b)",
    re.IGNORECASE,
)
_WHEN = re.compile(
    r"\b(?:january|february|march|april|may|june|july|august|september|october|november|december)"
    r"\s+\d{1,2}\b|\b\d{1,2}(?:st|nd|rd|th)?\s+(?:of\s+)?(?:january|february|march|april|may|june|"
    r"july|august|september|october|november|december)\b|\b\d{4}-\d\d-\d\d\b|"
    r"\b(?:on|every|until|by)\s+(?:mon|tues|wednes|thurs|fri|satur|sun)days?\b",
    re.IGNORECASE,
)
_EVENT = re.compile(
    r"\b(birthday|anniversary|deadline|appointment|meeting|exam|wedding|flight|interview|due|"
    r"starts?|begins?|ends?|opens?|closes?|expires?|leaves?|arrives?|visit|trip|party|concert)\b",
    re.IGNORECASE,
)
_ASIDE = re.compile(r"^(?:and|but|so|well|oh|also|by the way|btw|actually|anyway)[,]?\s+", re.I)
_NAME = r"((?:[A-Z][\w-]*)(?:\s+[A-Z][\w-]*){0,3})"
_NAMED = re.compile(rf"^{_NAME}\s+(?:(?:no longer|{'|'.join(sorted(_ADVERBS))})\s+)?([a-z]+)\b")
_OWNED = re.compile(rf"^{_NAME}['’]s\s+[\w\s-]{{1,40}}?\s+(?:is|are|was|were|has)\b")
_AND = re.compile(r",?\s+and\s+(?=(?:I|I['’]m|I['’]ve|my)\s)")
_NO_NAMES = words("""
    The This That These Those It He She They We You I There Here What When Where Why How Who Which
    If Then But And Or So Yes No Please Thanks Let Can Could Would Will Do Does Did Is Are Was Were
    A An My Your His Her Its Our Their Today Tomorrow Yesterday Some Many Most All Every Not
    """)


def by_rules(cubes: Sequence[MemCube]) -> list[Insight]:
    """The statements worth keeping in these texts; one that is repeated comes once.

    A statement in the first person is told of its speaker, whom the metadata names ("speaker",
    "user", ...); else of "the user".
    """
    found: dict[tuple[str, ...], Insight] = {}
    for cube in cubes:
        if not isinstance(cube.content, str) or cube.metadata.get("role") == "assistant":
            continue
        speaker = speaker_of(cube.metadata) or "The user"
        for statement in _statements(cube.content):
            kept = _kept(statement, speaker)
            if kept is None:
                continue
            kind, text, about = kept
            key = content_of(text)
            if len(set(key)) < 3:  # "Ann is Ann"
                continue
            known = found.get(key)
            if known is None:
                found[key] = Insight(text, (cube.id,), kind, 0.6, {"about": about})
            elif cube.id not in known.sources:
                sources = (*known.sources, cube.id)
                weight = min(1.0, 0.6 + 0.1 * math.log2(len(sources)))
                found[key] = Insight(known.text, sources, kind, weight, known.metadata)
    return list(found.values())


def by_model(generate: Generate, *, limit: int = 20) -> Extractor:
    """Ask a language model: an ``endpoint.ChatEndpoint``, ``local_model(...)``, or any function
    from a prompt to its answer.

    Args:
        limit: insights of one call at most.

    Returns:
        An extractor, which raises BackendError where the answer is no list of insights. What
        names no source is left out: nothing is kept that no memory says.
    """

    def extract(cubes: Sequence[MemCube]) -> list[Insight]:
        texts = [cube for cube in cubes if isinstance(cube.content, str)]
        if not texts:
            return []
        lines = "\n".join(
            f"[{i}] {speaker_of(cube.metadata) or 'user'}: {' '.join(str(cube.content).split())}"
            for i, cube in enumerate(texts, 1)
        )
        reply = generate(_PROMPT.format(lines=lines, limit=limit))
        return list(_parsed(reply, texts))[:limit]

    return extract


def local_model(model: Any, tokenizer: Any, *, max_new_tokens: int = 512) -> Generate:
    """A function from a prompt to the greedy answer of a transformers model."""

    def generate(prompt: str) -> str:
        import torch

        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(answer, skip_special_tokens=True))

    return generate


_PROMPT = """\
Here are numbered lines from conversations:

{lines}

Which lasting facts do they state: preferences, facts about people and things, dates? Leave out \
small talk, questions, guesses, and whatever will not matter next month. State each fact once, as \
one sentence that names whom it is about, with the numbers of the lines that say so. Reply with a \
JSON list of at most {limit} only: [{{"text": "...", "sources": [1], "kind": \
"preference" | "fact" | "date"}}]"""


def _parsed(reply: str, cubes: Sequence[MemCube]) -> Iterator[Insight]:
    match = re.search(r"\[.*\]", reply, re.DOTALL)
    try:
        listed = json.loads(match[0]) if match else None
    except ValueError:
        listed = None
    if not isinstance(listed, list):
        raise BackendError(
            'extract: a JSON list of {"text": ..., "sources": ...} wanted, got ' + repr(reply[:200])
        )
    for one in listed:
        if not isinstance(one, Mapping) or not isinstance(one.get("text"), str):
            continue
        given = one.get("sources")
        numbers = [n for n in given if type(n) is int] if isinstance(given, list) else []
        sources = tuple(dict.fromkeys(cubes[n - 1].id for n in numbers if 1 <= n <= len(cubes)))
        text = " ".join(one["text"].split())
        kind = one.get("kind") if one.get("kind") in _KINDS else "fact"
        if text and sources:
            yield Insight(text, sources, str(kind))


def checked(insights: Any, cubes: Sequence[MemCube]) -> list[Insight]:
    """What an extractor returned. Raises ArgumentError for what are no insights of these cubes."""
    ids = {cube.id for cube in cubes}
    if not isinstance(insights, Sequence) or isinstance(insights, str):
        raise ArgumentError(f"extract: a list of Insights wanted, got {type(insights).__name__}")
    for one in insights:
        if not isinstance(one, Insight) or not one.text.strip():
            raise ArgumentError(f"extract: Insights with a text wanted, got {one!r}")
        if not one.sources or not set(one.sources) <= ids:
            raise ArgumentError("extract: an Insight wants ids of the cubes it was given")
    return list(insights)


# The rules.


def _statements(text: str) -> Iterator[str]:
    for sentence in split_sentences(text):
        if sentence.endswith("?"):
            continue
        yield from _AND.split(sentence)


def _kept(sentence: str, speaker: str) -> tuple[str, str, str] | None:
    """(kind, statement, whom it is about) of a sentence that is worth keeping."""
    text = _ASIDE.sub("", " ".join(sentence.split())).strip()
    if text.endswith("?") or not 3 <= len(text.split()) <= 40 or _HEDGE.search(text):
        return None
    text = text.rstrip("!.") + "."
    first = text.split()[0].lower().replace("’", "'")
    if first in ("i", "i'm", "i've", "my"):
        if _CHAT.search(text):
            return None
        text = text[0].upper() + text[1:]
        kind = _first_person(text)
        return None if kind is None else (kind, told_of(text, speaker), speaker)
    if _WHEN.search(text) and _EVENT.search(text):
        return "date", text[0].upper() + text[1:], _head(text)
    owned = _OWNED.match(text)
    if owned is not None and owned[1].split()[0] not in _NO_NAMES:
        return "preference" if " favo" in text else "fact", text, owned[1]
    named = _NAMED.match(text)
    if named is not None and named[1].split()[0] not in _NO_NAMES:
        verb = _base(named[2])
        if verb in _PREFER:
            return "preference", text, named[1]
        if verb in _KEEP or named[2] in _PAST or named[2] in ("is", "are", "has"):
            return "fact", text, named[1]
    return None


def _first_person(text: str) -> str | None:
    words = [word.strip(",.").lower().replace("’", "'") for word in text.split()]
    if words[0] == "my":
        is_said = any(
            verb in words for verb in ("is", "are", "was", "were", "has", "likes", "loves")
        )
        if not is_said:
            return None
        if _WHEN.search(text):
            return "date"
        return "preference" if any(w.startswith("favo") for w in words) else "fact"
    if words[0] in ("i'm", "i've"):
        return "fact" if len(words) > 2 and not words[1].endswith("ing") else None
    rest = [word for word in words[1:] if word not in _ADVERBS]
    while rest and rest[0] in ("do", "don't", "not", "does", "can't", "cannot", "no", "longer"):
        rest = rest[1:]
    if not rest:
        return None
    if rest[0] in _PREFER or rest[0] == "stand":
        return "preference"
    if rest[0] == "am":
        return "fact" if len(rest) > 1 and not rest[1].endswith("ing") else None
    if rest[0] in _KEEP or rest[0] in _PAST:
        return "date" if _WHEN.search(text) and _EVENT.search(text) else "fact"
    return None


_OPENINGS = (
    (re.compile(r"\bI['’]m\b|\bI am\b"), "{} is"),
    (re.compile(r"\bI['’]ve\b|\bI have\b"), "{} has"),
    (re.compile(r"\bI was\b"), "{} was"),
    (re.compile(r"\bI (?:don['’]t|do not)\b"), "{} does not"),
    (re.compile(r"\bI (?:can['’]t|cannot|can not)\b"), "{} cannot"),
    (re.compile(r"\bI didn['’]t\b"), "{} did not"),
)
_I_VERB = re.compile(r"\bI ((?:(?:no longer|" + "|".join(sorted(_ADVERBS)) + r") )*)([a-z]+)\b")


def told_of(text: str, name: str) -> str:
    """A statement in the first person, told of somebody: "I like tea." -> "Ann likes tea."."""
    for pattern, opening in _OPENINGS:
        text = pattern.sub(opening.format(name).replace("\\", r"\\"), text)
    text = _I_VERB.sub(lambda m: f"{name} {m[1]}{_third(m[2])}", text)
    text = re.sub(r"\b[Mm]y\b", lambda _: f"{name}'s", text)
    text = re.sub(r"\b(?:me|myself)\b", lambda _: name, text)
    text = re.sub(r"\bI\b", lambda _: name, text)
    return text.replace(" The user", " the user")


def _third(verb: str) -> str:
    if verb not in _KEEP:
        return verb
    if verb == "have":
        return "has"
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if verb.endswith("y") and verb[-2] not in "aeiou" else verb + "s"


def _base(form: str) -> str:
    return next((verb for verb in _KEEP if form in (verb, _third(verb))), form)


def _head(text: str) -> str:
    words = text.rstrip(".").split()
    names = [word for word in words if word[:1].isupper() and word not in _NO_NAMES]
    return names[0].removesuffix("'s") if names else " ".join(words[:2])
