"""Tables as one self-contained HTML page: light and dark, readable by a screen reader, fit for paper."""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from .display import Grid, grids_of
from .tables import Report

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --text: #1b1f24; --ground: #fff; --quiet: #57606a; --band: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --ground: #14171b; --quiet: #a3acb8; --band: #1d2229; }
}
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--text); background: var(--ground); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
caption { text-align: left; color: var(--quiet); white-space: normal; padding-bottom: .4rem;
  font-size: .875rem; }
th, td { padding: .3rem .7rem; text-align: right; }
th[scope=row], th:first-child { text-align: left; font-weight: 500; }
thead th { border-top: 2px solid; border-bottom: 1px solid; font-weight: 600; }
tbody tr:nth-child(even) { background: var(--band); }
tbody tr:last-child > * { border-bottom: 2px solid var(--text); }
.best { font-weight: 700; } .second { text-decoration: underline; }
ul { color: var(--quiet); font-size: .875rem; padding-left: 1.2rem; }
a { color: inherit; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; color: #000; background: #fff; }
  nav { display: none; } section { break-inside: avoid; } .scroll { overflow: visible; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if grids | length > 1 -%}
<nav aria-label="Tables"><ul>
{%- for grid in grids %}
<li><a href="#{{ grid.name }}">{{ grid.title }}</a></li>
{%- endfor %}
</ul></nav>
{%- endif %}
{% for grid in grids %}
<section id="{{ grid.name }}" aria-labelledby="{{ grid.name }}-title">
<h2 id="{{ grid.name }}-title">{{ grid.title }}</h2>
<div class="scroll" role="region" aria-labelledby="{{ grid.name }}-title" tabindex="0">
<table>
<caption>{{ grid.protocol or grid.title }}</caption>
<thead><tr>{% for name in grid.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in grid.rows %}
<tr><th scope="row">{{ row[0].text }}</th>
{%- for cell in row[1:] %}
<td{% if cell.emphasis %} class="{{ cell.emphasis }}"{% endif %}>{{ cell.text }}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
{% if grid.notes -%}
<ul>
{%- for note in grid.notes %}
<li>{{ note }}</li>
{%- endfor %}
</ul>
{%- endif %}
</section>
{% endfor %}
{% if notes -%}
<section aria-labelledby="records"><h2 id="records">About the records</h2><ul>
{%- for note in notes %}
<li>{{ note }}</li>
{%- endfor %}
</ul></section>
{%- endif %}
<footer><p>{% if marked %}The best of a column is bold, the second underlined.
{% endif %}Collected by domainbed_sfp {{ version }}.</p></footer>
</main>
</body>
</html>
"""


def html_text(report: Report) -> str:
    """The whole page; it loads nothing from elsewhere."""
    datasets = ", ".join(dict.fromkeys(table.dataset for table in report.tables))
    return html_of(f"Domain generalization results: {datasets}", grids_of(report), report.notes)


def html_of(title: str, grids: Sequence[Grid], notes: Sequence[str]) -> str:
    """A page of any grids, and what has to be said about all of them."""
    # Imported here because no other format needs it and a table in the terminal should come at once.
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(
        title=title,
        grids=grids,
        notes=notes,
        marked=any(shown.emphasis for grid in grids for row in grid.rows for shown in row),
        version=__version__,
    )
