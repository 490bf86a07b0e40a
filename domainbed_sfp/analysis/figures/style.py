"""How figures look and what files they become. matplotlib is the extra `plots`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from domainbed_sfp.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUFFIXES = (".png", ".svg", ".pdf")
LINES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "domainbed_sfp",
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Our style while it lasts, whatever the user's is, so that a figure is the same everywhere. UserError without
    matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "--plot draws with matplotlib, which is not installed: pip install 'domainbed_sfp[plots]'"
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def image_bytes(figure: Figure, suffix: str) -> bytes:
    """The file of a figure, for a suffix of SUFFIXES."""
    drawn = io.BytesIO()
    # The date would make two drawings of the same records differ.
    metadata = {".png": None, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[suffix]
    figure.savefig(drawn, format=suffix[1:], dpi=300, metadata=metadata, bbox_inches="tight", pad_inches=0.04)
    return drawn.getvalue()
