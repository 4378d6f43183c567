"""Shuffled batches of tensors from rows in memory or on disk."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.heads.closed_form.moments import RowSource, read_rows_into
from featpipe.runtime import prefetch

if TYPE_CHECKING:
    import torch

MAX_IN_MEMORY_BYTES = 256 << 20  # larger sources are read in each pass, into two buffers of this size together
BLOCK_BYTES = 256 << 10
RUNS_BETWEEN_PAGE_RELEASES = 256
PREFETCHED_RUNS = 16  # announced to the operating system
EVALUATION_BATCH_SIZE = 4096
PREFETCHED_VALUES = 1 << 21  # prepared by another thread, for sources on disk
VALUES_PER_CHUNK = 1 << 18  # so that consecutive operations find a chunk in a core's cache


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch as tensors: X (b, d), Y (b,) or (b, k), weights (b,) or (b, k)."""

    X: torch.Tensor
    Y: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.X)

    def take(self, rows: torch.Tensor) -> TrainingBatch:
        return TrainingBatch(*(column.index_select(0, rows) for column in (self.X, self.Y, self.weights)))

    def split(self, size: int) -> Iterator[TrainingBatch]:
        """Views of ``size`` rows each; the last may be shorter."""
        for columns in zip(*(column.split(size) for column in (self.X, self.Y, self.weights)), strict=True):
            yield TrainingBatch(*columns)

    def concatenate(self, other: TrainingBatch) -> TrainingBatch:
        import torch

        pairs = ((self.X, other.X), (self.Y, other.Y), (self.weights, other.weights))
        return TrainingBatch(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True, eq=False)
class _RowBuffer:
    """Rows in memory in the stored type; row ``buffer_rows[i]`` of X has the target of row ``target_rows[i]``."""

    X: torch.Tensor
    buffer_rows: torch.Tensor
    target_rows: torch.Tensor


