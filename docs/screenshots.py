"""Draws every kind of result as a notebook shows it, and every kind of page, light, dark, narrow and printed.

    python docs/screenshots.py [NAME ...]

The pictures lie in docs/_build/screenshots, which git ignores.
"""

import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib
from results import example_of, results

import hijack_lens as hl

OUT = Path(__file__).parent / "_build" / "screenshots"
LOOKS = {"light": ("light", 860), "dark": ("dark", 860), "narrow": ("light", 420), "printed": ("dark", 700)}
SCROLLS = """[document.documentElement, ...document.querySelectorAll(".wide")].some(
    one => one.scrollWidth > one.clientWidth + 1)"""
_DARK = "background:#111;color:#e3e3e3"


def page(shown: str, theme: str) -> str:
    """A notebook's output: results take the colours of the page that they stand in."""
    style = f"font:14px system-ui,sans-serif;margin:12px;{_DARK if theme == 'dark' else ''}"
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    return f"<!DOCTYPE html>{meta}<body style='{style}'>{shown}</body>"


def pages() -> dict[str, str]:
    """What else is shown: explorers, views and reports, as pages of their own."""
    given = runpy.run_path(str(Path(__file__).parent / "examples.py"))
    model, prompt = given["model"], given["prompt"]
    runs = hl.explore_runs(model, prompt.clean, prompt.corrupted, hl.metrics.margin(prompt))
    shown = {"show.View": hl.show.attention(model, prompt)._repr_html_()}
    for explorer in (hl.explore(), runs):
        explorer.save("explorer.html")
        shown[f"explorer.{type(explorer).__name__}"] = Path("explorer.html").read_text(encoding="utf-8")
    hl.write_report(hl.explain(model, prompt), "report.html")
    return shown | {"show.write_report": Path("report.html").read_text(encoding="utf-8")}


def main(names: list[str]) -> None:
    """Draws the kinds whose names hold one of these, or all."""
    from playwright.sync_api import sync_playwright

    matplotlib.use("Agg")
    OUT.mkdir(parents=True, exist_ok=True)
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        os.chdir(folder)  # examples write files
        made = {name.removeprefix("hijack_lens."): kind for name, kind in results().items()}
        for short, kind in (made | pages()).items():
            if names and not any(one in short for one in names):
                continue
            shown = kind if isinstance(kind, str) else hl.show.html_of(example_of(kind))
            for look, (theme, width) in LOOKS.items():
                opened = shown if look in ("light", "printed") else shown.replace("<details>", "<details open>")
                path = Path(folder) / "page.html"
                path.write_text(opened if opened.startswith("<!DOCTYPE") else page(opened, theme), encoding="utf-8")
                sheet = browser.new_page(viewport={"width": width, "height": 60}, color_scheme=theme)
                if look == "printed":
                    sheet.emulate_media(media="print")
                sheet.goto(path.as_uri())
                wide = sheet.evaluate(SCROLLS)
                sheet.screenshot(path=str(OUT / f"{short}-{look}.png"), full_page=True)
                sheet.close()
                print(f"{short}, {look}: {len(shown):,} bytes{'; scrolls sideways' * wide}", flush=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
