"""What the terminal shows. No text of a model, a tool or a file reaches it raw: an escape in it could move the cursor,
retitle the window or fake what was asked."""

import os
import sys

from gemma_dist.visible import visible

DIM, BOLD, RED, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"


class Screen:
    """Standard output and input."""

    def __init__(self) -> None:
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
        self._last = ""  # sign that was shown: what joins two signs may come apart from them
        self._is_typed = sys.stdin.isatty()
        self._has_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        if self._is_typed:
            import readline  # noqa: F401 (gives `input` a history, and keys to edit)

    def say(self, text: str, style: str = "", end: str = "\n") -> None:
        """Show text, in a style where the terminal has some."""
        shown = visible(self._last + text).removeprefix(visible(self._last))
        self._last = (self._last + text + end)[-1:]
        if style and shown and self._has_color:
            shown = f"{style}{shown}{PLAIN}"
        print(shown, end=end, flush=True)

    def read(self, prompt: str) -> str | None:
        """The next line that is typed; None at the end of the input."""
        try:
            return input(visible(prompt) if self._is_typed else "")
        except EOFError:
            return None
