"""A real browser for tests: a headless Chromium, installed on first need where that can be done."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NAMES = ("chromium", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chrome")
_PACKAGES = ("chromium-headless-shell", "chromium")
_INSTALL_SECONDS = 300
# Nothing may be asked of a network, and nothing kept between runs.
_ALWAYS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"


@dataclass(frozen=True)
class Seen:
    """What a run came to: its output, and what the page told the console, refused requests included."""

    out: str
    console: tuple[str, ...]


@dataclass(frozen=True)
class Chromium:
    """A browser's command."""

    command: str

    def open(self, page: Path, profile: Path, *options: str, query: str = "") -> Seen:
        """Load a page with a new profile in directory `profile`."""
        words = [self.command, *_ALWAYS, f"--user-data-dir={profile}", *options, page.as_uri() + query]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return Seen(done.stdout, tuple(re.findall(r"^\[.*?:CONSOLE.*?\] (.*)$", done.stderr, re.MULTILINE)))


@functools.cache
def find_chromium() -> Chromium | str:
    """A browser that starts, or why there is none."""
    if found := _on_path():
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"no {' or '.join(_NAMES)} on PATH, and it cannot be installed here (that takes root and apt-get)"
    quiet = {
        "capture_output": True,
        "timeout": _INSTALL_SECONDS,
        "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    }
    try:
        subprocess.run(["apt-get", "update"], check=False, **quiet)
        for package in _PACKAGES:
            subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", package], check=False, **quiet)
            if found := _on_path():
                return found
    except subprocess.TimeoutExpired:
        return f"apt-get took more than {_INSTALL_SECONDS} s to install a Chromium"
    return f"apt-get could not install {' or '.join(_PACKAGES)}"


def _on_path() -> Chromium | None:
    return next((Chromium(path) for path in map(shutil.which, _NAMES) if path and _starts(path)), None)


def _starts(path: str) -> bool:
    words: Sequence[str] = (path, "--version", "--no-sandbox")
    try:
        return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
