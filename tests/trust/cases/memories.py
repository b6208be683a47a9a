"""Memory files: what they say, whose they are, where they lie, and who is stopped while writing one."""

import ctypes
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from harness import Bad, Case, Cases, expect, raises
from test_memory_files import CASES, FILE, PREFIX, Saved, forge, in_a_fork

from helpers import build, tokens
from mc_transformers.modeling_mc.fingerprint import SAMPLES


def believed_or_refused(saved: Saved) -> str:
    """A file is refused by name, or answers as the right one does."""
    try:
        cache = saved.load()
    except ValueError as error:
        expect(str(saved.path) in str(error) and len(str(error)) < 1500, "unclear", error)
        return "refused"
    with torch.no_grad():
        found, expected = (saved.model(tokens(2, 9), cache=each).logits for each in (cache, saved.cache))
    expect(torch.equal(found, expected), "silent", "other answers")
    return "right"


def contents() -> Cases:
    def named(case: str) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place, "unbounded")
            tensors, meta = saved.parts()
            CASES[case](tensors, meta)
            saved.forged(tensors, meta)
            return believed_or_refused(saved)

        return work

    def counters(name: str, value: float) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place, "least_read")
            tensors, meta = saved.parts()
            tensors[f"0.{name}"][:] = value
            saved.forged(tensors, meta)
            return believed_or_refused(saved)

        return work

    def drawn(seed: int) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place, ["unbounded", "least_read", "int8"][seed % 3])
            tensors, meta = saved.parts()
            forge(tensors, meta, random.Random(seed))
            saved.forged(tensors, meta)
            return believed_or_refused(saved)

        return work

    cases = {case: named(case) for case in CASES}
    for name, value in (("segment", 3), ("segment", -2), ("segment", 0), ("received", -1.0)):
        cases[f"{name}={value}"] = counters(name, value)
    return cases | {f"drawn {seed}": drawn(seed) for seed in range(56 - len(cases))}


def fingerprints() -> Cases:
    def changed(number: int) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place, "unbounded")
            parameter = list(saved.model.model.parameters())[number]
            parameter.data.view(-1)[parameter.numel() // 2 + 1] += 1e-3
            return raises(saved.load, ["another model"])

        return work

    def all_but_samples(place: Path) -> str:
        saved = Saved(place, "unbounded")
        flat = saved.model.model.embed_tokens.weight.data.view(-1)
        kept = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        new = torch.randn_like(flat)
        new[kept] = flat[kept]
        flat.copy_(new)
        return raises(saved.load, ["another model"])

    def same_values(change) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place, "unbounded")
            saved.model = change(saved.model)
            expect(saved.same(saved.load()), "silent")
            return "right"

        return work

    def strided(model):
        norm = model.model.norm
        wide = torch.zeros(*norm.weight.shape, 3)
        wide[..., 1] = norm.weight.data
        norm.weight = torch.nn.Parameter(wide[..., 1])
        return model

    def on_meta(place: Path) -> str:
        saved = Saved(place, "unbounded")
        saved.model = build(saved.model.config).to("meta")
        return raises(saved.load, ["`model`"])

    cases = {f"a value of parameter {number}": changed(number) for number in (0, 3, 7)}
    cases |= {"all values but the samples": all_but_samples, "the same in another stride": same_values(strided)}
    return cases | {
        "a second model with the same weights": same_values(lambda model: build(model.config)),
        "not in memory": on_meta,
    }


