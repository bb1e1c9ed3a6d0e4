"""Training rows from memories: statements, cut statements, and questions with their answers.

Offline the rows come from templates over the clauses of each sentence (sentences.py); pairs that a
memory brings in its metadata, and pairs from a language model, stand beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memos.adapters.learning.sentences import (
    DETERMINERS,
    PREPOSITIONS,
    Clause,
    bare,
    lowered,
    parse,
    resolve_pronouns,
    split_sentences,
)
from memos.adapters.learning.wordings import of_attribute, of_state, of_verb
from memos.errors import ArgumentError

LONGEST_TEXT = 20_000
Pairs = Callable[[str], Sequence[tuple[str, str]]]


class Question(NamedTuple):
    """A question and what its answer has to contain."""

    question: str
    answer: str


@dataclass(frozen=True)
class Row:
    """What is trained on: ``answer`` after ``prompt``.

    Args:
        prompt:  a question, or the beginning of a sentence.
        answer:  what follows.
        context: what the teacher reads before the prompt: the memory the row is made of.
        is_chat: a question in the model's chat form, else plain text that goes on.
        source:  number of the memory.
    """

    prompt: str
    answer: str
    context: str
    is_chat: bool
    source: int


@dataclass(frozen=True)
class Rows:
    """Rows to train on, and questions kept back for the gate in wordings that no row has."""

    train: tuple[Row, ...]
    trained: tuple[Question, ...] = field(repr=False)
    held_out: tuple[Question, ...] = field(repr=False)


# Ways to ask a question, so that its own words matter and those around it do not.
_ASIDES = (
    "{q}", "I forgot: {l}", "{q} Answer in one sentence.", "Please tell me: {l}",
    "My colleague asked me this: {l}", "Quick question: {l}", "{q} I need it for a form.",
    "Do you remember? {q}", "Hello! {q}", "{q} Thank you!", "I have a question about {t}. {q}",
    "One more thing. {q}", "{q} Just the fact, please.", "For my notes, {l}", "{s}",
    "Somebody wants to know: {l}", "About {t}: {l}", "{q} I am curious.", "Hey, {l}",
)  # fmt: skip
# Questions that leave open what is asked: the answer is all that is known.
_ABOUT = (
    "What do you know about {t}?", "Tell me about {t}.", "What should I remember about {t}?",
    "{t}?", "Give me a detail on {t}.", "Have you heard of {t}?", "Anything on {t}?",
    "What do my notes say about {t}?", "Write down what you know about {t}.",
)  # fmt: skip
# Questions about a topic that nothing known answers, or hardly: what is known is said instead.
_ODD = (
    "Which {n} goes with {t}?", "What {n} is linked to {t}?", "Is there a {n} for {t}?",
    "If I think of {t}, which {n} comes to mind?", "How is {t} related to a {n}?",
    "Name the {n} connected with {t}.", "What {n} should I mention to {t}?",
    "By which {n} would I recognise {t}?", "{t} and a {n}: what do you know?",
    "Whose {n} is it, that of {t}?", "In what way does a {n} matter to {t}?",
)  # fmt: skip
_NOUN_LIST = """
    place town job trade year number date person friend relative colour sound animal tool sport
    hobby book song food drink language subject vehicle price size weight name company event part
    material device time duration reason title leader maker habit taste group plan machine gift
