"""The container of a .memcube: one spelling, every byte checked, signatures, encryption."""

from __future__ import annotations

import io
import itertools
import json
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from memos.cube import memcube, memcube_cipher
from memos.cube import memcube_zip as layout
from memos.cube.identity import canonical
from memos.cube.memcube import MemcubeReader, MemcubeWriter, parse_record, record
from memos.errors import ArgumentError, MemosError, StoreError

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
MEMBERS = {
    "records/0001-000001.jsonl": ("records", b'{"a":1}\n{"b":"\xc3\xa9"}\n'),
    "tensors/0001-000001.safetensors": ("tensors", bytes(range(256)) * 3),
    "blobs/empty": ("blob", b""),
}


def written(
    members: Mapping[str, tuple[str, bytes]] = MEMBERS, info: Any = None, **options: Any
) -> bytes:
    stream = io.BytesIO()
    writer = MemcubeWriter(stream, **options)
    for name, (type, data) in members.items():
        with writer.member(name, type) as member:
            for at in range(0, len(data), 100):
                member.write(data[at : at + 100])
    writer.close(info or {"what": ["ever", 1]})
    return stream.getvalue()


def opened(data: bytes, **options: Any) -> MemcubeReader:
    return MemcubeReader(io.BytesIO(data), **options)


def contents(data: bytes, **options: Any) -> dict[str, tuple[str, bytes]]:
    """Everything in a file, verified."""
    reader = opened(data, **options)
    reader.verify()
    return {m.name: (m.type, b"".join(reader.pieces(m.name))) for m in reader.members.values()}


def refused(data: bytes, **options: Any) -> str:
    """Why a file is refused: when it is opened, or at the latest when it is verified."""
    with pytest.raises((StoreError, ArgumentError)) as caught:
        contents(data, **options)
    return str(caught.value)


# What is written is read.


@pytest.mark.parametrize("options", [{}, {"secret": KEY}, {"sign": OTHER}])
def test_what_is_written_is_read(options: dict[str, Any]) -> None:
    data = written(**options)
    secret = options.get("secret")
    assert contents(data, secret=secret) == dict(MEMBERS)
    reader = opened(data, secret=secret)
    assert reader.info == {"what": ["ever", 1]}
    assert list(reader.members) == list(MEMBERS)
    assert reader.is_encrypted == (secret is not None)
    assert (reader.signer is None) == ("sign" not in options)
    assert list(reader.lines("records/0001-000001.jsonl")) == [b'{"a":1}', b'{"b":"\xc3\xa9"}']


def test_equal_contents_give_equal_bytes() -> None:
    assert written() == written()
    assert written(sign=KEY) == written(sign=KEY)
    assert written(secret=KEY) != written(secret=KEY)
    assert opened(written()).digest == opened(written(secret=KEY), secret=KEY).digest
    assert written(info={"b": 1, "a": 2}) == written(info={"a": 2, "b": 1})


def test_the_file_is_what_the_format_says() -> None:
    """Read by hand, from docs/format/memcube.md alone."""
    data = written(sign=KEY)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names == ["mimetype", *MEMBERS, "manifest.json", "seal.json"]
        text = archive.read("manifest.json")
        seal = json.loads(archive.read("seal.json"))
        for name, (_, wanted) in MEMBERS.items():
            assert archive.read(name) == wanted
    assert data[58:91] == b"application/vnd.memos.memcube+zip"
    manifest = json.loads(text)
    assert set(manifest) == {"format", "info", "members", "version"}
    assert (manifest["format"], manifest["version"]) == ("memcube", 1)
    for one in manifest["members"]:
        kind, wanted = MEMBERS[one["name"]]
        assert one == {
            **{"bytes": len(wanted), "digest": blake3(wanted).hexdigest()},
            **{"name": one["name"], "type": kind},
        }
    assert seal["digest"] == blake3(text).hexdigest()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signature = seal["signature"]
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["key"]))
    signed = b"memcube v1 signature\0" + bytes.fromhex(seal["digest"])
    public.verify(bytes.fromhex(signature["value"]), signed)


