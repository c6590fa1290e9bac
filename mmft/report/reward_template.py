"""The page of a reward model, in the styles of a run's report. Jinja2 escapes every value."""

from __future__ import annotations

from mmft.report.template import CSS

REWARD_CSS = (
    CSS
    + """
.sections, .plots { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); }
.sections { gap: 0 16px; } .sections > section, .plots .wide { grid-column: 1 / -1; min-width: 0; }
.sections > .half { grid-column: auto; } .plots figure { align-self: start; } .scroll + .scroll { margin-top: 20px; }
.card .chosen { border-left: 3px solid var(--good); } .card .rejected { border-left: 3px solid var(--bad); }
.card .chosen, .card .rejected { padding-left: 10px; margin-top: 8px; }
.card .chosen h3, .card .rejected h3 { margin: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 16px 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
"""
)

REWARD_PAGE = """<!doctype html>
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
{% macro panel(plot, wide) %}<figure{% if wide %} class="wide"{% endif %}>
<figcaption><b>{{ plot.title }}</b><span class="quiet">{{ plot.note }}</span></figcaption>
<img src="{{ plot.source }}" alt="{{ plot.alt }}"></figure>{% endmacro %}
<header>
<h1>{{ name }}</h1>
<p class="quiet">A reward model of mmft {{ version }}{% if made_of %}: {{ made_of }}{% endif %}.
{% if samples %}Judged on {{ samples }} that training never saw.{% endif %}</p>
{% if facts %}<ul class="facts">
{% for fact in facts %}<li><span class="quiet">{{ fact.name }}</span><b>{{ fact.value }}</b>
<span class="quiet">{{ fact.note }}</span></li>
{% endfor %}</ul>{% endif %}
</header>

{% if scorers %}<section>
<h2>Beside its baselines</h2>
<p class="quiet">On the same judgements, with 95% bootstrap intervals that draw whole pictures. A difference is called
better or worse only where its interval leaves out zero.</p>
<div class="scroll"><table>
<thead><tr><th></th><th>Pairwise accuracy</th><th>Kendall's tau</th><th>Length bias</th></tr></thead>
<tbody>
{% for line in scorers %}<tr><td>{{ line.name }}</td>
{% for cell in (line.accuracy, line.tau, line.bias) %}<td>{{ cell.value }} <small>{{ cell.interval }}</small></td>
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if differences %}<div class="scroll"><table>
<thead><tr><th>Difference of accuracy</th><th>Points</th><th></th></tr></thead>
<tbody>
{% for line in differences %}<tr><td>{{ line.name }}</td>
<td class="{{ line.verdict }}">{{ line.change.value }} <small>{{ line.change.interval }}</small></td>
<td class="{{ line.verdict }}">{{ line.verdict }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if remarks %}<dl>
{% for subject, text in remarks %}<dt>{{ subject }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>{% endif %}
</section>{% elif remarks %}<section>
<h2>Judgement</h2>
<dl>
{% for subject, text in remarks %}<dt>{{ subject }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>
</section>{% else %}<p class="quiet">Not judged yet.</p>{% endif %}

<div class="sections">
{% for section in sections %}<section{% if section.half %} class="half"{% endif %}>
<h2>{{ section.title }}</h2>
{% if section.note %}<p class="quiet">{{ section.note }}</p>{% endif %}
<div class="plots">
{% for plot in section.plots %}{{ panel(plot, section.wide) }}
{% endfor %}
{% if section.weights %}<div class="scroll"><table>
<thead><tr><th>Term</th><th>Weight</th><th>Free</th><th></th></tr></thead>
<tbody>
{% for weight in section.weights %}<tr><td>{{ weight.name }}</td>
<td>{{ weight.cell.value }} <small>{{ weight.cell.interval }}</small></td><td>{{ weight.unconstrained }}</td>
<td class="{{ weight.verdict }}">{{ weight.sign }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}
</div>
{% if section.more %}<details><summary>More metrics</summary><div class="plots">
{% for plot in section.more %}{{ panel(plot, false) }}
{% endfor %}</div></details>{% endif %}
</section>
{% endfor %}</div>
{% if examples %}<section>
<h2>Examples</h2>
<p class="quiet">Scores with their sigma, where the model has one.</p>
<div class="cards">
{% for example in examples %}<article class="card">
{% if example.image %}<img src="{{ example.image }}" alt="">
{% else %}<div class="nothing">no picture</div>{% endif %}
<h3><span>{{ example.kind }}</span><span class="{{ example.verdict }}">{{ example.ranked }}</span></h3>
<div class="chosen"><h3><span>Chosen</span><span>{{ example.score_chosen }}</span></h3><p>{{ example.chosen }}</p></div>
<div class="rejected"><h3><span>Rejected</span><span>{{ example.score_rejected }}</span></h3>
<p>{{ example.rejected }}</p></div>
</article>
{% endfor %}</div>
</section>{% endif %}
</main>
</body>
</html>
"""
