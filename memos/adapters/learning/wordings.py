"""Other words for common relations: what else people ask when they want to know a thing.

The tables are keyed by the verb of a clause (with the preposition or participle after it) or by the
attribute that somebody has; {s} is whom the clause is about, {o} what belongs to it.
"""

from __future__ import annotations

_BY = ("Who {did} {s}?", "Who is behind {s}?", "Whom do we owe {s} to?", "Name the maker of {s}.")
_LIKES = ("What is {s}'s preference?", "What would {s} choose?", "What does {s} like best?")
_JOB = ("What is {s}'s job?", "What is the profession of {s}?", "What does {s} do for work?",
        "Which occupation does {s} have?")  # fmt: skip
_EMPLOYER = ("Who employs {s}?", "Which company does {s} work for?", "What is {s}'s workplace?")
_HOME = ("Where is {s}'s home?", "In which place does {s} live?", "What city is {s} based in?",
         "What is {s}'s place of residence?")  # fmt: skip
_LEADS = ("What is led by {s}?", "What is {s} in charge of?", "Whom does {s} train?")

# (base of the verb, preposition after it or "")
VERBS: dict[tuple[str, str], tuple[str, ...]] = {
    ("work", "as"): _JOB, ("work", "at"): _EMPLOYER, ("work", "for"): _EMPLOYER,
    ("work", "in"): ("Where is {s}'s workplace?", "What field or place does {s} work in?"),
    ("live", "in"): _HOME, ("reside", "in"): _HOME, ("live", "at"): _HOME, ("live", "on"): _HOME,
    ("come", "from"): ("Where is {s} from?", "What is {s}'s origin?", "Where did {s} grow up?"),
    ("weigh", ""): ("What is {s}'s weight?", "Is {s} heavy?", "What is the mass of {s}?"),
    ("cost", ""): ("What is {s}'s price?", "How expensive is {s}?", "What do I pay for {s}?"),
    ("last", ""): ("What is the length of {s}?", "When does {s} run out?"),
    ("play", ""): ("What can {s} play?", "What is {s}'s instrument, game or sport?"),
    ("speak", ""): ("What languages does {s} speak?", "What is {s}'s language?"),
    ("write", ""): ("What is a book or text by {s}?", "What is {s}'s work as a writer?"),
    ("study", ""): ("What is {s}'s subject?", "What does {s} research?", "What is {s} learning?"),
    ("teach", ""): ("What is {s}'s subject?", "What can I learn from {s}?"),
    ("start", "on"): ("What is the start date of {s}?", "When is the start of {s}?"),
    ("start", "at"): ("What time does {s} start?", "When is the start of {s}?"),
    ("begin", "on"): ("What is the start date of {s}?", "When is the beginning of {s}?"),
    ("end", "on"): ("What is the end date of {s}?", "When is {s} over?"),
    ("close", "at"): ("What is {s}'s closing time?", "How late is {s} open?"),
    ("open", "at"): ("What is {s}'s opening time?", "How early is {s} open?"),
    ("invent", ""): ("What is {s}'s invention?", "What did {s} create?"),
    ("discover", ""): ("What is {s}'s discovery?", "What did {s} find?"),
    ("found", ""): ("What is founded by {s}?", "What company or group did {s} create?"),
    ("build", ""): ("What is built by {s}?", "What did {s} construct?"),
    ("prefer", ""): _LIKES, ("like", ""): _LIKES, ("love", ""): _LIKES, ("enjoy", ""): _LIKES,
    ("hate", ""): ("What is it that {s} cannot stand?", "What should {s} be spared?"),
    ("dislike", ""): ("What is it that {s} cannot stand?", "What should {s} be spared?"),
    ("fear", ""): ("What is {s} afraid of?", "What frightens {s}?"),
    ("use", ""): ("What is used by {s}?", "What does {s} need?", "What does {s} run on?"),
    ("contain", ""): ("What is in {s}?", "What is {s} made with?",
                      "What are the ingredients or parts of {s}?"),
    ("support", ""): ("What is supported by {s}?", "What works with {s}?"),
    ("drive", ""): ("What is {s}'s vehicle?", "What kind of vehicle does {s} have?"),
    ("ride", ""): ("What is {s}'s vehicle or animal?", "How does {s} get around?"),
    ("collect", ""): ("What is {s}'s hobby?", "What does {s} gather?",
                      "What is in {s}'s collection?"),
    ("marry", ""): ("Who is {s} married to?", "Who is {s}'s partner?",
                    "Whose wedding was it with {s}?"),
    ("own", ""): ("What belongs to {s}?", "What does {s} have?", "What is {s}'s property?"),
    ("have", ""): ("What belongs to {s}?", "What is there to say about {s}?"),
    ("lead", ""): _LEADS, ("coach", ""): _LEADS, ("manage", ""): _LEADS, ("run", ""): _LEADS,
    ("eat", ""): ("What food is for {s}?", "What is on {s}'s plate?"),
    ("drink", ""): ("What beverage is for {s}?", "What is in {s}'s cup?"),
    ("wear", ""): ("How is {s} dressed?", "What clothes does {s} have on?"),
    ("produce", ""): ("What is made by {s}?", "What are {s}'s products?"),
    ("make", ""): ("What is made by {s}?", "What are {s}'s products?"),
    ("sell", ""): ("What can I buy from {s}?", "What are {s}'s goods?"),
    ("win", ""): ("Which prize went to {s}?", "What was {s}'s success?"),
    ("visit", ""): ("Where was {s}?", "Which place did {s} go to?"),
}  # fmt: skip

