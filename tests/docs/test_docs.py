"""README.md and docs/: Python blocks run, commands are understood by the programs that they call, links lead
somewhere, and the site leaves nothing out."""

import argparse
import ast
import dataclasses
import doctest
import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedConfig

import mc_transformers as mc
from mc_transformers.cli.main import build_parser
from mc_transformers.configuration_mc import CHOICES
from mc_transformers.conversion.sources import SOURCES
from mc_transformers.modeling_mc.memories import MEMORIES


ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
IDENTIFIERS = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line of the first line, text) of every fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path, monkeypatch) -> None:
    """The blocks of a page in their order, as a reader would type them into one session in an empty folder, where
    only the checkpoints of the repository lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards", target_is_directory=True)
    names, known = {"__name__": "documentation"}, dict(MEMORIES)
    try:
        for line, text in blocks(page, "python"):
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)
    finally:  # a page may register a memory
        MEMORIES.clear()
        MEMORIES.update(known)


# ----------------------------------------------------------------------------------------------------------- commands
def commands(text: str) -> list[list[str]]:
    """The words of every command of a block: comments, redirections and what stands behind a pipe are left out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        end = next((i for i, word in enumerate(words) if word in ("|", "<", ">")), len(words))
        if words[:end]:
            found.append(words[:end])
    return found


def docstring_commands(program: Path) -> list[list[str]]:
    """The commands that the docstring of a program shows, indented by four spaces."""
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    lines = re.findall(r"^    (?:python|torchrun|accelerate) (?:.*\\\n)*.*$", text, re.MULTILINE)
    return [command for line in lines for command in commands(line)]


class Parsed(Exception):
    """Ends a program once it has understood its arguments."""


def parse_with_the_program(path: Path, argv: list[str]) -> argparse.Namespace:
    """What the program's own parser makes of `argv`; the program itself does not go on."""
    original, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse(self, args=None, namespace=None):
        nonlocal depth
        depth += 1
        try:
            found, rest = original(self, args, namespace)
        finally:
            depth -= 1
        if depth:  # of a subcommand
            return found, rest
        assert not rest, f"unknown arguments: {rest}"
        raise Parsed(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", [str(path), *argv])
        patch.syspath_prepend(str(path.parent))
        with pytest.raises(Parsed) as stopped:
            runpy.run_path(str(path), run_name="__main__")
    return stopped.value.args[0]


def check_program(words: list[str]) -> None:
    """`examples/x.py --option ...` or `-m module ...`."""
    if words[0] == "-m":
        if words[1].startswith("benchmarks."):
            return check_program([words[1].replace(".", "/") + ".py", *words[2:]])
        assert words[1] in ("mc_transformers", "pytest"), f"unknown module {words[1]}"
        check = {"mc_transformers": check_cli, "pytest": check_files}[words[1]]
        return check(words[2:])
    path = ROOT / words[0]
    source = path.read_text(encoding="utf-8")
    if "ArgumentParser" not in source:
        assert not [word for word in words[1:] if word.startswith("-")], f"{words[0]} takes no options"
        return None
    found = parse_with_the_program(path, words[1:])
    for option in ("config", "options"):
        if isinstance(fields := getattr(found, option, None), str) and fields.startswith("{"):
            assert json.loads(fields).keys() <= {field.name for field in dataclasses.fields(mc.MCConfig)}
            mc.MCConfig(**json.loads(fields))
    if preset := getattr(found, "preset", None):
        mc.MCConfig.from_preset(preset)


def check_cli(words: list[str]) -> None:
    build_parser().parse_args(words)


def check_files(words: list[str]) -> None:
    for word in words:
        assert word.startswith("-") or (ROOT / word.split("::")[0]).exists(), word


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"make {target}"


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    found = launch_command_parser().parse_args(words[1:])
    check_program([found.training_script, *found.training_script_args])


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    found = get_args_parser().parse_args(words)
    check_program([found.training_script, *found.training_script_args])


def check_pip(words: list[str]) -> None:
    """Extras that are asked for exist."""
    assert words[0] == "install"
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extra in re.findall(r"^\.\[(\w+)\]$", "\n".join(words), re.MULTILINE):
        assert f'"{extra}": {extra.upper()}' in setup, f"setup.py has no extra {extra}"


def check_clone(words: list[str]) -> None:
    """The address is left to the reader."""
    assert words[0] == "clone" and " ".join(words[1:]).startswith("<address of this repository>")


CHECKS = {
    "git": check_clone,
    "cd": lambda words: None,
    "python": check_program,
    "mc-transformers": check_cli,
    "make": check_make,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "pip": check_pip,
}
COMMANDS = [
    pytest.param(words, id=f"{page.name}:{line}:{number}")
    for page in PAGES
    for line, text in blocks(page, "bash")
    for number, words in enumerate(commands(text))
]
COMMANDS += [
    pytest.param(words, id=f"{program.name}:{number}")
    for program in sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
    for number, words in enumerate(docstring_commands(program))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_command_is_understood(words: list[str]) -> None:
    """By the parser of the program that it calls; nothing is trained, installed or uploaded."""
    assert words[0] in CHECKS, f"nobody knows how to check {words[0]!r}"
    CHECKS[words[0]](words[1:])


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "mc-transformers generate x --no-such-option",
        "python examples/no_such_file.py",
        "python examples/train_lm.py --no_such_option 1",
        "python examples/train_lm.py --output_dir x --config '{\"no_such_field\": 1}'",
        "python -m benchmarks.tasks.recall --options '{\"no_such_field\": 1}'",
        "torchrun --nproc_per_node 2 examples/train_lm.py --no_such_option 1",
        "accelerate launch --no_such_option 1 examples/train_lm.py",
        "pip install -e '.[nothing]'",
        "python examples/demo.py --no_such_option 1",
    ],
)
def test_a_wrong_command_is_seen(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises((AssertionError, SystemExit, ValueError, OSError, pytest.fail.Exception)):
        CHECKS[words[0]](words[1:])


# --------------------------------------------------------------------------------------------------------------- site
def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    missing = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or anchor and anchor not in anchors(target):
            missing.append(link)
    assert not missing
    if page in DOCS:  # the site has nothing else
        assert not [link for link in links if link.startswith("..")]


def test_readme_names_both_commands() -> None:
    text, makefile = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("demo", "test"):
        assert f"make {command}" in text and f"\n{command}:" in makefile
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().endswith("make test")


def test_readme_counts_the_parameters_of_presets() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r'`"(mc-[\w.]+)"`', text)
    (counts,) = re.findall(r"^\| parameters.*?((?:\| \d+M )+)\|$", text, re.MULTILINE)
    with torch.device("meta"):
        sizes = [mc.MCForCausalLM(mc.MCConfig.from_preset(name)).num_parameters() for name in names]
    assert len(names) == 4 and re.findall(r"\d+", counts) == [f"{size / 1e6:.0f}" for size in sizes]


