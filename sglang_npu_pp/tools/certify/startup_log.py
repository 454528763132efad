"""What SGLang's log says about a start, and why a server has ended."""

from __future__ import annotations

# Logged when a part of the start begins, in order of appearance.
STAGE_MARKERS = (
    ("Init parallel begin", "joining ranks"),
    ("Load weight begin", "weights"),
    ("Load weight end", "memory pools"),
    ("Application startup complete", "warm-up"),
    ("The server is fired up", "ready"),
)
FIRST_STAGE, READY = "spawning", "ready"
_CONSEQUENCE = "PeerLostError"


def reached(text: str) -> str:
    """The last part of the start that has begun."""
    return ([FIRST_STAGE] + [stage for marker, stage in STAGE_MARKERS if marker in text])[-1]


def likely_cause(text: str) -> str:
    """The last line that looks like the end of a traceback or a usage error; "" without one.

    Rather one that does not come from the loss of another process, which follows a cause.
    """
    found = [line.strip() for line in text.splitlines() if _is_error(line)]
    causes = [line for line in found if not line.partition(": ")[0].endswith(_CONSEQUENCE)]
    return ([""] + (causes or found))[-1]


def _is_error(line: str) -> bool:
    kind, colon, rest = line.partition(": ")
    raised = bool(colon) and kind.endswith(("Error", "Exception")) and " " not in kind
    return raised or rest.startswith("error: ")