def paths() -> Cases:
    def prepared(prepare, judge) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place / "memory", "unbounded")
            prepare(saved)
            return judge(saved)

        return work

    def missing(saved: Saved) -> str:
        return raises(saved.load, ["holds no"], (FileNotFoundError,))

    def right(saved: Saved) -> str:
        expect(saved.same(saved.load()), "silent")
        saved.cache.save_pretrained(saved.folder, saved.model)
        expect(saved.same(saved.load()) and os.listdir(saved.folder) == [FILE], "silent")
        return "right"

    def as_nobody(call, words) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place / "memory", "unbounded")
            saved.path.chmod(0)
            saved.folder.chmod(0o555)
            place.chmod(0o755)
            if os.geteuid() == 0:
                os.seteuid(65534)
            return raises(lambda: call(saved), words, (PermissionError,))

        return work

    def replace(what):
        def prepare(saved: Saved) -> None:
            saved.path.unlink()
            what(saved)

        return prepare

    def move(name: str):
        def prepare(saved: Saved) -> None:
            saved.folder = saved.folder.rename(saved.folder.parent / name)
            saved.path = saved.folder / FILE

        return prepare

    def linked(saved: Saved) -> None:
        link = saved.folder.parent / "link"
        link.symlink_to(saved.folder)
        saved.folder, saved.path = link, link / FILE

    def a_file(place: Path) -> str:
        saved = Saved(place / "memory", "unbounded")
        (place / "file").write_text("x")
        return raises(lambda: saved.cache.save_pretrained(place / "file", saved.model), ["file"])

    return {
        "no file": prepared(replace(lambda saved: None), missing),
        "a folder of that name": prepared(replace(lambda saved: saved.path.mkdir()), missing),
        "a pipe of that name": prepared(replace(lambda saved: os.mkfifo(saved.path)), missing),
        "a link to nowhere": prepared(replace(lambda saved: saved.path.symlink_to("nowhere")), missing),
        "no folder": prepared(lambda saved: shutil.rmtree(saved.folder), missing),
        "a file in the folder's place": a_file,
        "not readable": as_nobody(lambda saved: saved.load(), [FILE]),
        "not writable": as_nobody(lambda saved: saved.cache.save_pretrained(saved.folder, saved.model), ["memory"]),
        "a linked folder": prepared(linked, right),
        "a name of any letters": prepared(move("Gedächtnis\n*"), right),
        "read only, to be replaced": prepared(lambda saved: saved.path.chmod(0o444), right),
    }


def full_disk() -> Cases:
    """On a small file system of its own, where the system gives one; else as a limit of the size of files."""

    def case(room: int) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place, "unbounded")
            limit = len(saved.data) + room
            libc = ctypes.CDLL(None, use_errno=True)
            alone = libc.unshare(0x00020000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0
            if alone and libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, f"size={limit}".encode()) == 0:
                saved.path.write_bytes(saved.data)
            else:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            big = torch.cat([saved.cache.layers[0].tensors["kept.0"]] * 4, 1)
            with torch.no_grad():
                for _ in range(40):
                    saved.model(tokens(2, 100), cache=saved.cache)
            expect(big.numel() > 0, "silent")
            result = raises(lambda: saved.cache.save_pretrained(place, saved.model), [FILE, "space"], (OSError,))
            expect(saved.path.read_bytes() == saved.data and os.listdir(place) == [FILE], "lost", os.listdir(place))
            return result

        return work

    return {f"{room} bytes left": case(room) for room in (0, 1, 1000, 4096, 9000, 12345)}


def killed() -> Cases:
    def case(seed: int) -> Case:
        def work(place: Path) -> str:
            saved, moment = Saved(place, "unbounded"), 0.005 + random.Random(seed).random() / 10

            def save() -> None:
                while True:
                    saved.cache.save_pretrained(place, saved.model)

            process = in_a_fork(save)
            time.sleep(moment)
            os.kill(process.pid, signal.SIGKILL)
            process.join(20)
            expect(saved.same(saved.load()), "lost")
            for left in place.iterdir():
                expect(left.name == FILE or left.name.startswith(PREFIX), "lost", left)
                os.utime(left, (0, 0))
            saved.cache.save_pretrained(place, saved.model)
            expect(os.listdir(place) == [FILE], "lost", os.listdir(place))
            return "right"

        return work

    return {f"killed at moment {seed}": case(seed) for seed in range(15)}


def savers() -> Cases:
    def case(size: int) -> Case:
        def work(place: Path) -> str:
            saved = Saved(place, "unbounded")
            with torch.no_grad():
                for _ in range(size):
                    saved.model(tokens(2, 500), cache=saved.cache)
            saved.cache.save_pretrained(place, saved.model)

            def save() -> None:
                for _ in range(200 // (1 + 10 * size)):
                    saved.cache.save_pretrained(place, saved.model)

            writers = [in_a_fork(save) for _ in range(2)]
            while any(writer.is_alive() for writer in writers):
                if not saved.same(saved.load()):
                    raise Bad("silent", "a torn file")
            expect([writer.exitcode for writer in writers] == [0, 0], "lost", "a saver failed")
            expect(os.listdir(place) == [FILE], "lost", os.listdir(place))
            return "right"

        return work

    return {"small files": case(0), "larger files": case(2)}


def groups(place: Path) -> dict[str, Cases]:
    return {
        "memory file: contents": contents(),
        "memory file: whose it is": fingerprints(),
        "memory file: paths, permissions": paths(),
        "memory file: disk full": full_disk(),
        "memory file: kill -9 while saving": killed(),
        "memory file: two savers": savers(),
    }
