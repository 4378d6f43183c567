"""Rows to train on, in memory or not, as shuffled batches of tensors."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.heads.moments import RowSource, read_into
from featpipe.workers import ahead

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "Rows"]

KEPT_BYTES = 256 << 20  # a source of no more is read once; of a larger one as much is in memory, in two buffers
BLOCK_BYTES = 256 << 10
FORGOTTEN_AFTER_RUNS = 256
RUNS_AHEAD = 16  # that the system is told of
EVALUATION_ROWS = 4096
NUMBERS_AHEAD = 1 << 21  # of a large source, made ready for the next steps by another thread
NUMBERS_AT_A_TIME = 1 << 18  # that several operations in turn find in a core's cache


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows as tensors: X (b, d), Y (b,) or (b, k), weights (b,) or (b, k)."""

    X: torch.Tensor
    Y: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.X)

    def take(self, rows: torch.Tensor) -> Batch:
        return Batch(*(column.index_select(0, rows) for column in (self.X, self.Y, self.weights)))

    def split(self, size: int) -> Iterator[Batch]:
        """Views of so many rows each, the last of those that are left."""
        for some in zip(*(column.split(size) for column in (self.X, self.Y, self.weights)), strict=True):
            yield Batch(*some)

    def join(self, other: Batch) -> Batch:
        import torch

        pairs = ((self.X, other.X), (self.Y, other.Y), (self.weights, other.weights))
        return Batch(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True, eq=False)
class _Buffer:
    """Rows in memory as they are stored, and which of them are trained on: `rows` of X, `numbers` of Y."""

    X: torch.Tensor
    rows: torch.Tensor
    numbers: torch.Tensor


