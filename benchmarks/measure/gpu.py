# Copyright 2026 the mc-transformers authors.
"""The Triton kernels on a GPU: are they right, and how fast are they. One run of so many minutes.

    python -m benchmarks.measure.gpu --minutes 9                # everything, into results/gpu.json
    python -m benchmarks.measure.gpu --only correctness ops     # some parts; the rest stays if it is of this commit
    TRITON_INTERPRET=1 python -m benchmarks.measure.gpu --smoke --output /tmp/smoke.json   # tiny, without a GPU

Parts, in this order: `compile` (kernels ahead, in as many processes as there are cores), `peaks` (what this GPU does
at most), `correctness` (every op and its gradients against torch in float64), `ops` (beside attention by torch's flash
and cuDNN kernels), `profile` (the kernels in which a training step spends its time), `layer` (training and prefill of
one layer, beside attention), `decode` (one token of one layer, with a cache of random states) and `deep` (deep
memories, and torch's own operations). Times are medians of `triton.testing.do_bench` with the 20 % and 80 % quantiles,
bf16.

Cases run in a process of their own. One that hangs is killed after its limit, one that fails or kills its process is
recorded with its error, and the next one gets a new process where that is needed. The file is rewritten after every
case. Cases for which there is no time or memory are recorded as left out. Rows of flash-linear-attention appear where
it is installed.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measure.gpu_cases import SHARE, SMOKE, Case, LeftOut, every_case


MARK = "mc-result "  # in front of an answer, among what else a process may print
START = 90.0  # seconds until a process must have begun
WORKER = [sys.executable, "-u", "-m", "benchmarks.measure.gpu", "--worker", *["--smoke"] * SMOKE]


# -------------------------------------------------------------------------------------------------- the other process
def machine() -> dict:
    """What the numbers depend on; no name of a host or a user."""
    versions = {}
    for package in ("torch", "triton", "transformers", "flash-linear-attention"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = "cpu, interpreted" if SMOKE else torch.cuda.get_device_name()
    return {"device": device, **versions, "cuda": torch.version.cuda, "python": platform.python_version()}


def run_case(case: Case) -> dict:
    """The row of a case: what it found, or why there is nothing."""
    torch.manual_seed(0)
    try:
        return case.key | case.run()
    except LeftOut as reason:
        return case.key | {"left_out": str(reason)}
    except torch.OutOfMemoryError:
        return case.key | {"left_out": "out of memory"}
    except Exception as error:  # one case that fails must not end the run
        return case.key | {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()


def usable() -> bool:
    """Whether the device still works: an error may have broken it for this process."""
    try:
        if not SMOKE:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return True
    except RuntimeError:
        return False


def work() -> None:
    """Answer numbers of cases on stdin with their rows, until there are no more."""
    cases = every_case()
    print(MARK + json.dumps(machine()), flush=True)
    for line in sys.stdin:
        row = run_case(cases[int(line)])
        print(MARK + json.dumps({"row": row, "usable": usable()}), flush=True)


class Worker:
    """A process that runs cases, watched.

    Args:
        command: how to start it.
    """

    def __init__(self, command: list[str] | None = None) -> None:
        self.command, self.process, self.machine = command or WORKER, None, {}

    def _read(self, process: subprocess.Popen, answers: queue.Queue) -> None:
        for line in process.stdout:
            if line.startswith(MARK):
                answers.put(json.loads(line[len(MARK) :]))
        answers.put(None)

    def _answer(self, seconds: float) -> dict:
        """The next answer. Raises: TimeoutError, or ConnectionError where the process has ended."""
        try:
            found = self.answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.stop()
            raise TimeoutError(f"killed after {seconds:.0f} s") from None
        if found is None:
            code = self.process.wait()
            self.process = None
            raise ConnectionError(f"the process ended with {code}")
        return found

    def start(self, seconds: float = START) -> None:
        """Begin, if it has not. Raises: as `_answer`."""
        if self.process is None:
            self.answers: queue.Queue = queue.Queue()
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, args=(self.process, self.answers), daemon=True).start()
            self.machine = self._answer(seconds)

    def run(self, number: int, case: Case, seconds: float) -> dict:
        """The row of case `number`, whatever happens; `seconds` says how long it took in all."""
        begin = time.monotonic()
        row = self._row(number, case, seconds)
        return row | {"seconds": round(time.monotonic() - begin, 1)}

    def _row(self, number: int, case: Case, seconds: float) -> dict:
        try:
            self.start()
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
            found = self._answer(min(case.limit, seconds))
            if not found["usable"]:
                self.stop()
            return found["row"]
        except (TimeoutError, OSError) as error:
            self.stop()
            return case.key | {"error": str(error) or type(error).__name__}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


# ------------------------------------------------------------------------------------------------------ all of it
def commit_of(given: str | None) -> str:
    """The commit that is measured: what was given, or what git says."""
    if given is not None:
        return given
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True)
        if found.returncode:
            return "unknown"
        changed = subprocess.run(
            [*here, "diff", "--quiet", "HEAD", "--", "../../kernels", "../../modeling_mc"]
        ).returncode
    except OSError:  # no git
        return "unknown"
    return found.stdout.strip() + ("+changes" if changed else "")


def save(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = ",\n".join(json.dumps(row) for row in found["rows"])
    partial.write_text(f'{{"machine": {json.dumps(found["machine"])},\n"rows": [\n{lines}\n]}}\n')
    partial.replace(path)


def compile_ahead(cases: list[tuple[int, Case]], deadline: float, workers: list[Worker]) -> list[dict]:
    """Run the cases of the part `compile`, as many at once as there are workers, of which the first is kept; what a
    process compiles stays on disk for all."""
    waiting: queue.Queue = queue.Queue()
    for case in cases:
        waiting.put(case)

    def serve(worker: Worker) -> list[dict]:
        rows = []
        while time.time() < deadline:
            try:
                number, case = waiting.get_nowait()
            except queue.Empty:
                break
            rows.append(worker.run(number, case, deadline - time.time()))
        if worker is not workers[0]:
            worker.stop()
        return rows

    with ThreadPoolExecutor(len(workers)) as pool:
        rows = [row for found in pool.map(serve, workers) for row in found]
    rest = []
    while not waiting.empty():
        rest.append(waiting.get()[1].key | {"left_out": "no time was left"})
    return rows + rest


def measure(options: argparse.Namespace) -> list[dict]:
    """Run the cases; every row is written at once. Returns their rows."""
    started = time.time()
    every = list(enumerate(every_case()))
    cases = [(n, c) for n, c in every if c.part in options.only and options.cases in c.name]
    names = [case.key for _, case in cases]
    seconds = 60 * options.minutes
    ahead = [(n, c) for n, c in cases if c.part == "compile"]
    processes = max(1, min(len(ahead), options.processes or (os.cpu_count() or 3) - 2))
    workers = [Worker() for _ in range(processes)]
    compiled = compile_ahead(ahead, started + seconds * SHARE["compile"], workers)
    worker = workers[0]
    worker.start()
    about = {"commit": commit_of(options.commit), "date": datetime.now(timezone.utc).isoformat("T", "seconds")}
    found = {"machine": worker.machine | about, "rows": []}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        if known["machine"] | {"date": ""} == found["machine"] | {"date": ""}:
            found["rows"] = [r for r in known["rows"] if not any(key.items() <= r.items() for key in names)]
    found["rows"] += compiled
    save(options.output, found)
    with tqdm([x for x in cases if x[1].part != "compile"], mininterval=5) as progress:
        for number, case in progress:
            progress.set_postfix_str(" ".join(map(str, case.key.values())), refresh=False)
            left = started + seconds * SHARE[case.part] - time.time()
            row = worker.run(number, case, left) if left > 0 else case.key | {"left_out": "no time was left"}
            found["rows"].append(row)
            save(options.output, found)
            if "error" in row or row.get("ok") is False:
                tqdm.write(f"{row}")
    worker.stop()
    return [r for r in found["rows"] if any(key.items() <= r.items() for key in names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(SHARE), default=list(SHARE))
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "gpu.json")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--processes", type=int, help="that compile (the machine's cores, less two)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if SMOKE != (os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("--smoke needs TRITON_INTERPRET=1, and only --smoke can be measured with it")
    if options.worker:
        work()
        return
    rows = measure(options)
    wrong = [r for r in rows if r["part"] == "correctness" and not r.get("ok")]
    failed, left_out = sum("error" in r for r in rows), sum("left_out" in r for r in rows)
    print(f"{len(rows)} cases, {len(wrong)} incorrect, {failed} failed, {left_out} left out: {options.output}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
