"""`frcnn compare`: what differs between two runs, by options, metrics, classes and images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError, printable, shown_options
from detector.files import without_nan
from detector.metrics.curves import MISSED
from detector.metrics.voc_ap import FALSE_POSITIVE, TRUE_POSITIVE, evaluate_voc
from experiments.output import json_text, number, option_text
from experiments.results.compare_curves import both, compare_curves, draw_curves
from experiments.results.compare_pictures import draw_images
from experiments.results.options import CompareOptions
from experiments.results.runs import NOT_COMPARED, Run, read_run
from experiments.results.scored_runs import Scorer, detection_curves
from experiments.results.scores import CLASS_PREFIX, Scored, difference

INTERVAL = ("low", "high", "excludes_zero", "share_better")


def compare(options: CompareOptions) -> None:
    """Compare two runs, and print a table or one JSON document.

    Raises:
        InputError: No such run, no numbers in it, runs that were evaluated on different images, a bad option.
    """
    runs = read_run(options.run_a), read_run(options.run_b)
    part = options.part or ("test" if all("test/AP50_voc07" in run.metrics for run in runs) else "val")
    for run in runs:
        if run.metric("AP50_voc07", part) is None:
            command = f"frcnn {'test' if part == 'test' else 'validate'} --ckpt_path {run.folder}/checkpoints/last.ckpt"
            raise InputError(f"{run.folder}: has no {part}/AP50_voc07 in metrics.json; {command} adds it")
    document = _document(options, runs, part)
    if options.format == "json":
        print(json_text(document))
    else:
        print("\n".join(_table(without_nan(document))))


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return options whose values differ: `a`, `b` by name; "not there" where one has no such option.

    Where results are written is left out; the seed is not.
    """
    ours, theirs = shown_options(a), shown_options(b)
    names = [n for n in ours | theirs if n == "seed_everything" or n.split(".")[0] not in NOT_COMPARED]
    values = {name: {"a": ours.get(name, "not there"), "b": theirs.get(name, "not there")} for name in names}
    return {name: pair for name, pair in values.items() if pair["a"] != pair["b"]}


def image_errors(run: Scored, score_threshold: float) -> NDArray[np.int64]:
    """Count missed objects and false detections (2, N) of each image, at IoU 0.5, difficult objects ignored.

    Detections below the threshold are left out; as detections are matched best score first, that changes nothing about
    the others.
    """
    detections, objects = run.detections, run.truth.objects
    flags = evaluate_voc(detections, objects, range(1, len(run.truth.class_names) + 1)).flags
    kept = detections.score >= score_threshold
    images = [objects.image_id[~objects.difficult]]
    images += [detections.image_id[kept & (flags == flag)] for flag in (TRUE_POSITIVE, FALSE_POSITIVE)]
    there, found, false = (np.bincount(image, minlength=len(run.truth.image_names)) for image in images)
    return np.stack([there - found, false])


def most_different(change: NDArray[np.int64], count: int) -> list[int]:
    """Return the images whose numbers of errors change most, the largest change first; without those of no change."""
    order = np.argsort(-abs(change), kind="stable")
    return [int(image) for image in order[:count] if change[image]]


def _document(options: CompareOptions, runs: tuple[Run, Run], part: str) -> dict[str, Any]:
    scorer = Scorer(part, options.bootstrap, options.seed, coco=True)
    a, b = (scorer.score(run) for run in runs)
    paired = difference(b, a)
    metrics: dict[str, dict[str, Any]] = {}
    names = [name for name in runs[0].metrics if name.startswith(f"{part}/") and name in runs[1].metrics]
    for name in (name.removeprefix(f"{part}/") for name in names):
        metrics[name] = both(*(run.metric(name, part) for run in runs))
        metrics[name] |= {key: paired.get(name, {}).get(key) for key in INTERVAL}
    per_class = {name.removeprefix(CLASS_PREFIX): metrics.pop(name) for name in [*metrics] if CLASS_PREFIX in name}
    curves = [detection_curves(*pair, part, options.score_threshold) for pair in zip(runs, (a, b), strict=True)]
    drawn = None if options.output is None else draw_curves(curves, [run.folder.name for run in runs], options.output)
    errors = np.stack([image_errors(run, options.score_threshold) for run in (a, b)])
    change = errors[1].sum(axis=0) - errors[0].sum(axis=0)
    chosen = most_different(change, options.images)
    pictures: list[str | None] = [None] * len(chosen)
    notes: list[str] = []
    if options.output is not None and not chosen:
        notes.append(_why_nothing_is_drawn(options, (a, b)))
    elif options.output is not None:
        try:
            pictures, notes = draw_images(runs, (a, b), part, chosen, options.score_threshold, options.output)
        except InputError as error:
            notes.append(f"no pictures: {error}")

    def per_image(run: int, image: int) -> dict[str, int]:
        missed, false = errors[run, :, image].tolist()
        return {"missed": missed, "false": false}

    return {
        "a": str(runs[0].folder),
        "b": str(runs[1].folder),
        "part": part,
        "bootstrap": {"resamples": options.bootstrap, "seed": options.seed, "level": 0.95},
        "config": config_differences(runs[0].config, runs[1].config),
        "identical": _identical(*runs),
        "metrics": metrics,
        "per_class": per_class,
        "curves": compare_curves(*curves) | {"pictures": drawn},
        "score_threshold": options.score_threshold,
        "errors": {"images": len(change), "fewer": int((change < 0).sum()), "more": int((change > 0).sum())},
        "images": [
            {
                "name": a.truth.image_names[image],
                "errors_a": per_image(0, image),
                "errors_b": per_image(1, image),
                "picture": picture,
            }
            for image, picture in zip(chosen, pictures, strict=True)
        ],
        "notes": notes,
    }


