"""`frcnn anchors`: what the configured anchors do to the objects of the training splits. Images are not needed."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from jsonargparse import Namespace

from experiments.anchors.audit import AuditResult, Coverage
from experiments.anchors.audited_data import AuditInput, audit_input
from experiments.anchors.options import AuditOptions
from experiments.anchors.plot import audit_figure
from experiments.anchors.suggestion import Suggestion, suggest_anchors
from experiments.dataset.formats import lists_beside
from experiments.output import json_text, number, percent, save_plot


def print_audit(options: AuditOptions, config: Namespace) -> None:
    """Audit, and suggest and draw where asked to; print a table or one JSON document.

    Args:
        options: Of the audit.
        config: The options of `frcnn fit`, so that its config files and those of runs serve.

    Raises:
        InputError: Anything wrong with options or files.
    """
    given = audit_input(config, lists_beside(config))
    result = given.audit()
    suggestion = None
    if options.suggest is not None:
        about = given.anchors, given.strides, given.views(), options.suggest
        found = suggest_anchors(*about, form=options.suggest_form)
        suggestion = found, replace(given, anchors=found.applied(given.anchors)).audit()
    if options.plot is not None:
        title = f"{', '.join(given.truth.splits)}: {_sentence(given, result)}"
        save_plot(audit_figure(given, result, title), options.plot, dpi=100)
    if options.format == "json":
        print(json_text(_document(given, result, suggestion)))
    else:
        print("\n".join(_table(given, result, suggestion)))


_Suggested = tuple[Suggestion, AuditResult]


def _document(given: AuditInput, result: AuditResult, suggestion: _Suggested | None) -> dict[str, Any]:
    document = result.to_dict() | {
        "splits": list(given.truth.splits),
        "difficult": given.difficult,
        "difficult_objects": int(given.truth.objects.difficult.sum()),
        "strides": list(given.strides),
        "shortest_side": given.image.shortest_side,
        "longest_side": given.image.longest_side,
    }
    if suggestion is not None:
        document["suggestion"] = asdict(suggestion[0]) | {"audit": suggestion[1].to_dict()}
    return document


def _sentence(given: AuditInput, result: AuditResult) -> str:
    sides = given.image.shortest_side
    shortest = f"{sides[0]}" if len(sides) == 1 else f"{min(sides)} to {max(sides)}"
    return (
        f"{result.images} images, {result.objects:g} objects; shortest side {shortest}, longest "
        f"{given.image.longest_side}; straddling anchors {'dropped' if result.straddling == 'drop' else 'kept'}"
    )


def _table(given: AuditInput, result: AuditResult, suggestion: _Suggested | None) -> list[str]:
    difficult = int(given.truth.objects.difficult.sum())
    how = "included" if given.difficult == "keep" else "not counted"
    other = result.other_matcher
    lines = [
        f"{', '.join(given.truth.splits)}: {_sentence(given, result)}",
        f"({difficult} objects marked difficult are {how})",
        "",
        *_anchor_lines(result),
        "",
        *_coverage_lines(result),
        "",
        f"positive anchors per image: {result.positives_per_image:.1f}; of {result.wanted_positives} wanted, sampling "
        f"finds {result.sampled_positives_per_image:.1f} on average, and all of them in "
        f"{percent(result.share_images_wanted, '.1f')} of images",
        f"(positive: {result.rule}{f'; the training has rpn.matcher {other} instead' if other else ''})",
    ]
    lines += ["", *result.warnings] if result.warnings else []
    return lines + (_suggestion_lines(result, *suggestion) if suggestion is not None else [])


def _anchor_lines(result: AuditResult) -> list[str]:
    lines = ["stride   scale   ratio   width x height   legal at   fits nowhere in    best match   positives"]
    for anchor in result.anchors:
        sides = f"{anchor.width:.0f} x {anchor.height:.0f}"
        shares = f"{percent(anchor.best_match_share):>10}   {percent(anchor.positive_share):>9}"
        lines.append(
            f"{anchor.stride:6}  {number(anchor.scale, '6.6g')}  {anchor.aspect_ratio:6g}   {sides:>14}   "
            f"{percent(anchor.legal_share)}   {anchor.images_without:8} images   {shares}"
        )
    rule = "trained only there" if result.straddling == "drop" else "trained elsewhere, too"
    note = f"(legal: share of locations at which it is inside the image; straddling {result.straddling}: {rule})"
    return [*lines, note]


def _coverage_lines(result: AuditResult) -> list[str]:
    groups: list[tuple[str, Mapping[str, Coverage]]] = [
        ("", {"all objects": result}),
        ("by class", result.by_class),
        ("by size after resizing", result.by_size),
        ("by size in the original image", result.by_original_size),
        ("by aspect ratio (height / width)", result.by_aspect_ratio),
    ]
    lines = [f"{'best IoU with any anchor':32} objects    mean   >= 0.5    >= 0.7   rescued   no anchor"]
    for title, rows in groups:
        lines += [title] if title and rows else []
        for name, row in rows.items():
            shares = (row.share_iou_50, row.share_iou_70, row.share_rescued, row.share_without_anchor)
            text = "".join(f"  {percent(share)}" for share in shares)
            indented = f"  {name}" if title else name
            lines.append(f"{indented:32} {row.objects:7.6g}  {number(row.mean_best_iou, '6.3f')}{text}")
    return [*lines, "(rescued: only the rule that an object's best anchors are positive gives it any)"]


def _suggestion_lines(before: AuditResult, found: Suggestion, after: AuditResult) -> list[str]:
    gain = found.mean_best_iou - found.given_mean_best_iou
    return [
        "",
        f"suggested, on images that it was not fitted to ({found.folds} folds):",
        f"  mean best IoU {found.mean_best_iou:.3f} (given: {found.given_mean_best_iou:.3f}, gain {gain:+.3f}, by fold "
        f"{min(found.gains):+.3f} to {max(found.gains):+.3f})",
        f"  IoU >= 0.5 {percent(found.share_iou_50, '.1f')} (given: {percent(found.given_share_iou_50, '.1f')})",
        f"  {found.options}",
        "",
        f"{'before -> after, on all images':32} mean best IoU          >= 0.5                >= 0.7",
        *_changes({"all objects": before, **before.by_size}, {"all objects": after, **after.by_size}),
    ]


def _changes(before: Mapping[str, Coverage], after: Mapping[str, Coverage]) -> list[str]:
    return [
        f"  {name:30} {number(old.mean_best_iou, '.3f')} -> {number(new.mean_best_iou, '.3f')}"
        f"     {percent(old.share_iou_50)} -> {percent(new.share_iou_50)}"
        f"     {percent(old.share_iou_70)} -> {percent(new.share_iou_70)}"
        for (name, old), new in zip(before.items(), after.values(), strict=True)
    ]
