"""Trials: a piece of work with a fault in it, what is found afterwards, and the work done again.

Run as a program it is a server that reads one campaign a line and answers with its outcome. It has imported all that
the work needs and has no threads, so that a trial costs a fork.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.children import Child, Ended, Tally, Wrong, start
from tests.faults.power import LOSSES, Call, Disk, crashes, frozen, lay, loaded, read_journal

if TYPE_CHECKING:
    from tests.faults.scenarios import Scenario

__all__ = ["MODES", "Harness", "compile_library"]

ROOT = Path(__file__).absolute().parents[2]
MODES = {"count": 1, "before": 2, "half": 3, "full": 4, "broken": 5, "journal": 6}  # as in faults.c
PROCESSES_MAX = 4
PLENTY = 10**6


def compile_library(folder: Path) -> Path | None:
    """The compiled library, or None where there is no compiler for it."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-lpthread"], check=True)
    return library


class Harness:
    """The server, from outside.

    Parameters
    ----------
    library : Path
    folder : Path
        Where the trials are made.
    """

    def __init__(self, library: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.harness", str(library), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder,
        )  # fmt: skip

    def run(self, campaign: str, **given: Any) -> dict[str, Any]:
        """Run one of ``CAMPAIGNS``; its counts, with what was wrong as ``wrong``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"campaign": campaign, **given}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the harness ended with {self._process.wait()}")
        outcome: dict[str, Any] = json.loads(answer)
        if "failed" in outcome:
            raise RuntimeError(outcome["failed"])
        return outcome

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


# ------------------------------------------------------------------------------------------------- inside the server
class Server:
    """What the campaigns share: the library, the folder, and a scenario of each kind."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.folder = folder
        self._scenarios: dict[str, Scenario] = {}

    def scenario(self, name: str, settings: dict[str, Any] | None = None) -> Scenario:
        from tests.faults.scenarios import SCENARIOS

        key = f"{name} {json.dumps(settings)}"
        if key not in self._scenarios:
            more = {} if settings is None else {"settings": settings}
            self._scenarios[key] = SCENARIOS[name](self.folder / f"home-{len(self._scenarios)}", **more)
        return self._scenarios[key]

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def start(self, scenario: Scenario, folder: Path, tally: Tally, arm: Sequence[Any] = ()) -> Child:
        """Begin the work, with a fault in it if armed: a mode, the number of the call, the file of the journal."""

        def work() -> None:
            if arm:
                mode, at, *journal = arm
                descriptor = os.open(journal[0], os.O_WRONLY | os.O_CREAT) if journal else -1
                tally.mark = lambda text: self.library.faults_mark(text.encode())
                self.library.faults_arm(os.fsencode(folder), MODES[mode], ctypes.c_long(at), descriptor)
            scenario.act(folder, tally)
            tally.add("calls", self.library.faults_count())

        return start(work)

    def work(self, scenario: Scenario, folder: Path, tally: Tally, arm: Sequence[Any] = ()) -> Ended:
        return self.start(scenario, folder, tally, arm).wait()


def spread(trials: Sequence[Any], run: Callable[[Any], Any]) -> list[Any]:
    """The results of some trials, run by as many processes as there are cores, each on one."""
    cores = sorted(os.sched_getaffinity(0))[:PROCESSES_MAX]
    readers = []
    gc.collect()
    gc.freeze()  # what the children would otherwise copy page by page
    for number, core in enumerate(cores):
        reader, writer = os.pipe()
        if not os.fork():
            os.close(reader)
            os.sched_setaffinity(0, {core})
            with os.fdopen(writer, "w") as pipe:
                try:
                    json.dump([run(trial) for trial in trials[number :: len(cores)]], pipe)
                except BaseException:
                    json.dump(traceback.format_exc(), pipe)
            os._exit(0)
        os.close(writer)
        readers.append(os.fdopen(reader))
    answers = []
    for reader in readers:
        with reader:
            answers.append(reader.read())
    for _ in cores:
        os.wait()
    found = [json.loads(answer) if answer else "the process crashed" for answer in answers]
    for answer in found:
        if isinstance(answer, str):
            raise RuntimeError(answer)
    return [result for results in found for result in results]


def judged(number: object, trial: Callable[[], str]) -> list[str]:
    """The outcome of a trial and, where it was wrong, what was."""
    try:
        return [trial()]
    except Wrong as wrong:
        return ["wrong", f"{number}: {wrong}"]


def summary(results: Iterable[list[str]], **more: Any) -> dict[str, Any]:
    outcomes = list(results)
    counts = Counter(name for name, *_ in outcomes)
    return {
        "trials": len(outcomes),
        "counts": dict(counts),
        "wrong": [text for _, *rest in outcomes for text in rest],
        **more,
    }


def _resume(server: Server, scenario: Scenario, folder: Path, acknowledged: int) -> None:
    tally = Tally()
    ended = server.work(scenario, folder, tally)
    if ended.code:
        raise Wrong(f"done again it ended with {ended.code}: {ended.said}")
    scenario.check_resumed(folder, acknowledged, tally)


