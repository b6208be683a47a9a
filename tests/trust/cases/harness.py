"""A case runs in a forked process of its own, with limits of time and memory, and is judged by what it left behind."""

import io
import json
import os
import re
import resource
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from mc_transformers.cli import main as cli


SECONDS, MEMORY = 10, 16 * 2**30  # of one case
Case = Callable[[Path], str]  # gets an empty folder, gives in a word what was right; raises Bad
Cases = dict[str, Case]


class Bad(Exception):
    """What is not good: "lost", "ran code", "silent", "unclear"."""

    def __init__(self, kind: str, note: object = "") -> None:
        super().__init__(kind, str(note)[:400])
        self.kind, self.note = kind, str(note)[:400]


@dataclass
class Outcome:
    """Of one case. `kind`: "refused" or "right", else what was wrong."""

    group: str
    case: str
    kind: str
    seconds: float
    note: str = ""

    @property
    def good(self) -> bool:
        return self.kind in ("refused", "right")


def expect(condition: bool, kind: str, note: object = "") -> None:
    """Raises: Bad: unless `condition`."""
    if not condition:
        raise Bad(kind, note)


def run(group: str, name: str, case: Case, seconds: float = SECONDS) -> Outcome:
    """Run one case in a fork."""
    start = time.perf_counter()
    receive, send = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        child = os.fork()
        if child == 0:
            _work(case, Path(folder), send)
        os.close(send)
        ready, _, _ = select.select([receive], [], [], seconds)
        found = os.read(receive, 2**16) if ready else b""
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = os.waitpid(child, 0)[1]
        os.close(receive)
    spent = round(time.perf_counter() - start, 2)
    if not ready:
        return Outcome(group, name, "hang", spent, f"still running after {seconds} s")
    if not found:
        return Outcome(group, name, "crash", spent, f"exit status {status}")
    return Outcome(group, name, *json.loads(found)[:1], spent, *json.loads(found)[1:])


def _work(case: Case, folder: Path, send: int) -> None:
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            answer = case(folder), ""
    except Bad as bad:
        answer = bad.kind, bad.note
    except BaseException:
        answer = "unclear", traceback.format_exc()[-400:]
    try:
        os.write(send, json.dumps(answer).encode())
    finally:
        os._exit(0)


# ------------------------------------------------------------------------------------------------------------- judging
def command(*argv: object) -> tuple[int, str]:
    """Exit code and stderr of a call of the command line."""
    with redirect_stderr(io.StringIO()) as err:
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as ended:
            code = ended.code
    return code, err.getvalue()


def refused(argv: list, words: list[object], output: Path | None = None) -> str:
    """A command ends with one line that names one of the `words`, and leaves no output."""
    code, err = command(*argv)
    expect(code != 0, "silent", f"{argv}: accepted")
    line = err.rstrip("\n").splitlines()[-1] if err.strip() else ""
    line = line[max(0, line.rfind("mc-transformers ")) :]  # a bar of progress may stand before it
    expect(line.startswith(f"mc-transformers {argv[0]}: error: ") and len(line) < 2500, "unclear", line)
    expect(not re.search(r"error: \w+(Error|Exception): |Traceback", err), "unclear", line)
    expect(any(str(word) in line for word in words), "unclear", f"{words} not in {line}")
    expect(output is None or not output.exists(), "silent", "an output of a refused call")
    return "refused"


def accepted(argv: list) -> str:
    """A command succeeds."""
    code, err = command(*argv)
    expect(code == 0, "unclear", err.splitlines()[-1:])
    return "right"


def raises(call: Callable[[], object], words: list[str], kinds: tuple = (ValueError, OSError)) -> str:
    """A call ends in a documented error that names one of the `words`."""
    try:
        call()
    except kinds as error:
        text = str(error)
        expect(any(word in text for word in words) and len(text) < 2500, "unclear", f"{words} not in {text}")
        return "refused"
    raise Bad("silent", "accepted")


# -------------------------------------------------------------------------------------------------------------- report
def summary(outcomes: list[Outcome]) -> list[dict]:
    """Per group: tried, good, and what was not good."""
    rows: dict[str, dict] = {}
    for each in outcomes:
        row = rows.setdefault(each.group, {"group": each.group, "tried": 0, "good": 0, "not_good": []})
        row["tried"] += 1
        row["good"] += each.good
        if not each.good:
            row["not_good"].append(asdict(each))
    return list(rows.values())


def table(rows: list[dict]) -> str:
    """The same as Markdown."""
    lines = ["| group | tried | good | not good |", "|---|---|---|---|"]
    for row in rows:
        kinds: dict[str, int] = {}
        for each in row["not_good"]:
            kinds[each["kind"]] = kinds.get(each["kind"], 0) + 1
        bad = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        lines.append(f"| {row['group']} | {row['tried']} | {row['good']} | {bad} |")
    tried, good = (sum(row[name] for row in rows) for name in ("tried", "good"))
    return "\n".join([*lines, f"| all | {tried} | {good} | |"])
