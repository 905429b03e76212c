"""Can damaged or forged files crash, hang or bloat a reader? Prints JSON; ``python benchmarks/hostile_files.py``.

Damages intact files of ``tests/interop/test_hostile_files.py`` and ``test_hostile_folders.py`` at random and reads
them. Any undocumented error, more than a second of CPU or 2 MB of memory is a problem, and exit code 1.
"""

import argparse
import json
import logging
import os
import platform
import resource
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "interop"))

import test_hostile_files
import test_hostile_folders
from _pytest.outcomes import Failed


def resident_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--files", type=int, default=10_000, help="total number, shared between readers and kinds of damage"
    )
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # Orbax logs files that it cannot read
    sys.unraisablehook = lambda _: None
    suites = (test_hostile_files, test_hostile_folders)
    cases = [(suite, *case) for suite in suites for case in suite.CASES]
    report, problems = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for suite in suites:
            (Path(temporary) / suite.__name__).mkdir()
            suite.write_sources(Path(temporary) / suite.__name__)
        before = resident_mib()
        for number, (suite, read, damage, name) in enumerate(cases):
            count = options.files * (number + 1) // len(cases) - options.files * number // len(cases)
            source, target = Path(temporary) / suite.__name__ / name, Path(temporary) / "damaged"
            allowed = getattr(suite, "ALLOWED", test_hostile_files.FileFormatError)
            what = {"reader": read.__name__, "damage": damage.__name__, "to": name}
            try:
                read(source)
                found = test_hostile_files.fuzz(
                    read, damage, source, target, count=count, seed=options.seed, allowed=allowed
                )
            except (AssertionError, Failed) as error:
                problems.append({**what, "problem": str(error)})
            else:
                report.append({**what, **found._asdict()})
    print(
        json.dumps(
            {
                "files": sum(entry["files"] for entry in report),
                "refused": sum(entry["refused"] for entry in report),
                "slowest_s": max(entry["slowest_s"] for entry in report),
                "peak_bytes": max(entry["peak_bytes"] for entry in report),
                "resident_growth_mib": resident_mib() - before,
                "problems": problems,
                "cases": report,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            },
            indent=1,
        )
    )
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
