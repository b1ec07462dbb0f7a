"""The rows of the fault matrix, and the page `docs/faults.md` that says of each by which tests it is covered."""

import json
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"

GROUPS: Mapping[str, str] = {
    "A": "The trainer",
    "B": "Forge and strategist",
    "C": "Temporal and the network",
    "D": "The object store",
    "E": "The database",
    "F": "Deliveries",
    "G": "Long runs",
    "H": "Versions",
    "J": "Two faults at once",
    "I": "Invariants, judged after every test on real records",
}

ROWS: Mapping[str, str] = {
    "A1": "trainer killed with -9 in the middle of an epoch",
    "A2": "trainer killed at every step of a checkpoint",
    "A3": "trainer killed at every step of a graft",
    "A4": "trainer stopped, declared dead, then continued: a zombie",
    "A5": "a step that never ends",
    "A6": "a kernel that ends its process",
    "A7": "out of memory in a graft or with a new kernel",
    "A8": "NaN or infinity in a kernel's weights, output or gradients",
    "A9": "a kernel that raises, once, thrice, now and then, forward or backward",
    "A10": "a kernel ten times slower than it was certified",
    "A11": "a kernel that breaks its contract: shape, dtype, input changed in place, random numbers drawn",
    "A12": "SIGTERM, and a second one",
    "A13": "SIGTERM while the object store is away",
    "A14": "data that raises, ends early or changed",
    "A15": "resume with another number of threads, torch build or device",
    "B1": "forge killed while it builds, after it stored, after it published",
    "B2": "blueprints that ask for too much: memory, time, nodes, processes, files",
    "B3": "hostile names and paths in what a forge reads",
    "B4": "a kernel from a forge with another torch or another machine",
    "B5": "no forge for a long time",
    "B6": "a strategist that fails, times out or answers nonsense",
    "C1": "Temporal server killed with -9, away for 2, 15 and 60 s",
    "C3": "Temporal server gone for good",
    "C4": "trainer cut off from the server",
    "C5": "trainer cut off from the database",
    "C6": "a slow, lossy or half-open connection",
    "C7": "heartbeats refused for being too many",
    "C8": "workflow reset, terminated and started again, the same run id twice",
    "C9": "clocks that are wrong or jump back",
    "D1": "object store away at the start and in the middle",
    "D2": "object store that stalls in the middle of a body",
    "D3": "a body that breaks off",
    "D4": "a flipped bit",
    "D5": "the wrong object under the right name",
    "D6": "a write whose answer was lost",
    "D7": "rights taken away in the middle",
    "D8": "garbage collection beside commits, slow readers and resumes",
    "D9": "disk full",
    "E1": "database locked for 1 s and for 60 s",
    "E2": "database full, read-only, deleted, replaced or damaged",
    "E3": "kill -9 within a transaction",
    "E4": "PostgreSQL started anew, connection lost within a commit",
    "E5": "database restored from an older copy than the objects",
    "E6": "migration interrupted; old worker on a new schema",
    "E7": "SQLite on a network file system",
    "F1": "every signal several times, shuffled, late",
    "F2": "a kernel for a seed that was culled or kept in the meantime",
    "F3": "an acknowledgement lost; a crash between graft and checkpoint",
    "F4": "a storm of signals, signals that are too large or unknown",
    "F5": "two adaptations for one seed at once",
    "G1": "10,000 epochs with 200 grafts: histories, and what one execution hands to the next",
    "G2": "memory, files and threads over many grafts and culls",
    "G3": "kernel cache under pressure",
    "G4": "1,000 blueprints and 10,000 artifacts",
    "H1": "stored histories on the present code",
    "H4": "checkpoints, artifacts, databases and configurations of earlier formats",
    "H5": "a non-determinism put in on purpose is found by the replay",
    "J": "a fault during recovery from another",
    "I1": "the head never regresses but by a recorded fall back",
    "I2": "no adaptation is applied twice in a lineage",
    "I3": "a kernel is applied to the generation of the seed it was made for only",
    "I4": "what a head acknowledged is in every later head",
    "I5": "every row is used once an epoch along the committed line",
    "I6": "seeds move as their lifecycle allows, also over a resume",
    "I7": "what a record names is there, and its bytes are the right ones",
    "I8": "every adaptation ends in one outcome that people can see",
    "I9": "at most one owner can commit",
    "I10": "training never fails by forge or strategist",
    "I11": "the final digest is that of the head, and what the records reproduce",
    "I12": "no secret, no tensor and nothing that runs in histories, logs or artifacts",
}