# Participle or adjective after "to be".
STATES: dict[str, tuple[str, ...]] = {
    "born in": ("What year or place was {s} born in?", "What is {s}'s birth date or place?",
                "How old is {s}?", "Where or when did {s} come into the world?"),
    "born on": ("What is {s}'s date of birth?", "When is {s}'s birthday?"),
    "founded in": ("What year was {s} founded in?", "When did {s} start?", "How old is {s}?"),
    "built in": ("What year or place was {s} built in?", "How old is {s}?"),
    "located in": ("What is the location of {s}?", "Where can I find {s}?"),
    "based in": ("What is the location of {s}?", "Where can I find {s}?"),
    "allergic to": ("What is {s}'s allergy?", "What can {s} not eat or touch?",
                    "Does {s} have an allergy?"),
    "married to": ("Who is {s}'s partner?", "Who did {s} marry?"),
    "made of": ("What material is {s}?", "What is {s} built from?"),
    "afraid of": ("What frightens {s}?", "What is {s}'s fear?"),
    "interested in": ("What interests {s}?", "What is {s}'s interest?"),
    "by": _BY,
}  # fmt: skip

# Words in what somebody has.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "favourite": ("Which {kind} does {s} like best?", "What {kind} does {s} love?"),
    "favorite": ("Which {kind} does {s} like best?", "What {kind} does {s} love?"),
    "executive": ("Who leads {s}?", "Who is the head of {s}?"),
    "director": ("Who leads {s}?", "Who is the head of {s}?"),
    "manager": ("Who leads {s}?", "Who is responsible for {s}?"),
    "ceo": ("Who leads {s}?", "Who is the head of {s}?"),
    "sister": ("Who is a sibling of {s}?", "Who is related to {s}?"),
    "brother": ("Who is a sibling of {s}?", "Who is related to {s}?"),
    "wife": ("Who is {s} married to?", "Who is related to {s}?"),
    "husband": ("Who is {s} married to?", "Who is related to {s}?"),
    "son": ("Who is a child of {s}?", "Who is related to {s}?"),
    "daughter": ("Who is a child of {s}?", "Who is related to {s}?"),
    "phone": ("How can I call {s}?", "What should I dial for {s}?"),
    "email": ("How can I write to {s}?", "What is {s}'s address?"),
    "address": ("Where can I find {s}?", "Where does {s} live?"),
    "colour": ("What colour does {s} have?", "How does {s} look?"),
    "color": ("What color does {s} have?", "How does {s} look?"),
    "birthday": ("When was {s} born?", "When does {s} celebrate?"),
    "price": ("How much does {s} cost?", "How expensive is {s}?"),
    "mascot": ("Who is the symbol of {s}?", "What creature stands for {s}?"),
    "capital": ("Which city governs {s}?", "What is the main city of {s}?"),
    "warranty": ("How long is {s} guaranteed?", "What guarantee does {s} have?"),
    "name": ("How is {s} called?", "What do people call {s}?"),
    "job": _JOB,
    "hobby": ("What does {s} do for fun?", "How does {s} spend free time?"),
    "pet": ("Which animal does {s} keep?", "What animal lives with {s}?"),
}


def of_verb(base: str, preposition: str, subject: str) -> list[str]:
    """More questions for "subject base preposition ..."."""
    found = VERBS.get((base, preposition)) or VERBS.get((base, ""), ())
    return [one.format(s=subject) for one in found]


def of_state(participle: str, preposition: str, subject: str) -> list[str]:
    """More questions for "subject is participle preposition ..."."""
    found = STATES.get(f"{participle} {preposition}") or STATES.get(preposition, ())
    return [one.format(s=subject, did=participle) for one in found]


def of_attribute(attribute: str, owner: str) -> list[str]:
    """More questions for "the attribute of owner"."""
    words = attribute.lower().split()
    kind = words[-1] if words else attribute
    found = [one for word in words for one in ATTRIBUTES.get(word, ())]
    return [one.format(s=owner, kind=kind) for one in found[:3]]