def test_readme_explains_every_rule() -> None:
    """Write and read rules, in few words each."""
    tables = re.findall(
        r"^\| `(memory|aggregation)`: .*\n((?:\|.*\n)+)", (ROOT / "README.md").read_text("utf-8"), re.M
    )
    rules = {
        field: [name for cell in re.findall(r"^\| (`.*?) \|", rows, re.M) for name in re.findall(r"`(\w+)`", cell)]
        for field, rows in tables
    }
    assert sorted(rules["memory"]) == sorted(MEMORIES)
    assert sorted(rules["aggregation"]) == sorted(CHOICES["aggregation"])


def test_navigation_has_every_page() -> None:
    def pages(entries: list | dict | str) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        inner = entries if isinstance(entries, list) else entries.values()
        return [page for entry in inner for page in pages(entry)]

    missing = {str(page.relative_to(ROOT / "docs")) for page in DOCS} ^ set(pages(SITE["nav"]))
    assert not missing, f"not both in docs/ and in the navigation of mkdocs.yml: {missing}"


def test_pictures_are_drawn_and_shown(tmp_path, monkeypatch) -> None:
    """`docs/draw.py` runs, and every picture that lies in docs/images is on a page."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import draw

    assert draw.fenwick(37) == [(0, 32), (32, 4), (36, 1)]
    monkeypatch.setattr(draw, "FOLDER", tmp_path / "images")
    draw.main()
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    kept = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    shown = {Path(name).name for page in PAGES for name in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8"))}
    assert drawn <= kept <= shown


def test_site_needs_no_network() -> None:
    assert SITE["theme"]["font"] is False
    assert "extra_javascript" not in SITE and "extra_css" not in SITE


# ---------------------------------------------------------------------------------------------------------- reference
def resolve(identifier: str) -> object:
    """The object that `a.b.C.d` names."""
    parts = identifier.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[length:], module)
    raise AssertionError(f"no module in {identifier}")


def listed_members() -> list[str]:
    """`Class.member` for every member that the reference shows."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: (\S+)\n    options:\n      members: \[(.*)\]$", text, re.MULTILINE)
    return [f"{name}.{member}" for name, members in found for member in members.split(", ")]


@pytest.mark.parametrize("identifier", IDENTIFIERS + listed_members())
def test_what_the_reference_shows_is_documented(identifier: str) -> None:
    found = resolve(identifier)
    assert inspect.getdoc(found), f"{identifier} has no docstring"
    own = found.fget if isinstance(found, property) else found
    assert own.__doc__, f"{identifier} inherits its docstring"


@pytest.mark.parametrize("identifier", [name for name in IDENTIFIERS if ">>>" in (resolve(name).__doc__ or "")])
def test_examples_of_docstrings_run(identifier: str) -> None:
    names = {name: getattr(mc, name) for name in mc.__all__} | {"torch": torch}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(resolve(identifier)), names, identifier, None, None)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_reference_shows_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in mc.__all__:
        assert f"mc_transformers.{name}\n" in text or f"`mc_transformers.{name}`" in text, name
    for command in build_parser()._subparsers._group_actions[0].choices:
        assert f"| `{command}` |" in text, command


def test_every_kind_of_checkpoint_is_in_the_guide() -> None:
    text = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == {*SOURCES, "training"}


def test_every_field_is_documented_with_its_default() -> None:
    """The class docstring of MCConfig names every field once, with the default that it has."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    documented = dict(re.findall(r"^ {4}(\w+) \((.*?)\): ", inspect.getdoc(mc.MCConfig), re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(mc.MCConfig)}
    assert set(fields) - inherited <= set(documented) <= set(fields)
    for name, about in documented.items():
        default = json.dumps(fields[name]) if isinstance(fields[name], str) else repr(fields[name])
        assert about.endswith("*optional*" if fields[name] is None else f"defaults to `{default}`"), name