def _identical(a: Run, b: Run) -> bool:
    """Return whether all losses, metrics and detections are the same to the last digit; speeds are left out."""

    def results(run: Run) -> tuple[dict[str, Any], bytes]:
        names = [name for name in run.metrics if "/" in name and "per_second" not in name]
        predictions = run.folder / "predictions.json"
        return {name: run.metrics[name] for name in names}, predictions.read_bytes() if predictions.is_file() else b""

    return results(a) == results(b)


def _why_nothing_is_drawn(options: CompareOptions, runs: tuple[Scored, Scored]) -> str:
    if options.images == 0:
        return "no pictures of images: --images 0"
    threshold = options.score_threshold
    why = "no pictures of images: A and B make equally many errors in every image, counting scores of "
    why += f"{threshold:g} or more"
    best = [float(run.detections.score.max(initial=0)) for run in runs]
    if min(best) >= threshold:
        return why
    return f"{why}; A's highest is {best[0]:.2f}, B's {best[1]:.2f}: give a lower --score_threshold"


def _table(document: Mapping[str, Any]) -> list[str]:
    lines = [f"A  {document['a']}", f"B  {document['b']}", ""]
    lines += ["identical: losses, metrics and detections, to the last digit", ""] if document["identical"] else []
    lines.append("options that differ")
    width = max((len(name) for name in document["config"]), default=0)
    for name, pair in document["config"].items():
        lines.append(f"  {name:{width}}  A {option_text(pair['a'])}  B {option_text(pair['b'])}")
    lines += [] if document["config"] else ["  none"]
    lines += _metric_lines(f"{document['part']} metrics", document["metrics"])
    lines += _metric_lines("AP50_voc of each class", document["per_class"])
    lines.append(
        f"(intervals: {document['bootstrap']['resamples']} paired resamples of the images; * excludes 0. They tell "
        "how far the choice of images moves the difference, not the training seed)"
    )
    lines += _curve_lines(document["curves"], document["score_threshold"])
    errors = document["errors"]
    lines += [
        "",
        f"errors (missed objects and false detections with score {document['score_threshold']:g} or more): B makes "
        f"fewer in {errors['fewer']} of {errors['images']} images, more in {errors['more']}",
    ]
    for image in document["images"]:
        texts = [f"{image[key]['missed']} missed, {image[key]['false']} false" for key in ("errors_a", "errors_b")]
        where = f"   {printable(image['picture'])}" if image["picture"] else ""
        lines.append(f"  {printable(image['name'])}: A {texts[0]}; B {texts[1]}{where}")
    return [*lines, *(f"note: {note}" for note in document["notes"])]


def _curve_lines(curves: Mapping[str, Any], score_threshold: float) -> list[str]:
    lines = _metric_lines("AP50 lost to", curves["lost_to"])
    lines += _metric_lines("scores", {"calibration_error": curves["calibration_error"]})
    lines += ["", f"confusions with score {score_threshold:g} or more that differ most"] if curves["confusions"] else []
    for one in curves["confusions"]:
        missed = one["detected"] == MISSED
        what = f"missed {one['object']}" if missed else f"{one['object']} detected as {one['detected']}"
        lines.append(f"  {what}: A {one['a']}, B {one['b']}")
    return [*lines, *(f"drawn: {printable(path)}" for path in curves["pictures"] or ())]


def _metric_lines(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    width = max(len(title), *(len(name) + 2 for name in metrics)) if metrics else len(title)
    intervals = any(one["low"] is not None for one in metrics.values())
    lines = ["", f"{title:{width}}        A        B    B - A" + "   95 % interval" * intervals]
    for name, one in metrics.items():
        numbers = "".join(f"  {number(one[key], '7.4f')}" for key in ("a", "b"))
        between = ""
        if one["low"] is not None:
            star = " *" if one["excludes_zero"] else ""
            between = f"   {one['low']:+.4f} .. {one['high']:+.4f}{star}"
        lines.append(f"{'  ' + name:{width}}{numbers}  {number(one['difference'], '+7.4f')}{between}")
    return lines
