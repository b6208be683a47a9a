"""The page that shows a memory: what it computes, and, in a browser (`make test-ui`), what a visitor sees."""

import copy
import inspect
import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from helpers import assert_close, build, small_config
from mc_transformers import MCCache, byte_tokenizer, read_gates
from mc_transformers.serving.page import Reading


TEXT = "Ishmael went to sea. <b>The whale</b> was white & large.\n" * 3
KINDS = [
    {},
    {"aggregation": "ssc"},
    {"segmentation": "logarithmic"},
    {"num_hidden_layers": 2, "layer_types": ["memory_caching", "full_attention"]},
]


def reading(**fields) -> Reading:
    found = Reading(build(small_config("gated_delta", vocab_size=258, **fields)), byte_tokenizer())
    found.read(TEXT)
    return found


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_the_answer_and_its_gates(fields: dict) -> None:
    """The answer is that of the whole text, and the gates those that `read_gates` finds in one pass."""
    found = reading(**fields)
    model, tokenizer = found.model, found.tokenizer
    answer = found.ask("Who?", 11)
    assert answer == found.ask("Who?", 11)  # the memory stayed as it was
    ids = tokenizer(TEXT + "Who?", return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=11, do_sample=False)
    assert answer == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    expected = read_gates(model, whole[:, :-1])[0]
    size, segments = model.config.segment_size, -(-len(TEXT) // 8)
    assert "".join(found.pieces) == TEXT and len(found.pieces) == segments
    by_token = expected.by_token()[0].transpose(0, 1)[ids.shape[1] - 1 :]  # [answer, H, T]
    starts = torch.arange(segments) * size
    assert_close(found.gates[0][..., :-2], by_token[..., starts][..., : segments - 1], 1e-5)
    assert_close(found.gates[0][..., -1], expected.gates[0, :, ids.shape[1] - 1 :, -1].T, 1e-5)


def test_the_picture_shows_what_was_read() -> None:
    found = reading()
    assert found.picture().count('class="segment"') == len(found.pieces) and "no question yet" in found.picture()
    assert "<b>" not in found.picture() and "&lt;b&gt;" in found.picture()
    found.ask("Who?", 4)
    pictures = {found.picture(layer, head) for layer in ("all", "0") for head in ("all", "0", "1")}
    assert len(pictures) == 3  # of one layer, its mean is that of all
    past, running = found.weights("0", "1")
    assert len(past) == len(found.pieces) and 0 < running < 1
    assert f'data-gate="{past[3]:.6f}"' in found.picture("0", "1")
    assert "keys and values" in found.size() and f"{len(TEXT)} tokens" in found.size()


def test_a_memory_goes_to_a_file_and_comes_back() -> None:
    found, other = reading(), Reading(build(small_config("gated_delta", vocab_size=258)), byte_tokenizer())
    answer, path = found.ask("Who?", 5), found.save()
    other.load(path)
    assert other.ask("Who?", 5) == answer and "[0 to 7]" in other.picture()
    found.load(path)
    assert "Ishmael" in found.picture()  # the text is known already
    stranger = Reading(build(small_config("gated_delta", vocab_size=258), seed=3), byte_tokenizer())
    with pytest.raises(ValueError, match="another model"):
        stranger.load(path)
    Path(path).write_bytes(b"no memory")
    with pytest.raises(ValueError, match="memory"):
        other.load(path)


def test_what_a_visitor_may_not_ask() -> None:
    found = Reading(build(small_config(vocab_size=258)), byte_tokenizer())
    assert copy.deepcopy(found) is found and "Nothing was read" in found.picture() + found.size()
    for call, message in (
        (lambda: found.ask("Who?"), "read a text or load a memory first"),
        (lambda: found.save(), "no memory to save"),
        (lambda: found.read("  "), "2 characters, allowed: 1 to"),
        (lambda: found.read("x" * 2_000_001), "2000001 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    found.read(TEXT)
    for question, new in (("", 5), ("x" * 20_001, 5), ("Who?", 0), ("Who?", 513)):
        with pytest.raises(ValueError, match="allowed: 1 to"):
            found.ask(question, new)
    assert isinstance(found.cache, MCCache)


# -------------------------------------------------------------------------------------------------------- in a browser
def missing() -> str:
    """What it takes to look at the page and is not here."""
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return ", ".join([*(name for name in ("gradio", "selenium") if find_spec(name) is None), *programs])


@pytest.mark.skipif(bool(missing()), reason=f"{missing()} missing: make test-ui")
def test_in_a_browser(tmp_path, monkeypatch) -> None:
    """Read, ask, look at one head, save, and load again, with a model that has learned source code;
    MC_SCREENSHOT=FILE keeps a picture."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mc_transformers.serving.page import build as build_page

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = Path(__file__).parents[2] / "model_cards" / "checkpoints" / "python-source"
    model = AutoModelForCausalLM.from_pretrained(folder)
    code = inspect.getsource(Reading)[:2800]
    question = "\n    def read(self, ids):\n"
    page = build_page(model, AutoTokenizer.from_pretrained(folder))
    _, address, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", share=False, quiet=True)
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", "disable-quic", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1400,1150")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(address)
        wait = WebDriverWait(browser, 60)

        def part(name: str, what: str = ""):
            return wait.until(lambda b: b.find_element(By.CSS_SELECTOR, f"#{name} {what}".strip()))

        def picture() -> str:
            return part("picture").get_attribute("innerHTML")

        part("text", "textarea").send_keys(code)
        part("read").click()
        wait.until(lambda _: 'class="segment"' in picture())
        assert "no question yet" in picture() and "keys and values" in part("size").text
        part("question", "textarea").send_keys(question)
        part("ask").click()
        wait.until(lambda _: "strongest segment" in picture())
        asked = picture()
        if place := os.environ.get("MC_SCREENSHOT"):
            browser.save_screenshot(place)
        part("head", "input").click()
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "ul[role=listbox] li"))[1].click()
        wait.until(lambda _: picture() != asked)
        part("save").click()
        part("saved", "a").click()
        deadline = time.monotonic() + 60
        while not (saved := list(tmp_path.glob("memory*.safetensors"))) and time.monotonic() < deadline:
            time.sleep(0.2)
        browser.refresh()  # another visitor, who has read nothing
        wait.until(lambda _: "Nothing was read" in picture())
        browser.find_elements(By.CSS_SELECTOR, "input[type=file]")[-1].send_keys(str(saved[0]))
        wait.until(lambda _: f"[0 to {model.config.segment_size - 1}]" in picture())
        part("ask").click()
        wait.until(lambda b: "cannot" in b.page_source or "characters, allowed" in b.page_source)  # no question
        part("question", "textarea").send_keys(question)
        part("ask").click()
        wait.until(lambda _: "strongest segment" in picture())
    finally:
        browser.quit()
        page.close()
