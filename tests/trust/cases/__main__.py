"""All cases of files, interruptions and misuse, and a table of them: `python tests/trust/cases --output FILE`.

`--only WORD` runs the groups whose name holds the word, `--part N` those of one file, and what the output file has of
other groups stays.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path


TRUST = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TRUST), str(TRUST.parent), str(TRUST.parent / "hub")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")

import caches  # noqa: E402
import checkpoints  # noqa: E402
import memories  # noqa: E402
import outputs  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from harness import SECONDS, run, summary, table  # noqa: E402
from tqdm import tqdm  # noqa: E402

from mc_transformers.hub.files import write_file  # noqa: E402


PARTS = {"checkpoints": checkpoints, "memories": memories, "outputs": outputs, "caches": caches}
SLOW = {"10^6 tokens in one pass": 60, "code of a bundle": 60}  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", metavar="FILE", help="write the rows as JSON; groups that did not run now stay in it"
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="(all)")
    parser.add_argument("--only", metavar="WORD", default="", help="groups whose name holds this")
    parser.add_argument(
        "--factor", type=float, default=1.0, help="of the limits of time, on a busy machine (%(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    output = Path(args.output) if args.output else None
    known = json.loads(output.read_text())["groups"] if output and output.exists() else []
    rows = {row["group"]: row for row in known}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.part or PARTS:
            for group, cases in PARTS[part].groups(Path(folder) / part).items():
                if args.only not in group:
                    continue
                limit = args.factor * SLOW.get(group, SECONDS)
                outcomes = [run(group, name, case, limit) for name, case in tqdm(cases.items(), desc=group)]
                rows |= {row["group"]: row for row in summary(outcomes)}
                if output:
                    write_file(output, json.dumps(record(list(rows.values())), indent=1) + "\n")
    print(table(list(rows.values())))
    for row in rows.values():
        for each in row["not_good"]:
            print(f"{each['kind']}: {each['group']}: {each['case']}: {each['note']}")
    return int(any(row["not_good"] for row in rows.values()))


def record(rows: list[dict]) -> dict:
    """What is written: how and where the cases ran, and the rows."""
    return {
        "command": "python tests/trust/cases",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "tried": sum(row["tried"] for row in rows),
        "good": sum(row["good"] for row in rows),
        "groups": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
