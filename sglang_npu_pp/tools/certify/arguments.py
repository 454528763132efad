"""What the arguments of launch_server say, without SGLang's parser."""

from __future__ import annotations

from collections.abc import Sequence


def option(arguments: Sequence[str], *names: str) -> str | None:
    """The last value of an option, "--name value" or "--name=value", under any of its names."""
    found = None
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            found = value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
    return found