def _count_calls(server: Server, scenario: Scenario) -> int:
    folder, tally = server.new_folder(), Tally()
    scenario.prepare(folder)
    ended = server.work(scenario, folder, tally, ("count", 0))
    if ended.code:
        raise RuntimeError(f"what nothing disturbs ended with {ended.code}: {ended.said}")
    shutil.rmtree(folder)
    return tally["calls"]


def at_every_call(server: Server, scenario: str, mode: str, every: int = 1, settings: Any = None) -> dict[str, Any]:
    """A fault at each call, or at every so many of them, and the work done again."""
    work = server.scenario(scenario, settings)
    calls = _count_calls(server, work)

    def trial(at: int) -> str:
        folder, tally = server.new_folder(), Tally()
        work.prepare(folder)
        ended = server.work(work, folder, tally, (mode, at))
        if mode in ("before", "half"):
            if not ended.killed:
                raise Wrong(f"was to be killed, and ended with {ended.code}: {ended.said}")
        elif ended.code not in (0, 1) or (ended.code == 1 and not ended.said_one_line_of_ours):
            raise Wrong(f"ended with {ended.code}: {ended.said}")
        elif mode == "full" and list(folder.rglob("*.tmp")):
            raise Wrong("a full disk left temporary files")
        acknowledged = tally["acknowledged"]
        state = work.check(folder, acknowledged, tally["ended"])
        _resume(server, work, folder, acknowledged)
        shutil.rmtree(folder)
        return state

    first = 1 if mode in ("before", "full") else min(2, every)  # what one mode leaves out the other does
    results = spread(range(first, calls + 1, every), lambda at: judged(f"call {at}", lambda: trial(at)))
    return summary(results, calls=calls)


def _journal(server: Server, work: Scenario) -> tuple[Path, Path, Any]:
    """Folders before and after some work, and the journal of its calls."""
    before, folder = server.new_folder(), server.new_folder()
    work.prepare(before)
    shutil.copytree(before, folder, dirs_exist_ok=True)
    path = server.folder / f"{folder.name}.journal"
    ended = server.work(work, folder, Tally(), ("journal", 0, path))
    if ended.code:
        raise RuntimeError(f"what nothing disturbs ended with {ended.code}: {ended.said}")
    return before, folder, read_journal(path)


def journal(server: Server, scenario: str, settings: Any = None) -> dict[str, Any]:
    """Whether the calls of the journal, made again on the files of before, make the files of after."""
    before, folder, calls = _journal(server, server.scenario(scenario, settings))
    disk = Disk(folder, before)
    for call in calls:
        if isinstance(call, Call):
            disk.apply(call)
    made = frozen(LOSSES["nothing lost"](disk.top, random.Random(0)))
    there = frozen(LOSSES["nothing lost"](loaded(folder), random.Random(0)))
    return {"same": made == there, "kinds": Counter(call.kind for call in calls if isinstance(call, Call))}


def power_cuts(server: Server, scenario: str, at_most: int, seed: int = 0, settings: Any = None) -> dict[str, Any]:
    """The power is cut between any two calls; all that is different of what may then be found, or some of it."""
    work = server.scenario(scenario, settings)
    before, folder, calls = _journal(server, work)
    found = list(crashes(Disk(folder, before), calls, seed))
    chosen = random.Random(seed).sample(found, min(at_most, len(found)))

    def trial(crash: tuple[str, Any, dict[str, int]]) -> str:
        _, tree, promised = crash
        place = server.new_folder()
        lay(tree, place)
        state = work.check(place, promised.get("acknowledged", 0), promised.get("ended", 0))
        _resume(server, work, place, promised.get("acknowledged", 0))
        shutil.rmtree(place)
        return state

    results = spread(chosen, lambda crash: judged(crash[0], lambda: trial(crash)))
    return summary(results, calls=len(calls), states=len(found))


