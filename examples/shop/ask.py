"""Ask the shop where there is no curl: ``python ask.py URL`` is a GET, ``python ask.py URL '{"user": 1}'`` a POST."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request


def main(url: str, body: str | None = None) -> int:
    """Print the answer; 1 if the shop refused."""
    request = urllib.request.Request(url, body.encode() if body else None, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            said, code = answer.read().decode(), 0
    except urllib.error.HTTPError as error:
        said, code = f"{error.code} {error.reason}", 1
    sys.stdout.write(said.strip() + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
