"""Trials: run some work with an injected fault, check the state that it leaves, and run the work again.

Run as a program, this module is a server that reads one campaign per line and answers with its outcome. The server has
imported everything that the work needs and has no threads, so that a trial costs only a fork.
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

from tests.faults.children import Child, ChildResult, SharedCounters, UnexpectedState, start_child
from tests.faults.power import (
    LOSSES,
    Disk,
    DiskCall,
    iter_crash_states,
    load_folder,
    read_journal,
    to_hashable,
    write_tree,
)

if TYPE_CHECKING:
    from tests.faults.scenarios import Scenario

__all__ = ["MODES", "Harness", "compile_library"]

ROOT = Path(__file__).absolute().parents[2]
MODES = {"count": 1, "before": 2, "half": 3, "full": 4, "broken": 5, "journal": 6}  # as in faults.c
MAX_PROCESSES = 4
UNLIMITED = 10**6


def compile_library(folder: Path) -> Path | None:
    """Compile the library that injects faults; None if there is no C compiler or the system is not Linux."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-lpthread"], check=True)
    return library


class Harness:
    """A client of the server process.

    Parameters
    ----------
    library : Path
    folder : Path
        Folder of the trials.
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

    def run(self, campaign: str, **arguments: Any) -> dict[str, Any]:
        """Run one of ``CAMPAIGNS``; returns its counts, with the failed checks as ``wrong``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"campaign": campaign, **arguments}) + "\n")
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
    """The state that the campaigns share: the library, the folder, and one scenario of each kind."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.folder = folder
        self._scenarios: dict[str, Scenario] = {}

    def scenario(self, name: str, settings: dict[str, Any] | None = None) -> Scenario:
        from tests.faults.scenarios import SCENARIOS

        key = f"{name} {json.dumps(settings)}"
        if key not in self._scenarios:
            options = {} if settings is None else {"settings": settings}
            self._scenarios[key] = SCENARIOS[name](self.folder / f"home-{len(self._scenarios)}", **options)
        return self._scenarios[key]

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def start(self, scenario: Scenario, folder: Path, counters: SharedCounters, fault: Sequence[Any] = ()) -> Child:
        """Start the work. ``fault``, if given, is a mode, the number of the call, and the path of a journal."""

        def work() -> None:
            if fault:
                mode, call_number, *journal_path = fault
                descriptor = os.open(journal_path[0], os.O_WRONLY | os.O_CREAT) if journal_path else -1
                counters.record_promise = lambda text: self.library.faults_mark(text.encode())
                self.library.faults_arm(os.fsencode(folder), MODES[mode], ctypes.c_long(call_number), descriptor)
            scenario.run(folder, counters)
            counters.add("calls", self.library.faults_count())

        return start_child(work)

    def work(
        self, scenario: Scenario, folder: Path, counters: SharedCounters, fault: Sequence[Any] = ()
    ) -> ChildResult:
        return self.start(scenario, folder, counters, fault).wait()


def run_in_parallel(trials: Sequence[Any], run: Callable[[Any], Any]) -> list[Any]:
    """Run trials in as many processes as there are cores, each pinned to one core, and return the results."""
    cores = sorted(os.sched_getaffinity(0))[:MAX_PROCESSES]
    readers = []
    gc.collect()
    gc.freeze()  # otherwise the children would copy these pages one by one
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
    parsed_answers = [json.loads(answer) if answer else "the process crashed" for answer in answers]
    for answer in parsed_answers:
        if isinstance(answer, str):
            raise RuntimeError(answer)
    return [result for results in parsed_answers for result in results]


def run_trial(number: object, trial: Callable[[], str]) -> list[str]:
    """Run a trial; return its outcome and, if a check failed, the message."""
    try:
        return [trial()]
    except UnexpectedState as error:
        return ["wrong", f"{number}: {error}"]


def summarize(results: Iterable[list[str]], **extra_entries: Any) -> dict[str, Any]:
    outcomes = list(results)
    counts = Counter(name for name, *_ in outcomes)
    return {
        "trials": len(outcomes),
        "counts": dict(counts),
        "wrong": [text for _, *messages in outcomes for text in messages],
        **extra_entries,
    }


def _resume(server: Server, scenario: Scenario, folder: Path, acknowledged: int) -> None:
    counters = SharedCounters()
    result = server.work(scenario, folder, counters)
    if result.code:
        raise UnexpectedState(f"the repeated work ended with {result.code}: {result.output}")
    scenario.check_resumed(folder, acknowledged, counters)


def _count_calls(server: Server, scenario: Scenario) -> int:
    folder, counters = server.new_folder(), SharedCounters()
    scenario.prepare(folder)
    result = server.work(scenario, folder, counters, ("count", 0))
    if result.code:
        raise RuntimeError(f"the undisturbed work ended with {result.code}: {result.output}")
    shutil.rmtree(folder)
    return counters["calls"]


def inject_fault_at_every_call(
    server: Server, scenario: str, mode: str, every: int = 1, settings: Any = None
) -> dict[str, Any]:
    """Inject a fault at every ``every``-th call, and repeat the work after each."""
    work = server.scenario(scenario, settings)
    calls = _count_calls(server, work)

    def trial(call_number: int) -> str:
        folder, counters = server.new_folder(), SharedCounters()
        work.prepare(folder)
        result = server.work(work, folder, counters, (mode, call_number))
        if mode in ("before", "half"):
            if not result.killed:
                raise UnexpectedState(f"was not killed, but ended with {result.code}: {result.output}")
        elif result.code not in (0, 1) or (result.code == 1 and not result.printed_one_error_line):
            raise UnexpectedState(f"ended with {result.code}: {result.output}")
        elif mode == "full" and list(folder.rglob("*.tmp")):
            raise UnexpectedState("a full disk left temporary files")
        acknowledged = counters["acknowledged"]
        state = work.check(folder, acknowledged, counters["ended"])
        _resume(server, work, folder, acknowledged)
        shutil.rmtree(folder)
        return state

    first_call = 1 if mode in ("before", "full") else min(2, every)  # one mode covers the calls that the other skips
    results = run_in_parallel(
        range(first_call, calls + 1, every),
        lambda call_number: run_trial(f"call {call_number}", lambda: trial(call_number)),
    )
    return summarize(results, calls=calls)


def _record_journal(server: Server, work: Scenario) -> tuple[Path, Path, Any]:
    """Run some work; return the folders before and after it, and the journal of its calls."""
    before, folder = server.new_folder(), server.new_folder()
    work.prepare(before)
    shutil.copytree(before, folder, dirs_exist_ok=True)
    path = server.folder / f"{folder.name}.journal"
    result = server.work(work, folder, SharedCounters(), ("journal", 0, path))
    if result.code:
        raise RuntimeError(f"the undisturbed work ended with {result.code}: {result.output}")
    return before, folder, read_journal(path)


def check_journal(server: Server, scenario: str, settings: Any = None) -> dict[str, Any]:
    """Check that replaying the journal on the files before the work gives the files after it."""
    before, folder, calls = _record_journal(server, server.scenario(scenario, settings))
    disk = Disk(folder, before)
    for call in calls:
        if isinstance(call, DiskCall):
            disk.apply(call)
    replayed = to_hashable(LOSSES["nothing lost"](disk.top, random.Random(0)))
    actual = to_hashable(LOSSES["nothing lost"](load_folder(folder), random.Random(0)))
    return {"same": replayed == actual, "kinds": Counter(call.kind for call in calls if isinstance(call, DiskCall))}


def cut_power(server: Server, scenario: str, at_most: int, seed: int = 0, settings: Any = None) -> dict[str, Any]:
    """Cut the power between any two calls; check all distinct states that may result, or a sample of them."""
    work = server.scenario(scenario, settings)
    before, folder, calls = _record_journal(server, work)
    crash_states = list(iter_crash_states(Disk(folder, before), calls, seed))
    sampled_states = random.Random(seed).sample(crash_states, min(at_most, len(crash_states)))

    def trial(crash: tuple[str, Any, dict[str, int]]) -> str:
        _, tree, promised = crash
        folder = server.new_folder()
        write_tree(tree, folder)
        state = work.check(folder, promised.get("acknowledged", 0), promised.get("ended", 0))
        _resume(server, work, folder, promised.get("acknowledged", 0))
        shutil.rmtree(folder)
        return state

    results = run_in_parallel(sampled_states, lambda crash: run_trial(crash[0], lambda: trial(crash)))
    return summarize(results, calls=len(calls), states=len(crash_states))


def kill_at_random_moments(
    server: Server, scenario: str, kills: int, seed: int = 0, settings: Any = None
) -> dict[str, Any]:
    """Kill the work at random moments and repeat it until it ends; then start over until all kills are used."""
    work = server.scenario(scenario, settings)
    seconds = _measure_seconds(server, work)

    def run_until_done(rng: random.Random, kills_left: int) -> Iterator[str]:
        """Yield the state after each kill of one piece of work."""
        folder, counters = server.new_folder(), SharedCounters()
        work.prepare(folder)
        for kill in count():
            child = server.start(work, folder, counters)
            if kill < kills_left:
                time.sleep(rng.random() * seconds)
                child.kill()
            result = child.wait()
            if not result.killed:
                break
            yield work.check(folder, 0, counters["ended"])
        if result.code:
            raise UnexpectedState(f"ended with {result.code}: {result.output}")
        work.check_resumed(folder, 0, SharedCounters())
        if counters["acknowledged"] > work.n_new_images:
            raise UnexpectedState(f"acknowledged {counters['acknowledged']} of {work.n_new_images} images")
        shutil.rmtree(folder)
        yield "finished"

    def run_share(n_kills: int) -> list[list[str]]:
        rng, results, kills_left = random.Random(f"{seed} {n_kills}"), [], n_kills
        while kills_left > 0:
            try:
                for state in run_until_done(rng, kills_left):
                    results.append([state])
                    kills_left -= state != "finished"
            except UnexpectedState as error:
                results.append(["wrong", str(error)])
                kills_left -= 1
        return results

    shares = [kills // 4 + (i < kills % 4) for i in range(4)]
    return summarize(
        (result for results in run_in_parallel(shares, run_share) for result in results), seconds=round(seconds, 3)
    )


def _measure_seconds(server: Server, work: Scenario) -> float:
    """Measure the duration of the undisturbed work on one core."""

    def once(_: int) -> float:
        folder = server.new_folder()
        work.prepare(folder)
        started = time.perf_counter()
        server.work(work, folder, SharedCounters())
        return time.perf_counter() - started

    return max(run_in_parallel([0], once))


def race_two_processes(
    server: Server, scenario: str, trials: int, seed: int = 0, settings: Any = None
) -> dict[str, Any]:
    """Run the same work in two processes in one folder; kill none, one or both at random moments."""
    work = server.scenario(scenario, settings)
    seconds = _measure_seconds(server, work)

    def trial(number: int) -> str:
        rng, folder, counters = random.Random(f"{seed} {number}"), server.new_folder(), SharedCounters()
        work.prepare(folder)
        children = []
        for _ in range(2):
            children.append(server.start(work, folder, counters))
            time.sleep(rng.random() * seconds / 2)
        for child in children:
            if rng.random() < 0.5:
                time.sleep(rng.random() * seconds)
                child.kill()
        results = [child.wait() for child in children]
        if any(result.code and not result.killed for result in results):
            raise UnexpectedState(f"ended with {[(result.code, result.output) for result in results]}")
        state = work.check(folder, 0, counters["ended"])
        acknowledged = counters["acknowledged"]
        _resume(server, work, folder, acknowledged)
        if acknowledged > work.n_new_images:
            raise UnexpectedState(f"acknowledged {acknowledged} of {work.n_new_images} images")
        shutil.rmtree(folder)
        return f"{state}, {sum(result.killed for result in results)} killed"

    return summarize(run_in_parallel(range(trials), lambda number: run_trial(f"race {number}", lambda: trial(number))))


def _flip_bit(path: Path, offset: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def flip_bits_in_parts(server: Server, scenario: str, at_most: int, seed: int = 0) -> dict[str, Any]:
    """Flip one bit of the parts of unfinished work, and resume the work."""
    work, rng = server.scenario(scenario), random.Random(seed)
    folder = server.new_folder()
    work.prepare(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    all_bytes = [(path.relative_to(folder), offset) for path in files for offset in range(path.stat().st_size)]
    names = {str(path.name).split(".")[-1] for path in files}

    def trial(flip: tuple[Path, int]) -> str:
        trial_folder = server.new_folder()
        work.prepare(trial_folder)
        _flip_bit(trial_folder / flip[0], flip[1], flip[1] % 8)
        state = work.check(trial_folder, 0, 0)
        _resume(server, work, trial_folder, -UNLIMITED)  # damaged parts are embedded again
        shutil.rmtree(trial_folder)
        return state

    sampled_bytes = rng.sample(all_bytes, min(at_most, len(all_bytes)))
    return summarize(
        run_in_parallel(sampled_bytes, lambda flip: run_trial(flip, lambda: trial(flip))),
        bytes=len(all_bytes),
        files=sorted(names),
    )


def flip_bits_in_cache(
    server: Server, scenario: str, at_most: int, seed: int = 0, settings: Any = None
) -> dict[str, Any]:
    """Flip one bit of a finished cache; open it, and let another extraction look for embeddings in it."""
    work, rng = server.scenario(scenario, settings), random.Random(seed)
    reference = work.archive.parent / "reference"
    files = sorted(path for path in reference.rglob("*") if path.is_file())
    all_bytes = [(path.relative_to(reference), offset) for path in files for offset in range(path.stat().st_size)]

    def trial(flip: tuple[Path, int]) -> str:
        trial_folder = server.new_folder()
        shutil.copytree(reference, trial_folder, dirs_exist_ok=True)
        _flip_bit(trial_folder / flip[0], flip[1], flip[1] % 8)
        state = work.classify_damage(trial_folder)
        if state == "noticed" or flip[1] % 8 == 0:
            _check_other_cache(server, work, trial_folder)
        shutil.rmtree(trial_folder)
        return state

    sampled_bytes = rng.sample(all_bytes, min(at_most, len(all_bytes)))
    return summarize(
        run_in_parallel(sampled_bytes, lambda flip: run_trial(flip, lambda: trial(flip))), bytes=len(all_bytes)
    )


def _check_other_cache(server: Server, work: Scenario, folder: Path) -> None:
    other_work = work.with_other_output()
    result = server.work(other_work, folder, SharedCounters())
    if result.code or other_work.get_state(folder) != "new":
        raise UnexpectedState(f"the extraction to another cache ended with {result.code}: {result.output}")


CAMPAIGNS = {
    "at every call": inject_fault_at_every_call,
    "journal": check_journal,
    "power cuts": cut_power,
    "random kills": kill_at_random_moments,
    "races": race_two_processes,
    "flipped parts": flip_bits_in_parts,
    "flipped cache": flip_bits_in_cache,
}


def serve(library: str, folder: str) -> None:
    """Answer the requests on standard input, one per line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep stray prints out of the answers
    server = Server(Path(library), Path(folder))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            outcome = CAMPAIGNS[request.pop("campaign")](server, **request)
        except Exception:
            outcome = {"failed": traceback.format_exc()}
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()
    os._exit(0)  # at a normal exit torch would report leaks of the frozen process


if __name__ == "__main__":
    serve(*sys.argv[1:])
