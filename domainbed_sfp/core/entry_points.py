"""What other packages bring along: the entry-point groups, and loading them without falling over a broken package.

| group | an entry names |
|---|---|
| `domainbed_sfp.algorithms` | a module whose import registers algorithms |
| `domainbed_sfp.datasets` | a module whose import registers data sets |
| `domainbed_sfp.backbones` | a function (input_shape, pretrained) -> network, images [N, C, H, W] to features [N, D] |

Only what an installed package declares is ever imported, whatever a file of records, a model or a bundle names.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points

from domainbed_sfp.core.errors import UserError

ALGORITHMS = "domainbed_sfp.algorithms"
DATASETS = "domainbed_sfp.datasets"
BACKBONES = "domainbed_sfp.backbones"


def load_all(group: str, what: str) -> None:
    """Imports every entry of `group`; one that cannot be loaded is left out with a warning on stderr."""
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:  # another's package must not take the rest away
            origin = entry.dist.name if entry.dist else "an installed package"
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            print(
                f"warning: entry point {entry.name!r} of {origin} ({group}: {entry.value}) cannot be loaded, and its "
                f"{what} are left out: {reason}",
                file=sys.stderr,
            )


def backbones() -> dict[str, EntryPoint]:
    """The declared backbones by name, not loaded."""
    return {entry.name: entry for entry in entry_points(group=BACKBONES)}
