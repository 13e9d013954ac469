"""The command of the golden runs.

python -m tests.golden compare                    the present tree with the recorded commits of BASE
python -m tests.golden compare --only secure lordo --base HEAD~3
python -m tests.golden store                      keep hashes of the recorded commits for this machine
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.golden.compare import Verdict, compare
from tests.golden.hashes import store
from tests.golden.record import PRESENT, Recording, record
from tests.golden.table import CORPUS, DEFAULT, Table, read_base, read_table
from tests.golden.worktree import NoHistoryError, checkout, full_hash, git


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if all runs are equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser("compare", help="do the runs with two commits' code, here and now")
    comparing.add_argument("--base", metavar="COMMIT", help="the recorded commit, in place of those in BASE")
    comparing.add_argument("--only", metavar="NAME", nargs="+", help="some of the runs")
    comparing.add_argument("--output", metavar="DIR", type=Path, help="folder for both recordings, as JSON")
    commands.add_parser("store", help="keep hashes of the recorded commits' runs for this machine")
    options = parser.parse_args(arguments)
    table = read_table()
    try:
        if options.command == "store":
            return _store(table)
        names = options.only or table.names()
        if unknown := sorted(set(names) - set(table.runs)):
            parser.error(f"no such run: {', '.join(unknown)}; there are {', '.join(table.runs)}")
        return compare_present(table, names, options.base, options.output)
    except (NoHistoryError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"golden: {error}\n")
        return 2


def compare_present(
    table: Table, names: Sequence[str], base: str | None = None, output: Path | None = None
) -> int:
    """Compare the present tree, as it lies there, with recorded commits; return the exit code."""
    verdicts: list[Verdict] = []
    for commit, chosen in by_commit(names, base).items():
        sys.stderr.write(f"golden: {len(chosen)} runs with the code of {commit[:7]} and the present one\n")
        before, now = record([checkout(commit), PRESENT], table, chosen)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            before.write(output / f"{commit[:7]}.json")
            now.write(output / f"{commit[:7]}-present.json")
        corpora = sorted({f"{CORPUS}{table.runs[name].corpus}" for name in chosen})
        ends_as = {name: other for name in chosen if (other := table.runs[name].ends_as) is not None}
        verdicts += compare(before, now, [*corpora, *chosen], ends_as)
    sys.stdout.write("".join(f"{verdict}\n" for verdict in verdicts))
    runs = [verdict for verdict in verdicts if not verdict.run.startswith(CORPUS)]
    equal = sum(verdict.equal for verdict in runs)
    commits = ", ".join(commit[:7] for commit in by_commit(names, base))
    ok = all(verdict.equal for verdict in verdicts)
    sys.stdout.write(f"{equal} of {len(runs)} runs equal: {commits} {'=' if ok else '≠'} {_present()}\n")
    return 0 if ok else 1


def by_commit(names: Sequence[str], base: str | None) -> dict[str, list[str]]:
    """Return commit to the runs that are compared with it."""
    bases = read_base()
    grouped: dict[str, list[str]] = {}
    for name in names:
        commit = base or bases.get(name, bases[DEFAULT])
        grouped.setdefault(full_hash(commit), []).append(name)
    return grouped


def _present() -> str:
    head = full_hash("HEAD")[:7]
    return f"{head} with changes" if git(PRESENT, "status", "--porcelain") else head


def _store(table: Table) -> int:
    for commit, names in by_commit(table.names(), None).items():
        recordings: list[Recording] = record(2 * [checkout(commit)], table, names)
        verdicts = compare(*recordings, names, {})
        if different := [verdict for verdict in verdicts if not verdict.equal]:
            sys.stderr.write("".join(f"{verdict}\n" for verdict in different))
            sys.stderr.write("golden: the code differs from itself, so nothing is stored\n")
            return 1
        store(recordings[0])
        sys.stdout.write(f"{len(names)} runs of {commit[:7]} stored for: {recordings[0].machine}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
