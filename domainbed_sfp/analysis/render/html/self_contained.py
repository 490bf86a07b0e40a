"""What pages that load nothing from elsewhere share: their packaged parts, and the policy that lets only those run."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources


def packaged_text(package: str, name: str) -> str:
    """A text file that lies in `package`."""
    return (resources.files(package) / name).read_text(encoding="utf-8")


def content_policy(style: str, script: str) -> str:
    """A content security policy that lets no style or script run but these two, by their hashes."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
