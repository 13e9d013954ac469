"""The page of a report, as Jinja2 templates: the style, parts that a living page has as well, and the page.

They are Python strings, because Flower's app bundle carries no files of other kinds.
"""

from functools import lru_cache

import jinja2

STYLE = r""":root {
  color-scheme: light dark;
  --page: #f4f6f8; --card: #ffffff; --ink: #1b1f24; --muted: #56606c; --line: #d5dae1;
  --c1: #0a6ebd; --c2: #d1570b; --c3: #0b8f6a; --c4: #a64d96; --c5: #a87900; --c6: #3a9fc9;
  --good: #0b7a5a; --warn: #9a5b00; --bad: #b3372b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #101418; --card: #181d23; --ink: #e8ecf1; --muted: #a3adb9; --line: #343c46;
    --c1: #57a8ef; --c2: #ff9055; --c3: #3ccb9b; --c4: #e092d2; --c5: #e6b84a; --c6: #97d8f2;
    --good: #4fd1a5; --warn: #f0b355; --bad: #ff8377;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
.page { max-width: 1280px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 14px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; }
.brand { color: var(--muted); font-size: .85rem; letter-spacing: .04em; margin-bottom: 6px; }
.title { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; }
.pill { border: 1px solid currentColor; border-radius: 99px; padding: 1px 12px; font-size: .85rem; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); } .info { color: var(--muted); }
.subtitle { color: var(--muted); margin-top: 8px; overflow-wrap: anywhere; }
.subtitle span { display: inline-block; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 12px; margin: 24px 0 0; }
.cards div, .panel {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.cards div { padding: 12px 16px; display: flex; flex-direction: column; }
.cards div:first-child { grid-column: span 2; }
.cards dt { color: var(--muted); font-size: .85rem; }
.cards dd { margin: 0; }
.cards .value { font-size: 1.5rem; font-weight: 650; line-height: 1.35; font-variant-numeric: tabular-nums; }
.cards .aside { color: var(--muted); font-size: .8rem; line-height: 1.35; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 16px 18px 12px; container-type: inline-size; min-width: 0; }
figure .note { color: var(--muted); font-size: .87rem; margin-top: 2px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0; margin: 10px 0 0; font-size: .87rem; }
.legend button { all: unset; cursor: pointer; display: flex; align-items: center; overflow-wrap: anywhere; }
.legend button:focus-visible { outline: 2px solid var(--c1); }
.legend button[aria-pressed="false"] { opacity: .4; text-decoration: line-through; }
.swatch { display: inline-block; flex: none; width: 20px; margin-right: 7px; vertical-align: middle; }
.plot { margin: 8px 0; min-height: 40px; }
.plot:empty { min-height: 290px; }
.plot * { font-family: inherit; }
.tree { list-style: none; margin: 12px 0; padding: 0; font-size: .93rem; }
.tree li { display: flex; flex-wrap: wrap; gap: 0 12px; padding: 4px 0 4px calc(var(--level) * min(26px, 5vw)); align-items: center; border-bottom: 1px solid var(--line); }
.tree li::before { content: ""; width: 9px; height: 9px; border: 2px solid var(--c1); border-radius: 50%; flex: none; }
.tree li.silo::before { background: var(--c1); }
.tree b { flex: 1; min-width: 6em; overflow-wrap: anywhere; }
.tree .edge { color: var(--muted); min-width: 12em; text-align: right; }
.table { font-size: .87rem; margin-top: 12px; }
details { font-size: .87rem; }
summary { cursor: pointer; color: var(--muted); padding: 2px 0; }
summary:hover { color: var(--ink); }
:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }
.scroll { overflow-x: auto; max-height: 440px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 500; position: sticky; top: 0; background: var(--card); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); font-weight: inherit; }
thead th:first-child { z-index: 1; }
.strong > * { font-weight: 650; border-top: 2px solid var(--line); }
.wraps td { white-space: pre-wrap; text-align: left; overflow-wrap: anywhere; }
.wraps th { text-align: left; vertical-align: top; }
.panel.pad { padding: 6px 6px; }
.log td, .log th { text-align: left; vertical-align: top; }
.log td:last-child { white-space: normal; min-width: 16em; overflow-wrap: anywhere; }
.log th { position: static; }
pre { margin: 8px 0 0; padding: 12px 14px; overflow-x: auto; background: var(--page); border-radius: 8px; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre.commands { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.panel.text { padding: 12px 18px; }
.panel.text + .panel.text { margin-top: 12px; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 12px 0 0; font-size: .87rem; }
dl.facts dt { color: var(--muted); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 520px) {
  .page { padding: 20px 12px 36px; }
  .cards { grid-template-columns: 1fr 1fr; }
  .cards .value { font-size: 1.3rem; }
  figure { padding: 14px 12px 10px; }
  th, td { padding: 6px 9px; }
  .log thead { position: absolute; clip-path: inset(50%); }
  .log tr, .log td { display: block; border: 0; padding: 1px 6px; }
  .log tr { padding: 8px 4px; border-bottom: 1px solid var(--line); }
  .log tr:last-child { border: 0; }
}
@media print { body { background: none; } figure, .cards div { break-inside: avoid; } }
"""

