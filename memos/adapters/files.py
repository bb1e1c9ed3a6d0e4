"""Adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

What memos adds travels in the safetensors metadata, where PEFT ignores it: under "memos" the card,
under "memos.seal" the digests of the contents, of the card and of adapter_config.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from blake3 import blake3

from memos.adapters import _disk
from memos.adapters._peft import Scaling, check_config, complete_config, dump
from memos.adapters.adapter import Adapter
from memos.adapters.packed import PREFIX, Layer, Packed, canonical, layers_of, pack
from memos.cube.safetensors import (
    LENGTH_BYTES,
    Entry,
    build_header,
    header_bytes,
    parse_header,
    parse_json,
)
from memos.errors import ArgumentError, StoreError

CONFIG = "adapter_config.json"
MODEL = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_CARD, _SEAL = "memos", "memos.seal"
_MAX_CONFIG_BYTES = 16 << 20


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter as PEFT 0.21 saves it, or as ``write_adapter`` does.

    Args:
        path: the folder.

    Returns:
        Tensors on the CPU in the file's dtype, all over one piece of memory. ``config`` is what
        stands in adapter_config.json; ``card`` is empty where another program wrote the file.

    Raises:
        ArgumentError: damaged, NaN or infinite, a rank above 512, or more than low-rank factors
            beside unchanged weights: pickles, DoRA, biases, whole layers (modules_to_save),
            embeddings, experts, activated LoRA, PiSSA and its like before their conversion. The
            message names what was found. Nothing is loaded then.
        StoreError: the disk failed.

    Cost: reads the file once, in one piece.
    """
    return read_packed(Path(path)).adapter()


def write_adapter(path: str | os.PathLike[str], adapter: Adapter, *, durable: bool = True) -> None:
    """Write an adapter that PEFT 0.21 and ``read_adapter`` read. It appears whole or not at all.

    Ranks, alphas and target modules of ``adapter.config`` that are missing, or disagree with the
    factors, are written out so that PEFT computes with the same scales.

    Args:
        path:    a folder that does not exist, or is empty; its parent exists.
        durable: it survives a power cut once this returns.

    Raises:
        ArgumentError: there is something at ``path``; factors, config or card out of contract.
        StoreError: the disk failed; nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ArgumentError(f"path: a new or empty folder wanted, got {path}, which has contents")
    if not path.parent.is_dir():
        raise ArgumentError(f"path: a folder to write into wanted, got {path.parent}")
    _, files = encode(adapter)
    with _disk.explained("write the adapter", path):
        _disk.publish_folder(path, files, durable=durable)


def digest(adapter: Adapter) -> str:
    """BLAKE3 of what an adapter computes: names, shapes, dtypes, scales (as float32) and bytes.

    Order of layers, layout of files, config and card do not count.

    Returns:
        64 hexadecimal digits.

    Raises:
        ArgumentError: the factors are out of contract.
    """
    return pack(adapter).digest()


def encode(adapter: Adapter) -> tuple[str, dict[str, Sequence[_disk.Bytes]]]:
    """The digest of an adapter, and the files of its folder: name -> pieces of its bytes."""
    packed = pack(adapter)
    found = packed.digest()
    config = dump(complete_config(packed.config, adapter.factors), "config").encode() + b"\n"
    card = dump(dict(packed.card), "card")
    seal = {"digest": found, "card": _hex(card.encode()), "config": _hex(config)}
    header = build_header(
        _entries(packed.layers),
        {"format": "pt", _CARD: card, _SEAL: json.dumps(seal, separators=(",", ":"))},
    )
    return found, {CONFIG: [config], MODEL: [header, packed.payload.data]}


def read_packed(path: Path) -> Packed:
    """``read_adapter`` before it makes tensors."""
    with _disk.explained("read the adapter", path):
        config_text, fd = _open(path)
        try:
            size = os.fstat(fd).st_size
            where = str(path / MODEL)
            first = os.read(fd, LENGTH_BYTES)
            n = header_bytes(first, size, where)
            data = numpy.empty(size - LENGTH_BYTES, numpy.uint8)
            _disk.read_exactly(fd, data.data, LENGTH_BYTES, path / MODEL)
        except StoreError as error:  # shrank while it was read
            raise ArgumentError(str(error)) from None
        finally:
            os.close(fd)
    config = read_config(config_text, str(path / CONFIG))
    layers, metadata = read_header(data[:n].tobytes(), data.nbytes - n, config, path)
    card, seal = read_metadata(metadata, where)
    packed = Packed(layers, data[n:], config, card)
    if seal is not None and packed.digest() != seal["digest"]:
        raise ArgumentError(
            f"{where}: contents with digest {seal['digest']} wanted as the file says, got others: "
            f"it or {CONFIG} was damaged or changed"
        )
    packed.check_finite(where)
    return packed


def read_config(text: bytes, where: str) -> dict[str, Any]:
    """adapter_config.json, checked."""
    config = parse_json(text, where)
    check_config(config, where)
    return config


def read_header(
    text: bytes, payload_bytes: int, config: Mapping[str, Any], path: Path
) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers in canonical order and the metadata of a safetensors header.

    Raises:
        ArgumentError: see ``read_adapter``.
    """
    where = str(path / MODEL)
    entries, metadata = parse_header(text, payload_bytes, where)
    scaling = Scaling(config, str(path / CONFIG))
    layers = []
    for name, (down, up) in layers_of(entries, where).items():
        rank, scale = scaling.of(name)
        (found, inputs), outputs = down.shape, up.shape[0]
        if found != rank:
            raise ArgumentError(
                f"{where}: {name}: rank {rank} wanted as {CONFIG} says, got {found}"
            )
        layers.append(Layer(name, rank, inputs, outputs, down.dtype, scale, down.start, up.start))
    return canonical(layers), metadata