def random_kills(server: Server, scenario: str, kills: int, seed: int = 0, settings: Any = None) -> dict[str, Any]:
    """Kills at any moment, and the same work again and again until it ends; then from the start."""
    work = server.scenario(scenario, settings)
    seconds = _seconds(server, work)

    def until_done(random_: random.Random, left: int) -> Iterator[str]:
        """One extraction: the state after each of its kills."""
        folder, tally = server.new_folder(), Tally()
        work.prepare(folder)
        for kill in count():
            running = server.start(work, folder, tally)
            if kill < left:
                time.sleep(random_.random() * seconds)
                running.kill()
            ended = running.wait()
            if not ended.killed:
                break
            yield work.check(folder, 0, tally["ended"])
        if ended.code:
            raise Wrong(f"ended with {ended.code}: {ended.said}")
        work.check_resumed(folder, 0, Tally())
        if tally["acknowledged"] > work.fresh:
            raise Wrong(f"acknowledged {tally['acknowledged']} of {work.fresh} images")
        shutil.rmtree(folder)
        yield "finished"

    def share(mine: int) -> list[list[str]]:
        random_, results, left = random.Random(f"{seed} {mine}"), [], mine
        while left > 0:
            try:
                for state in until_done(random_, left):
                    results.append([state])
                    left -= state != "finished"
            except Wrong as wrong:
                results.append(["wrong", str(wrong)])
                left -= 1
        return results

    shares = [kills // 4 + (i < kills % 4) for i in range(4)]
    return summary((result for results in spread(shares, share) for result in results), seconds=round(seconds, 3))


def _seconds(server: Server, work: Scenario) -> float:
    """How long the work takes on one core when nothing disturbs it."""

    def once(_: int) -> float:
        folder = server.new_folder()
        work.prepare(folder)
        started = time.perf_counter()
        server.work(work, folder, Tally())
        return time.perf_counter() - started

    return max(spread([0], once))


def races(server: Server, scenario: str, trials: int, seed: int = 0, settings: Any = None) -> dict[str, Any]:
    """Two processes do the same work in one folder, and one, both or none of them is killed at any moment."""
    work = server.scenario(scenario, settings)
    seconds = _seconds(server, work)

    def trial(number: int) -> str:
        random_, folder, tally = random.Random(f"{seed} {number}"), server.new_folder(), Tally()
        work.prepare(folder)
        running = []
        for _ in range(2):
            running.append(server.start(work, folder, tally))
            time.sleep(random_.random() * seconds / 2)
        for process in running:
            if random_.random() < 0.5:
                time.sleep(random_.random() * seconds)
                process.kill()
        ended = [process.wait() for process in running]
        if any(one.code and not one.killed for one in ended):
            raise Wrong(f"ended with {[(one.code, one.said) for one in ended]}")
        state = work.check(folder, 0, tally["ended"])
        acknowledged = tally["acknowledged"]
        _resume(server, work, folder, acknowledged)
        if acknowledged > work.fresh:
            raise Wrong(f"acknowledged {acknowledged} of {work.fresh} images")
        shutil.rmtree(folder)
        return f"{state}, {sum(one.killed for one in ended)} killed"

    return summary(spread(range(trials), lambda number: judged(f"race {number}", lambda: trial(number))))


def _flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def flipped_parts(server: Server, scenario: str, at_most: int, seed: int = 0) -> dict[str, Any]:
    """One bit of unfinished work is flipped, and the work goes on."""
    work, random_ = server.scenario(scenario), random.Random(seed)
    folder = server.new_folder()
    work.prepare(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    every = [(path.relative_to(folder), at) for path in files for at in range(path.stat().st_size)]
    names = {str(path.name).split(".")[-1] for path in files}

    def trial(flip: tuple[Path, int]) -> str:
        place = server.new_folder()
        work.prepare(place)
        _flip(place / flip[0], flip[1], flip[1] % 8)
        state = work.check(place, 0, 0)
        _resume(server, work, place, -PLENTY)  # what is damaged is embedded again
        shutil.rmtree(place)
        return state

    chosen = random_.sample(every, min(at_most, len(every)))
    return summary(
        spread(chosen, lambda flip: judged(flip, lambda: trial(flip))), bytes=len(every), files=sorted(names)
    )


def flipped_cache(server: Server, scenario: str, at_most: int, seed: int = 0, settings: Any = None) -> dict[str, Any]:
    """One bit of a finished cache is flipped: it is opened, and another extraction looks for work that was done."""
    work, random_ = server.scenario(scenario, settings), random.Random(seed)
    whole = work.archive.parent / "reference"
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    every = [(path.relative_to(whole), at) for path in files for at in range(path.stat().st_size)]

    def trial(flip: tuple[Path, int]) -> str:
        place = server.new_folder()
        shutil.copytree(whole, place, dirs_exist_ok=True)
        _flip(place / flip[0], flip[1], flip[1] % 8)
        state = work.damage(place)
        if state == "noticed" or flip[1] % 8 == 0:
            _check_beside(server, work, place)
        shutil.rmtree(place)
        return state

    chosen = random_.sample(every, min(at_most, len(every)))
    return summary(spread(chosen, lambda flip: judged(flip, lambda: trial(flip))), bytes=len(every))


def _check_beside(server: Server, work: Scenario, folder: Path) -> None:
    other = work.beside()
    ended = server.work(other, folder, Tally())
    if ended.code or other.state(folder) != "new":
        raise Wrong(f"what was extracted beside it ended with {ended.code}: {ended.said}")


CAMPAIGNS = {
    "at every call": at_every_call,
    "journal": journal,
    "power cuts": power_cuts,
    "random kills": random_kills,
    "races": races,
    "flipped parts": flipped_parts,
    "flipped cache": flipped_cache,
}


def serve(library: str, folder: str) -> None:
    """Answer one line after the other, until there is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by mistake is no answer
    server = Server(Path(library), Path(folder))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            outcome = CAMPAIGNS[asked.pop("campaign")](server, **asked)
        except Exception:
            outcome = {"failed": traceback.format_exc()}
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()
    os._exit(0)  # torch tells at length of what a frozen process leaks


if __name__ == "__main__":
    serve(*sys.argv[1:])
