"""The report's page. Jinja2 escapes every value: captions, references, names and recipes are written by others."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --raised: #f6f7f9; --ink: #1b1f24; --quiet: #5d6672;
  --rule: #dfe3e8; --accent: #2f6fb0; --good: #18794e; --bad: #c02f3e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --raised: #1c2026; --ink: #e6e9ed; --quiet: #98a1ad;
  --rule: #2d333b; --accent: #6aa9e4; --good: #4cc38a; --bad: #f2727f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 6px; padding-bottom: 6px; border-bottom: 1px solid var(--rule); }
p { margin: 4px 0 12px; } .quiet { color: var(--quiet); }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 8px; padding: 0; list-style: none; }
.facts li { background: var(--raised); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 16px;
  min-width: 132px; }
.facts b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px 6px 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 180px; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.unclear, .same, td small { color: var(--quiet); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 16px; }
figure, .card { margin: 0; padding: 14px; background: var(--raised); border: 1px solid var(--rule);
  border-radius: 10px; overflow-wrap: anywhere; min-width: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption b { display: block; } figcaption { margin-bottom: 6px; font-size: 13px; }
.card > img, .nothing { display: block; width: 100%; height: 200px; object-fit: contain; background: var(--paper);
  border-radius: 6px; }
.nothing { color: var(--quiet); text-align: center; line-height: 200px; }
.card h3 { margin: 10px 0 0; font-size: 12px; font-weight: 600; color: var(--quiet);
  display: flex; justify-content: space-between; gap: 8px; }
.card p { margin: 0; } .card ul { margin: 2px 0 0; padding-left: 18px; font-size: 13px; color: var(--quiet); }
.card small { color: var(--quiet); display: block; margin-top: 8px; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--raised); border: 1px solid var(--rule); border-radius: 8px; padding: 14px; overflow-x: auto;
  font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { details > * { display: block; } .card, figure { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ name }} · mmft</title>
<style>{{ css }}</style>
</head>
<body>
<main>
<header>
<h1>{{ name }}</h1>
<p class="quiet">A run of mmft {{ version }}{% if steps %}, {{ steps }} steps{% endif %}.</p>
{% if facts %}<ul class="facts">
{% for fact in facts %}<li><span class="quiet">{{ fact.name }}</span><b class="{{ fact.verdict }}">{{ fact.value }}</b>
<span class="quiet">{{ fact.note }}</span></li>
{% endfor %}</ul>{% endif %}
</header>

<section>
<h2>Before and after</h2>
{% if comparisons %}<p class="quiet">{{ summary }}{% if summary %}. {% endif %}Means with 95% bootstrap intervals; the
change is paired by picture. A change is called better or worse only where its interval leaves out zero.</p>
<div class="scroll"><table>
<thead><tr><th>Metric</th><th>Before</th><th>After</th><th>Change</th><th></th></tr></thead>
<tbody>
{% for line in comparisons %}<tr><td>{{ line.label.text }}</td>
{% for cell in (line.before, line.after) %}<td>{{ cell.value }} <small>{{ cell.interval }}</small></td>{% endfor %}

<td class="{{ line.verdict }}">{{ line.change.value }} <small>{{ line.change.interval }}</small></td>
<td class="{{ line.verdict }}">{{ line.verdict }}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p class="quiet">Not evaluated yet.</p>{% endif %}
</section>

<section>
<h2>Learning curves</h2>
{% macro panel(plot) %}<figure>
<figcaption><b>{{ plot.title }}</b><span class="quiet">{{ plot.note }}</span></figcaption>
<img src="{{ plot.source }}" alt="{{ plot.alt }}"></figure>{% endmacro %}
{% if plots %}<div class="plots">
{% for plot in plots %}{{ panel(plot) }}
{% endfor %}</div>
{% if more_plots %}<details><summary>{{ more_plots | length }} more metrics</summary><div class="plots">
{% for plot in more_plots %}{{ panel(plot) }}
{% endfor %}</div></details>{% endif %}
{% else %}<p class="quiet">No steps logged yet.</p>{% endif %}
</section>

{% if gallery %}<section>
<h2>Pictures</h2>
<p class="quiet">The first {{ gallery | length }} samples of the evaluation, in order: none was selected.</p>
<div class="cards">
{% for sample in gallery %}<article class="card">
{% if sample.picture %}<img src="{{ sample.picture }}" alt="">
{% else %}<div class="nothing">no picture</div>{% endif %}
{% if sample.prompt %}<h3>Prompt</h3><p class="quiet">{{ sample.prompt }}</p>{% endif %}
<h3><span>Before</span><span>{{ sample.before_reward }}</span></h3><p>{{ sample.before }}</p>
<h3><span>After</span><span>{{ sample.after_reward }}</span></h3><p>{{ sample.after }}</p>
{% if sample.references %}<h3>References</h3>
<ul>{% for text in sample.references %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}<small>{{ sample.id }}</small>
</article>
{% endfor %}</div>
</section>{% endif %}

{% if training %}<section>
<h2>Last samples of training</h2>
<p class="quiet">Step {{ training.step }}, by reward: the highest first, then the lowest. Each term as measured.</p>
<div class="scroll"><table>
<thead><tr><th class="text">Caption</th><th>Reward</th>{% for term in training.terms %}<th>{{ term }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in training.rows %}<tr><td class="text">{{ row.caption }}</td><td>{{ row.reward }}</td>
{% for value in row.terms %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
</section>{% endif %}

{% if recipe %}<details><summary>Recipe</summary><pre>{{ recipe }}</pre></details>{% endif %}
</main>
</body>
</html>
"""
