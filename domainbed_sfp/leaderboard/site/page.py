"""The leaderboard's page: one HTML file that loads nothing.

What entries say is text of strangers. Templates escape it, scripts only ever take it as text, and a content security
policy lets no script or style run but the page's own, by their hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from domainbed_sfp.analysis.render.grids import ABSENT, MISSING, RECONSTRUCTION_NOTE
from domainbed_sfp.analysis.render.html.self_contained import content_policy, packaged_text
from domainbed_sfp.core.version import __version__
from domainbed_sfp.leaderboard import tracks
from domainbed_sfp.leaderboard.documents.entry_schema import SELECTIONS, TRACKS
from domainbed_sfp.leaderboard.documents.problems import printable
from domainbed_sfp.leaderboard.site import tables, texts
from domainbed_sfp.leaderboard.site.board import BANDS, DENSE, UNKNOWN, Board
from domainbed_sfp.leaderboard.tiers import NOTES, TIERS


def html_text(board: Board, siblings: Sequence[tuple[str, str]] = ()) -> str:
    """The page. `siblings` are (title, file name) of other formats in its folder, to be linked."""
    # Imported here because no other format needs it.
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script = (packaged_text(__package__, f"page.{suffix}") for suffix in ("css", "js"))
    policy = content_policy(style, script)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(printable=printable, number=_number, seeds=_seeds)
    return environment.from_string(packaged_text(__package__, "page.html")).render(
        board=board,
        datasets=list(dict.fromkeys(ranking.dataset for ranking in board.rankings)),
        filters=_filters(board),
        siblings=siblings,
        notes=tables.NOTES,
        tiers=TIERS[::-1],
        tier_notes=NOTES,
        trials_of_closed=tracks.TRIALS,
        reconstruction_note=RECONSTRUCTION_NOTE,
        bitops=any(map(texts.has_bitops, board.rankings)),
        absent=ABSENT,
        missing=MISSING,
        accuracy=texts.accuracy_text,
        average=texts.average_text,
        worst=texts.worst_text,
        trials=texts.trials_text,
        sparsity=texts.sparsity_text,
        part=texts.part_text,
        unverified_axes=texts.unverified_axes,
        mark=texts.marked_if_unverified,
        bitops_text=texts.bitops_text,
        has_bitops=texts.has_bitops,
        label=texts.label_of,
        protocol_of=texts.shared_protocol,
        protocol_text=texts.protocol_text,
        differs=lambda ranking, text: len(set(map(text, ranking.lines))) > 1,
        notes_of=tables.notes_of,
        version=__version__,
        # Ours, and free of what would end their elements; the policy names their bytes.
        policy=policy,
        style=Markup(style),
        script=Markup(script),
    )


def _filters(board: Board) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(name, title, [(value, text)]) of every filter; only values that occur."""
    lines = [line for ranking in board.rankings for line in ranking.lines]
    rules = dict.fromkeys((ranking.rule.key, ranking.rule.title) for ranking in board.rankings)
    bands = {line.band for line in lines}
    found = {entry.tier for entry in board.entries}
    tracks = {entry.track for entry in board.entries}
    kinds = {ranking.transductive for ranking in board.rankings}
    return [
        ("dataset", "Data set", _same(dict.fromkeys(ranking.dataset for ranking in board.rankings))),
        ("rule", "Model selection", sorted(rules, key=lambda rule: SELECTIONS.index(rule[0]))),
        ("track", "Track", _same(name for name in TRACKS if name in tracks)),
        (
            "transductive",
            "Test images in training",
            [(value, text) for kind, value, text in _KINDS if kind in kinds],
        ),
        ("family", "Family", _same(sorted({line.family for line in lines}))),
        ("band", "Sparsity", _same(name for name in (DENSE, *BANDS, UNKNOWN) if name in bands)),
        ("tier", "Tier", _same(name for name in TIERS if name in found)),
    ]


_KINDS = ((False, "no", "never seen"), (True, "yes", "unlabelled (transductive)"))


def _same(values: Iterable[str]) -> list[tuple[str, str]]:
    return [(value, value) for value in values]


def _number(value: float) -> str:
    """A cost with all its digits: counts in groups, fractions as they are."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.6g}"


def _seeds(values: Sequence[int]) -> str:
    """Seeds as ranges: "0-2, 5"."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
