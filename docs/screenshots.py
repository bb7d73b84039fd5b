"""Draws every kind of result as a notebook shows it, light, dark and narrow: python docs/screenshots.py [NAME ...]

The pictures lie in docs/_build/screenshots, which git ignores.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib
from results import example_of, results

import hijack_lens as hl

OUT = Path(__file__).parent / "_build" / "screenshots"
LOOKS = {"light": ("light", 860), "dark": ("dark", 860), "narrow": ("light", 420)}
_DARK = "background:#111;color:#e3e3e3"


def page(shown: str, theme: str) -> str:
    """A notebook's output: results take the colours of the page that they stand in."""
    style = f"font:14px system-ui,sans-serif;margin:12px;{_DARK if theme == 'dark' else ''}"
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    return f"<!DOCTYPE html>{meta}<body style='{style}'>{shown}</body>"


def main(names: list[str]) -> None:
    """Draws the kinds whose names hold one of these, or all."""
    from playwright.sync_api import sync_playwright

    matplotlib.use("Agg")
    OUT.mkdir(parents=True, exist_ok=True)
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        os.chdir(folder)  # examples write files
        for name, kind in results().items():
            short = name.removeprefix("hijack_lens.")
            if names and not any(one in short for one in names):
                continue
            shown = hl.show.html_of(example_of(kind))
            for look, (theme, width) in LOOKS.items():
                opened = shown if look == "light" else shown.replace("<details>", "<details open>")
                path = Path(folder) / "page.html"
                path.write_text(page(opened, theme), encoding="utf-8")
                sheet = browser.new_page(viewport={"width": width, "height": 60}, color_scheme=theme)
                sheet.goto(path.as_uri())
                wide = sheet.evaluate("document.documentElement.scrollWidth")
                sheet.screenshot(path=str(OUT / f"{short}-{look}.png"), full_page=True)
                sheet.close()
                print(f"{short}, {look}: {len(shown):,} bytes{'; wider than its page' * (wide > width)}", flush=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
