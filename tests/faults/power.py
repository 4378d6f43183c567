"""A model of a file system that loses power: which folders may exist afterwards, given a journal of calls.

POSIX guarantees little. The bytes of a file are durable up to its last ``fsync``, and a name is durable if its folder
was synced after the name was created. Each later write and each later name may be lost independently.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

__all__ = [
    "LOSSES",
    "Disk",
    "DiskCall",
    "Folder",
    "Promise",
    "iter_crash_states",
    "load_folder",
    "read_journal",
    "to_hashable",
    "write_tree",
]

JOURNAL_ENTRY = struct.Struct("<6Q")
SECTOR_BYTES = 512
SUPPORTED_RENAME_FLAGS = 0


@dataclass(frozen=True)
class DiskCall:
    """One call in the journal."""

    kind: str
    inode: int
    offset: int
    path: Path
    target: Path
    data: bytes


@dataclass(frozen=True)
class Promise:
    """How many of something the process had acknowledged at this point of the journal."""

    name: str
    count: int


def read_journal(path: Path) -> list[DiskCall | Promise]:
    data, position, entries = path.read_bytes(), 0, []
    while position < len(data):
        kind, inode, offset, path_bytes, target_bytes, nbytes = JOURNAL_ENTRY.unpack_from(data, position)
        position += JOURNAL_ENTRY.size
        target_start, data_start = position + path_bytes, position + path_bytes + target_bytes
        names = [data[position:target_start].decode(), data[target_start:data_start].decode()]
        if chr(kind) == "A":
            entries.append(_parse_promise(names[0]))
        else:
            entries.append(
                DiskCall(chr(kind), inode, offset, *map(Path, names), data[data_start : data_start + nbytes])
            )
        position = data_start + nbytes
    return entries


def _parse_promise(text: str) -> Promise:
    name, count = text.split()
    return Promise(name, int(count))


class File:
    """The durable bytes of a file, and the writes since the last sync."""

    def __init__(self, data: bytes = b"") -> None:
        self.durable = data
        self.pending: list[tuple[int, bytes | None]] = []  # offset and bytes; or a new size and None

    def sync(self) -> None:
        self.durable, self.pending = self.content(), []

    def content(self) -> bytes:
        return _apply_writes(self.durable, self.pending)


@dataclass
class Folder:
    """The durable names of a folder, and the changes since the last sync; None removes a name."""

    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[str, File | Folder | None]] = field(default_factory=list)

    def change(self, name: str, node: File | Folder | None) -> None:
        self.pending.append((name, node))

    def names(self) -> dict[str, File | Folder]:
        return _apply_changes(self.durable, self.pending)

    def sync(self) -> None:
        self.durable, self.pending = self.names(), []


class Disk:
    """The state of the watched folder after the calls of a journal."""

    def __init__(self, root: Path, before: Path) -> None:
        self.root = root
        self.top = load_folder(before)
        self._files: dict[int, File] = {}  # by inode: files that the journal created or opened

    def apply(self, call: DiskCall) -> None:
        if call.kind == "C":
            self._files[call.inode] = File()
            self._get_parent(call.path).change(call.path.name, self._files[call.inode])
        elif call.kind in "WT":
            file = self._file(call)
            file.pending.append((call.offset, call.data if call.kind == "W" else None))
        elif call.kind == "S":
            self._file(call).sync()
        elif call.kind == "D":
            self._find(call.path).sync()
        elif call.kind == "M":
            self._get_parent(call.path).change(call.path.name, Folder())
        elif call.kind in "UX":
            self._get_parent(call.path).change(call.path.name, None)
        else:
            self._move(call)

    def _move(self, call: DiskCall) -> None:
        if call.kind == "R" and call.inode != SUPPORTED_RENAME_FLAGS:
            raise NotImplementedError(f"renameat2 with flags {call.inode}")
        node = self._find(call.path)
        self._get_parent(call.target).change(call.target.name, node)
        if call.kind == "R":
            self._get_parent(call.path).change(call.path.name, None)

    def _file(self, call: DiskCall) -> File:
        if call.inode not in self._files:
            self._files[call.inode] = self._find(call.path)
        return self._files[call.inode]

    def _get_parent(self, path: Path) -> Folder:
        return self._find(path.parent)

    def _find(self, path: Path) -> File | Folder:
        node: File | Folder = self.top
        for name in path.relative_to(self.root).parts:
            node = node.names()[name]
        return node


def load_folder(folder: Path) -> Folder:
    """Load a folder from the disk; all of it counts as durable."""
    return Folder({p.name: load_folder(p) if p.is_dir() else File(p.read_bytes()) for p in folder.iterdir()})


def _apply_writes(data: bytes, writes: list[tuple[int, bytes | None]]) -> bytes:
    result = bytearray(data)
    for offset, piece in writes:
        if piece is None:
            del result[offset:]
        result += bytes(max(0, offset - len(result)))
        if piece is not None:
            result[offset : offset + len(piece)] = piece
    return bytes(result)


def _apply_changes(
    names: dict[str, File | Folder], changes: list[tuple[str, File | Folder | None]]
) -> dict[str, File | Folder]:
    result = dict(names)
    for name, node in changes:
        result.pop(name, None)
        if node is not None:
            result[name] = node
    return result


Tree = dict[str, object]


def _tree(folder: Folder, names: Callable[[Folder], dict[str, File | Folder]], data: Callable[[File], bytes]) -> Tree:
    return {
        name: _tree(node, names, data) if isinstance(node, Folder) else data(node)
        for name, node in sorted(names(folder).items())
    }


def _keep_some_names(rng: random.Random) -> Callable[[Folder], dict[str, File | Folder]]:
    return lambda folder: _apply_changes(folder.durable, [change for change in folder.pending if rng.random() < 0.5])


def _keep_some_bytes(rng: random.Random) -> Callable[[File], bytes]:
    """Keep a random subset of the sectors and size changes since the last sync."""

    def keep_some(file: File) -> bytes:
        kept_writes: list[tuple[int, bytes | None]] = []
        for offset, piece in file.pending:
            if piece is None:
                kept_writes += [(offset, None)] * (rng.random() < 0.5)
                continue
            cuts = [0, *range(SECTOR_BYTES - offset % SECTOR_BYTES, len(piece), SECTOR_BYTES), len(piece)]
            sectors = [(offset + start, piece[start:stop]) for start, stop in pairwise(cuts)]
            kept_writes += [sector for sector in sectors if rng.random() < 0.5]
        return _apply_writes(file.durable, kept_writes)

    return keep_some


def _get_durable_bytes(file: File) -> bytes:
    return file.durable


def _zero_pending_bytes(file: File) -> bytes:
    """The content if the size reached the disk but the bytes did not."""
    size = len(file.content())
    return file.durable[:size] + bytes(max(0, size - len(file.durable)))


LOSSES: dict[str, Callable[[Folder, random.Random], Tree]] = {
    "only what was synced": lambda top, _: _tree(top, lambda folder: folder.durable, _get_durable_bytes),
    "names without their bytes": lambda top, _: _tree(top, Folder.names, _get_durable_bytes),
    "names of zeros": lambda top, _: _tree(top, Folder.names, _zero_pending_bytes),
    "bytes without their names": lambda top, _: _tree(top, lambda folder: folder.durable, File.content),
    "some of both": lambda top, rng: _tree(top, _keep_some_names(rng), _keep_some_bytes(rng)),
    "some names": lambda top, rng: _tree(top, _keep_some_names(rng), _get_durable_bytes),
    "nothing lost": lambda top, _: _tree(top, Folder.names, File.content),
}


def write_tree(tree: Tree, folder: Path) -> None:
    """Write the files of a tree to an empty folder."""
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).mkdir()
            write_tree(content, folder / name)


def to_hashable(tree: Tree) -> tuple[tuple[str, object], ...]:
    """Convert a tree to a hashable value."""
    return tuple(
        (name, content if isinstance(content, bytes) else to_hashable(content)) for name, content in tree.items()
    )


def iter_crash_states(
    disk: Disk, journal: list[DiskCall | Promise], seed: int
) -> Iterator[tuple[str, Tree, dict[str, int]]]:
    """Yield every distinct folder that a power cut between two calls may leave.

    Yields
    ------
    what was lost, the tree, and what was acknowledged before the cut
    """
    rng = random.Random(seed)
    seen_states: set[object] = set()
    promised: dict[str, int] = {}
    for number in range(len(journal) + 1):
        entry = journal[number - 1] if number else None
        if isinstance(entry, Promise):
            promised[entry.name] = entry.count
            seen_states.clear()  # more was acknowledged, so a state that was correct before may be wrong now
        elif entry is not None:
            disk.apply(entry)
        for name, loss in LOSSES.items():
            tree = loss(disk.top, rng)
            key = to_hashable(tree)
            if key not in seen_states:
                seen_states.add(key)
                yield f"call {number}, {name}", tree, dict(promised)
