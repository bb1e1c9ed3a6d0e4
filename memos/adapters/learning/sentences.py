"""English sentences taken apart: subject, verb and the rest, as far as a few rules see them.

The rules are for what memories say ("Ada works at Acme.", "The colour of Ada's car is red."). Where
they find no clause the sentence stays whole; nothing here guesses what a sentence does not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


BE = {"is": "present", "are": "present", "am": "present", "was": "past", "were": "past"}
_HAVE = {"has": "present", "have": "present", "had": "past"}
_MODALS = words("can will may must should would could might")
DETERMINERS = words("a an the this that these those its his her their my your our")
PREPOSITIONS = words("""
    at in on for with to from about as by of into near under over between during since until
    through against without within
""")
PRONOUNS = {"he": "", "she": "", "it": "", "they": "", "his": "'s", "her": "'s", "its": "'s"}
_REGULAR = words("""
    achieve act add adopt advise aim allow answer appear arrive ask attend attract avoid bake
    belong block boil border brew call carry cause chair change charge check clean climb close
    coach collect combine command complain consist contain control convert cook cost cover
    create cycle dance deliver depend deploy describe design develop direct discover dislike
    earn employ enable end enjoy enter expire explain export fear finish fix follow found fund
    gather guard handle happen hate head help hire hope host import improve include inherit
    install intend introduce invent invest invite join jump kick last launch lead learn like
    limit link list listen live load located look love maintain manage manufacture map march
    marry mean measure mention merge monitor move name need notice offer open operate order
    organise organize own paint park pass perform phone pick plan plant play point prefer
    prepare present preserve prevent print process produce protect prove publish pull push raise
    reach receive recommend record refer refuse release remain remember remove rent repair
    replace report represent require research reside respond restore retire return review roast
    sail save schedule score seem serve share ship show sign sketch smell smoke solve sound
    specialise specialize sponsor start state stay stop store study suffer supervise supply
    support tend test touch train translate travel treat trust try turn type use value visit
    volunteer vote walk want warn wash watch water weigh wish work worry