class Rows:
    """Rows with their targets.

    Parameters
    ----------
    source : RowSource of shape (N, d)
        float16 and float32 are trained on in float32, float64 in float64.
    Y : ndarray of shape (n,) or (n, k)
        Class codes, or 0 and 1 for each label, or numbers.
    weights : ndarray of shape (n,) or (n, k), float64
        Their ratios alone count.
    numbers : ndarray of shape (n,), int, optional
        Which rows of the source, ascending; all if not given.
    center, scale : ndarray of shape (d,), optional
        Rows are read as (x - center) / scale.
    odds : ndarray of shape (n,), optional
        A pass draws n rows in proportion to these, with replacement, instead of each row once.

    Notes
    -----
    A writable array, and a source that fits into 256 MiB, is in memory, and each pass goes over its rows in a random
    order. A larger source is cut into blocks of 256 KiB of contiguous rows. In each pass they come in random order, as
    many at a time as fill a buffer of 128 MiB, in which rows are in random order; so a batch has rows of up to 512
    blocks. The next buffer is read while one is trained on. The last rows of a buffer, if they fill no batch, are the
    first of the next.
    """

    def __init__(
        self,
        source: RowSource,
        Y: NDArray[Any],
        weights: NDArray[np.float64],
        *,
        numbers: NDArray[np.intp] | None = None,
        center: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        odds: NDArray[np.float64] | None = None,
    ) -> None:
        import torch

        self.source = source
        self.width = source.shape[1]
        self.dtype = torch.float64 if source.dtype == np.float64 else torch.float32
        self.numbers = np.arange(len(Y)) if numbers is None else numbers
        self._Y = torch.from_numpy(np.require(Y, requirements=["C", "W"]))
        self._weights = torch.from_numpy(weights / weights.mean()).to(self.dtype)
        self._shift = None if center is None else torch.as_tensor(np.array(center), dtype=self.dtype)
        self._scale = None if scale is None else torch.as_tensor(np.array(scale), dtype=self.dtype)
        self._odds = None if odds is None else torch.from_numpy(odds / odds.mean())
        self._slots: list[NDArray[Any]] = []
        self._places: list[torch.Tensor] = []
        self._whole = self._in_memory()

    def __len__(self) -> int:
        return len(self._Y)

    def _in_memory(self) -> _Buffer | None:
        import torch

        whole = self.source
        if _is_mapped(whole) or not (isinstance(whole, np.ndarray) and whole.flags.c_contiguous):
            if len(self.numbers) * self._row_bytes > KEPT_BYTES:
                return None
            whole, rows = self._gathered(), torch.arange(len(self))
        else:
            rows = torch.from_numpy(self.numbers)
        return _Buffer(torch.from_numpy(whole), rows, torch.arange(len(self)))

    def _gathered(self) -> NDArray[Any]:
        """A copy of all rows, read block by block."""
        whole = np.empty((len(self), self.width), self.source.dtype)
        self._fill(whole, self._runs(range(self._block_count)))
        return whole

    @property
    def _row_bytes(self) -> int:
        return self.width * self.source.dtype.itemsize

    @property
    def _block_rows(self) -> int:
        return max(BLOCK_BYTES // self._row_bytes, 1)

    @property
    def _block_count(self) -> int:
        return -(-self.source.shape[0] // self._block_rows)

    def _runs(self, blocks: Iterable[int]) -> list[tuple[slice, slice]]:
        """Where the rows of blocks lie among `numbers`; and in the source, with what is left out between them."""
        found = []
        for block in blocks:
            start = block * self._block_rows
            first, last = np.searchsorted(self.numbers, (start, start + self._block_rows))
            if first < last:
                found.append((slice(first, last), slice(self.numbers[first], self.numbers[last - 1] + 1)))
        return found

    def _fill(self, out: NDArray[Any], runs: Sequence[tuple[slice, slice]]) -> None:
        """Read rows, one run after the other; the system is told of some that come next."""
        end = 0
        expect = getattr(self.source, "expect", None)
        for count, (places, rows) in enumerate(runs):
            if expect is not None:
                for _, later in runs[count + RUNS_AHEAD : count + RUNS_AHEAD + 1] if count else runs[: RUNS_AHEAD + 1]:
                    expect(later)
            if count % FORGOTTEN_AFTER_RUNS == 0:
                _forget_pages(self.source)
            start, end = end, end + places.stop - places.start
            self._copy(out[start:end], places, rows)
        _forget_pages(self.source)

    def _copy(self, out: NDArray[Any], places: slice, rows: slice) -> None:
        if len(out) < rows.stop - rows.start:
            out[...] = np.asarray(self.source[rows])[self.numbers[places] - rows.start]
        else:
            read_into(self.source, out, rows)

    def _batch(self, buffer: _Buffer, chosen: torch.Tensor, out: torch.Tensor | None = None) -> Batch:
        """Rows of a buffer; their features at the start of ``out``, if it is given."""
        import torch

        numbers = buffer.numbers.index_select(0, chosen)
        places = buffer.rows.index_select(0, chosen)
        X = torch.empty((len(chosen), self.width), dtype=self.dtype) if out is None else out[: len(chosen)]
        each = max(NUMBERS_AT_A_TIME // self.width, 1)
        stored = None if buffer.X.dtype == self.dtype else torch.empty((each, self.width), dtype=buffer.X.dtype)
        for some, part in zip(places.split(each), X.split(each), strict=True):
            if stored is None:
                torch.index_select(buffer.X, 0, some, out=part)
            else:
                part.copy_(torch.index_select(buffer.X, 0, some, out=stored[: len(some)]))
            if self._shift is not None:
                part.sub_(self._shift)
            if self._scale is not None:
                part.div_(self._scale)
        Y = self._Y.index_select(0, numbers)
        return Batch(X, Y if Y.ndim == 1 else Y.to(self.dtype), self._weights.index_select(0, numbers))

    def _batches(self, buffer: _Buffer, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """Rows of a buffer in some order, so many at a time.

        Another thread makes those of a large source ready, always in the same two places: memory that is new each time
        has to be cleared by the system, and is in no core's cache.
        """
        if buffer is self._whole:
            for chosen in order.split(size):
                yield self._batch(buffer, chosen)
            return
        several = size * max(NUMBERS_AHEAD // (size * self.width), 1)
        places = self._two_places(min(several, len(order)))
        chosen = order.split(several)
        ready = ahead(lambda number: self._batch(buffer, chosen[number], places[number % 2]), range(len(chosen)))
        for large in ready:
            yield from large.split(size)

    def _two_places(self, rows: int) -> list[torch.Tensor]:
        import torch

        if not self._places or len(self._places[0]) < rows:
            self._places = [torch.empty((rows, self.width), dtype=self.dtype) for _ in range(2)]
        return self._places

    def in_order(self) -> Iterator[Batch]:
        """All rows, a few thousand at a time; a batch holds until the next is asked for."""
        import torch

        for buffer in self._buffers(np.arange(self._block_count)):
            yield from self._batches(buffer, torch.arange(len(buffer.rows)), EVALUATION_ROWS)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass over n rows: ⌈n / size⌉ batches, all full but the last, of which each holds until the next."""
        import torch

        left: Batch | None = None
        drawn = 0.0
        blocks = np.empty(0, np.intp) if self._whole else torch.randperm(self._block_count, generator=generator).numpy()
        for buffer in self._buffers(blocks):
            order, drawn = self._order(buffer, drawn, generator)
            if left is not None:
                missing = size - len(left)
                left, order = left.join(self._batch(buffer, order[:missing])), order[missing:]
                if len(left) == size:
                    yield left
                    left = None
            for batch in self._batches(buffer, order, size) if len(order) else ():
                if len(batch) == size:
                    yield batch
                else:
                    left = batch
        if left is not None:
            yield left

    def _order(self, buffer: _Buffer, drawn: float, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        """Rows of a buffer in the order of a pass, and the sum of the odds so far."""
        import torch

        if self._odds is None:
            return torch.randperm(len(buffer.rows), generator=generator), 0.0
        ends = self._odds.index_select(0, buffer.numbers).cumsum(0)
        mass = ends[-1].item() if len(ends) else 0.0
        # Rounded so that the draws of all buffers are n.
        count = round(drawn + mass) - round(drawn)
        places = torch.rand(count, dtype=ends.dtype, generator=generator).mul_(mass)
        return torch.searchsorted(ends, places, right=True).clamp_(max=max(len(ends) - 1, 0)), drawn + mass

    def _buffers(self, blocks: NDArray[np.intp]) -> Iterator[_Buffer]:
        """What is in memory; or the rows of these blocks, of which the next are read while some are used."""
        if self._whole is not None:
            yield self._whole
            return
        each = max(KEPT_BYTES // 2 // (self._block_rows * self._row_bytes), 1)
        groups = [blocks[start : start + each] for start in range(0, len(blocks), each)]
        if not self._slots:
            shape = (each * self._block_rows, self.width)
            self._slots = [np.empty(shape, self.source.dtype) for _ in groups[:2]]
        yield from ahead(lambda number: self._read(groups[number], self._slots[number % 2]), range(len(groups)))

    def _read(self, blocks: NDArray[np.intp], slot: NDArray[Any]) -> _Buffer:
        import torch

        runs = self._runs(np.sort(blocks))
        known = np.concatenate([np.empty(0, np.intp), *(np.arange(places.start, places.stop) for places, _ in runs)])
        self._fill(slot[: len(known)], runs)
        return _Buffer(torch.from_numpy(slot[: len(known)]), torch.arange(len(known)), torch.from_numpy(known))

    def variance(self) -> torch.Tensor:
        """Of each column of targets that are numbers, by weight, shape (k,)."""
        import torch

        Y, weights = self._Y.to(torch.float64), self._weights.to(torch.float64)[:, None]
        mean = (Y * weights).sum(dim=0) / weights.sum()
        variance = ((Y - mean).square() * weights).sum(dim=0) / weights.sum()
        return torch.where(variance > 0, variance, 1.0).to(self.dtype)

    def unreadable(self) -> int | None:
        """The first row of the source with a NaN or an infinite feature."""
        for places, rows in self._runs(range(self._block_count)):
            found = np.empty((places.stop - places.start, self.width), self.source.dtype)
            self._copy(found, places, rows)
            bad = ~np.isfinite(found).all(axis=1)
            if bad.any():
                return int(self.numbers[places.start + bad.argmax()])
        return None


def _is_mapped(source: RowSource) -> bool:
    """Whether an array may be the pages of a file: those of a cache are not to be written to."""
    return isinstance(source, np.memmap) or (isinstance(source, np.ndarray) and not source.flags.writeable)


def _forget_pages(source: RowSource) -> None:
    """Pages of a file that were read count as this process's memory until they are let go."""
    if isinstance(source, np.memmap) and source.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        source._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
