# Copyright 2026 the mc-transformers authors.
"""A page that shows a memory: read a long text once, ask, and see which of its segments the answer was read from.

This file needs no other one of the package: `bundle --space` copies it beside a model.
"""

import argparse
import copy
import functools
import html
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch


PIECE = 2048  # tokens that are read at a time
MOST_CHARACTERS = 2_000_000  # of a text
MOST_QUESTION = 20_000  # characters of a question
MOST_NEW = 512  # tokens of an answer
MOST_FILE = "512mb"  # a memory file that is uploaded
ALL = "all"


@dataclass
class Reading:
    """One visitor's memory of one text, and what the last answer read of it.

    Attributes:
        model: an `MCForCausalLM`. tokenizer: its own. cache: what was read.
        pieces: the text of every segment, or what stands for it where the text is not known.
        gates: of the last answer, by layer `[tokens, H, segments + 1]`, fp32: of every segment of the text, 0 where
            it was not read, and of the running memory.
    """

    model: object
    tokenizer: object
    cache: object = None
    pieces: list[str] = field(default_factory=list)
    gates: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model is not None and getattr(self.model.config, "segmentation", None) == "content":
            raise ValueError("the page does not show `segmentation`='content', allowed: 'constant' or 'logarithmic'")

    def __deepcopy__(self, memo: dict) -> "Reading":
        return self  # Gradio copies what a session begins with

    @property
    def _base(self):
        return self.model.model

    def _new_cache(self):
        """`MCCache` of the code that the model is made of: the package's, or the repository's."""
        return sys.modules[type(self.model).__module__].MCCache

    # ------------------------------------------------------------------------------------------------------ the text
    @torch.no_grad()
    def read(self, text: str, progress=lambda share: None) -> None:
        """Read a text into a new memory; `progress` is told which share of it is done.

        Raises:
            ValueError: no text, or too long a one.
        """
        if not text.strip() or len(text) > MOST_CHARACTERS:
            raise ValueError(f"the text has {len(text)} characters, allowed: 1 to {MOST_CHARACTERS}")
        encoded = self.tokenizer(text, return_offsets_mapping=self.tokenizer.is_fast, verbose=False)
        ids = torch.tensor([encoded["input_ids"]], device=self.model.device)
        cache = self._new_cache()(config=self.model.config)
        for start in range(0, ids.shape[1], PIECE):
            self._base(ids[:, start : start + PIECE], cache=cache)
            progress(min(1.0, (start + PIECE) / ids.shape[1]))
        self.cache, self.gates = cache, {}
        self.pieces = self._cut(text, ids[0], encoded.get("offset_mapping"))

    def _cut(self, text: str, ids: torch.Tensor, offsets: list | None) -> list[str]:
        size = self.model.config.segment_size
        starts = range(0, len(ids), size)
        if offsets is None:
            return [self.tokenizer.decode(ids[start : start + size]) for start in starts]
        places = [offsets[start][0] for start in starts]
        return [text[a:b] for a, b in zip([0, *places[1:]], [*places[1:], len(text)], strict=True)]

    # --------------------------------------------------------------------------------------------------- the question
    @torch.no_grad()
    def ask(self, question: str, new_tokens: int = 64) -> str:
        """The answer to a question behind the text, which stays as it was; what it read is kept in `gates`.

        Raises:
            ValueError: nothing was read, or no question, too long a one, or too long an answer.
        """
        if self.cache is None:
            raise ValueError("read a text or load a memory first")
        if not question or len(question) > MOST_QUESTION:
            raise ValueError(f"the question has {len(question)} characters, allowed: 1 to {MOST_QUESTION}")
        if not 1 <= new_tokens <= MOST_NEW:
            raise ValueError(f"an answer of {new_tokens} tokens, allowed: 1 to {MOST_NEW}")
        cache = copy.deepcopy(self.cache)
        ids = self.tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
        prompt = cache.prompt(ids.to(self.model.device))
        found: dict[int, list[torch.Tensor]] = {}
        mixers = {i: layer.mixer for i, layer in enumerate(self._base.layers) if hasattr(layer, "mixer")}
        hooks = [
            mixer.read_gates.register_forward_hook(lambda _, __, gates, i=i: found.setdefault(i, []).append(gates))
            for i, mixer in mixers.items()
        ]
        try:
            out = self.model.generate(
                **prompt,
                cache=cache,
                max_new_tokens=new_tokens,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        # the last token of the question made the first one of the answer, and so on
        begin = prompt["input_ids"].shape[1] - 1
        self.gates = {
            i: torch.stack([self._by_segment(gates[0, :, -1].float(), begin + t) for t, gates in enumerate(steps)])
            for i, steps in found.items()
        }
        return self.tokenizer.decode(out.sequences[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    # ----------------------------------------------------------------------------------------------------- the picture
    def weights(self, layer: str = ALL, head: str = ALL) -> tuple[list[float], float]:
        """Mean gates of the last answer: of every segment, and of the running memory.

        Args:
            layer, head: a number, or "all" for the mean of them.
        """
        chosen = list(self.gates.values()) if layer == ALL else [self.gates[int(layer)]]
        heads = slice(None) if head == ALL else slice(int(head), int(head) + 1)
        mean = torch.stack([gates[:, heads].mean((0, 1)) for gates in chosen]).mean(0).tolist()
        return mean[:-1], mean[-1]

    def _by_segment(self, gates: torch.Tensor, position: int) -> torch.Tensor:
        """`[H, segments of the text + 1]` from what the token at `position` read, `[H, S + 1]`: column i is segment i,
        or, with logarithmic segments, the last finished one of 2^i."""
        past, size = gates.new_zeros(len(gates), len(self.pieces)), self.model.config.segment_size
        finished = position // size
        for column in range(gates.shape[1] - 1):
            first, stop = column, column + 1
            if self.model.config.segmentation == "logarithmic":
                stop = finished >> column << column
                first = stop - (1 << column) if finished >> column & 1 else stop
            past[:, first:stop] = gates[:, column : column + 1]
        return torch.cat([past, gates[:, -1:]], 1)

    def picture(self, layer: str = ALL, head: str = ALL) -> str:
        """The text as HTML, the background of every segment as strong as its gate is beside the strongest."""
        if not self.pieces:
            return "<p>Nothing was read yet.</p>"
        gates, running = self.weights(layer, head) if self.gates else ([0.0] * len(self.pieces), 0.0)
        most = max([*gates, 1e-9])
        spans = "".join(
            f'<span class="segment" data-gate="{gate:.6f}" title="segment {i}: {gate:.4f}" '
            f'style="background:rgba(255,140,0,{gate / most:.3f})">{html.escape(piece)}</span>'
            for i, (gate, piece) in enumerate(zip(gates, self.pieces, strict=True))
        )
        said = f"strongest segment {most:.4f}, running memory {running:.4f}" if self.gates else "no question yet"
        return f'<p class="gates">{said}</p><div class="text">{spans}</div>'

    def size(self) -> str:
        """What the memory takes, beside keys and values of a Transformer of the same width."""
        if self.cache is None:
            return "Nothing was read yet."
        config, tokens = self.model.config, int(self.cache.get_seq_length())
        width = config.num_attention_heads * config.head_dim
        theirs = 2 * config.num_hidden_layers * width * tokens * self.model.dtype.itemsize
        return (
            f"{tokens} tokens, {self.cache.num_segments} finished segments of {config.segment_size}: "
            f"**{_bytes(self.cache.nbytes)}**, a Transformer's keys and values **{_bytes(theirs)}**"
        )

    # ------------------------------------------------------------------------------------------------------- the file
    def save(self) -> str:
        """Write the memory to a file of its own, `memory.safetensors`, and return its path.

        Raises:
            ValueError: nothing was read.
        """
        if self.cache is None:
            raise ValueError("read a text first: there is no memory to save")
        folder = tempfile.mkdtemp(prefix="mc-memory-")
        self.cache.save_pretrained(folder, self._base)
        return str(Path(folder) / "memory.safetensors")

    def load(self, path: str) -> None:
        """Take over the memory of a file, which does not hold the text.

        Raises:
            ValueError: not a memory of this model.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "memory.safetensors").symlink_to(Path(path).resolve())
            cache = self._new_cache().from_pretrained(folder, self._base)
        size, tokens = self.model.config.segment_size, int(cache.get_seq_length())
        if len(cache.layers) and tokens != int(self.cache.get_seq_length() if self.cache else -1):
            self.pieces = [f"[{a} to {min(a + size, tokens) - 1}] " for a in range(0, tokens, size)]
        self.cache, self.gates = cache, {}


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1024
    return f"{count:.3g} GiB"


# ---------------------------------------------------------------------------------------------------------- the page
CSS = ".text{max-height:28em;overflow-y:auto;white-space:pre-wrap;font-family:monospace;font-size:13px}"


def build(model, tokenizer):
    """The page, a `gradio.Blocks`; every visitor has a memory of their own."""
    import gradio as gr

    def told(function):
        """What is wrong with a request, shown to who made it."""

        @functools.wraps(function)  # Gradio looks at the arguments
        def run(*args):
            try:
                return function(*args)
            except (ValueError, OSError) as error:
                raise gr.Error(str(error)) from error

        return run

    mixers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer, "mixer")]
    heads = model.config.memory_heads
    with gr.Blocks(title="The memory of a text", analytics_enabled=False) as page:
        session = gr.State(None)
        gr.HTML(f"<style>{CSS}</style><h2>The memory of a text</h2>")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(label="Text", lines=8, max_length=MOST_CHARACTERS, elem_id="text")
                read = gr.Button("Read it once", variant="primary", elem_id="read")
                size = gr.Markdown("Nothing was read yet.", elem_id="size")
                question = gr.Textbox(label="Go on with", lines=2, max_length=MOST_QUESTION, elem_id="question")
                length = gr.Slider(1, MOST_NEW, 48, step=1, label="Tokens of the answer")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                answer = gr.Textbox(label="Answer", lines=3, interactive=False, elem_id="answer")
                with gr.Row():
                    save = gr.Button("Save the memory", elem_id="save")
                    load = gr.UploadButton("Load a memory", file_types=[".safetensors"], elem_id="load")
                saved = gr.File(label="memory.safetensors", interactive=False, elem_id="saved")
            with gr.Column():
                with gr.Row():
                    layer = gr.Dropdown([ALL, *map(str, mixers)], value=ALL, label="Layer", elem_id="layer")
                    head = gr.Dropdown([ALL, *map(str, range(heads))], value=ALL, label="Head", elem_id="head")
                picture = gr.HTML("<p>Nothing was read yet.</p>", elem_id="picture")

        def on_read(reading, text, layer, head, progress=gr.Progress()):  # noqa: B008  Gradio finds it there
            reading = reading or Reading(model, tokenizer)
            reading.read(text or "", lambda share: progress(share, "reading"))
            return reading, reading.size(), reading.picture(layer, head)

        def on_ask(reading, question, length, layer, head):
            reading = reading or Reading(model, tokenizer)
            return reading.ask(question or "", int(length)), reading.picture(layer, head)

        def on_look(reading, layer, head):
            return (reading or Reading(model, tokenizer)).picture(layer, head)

        def on_save(reading):
            return (reading or Reading(model, tokenizer)).save()

        def on_load(reading, path, layer, head):
            reading = reading or Reading(model, tokenizer)
            reading.load(path)
            return reading, reading.size(), reading.picture(layer, head)

        look = [layer, head]
        read.click(told(on_read), [session, text, *look], [session, size, picture])
        ask.click(told(on_ask), [session, question, length, *look], [answer, picture])
        save.click(told(on_save), session, saved)
        load.upload(told(on_load), [session, load, *look], [session, size, picture])
        for choice in look:
            choice.change(told(on_look), [session, *look], picture)
    return page


def launch(model, tokenizer, **options):
    """Open the page for one model; it listens on this machine only.

    Args:
        model: an `MCForCausalLM`, in evaluation mode. tokenizer: its own.
        options: of `gradio.Blocks.launch`: `server_name`, `server_port`, `prevent_thread_lock`, ...
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    return build(model.eval(), tokenizer).launch(**{"max_file_size": MOST_FILE, "share": False} | options)


def main() -> None:
    """Started as a file: the model is a bundle in the folder `model` beside it, or in another one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=str(Path(__file__).with_name("model")))
    folder = parser.parse_args().folder
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    launch(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True))


if __name__ == "__main__":
    main()
