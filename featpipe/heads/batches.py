"""Rows to train on, in memory or not, as shuffled batches of tensors."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.heads.moments import RowSource

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "Rows"]

KEPT_BYTES = 256 << 20  # a source of no more is read once; of a larger one as much is in memory, in two buffers
BLOCK_BYTES = 256 << 10
FORGOTTEN_AFTER_BLOCKS = 256
EVALUATION_ROWS = 4096


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
        for first, last, found in self._blocks(range(self._block_count)):
            whole[first:last] = found
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

    def _blocks(self, blocks: Any) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """The rows of some blocks, with where they lie among `numbers`."""
        for count, block in enumerate(blocks):
            if count % FORGOTTEN_AFTER_BLOCKS == 0:
                _forget_pages(self.source)
            start = block * self._block_rows
            first, last = np.searchsorted(self.numbers, (start, start + self._block_rows))
            if first == last:
                continue
            chosen = self.numbers[first:last]
            found = np.asarray(self.source[chosen[0] : chosen[-1] + 1])
            yield first, last, found if len(found) == len(chosen) else found[chosen - chosen[0]]
        _forget_pages(self.source)

    def _batch(self, buffer: _Buffer, chosen: torch.Tensor) -> Batch:
        numbers = buffer.numbers.index_select(0, chosen)
        X = buffer.X.index_select(0, buffer.rows.index_select(0, chosen)).to(self.dtype)
        if self._shift is not None:
            X = X.sub_(self._shift)
        if self._scale is not None:
            X = X.div_(self._scale)
        Y = self._Y.index_select(0, numbers)
        return Batch(X, Y if Y.ndim == 1 else Y.to(self.dtype), self._weights.index_select(0, numbers))

    def in_order(self) -> Iterator[Batch]:
        """All rows, a few thousand at a time."""
        import torch

        if self._whole is not None:
            for chosen in torch.arange(len(self)).split(EVALUATION_ROWS):
                yield self._batch(self._whole, chosen)
            return
        for buffer in self._read_ahead(np.arange(self._block_count)):
            for chosen in torch.arange(len(buffer.rows)).split(EVALUATION_ROWS):
                yield self._batch(buffer, chosen)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass over n rows: ⌈n / size⌉ batches, all full but the last."""
        import torch

        left: Batch | None = None
        drawn = 0.0
        buffers = (
            [self._whole]
            if self._whole
            else self._read_ahead(torch.randperm(self._block_count, generator=generator).numpy())
        )
        for buffer in buffers:
            order, drawn = self._order(buffer, drawn, generator)
            if left is not None:
                missing = size - len(left)
                left, order = left.join(self._batch(buffer, order[:missing])), order[missing:]
                if len(left) == size:
                    yield left
                    left = None
            for chosen in order.split(size) if len(order) else ():
                if len(chosen) == size:
                    yield self._batch(buffer, chosen)
                else:
                    left = self._batch(buffer, chosen)
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

    def _read_ahead(self, blocks: NDArray[np.intp]) -> Iterator[_Buffer]:
        """Buffers of these blocks; while one is used, the next is read."""
        each = max(KEPT_BYTES // 2 // (self._block_rows * self._row_bytes), 1)
        groups = [blocks[start : start + each] for start in range(0, len(blocks), each)]
        if not self._slots:
            shape = (each * self._block_rows, self.width)
            self._slots = [np.empty(shape, self.source.dtype) for _ in groups[:2]]
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, groups[0], self._slots[0])
            for number in range(1, len(groups) + 1):
                buffer = coming.result()
                if number < len(groups):
                    coming = reader.submit(self._read, groups[number], self._slots[number % 2])
                yield buffer

    def _read(self, blocks: NDArray[np.intp], slot: NDArray[Any]) -> _Buffer:
        import torch

        end, numbers = 0, []
        for first, last, found in self._blocks(np.sort(blocks)):
            slot[end : end + len(found)] = found
            end += len(found)
            numbers.append(np.arange(first, last))
        known = np.concatenate(numbers) if numbers else np.empty(0, np.intp)
        return _Buffer(torch.from_numpy(slot[:end]), torch.arange(end), torch.from_numpy(known))

    def variance(self) -> torch.Tensor:
        """Of each column of targets that are numbers, by weight, shape (k,)."""
        import torch

        Y, weights = self._Y.to(torch.float64), self._weights.to(torch.float64)[:, None]
        mean = (Y * weights).sum(dim=0) / weights.sum()
        variance = ((Y - mean).square() * weights).sum(dim=0) / weights.sum()
        return torch.where(variance > 0, variance, 1.0).to(self.dtype)

    def unreadable(self) -> int | None:
        """The first row of the source with a NaN or an infinite feature."""
        for first, _, found in self._blocks(range(self._block_count)):
            bad = ~np.isfinite(found).all(axis=1)
            if bad.any():
                return int(self.numbers[first + bad.argmax()])
        return None


def _is_mapped(source: RowSource) -> bool:
    """Whether an array may be the pages of a file: those of a cache are not to be written to."""
    return isinstance(source, np.memmap) or (isinstance(source, np.ndarray) and not source.flags.writeable)


def _forget_pages(source: RowSource) -> None:
    """Pages of a file that were read count as this process's memory until they are let go."""
    if isinstance(source, np.memmap) and source.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        source._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
