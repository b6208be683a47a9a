"""The page of examples/onnx_chat/web in a headless Chromium, with onnxruntime-web from npm (`make test-browser`)."""

import functools
import http.server
import json
import os
import shutil
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import mc_transformers as mc
from mc_transformers.cli.main import main


ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "model_cards" / "checkpoints" / "python-source"
RUNTIME = Path(os.environ.get("MC_ORT_WEB", "none"))  # node_modules/onnxruntime-web/dist
NEW = 80
PROMPT = '''def read(path: str) -> str:
    """The text of a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


class Reader:
    def __init__(self, path):
        self.path = path

    def read('''


def missing() -> str:
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    packages = [name for name in ("selenium", "onnxscript", "transformers.exporters") if find_spec(name) is None]
    return ", ".join([*programs, *packages, *([] if RUNTIME.is_dir() else ["onnxruntime-web"])])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """Nothing."""


@pytest.mark.skipif(bool(missing()), reason=f"{missing()} missing: make test-browser")
def test_text_and_reads_in_a_page(tmp_path) -> None:
    """The text of `generate`, and the gates that it has; prints tokens per second. MC_SCREENSHOT=FILE keeps a
    picture."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    shutil.copytree(ROOT / "examples" / "onnx_chat" / "web", tmp_path / "page")
    shutil.copytree(RUNTIME, tmp_path / "page" / "ort", ignore=shutil.ignore_patterns("*.map", "*webg*", "*j??p*"))
    assert main(["export", str(TRAINED), str(tmp_path / "page" / "model"), "--reads", "--max-length", "1024"]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(TRAINED), mc.MCForCausalLM.from_pretrained(TRAINED).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    gates = model(whole[:, :-1], output_attentions=True).attentions

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "page"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(f"http://127.0.0.1:{server.server_port}/index.html")
        wait = WebDriverWait(browser, 120)
        status = wait.until(lambda b: (text := b.find_element(By.ID, "status").text) != "loading ..." and text)
        assert status == "ready"
        browser.execute_script(
            "for (const [id, value] of arguments) document.getElementById(id).value = value",
            ["prompt", PROMPT],
            ["count", NEW],
        )
        browser.find_element(By.ID, "go").click()
        text = browser.find_element(By.ID, "text")
        found = json.loads(wait.until(lambda _: text.get_attribute("data-found")))
        if place := os.environ.get("MC_SCREENSHOT"):
            browser.save_screenshot(place)
        shown = browser.find_elements(By.CSS_SELECTOR, "#segments span")
    finally:
        browser.quit()
        server.shutdown()
    expected = whole[0, ids.shape[1] :]
    assert found["text"] == tokenizer.decode(expected, skip_special_tokens=True) and found["tokens"] == len(expected)
    assert found["text"].strip()
    for i, reads in enumerate(found["reads"]):
        if reads is None:  # the prompt's last token, which `prefill` read
            assert i == 0
            continue
        at = ids.shape[1] + i - 1
        row = torch.stack([layer[0, :, at] for layer in gates]).mean((0, 1))
        segments = row.shape[0] - 1
        torch.testing.assert_close(torch.tensor([*reads[:segments], reads[-1]]), row, rtol=0, atol=1e-4)
    assert len(shown) == -(-whole.shape[1] // model.config.segment_size)
    print(f"\n{found['tokens']} tokens, {(found['tokens'] - 1) / found['seconds']:.0f} tokens per second")
