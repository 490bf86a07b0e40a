"""A bundle that names its author is signed by them."""

from __future__ import annotations

from collections.abc import Iterator

from domainbed_sfp.leaderboard.bundle import signing
from domainbed_sfp.leaderboard.bundle.layout import SIGNATURE, SUBMISSION, SUMS
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.validation.context import Bundle


def check_signature(bundle: Bundle) -> Iterator[Problem]:
    """SIGNATURE is that of SHA256SUMS by the key `author`; without the one there is not the other."""
    author = bundle.claimed.get("author") if bundle.claimed else None
    is_there = SIGNATURE in bundle.tree.sums
    if author is None:
        if is_there and bundle.claimed:
            yield Problem(SUBMISSION, "author", "the public key of the signature", "nothing")
    elif not is_there or SUMS not in bundle.tree.sums:
        yield Problem(SIGNATURE, "", f"the signature of {SUMS} by {SUBMISSION}'s author", "no file")
    else:
        text = bundle.tree.read(SIGNATURE).decode("ascii", "replace").strip()
        try:
            is_right = signing.is_signed(bundle.tree.read(SUMS), text, author)
        except ImportError:
            bundle.cannot("the author's signature: it needs the package cryptography")
            return
        if not is_right:
            yield Problem(SIGNATURE, "", f"the signature of {SUMS} by key {author}", shown(text))
