"""`report`: one run as one HTML page that needs nothing else, no script and no other file."""

import json
from collections.abc import Iterable
from collections.abc import Sequence
from html import escape

from esper.commands.output import number
from esper.contracts.operational import EpochReport
from esper.contracts.orders import RunDocument
from esper.runtime.configuration import dump_config
from esper.runtime.run_document import RunView
from esper.runtime.run_document import history_document

WIDTH, HEIGHT, LEFT, BOTTOM = 880, 260, 56, 28
LOSSES = (("train_loss", "training loss", "train"), ("val_loss", "validation loss", "validation"))

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5c6773; --line: #d5dae0; --page: #ffffff;
  --train: #2f6fb2; --validation: #c2571a; --graft: #2c8a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #98a2ae; --line: #38414c; --page: #14181d;
  --train: #7db4ef; --validation: #f0955b; --graft: #6fcf8f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, caption { color: var(--dim); } caption { text-align: left; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } pre { overflow-x: auto; border: 1px solid var(--line); padding: 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
.axis { stroke: var(--line); } .train { stroke: var(--train); } .validation { stroke: var(--validation); }
.graft { stroke: var(--graft); stroke-dasharray: 3 3; } polyline { fill: none; stroke-width: 2; }
.error { border-left: 4px solid #c0392b; padding-left: 1rem; }
"""


def page(view: RunView, document: RunDocument) -> str:
    """The page. Whatever users named (runs, sites, reasons) is escaped."""
    title = f"Run {document.run_id}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(document.outcome.value)}, {document.epochs} of {view.record.config.run.max_epochs} epochs, "
        f"{document.steps} steps, begun {escape(view.record.created)}</p>",
        *_failure(view),
        *(f"<p>Warning: {escape(warning)}</p>" for warning in document.warnings),
        "<h2>Result</h2>",
        _table(("what", "value"), _facts(document)),
        "<h2>Losses</h2>",
        _chart(view.reports, [known.apply_step for known in view.adaptations if known.apply_step is not None]),
        "<h2>Adaptations</h2>",
        _adaptations(view),
        "<h2>Decisions</h2>",
        _decisions(view),
        "<h2>Configuration</h2>",
        f"<pre>{escape(dump_config(view.record.config).rstrip())}</pre>",
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _failure(view: RunView) -> Iterable[str]:
    failure = view.record.failure
    if failure is not None:
        text = f"{failure.get('code')}: {failure.get('message')}. {failure.get('hint') or ''}"
        yield f'<p class="error">{escape(text)}</p>'


def _facts(document: RunDocument) -> list[tuple[object, ...]]:
    start, end = document.parameters["start"], document.parameters["end"]
    facts: list[tuple[object, ...]] = [
        (name.replace("_", " "), number(value)) for name, value in document.metrics.items()
    ]
    return [
        *facts,
        ("parameters", f"{'-' if start is None else start} to {'-' if end is None else end}"),
        ("training FLOPs", f"{document.compute.training_flops:.4g}"),
        ("probe and twin FLOPs", f"{document.compute.probe_flops:.4g}"),
        ("decisions", f"{document.decisions}, {document.missed} missed"),
        ("stall", f"{document.stall_s:g} s"),
        ("restarts", document.restarts),
        ("device", "-" if document.device is None else f"{document.device}, {document.threads} threads"),
        ("weights digest", document.digest or "-"),
    ]


def _adaptations(view: RunView) -> str:
    if not view.adaptations:
        return "<p>Nothing has been grown.</p>"
    rows = [
        (
            known.adaptation_id,
            known.epoch,
            known.site,
            known.blueprint,
            known.apply_step,
            known.state.value,
            number(known.judge.gain if known.judge else None),
            number(known.judge.gain_lower_bound if known.judge else None),
            known.reason,
        )
        for known in view.adaptations
    ]
    names = ("adaptation", "epoch", "site", "blueprint", "apply step", "state", "gain", "lower bound", "reason")
    return _table(names, rows, "Gain: the loss of a twin that never grew less the grown model's, on the judge slice.")


def _decisions(view: RunView) -> str:
    decisions = history_document(view)["decisions"]
    if not decisions:
        return "<p>The strategist has not decided yet.</p>"
    rows = [
        (d["epoch"], d["kind"], d["code"], d["site"], d["blueprint"], d["reason"], _evidence(d["features"]))
        for d in decisions
    ]
    return _table(("epoch", "decision", "code", "site", "blueprint", "reason", "evidence"), rows)


def _evidence(features: dict[str, float]) -> str:
    return json.dumps({name: float(f"{value:.4g}") for name, value in features.items()}) if features else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = [
        "<tr>" + "".join(f"<td>{'' if cell is None else escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{told}<thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _chart(reports: Sequence[EpochReport], grafts: Sequence[int]) -> str:
    """Losses over steps as one drawing; a dashed line is a graft."""
    if not reports:
        return "<p>No epoch has been finished yet.</p>"
    values = [getattr(report.metrics, name) for report in reports for name, _, _ in LOSSES]
    low, high = min(values), max(values)
    last = max(report.step for report in reports)

    def across(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * step / last if last else float(LEFT)

    def down(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return 8 + (HEIGHT - BOTTOM - 8) * (1 - share)

    shapes: list[str] = [
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>',
        *(f'<text x="0" y="{down(value) + 4:.1f}">{value:.3g}</text>' for value in dict.fromkeys((low, high))),
        f'<text x="{LEFT}" y="{HEIGHT - 8}">step 0</text>',
        f'<text x="{WIDTH}" y="{HEIGHT - 8}" text-anchor="end">{last}</text>',
    ]
    for step in grafts:
        x = f"{across(min(step, last)):.1f}"
        told = f"<title>graft at step {step}</title>"
        shapes.append(f'<line class="graft" x1="{x}" x2="{x}" y1="8" y2="{HEIGHT - BOTTOM}">{told}</line>')
    for index, (name, label, kind) in enumerate(LOSSES):
        points = _points((across(report.step), down(getattr(report.metrics, name))) for report in reports)
        shapes.append(f'<polyline class="{kind}" points="{points}"><title>{label}</title></polyline>')
        left, top = WIDTH - 150, 20 + 18 * index
        shapes.append(f'<line class="{kind}" x1="{left}" x2="{left + 20}" y1="{top}" y2="{top}" stroke-width="2"/>')
        shapes.append(f'<text x="{left + 26}" y="{top + 4}">{label}</text>')
    label = "Training and validation loss over steps; dashed lines are grafts"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
