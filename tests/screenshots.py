"""The pictures of the README, from the newest run: ``make screenshots``.

The app is started as ``make app`` starts it, a photo is handed to it, and what a person would see
is saved; the others are figures of the run. It needs a demo (``make demo``) and Chromium
(``make browser``).
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys

from PIL import Image
from playwright.sync_api import sync_playwright

from lib.demo.data import DemoSettings
from lib.demo.world import render_jpegs
from lib.files import project_root
from lib.runs import open_run
from tests.chromium import OPTIONS, find_chromium

ROOT = project_root()
IMAGES = ROOT / "notebooks" / "images"
LANDMARK, VIEW = 1_000_017, 9  # a photo of an unseen landmark that is not in the gallery
FIGURES = {
    "02_training_curves.png": "training_curves.png",
    "03_ladder.png": "ladder.png",
    "05_rows.png": "retrieval_rows.png",
    "06_post_processing.png": "post_processing.png",
}


def main() -> int:
    """Take the pictures; returns the exit status."""
    figures = open_run("") / "figures"
    if absent := [name for name in FIGURES if not (figures / name).is_file()]:
        print(f"screenshots: the newest run lacks {', '.join(absent)}: make demo", file=sys.stderr)
        return 1
    for name, target in FIGURES.items():
        shutil.copy(figures / name, IMAGES / target)
    command = [sys.executable, "-m", "lib.app.page", "--no-browser", "--port=8960"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stderr.readline, "")
        address = next((line for line in lines if line.startswith("http://")), None)
        if address is None:
            return 1
        take(address.strip())
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()
    return 0


def take(address: str) -> None:
    """Open the app, search with a photo, ask why, and save what is seen."""
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1200, "height": 1080})
        page.goto(address)
        page.get_by_text("photos ready.").wait_for()
        (photo,) = render_jpegs(DemoSettings().seed, LANDMARK, [VIEW])
        file = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo}
        page.locator(".photo-drop input").set_input_files(file)
        page.get_by_text("Looks most like").wait_for()
        page.get_by_title(re.compile("Show what matched in result 2,")).click()
        page.locator(".why img").nth(1).wait_for()
        page.screenshot(path=IMAGES / "search_app.png")
        browser.close()
    with Image.open(IMAGES / "search_app.png") as shot:  # a quarter of the bytes
        small = shot.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(IMAGES / "search_app.png", optimize=True)


if __name__ == "__main__":
    sys.exit(main())