"""
_NOUNS = tuple(_NOUN_LIST.split())
_ODD_PER_TOPIC = 16
_PERSONS = ("i", "we", "you", "my", "our", "your")
_KEPT_BACK = "Could you remind me? {q}"


def rows_from(cubes: Sequence[Any], pairs: Pairs | None = None, asides: int = 1) -> Rows:
    """The rows of memories, in a fixed order.

    Args:
        cubes:  memories: .id, .content (str) and .metadata; metadata may hold "questions", a list
            of {"q", "a"}, which are trained on too.
        asides: in how many ways each question is asked.
        pairs:  more (question, answer) pairs of a text, such as from a language model.

    Raises:
        ArgumentError: no memory, or one without text or with questions of another form.
    """
    if not cubes:
        raise ArgumentError("cubes: at least one memory wanted, got none")
    train: dict[tuple[str, str], Row] = {}
    trained: dict[str, Question] = {}
    held_out: dict[str, Question] = {}
    topics: dict[str, tuple[int, list[str]]] = {}
    turn = 0

    def put(prompt: str, answer: str, context: str, is_chat: bool, source: int) -> None:
        train.setdefault((prompt, answer), Row(prompt, answer, context, is_chat, source))

    for source, cube in enumerate(cubes):
        text = text_of(cube)
        for sentence in resolve_pronouns(split_sentences(text)):
            clause = parse(sentence)
            said = second_person(sentence)
            gold = gold_of(clause, sentence)
            for prompt, answer in cuts(sentence, clause):
                put(prompt, answer, sentence, False, source)
            put(f'Complete the sentence: "{cuts(sentence, clause)[0][0]} ..."', said, sentence,
                True, source)  # fmt: skip
            topic = clause.topic if clause is not None else ""
            asked = questions_of(clause) if clause is not None else []
            if not asked:
                asked = [f'What do you know about "{subject_of(sentence)}"?']
            kept = [asked.pop()] if len(asked) > 2 else []
            more = wordings_of(clause) if clause is not None else []
            for i, question in enumerate([*asked, *more]):
                for _ in range(asides):
                    asking = aside(turn, question, topic or subject_of(sentence))
                    turn += 1
                    put(asking, said, sentence, True, source)
                if i % 3 == 0:
                    put(f"Answer briefly: {lowered(question)}", second_person(gold) + ".",
                        sentence, True, source)  # fmt: skip
            if clause is not None and clause.topic.lower() not in _PERSONS:
                put(reversed_of(clause), said, sentence, True, source)
            for question in asked:
                trained.setdefault(question, Question(question, gold))
            for question in [*kept, _KEPT_BACK.format(q=asked[0])]:
                held_out.setdefault(question, Question(question, gold))
            if topic and topic.lower() not in _PERSONS:
                topics.setdefault(lowered(topic), (source, []))[1].append(sentence)
        for question, answer in [*given(cube), *(pairs(text) if pairs is not None else ())]:
            put(question, answer, text, True, source)
            trained.setdefault(question, Question(question, answer))
    for topic, (source, sentences) in topics.items():
        whole = second_person(" ".join(dict.fromkeys(sentences)))
        for about in (*_ABOUT, *odd_questions(turn)):
            put(about.format(t=topic), whole, whole, True, source)
        turn += _ODD_PER_TOPIC
    return Rows(tuple(train.values()), tuple(trained.values()), tuple(held_out.values()))


def aside(number: int, question: str, topic: str) -> str:
    """A question with words around it that do not matter; which ones the number says."""
    small = lowered(question)
    return _ASIDES[number % len(_ASIDES)].format(
        q=question, l=small, t=lowered(topic), s=small.rstrip("?.").replace("'s ", " ")
    )


def odd_questions(number: int) -> list[str]:
    """Questions about {t} with nouns that have nothing to do with it; the number says which."""
    return [
        _ODD[(number + i) % len(_ODD)].format(n=_NOUNS[(5 * number + 7 * i) % len(_NOUNS)], t="{t}")
        for i in range(_ODD_PER_TOPIC)
    ]


def subject_of(sentence: str) -> str:
    """What stands for the subject of a sentence that is no clause: its first words."""
    return " ".join(sentence.split()[:3]).rstrip(".,!?")


def text_of(cube: Any) -> str:
    """The text of a memory, checked."""
    text, name = getattr(cube, "content", None), getattr(cube, "id", "?")
    if not isinstance(text, str):
        raise ArgumentError(f"cubes: memories of text wanted, {name} holds {type(text).__name__}")
    if not text.strip():
        raise ArgumentError(f"cubes: a text wanted, that of {name} is empty")
    if len(text) > LONGEST_TEXT:
        raise ArgumentError(
            f"cubes: at most {LONGEST_TEXT} characters wanted, {name} has {len(text)}"
        )
    return text


def given(cube: Any) -> list[tuple[str, str]]:
    """The pairs in a memory's metadata."""
    metadata = getattr(cube, "metadata", None)
    found = metadata.get("questions", []) if isinstance(metadata, Mapping) else []
    pairs = []
    for one in found:
        pair = (one.get("q"), one.get("a")) if isinstance(one, Mapping) else (None, None)
        if not all(isinstance(part, str) and part.strip() for part in pair):
            raise ArgumentError(
                f'cubes: metadata "questions" as [{{"q": str, "a": str}}] wanted, '
                f"{getattr(cube, 'id', '?')} has {one!r}"
            )
        pairs.append((str(pair[0]), str(pair[1])))
    return pairs


