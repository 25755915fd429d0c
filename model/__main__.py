"""`make model`: explore every configuration and every mutated protocol, and print what was found."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from model.configurations import CROWDS, QUICK, configuration
from model.explore import Result, explore
from model.mutants import MUTANTS, Mutant


def main() -> int:
    """Run; answer 1 if the protocol broke or a mutated one did not."""
    parser = argparse.ArgumentParser(prog="python -m model", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the reduced set of configurations")
    parser.add_argument("--traces", action="store_true", help="tell each mutated protocol's shortest way to fail")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    arguments = parser.parse_args()
    began = time.monotonic()
    names = list(QUICK if arguments.quick else reversed(CROWDS))  # the largest first
    with ProcessPoolExecutor(arguments.jobs) as pool:
        configurations = pool.map(run, names)
        mutants = pool.map(hunt, range(len(MUTANTS)))
        right = show_configurations(configurations)
        right &= show_mutants(zip(MUTANTS, mutants, strict=True), arguments.traces)
    print(f"{'as it should be' if right else 'NOT AS IT SHOULD BE'}, in {time.monotonic() - began:.0f} s")
    return 0 if right else 1


def run(name: str) -> Result:
    """Explore one configuration."""
    return explore(configuration(name))


def hunt(number: int) -> Result:
    """Explore one mutated protocol."""
    return MUTANTS[number].hunt()


def show_configurations(results: Iterable[Result]) -> bool:
    """Print a line for each, and the way to what broke. Answers whether nothing did."""
    right, states, steps = True, 0, 0
    print(f"{'the protocol as it is':<62}{'states':>11}{'steps':>12}{'depth':>7}{'seconds':>9}")
    for result in results:
        print(
            f"  {result.name:<60}{result.states:>11,}{result.steps:>12,}{result.depth:>7}{result.seconds:>9.1f}",
            flush=True,
        )
        states, steps = states + result.states, steps + result.steps
        if result.broken:
            right = False
            tell(result)
    print(f"{'':<62}{states:>11,}{steps:>12,}")
    return right


def show_mutants(found: Iterable[tuple[Mutant, Result]], traces: bool) -> bool:
    """Print a line for each. Answers whether each broke what it should."""
    right = True
    print(f"{'one guard taken away':<62}{'states':>11}{'steps of the shortest trace':>29}")
    for mutant, result in found:
        caught = (result.broken or "").startswith(mutant.breaks) if mutant.breaks else result.broken is None
        length = str(len(result.trace) - 1) if result.trace else "none: guarded twice"
        wrong = "" if caught else "  NOT CAUGHT" if mutant.breaks else "  NO LONGER GUARDED TWICE"
        print(f"  {mutant.name:<60}{result.states:>11,}{length:>29}{wrong}", flush=True)
        right &= caught
        if result.trace and (traces or not caught):
            tell(result)
    return right


def tell(result: Result) -> None:
    """Print a trace."""
    for number, line in enumerate(result.trace):
        print(f"    {number or '':>3} {line}")
    print(f"        => {result.broken}")


if __name__ == "__main__":
    sys.exit(main())
