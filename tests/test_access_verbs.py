"""Every public verb under every right: who may, who may not, and that nothing hidden shows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from memos import (
    MOS,
    GeneralTextMemory,
    GraphMemory,
    KVCacheMemory,
    ParametricMemory,
    TreeTextMemory,
    VectorMemory,
)
from memos.errors import AccessError, ArgumentError, MemosError, NotFoundError
from memos.governance.verbs import ATTRIBUTES, MEMORY_VERBS, MOS_VERBS
from memos.records.rights import RIGHTS
from tests.access_model import Clock, embed

ANN, EVE = "user:ann", "user:eve"
HIDDEN = {"read": [EVE], "write": [EVE]}
MARK = "quicksilver"  # stands in everything that is hidden: ids, contents, metadata
GIVEN = [frozenset(c) for n in range(2) for c in itertools.combinations(RIGHTS, n)]
GIVEN += [frozenset({"read", "write"}), frozenset({"read", "share"})]
VECTOR = [1.0, 0.5, 0.25, 0.125]


class Past:
    """A MOS with open and hidden cubes in five memories."""

    def __init__(self) -> None:
        self.clock = Clock()
        mos = self.mos = MOS(clock=self.clock)
        mos.register_memory(GeneralTextMemory("notes", embedder=embed, clock=self.clock))
        mos.register_memory(TreeTextMemory("book", embedder=None, clock=self.clock))
        mos.register_memory(GraphMemory("people", embedder=None, clock=self.clock))
        mos.register_memory(VectorMemory("points", clock=self.clock))
        secret = {"secret": MARK, "speaker": MARK}
        for id, acl in (("open", None), (f"{MARK}-note", HIDDEN)):
            what = "the key is under the mat" if acl is None else f"the {MARK} key"
            mos.add("notes", what, secret if acl else {}, id=id, acl=acl, thread="t")
        mos.add("book", "Keys", id="root")
        mos.add("book", "of the house", id="leaf", parent_id="root")
        mos.add("book", f"{MARK} keys", secret, id=f"{MARK}-leaf", parent_id="root", acl=HIDDEN)
        mos.add("book", f"below {MARK}", id=f"{MARK}-below", parent_id=f"{MARK}-leaf")
        for id, acl in (("ada", None), ("ben", None), (f"{MARK}-node", HIDDEN)):
            content = {"type": "node", "label": "Person", "properties": {"name": id}}
            mos.add("people", content, id=id, acl=acl)
        for id, to in (("knows", "ben"), (f"{MARK}-edge", f"{MARK}-node")):
            content = {"type": "relationship", "label": "KNOWS", "source_id": "ada"}
            mos.add("people", {**content, "target_id": to, "properties": {}}, id=id)
        mos.add("points", VECTOR, id="point")
        mos.add("points", {"vector": VECTOR, "text": MARK}, id=f"{MARK}-point", acl=HIDDEN)
        mos.relate("open", "near", f"{MARK}-note")
        mos.relate(f"{MARK}-note", "near", "open")
        mos.relate("open", "near", "leaf")
        mos.add("notes", "made of both", id="made", derived_from=["open", f"{MARK}-note"])
        self.clock.tick()

    def view(self, rights: frozenset[str]) -> Any:
        if rights:
            self.mos.grant(ANN, rights, "*")
        return self.mos.as_principal(ANN)


def words(value: Any, depth: int = 0) -> Iterator[str]:
    """Every string that a result holds, wherever it stands in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield repr(value)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from words(key, depth + 1)
            yield from words(one, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            yield from words(one, depth + 1)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from words(getattr(value, field.name), depth + 1)
    elif value is not None and depth < 20:
        yield repr(value)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: with the view, the id of a cube that everybody on the memory has by their rights on
    it, or of a hidden one.

    Args:
        needs:  rights that it takes to do it; "seen": to get the cube, what follows from reading.
        ids:    an open and a hidden cube; (): it asks for none.
        lists:  without the right to read it answers, with nothing in it.
    """

    call: Callable[..., Any]
    needs: frozenset[str] = frozenset({"read"})
    ids: tuple[str, ...] = ()
    lists: bool = False


def reading(call: Callable[..., Any], *ids: str) -> Case:
    return Case(call, ids=ids, lists=not ids)


def writing(call: Callable[..., Any], *ids: str) -> Case:
    return Case(call, frozenset({"read", "write"}) if ids else frozenset({"write"}), ids)


def ruling(call: Callable[..., Any], *ids: str) -> Case:
    return Case(call, frozenset({"admin"}), ids)


NOTE, LEAF, NODE = ("open", f"{MARK}-note"), ("leaf", f"{MARK}-leaf"), ("ada", f"{MARK}-node")
CASES: dict[str, dict[str, Case]] = {
    "mos": {
        "add": writing(lambda v: v.add("notes", "new")),
        "add_many": writing(lambda v: v.add_many("notes", [{"content": "new"}])),
        "get": reading(lambda v, id: v.get(id), *NOTE),
        "update": writing(lambda v, id: v.update("notes", id, "changed"), *NOTE),
        "delete": writing(lambda v, id: v.delete("notes", id), *NOTE),
        "history": reading(lambda v, id: v.history(id), *NOTE),
        "relate": writing(lambda v, id: v.relate(id, "near", "made"), *NOTE),
        "retrieve": reading(lambda v: v.retrieve(query=f"who has the key of {MARK}")),
        "context": reading(lambda v: v.context(f"who has the key of {MARK}")),
        "explain": reading(lambda v: v.explain(v.retrieve(query=f"key {MARK}"))),
        "stats": reading(lambda v: v.stats()),
        "expire": reading(lambda v: v.expire()),
        "memory": reading(lambda v: v.memory("notes").cubes()),
        "grant": ruling(lambda v: v.grant("user:bob", "write", "notes")),
        "revoke": ruling(lambda v: v.revoke("user:bob", "write", "notes")),
        "trace": reading(lambda v, id: v.trace(id), *NOTE),
        "diff": reading(lambda v, id: v.diff(id, 1), *NOTE),
        "rollback": writing(lambda v, id: v.rollback(id, 1), *NOTE),
        "clone": writing(lambda v, id: v.clone(id), *NOTE),
        "branch": ruling(lambda v: v.branch("notes", "other")),
        "merge": ruling(lambda v: v.merge("notes", "book")),
        "at": reading(lambda v: v.at(1.8e9).memory("notes").cubes()),
        "use": reading(lambda v, id: v.use(id), *NOTE),
        "archive": ruling(lambda v, id: v.archive(id), *NOTE),
        "freeze": ruling(lambda v, id: v.freeze(id), *NOTE),
        "thaw": ruling(lambda v, id: v.thaw(id), *NOTE),
        "pin": ruling(lambda v, id: v.pin(id), *NOTE),
        "uses": ruling(lambda v, id: v.uses(id), *NOTE),
        "transitions": ruling(lambda v, id: v.transitions(id), *NOTE),
        "undo_merge": ruling(lambda v, id: v.undo_merge(id), *NOTE),
        "purge": ruling(lambda v, id: v.purge(id), *NOTE),
        "sweep": ruling(lambda v: v.sweep(memory="notes", hot_cubes=1)),
        "find_duplicates": ruling(lambda v: v.find_duplicates("notes")),
        "merge_duplicates": ruling(lambda v: v.merge_duplicates("notes")),
        "settle_facts": ruling(lambda v: v.settle_facts("notes")),
        "distil": ruling(lambda v: v.distil("notes", "notes")),
        "export": ruling(lambda v: v.export(FILES / "out.memcube", memory="notes", overwrite=True)),
        "import_": ruling(lambda v: v.import_(FILES / "in.memcube", on_conflict="skip")),
    },
    "text": {
        "add": writing(lambda m: m.add("new")),
        "add_many": writing(lambda m: m.add_many([{"content": "new"}])),
        "get": reading(lambda m, id: m.get(id), *NOTE),
        "update": writing(lambda m, id: m.update(id, metadata={"a": 1}), *NOTE),
        "delete": writing(lambda m, id: m.delete(id), *NOTE),
        "history": reading(lambda m, id: m.history(id), *NOTE),
        "cubes": reading(lambda m: m.cubes(None)),
        "relate": writing(lambda m, id: m.relate(id, "near", "made"), *NOTE),
        "expire": reading(lambda m: m.expire()),
        "stats": reading(lambda m: m.stats()),
    },
    "tree": {
        "roots": reading(lambda m: m.roots()),
        "children": reading(lambda m, id: m.children(id), "root", LEAF[1]),
        "ancestors": reading(lambda m, id: m.ancestors(id), *LEAF),
        "path": reading(lambda m, id: m.path(id), *LEAF),
        "siblings": reading(lambda m, id: m.siblings(id), *LEAF),
        "descendants": reading(lambda m, id: m.descendants(id), "root", LEAF[1]),
        "relatives": reading(lambda m, id: m.relatives(id, "siblings"), *LEAF),
        "with_relatives": reading(
            lambda m: m.with_relatives(m.cubes(), siblings=True, descendants=True)
        ),
        "move": writing(lambda m, id: m.move(id, None), *LEAF),
        "add_document": writing(lambda m: m.add_document("# New\n\ntext")),
        "export_text": reading(lambda m, id: m.export_text(id), "root", LEAF[1]),
    },
    "graph": {
        "nodes": reading(lambda m: m.nodes()),
        "neighbourhood": reading(lambda m, id: m.neighbourhood(id, 3), *NODE),
        "shortest_path": reading(lambda m, id: m.shortest_path("ben", id), *NODE),
        "pagerank": reading(lambda m, id: m.pagerank([id]), *NODE),
        "degree": reading(lambda m, id: m.degree(id), *NODE),
        "set_properties": writing(lambda m, id: m.set_properties(id, {"age": 3}), *NODE),
    },
    "vector": {},
}
SHARED = set(CASES["text"])
NAMES = {"text": "notes", "tree": "book", "graph": "people", "vector": "points"}
FILES = Path()


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.FILES", tmp_path)


def test_the_cases_are_all_verbs_there_are() -> None:
    assert set(CASES["mos"]) == set(MOS_VERBS)
    for kind in NAMES:
        assert set(CASES[kind]) | SHARED == set(MEMORY_VERBS[kind])


# What a view does not have: everything public that is neither a verb nor plain data.
CLOSED = {
    MOS: "activate add_member as_principal audit change_master_key change_memory_key close "
    "associations deactivate grants groups hebbian jobs memories pipeline register_memory "
    "remove_member reseal schedule scheduler",
    GeneralTextMemory: "bind close config in_prompts in_use left lookup now purged records "
    "restored scope table wake",
    TreeTextMemory: "relatives_of",
    GraphMemory: "pending synchronise",
    VectorMemory: "",
    ParametricMemory: "attach check detach files fits pool sweep",
    KVCacheMemory: "activate activated calibrate clear clear_pieces close cold_identity compose "
    "curve deactivate device_pool identity is_activated list_of pools shows_any tenant text "
    "text_of tokenizer tokens_of",
}


def test_what_is_new_is_closed_until_somebody_decides() -> None:
    base = set(CLOSED[GeneralTextMemory].split())
    for cls, names in CLOSED.items():
        public = {name for name in dir(cls) if not name.startswith("_")}
        verbs = set(MOS_VERBS if cls is MOS else MEMORY_VERBS[cls.kind])
        closed = set(names.split()) | (base if hasattr(cls, "restored") else set())
        assert public - set(ATTRIBUTES) - verbs == closed & public, cls.__name__
        assert closed & public >= set(names.split()), cls.__name__
    past = Past()
    view = past.view(frozenset({"read", "write"}))
    for name in CLOSED[MOS].split():
        if name != "memories":
            with pytest.raises((AccessError, AttributeError)):
                getattr(view, name)
    for name in base:
        with pytest.raises((AccessError, AttributeError)):
            getattr(view.memory("notes"), name)
    for name in ("records", "_memories", "_target_", "nothing"):
        with pytest.raises(AttributeError):
            getattr(view, name)
    with pytest.raises(AccessError):
        view.memory("book").with_relatives([], scope=past.mos.memory("book").scope())
    with pytest.raises(AccessError):
        view.memories["notes"].records  # noqa: B018


CALLS = [(kind, name) for kind, cases in CASES.items() for name in cases]
CALLS += [(kind, name) for kind in ("tree", "graph", "vector") for name in sorted(SHARED)]
OPEN_IDS = {"text": NOTE, "tree": LEAF, "graph": NODE, "vector": ("point", f"{MARK}-point")}


def case_of(kind: str, name: str) -> Case:
    if name in CASES[kind]:
        return CASES[kind][name]
    case = CASES["text"][name]  # of another kind: with its own ids and contents
    if name in ("add", "add_many"):
        content: Any = {
            "graph": {"type": "node", "label": "New", "properties": {}},
            "vector": [0.0, 0.0, 1.0, 1.0],
        }.get(kind, "new")
        one = {"content": content}
        if name == "add":
            return writing(lambda m: m.add(content))
        return writing(lambda m: m.add_many([one]))
    return dataclasses.replace(case, ids=OPEN_IDS[kind]) if case.ids else case


@pytest.mark.parametrize(("kind", "name"), CALLS)
def test_every_verb_with_every_right(kind: str, name: str, tmp_path: Path) -> None:
    case = case_of(kind, name)
    changes = case.needs != {"read"}
    past: Past | None = None
    for rights in GIVEN:
        if past is None:
            past = Past()
            if name == "import_":
                past.mos.export(tmp_path / "in.memcube", memory="notes", overwrite=True)
        past.mos.revoke(ANN, RIGHTS, "*")
        view = past.view(rights)
        has, used = set(RIGHTS) if "admin" in rights else set(rights), False
        for id in reversed(case.ids or ("",)):
            is_hidden = id.startswith(MARK)
            try:
                target = view if kind == "mos" else view.memory(NAMES[kind])
                result: Any = case.call(target, id) if id else case.call(target)
                outcome = "done"
            except MemosError as error:
                result, outcome = None, type(error).__name__
                said = str(error).replace(id, "") if id else str(error)
                assert MARK not in said or "admin" in has, said
            label = (kind, name, sorted(rights), id, outcome)
            if "admin" not in has:
                shown = [word for word in words(result) if MARK in word]
                assert not shown or name in ("retrieve", "context", "explain"), (label, shown)
                assert not [word for word in shown if f"{MARK}-" in word or f"the {MARK}" in word]
            assert outcome in expected(case, name, has, is_hidden), label
            if outcome == "done" and changes:
                used = True
        if used:  # a refusal changes nothing; what went through did
            past.mos.close()
            past = None


def expected(case: Case, name: str, has: set[str], is_hidden: bool) -> set[str]:
    """How a call may end."""
    if "admin" in has:
        # What needs more than rights to go through: a state, a branch, another file.
        return {"done", "ArgumentError"} if case.needs == {"admin"} else {"done"}
    if is_hidden:
        return {"NotFoundError"}
    if not has:
        nothing = name in ("retrieve", "context", "explain", "stats", "expire", "at", "import_")
        return (
            {"done", "AccessError", "NotFoundError"}
            if nothing
            else {"NotFoundError", "AccessError"}
        )
    if case.ids and "read" not in has:
        return {"NotFoundError"}
    if case.needs <= has or case.lists:
        return {"done"}
    return {"AccessError"}


def test_what_was_granted_to_others_does_not_count() -> None:
    past = Past()
    past.mos.grant("user:bob", "admin", "*")
    view = past.view(frozenset())
    assert view.memories == {}
    assert view.retrieve(query=f"key {MARK}") == []
    assert view.stats() == {"memories": {}}
    with pytest.raises(NotFoundError, match="there are: none"):
        view.memory("notes")


def test_sharing() -> None:
    """Who has share gives what it has, and no more; who has it from a list gives on the cube."""
    past = Past()
    view = past.view(frozenset({"read", "share"}))
    view.grant("user:bob", "read", "notes")
    bob = past.mos.as_principal("user:bob")
    assert bob.get("open").content == "the key is under the mat"
    for right in ("write", "admin", ["read", "write"]):
        with pytest.raises(AccessError):
            view.grant("user:bob", right, "notes")
    with pytest.raises(AccessError):
        view.revoke("user:bob", "read", "notes")
    with pytest.raises(AccessError):
        view.grant("user:bob", "read", "*") or bob.grant("user:cid", "read", "notes")
    view.grant("user:cid", "read", id="open")
    cid = past.mos.as_principal("user:cid")
    assert [cube.id for cube in cid.memory("notes").cubes()] == ["open"]
    assert cid.history("open") == past.mos.history("open")[-1:] or len(cid.history("open")) == 1
    with pytest.raises(NotFoundError):
        view.grant("user:cid", "read", id=f"{MARK}-note")
    assert past.mos.get("open").acl == {"inherit": True, "read": ["user:cid"]}
    assert cid.get("open").acl is None  # who else may read is not for readers
    assert past.mos.history("open")[-1].author == ANN
    past.mos.revoke("user:cid", "read", id="open")
    with pytest.raises(NotFoundError):
        cid.get("open")


def test_an_old_version_stays_closed() -> None:
    past = Past()
    view = past.view(frozenset({"read"}))
    past.mos.update("notes", f"{MARK}-note", "now open", {"secret": "", "speaker": ""}, acl={})
    past.mos.grant("anyone", "read", id=f"{MARK}-note")
    assert view.get(f"{MARK}-note").content == "now open"
    assert [version.content for version in view.history(f"{MARK}-note")] == ["now open"]
    for call in (lambda: view.diff(f"{MARK}-note", 1), lambda: view.diff(f"{MARK}-note", 4, 2)):
        with pytest.raises(ArgumentError):
            call()
    assert view.retrieve("notes", "key", as_of=past.clock.now - 1)[0].id == "open"


def test_an_added_duplicate_of_a_hidden_cube_is_a_cube_of_its_own() -> None:
    past = Past()
    view = past.view(frozenset({"read", "write"}))
    secret = {"secret": MARK, "speaker": MARK}
    made = view.add("notes", f"the {MARK} key", secret)
    assert made.id != f"{MARK}-note"
    assert made.creator == ANN
    assert view.add("notes", f"the {MARK} key", secret).id == made.id
    forged = view.add("notes", "forged", creator="user:bob")
    assert view.history(forged.id)[0].author == ANN
    view.update("notes", forged.id, "more", author="user:bob")
    assert view.history(forged.id)[-1].author == ANN
    dropped = past.mos.as_principal("user:drop")
    past.mos.grant("user:drop", "write", "notes")
    assert dropped.add("notes", "a letter").content == "a letter"
    assert dropped.memory("notes").cubes() == []


@pytest.mark.parametrize(
    "acl",
    [
        "user:ann",
        ["user:ann"],
        {"see": ["user:ann"]},
        {"read": "user:ann"},
        {"read": [""]},
        {"read": [3]},
        {"inherit": 1},
        {3: []},
    ],
)
def test_a_list_that_is_none_is_refused(acl: Any) -> None:
    past = Past()
    with pytest.raises(ArgumentError, match="acl"):
        past.mos.add("notes", "text", acl=acl)
    with pytest.raises(ArgumentError, match="acl"):
        past.mos.update("notes", "open", acl=acl)


def test_arguments_of_rights() -> None:
    mos = Past().mos
    for call in (
        lambda: mos.grant("", "read", "notes"),
        lambda: mos.grant(ANN, "look", "notes"),
        lambda: mos.grant(ANN, [], "notes"),
        lambda: mos.grant(ANN, "read"),
        lambda: mos.grant(ANN, "read", 3),
        lambda: mos.as_principal(""),
        lambda: mos.as_principal(ANN, "group:staff"),
        lambda: mos.as_principal(ANN, [""]),
        lambda: mos.as_principal(ANN, purpose=3),
        lambda: mos.add_member("anyone", ANN),
    ):
        with pytest.raises(ArgumentError):
            call()
    with pytest.raises(NotFoundError):
        mos.grant(ANN, "read", "nowhere")
    with pytest.raises(NotFoundError):
        mos.grant(ANN, "read", id="nowhere")
    mos.add_member("group:a", "group:b")
    mos.add_member("group:b", "group:a")
    mos.add_member("group:b", ANN)
    mos.grant("group:a", "read", "*")
    assert mos.as_principal(ANN).get("open").id == "open"
    assert mos.groups() == {"group:a": ["group:b"], "group:b": ["group:a", ANN]}
    assert mos.grants() == [("*", "group:a", ("read",))]
    mos.remove_member("group:b", ANN)
    assert mos.as_principal(ANN).memories == {}
    assert mos.as_principal(ANN, ["group:b"]).get("open").id == "open"