NOT_INJECTED: Mapping[str, str] = {
    "A6": "a sticky CUDA error: these machines have no GPU. Segfault, kill and exit of the process are injected",
    "A7": "a GPU that is out of memory: these machines have none. The error itself is raised as torch raises it",
    "C6": "delays by `tc netem`: this kernel lacks it. A proxy between the two takes its place",
    "E3": "loss of power: nothing here can cut it. `synchronous=FULL` is proven to be set; kill -9 is injected",
    "H4": "files of earlier releases: there is none yet. Formats are refused or read by their version number",
}
"""What of a row this platform cannot inject, and what stands in its place."""


NOT_RUN = "not run"


@dataclass(frozen=True)
class Result:
    """One test of one or more rows. `cases`: how many of its parametrised cases ran; `outcome`: that of the worst, or
    `NOT_RUN` on this tree."""

    test: str
    rows: tuple[str, ...]
    tier: str
    outcome: str
    cases: int


def read_results(path: Path = RESULTS) -> tuple[Result, ...]:
    """The last results, by test; none when there is no file yet."""
    if not path.exists():
        return ()
    document: dict[str, Any] = json.loads(path.read_text())
    return tuple(Result(**{**each, "rows": tuple(each["rows"])}) for each in document["tests"])


def write_results(results: Sequence[Result], ran_on: str, path: Path = RESULTS) -> None:
    """Write the results, sorted by test, so that a change of one is one changed line."""
    ordered = sorted(results, key=lambda result: result.test)
    lines = ",\n".join(json.dumps(vars(result)) for result in ordered)
    path.write_text(f'{{"schema": 1, "ran_on": {json.dumps(ran_on)}, "tests": [\n{lines}\n]}}\n')


def order(row: str) -> tuple[int, int]:
    """Rows in the order of the matrix."""
    return list(GROUPS).index(row[0]), int(row[1:] or 0)


def page(results: Sequence[Result], ran_on: str) -> str:
    """The whole of `docs/faults.md`."""
    lines = [
        "# Faults",
        "",
        "What may go wrong with a run, and the tests that make it go wrong. Generated by `make test-faults`; the same",
        "as data is in [faults.json](faults.json). `fast` tests run in `make test`, `slow` ones (real kills on a real",
        "stack, long loops) in `make test-faults`.",
        "",
        f"Last run: {ran_on}.",
    ]
    for letter, title in GROUPS.items():
        lines += ["", f"## {title}", "", "| row | what | tests | tier | last result |", "|---|---|---|---|---|"]
        for row in sorted((row for row in ROWS if row[0] == letter), key=order):
            lines.append(_line(row, [result for result in results if row in result.rows]))
    lines += [
        "",
        "## What this platform cannot inject",
        "",
        "| row | what, and what stands in its place |",
        "|---|---|",
    ]
    lines += [f"| {row} | {why} |" for row, why in sorted(NOT_INJECTED.items(), key=lambda item: order(item[0]))]
    return "\n".join(lines) + "\n"


def _line(row: str, tests: Sequence[Result]) -> str:
    shown = "<br>".join(f"`{_short(test.test)}`" for test in sorted(tests, key=lambda test: test.test))
    tiers = " + ".join(sorted({test.tier for test in tests}))
    outcomes = [test.outcome for test in tests]
    cases = sum(test.cases for test in tests)
    if not tests:
        return f"| {row} | {ROWS[row]} | | | no test |"
    others = [word for word in ("failed", "skipped", NOT_RUN) if word in outcomes]
    told = ", ".join(f"{word} ({outcomes.count(word)} of {len(outcomes)} tests)" for word in others)
    if "passed" in outcomes:
        told = f"passed ({cases})" if not others else f"{told}, else passed ({cases})"
    return f"| {row} | {ROWS[row]} | {shown} | {tiers} | {told} |"


def _short(test: str) -> str:
    """Without what every test has: `workflows/test_faults.py::a_run_that_waits`."""
    return test.removeprefix("tests/").replace("::test_", "::")
