"""Builds the documentation, warnings as errors, and reads every page of it in a browser with the network off.

Fails where a public name is not in the reference; on a console error, a request that leaves the site, a link within it
that leads nowhere, a search that does not find first what it should. The folder to build into may follow; else it is
docs/_build/html.
"""

import functools
import http.server
import importlib
import inspect
import pkgutil
import posixpath
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urldefrag

from playwright.sync_api import sync_playwright
from sphinx.util.inventory import InventoryFile

import hijack_lens as hl

ROOT = Path(__file__).parents[1]
SITE = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/_build/html").resolve()

FOUND = {
    "ablate": "how-to/ablate.html",
    "phase": "how-to/phase_diagram.html",
    "save": "how-to/save_and_reload.html",
    "metric": "how-to/write_a_metric.html",
    "find_circuit": "reference/circuits.html",
}
"""What a search for a word must find first."""

started = time.time()
subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ROOT / "docs", SITE], check=True)
print(f"built in {time.time() - started:.0f} s", flush=True)

with open(SITE / "objects.inv", "rb") as file:
    inventory = InventoryFile.load(file, "", posixpath.join)
known = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
rooms = [hl, *(importlib.import_module(f"hijack_lens.{room.name}") for room in pkgutil.iter_modules(hl.__path__))]
rooms += [thing for name in hl.__all__ if inspect.ismodule(thing := getattr(hl, name))]
public = {f"{room.__name__}.{name}" for room in rooms for name in getattr(room, "__all__", ())}
faults = [f"{name} is not in the reference" for name in sorted(public - known) if ".hooked." not in name]

pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)
ids: dict[str, set[str]] = {}
links: set[tuple[str, str]] = set()

quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *anything: None})
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=SITE))
threading.Thread(target=server.serve_forever, daemon=True).start()
home = f"http://127.0.0.1:{server.server_port}/"

with sync_playwright() as playwright:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
    tab = browser.new_page()
    at = ""
    tab.on("console", lambda said: said.type == "error" and faults.append(f"{at}: {said.text}"))
    tab.on("pageerror", lambda error: faults.append(f"{at}: {error}"))
    ours = (home, "data:", "blob:")
    tab.on("request", lambda asked: asked.url.startswith(ours) or faults.append(f"{at}: asks for {asked.url}"))
    for at in pages:
        tab.goto(home + at, wait_until="load")
        tab.wait_for_timeout(50)
        ids[at] = set(tab.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)"))
        found = tab.evaluate("[...document.querySelectorAll('a[href]')].map(one => one.href)")
        links |= {(at, link.removeprefix(home)) for link in found if link.startswith(home)}
    at = "search.html"
    for word, wanted in FOUND.items():
        tab.goto(f"{home}search.html?q={word}")
        first = tab.wait_for_selector("#search-results li > a", timeout=30_000).get_attribute("href")
        if urldefrag(first).url != wanted:
            faults.append(f"{at}: {word!r} finds {first} first, not {wanted}")
    dark = browser.new_page(color_scheme="dark")
    dark.goto(home + "index.html")
    shade = dark.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    if max(shade) > 80:
        faults.append(f"index.html: the dark theme's background is {shade}")
    browser.close()

for page, link in sorted(links):
    target, anchor = urldefrag(link)
    target = unquote(target) or "index.html"
    if not (SITE / target).is_file():
        faults.append(f"{page}: {link} leads nowhere")
    elif anchor and target in ids and unquote(anchor) not in ids[target]:
        faults.append(f"{page}: {link} has no such place")

print(*faults, f"{len(pages)} pages, {len(links)} links, {len(faults)} faults", sep="\n")
sys.exit(bool(faults))
