"""A page as Chromium shows it, without a window."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian's package of that name)")


def chromium(page: Path, *options: str, fragment: str = "") -> str:
    """What Chromium prints of a page, whose scripts have run; with `--dump-dom`, its elements."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]
        fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command = [str(CHROMIUM), *fixed, *quiet, *options, page.absolute().as_uri() + fragment]
        done = subprocess.run(command, capture_output=True, check=True, timeout=300)
    return done.stdout.decode(errors="surrogateescape")
