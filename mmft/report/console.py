"""Lines for people: as they are, so that paths can be copied and captions that look like markup do no harm."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

_STYLES = {"warning": "bold yellow", "tripwire": "bold red"}


def say(console: Console, text: str, label: str = "") -> None:
    """Prints one line. label: a word before it that catches the eye, as `warning`."""
    shown = Text(f"{label} ", style=_STYLES.get(label, "bold")) if label else Text()
    console.print(shown.append(text, style="not bold"), highlight=False, soft_wrap=True)
