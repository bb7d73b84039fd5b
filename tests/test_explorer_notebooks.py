"""The explorer in a JupyterLab, dragged there and read in its kernel; and in a notebook that was exported."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest
from test_explorer import agrees, explorer_at, set_slider, sliders

import hijack_lens as hl


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (in the extra dev)")


def notebook_of(*sources):
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    return {
        "cells": [empty | {"source": source, "id": f"c{at}"} for at, source in enumerate(sources)],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab of its own, of which nothing is left; its address."""
    folder, runtime = tmp_path / "work", tmp_path / "runtime"
    folder.mkdir()
    cells = (
        "import hijack_lens as hl\nexplorer = hl.explore()\nexplorer",
        ("import json\nprint('KERNEL', json.dumps([explorer.values, float(explorer.margin.total)]))"),
    )
    (folder / "explore.ipynb").write_text(json.dumps(notebook_of(*cells)))
    aside = ("RUNTIME_DIR", "CONFIG_DIR", "DATA_DIR"), ("SETTINGS_DIR", "WORKSPACES_DIR", "USER_SETTINGS_DIR")
    env = os.environ | {f"JUPYTER_{name}": str(tmp_path / name) for name in aside[0]}
    env |= {f"JUPYTERLAB_{name}": str(tmp_path / name) for name in aside[1]} | {"JUPYTER_RUNTIME_DIR": str(runtime)}
    options = ["--no-browser", "--port=0", "--allow-root", "--IdentityProvider.token=", "--ServerApp.password="]
    options += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={folder}"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 30
        while not (found := list(runtime.glob("jpserver-*.json"))):
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, "JupyterLab did not start within 30 s"
            time.sleep(0.05)
        yield json.loads(found[0].read_text())["url"]
    finally:
        server.terminate()
        server.wait(20)


@needs("jupyterlab", "anywidget", "ipykernel")
@pytest.mark.browser
def test_what_is_dragged_in_jupyterlab_the_kernel_knows(browser, lab):
    page = browser.new_context(viewport={"width": 1200, "height": 1000}).new_page()
    outside, complaints = [], []
    page.on("request", lambda asked: asked.url.startswith((lab, "data:", "blob:")) or outside.append(asked.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{lab}lab/tree/explore.ipynb")
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    cells.nth(1).wait_for(timeout=30_000)

    def run(at):
        started = cells.nth(at).locator(".jp-InputArea-prompt", has_text=re.compile(r"[*\d]"))
        until = time.monotonic() + 30
        while not started.count():  # a notebook that is still being set up takes no key
            assert time.monotonic() < until, f"cell {at} did not run within 30 s"
            cells.nth(at).locator(".cm-content").click()
            page.keyboard.press("Control+Enter")
            page.wait_for_timeout(500)

    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=30_000)
    run(0)
    page.wait_for_selector(".hijack-lens-explorer circle", timeout=60_000)
    assert page.locator("iframe[srcdoc]").count() == 0  # the widget itself, linked to the kernel
    assert agrees(page).values == hl.explore().values
    set_slider(page, "repeats", 3)
    set_slider(page, "preference", 4, "ArrowLeft")
    there = agrees(page)
    assert (there.values["repeats"], there.values["preference"]) == (5, 5.6)
    run(1)
    said = page.locator(".jp-OutputArea-output pre", has_text="KERNEL")
    said.wait_for(timeout=30_000)
    values, total = json.loads(said.inner_text().partition("KERNEL ")[2])
    assert values == explorer_at(sliders(page)).values
    assert total == pytest.approx(float(page.get_attribute("data.total", "value")), abs=1e-12)
    # Its theme, whatever the reader's system says.
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    page.wait_for_function(
        "getComputedStyle(document.querySelector('.hijack-lens-explorer')).colorScheme === 'dark'", timeout=5_000
    )
    assert outside == []
    assert complaints == []


@needs("nbconvert", "IPython", "anywidget")
@pytest.mark.browser
def test_an_exported_notebook_shows_it_live_without_a_kernel(browser, tmp_path):
    import nbformat
    from IPython.core.formatters import DisplayFormatter
    from nbconvert import HTMLExporter

    data, _ = DisplayFormatter().format(hl.explore(repeats=4))
    assert {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"} <= set(data)
    notebook = notebook_of("hl.explore(repeats=4)")
    notebook["cells"][0] |= {
        "execution_count": 1,
        "outputs": [{"output_type": "execute_result", "execution_count": 1, "data": data, "metadata": {}}],
    }
    exporter = HTMLExporter(mathjax_url="", require_js_url="")
    path = tmp_path / "exported.html"
    path.write_text(exporter.from_notebook_node(nbformat.from_dict(notebook))[0], encoding="utf-8")
    page = browser.new_context(offline=True, color_scheme="dark").new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("iframe[srcdoc]")
    inside = page.locator("iframe[srcdoc]").element_handle().content_frame()
    inside.wait_for_selector("circle")
    assert agrees(inside).values["repeats"] == 4
    inside.focus("input[name=repeats]")
    page.keyboard.press("ArrowLeft")
    assert agrees(inside).values["repeats"] == 3
    # As light as the exported page around it.
    assert inside.evaluate("getComputedStyle(document.querySelector('.hijack-lens-explorer')).colorScheme") == "light"
    assert errors == []
