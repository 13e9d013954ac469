"""The templates of `photon ui`; Python strings, as those of the report are."""

LIVE_STYLE = r"""
a { color: var(--c1); }
.brand a { text-decoration: none; }
.attention { list-style: none; margin: 18px 0 0; padding: 10px 18px; }
.attention li { padding: 3px 0; overflow-wrap: anywhere; }
.runs td:first-child, .runs th:first-child { width: 1px; }
.runs td:nth-child(2), .runs th:nth-child(2), .runs td:nth-child(3), .runs th:nth-child(3) { text-align: left; }
.runs td:nth-child(2) { overflow-wrap: anywhere; white-space: normal; min-width: 9em; }
.tools { display: flex; flex-wrap: wrap; gap: 10px 16px; align-items: center; margin: 18px 0 12px; }
.tools button, .tools input { font: inherit; padding: 4px 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--card); color: var(--ink); }
.tools button:disabled { opacity: .5; }
.tools .quiet { color: var(--muted); font-size: .87rem; }
.tall .scroll { max-height: 440px; }
.lost { position: fixed; inset: auto 0 0 0; background: var(--bad); color: #fff; text-align: center; padding: 6px; }
@media print { .tools, .brand, .lost { display: none; } }
"""

FRAME = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="Photon {{ version }}">
<title>{{ title }} · Photon</title>
<style>{{ style | safe }}</style>
</head>
<body>
<main class="page">{{ body | safe }}</main>
<p class="lost" id="lost" hidden>photon ui does not answer; this page shows what it told last.</p>
<script type="application/json" id="data">{{ data | safe }}</script>
<script src="/library.js"></script>
<script src="/page.js"></script>
</body>
</html>
"""

LIVE = r"""{% import "parts" as parts %}
{% macro head(page, name, progress) %}
<header>
<p class="brand"><a href="/">← All runs</a></p>
<div class="title"><h1>{{ page.title }}</h1><span class="pill {{ progress.kind }}">{{ progress.words }}</span>
{% if progress.left is not none %}<span class="pill info">about {{ duration(progress.left) }} left</span>{% endif %}</div>
<p class="subtitle">{% for fact in page.subtitle %}<span>{{ fact }}{% if not loop.last %} ·{% endif %}</span> {% endfor %}</p>
</header>
{{ parts.cards(page) }}
{% endmacro %}
{% macro duration(seconds) %}{% if seconds < 60 %}{{ "%.0f" | format(seconds) }} s{% elif seconds < 5400 %}{{ "%.0f" | format(seconds / 60) }} min{% else %}{{ "%.1f" | format(seconds / 3600) }} h{% endif %}{% endmacro %}
{% macro fault(name, what) %}
<header>
<p class="brand"><a href="/">← All runs</a></p>
<h1>{{ name }}</h1>
</header>
<ul class="panel attention"><li class="bad">{{ what }}</li></ul>
{% endmacro %}
{% macro attention(found) %}
{% if found %}
<h2>Needs attention</h2>
<ul class="panel attention">{% for kind, words in found %}<li class="{{ kind }}">{{ words }}</li>{% endfor %}</ul>
{% endif %}
{% endmacro %}
{% macro silos(table) %}
<h2>Silos</h2>
<div class="panel pad tall">{{ parts.grid(table.columns, table.rows, "Silos", table.marks) }}</div>
{% endmacro %}
{% macro tables(page) %}{{ parts.tables(page) }}{% endmacro %}
{% macro sections(page) %}{{ parts.sections(page, true) }}{% endmacro %}
{% macro inside(panel) %}{{ parts.panel(panel) }}{% endmacro %}
{% macro figures(panel) %}{{ parts.grid(panel.columns, panel.rows, panel.title ~ ": figures") }}{% endmacro %}
{% macro log(lines) %}
<h2>Log</h2>
<div class="tools"><input type="search" data-filter="log-lines" placeholder="Find in the log" aria-label="Find in the log"><span class="quiet">newest first</span></div>
<div class="panel pad"><div class="scroll" role="region" aria-label="Log" tabindex="0">
<table class="log"><thead><tr><th scope="col">after</th><th scope="col">what</th><th scope="col">details</th></tr></thead>
<tbody id="log-lines">
{% for kind, at, what, details in lines %}
<tr><td>{{ at }}</td><td class="{{ kind }}">{{ what }}</td><td>{{ details }}</td></tr>
{% endfor %}
</tbody></table>
</div></div>
{% endmacro %}
{% macro rest(page) %}{{ parts.rest(page) }}{% endmacro %}
{% macro body(places, html) %}
{% for place in places %}
<div id="place-{{ place }}">{{ html[place] | safe }}</div>
{% endfor %}
{% endmacro %}
{% macro comparison(page) %}
<header>
<p class="brand"><a href="/">← All runs</a></p>
<h1>{{ page.title }}</h1>
<p class="subtitle">{% for fact in page.subtitle %}<span>{{ fact }}{% if not loop.last %} ·{% endif %}</span> {% endfor %}</p>
</header>
{{ parts.tables(page) }}
{{ parts.sections(page) }}
{{ parts.rest(page) }}
{% endmacro %}
{% macro runs(rows, where) %}
<header>
<p class="brand">Photon</p>
<h1>Runs</h1>
<p class="subtitle">{% for one in where %}<span>{{ one }}{% if not loop.last %} ·{% endif %}</span> {% endfor %}</p>
</header>
<form action="/compare" method="get">
<div class="tools"><button type="submit" id="compare" disabled>Compare</button><span class="quiet">mark two runs or more</span></div>
<div class="panel pad"><div class="scroll" role="region" aria-label="Runs" tabindex="0">
<table class="runs"><thead><tr><th scope="col"></th><th scope="col">run</th><th scope="col">state</th><th scope="col">rounds</th><th scope="col">left</th><th scope="col">perplexity</th><th scope="col">tokens</th><th scope="col">strategy</th></tr></thead>
<tbody id="place-rows">{{ run_rows(rows) }}</tbody></table>
</div></div>
</form>
{% endmacro %}
{% macro run_rows(rows) %}
{% for row in rows %}
<tr><td><input type="checkbox" name="id" value="{{ row.name }}" aria-label="Compare {{ row.name }}"></td><td><a href="/run?{{ {"id": row.name} | urlencode }}">{{ row.name }}</a></td><td class="{{ row.kind }}">{{ row.state }}</td><td>{{ row.rounds }}</td><td>{% if row.left is not none %}{{ duration(row.left) }}{% else %}–{% endif %}</td><td>{{ row.perplexity }}</td><td>{{ row.tokens }}</td><td>{{ row.strategy }}</td></tr>
{% else %}
<tr><td></td><td>No run yet: start one with photon train.</td><td></td><td></td><td></td><td></td><td></td><td></td></tr>
{% endfor %}
{% endmacro %}
"""