def read_metadata(
    metadata: Mapping[str, str], where: str
) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The card, and what the seal says; None where another program wrote the file."""
    text = metadata.get(_CARD)
    card = {} if text is None else parse_json(text.encode(), f"{where}: card")
    if _SEAL not in metadata:
        return card, None
    seal = parse_json(metadata[_SEAL].encode(), f"{where}: seal")
    if set(seal) != {"digest", "card", "config"}:
        raise ArgumentError(f"{where}: seal: digest, card and config wanted, got {sorted(seal)}")
    if text is None or _hex(text.encode()) != seal["card"]:
        raise ArgumentError(f"{where}: the card is damaged")
    return card, seal


def is_sealed(config_text: bytes, seal: Mapping[str, str]) -> bool:
    """Is this the adapter_config.json that was written beside the seal?"""
    return _hex(config_text) == seal["config"]


def _open(path: Path) -> tuple[bytes, int]:
    """The bytes of adapter_config.json, and the open safetensors file."""
    if not path.is_dir():
        raise ArgumentError(f"path: a folder with {CONFIG} and {MODEL} wanted, got {path}")
    names = set(os.listdir(path))
    if CONFIG not in names:
        raise ArgumentError(f"{path}: {CONFIG} wanted, but there is none")
    if MODEL not in names:
        if _PICKLED in names:
            raise ArgumentError(
                f"{path}: {MODEL} wanted, got {_PICKLED}: a pickle can run any program, so it is "
                "not read; load it with PEFT where you trust it and save it again"
            )
        raise ArgumentError(f"{path}: {MODEL} wanted, but there is none")
    if (size := (path / CONFIG).stat().st_size) > _MAX_CONFIG_BYTES:
        raise ArgumentError(
            f"{path / CONFIG}: at most {_MAX_CONFIG_BYTES} bytes wanted, got {size}"
        )
    return (path / CONFIG).read_bytes(), os.open(path / MODEL, os.O_RDONLY | os.O_CLOEXEC)


def _entries(layers: Sequence[Layer]) -> list[Entry]:
    found = []
    for layer in layers:
        for which, shape, start, size in (
            ("A", (layer.rank, layer.inputs), layer.down_at, layer.down_bytes),
            ("B", (layer.outputs, layer.rank), layer.up_at, layer.up_bytes),
        ):
            name = f"{PREFIX}{layer.name}.lora_{which}.weight"
            found.append(Entry(name, layer.dtype, shape, start, start + size))
    return found


def _hex(data: bytes) -> str:
    return str(blake3(data).hexdigest())