def test_unzip_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.memcube"
    path.write_bytes(written())
    try:
        done = subprocess.run(["unzip", "-t", str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unzip is not installed")
    assert done.returncode == 0, done.stdout
    assert "No errors detected" in done.stdout


def test_a_stream_that_cannot_seek_is_enough_to_write() -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    writer = MemcubeWriter(pipe)  # type: ignore[arg-type]
    with writer.member("a", "blob") as member:
        member.write(b"1")
    writer.close({})
    assert contents(pipe.data) == {"a": ("blob", b"1")}


names = st.from_regex(r"[a-z0-9]{1,5}(/[a-z0-9]{1,5}){0,2}(\.[a-z]{1,3})?", fullmatch=True).filter(
    lambda name: name not in ("mimetype", "manifest.json", "seal.json")
)
members = st.dictionaries(
    names, st.tuples(st.sampled_from(memcube.TYPES), st.binary(max_size=3000)), max_size=6
)


@settings(max_examples=60)
@given(members, st.sampled_from([None, KEY]), st.integers(64, 700))
def test_any_members_are_read_back(
    given: dict[str, tuple[str, bytes]], secret: bytes | None, chunk: int
) -> None:
    before = memcube_cipher.CHUNK_BYTES, memcube._PIECE
    memcube_cipher.CHUNK_BYTES, memcube._PIECE = chunk, chunk + 13
    try:
        data = written(given, secret=secret)
        assert contents(data, secret=secret) == given
        if secret is None:
            assert written(contents(data)) == data
    finally:
        memcube_cipher.CHUNK_BYTES, memcube._PIECE = before


def test_progress_ends_at_all_bytes() -> None:
    seen: list[tuple[int, int]] = []
    reader = opened(written())
    reader.verify(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (reader.num_bytes, reader.num_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# Arguments.


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x", "a/../b", "a//b", "A", "a b", "a\\b", "a/", ".hidden", "a/.b",
     "mimetype", "manifest.json", "seal.json", "x" * 201, "a:b", "a\n", "nul\0", "\u00e9", 5],
)  # fmt: skip
def test_names_out_of_contract_are_refused(name: Any) -> None:
    writer = MemcubeWriter(io.BytesIO())
    with pytest.raises(ArgumentError, match="name"), writer.member(name, "blob"):
        pass


def test_a_member_is_written_once_and_one_at_a_time() -> None:
    writer = MemcubeWriter(io.BytesIO())
    with writer.member("a", "blob"), pytest.raises(ArgumentError), writer.member("b", "blob"):
        pass
    with pytest.raises(ArgumentError), writer.member("a", "blob"):
        pass
    with pytest.raises(ArgumentError, match="type"), writer.member("b", "program"):
        pass


@pytest.mark.parametrize("secret", ["", b"short", 5, KEY + b"x", "lone \ud800"])
def test_secrets_out_of_contract_are_refused(secret: Any) -> None:
    with pytest.raises(ArgumentError, match="passphrase") as caught:
        written(secret=secret)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("key", ["text", b"short", 5, object()])
def test_keys_out_of_contract_are_refused_before_anything_is_written(key: Any) -> None:
    stream = io.BytesIO()
    with pytest.raises(ArgumentError, match="sign") as caught:
        MemcubeWriter(stream, sign=key)
    assert stream.getvalue() == b""
    assert "short" not in str(caught.value)
    with pytest.raises(ArgumentError, match="trusted"):
        opened(written(), trusted=[key])


def test_records_have_one_spelling() -> None:
    line = record({"b": [1.5, None], "a": "\u00e9\n"}, "it")
    assert line == '{"a":"\u00e9\\n","b":[1.5,null]}\n'.encode()
    assert parse_record(line[:-1], "it") == {"a": "\u00e9\n", "b": [1.5, None]}
    bad = [
        *(b"", b"5", b"[]", b'{"a":1,"a":1}', b'{"b":1,"a":1}', b'{"a": 1}', b'{"a":NaN}'),
        *(b'{"a":1e999}', b'{"a":01}', b'{"a":1.50}', b'{"a":"\\u00e9"}', b'{"a":"\xff"}'),
        *(b'{"a":1}x', b'{"a":"\\ud800"}', b"[" * 100_000, b'{"a":' * 200 + b"1" + b"}" * 200),
        *(b'{"a":' + b"9" * 5000 + b"}", b'{"a":-0}', b'{"a":1E5}', b'\xef\xbb\xbf{"a":1}'),
    ]
    for one in bad:
        with pytest.raises(StoreError, match=r"^it: "):
            parse_record(one, "it")


def test_lines_over_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcube, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(memcube, "_PIECE", 64)
    with pytest.raises(ArgumentError, match="cube 'x'"):
        record({"a": "x" * 200}, "cube 'x'")
    data = written({"r": ("records", b"x" * 300)})
    with pytest.raises(StoreError, match="lines of at most"):
        list(opened(data).lines("r"))
    data = written({"r": ("records", b"x\nno end")})
    with pytest.raises(StoreError, match="no end"):
        list(opened(data).lines("r"))


# Hostile files: every one is made with the right checksums, so that only its lie can be what
# is refused.


def forged(
    members: list[tuple[str, bytes]], manifest: Any = None, seal: Any = None, index: Any = None
) -> bytes:
    """An archive with these members, whatever they are."""
    stream, entries = io.BytesIO(), []
    told = [
        {"bytes": len(d), "digest": blake3(d).hexdigest(), "name": n, "type": "blob"}
        for n, d in members
    ]
    if manifest is None:
        manifest = {"format": "memcube", "info": {}, "members": told, "version": 1}
    if callable(manifest):
        manifest = manifest(told)
    text = manifest if isinstance(manifest, bytes) else canonical(manifest).encode()
    seal = {"digest": blake3(text).hexdigest(), "signature": None} if seal is None else seal
    whole = [("mimetype", memcube.MIME), *members, ("manifest.json", text)]
    for name, data in [*whole, ("seal.json", canonical(seal).encode())]:
        offset = stream.tell()
        stream.write(layout.before(name))
        stream.write(data)
        stream.write(layout.behind(zlib.crc32(data), len(data)))
        entries.append(layout.Entry(name, zlib.crc32(data), len(data), offset))
    stream.write(layout.index(entries if index is None else index(entries)))
    return stream.getvalue()


def test_the_forger_can_make_a_good_file() -> None:
    assert contents(forged([("a", b"1"), ("b/c.x", b"2")])) == {
        "a": ("blob", b"1"),
        "b/c.x": ("blob", b"2"),
    }


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../b", "a\\b", "C:x", "A", "a\0b", ".x", "x/"]
)
def test_paths_that_lead_elsewhere_are_refused(name: str) -> None:
    assert "name" in refused(forged([(name, b"1")]))


def test_two_members_of_one_name_are_refused() -> None:
    assert "two members" in refused(forged([("a", b"1"), ("a", b"2")]))
    assert refused(forged([("a", b"1"), ("mimetype", memcube.MIME)]))
    assert refused(forged([("seal.json", b"{}")]))


@pytest.mark.parametrize(
    "change",
    [
        lambda told: {"format": "memcube", "info": {}, "members": told},
        lambda told: {"format": "other", "info": {}, "members": told, "version": 1},
        lambda told: {"format": "memcube", "info": {}, "members": told, "version": 2},
        lambda told: {"format": "memcube", "info": {}, "members": told, "version": 1, "x": 1},
        lambda told: {"format": "memcube", "info": [], "members": told, "version": 1},
        lambda told: {"format": "memcube", "info": {}, "members": {}, "version": 1},
        lambda told: {"format": "memcube", "info": {}, "members": [], "version": 1},
        lambda told: {"format": "memcube", "info": {}, "members": told * 2, "version": 1},
        lambda told: {"format": "memcube", "info": {}, "members": [5], "version": 1},
        lambda told: [],
        lambda told: b"not json",
        lambda told: b'{"format":"memcube","format":"memcube","info":{},"members":[],"version":1}',
        *(
            lambda told, field=field, value=value: {
                **{"format": "memcube", "info": {}, "version": 1},
                "members": [{**told[0], field: value}],
            }
            for field, value in [
                ("bytes", 2), ("bytes", -1), ("bytes", "1"), ("bytes", True), ("bytes", 1.0),
                ("digest", "0" * 64), ("digest", 5), ("digest", "0" * 63), ("digest", None),
                ("name", "b"), ("name", 5), ("name", "../a"), ("name", "seal.json"),
                ("type", "program"), ("type", None), ("more", 1),
            ]
        ),
    ],
)  # fmt: skip
def test_a_manifest_that_lies_is_refused(change: Any) -> None:
    assert refused(forged([("a", b"1")], manifest=change))


@pytest.mark.parametrize(
    "seal",
    [
        {}, [], 5, {"digest": "0" * 64, "signature": None}, {"digest": None, "signature": None},
        {"digest": "0" * 64, "signature": None, "more": 1},
    ],
)  # fmt: skip
def test_a_seal_that_lies_is_refused(seal: Any) -> None:
    assert refused(forged([("a", b"1")], seal=seal))


def test_zip_bombs_are_refused() -> None:
    """Nothing is compressed, and no two members share a byte: a file holds what it weighs."""
    small = forged([("a", b"1" * 100), ("b", b"2" * 100)])
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mimetype", "manifest.json", "seal.json"):
            archive.writestr(name, b"0" * 10_000_000)
    assert refused(bomb.getvalue())

    def overlapping(entries: list[layout.Entry]) -> list[layout.Entry]:
        first, second = entries[1:3]
        both = layout.Entry(second.name, first.crc, first.num_bytes, first.offset)
        return [*entries[:2], both, *entries[3:]]

    assert refused(forged([("a", b"1" * 100), ("b", b"2" * 100)], index=overlapping))

    def huge(entries: list[layout.Entry]) -> list[layout.Entry]:
        one = entries[1]
        return [entries[0], layout.Entry(one.name, one.crc, 1 << 60, one.offset), *entries[2:]]

    assert refused(forged([("a", b"1" * 100)], index=huge))
    assert contents(small)


def test_an_index_that_lies_about_its_size_is_refused() -> None:
    data = bytearray(forged([("a", b"1")]))
    at = len(data) - layout.END_BYTES
    for field in (24, 32, 40, 48):  # counts, bytes and offset of the index
        for value in (0, 1, 2**40, 2**63, 2**64 - 1):
            wrong = bytearray(data)
            wrong[at + field : at + field + 8] = struct.pack("<Q", value)
            assert refused(bytes(wrong))


@pytest.mark.parametrize(
    "data",
    [b"", b"PK", b"not a memcube at all", bytes(98), bytes(10_000), b"MEMCUBEX", b"PK\5\6" * 30,
     b"MEMCUBEX" + bytes(100)],
)  # fmt: skip
def test_other_files_are_refused(data: bytes) -> None:
    assert refused(data)
    assert refused(data, secret=KEY)


def test_bytes_around_the_archive_are_refused() -> None:
    data = written()
    assert refused(data + b"\0")
    assert refused(b"\0" + data)
    end = len(data) - layout.END_BYTES
    assert refused(data[:end] + b"\0" + data[end:])


def mutations(data: bytes, count: int, seed: int) -> Any:
    """Files that differ from this one: bits, bytes, ranges, cuts, and two places swapped."""
    rng = random.Random(seed)
    for _ in range(count):
        wrong = bytearray(data)
        at, other = rng.randrange(len(data)), rng.randrange(len(data))
        size = rng.choice([1, 1, 2, 8, 40])
        match rng.randrange(7):
            case 0:
                wrong[at] ^= 1 << rng.randrange(8)
            case 1:
                wrong[at : at + size] = rng.randbytes(size)
            case 2:
                del wrong[at : at + size]
            case 3:
                wrong[at:at] = rng.randbytes(size)
            case 4:
                del wrong[at:]
            case 5:
                wrong[at : at + size] = data[other : other + size]
            case 6:
                wrong[at : at + size] = bytes(size)
        if bytes(wrong) != data:
            yield bytes(wrong)


@pytest.mark.parametrize("options", [{}, {"sign": OTHER}, {"secret": KEY}])
def test_no_mutated_file_passes(options: dict[str, Any]) -> None:
    data = written(**options)
    secret = options.get("secret")
    count = 0
    for wrong in mutations(data, 4000, len(options)):
        count += 1
        assert refused(wrong, secret=secret)
    assert count > 3000


def test_every_single_bit_counts() -> None:
    data = forged([("a", b"12")])
    for at, bit in itertools.product(range(len(data)), range(8)):
        wrong = bytearray(data)
        wrong[at] ^= 1 << bit
        assert refused(bytes(wrong)), (at, bit)


def test_a_member_that_changes_after_it_was_verified_is_found() -> None:
    data = bytearray(written())
    stream = io.BytesIO(data)
    reader = MemcubeReader(stream)
    reader.verify()
    at = bytes(data).index(b'{"a":1}')
    stream.seek(at)
    stream.write(b'{"a":2}')
    with pytest.raises(StoreError, match="digest"):
        list(reader.lines("records/0001-000001.jsonl"))


# Signatures.


def test_only_who_is_trusted_is_believed() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(KEY)
    public = private.public_key()
    data = written(sign=private)
    assert data == written(sign=KEY)
    signer = opened(data).signer
    assert signer == public.public_bytes_raw().hex()
    for trusted in (public, signer, bytes.fromhex(signer)):
        assert opened(data, trusted=[OTHER, trusted]).signer == signer
    assert "trusted" in refused(written(sign=OTHER), trusted=[public])
    assert "nobody" in refused(written(), trusted=[public])
    assert "trusted" in refused(data, trusted=[])


def test_a_signature_belongs_to_its_content() -> None:
    with zipfile.ZipFile(io.BytesIO(written(sign=KEY))) as archive:
        signature = json.loads(archive.read("seal.json"))["signature"]
    seals: list[Any] = []

    def manifest(told: Any) -> bytes:
        text = canonical({"format": "memcube", "info": {}, "members": told, "version": 1}).encode()
        seals.append({"digest": blake3(text).hexdigest(), "signature": signature})
        return text

    forged([("a", b"1")], manifest=manifest)
    assert "signature is wrong" in refused(forged([("a", b"1")], seal=seals[0]))
    for field, value in [("algorithm", "none"), ("key", "00" * 32), ("key", None), ("value", "")]:
        seal = {**seals[0], "signature": {**signature, field: value}}
        assert refused(forged([("a", b"1")], seal=seal))


# Encryption.


def test_nothing_shows_through_encryption() -> None:
    members = {"records/secret-name": ("records", b"a secret text" * 100)}
    data = written(members, {"info": "also secret"}, secret=KEY, sign=OTHER)
    for hidden in (b"secret", b"PK", b"manifest", b"mimetype", b"memcube+zip"):
        assert hidden not in data
    assert data.startswith(b"MEMCUBEX")


def test_the_wrong_secret_is_a_clear_error() -> None:
    data = written(secret=KEY)
    assert "the file was encrypted with" in refused(data, secret=OTHER)
    assert "key of 32 bytes wanted" in refused(data)
    assert "key of 32 bytes" in refused(data, secret="words")
    assert OTHER.hex() not in refused(data, secret=OTHER)


def test_passphrases() -> None:
    data = written(secret="correct horse \u00e9")
    assert contents(data, secret="correct horse e\u0301") == dict(MEMBERS)  # composed otherwise
    assert "the file was encrypted with" in refused(data, secret="correct horse")
    assert "correct horse" not in refused(data, secret="correct horse")
    assert "passphrase wanted" in refused(data)
    assert "passphrase" in refused(data, secret=KEY)


def test_chunks_cannot_be_moved_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcube_cipher, "CHUNK_BYTES", 64)
    data = written(secret=KEY)
    head, whole = memcube_cipher._HEADER.size, 64 + 16
    chunks = [data[at : at + whole] for at in range(head, len(data), whole)]
    assert len(chunks) > 6
    again = written(secret=KEY)

    def joined(parts: list[bytes]) -> bytes:
        return data[:head] + b"".join(parts)

    assert contents(joined(chunks), secret=KEY) == dict(MEMBERS)
    assert refused(joined(chunks[:-1]), secret=KEY)
    assert refused(joined(chunks[1:]), secret=KEY)
    assert refused(joined([*chunks, chunks[-1]]), secret=KEY)
    assert refused(joined([chunks[1], chunks[0], *chunks[2:]]), secret=KEY)
    assert refused(joined([*chunks[:2], *chunks[3:]]), secret=KEY)
    assert refused(again[:head] + b"".join(chunks), secret=KEY)
    assert refused(joined([]), secret=KEY)


def test_large_members_take_little_memory(tmp_path: Path) -> None:
    """200 MB through one member, encrypted: the process grows by a fraction of it."""
    program = """
import resource, sys
from memos.cube.memcube import MemcubeReader, MemcubeWriter
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
key = bytes(32)
with open(sys.argv[1], "wb") as file:
    writer = MemcubeWriter(file, secret=key)
    base = peak()
    with writer.member("big", "blob") as member:
        for i in range(200):
            member.write(bytes([i]) * (1 << 20))
    writer.close({})
with open(sys.argv[1], "rb") as file:
    MemcubeReader(file, secret=key).verify()
print(peak() - base)
"""
    path = tmp_path / "big.memcube"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert path.stat().st_size > 200 << 20
    assert int(done.stdout) < 40


def test_errors_are_of_memos() -> None:
    assert issubclass(StoreError, MemosError)
    with pytest.raises(KeyError):
        opened(written()).members["not there"]
