"""What a library said about a file that it could not read, for messages of one line."""

from __future__ import annotations

from urllib.error import HTTPError, URLError


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's kind if it has none."""
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return str(error.reason)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":") if lines else type(error).__name__