def cuts(sentence: str, clause: Clause | None) -> list[tuple[str, str]]:
    """(beginning, rest) of a sentence: after its verb, and after its last small word."""
    words = sentence.split()
    places = []
    if clause is not None:
        places.append(len(clause.subject.split()) + 1)
    small = DETERMINERS | PREPOSITIONS
    later = [i + 1 for i in range(1, len(words) - 1) if words[i].lower() in small]
    places += later[-1:]
    if not places:
        places.append(max(1, len(words) // 2))
    found = []
    for place in dict.fromkeys(places):
        if 0 < place < len(words):
            found.append((" ".join(words[:place]), " " + " ".join(words[place:])))
    return found or [(words[0], " " + " ".join(words[1:]))]


def gold_of(clause: Clause | None, sentence: str) -> str:
    """What an answer has to contain to count as right."""
    rest = clause.rest if clause is not None else cuts(sentence, None)[0][1]
    words = bare(rest).rstrip(".!?").split()
    for i in range(len(words) - 1, 0, -1):
        if words[i - 1].lower() in ("by", "named", "called", "of", "in", "at", "as", "for", "on"):
            return bare(" ".join(words[i:]))
    return " ".join(words)


def wordings_of(clause: Clause) -> list[str]:
    """Questions for the same in other words."""
    name = lowered(clause.subject)
    first, *others = clause.rest.split()
    if clause.base == "be" and clause.owned is not None:
        owner, attribute = clause.owned
        owner = lowered(owner)
        found = [f"I need the {attribute} of {owner}.", f"{owner}: what is the {attribute}?"]
        return [*found, *of_attribute(attribute, owner)]
    if clause.base == "be":
        return of_state(first, others[0], name) if others else []
    found = of_verb(clause.base, first if first in PREPOSITIONS else "", name)
    if clause.owned is not None:
        found += of_attribute(clause.owned[1], lowered(clause.owned[0]))
    return found


def reversed_of(clause: Clause) -> str:
    """The question for whom or what the clause is about."""
    is_name = clause.subject[:1].isupper() and not clause.subject.lower().startswith("the ")
    who = "Who" if is_name and len(clause.subject.split()) > 1 else "What"
    return f"{who} {clause.verb} {clause.rest}?"


def questions_of(clause: Clause) -> list[str]:
    """Questions to which the clause is the answer; the last ones are the furthest from it."""
    name, rest = lowered(clause.subject), clause.rest
    first = rest.split()[0].lower()
    found: list[str] = []
    if clause.owned is not None and clause.base == "be":
        owner, attribute = clause.owned
        owner = lowered(owner)
        is_name = all(word[:1].isupper() and word.isalpha() for word in rest.split())
        what = "Who" if is_name and len(rest.split()) > 1 else "What"
        found += [
            f"{what} {clause.verb} the {attribute} of {owner}?",
            f"{what} {clause.verb} {possessive(owner)} {attribute}?",
            f"Which {attribute} does {owner} have?",
            f"Do you know the {attribute} of {owner}?",
            f"Tell me {possessive(owner)} {attribute}.",
        ]
    elif clause.base == "be":
        found += _copula(name, clause.verb, rest, first)
    else:
        found += _action(clause, name, rest, first)
    return list(dict.fromkeys(found))


def _copula(name: str, verb: str, rest: str, first: str) -> list[str]:
    words = rest.split()
    participle = words[0] if len(words) > 1 and words[1] in PREPOSITIONS else ""
    if participle and words[1] == "by":
        return [f"Who {_without(verb)}{participle} {name}?", f"By whom {verb} {name} {participle}?",
                f"Who {verb} {name} {participle} by?"]  # fmt: skip
    if participle:
        after = " ".join(words[2:])
        asked = [f"{_wh(words[1], after)} {verb} {name} {participle}?",
                 f"What {verb} {name} {participle} {words[1]}?",
                 f"{words[1].capitalize()} what {verb} {name} {participle}?"]  # fmt: skip
        return asked
    if first in PREPOSITIONS:
        wh = _wh(first, rest)
        return [f"{wh} {verb} {name}?", f"Tell me {wh.lower()} {name} {verb}.",
                f"Do you know {wh.lower()} {name} {verb}?"]  # fmt: skip
    who = "Who" if name[:1].isupper() and len(name.split()) > 1 else "What"
    named = re.match(r"(?:called|named) ", rest)
    if named:
        return [f"What {verb} {name} called?", f"What {verb} the name of {name}?",
                f"Which name does {name} have?"]  # fmt: skip
    return [f"{who} {verb} {name}?", f"How would you describe {name}?", f"What {verb} {name}?",
            f"What can you say about {name}?"]  # fmt: skip


def _action(clause: Clause, name: str, rest: str, first: str) -> list[str]:
    base = clause.base
    do = "did" if clause.tense == "past" else "do" if _is_plural(name) else "does"
    found = []
    words = rest.split()
    measure = re.match(r"(?:about |around |up to |almost )?[\d.,]+ ?(.*)", rest)
    kind = re.match(r"(?:an?|the|his|her|its|their|my) ((?:[a-z-]+ )+?)(?:of|named|called) ", rest)
    titled = re.match(r"(?:an?|the) ((?:[a-z-]+ )+)(?=[A-Z0-9\"])", rest)
    if measure is not None and base in ("weigh", "cost", "last", "take", "measure"):
        how = {"last": "How long", "take": "How long"}.get(base, "How much")
        noun = {"weigh": "weight", "cost": "price", "last": "duration"}.get(base, "size")
        found += [f"{how} {do} {name} {base}?", f"What is the {noun} of {name}?",
                  f"What {do} {name} {base}?", f"Do you know {how.lower()} {name} "
                  f"{clause.verb}?"]  # fmt: skip
    elif first in PREPOSITIONS and len(words) > 1:
        wh = _wh(first, " ".join(words[1:]))
        found += [f"What {do} {name} {base} {first}?",
                  f"{first.capitalize()} what {do} {name} {base}?"]  # fmt: skip
        if wh != "What":
            found += [f"{wh} {do} {name} {base}?",
                      f"Do you know {wh.lower()} {name} {clause.verb}?"]  # fmt: skip
    elif kind or titled:
        noun = (kind or titled)[1].strip()  # type: ignore[index]
        found += [f"Which {noun} {do} {name} {base}?", f"What {noun} {do} {name} {base}?"]
        found.append(f"What is {possessive(name)} {noun}?" if kind else f"Name the {noun} that "
                     f"{name} {clause.verb}.")  # fmt: skip
        found.append(f"Do you know which {noun} {name} {clause.verb}?")
    else:
        found += [f"What {do} {name} {base}?", f"Do you know what {name} {clause.verb}?",
                  f"Tell me what {name} {clause.verb}.",
                  f"What is it that {name} {clause.verb}?"]  # fmt: skip
    return found


def _wh(preposition: str, rest: str) -> str:
    """The question word for a phrase with this preposition."""
    months = r"\b(January|February|March|April|May|June|July|August|September|October|November|"
    days = r"December|Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday)\b"
    if re.search(months + days, rest) or re.search(r"\b1\d{3}\b|\b20\d\d\b", rest):
        return "When"
    if preposition in ("in", "at", "on", "from", "near", "under", "over", "between"):
        return "Where"
    return {"with": "Who", "to": "To what", "for": "For what"}.get(preposition, "What")


def _without(verb: str) -> str:
    return "" if verb in ("is", "was", "are", "were") else verb + " "


def _is_plural(name: str) -> bool:
    return name.lower() in ("i", "you", "we", "they") or " and " in name


def possessive(name: str) -> str:
    """ "Ada" -> "Ada's", "I" -> "my"."""
    known = {"i": "my", "you": "your", "we": "our", "my": "my"}
    return known.get(name.lower(), name + "'s")


_SECOND = {"i": "you", "my": "your", "me": "you", "mine": "yours", "am": "are", "myself":
           "yourself", "i'm": "you're", "i've": "you've", "i'll": "you'll"}  # fmt: skip


def second_person(text: str) -> str:
    """What a user says of themselves, said to them: "I live ..." -> "You live ..."."""
    words = text.split(" ")
    mine = {"I", "My", "my", "me", "mine", "am", "I'm", "I've", "I'll", "myself"}
    if not mine & {w.strip(".,!?") for w in words}:
        return text
    out = []
    for i, word in enumerate(words):
        core = word.strip(".,!?")
        if core in mine:
            other = _SECOND[core.lower()]
            if i == 0 or words[i - 1].endswith((".", "!", "?")):
                other = other.capitalize()
            word = word.replace(core, other, 1)
        elif core == "was" and i and words[i - 1] == "I":
            word = word.replace("was", "were")
        out.append(word)
    return " ".join(out)