PARTS = r"""{% macro swatch(style) %}<span class="swatch" style="{{ style.css }}" aria-hidden="true"></span>{% endmacro %}
{% macro grid(columns, rows, label, marks=none, strong_last=false, shades=none, wraps=false) %}
<div class="scroll" role="region" aria-label="{{ label }}" tabindex="0">
<table{% if wraps %} class="wraps"{% endif %}>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
{% set mark = marks[loop.index0] if marks else none %}
{% set shade = shades[loop.index0] if shades else none %}
<tr{% if strong_last and loop.last %} class="strong"{% endif %}><th scope="row">
{%- if mark %}{{ swatch(mark) }}{% endif %}{{ row[0] }}</th>
{%- for cell in row[1:] %}<td{% if shade %} style="{{ heat(shade[loop.index0]) }}"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
{% macro heat(share) %}background: color-mix(in srgb, var(--c1) {{ "%.0f" | format(70 * share) }}%, transparent){% endmacro %}
{% macro cards(page) %}
{% if page.cards %}
<dl class="cards">
{% for label, value, aside in page.cards %}
<div><dt>{{ label }}</dt><dd class="value">{{ value }}</dd><dd class="aside">{{ aside }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% endmacro %}
{% macro head(page) %}
<header>
<p class="brand">Photon report</p>
<div class="title"><h1>{{ page.title }}</h1>
{% if page.status %}<span class="pill {{ page.status_kind }}">{{ page.status }}</span>{% endif %}</div>
<p class="subtitle">{% for fact in page.subtitle %}<span>{{ fact }}{% if not loop.last %} ·{% endif %}</span> {% endfor %}</p>
</header>
{{ cards(page) }}
{% endmacro %}
{% macro tables(page) %}
{% for title, content in page.tables %}
<h2>{{ title }}</h2>
<div class="panel pad">{{ grid(content.columns, content.rows, title, content.marks, content.strong_last) }}</div>
{% endfor %}
{% endmacro %}
{% macro panel(figure, live=false) %}
<figcaption><h3>{{ figure.title }}</h3><p class="note">{{ figure.note }}</p></figcaption>
{% if figure.tables is defined %}
{% for table in figure.tables %}
<div class="table">{{ grid(table.columns, table.rows, figure.title, table.marks, table.strong_last, table.shades, table.wraps) }}</div>
{% endfor %}
{% else %}
{% if figure.nodes is defined %}
<ul class="tree">
{% for node in figure.nodes %}
<li style="--level: {{ node.level }}"{% if node.is_silo %} class="silo"{% endif %}><b>{{ node.name }}</b> <span>{{ node.figure }}</span> <span class="edge">{{ node.edge }}</span></li>
{% endfor %}
</ul>
{% else %}
{% if figure.chart.legend %}
<ul class="legend">{% for label, style in figure.chart.legend %}<li><button type="button" aria-pressed="true" title="Hide or show; with Alt alone">{{ swatch(style) }}{{ label }}</button></li>{% endfor %}</ul>
{% endif %}
<div class="plot" role="img" aria-label="Plot: {{ figure.title }}. {{ figure.note }} The figures are in the table below."></div>
{% endif %}
<details><summary>Figures</summary>{% if live %}<div class="later"></div>{% else %}{{ grid(figure.columns, figure.rows, figure.title ~ ": figures") }}{% endif %}</details>
{% endif %}
{% endmacro %}
{% macro sections(page, live=false) %}
{% for title, panels in page.panels %}
<h2>{{ title }}</h2>
<div class="figures">
{% for name, figure in panels %}
<figure class="panel" role="figure" id="{{ name }}" aria-label="{{ figure.title }}">
{% if not live or figure.chart is defined %}{{ panel(figure, live) }}{% endif %}</figure>
{% endfor %}
</div>
{% endfor %}
{% endmacro %}
{% macro log(page) %}
{% if page.log %}
<h2>Failures and notices</h2>
<div class="panel pad"><div class="scroll" role="region" aria-label="Failures and notices" tabindex="0">
<table class="log">
<thead><tr><th scope="col">after</th><th scope="col">what</th><th scope="col">details</th></tr></thead>
<tbody>
{% for kind, at, what, details in page.log %}
<tr><td>{{ at }}</td><td class="{{ kind }}">{{ what }}</td><td>{{ details }}</td></tr>
{% endfor %}
</tbody>
</table>
</div></div>
{% endif %}
{% endmacro %}
{% macro rest(page) %}
{% if page.links %}
<h2>Pages</h2>
<div class="panel text">{% for title, target in page.links %}<a href="{{ target }}">{{ title }}</a> {% endfor %}</div>
{% endif %}
{% if page.configs %}
<h2>{{ page.texts_title }}</h2>
{% for title, text in page.configs %}
<div class="panel text"><details><summary>{{ title }}</summary><pre tabindex="0">{{ text }}</pre></details></div>
{% endfor %}
{% endif %}
{% if page.commands %}
<h2>How to do it again</h2>
<div class="panel text">
<pre class="commands">{{ page.commands | join("\n") }}</pre>
{% if page.facts %}
<dl class="facts">{% for label, value in page.facts %}<dt>{{ label }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endif %}
</div>
{% endif %}
{% endmacro %}
"""

TEMPLATE = r"""{% import "parts" as parts %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{{ policy | safe }}">
<meta name="generator" content="Photon {{ version }}">
<title>{{ page.title }} · Photon report</title>
<style>
{{ style | safe }}</style>
</head>
<body>
<main class="page">
{{ parts.head(page) }}
{{ parts.tables(page) }}
{{ parts.sections(page) }}
{{ parts.log(page) }}
{{ parts.rest(page) }}
</main>
{% if page.charts %}
<script type="application/json" id="charts">{{ charts | safe }}</script>
<script type="text/plain" id="library">{{ library | safe }}</script>
<script>{{ script | safe }}</script>
{% endif %}
</body>
</html>
"""


@lru_cache
def templates(**pages: str) -> jinja2.Environment:
    """Return templates by name, with the ``parts`` that pages are made of; all text is escaped."""
    return jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.DictLoader({"parts": PARTS, **pages}),
    )