""")
_IRREGULAR = {
    "become": "became", "begin": "began", "break": "broke", "breed": "bred", "bring": "brought",
    "build": "built", "buy": "bought", "catch": "caught", "choose": "chose", "come": "came",
    "draw": "drew", "drink": "drank", "drive": "drove", "eat": "ate", "feed": "fed", "feel": "felt",
    "fight": "fought", "find": "found", "fly": "flew", "forget": "forgot", "get": "got",
    "give": "gave", "go": "went", "grow": "grew", "hold": "held", "keep": "kept", "know": "knew",
    "leave": "left", "lend": "lent", "lose": "lost", "make": "made", "meet": "met", "pay": "paid",
    "read": "read", "ride": "rode", "ring": "rang", "rise": "rose", "run": "ran", "see": "saw",
    "sell": "sold", "send": "sent", "sing": "sang", "sit": "sat", "sleep": "slept",
    "speak": "spoke", "spend": "spent", "stand": "stood", "swim": "swam", "take": "took",
    "teach": "taught", "tell": "told", "think": "thought", "understand": "understood",
    "wear": "wore", "win": "won", "write": "wrote",
}  # fmt: skip
_ABBREVIATED = ("dr.", "mr.", "mrs.", "ms.", "prof.", "st.", "no.", "e.g.", "i.e.", "vs.", "etc.")


@dataclass(frozen=True)
class Clause:
    """``subject verb rest``: base is the verb's base form, "be" or "have" of those two."""

    subject: str
    verb: str
    base: str
    tense: str
    rest: str

    @property
    def owned(self) -> tuple[str, str] | None:
        """(owner, attribute) of "Ada's car" and "the car of Ada"."""
        found = re.fullmatch(r"(.+?)['\u2019]s? (.+)", self.subject)
        if found:
            return found[1], found[2]
        found = re.fullmatch(r"[Tt]he (.+?) of (.+)", self.subject)
        return (found[2], found[1]) if found else None

    @property
    def topic(self) -> str:
        """Whom or what the sentence is about: the owner of what is owned."""
        return self.owned[0] if self.owned else self.subject


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with its end; a line break ends one too."""
    found = []
    for line in text.splitlines():
        start = 0
        for match in re.finditer(r"[.!?]+[\"')\]]*(?=\s|$)", line):
            head = line[start : match.end()].strip()
            word = head.split()[-1].lower() if head else ""
            following = line[match.end() :].lstrip()[:1]
            initial = re.fullmatch(r"[a-z]\.", word) is not None
            if following and (word in _ABBREVIATED or initial or following.islower()):
                continue
            found.append(head)
            start = match.end()
        found.append(line[start:].strip(" \t-*"))
    return [s if s[-1] in ".!?\"')]" else s + "." for s in found if s]


def parse(sentence: str) -> Clause | None:
    """Subject, verb and rest of a plain statement; None where the rules see none."""
    body = sentence.strip().rstrip(".!").strip()
    if body.endswith("?"):
        return None
    words = body.split()
    for i in range(1, len(words) - 1):
        word = words[i].lower().strip(",")
        if word in BE:
            base, tense = "be", BE[word]
        elif word in _HAVE:
            base, tense = "have", _HAVE[word]
        elif word in _MODALS:
            return None
        elif words[i].islower() and word in _FORMS and _can_be_verb(words[i - 1]):
            base, tense = _FORMS[word]
            if tense == "bare" and words[i - 1] not in ("I", "We", "They", "we", "they"):
                continue
        else:
            continue
        if base in ("be", "have") and words[i + 1] in ("not", "no", "never"):
            return None
        return _clause(words, i, base, tense)
    for i in range(1, len(words) - 1):  # a verb the list does not have, after a name
        if re.fullmatch(r"[a-z]+[^su\W]s", words[i]) and words[i - 1][0].isupper():
            stem = words[i][:-1]
            stem = stem[:-1] if stem.endswith(("she", "che", "xe", "sse", "zze")) else stem
            stem = stem[:-2] + "y" if stem.endswith("ie") else stem
            if _can_be_verb(words[i - 1]):
                return _clause(words, i, stem, "present")
    return None


def _clause(words: list[str], i: int, base: str, tense: str) -> Clause:
    return Clause(" ".join(words[:i]).rstrip(","), words[i], base, tense, " ".join(words[i + 1 :]))


def resolve_pronouns(sentences: Iterable[str]) -> Iterator[str]:
    """Each sentence, a pronoun at its beginning replaced by the topic of the one before."""
    topic = ""
    for sentence in sentences:
        first, _, rest = sentence.partition(" ")
        if topic and first.lower() in PRONOUNS:
            sentence = f"{topic}{PRONOUNS[first.lower()]} {rest}"
        clause = parse(sentence)
        if clause is not None and clause.topic.split()[0].lower() not in PRONOUNS:
            topic = clause.topic
        yield sentence


def bare(phrase: str) -> str:
    """A phrase without leading prepositions and determiners: "in the town" -> "town"."""
    words = phrase.split()
    while len(words) > 1 and words[0].lower() in PREPOSITIONS | DETERMINERS:
        words = words[1:]
    return " ".join(words)


def lowered(sentence: str) -> str:
    """A sentence as it stands after a colon: its first word small, unless that is a name."""
    first = sentence.partition(" ")[0]
    plain = DETERMINERS | {"what", "where", "who", "when", "which", "how", "in", "tell", "do"}
    return sentence[0].lower() + sentence[1:] if first.lower() in plain else sentence


def _can_be_verb(before: str) -> bool:
    return before.lower() not in DETERMINERS | PREPOSITIONS | {"and", "or"}


def _forms() -> dict[str, tuple[str, str]]:
    forms: dict[str, tuple[str, str]] = {}
    for base in (*sorted(_REGULAR), *_IRREGULAR):
        past = _IRREGULAR.get(base) or _past(base)
        for form, tense in ((past, "past"), (base, "bare"), (_third(base), "present")):
            forms[form] = (base, tense)
    return forms


def _third(base: str) -> str:
    if base == "go" or base.endswith(("s", "sh", "ch", "x", "z", "o")):
        return base + "es"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + "s"


def _past(base: str) -> str:
    if base.endswith("e"):
        return base + "d"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    if base in ("plan", "stop", "prefer", "refer", "map", "ship"):
        return base + base[-1] + "ed"
    return base + "ed"


_FORMS = _forms()