class BatchSource:
    """Rows with their targets, as batches.

    Parameters
    ----------
    source : RowSource of shape (N, d)
        float16 and float32 are trained in float32, float64 in float64.
    Y : ndarray of shape (n,) or (n, k)
        Class codes, or 0 and 1 for each label, or numbers.
    weights : ndarray of shape (n,) or (n, k), float64
        Only their ratios matter.
    row_indices : ndarray of shape (n,), int, optional
        Rows of the source to use, ascending; by default all.
    center, scale : ndarray of shape (d,), optional
        Rows are transformed to (x - center) / scale.
    sampling_weights : ndarray of shape (n,), optional
        A pass draws n rows with these probabilities (up to a factor) with replacement, instead of each row once.

    Notes
    -----
    Writable arrays, and sources of up to 256 MiB, are held in memory and shuffled in each pass. A larger source is
    split into blocks of 256 KiB of contiguous rows. Each pass reads the blocks in random order into a buffer of 128 MiB
    and shuffles the rows of the buffer, so a batch mixes rows of up to 512 blocks. The next buffer is read while one is
    in use. Rows that do not fill a batch are carried over to the next buffer.
    """

    def __init__(
        self,
        source: RowSource,
        Y: NDArray[Any],
        weights: NDArray[np.float64],
        *,
        row_indices: NDArray[np.intp] | None = None,
        center: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        sampling_weights: NDArray[np.float64] | None = None,
    ) -> None:
        import torch

        self.source = source
        self.width = source.shape[1]
        self.dtype = torch.float64 if source.dtype == np.float64 else torch.float32
        self.row_indices = np.arange(len(Y)) if row_indices is None else row_indices
        self._Y = torch.from_numpy(np.require(Y, requirements=["C", "W"]))
        self._weights = torch.from_numpy(weights / weights.mean()).to(self.dtype)
        self._center = None if center is None else torch.as_tensor(np.array(center), dtype=self.dtype)
        self._scale = None if scale is None else torch.as_tensor(np.array(scale), dtype=self.dtype)
        self._sampling_weights = (
            None if sampling_weights is None else torch.from_numpy(sampling_weights / sampling_weights.mean())
        )
        self._read_buffers: list[NDArray[Any]] = []
        self._output_buffers: list[torch.Tensor] = []
        self._in_memory_buffer = self._load_in_memory()

    def __len__(self) -> int:
        return len(self._Y)

    def _load_in_memory(self) -> _RowBuffer | None:
        import torch

        data = self.source
        if _is_mapped(data) or not (isinstance(data, np.ndarray) and data.flags.c_contiguous):
            if len(self.row_indices) * self._row_bytes > MAX_IN_MEMORY_BYTES:
                return None
            data, buffer_rows = self._read_all(), torch.arange(len(self))
        else:
            buffer_rows = torch.from_numpy(self.row_indices)
        return _RowBuffer(torch.from_numpy(data), buffer_rows, torch.arange(len(self)))

    def _read_all(self) -> NDArray[Any]:
        data = np.empty((len(self), self.width), self.source.dtype)
        self._read_runs(data, self._find_runs(range(self._block_count)))
        return data

    @property
    def _row_bytes(self) -> int:
        return self.width * self.source.dtype.itemsize

    @property
    def _block_rows(self) -> int:
        return max(BLOCK_BYTES // self._row_bytes, 1)

    @property
    def _block_count(self) -> int:
        return -(-self.source.shape[0] // self._block_rows)

    def _find_runs(self, blocks: Iterable[int]) -> list[tuple[slice, slice]]:
        """For each block the slice of ``row_indices`` and the slice of the source that spans these rows."""
        runs = []
        for block in blocks:
            start = block * self._block_rows
            first, last = np.searchsorted(self.row_indices, (start, start + self._block_rows))
            if first < last:
                runs.append((slice(first, last), slice(self.row_indices[first], self.row_indices[last - 1] + 1)))
        return runs

    def _read_runs(self, out: NDArray[Any], runs: Sequence[tuple[slice, slice]]) -> None:
        """Read runs one after the other, announcing the next ones to the operating system."""
        end = 0
        expect = getattr(self.source, "expect", None)
        for run_index, (positions, source_rows) in enumerate(runs):
            if expect is not None:
                for _, next_rows in (
                    runs[run_index + PREFETCHED_RUNS : run_index + PREFETCHED_RUNS + 1]
                    if run_index
                    else runs[: PREFETCHED_RUNS + 1]
                ):
                    expect(next_rows)
            if run_index % RUNS_BETWEEN_PAGE_RELEASES == 0:
                _release_pages(self.source)
            start, end = end, end + positions.stop - positions.start
            self._read_run(out[start:end], positions, source_rows)
        _release_pages(self.source)

    def _read_run(self, out: NDArray[Any], positions: slice, source_rows: slice) -> None:
        if len(out) < source_rows.stop - source_rows.start:
            out[...] = np.asarray(self.source[source_rows])[self.row_indices[positions] - source_rows.start]
        else:
            read_rows_into(self.source, out, source_rows)

    def _make_batch(self, buffer: _RowBuffer, selected: torch.Tensor, out: torch.Tensor | None = None) -> TrainingBatch:
        """A batch of selected rows of a buffer, with the features in ``out`` if given."""
        import torch

        target_rows = buffer.target_rows.index_select(0, selected)
        buffer_rows = buffer.buffer_rows.index_select(0, selected)
        X = torch.empty((len(selected), self.width), dtype=self.dtype) if out is None else out[: len(selected)]
        chunk_size = max(VALUES_PER_CHUNK // self.width, 1)
        scratch = None if buffer.X.dtype == self.dtype else torch.empty((chunk_size, self.width), dtype=buffer.X.dtype)
        for chunk_rows, chunk in zip(buffer_rows.split(chunk_size), X.split(chunk_size), strict=True):
            if scratch is None:
                torch.index_select(buffer.X, 0, chunk_rows, out=chunk)
            else:
                chunk.copy_(torch.index_select(buffer.X, 0, chunk_rows, out=scratch[: len(chunk_rows)]))
            if self._center is not None:
                chunk.sub_(self._center)
            if self._scale is not None:
                chunk.div_(self._scale)
        Y = self._Y.index_select(0, target_rows)
        return TrainingBatch(X, Y if Y.ndim == 1 else Y.to(self.dtype), self._weights.index_select(0, target_rows))

    def _iter_batches(self, buffer: _RowBuffer, order: torch.Tensor, size: int) -> Iterator[TrainingBatch]:
        """Batches of ``size`` rows of a buffer in the given order.

        For sources on disk another thread prepares them in two reused buffers: the system has to zero newly allocated
        memory, and it is in no core's cache.
        """
        if buffer is self._in_memory_buffer:
            for selected in order.split(size):
                yield self._make_batch(buffer, selected)
            return
        rows_ahead = size * max(PREFETCHED_VALUES // (size * self.width), 1)
        outputs = self._get_output_buffers(min(rows_ahead, len(order)))
        selected = order.split(rows_ahead)
        large_batches = prefetch(
            lambda index: self._make_batch(buffer, selected[index], outputs[index % 2]), range(len(selected))
        )
        for large_batch in large_batches:
            yield from large_batch.split(size)

    def _get_output_buffers(self, rows: int) -> list[torch.Tensor]:
        import torch

        if not self._output_buffers or len(self._output_buffers[0]) < rows:
            self._output_buffers = [torch.empty((rows, self.width), dtype=self.dtype) for _ in range(2)]
        return self._output_buffers

    def iter_in_order(self) -> Iterator[TrainingBatch]:
        """All rows in order, in large batches; each batch is valid until the next is requested."""
        import torch

        for buffer in self._iter_buffers(np.arange(self._block_count)):
            yield from self._iter_batches(buffer, torch.arange(len(buffer.buffer_rows)), EVALUATION_BATCH_SIZE)

    def iter_shuffled(self, size: int, generator: torch.Generator) -> Iterator[TrainingBatch]:
        """One pass over n rows in ⌈n / size⌉ batches, of which only the last may be short.

        Each batch is valid until the next is requested.
        """
        import torch

        remainder: TrainingBatch | None = None
        drawn_weight = 0.0
        blocks = (
            np.empty(0, np.intp)
            if self._in_memory_buffer
            else torch.randperm(self._block_count, generator=generator).numpy()
        )
        for buffer in self._iter_buffers(blocks):
            order, drawn_weight = self._draw_order(buffer, drawn_weight, generator)
            if remainder is not None:
                missing = size - len(remainder)
                remainder, order = remainder.concatenate(self._make_batch(buffer, order[:missing])), order[missing:]
                if len(remainder) == size:
                    yield remainder
                    remainder = None
            for batch in self._iter_batches(buffer, order, size) if len(order) else ():
                if len(batch) == size:
                    yield batch
                else:
                    remainder = batch
        if remainder is not None:
            yield remainder

    def _draw_order(
        self, buffer: _RowBuffer, drawn_weight: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, float]:
        """Random order of the rows of a buffer, and the sum of the sampling weights so far."""
        import torch

        if self._sampling_weights is None:
            return torch.randperm(len(buffer.buffer_rows), generator=generator), 0.0
        cumulative_weights = self._sampling_weights.index_select(0, buffer.target_rows).cumsum(0)
        total_weight = cumulative_weights[-1].item() if len(cumulative_weights) else 0.0
        # Rounded so that the draws of all buffers sum to n.
        count = round(drawn_weight + total_weight) - round(drawn_weight)
        draws = torch.rand(count, dtype=cumulative_weights.dtype, generator=generator).mul_(total_weight)
        return torch.searchsorted(cumulative_weights, draws, right=True).clamp_(
            max=max(len(cumulative_weights) - 1, 0)
        ), drawn_weight + total_weight

    def _iter_buffers(self, blocks: NDArray[np.intp]) -> Iterator[_RowBuffer]:
        """The buffer in memory; or buffers of the given blocks, each read while its predecessor is in use."""
        if self._in_memory_buffer is not None:
            yield self._in_memory_buffer
            return
        blocks_per_buffer = max(MAX_IN_MEMORY_BYTES // 2 // (self._block_rows * self._row_bytes), 1)
        block_groups = [blocks[start : start + blocks_per_buffer] for start in range(0, len(blocks), blocks_per_buffer)]
        if not self._read_buffers:
            shape = (blocks_per_buffer * self._block_rows, self.width)
            self._read_buffers = [np.empty(shape, self.source.dtype) for _ in block_groups[:2]]
        yield from prefetch(
            lambda index: self._read_blocks(block_groups[index], self._read_buffers[index % 2]),
            range(len(block_groups)),
        )

    def _read_blocks(self, blocks: NDArray[np.intp], out: NDArray[Any]) -> _RowBuffer:
        import torch

        runs = self._find_runs(np.sort(blocks))
        target_rows = np.concatenate(
            [np.empty(0, np.intp), *(np.arange(positions.start, positions.stop) for positions, _ in runs)]
        )
        self._read_runs(out[: len(target_rows)], runs)
        return _RowBuffer(
            torch.from_numpy(out[: len(target_rows)]), torch.arange(len(target_rows)), torch.from_numpy(target_rows)
        )

    def variance(self) -> torch.Tensor:
        """Weighted variance of each numeric target, shape (k,)."""
        import torch

        Y, weights = self._Y.to(torch.float64), self._weights.to(torch.float64)[:, None]
        mean = (Y * weights).sum(dim=0) / weights.sum()
        variance = ((Y - mean).square() * weights).sum(dim=0) / weights.sum()
        return torch.where(variance > 0, variance, 1.0).to(self.dtype)

    def find_nonfinite_row(self) -> int | None:
        """The first row of the source with a NaN or an infinite feature."""
        for positions, source_rows in self._find_runs(range(self._block_count)):
            features = np.empty((positions.stop - positions.start, self.width), self.source.dtype)
            self._read_run(features, positions, source_rows)
            is_nonfinite = ~np.isfinite(features).all(axis=1)
            if is_nonfinite.any():
                return int(self.row_indices[positions.start + is_nonfinite.argmax()])
        return None


def _is_mapped(source: RowSource) -> bool:
    """Whether an array may be mapped from a file: read-only arrays may be pages of a cache."""
    return isinstance(source, np.memmap) or (isinstance(source, np.ndarray) and not source.flags.writeable)


def _release_pages(source: RowSource) -> None:
    """Release pages of a mapped file, which count as memory of this process once they are read."""
    if isinstance(source, np.memmap) and source.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        source._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
