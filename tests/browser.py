"""A headless Chromium, asked for what it makes of a page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

__all__ = ["look_at"]

_NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable")

# What is asked: twice, half a second apart, so that what plays has gone on.
_PROBE = """
<script>
const seen = () => ({
  width: innerWidth,
  scrollWidth: document.documentElement.scrollWidth,
  overflowing: [...document.querySelectorAll("main *:not(svg *)")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".table")).map((e) => e.outerHTML.slice(0, 80)),
  canvases: [...document.querySelectorAll("canvas")].map((c) => {
    const copy = new OffscreenCanvas(c.width, c.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(c, 0, 0);
    const pixels = copy.getImageData(0, 0, c.width, c.height).data;
    let sum = 0;
    for (let i = 0; i < pixels.length; i++) sum += (i + 1) % 4 ? pixels[i] * (i % 251 + 1) : 0;
    return [c.width, c.height, Math.round(c.getBoundingClientRect().width), sum];
  }),
  frame: document.body.dataset.frame,
  where: document.getElementById("where").textContent,
  curves: [...document.querySelectorAll(".chart svg")].map((svg) => [svg.getBoundingClientRect().width, svg.querySelectorAll("path").length]),
  headings: [...document.querySelectorAll("h2")].map((h) => h.textContent),
});
setTimeout(() => {
  const first = seen();
  setTimeout(() => {
    const later = seen();
    document.getElementById("play").click();
    const slider = document.getElementById("frame");
    slider.value = slider.max;
    slider.dispatchEvent(new Event("input"));
    const result = JSON.stringify([first, later, seen()]);
    document.body.appendChild(Object.assign(document.createElement("pre"), { id: "probe", textContent: result }));
  }, 700);
}, 1500);
</script>
"""  # noqa: E501


def look_at(page: str, folder: Path, width: int) -> tuple[list[dict[str, Any]], list[str]]:
    """What the page shows at first, a little later, and scrubbed to its last frame; and what the console says.

    Skips the test where there is no browser.
    """
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"),
            *("--virtual-time-budget=4000", f"--window-size={width},1600", "--enable-logging=stderr", "--dump-dom"),
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert probe, f"the page did not get so far: {console or done.stderr[-500:]}"
    return json.loads(unescape(probe[1])), console
