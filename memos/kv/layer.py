"""One attention layer of a MemosCache: packed blocks, exact sinks, an exact tail."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from memos.errors import ArgumentError
from memos.kernels.codec import Codec, check_head_dim
from memos.kernels.kv import DTYPES, PackedRows, pack_kv, unpack_kv
from memos.kernels.rerotation import Rerotation
from memos.kv._lanes import stacked
from memos.kv.device import home_of

Pair = tuple[torch.Tensor, torch.Tensor]


class MemosLayer(CacheLayerMixin):  # type: ignore[misc]
    """K and V of one attention layer with the past packed.

    Token by token: ``num_packed`` whole blocks of P tokens as packed bytes, then an exact tail.
    The first S tokens (attention sinks) are kept exact beside block 0. New tokens take part
    exactly in the forward pass that brings them; afterwards the oldest P tokens of a tail of at
    least ``recent + P`` tokens are packed. What is packed is never packed again, except the
    tokens of a block that ``crop`` cut through (``storable_tokens`` says so).

    With ``sliding_window`` W only the last W - 1 tokens are visible, as in transformers' own
    sliding layers, and they stay exact; the packed history behind them is kept, so that every
    crop is right and every block can be stored.

    Ownership: packed blocks, sinks and tail are never changed in place, so copies, rows and beams
    share them. ``update`` returns tensors that this layer does not change later. Packed blocks
    live where they are packed: beside the model where a GPU backend runs, else on the host
    (``home_of``). Inference only: no gradient flows into what is packed. Not thread-safe.

    Cost: ``update`` decodes every visible block once: it reads their packed bytes and writes
    the K and V that attention reads, nothing else.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        codec: Codec,
        block_tokens: int = 64,
        sink_tokens: int = 2,
        recent_tokens: int = 64,
        sliding_window: int | None = None,
    ) -> None:
        self.is_initialized = False
        self.codec = codec
        self.block_tokens = block_tokens
        self.sink_tokens = 0 if codec.lossless else sink_tokens
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.recent_tokens = max(recent_tokens, (sliding_window or 1) - 1)
        self._drop()

    def _drop(self) -> None:
        self.blocks: list[PackedRows] = []  # [B], each num_packed rows uint8 [1, E]
        self.sinks: Pair | None = None  # [B, H, S, D] each, once block 0 is packed
        self.tail: Pair | None = None  # [B, H, T, D] each
        self.num_decoded = 0  # the first tokens of the tail that came out of a packed block
        self.stale: frozenset[int] = frozenset()  # blocks that were packed from such tokens
        self.composed_from: int | None = None  # from this token on not what a prefill gives

    def __repr__(self) -> str:
        blocks = f"{self.num_packed} blocks + {self.tail_tokens} tokens"
        return f"MemosLayer({self.codec.name}, {blocks})"

    # What transformers asks.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        check_head_dim(self.codec, key_states.shape[-1], value_states.shape[-1])
        if key_states.dtype not in DTYPES or key_states.dtype != value_states.dtype:
            raise ArgumentError(
                f"key_states, value_states: one dtype of float32, float16, bfloat16 wanted, "
                f"got {key_states.dtype} and {value_states.dtype}"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.blocks = [PackedRows() for _ in range(self.batch_size)]
        self.tail = (key_states[:, :, :0].detach(), value_states[:, :, :0].detach())
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        """Append tokens and return all visible K and V, the new ones exact.

        Args:
            key_states, value_states: [B, H, q, D], batch, dtype and device of the cache.

        Returns:
            [B, H, visible + q, D] each; visible is the length so far, or at most W - 1.

        Raises:
            ArgumentError: another batch size or dtype than the cache holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._take_states(key_states)
        assert self.tail is not None
        first, packed = self._first_visible(), self.num_packed * self.block_tokens
        tail = (
            torch.cat([self.tail[0], key_states], dim=2),
            torch.cat([self.tail[1], value_states], dim=2),
        )
        seen = tail
        if first < packed:
            seen = self._decoded(first // self.block_tokens, room=tail[0].shape[2])
            for whole, part in zip(seen, tail, strict=True):
                whole[:, :, -part.shape[2] :] = part
            seen = _from(seen, first % self.block_tokens)
        elif first > packed:
            seen = _from(tail, first - packed)
        self.tail = tail
        self._pack_tail()
        return seen

    def _take_states(self, key_states: torch.Tensor) -> None:
        if key_states.shape[0] != self.batch_size:
            raise ArgumentError(
                f"key_states: batch {self.batch_size} wanted as in the cache, got "
                f"{key_states.shape[0]}; for num_return_sequences or num_beams = n begin with "
                "batch=n, or call batch_repeat_interleave(n) on a copy"
            )
        if key_states.dtype != self.dtype:
            raise ArgumentError(
                f"key_states: {self.dtype} wanted as in the cache, got {key_states.dtype}"
            )
        if key_states.device != self.device:  # restored before it was known where this layer runs
            self.device = key_states.device
            self.prefetch()

    def get_seq_length(self) -> int:
        return self.num_packed * self.block_tokens + self.tail_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible()
        return self.get_seq_length() - first + query_length, first

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys so far, decoded into fresh memory: [B, H, length, Dk]."""
        return self.dense()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """All values so far, decoded into fresh memory: [B, H, length, Dv]."""
        return self.dense()[1] if self.is_initialized else None

    def offload(self) -> None:
        """Move everything to the host."""
        self._map_exact(lambda x: x.to("cpu"))
        self._settle(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the exact parts back to the device; packed blocks follow when they are read."""
        if self.is_initialized:
            self._map_exact(lambda x: x.to(self.device))

    def reset(self) -> None:
        self._drop()
        if self.is_initialized:
            del self.batch_size
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, also out of the packed blocks.

        Whole blocks are dropped; a block that is cut is decoded into the tail. With no token left
        it is as new, and takes any batch.
        """
        if tokens_to_remove > 0:
            raise ArgumentError(
                f"tokens_to_remove: zero or a negative number wanted, got {tokens_to_remove}"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = self.get_seq_length() + tokens_to_remove
        if length <= 0:
            self.reset()
            return
        if self.composed_from is not None and length <= self.composed_from:
            self.composed_from = None
        packed = self.num_packed * self.block_tokens
        if length >= packed:
            assert self.tail is not None
            self.tail = _until(self.tail, length - packed)
            self.num_decoded = min(self.num_decoded, length - packed)
            return
        n, left = divmod(length, self.block_tokens)
        self.tail = _until(self._decoded(n, n + 1), left)
        self.blocks = [row[:n] for row in self.blocks]
        exact = self.codec.lossless or (n == 0 and left <= self.sink_tokens)
        self.num_decoded = 0 if exact else left
        self.stale = frozenset(i for i in self.stale if i < n)
        if n == 0:
            self.sinks = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select([b for b in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size)[indices.cpu()].tolist())

    # What MemosCache and the store ask.

    @property
    def num_packed(self) -> int:
        return len(self.blocks[0]) if self.blocks else 0

    @property
    def tail_tokens(self) -> int:
        return 0 if self.tail is None else int(self.tail[0].shape[2])

    def storable_tokens(self, first: int = 0) -> int:
        """Leading tokens whose stored form is first-hand from block ``first`` on: packed once, or
        exact in the tail. What a block cut by ``crop`` became is not: it lost twice; nor is what
        was composed."""
        later = [i for i in self.stale if i >= first]
        if self.num_decoded and self.num_packed >= first:
            later.append(self.num_packed)
        length = min(later) * self.block_tokens if later else self.get_seq_length()
        return length if self.composed_from is None else min(length, self.composed_from)

    def copy(self) -> MemosLayer:
        """A layer with the same tokens that shares every tensor; neither changes the other."""
        other = MemosLayer.__new__(MemosLayer)
        other.__dict__.update(self.__dict__)
        other.blocks = [row[:] for row in self.blocks]
        return other

    def load(self, blocks: PackedRows, sinks: Pair | None, tail: Pair) -> None:
        """Become one row of packed blocks (uint8 [1, E], on any device), exact sinks and a tail.

        Args:
            blocks: whole blocks from the first token on, as ``pack_kv`` wrote them.
            sinks:  [1, H, S, D] each; wanted when there is a block and the codec is lossy.
            tail:   [1, H, T, D] each, T >= 0, on the device of the model.
        """
        if blocks and self.sink_tokens and sinks is None:
            raise ArgumentError(f"sinks: {self.sink_tokens} exact tokens wanted, got none")
        self.reset()
        self.lazy_initialization(*tail)
        self.blocks = [blocks]
        self.sinks = sinks if blocks and self.sink_tokens else None
        self.tail = tail

    def dense(self, first: int = 0) -> Pair:
        """K and V of the tokens from ``first`` on in fresh memory, [B, H, length - first, D]."""
        assert self.tail is not None
        packed = self.num_packed * self.block_tokens
        if first >= packed:
            key, value = _from(self.tail, first - packed)
            return key.clone(), value.clone()
        whole = self._decoded(first // self.block_tokens, room=self.tail_tokens)
        for out, part in zip(whole, self.tail, strict=True):
            out[:, :, out.shape[2] - part.shape[2] :] = part
        return _from(whole, first % self.block_tokens)

    def write_to(
        self, key: torch.Tensor, value: torch.Tensor, rerotate: Rerotation | None = None
    ) -> list[slice]:
        """All tokens of one row into [1, H, T, D] tensors on the device where it decodes.

        Args:
            key, value: written; any strides with the last one 1.
            rerotate:   of the tokens of the packed blocks.

        Returns:
            Tokens whose keys are as they were given, for the caller to turn: sinks and tail.
        """
        assert self.tail is not None
        self._decode_to((key, value), 0, self.num_packed, rerotate)
        packed = self.num_packed * self.block_tokens
        exact = [slice(packed, packed + self.tail_tokens)]
        if packed and self.sinks is not None:
            exact.insert(0, slice(0, self.sink_tokens))
        for out, part in zip((key, value), self.tail, strict=True):
            out[:, :, exact[-1]] = part
        return [part for part in exact if part.stop != part.start]

    def exact_bytes(self) -> int:
        """Bytes of the exact parts: sinks and tail."""
        return sum(x.nbytes for pair in (self.sinks, self.tail) if pair for x in pair)

    # Inside.

    def _first_visible(self) -> int:
        if self.sliding_window is None:
            return 0
        return max(self.get_seq_length() - self.sliding_window + 1, 0)

    def _decoded(self, first: int, last: int | None = None, room: int = 0) -> Pair:
        """Blocks [first, last) decoded, then ``room`` tokens unwritten: fresh [B, H, .., D]."""
        assert self.tail is not None
        last = self.num_packed if last is None else last
        P, H = self.block_tokens, self.tail[0].shape[1]
        T = (last - first) * P
        home = home_of(self.device)
        stays = home == self.device
        host = tuple(
            torch.empty(
                (self.batch_size, H, T + (room if stays else 0), x.shape[3]),
                dtype=self.dtype,
                device=home,
            )
            for x in self.tail
        )
        self._decode_to((host[0], host[1]), first, last)
        if stays:
            return host[0], host[1]
        shapes = [(*x.shape[:2], T + room, x.shape[3]) for x in host]
        key, value = (torch.empty(s, dtype=self.dtype, device=self.device) for s in shapes)
        key[:, :, :T], value[:, :, :T] = host
        return key, value

    def _decode_to(
        self, out: Pair, first: int, last: int, rerotate: Rerotation | None = None
    ) -> None:
        """Blocks [first, last) into the first tokens of [B, H, .., D] tensors at home."""
        if first == last:
            return
        P, home = self.block_tokens, out[0].device
        self._settle(home)
        rows = functools.reduce(operator.add, (row[first:last] for row in self.blocks))
        ids = torch.arange(0, (last - first) * P, P, device=home)
        if self.batch_size > 1:
            row_tokens = out[0].stride(0) // out[0].stride(2)
            ids = (torch.arange(self.batch_size, device=home)[:, None] * row_tokens + ids).flatten()
        windows = [[_windows(x, P)] for x in out]
        unpack_kv(windows[0], windows[1], ids, rows, self.codec, rerotate)
        if first == 0 and self.sinks is not None:
            for x, sink in zip(out, self.sinks, strict=True):
                x[:, :, : self.sink_tokens] = sink

    def _pack_tail(self) -> None:
        assert self.tail is not None
        P, first = self.block_tokens, self.num_packed
        n = (self.tail_tokens - self.recent_tokens) // P
        if n < 1:
            return
        old = _until(self.tail, n * P)
        if first == 0 and self.sink_tokens:
            key, value = _until(old, self.sink_tokens)
            self.sinks = (key.clone(), value.clone())
        packed = encode_blocks([*old[0]], [*old[1]], P, self.codec)
        self._settle(packed.device)
        for b, row in enumerate(self.blocks):
            row.extend(packed[i, b : b + 1] for i in range(n))
        key, value = _from(self.tail, n * P)
        self.tail = (key.clone(), value.clone())  # a view would keep the packed tokens alive
        if self.num_decoded:
            self.stale |= {first}
        self.num_decoded = 0

    def _select(self, rows: list[int]) -> None:
        if not rows:
            raise ArgumentError("rows: at least one row of the batch wanted, got none")
        self.blocks = [self.blocks[b][:] for b in rows]
        index = torch.tensor(rows, device=self.device)
        self._map_exact(lambda x: x.index_select(0, index))
        self.batch_size = len(rows)

    def _settle(self, home: torch.device) -> None:
        """Have the packed blocks there."""
        for b, rows in enumerate(self.blocks):
            if rows.device not in (None, home):
                self.blocks[b] = PackedRows(stacked(rows, home).unbind(0))

    def _map_exact(self, change: Any) -> None:
        if self.tail is not None:
            self.tail = (change(self.tail[0]), change(self.tail[1]))
        if self.sinks is not None:
            self.sinks = (change(self.sinks[0]), change(self.sinks[1]))


def encode_blocks(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], P: int, codec: Codec
) -> torch.Tensor:
    """Pack whole blocks: ``out[n, l] = pack_kv`` of tokens [n * P, (n + 1) * P) of tensor l.

    Args:
        keys, values: L tensors [H, N * P, D] of one device; copied unless the last stride is 1.

    Returns:
        [N, L, E] uint8 at home (``home_of``).
    """
    n, home = keys[0].shape[1] // P, home_of(keys[0].device)
    K, V = ([_blocks(x, n, P, home) for x in part] for part in (keys, values))
    return pack_kv(K, V, torch.arange(n, device=home), codec)


def _blocks(x: torch.Tensor, n: int, P: int, home: torch.device) -> torch.Tensor:
    """[H, n * P, D] seen as [n, P, H, D] on a device."""
    x = x.detach().to(home)
    if x.stride(2) != 1:
        x = x.contiguous()
    H, _, D = x.shape
    heads, tokens, _ = x.stride()
    return x.as_strided((n, P, H, D), (P * tokens, tokens, heads, 1))


def _windows(x: torch.Tensor, P: int) -> torch.Tensor:
    """[B, H, S, D] seen as [N, P, H, D], where block ``b * n + s`` is the P tokens of row b that
    begin at s, and a row is n tokens from the next one: a whole number where B > 1. Blocks
    overlap: only an addressing scheme."""
    B, H, S, D = x.shape
    row, head, token, _ = x.stride()
    return x.as_strided(((B - 1) * (row // token) + S - P + 1, P, H, D), (token, token, head, 1))


def _from(pair: Pair, first: int) -> Pair:
    return (pair[0][:, :, first:], pair[1][:, :, first:]) if first else pair


def _until(pair: Pair, last: int) -> Pair:
    return pair[0][:, :, :last], pair[1][:, :, :last]
