"""A model of a file system that loses power: from a journal of calls to the folders that may be found afterwards.

What POSIX promises is little. The bytes of a file are safe up to its last ``fsync``, and a name is safe when its folder
was synced after the name was made. Everything later may be there or not, each write and each name for itself.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

__all__ = ["LOSSES", "Call", "Disk", "Folder", "Marked", "crashes", "frozen", "lay", "loaded", "read_journal"]

ENTRY = struct.Struct("<6Q")
SECTOR_BYTES = 512
RENAME_FLAGS_KNOWN = 0


@dataclass(frozen=True)
class Call:
    """One line of the journal."""

    kind: str
    inode: int
    offset: int
    path: Path
    target: Path
    data: bytes


@dataclass(frozen=True)
class Marked:
    """What the process had promised by then: how many of something."""

    name: str
    count: int


def read_journal(path: Path) -> list[Call | Marked]:
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        kind, inode, offset, first, second, nbytes = ENTRY.unpack_from(data, at)
        at += ENTRY.size
        names = [data[at : at + first].decode(), data[at + first : at + first + second].decode()]
        at += first + second
        if chr(kind) == "A":
            found.append(_marked(names[0]))
        else:
            found.append(Call(chr(kind), inode, offset, *map(Path, names), data[at : at + nbytes]))
        at += nbytes
    return found


def _marked(text: str) -> Marked:
    name, count = text.split()
    return Marked(name, int(count))


class File:
    """Bytes that are safe, and the writes since."""

    def __init__(self, data: bytes = b"") -> None:
        self.safe = data
        self.later: list[tuple[int, bytes | None]] = []  # offset and bytes; or a new size and None

    def sync(self) -> None:
        self.safe, self.later = self.whole(), []

    def whole(self) -> bytes:
        return _written(self.safe, self.later)


@dataclass
class Folder:
    """Names that are safe, and the changes since: a name and what it is of, or None where it was taken away."""

    safe: dict[str, File | Folder] = field(default_factory=dict)
    later: list[tuple[str, File | Folder | None]] = field(default_factory=list)

    def change(self, name: str, node: File | Folder | None) -> None:
        self.later.append((name, node))

    def names(self) -> dict[str, File | Folder]:
        return _changed(self.safe, self.later)

    def sync(self) -> None:
        self.safe, self.later = self.names(), []


class Disk:
    """The watched folder as the calls of a journal leave it."""

    def __init__(self, root: Path, before: Path) -> None:
        self.root = root
        self.top = loaded(before)
        self._files: dict[int, File] = {}  # by inode, of those that were made or opened since

    def apply(self, call: Call) -> None:
        if call.kind == "C":
            self._files[call.inode] = File()
            self._above(call.path).change(call.path.name, self._files[call.inode])
        elif call.kind in "WT":
            file = self._file(call)
            file.later.append((call.offset, call.data if call.kind == "W" else None))
        elif call.kind == "S":
            self._file(call).sync()
        elif call.kind == "D":
            self._find(call.path).sync()
        elif call.kind == "M":
            self._above(call.path).change(call.path.name, Folder())
        elif call.kind in "UX":
            self._above(call.path).change(call.path.name, None)
        else:
            self._move(call)

    def _move(self, call: Call) -> None:
        if call.kind == "R" and call.inode != RENAME_FLAGS_KNOWN:
            raise NotImplementedError(f"renameat2 with flags {call.inode}")
        node = self._find(call.path)
        self._above(call.target).change(call.target.name, node)
        if call.kind == "R":
            self._above(call.path).change(call.path.name, None)

    def _file(self, call: Call) -> File:
        if call.inode not in self._files:
            self._files[call.inode] = self._find(call.path)
        return self._files[call.inode]

    def _above(self, path: Path) -> Folder:
        return self._find(path.parent)

    def _find(self, path: Path) -> File | Folder:
        node: File | Folder = self.top
        for name in path.relative_to(self.root).parts:
            node = node.names()[name]
        return node


def loaded(folder: Path) -> Folder:
    """A folder as it lies on the disk, all of it safe."""
    return Folder({p.name: loaded(p) if p.is_dir() else File(p.read_bytes()) for p in folder.iterdir()})


def _written(data: bytes, writes: list[tuple[int, bytes | None]]) -> bytes:
    result = bytearray(data)
    for offset, piece in writes:
        if piece is None:
            del result[offset:]
        result += bytes(max(0, offset - len(result)))
        if piece is not None:
            result[offset : offset + len(piece)] = piece
    return bytes(result)


def _changed(
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


def _some_names(random_: random.Random) -> Callable[[Folder], dict[str, File | Folder]]:
    return lambda folder: _changed(folder.safe, [change for change in folder.later if random_.random() < 0.5])


def _some_bytes(random_: random.Random) -> Callable[[File], bytes]:
    """Each sector of each write since the last sync for itself, and the size as it was or became on the way."""

    def some(file: File) -> bytes:
        kept: list[tuple[int, bytes | None]] = []
        for offset, piece in file.later:
            if piece is None:
                kept += [(offset, None)] * (random_.random() < 0.5)
                continue
            cuts = [0, *range(SECTOR_BYTES - offset % SECTOR_BYTES, len(piece), SECTOR_BYTES), len(piece)]
            sectors = [(offset + a, piece[a:b]) for a, b in pairwise(cuts)]
            kept += [sector for sector in sectors if random_.random() < 0.5]
        return _written(file.safe, kept)

    return some


def _safe_bytes(file: File) -> bytes:
    return file.safe


def _zeros_where_unsafe(file: File) -> bytes:
    """The size came to the disk and the bytes did not."""
    size = len(file.whole())
    return file.safe[:size] + bytes(max(0, size - len(file.safe)))


LOSSES: dict[str, Callable[[Folder, random.Random], Tree]] = {
    "only what was synced": lambda top, _: _tree(top, lambda folder: folder.safe, _safe_bytes),
    "names without their bytes": lambda top, _: _tree(top, Folder.names, _safe_bytes),
    "names of zeros": lambda top, _: _tree(top, Folder.names, _zeros_where_unsafe),
    "bytes without their names": lambda top, _: _tree(top, lambda folder: folder.safe, File.whole),
    "some of both": lambda top, random_: _tree(top, _some_names(random_), _some_bytes(random_)),
    "some names": lambda top, random_: _tree(top, _some_names(random_), _safe_bytes),
    "nothing lost": lambda top, _: _tree(top, Folder.names, File.whole),
}


def lay(tree: Tree, folder: Path) -> None:
    """Make the files of a tree in an empty folder."""
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).mkdir()
            lay(content, folder / name)


def frozen(tree: Tree) -> tuple[tuple[str, object], ...]:
    """A tree as something that can be compared and hashed."""
    return tuple((name, content if isinstance(content, bytes) else frozen(content)) for name, content in tree.items())


def crashes(disk: Disk, journal: list[Call | Marked], seed: int) -> Iterator[tuple[str, Tree, dict[str, int]]]:
    """Every different folder that a power cut between two calls may leave.

    Yields
    ------
    what was lost, the tree, and what was promised before the cut
    """
    random_ = random.Random(seed)
    seen: set[object] = set()
    promised: dict[str, int] = {}
    for number in range(len(journal) + 1):
        last = journal[number - 1] if number else None
        if isinstance(last, Marked):
            promised[last.name] = last.count
            seen.clear()  # more was promised: what was right before may be wrong now
        elif last is not None:
            disk.apply(last)
        for name, loss in LOSSES.items():
            tree = loss(disk.top, random_)
            key = frozen(tree)
            if key not in seen:
                seen.add(key)
                yield f"call {number}, {name}", tree, dict(promised)
