"""`make mutants`: take each guard of the SQL away, one at a time, and see that the recorded test misses it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mutants.candidates import Candidates
from mutants.reach import digest
from mutants.record import Entries, killed, known, load, reasons, save

Plan = list[tuple[str, list[str]]]
"""For each guard the tests to play without it, up to the first that fails and does not fail as it stands."""

TESTS = Path(__file__).parent.parent / "tests"


def main() -> int:
    """Run a command; answer 1 where a guard is not missed."""
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("command", choices=("play", "discover", "reach", "list"), nargs="?", default="play")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with a server (default: 2)")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="play one guard of N, always the same ones")
    parser.add_argument("--only", default="", metavar="WORDS", help="guards whose name has these words")
    parser.add_argument("--tries", type=int, default=25, help="discover: how many tests to try for a guard")
    parser.add_argument("--server", default="18", help="the PostgreSQL to play on, as --postgres names it")
    parser.add_argument("tests", nargs="*", help="reach: their files; discover: the only ones to try")
    arguments = parser.parse_intermixed_args()
    arguments.tests = joined(arguments.tests)
    return int(globals()[f"_{arguments.command}"](arguments))


def joined(words: Sequence[str]) -> list[str]:
    """The names of tests that a shell took apart at the spaces in their brackets."""
    names: list[str] = []
    for word in words:
        if names and names[-1].count("[") > names[-1].count("]"):
            names[-1] += f" {word}"
        else:
            names.append(word)
    return names


def _play(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    entries = load()
    chosen = {
        guard: test
        for guard, test in killed(entries).items()
        if arguments.only in guard and int(digest(guard), 16) % arguments.share == 0
    }
    missed = 0
    for result in run([(guard, [test]) for guard, test in chosen.items()], arguments.jobs, arguments.server):
        missed += result["killer"] is not None
        if result["killer"] is None:
            print(f"NOT MISSED: {result['guard']}\n    by {chosen[result['guard']]} {result['broken']}", flush=True)
    print(f"{summary(entries)}; {missed} of {len(chosen)} played were missed, in {time.monotonic() - began:.0f} s")
    return 0 if missed == len(chosen) else 1


def _list(arguments: argparse.Namespace) -> int:
    entries = load()
    for guard in known():
        if arguments.only in guard:
            print(f"{guard}\n    {entries.get(guard, 'NO ENTRY')}")
    print(summary(entries))
    return 0


def _reach(arguments: argparse.Namespace) -> int:
    """Find out which tests can miss which guards, for `discover` to try these first."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda name: _reached(name, arguments.server), arguments.tests or Candidates.files()))
    return 0


def _reached(name: str, server: str) -> None:
    Candidates.FOLDER.mkdir(parents=True, exist_ok=True)
    _pytest(["--reach", str(Candidates.FOLDER / f"{name.replace('::', '-')}.json")], [name], server)


def _discover(arguments: argparse.Namespace) -> int:
    """For each guard without an entry try tests, and record the first that misses it."""
    entries = load()
    candidates = Candidates(entries)
    due = [guard for guard in known() if guard not in entries and arguments.only in guard]
    plan: Plan = [(guard, arguments.tests or candidates.of(guard)[: arguments.tries]) for guard in due]
    found: Entries = {}
    for result in run(plan, arguments.jobs, arguments.server):
        if result["killer"]:
            found[result["guard"]] = result["killer"]
            save({**load(), **found})  # at once: what is found is kept, also when this is stopped
        said = f"{result['killer']}: {result['words']}" if result["killer"] else result["broken"] or "not missed"
        print(f"{result['guard']}\n    {said} ({result['seconds']} s)", flush=True)
    save({**load(), **found})
    print(f"{len(found)} of {len(due)} found; {summary(load())}")
    return 0


def summary(entries: Entries) -> str:
    """The figures."""
    left = sum(guard not in entries for guard in known())
    return f"{len(known())} guards: {len(killed(entries))} missed, {len(reasons(entries))} with a reason, {left} open"


def run(plan: Plan, jobs: int, server: str = "18") -> Iterable[dict[str, Any]]:
    """Play a plan in several processes, and give the results as they come."""
    # All that begins with one test goes to one process, which plays it once as it stands.
    shared = [[each for each in plan if int(digest(str(each[1][:1])), 16) % jobs == number] for number in range(jobs)]
    parts = [part for part in shared if part]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, len(parts))) as pool:
        paths = [Path(folder, f"{number}.json") for number in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            path.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
            path.with_suffix(".out").touch()
        files = [sorted({test.partition("::")[0] for _, tests in part for test in tests}) for part in parts]
        playing = [
            pool.submit(_pytest, ["--mutants", str(path)], names, server)
            for path, names in zip(paths, files, strict=True)
        ]
        places = dict.fromkeys(paths, 0)
        ended = False
        while not ended:
            ended = all(future.done() for future in playing)
            for path in paths:
                lines = path.with_suffix(".out").read_text(encoding="utf-8").splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]
                yield from (json.loads(line) for line in whole[places[path] :])
                places[path] = len(whole)
            time.sleep(0.2)  # between two looks at the files
        for future in playing:
            future.result()


def _pytest(options: Sequence[str], names: Sequence[str], server: str) -> None:
    """Run pytest with the plugin; what it says goes to the error output if it could not play."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "mutants.plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "--timeout",
        "60",
    ]
    command += ["--postgres", server, *options, *(str(TESTS / name) for name in names)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}  # for the plugin, before pytest finds its own way
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, check=False, capture_output=True, text=True)
    if done.returncode not in (0, 5) or options[0] == "--reach":
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
