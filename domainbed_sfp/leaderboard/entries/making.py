"""From a validated bundle to its entries."""

from __future__ import annotations

from datetime import datetime, timezone

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import summary
from domainbed_sfp.leaderboard.documents.entry import Entry, result_from_json
from domainbed_sfp.leaderboard.entries.consistency import NOT_CHECKED, OPEN_TRACK, note_of
from domainbed_sfp.leaderboard.validation import Validation


def entries_of(outcome: Validation, archive: str | None = None) -> list[Entry]:
    """An entry for each data set of a bundle without problems, which lies at `archive`."""
    document = outcome.submission
    if document is None or outcome.tier is None:
        raise UserError(f"{outcome.root} is rejected; `leaderboard validate` says why")
    found = []
    for dataset, one in document["datasets"].items():
        reasons = outcome.reasons_for_open(dataset)
        notes = [note_of(OPEN_TRACK, reason) for reason in reasons]
        notes += [note_of(NOT_CHECKED, what) for what in outcome.unchecked]
        found.append(
            Entry(
                name=document["name"],
                dataset=dataset,
                algorithm=document["algorithm"],
                settings=document["settings"],
                tier=outcome.tier_of(dataset),
                track="open" if reasons else "closed",
                transductive=document["transductive"],
                standing=document["standing"],
                reference=document["reference"],
                protocol=one["protocol"],
                results={key: result_from_json(result) for key, result in one["results"].items()},
                unverified=tuple(outcome.unverified[dataset]),
                **outcome.computed(dataset),
                runs=tuple(summary.digests_of([run for run in outcome.runs if run.run.dataset == dataset])),
                bundle=outcome.sums,
                date=datetime.now(timezone.utc).date().isoformat(),
                package=document["package"],
                commit=document["commit"],
                author=document.get("author"),
                archive=archive,
                notes=tuple(notes),
            )
        )
    return found
