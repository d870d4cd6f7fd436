"""A report as one HTML page that needs nothing else: no network, no script, pictures inside."""

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from experiments.report.document import Report
from experiments.report.pictures import anchor_pictures, curves_picture
from experiments.report.text import difference_text, legend, problems, state, table_rows

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 2rem auto; max-width: 1280px;
       padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd }
thead th { white-space: normal; vertical-align: bottom; border-bottom: 2px solid #888 }
th.text, td.text { text-align: left }
tr.baseline td { background: #f2f2ee } td.better { color: #05630f; font-weight: 600 }
td.worse { color: #a3120a; font-weight: 600 }
.map td { border: 1px solid #fff; text-align: center; min-width: 7rem; padding: .6rem }
.map thead th:not(.text) { text-align: center } #cells th:not(.text) { min-width: 4.5rem }
.map small { opacity: .85 } td.none { background: #eee; color: #666 }
.note { color: #555; font-size: .9rem } img { max-width: 100%; height: auto } li { overflow-wrap: anywhere }
"""
BLUE, RED, GREEN, WHITE = (8, 64, 129), (178, 40, 40), (24, 120, 56), (255, 255, 255)


def html_page(made: Report) -> str:
    """The whole page."""
    document = made.document
    parts = [
        f"<h1>{escape(document['name'])}</h1>",
        f'<p class="note">{escape(document["summary"])}</p>',
        *_main_table(document),
        *_problems(document),
        *_heat_maps(document),
        *_curves(made),
        *_per_class(document),
        *_anchors(made),
    ]
    title = escape(f"{document['name']}: {document['summary']}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"\n<style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _main_table(document: Mapping[str, Any]) -> Iterator[str]:
    headers, rows = table_rows(document)
    texts = len(document["axes"]) + 1
    yield '<div class="scroll"><table id="cells"><thead><tr>'
    yield "".join(f"<th{_text(i < texts)}>{escape(header)}</th>" for i, header in enumerate(headers))
    yield "</tr></thead><tbody>"
    for cell, row in zip(document["cells"], rows, strict=True):
        kind = ' class="baseline"' if cell["name"] == document["baseline"] else ""
        cells = []
        for index, text in enumerate(row):
            style = _text(index < texts)
            if headers[index].startswith("difference") and text.endswith("*"):
                style = f' class="{"better" if text.startswith("+") else "worse"}"'
            cells.append(f"<td{style}>{escape(text)}</td>")
        yield f"<tr{kind}>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    for line in legend(document):
        yield f'<p class="note">{escape(line)}</p>'


def _text(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    lines = problems(document)
    if lines:
        yield "<h2>Runs that are not finished, and notes</h2><ul>"
        yield from (f"<li>{escape(line)}</li>" for line in lines)
        yield "</ul>"


def _heat_maps(document: Mapping[str, Any]) -> Iterator[str]:
    """The first metric over the first two axes that vary, once for each combination of the others."""
    name = next(iter(document["cells"][0]["metrics"]))
    axes = [axis for axis, values in document["axes"].items() if len(values) > 1]
    if len(axes) < 2:
        return
    yield f"<h2>{escape(name)} over {escape(axes[0])} and {escape(axes[1])}</h2>"
    means = [cell["metrics"][name]["mean"] for cell in document["cells"]]
    known = [value for value in means if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    others = axes[2:]
    for fixed in itertools.product(*(document["axes"][axis] for axis in others)):
        cells = [
            cell
            for cell in document["cells"]
            if all(cell["axes"].get(axis) == label for axis, label in zip(others, fixed, strict=True))
        ]
        if others and cells:
            yield f"<h3>{escape(', '.join(f'{a} = {v}' for a, v in zip(others, fixed, strict=True)))}</h3>"
        if cells:
            yield from _heat_map(document, cells, axes[0], axes[1], name, (low, high))


def _heat_map(
    document: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    down: str,
    across: str,
    name: str,
    bounds: tuple[float, float],
) -> Iterator[str]:
    columns = document["axes"][across]
    by_place = {(cell["axes"].get(down), cell["axes"].get(across)): cell for cell in cells}
    yield '<div class="scroll"><table class="map"><thead><tr>'
    yield f'<th class="text">{escape(down)} \\ {escape(across)}</th>'
    yield "".join(f"<th>{escape(label)}</th>" for label in columns) + "</tr></thead><tbody>"
    for row in document["axes"][down]:
        cells_of_row = (_heat_cell(by_place.get((row, column)), document, name, bounds) for column in columns)
        yield f'<tr><th class="text">{escape(row)}</th>{"".join(cells_of_row)}</tr>'
    yield "</tbody></table></div>"


def _heat_cell(
    cell: Mapping[str, Any] | None, document: Mapping[str, Any], name: str, bounds: tuple[float, float]
) -> str:
    if cell is None:
        return '<td class="none">not in the grid</td>'
    metric = cell["metrics"][name]
    if metric["mean"] is None:
        return f'<td class="none">{escape(state(cell))}</td>'
    low, high = bounds
    share = (metric["mean"] - low) / (high - low) if high > low else 0.5
    spread = "" if metric["std"] is None else f" &plusmn; {metric['std']:.4f}"
    details = [difference_text(cell, name, document)] if document["baseline"] is not None else []
    details += [state(cell)] if cell["status"] != "done" else []
    below = "".join(f"<br><small>{escape(text)}</small>" for text in details)
    return f'<td style="{_color(0.05 + 0.85 * share, BLUE)}">{metric["mean"]:.4f}{spread}{below}</td>'


def _color(share: float, towards: tuple[int, int, int]) -> str:
    mixed = [round(white + share * (color - white)) for white, color in zip(WHITE, towards, strict=True)]
    dark = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] < 140
    return f"background: rgb({mixed[0]}, {mixed[1]}, {mixed[2]}); color: {'#fff' if dark else '#1c1c1c'}"


def _curves(made: Report) -> Iterator[str]:
    picture = curves_picture(made)
    if picture is not None:
        yield "<h2>Over the epochs</h2>"
        yield _image(picture, "validation metric and training loss over epochs")
        yield '<p class="note">Thick: mean over seeds; thin: single runs, unfinished ones as far as they are.</p>'


def _per_class(document: Mapping[str, Any]) -> Iterator[str]:
    cells = [cell for cell in document["cells"] if cell["per_class"]]
    if not cells:
        return
    names = list(cells[0]["per_class"])
    largest = max((abs(one["difference"] or 0) for cell in cells for one in cell["per_class"].values()), default=0)
    yield f"<h2>AP50_voc of each class, difference to {escape(document['baseline'])}</h2>"
    yield '<div class="scroll"><table class="map" id="classes"><thead><tr><th class="text">class</th>'
    yield "".join(f"<th>{escape(cell['name'].replace(',', ', '))}</th>" for cell in cells) + "</tr></thead><tbody>"
    for name in names:
        row = "".join(_class_cell(cell["per_class"].get(name), largest) for cell in cells)
        yield f'<tr><th class="text">{escape(name.split("/", 1)[1])}</th>{row}</tr>'
    yield "</tbody></table></div>"
    yield '<p class="note">Below: 95 % interval over images; * where it excludes 0, as some do by chance.</p>'


def _class_cell(one: Mapping[str, Any] | None, largest: float) -> str:
    if one is None or one["difference"] is None:
        return '<td class="none">-</td>'
    value = one["difference"]
    color = _color(0.75 * abs(value) / largest if largest else 0, GREEN if value > 0 else RED)
    star = " *" if one["excludes_zero"] else ""
    interval = "" if one["low"] is None else f"<br><small>{one['low']:+.3f} .. {one['high']:+.3f}</small>"
    return f'<td style="{color}">{value:+.3f}{star}{interval}</td>'


def _anchors(made: Report) -> Iterator[str]:
    pictures = anchor_pictures(made)
    if pictures:
        yield "<h2>Anchors and the objects of the training splits</h2>"
    for names, warnings, picture in pictures:
        yield f"<h3>{escape('; '.join(names))}</h3>"
        yield _image(picture, f"objects and anchors of {', '.join(names)}")
        if warnings:
            yield '<ul class="note">' + "".join(f"<li>{escape(line)}</li>" for line in warnings) + "</ul>"


def _image(png: bytes, text: str) -> str:
    return f'<p><img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'
