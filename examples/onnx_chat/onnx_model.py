"""A model that `mc-transformers export` has written, run by ONNX Runtime: this file needs onnxruntime and numpy.

The cache is a dictionary of arrays of fixed size. It can be written to a file and read again elsewhere.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime


FORMAT = 1


@dataclass
class Memory:
    """What a model knows of a text.

    Attributes:
        states: arrays by name. seen: tokens that were read into them. pending: tokens of the text that were not.
    """

    states: dict[str, np.ndarray]
    seen: int = 0
    pending: list[int] = field(default_factory=list)


class OnnxModel:
    """Both graphs of an exported folder.

    Args:
        folder: what `mc-transformers export` wrote. threads: of ONNX Runtime (it chooses).

    Raises:
        FileNotFoundError: no export there. ValueError: an export of a later version, or of another kind.

    Attributes:
        about: export.json, see docs/export.md. reads: `[layers, heads, segments + 1]` of the last token, or None.
    """

    def __init__(self, folder: str | os.PathLike, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.about = json.loads((self.folder / "export.json").read_text())
        if self.about["format"] > FORMAT or not self.about["files"]["decode"].endswith(".onnx"):
            raise ValueError(f"{folder} is not an ONNX export of format {FORMAT}")
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self.sessions = {
            name: onnxruntime.InferenceSession(self.folder / file, options, ["CPUExecutionProvider"])
            for name, file in self.about["files"].items()
        }
        self.names = {name: [x.name for x in session.get_inputs()] for name, session in self.sessions.items()}
        self.outputs = {name: [x.name for x in session.get_outputs()] for name, session in self.sessions.items()}
        self.reads: np.ndarray | None = None

    # --------------------------------------------------------------------------------------------------- memories
    def empty(self) -> Memory:
        """The memory before the first token."""
        start, states = (self.folder / "start.bin").read_bytes(), {}
        for state in self.about["states"]:
            shape, dtype = state["shape"], np.dtype(state["dtype"])
            states[state["name"]] = np.zeros(shape, dtype)
            if "start" in state:
                found = np.frombuffer(start, dtype, int(np.prod(shape)), state["start"])
                states[state["name"]] = found.reshape(shape).copy()
        return Memory(states)

    def save(self, memory: Memory, path: str | os.PathLike) -> None:
        """Write a memory to a file, under a temporary name that it loses when the file is whole."""
        path, about = Path(path), {"model": self._identity(), "seen": memory.seen, "pending": memory.pending}
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, about=np.array(json.dumps(about)), **memory.states)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def load(self, path: str | os.PathLike) -> Memory:
        """The memory that `save` wrote.

        Raises:
            FileNotFoundError: no such file. ValueError: it is damaged, or another model has written it.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop("about")))
            found = Memory(arrays, int(about["seen"]), [int(token) for token in about["pending"]])
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is damaged, or not a memory ({error})") from error
        if about.get("model") != self._identity():
            raise ValueError(
                f"{path} was written by another model: a memory can be read only by the one that wrote it"
            )
        expected = {state["name"]: (tuple(state["shape"]), state["dtype"]) for state in self.about["states"]}
        if {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} != expected:
            raise ValueError(f"{path} is damaged, or of an export with another `max_length`")
        return found

    def _identity(self) -> list[str]:
        return [self.about["fingerprint"], self.about["weights"]]

    # ------------------------------------------------------------------------------------------------------ text
    def read(self, memory: Memory, ids: list[int]) -> np.ndarray:
        """Read what is pending and `ids` into a memory, and give the logits `[vocab_size]` of the token behind them.

        Raises:
            ValueError: no tokens, or more than the cache has room for.
        """
        ids, room = [*memory.pending, *ids], self.about["max_length"]
        if not ids:
            raise ValueError("nothing to read: no tokens were given, and none are pending")
        if room is not None and memory.seen + len(ids) > room:
            raise ValueError(f"{memory.seen + len(ids)} tokens would be read, and the cache has room for {room}")
        piece, memory.pending = self.about["piece"], []
        for start in range(0, len(ids), piece):
            part = ids[start : start + piece]
            if len(part) == 1:
                out = self._run("decode", memory, {"input_ids": np.array([part], np.int64)})
            else:
                padded = np.zeros((1, piece), np.int64)
                padded[0, : len(part)] = part
                out = self._run("prefill", memory, {"input_ids": padded, "length": np.array([len(part)], np.int64)})
            memory.seen += len(part)
        self.reads = out.get("reads")
        return out["logits"][0]

    def _run(self, name: str, memory: Memory, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        states, inputs = memory.states, {**memory.states, **inputs}
        found = self.sessions[name].run(None, {key: inputs[key] for key in self.names[name]})
        out = dict(zip(self.outputs[name], found, strict=True))
        slot = out.get("slot", [-1])[0]
        for key in states:
            if f"next_{key}" in out:
                states[key] = out[f"next_{key}"]
            elif slot >= 0:  # a segment has ended
                states[key][:, slot] = out[f"finished_{key}"][:, 0]
        return out

    def generate(
        self, memory: Memory, ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Read `ids`, then yield what follows, up to a token that ends a text (which is not yielded)."""
        random, ends = np.random.default_rng(seed), set(self.about["eos_token_ids"])
        for _ in range(max_new_tokens):
            logits = self.read(memory, ids)
            if temperature > 0:
                logits = logits / temperature + random.gumbel(size=logits.shape)
            token, ids = int(logits.argmax()), []
            memory.pending = [token]
            if token in ends:
                return
            yield token
