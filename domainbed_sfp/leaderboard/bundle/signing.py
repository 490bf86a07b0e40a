"""Who submitted a bundle: an Ed25519 signature of its SHA256SUMS, so that an author can replace an entry of theirs.

The key says nothing of who somebody is, only that two bundles are of the same one. Needs the package `cryptography`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from domainbed_sfp.core.errors import UserError


def sign(key_file: str | Path, data: bytes) -> str:
    """The signature of `data` by the private key in a PEM file, as hexadecimal digits."""
    return _private_key(Path(key_file)).sign(data).hex()


def public_key(key_file: str | Path) -> str:
    """The public part of the key in a PEM file, as 64 hexadecimal digits. A file that is not there is made, with a new
    key that only its owner can read. Raises UserError where it holds no Ed25519 key, or cannot be read or written."""
    return _private_key(Path(key_file)).public_key().public_bytes_raw().hex()


def is_signed(data: bytes, signature: str, key: str) -> bool:
    """Whether `signature` is that of `data` by the private part of `key`. Raises ImportError without `cryptography`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _private_key(path: Path) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise UserError("--author_key needs the package cryptography: pip install 'domainbed_sfp[signing]'") from None
    try:
        if not path.exists():
            text = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(text)
        found = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UserError(f"--author_key {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--author_key {str(path)!r}: expected an Ed25519 key without password ({error})") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise UserError(f"--author_key {str(path)!r}: expected an Ed25519 key; a file that is not there is made")
    return found
