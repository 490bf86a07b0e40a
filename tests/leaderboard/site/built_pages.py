"""What the page should say of the entries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from synthetic_entries import METHODS, entry, many

from domainbed_sfp.leaderboard.documents import entry as entries
from domainbed_sfp.leaderboard.documents.entry import Entry

RULES = ("training-domain", "oracle")


def write(folder: Path, found: list[Entry]) -> Path:
    for number, one in enumerate(found):
        kept = "" if one.superseded_by is None else f".{number}"
        path = folder / one.dataset / f"{entries.slug(one.name)}{kept}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(entries.text_of(one))
    return folder


def peers(one: Entry, rule: str) -> list[Entry]:
    return [
        other
        for other in many()
        if other.superseded_by is None
        and (other.dataset, other.track, other.transductive) == (one.dataset, one.track, one.transductive)
        and other.tier == one.tier
        and rule in other.results
    ]


def rank_of(one: Entry, rule: str) -> int | None:
    """One more than the number of competitors whose average reads higher; none where nobody checked the entry."""
    if one.results[rule].average is None or one.tier == "self-reported":
        return None
    shown = [
        float(f"{other.results[rule].average[0]:.1f}") for other in peers(one, rule) if other.results[rule].average
    ]
    return 1 + sum(value > float(f"{one.results[rule].average[0]:.1f}") for value in shown)


def texts_of(one: Entry, rule: str) -> list[str]:
    """The accuracies of an entry as readers see them."""
    result = one.results[rule]
    cells = [f"{cell.accuracy:.1f} ± {cell.std_err:.1f}" if cell else "X" for cell in result.cells]
    average = f"{result.average[0]:.1f} ± {result.average[1]:.1f}" if result.average else "X"
    worst = f"{result.worst[1]:.1f} ({result.worst[0]})" if result.worst else "X"
    return [*cells, average, worst]


CURRENT = [one for one in many() if one.superseded_by is None]


PAYLOADS = (
    "</script><script>alert('{}')</script>",
    "\"><img src=x onerror=alert('{}')>",
    "'-alert('{}')-' onmouseover=alert(1) x='",
    "</style></title><svg onload=alert('{}')>",
    "{{{{ 7*7 }}}}{{% raw %}}{}<!--",
)


# What decides where a text goes is not a stranger's choice: the schema knows all its values.
FIXED = ("track", "tier", "superseded_by", "date")


def hostile(value, path=""):
    """The value with a payload of its own in every text."""
    if isinstance(value, str):
        return PAYLOADS[sum(map(ord, path)) % len(PAYLOADS)].format(path)
    if isinstance(value, dict):
        keys = {"settings": "<b>", "costs": "<i>"}
        made = {name: one if name in FIXED else hostile(one, f"{path}.{name}") for name, one in value.items()}
        return {**made, keys[end]: 3.0} if (end := path.rpartition(".")[2]) in keys else made
    if isinstance(value, (list, tuple)):
        return tuple(hostile(one, f"{path}.{index}") for index, one in enumerate(value))
    return value


def hostile_entry(number: int) -> Entry:
    one = replace(entry("PACS", METHODS[8]), notes=("a note",))
    fields = {name: getattr(one, name) for name in ("settings", "protocol", "rerun", "notes")}
    texts = {name: value for name, value in vars(one).items() if isinstance(value, str) and name not in FIXED}
    # On one data set, so that they compete and are drawn together.
    made = replace(one, **{**hostile({**texts, **fields}, f"e{number}"), "dataset": PAYLOADS[0].format("dataset")})
    results = {}
    for rule, result in one.results.items():
        document = hostile(entries.result_as_json(result), f"e{number}.{rule}")
        results[rule] = entries.result_from_json(document)
    return replace(made, results=results)


def shown(where=lambda one, rule: True, rule: str | None = "training-domain") -> list[list[str]]:
    return sorted(
        [one.dataset, key, one.name] for one in CURRENT for key in RULES if rule in (None, key) and where(one, key)
    )
