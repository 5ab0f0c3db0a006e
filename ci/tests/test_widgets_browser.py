"""An explorer in JupyterLab in a real browser: a slider moves, the picture changes."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

REPO = Path(__file__).resolve().parents[2]
CELL = f"""\
import sys
sys.path.insert(0, {str(REPO)!r})
from tpt_nb import datasets, figures
from tpt_nb.lessons import widgets
figures.setup()
controls = widgets.overlap_explorer(datasets.load("iconshift-a", n=4))"""


@pytest.fixture
def chromium():
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM")
    return found


@pytest.fixture
def lab(tmp_path):
    """The address of a notebook in a JupyterLab of its own."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=[new_code_cell(CELL)], metadata={"kernelspec": kernel})
    (tmp_path / "files").mkdir()
    nbformat.write(notebook, tmp_path / "files" / "explorer.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "TPT_NB_HEADLESS"))}
    env |= {"HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path), "JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.token=x"]
    command += [f"--ServerApp.root_dir={tmp_path / 'files'}"]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token=x", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "JupyterLab did not start"
                time.sleep(0.5)
        yield f"{address}/lab/tree/explorer.ipynb?token=x"
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
def test_a_slider_changes_the_picture(lab, chromium, tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="ci/requirements-browser.txt")
    with api.sync_playwright() as p:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = p.chromium.launch(executable_path=chromium, args=arguments)
        try:
            page = browser.new_page(viewport={"width": 1100, "height": 950})
            page.set_default_timeout(120_000)
            page.goto(lab)
            page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
            page.keyboard.press("Control+Enter")
            picture = page.locator(".jp-OutputArea-output img").first
            picture.wait_for()
            sliders = page.locator(".jp-OutputArea-output .noUi-handle, .ui-slider-handle")
            sliders.first.wait_for()
            assert sliders.count() == 3  # image, patches a side, overlap
            before = picture.get_attribute("src")
            sliders.nth(2).focus()
            page.keyboard.press("ArrowRight")
            page.wait_for_function(
                "old => document.querySelector('.jp-OutputArea-output img').src !== old", arg=before
            )
            readout = page.locator(".widget-readout").nth(2).inner_text()
            assert readout == "0.1"
            page.locator(".jp-OutputArea").first.screenshot(
                path=os.environ.get("TPT_NB_SCREENSHOT", tmp_path / "explorer.png")
            )
        finally:
            browser.close()
