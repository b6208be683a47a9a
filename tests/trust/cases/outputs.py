"""Outputs and repositories: what is replaced, and what an interruption leaves."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

from checkpoints import Checkpoint, argv
from harness import Case, Cases, accepted, command, expect, refused
from huggingface_hub import constants
from test_outputs import NEW, OLD, fill, settled, tree, write
from transformers.utils import hub as transformers_hub

import fake_hub
from mc_transformers.cli import main as cli
from mc_transformers.hub import bundle, files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def paths(good: Checkpoint) -> Cases:
    def kept(name: str, prepare, output: str, words: list[str], *more: str) -> Case:
        """The command on `source`: refused with `words`, or done if there are none. What is there stays."""

        def work(place: Path) -> str:
            shutil.copytree(good.folder, place / "source")
            prepare(place)
            os.chdir(place)
            before = contents(place)
            call = [*argv(name, Path("source"), Path(output)), *more]
            result = refused(call, words) if words else accepted(call)
            after = contents(place)
            lost = [path for path, data in before.items() if after.get(path) != data and not path.startswith("old/")]
            expect(not lost, "lost", lost)
            if not words:
                expect(any(path.startswith(f"{output}/model") for path in after), "silent", "no output")
            return result

        return work

    def nothing(place: Path) -> None:
        pass

    def neighbours(place: Path) -> None:
        for end in (".partial", ".replaced.partial", ".tmp", ".old"):
            fill(place / f"out{end}", "old")

    def partial(name: str) -> Case:
        def work(place: Path) -> str:
            source = Path(shutil.copytree(good.folder, place / "q.partial"))
            before = contents(source)
            result = accepted(argv(name, source, place / "q"))
            expect(contents(source) == before and (place / "q" / "model.safetensors").exists(), "lost", "the source")
            return result

        return work

    def link(to: str):
        def prepare(place: Path) -> None:
            fill(place / "full", "old")
            (place / "empty").mkdir()
            (place / "link").symlink_to(to)

        return prepare

    def to_source(place: Path) -> None:
        (place / "link").symlink_to("source")

    def a_file(place: Path) -> None:
        (place / "out").write_text("old")

    cases = {f"beside {name}'s own source q.partial": partial(name) for name in ("convert", "bundle")}
    cases |= {f"neighbours, {name}": kept(name, neighbours, "out", []) for name in ("convert", "bundle")}
    over = "--overwrite"
    for output, word in (("source", "would replace"), ("source/../source", "would replace"), (".", "current folder")):
        cases[f"to {output}"] = kept("convert", nothing, output, [word], over)
    for name in ("convert", "bundle"):
        cases[f"into the source, {name}"] = kept(name, nothing, "source/in", ["lies in"], over)
        cases[f"into the source by a link, {name}"] = kept(name, to_source, "link/in", ["lies in"], over)
        cases[f"a link to the source, {name}"] = kept(name, to_source, "link", ["symbolic link"], over)
    for to in ("full", "empty", "nowhere"):
        cases[f"a link to {to}"] = kept("bundle", link(to), "link", ["symbolic link"], over)
    cases["a mount point"] = kept("convert", nothing, "/proc", ["mount point", "current folder"], over)
    cases["the folder above"] = kept("convert", nothing, "..", ["current folder", "no name"], over)
    cases["a file"] = kept("convert", a_file, "out", ["exists already"], over)
    cases["not empty"] = kept("convert", lambda place: fill(place / "old", "x"), "old", ["exists already"])
    cases["replaced"] = kept("convert", lambda place: fill(place / "old", "x"), "old", [], over)
    cases["an empty folder"] = kept("bundle", lambda place: (place / "out").mkdir(), "out", [])
    cases["in a new folder"] = kept("bundle", nothing, "deep/out", [])
    return cases


def stopped(good: Checkpoint) -> Cases:
    def case(kind: int, seed: int, old: bool) -> Case:
        def work(place: Path) -> str:
            files.GRACE, output = -1, place / "out"
            if old:
                fill(output, "old")
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                try:
                    command(*argv("bundle", good.folder, output), *(["--overwrite"] if old else []))
                finally:
                    os._exit(0)
            time.sleep(random.Random(seed).random() * 0.8)
            os.kill(child, kind)
            os.waitpid(child, 0)
            found = set(contents(output))
            whole = {"config.json", "model.safetensors", "README.md", "LICENSE"} <= found
            expect(whole or (found == {"a", "in/b"} if old else not found), "lost", sorted(found)[:9])
            accepted([*argv("bundle", good.folder, output), "--overwrite"])
            expect(os.listdir(place) == ["out"], "lost", os.listdir(place))
            return "right"

        return work

    names = {signal.SIGINT: "SIGINT", signal.SIGKILL: "SIGKILL"}
    return {
        f"{name} {number}{', replacing' if number >= 10 else ''}": case(kind, number, number >= 10)
        for kind, name in names.items()
        for number in range(15)
    }


def between(good: Checkpoint) -> Cases:
    def case(kill: bool) -> Case:
        def work(place: Path) -> str:
            output = fill(place / "out", "old")
            child = os.fork()
            if child == 0:
                real, calls = os.replace, iter(range(9))

                def replace(*names):
                    if next(calls) == 1:
                        if kill:
                            os.kill(os.getpid(), signal.SIGKILL)
                        raise KeyboardInterrupt
                    real(*names)

                os.replace = replace
                try:
                    write(output)
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            expect(kill or tree(output) == OLD, "lost")
            files.GRACE = -1
            expect(settled(output) == OLD, "lost", tree(output))
            write(output)
            expect(tree(output) == NEW and os.listdir(place) == ["out"], "lost", os.listdir(place))
            return "right"

        return work

    return {"interrupted": case(False), "killed": case(True)}


def publishing(good: Checkpoint) -> Cases:
    def with_hub(work) -> Case:
        def case(place: Path) -> str:
            with fake_hub.serve() as hub:
                template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
                constants.HUGGINGFACE_CO_URL_TEMPLATE, constants.ENDPOINT = template, hub.url
                transformers_hub._hf_api = None
                constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
                os.environ["HF_TOKEN"], os.environ["TMPDIR"] = fake_hub.TOKEN, str(place)
                import tempfile

                tempfile.tempdir = str(place)
                bundle.verify_bundle = lambda folder, model: None
                result = work(hub, place)
                expect(not list(place.iterdir()), "lost", os.listdir(place))
                return result

        return case

    def publish(*more: str, repo: str = "me/model") -> list:
        return ["publish", good.folder, repo, *more]

    def whole(hub, there: str = "main") -> bool:
        return {"config.json", "model.safetensors", "README.md"} <= set(hub.files("me/model", there))

    def nothing_there(hub) -> None:
        there = hub.repositories.get("me/model")
        expect(there is None or hub.files("me/model") == {}, "silent", "half a repository")

    def right(*more: str):
        def work(hub, place: Path) -> str:
            result = accepted(publish(*more))
            if "--dry-run" in more:
                expect(not hub.log, "silent", hub.log)
            else:  # on the default branch, or on the one that was asked for
                there = {"--create-pr": "refs/pr/1", "--revision": "next"}.get(more[0] if more else "", "main")
                expect(whole(hub, there), "silent", there)
            return result

        return work

    def page(where: str):
        def work(hub, place: Path) -> str:
            hub.html = where
            result = refused(publish("--tag", "v1"), ["none of the Hub's"])
            nothing_there(hub)
            hub.html = None
            accepted(publish())
            return result

        return work

    def bad(repo: str, *more: str, words=("epo",)):
        def work(hub, place: Path) -> str:
            result = refused(["publish", good.folder, *more, "--", repo], list(words))
            expect(not hub.log, "silent", "asked the Hub")
            return result

        return work

    def token(value: str, repo: str = "me/model", words=("401", "token")):
        def work(hub, place: Path) -> str:
            os.environ["HF_TOKEN"] = value
            code, err = command(*publish(repo=repo))
            line = err.splitlines()[-1]
            expect(value not in err, "silent", "the token is printed")
            expect(code == 1 and any(word in line for word in words) and "Traceback" not in err, "unclear", line)
            nothing_there(hub)
            return "refused"

        return work

    def broken_off(hub, place: Path) -> str:
        hub.fail_after = 0
        result = refused(publish(), ["model.safetensors"])
        nothing_there(hub)
        hub.fail_after = None
        accepted(publish())
        return result

    def public(hub, place: Path) -> str:
        accepted(publish())
        return refused(publish("--private"), ["public"])

    def signalled(kind: int, moment: int):
        def work(hub, place: Path) -> str:
            files.GRACE = -1
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                try:
                    cli.main([str(part) for part in publish()])
                finally:
                    os._exit(0)
            hub.watch = lambda number: os.kill(child, kind) if number == moment else None
            os.waitpid(child, 0)
            there = hub.repositories.get("me/model")
            expect(there is None or not hub.files("me/model") or whole(hub), "silent", "half a repository")
            hub.watch = lambda number: None
            accepted(publish())
            expect(whole(hub), "silent")
            return "right"

        return work

    cases = {
        f"publish {' '.join(more)}": right(*more) for more in ((), ("--private",), ("--tag", "v1"), ("--dry-run",))
    }
    cases |= {"a pull request": right("--create-pr"), "a branch": right("--revision", "next")}
    cases |= {f"a page for {where}": page(where) for where in ("create", "preupload", "batch", "commit")}
    cases |= {f"the name {repo!r}": bad(repo) for repo in ("a/b/c", "me/..", "-x", "me/a--b", "", "me/ö")}
    cases["a request and a tag"] = bad("me/model", "--create-pr", "--tag", "v1", words=("pull request",))
    cases |= {f"token {n}": token(value) for n, value in enumerate(("hf_wrong", "hf_ö", "hf_" + "b" * 34))}
    cases["the token as name"] = token("hf_" + "c" * 34, "hf_" + "c" * 34, ("not shown",))
    cases |= {"broken off": broken_off, "private, and it is public": public}
    for kind, name in ((signal.SIGINT, "SIGINT"), (signal.SIGKILL, "SIGKILL")):
        cases |= {f"{name} at request {moment}": signalled(kind, moment) for moment in (1, 3, 5, 6)}
    cases["SIGKILL at request 7"] = signalled(signal.SIGKILL, 7)
    return {name: with_hub(work) for name, work in cases.items()}


def groups(place: Path) -> dict[str, Cases]:
    good = Checkpoint(place / "good")
    return {
        "output paths of bundle and convert": paths(good),
        "SIGINT, SIGKILL while bundling": stopped(good),
        "stopped between the two renames": between(good),
        "publish against a Hub on loopback": publishing(good),
    }
