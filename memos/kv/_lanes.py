"""The ways between host and device: pinned memory, copies on streams of their own, events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Lanes:
    """One way in and one way out, of up to ``num_bytes`` at once each; on the CPU, plain copies.

    What a caller queues on its current stream after ``bring`` sees what was brought, and what it
    queued before ``send`` is in what is sent. Uses of one memory on several streams are ordered by
    ``wait_for_writes`` and ``read``. Not thread-safe.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.device, self.num_bytes = device, num_bytes
        self.is_cuda = device.type == "cuda"
        self._in: torch.Tensor | None = None  # on the device
        self._in_host: torch.Tensor | None = None
        self._out: torch.Tensor | None = None  # the caller's, until it has arrived
        self._out_host: torch.Tensor | None = None
        self._streams: Any = None
        self._brought: Any = None  # events
        self._sent: Any = None
        self._written: Any = None
        self._reads: list[Any] = []

    @property
    def device_bytes(self) -> int:
        """Of the device's memory that is in use here now."""
        return sum(x.nbytes for x in (self._in, self._out) if x is not None)

    def numbers(self, values: Sequence[int]) -> torch.Tensor:
        """int64 on the device, sent without a wait."""
        self.begin()
        host = torch.tensor(values, dtype=torch.int64)
        return host.pin_memory().to(self.device, non_blocking=True) if self.is_cuda else host

    def bring(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the host on the device, until ``bring`` is called again."""
        self.begin()
        if self._in is None or self._in_host is None:
            self._in = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)
            self._in_host = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=self.is_cuda)
        size = rows.numel()
        there = self._in[:size].view(rows.shape)
        if not self.is_cuda:
            there.copy_(rows)
            return there
        if self._brought is not None:
            self._brought.synchronize()  # the pinned memory is read
        host = self._in_host[:size].view(rows.shape)
        host.copy_(rows)
        copies, current = self._streams[0], torch.cuda.current_stream(self.device)
        copies.wait_stream(current)  # what was brought before may still be read
        with torch.cuda.stream(copies):
            there.copy_(host, non_blocking=True)
            self._brought = copies.record_event()
        current.wait_event(self._brought)
        return there

    def send(self, rows: torch.Tensor) -> None:
        """Begin to copy rows of the device to the host: ``arrived`` returns them."""
        self.begin()
        self._out = rows
        if self._out_host is None:
            self._out_host = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=self.is_cuda)
        host = self._out_host[: rows.numel()].view(rows.shape)
        if not self.is_cuda:
            host.copy_(rows)
            return
        copies = self._streams[1]
        copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(copies):
            host.copy_(rows, non_blocking=True)
            self._sent = copies.record_event()
        rows.record_stream(copies)

    def arrived(self) -> torch.Tensor:
        """What was sent, in memory of its own; waits for it."""
        assert self._out is not None
        assert self._out_host is not None
        if self.is_cuda:
            self._sent.synchronize()
        found = self._out_host[: self._out.numel()].view(self._out.shape).clone()
        self._out = None
        return found

    def wait_for_writes(self) -> None:
        """What the current stream does next comes after what other streams have written here."""
        if self.is_cuda and self._written is not None:
            torch.cuda.current_stream(self.device).wait_event(self._written)

    def read(self) -> None:
        """The current stream reads or writes here: what others write next waits for it."""
        if self.is_cuda:
            self._reads.append(torch.cuda.current_stream(self.device).record_event())

    def begin(self) -> None:
        """What the current stream does next comes after all uses so far."""
        if not self.is_cuda:
            return
        if self._streams is None:
            self._streams = [torch.cuda.Stream(self.device) for _ in range(2)]
        current = torch.cuda.current_stream(self.device)
        self.wait_for_writes()
        for event in self._reads:
            current.wait_event(event)
        self._reads.clear()

    def wrote(self) -> None:
        """The current stream has written what others may read next."""
        if self.is_cuda:
            self._written = torch.cuda.current_stream(self.device).record_event()


def stacked(rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Tensors of one shape as one on ``device``, in fresh memory: through pinned memory in one
    copy where they change sides. On the host when this returns; on a GPU for what the current
    stream does next."""
    here = rows[0].device
    if here.type != "cuda" and device.type == "cuda":
        shape = (len(rows), *rows[0].shape)
        host = torch.empty(shape, dtype=rows[0].dtype, pin_memory=True)
        torch.stack(list(rows), out=host)
        return host.to(device, non_blocking=True)
    whole = torch.stack(list(rows))
    if here.type != "cuda" or device.type == "cuda":
        return whole.to(device)
    host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
    host.copy_(whole, non_blocking=True)
    torch.cuda.current_stream(here).synchronize()
    return host.clone()  # pinned memory is for the way
