"""A page as a browser shows it: opened with no network, at any width, by Debian's chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Windows are 500 pixels wide at least, so the page lies in a frame; the wrapper measures it from outside.
WRAPPER = """<!doctype html><title>waiting</title><body style="margin:0">
<iframe style="border:0;width:{width}px;height:2000px" src="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument
  page.querySelectorAll("details").forEach(each => {{ each.open = true }})
  const wide = [...page.querySelectorAll("body *")].filter(each => {{
    for (let at = each.parentElement; at; at = at.parentElement)
      if (getComputedStyle(at).overflowX !== "visible" && at !== page.body) return false
    return each.getBoundingClientRect().right > {width} + 0.5
  }})
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth, wide: wide.map(each => each.tagName + "." + each.getAttribute("class")),
    title: page.title, drawings: page.querySelectorAll("svg").length,
    paper: getComputedStyle(page.body).backgroundColor,
  }})
}}
</script>"""


@dataclass(frozen=True)
class Seen:
    """Width that the page takes, elements that stick out, its title, drawings and colour; what the console said."""

    width: int
    wide: list[str]
    title: str
    drawings: int
    paper: str
    console: list[str]


def look(page: Path, width: int, folder: Path, dark: bool = False) -> Seen:
    """Opens a page in a profile of its own."""
    assert BROWSER is not None
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.format(width=width, page=page.resolve().as_uri()))
    ran = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(width, 500)},2000",
            "--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", ran.stdout, re.DOTALL)
    assert title is not None and title.group(1) != "waiting", ran.stderr[-2000:]
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return Seen(console=console, **json.loads(unescape(title.group(1))))
