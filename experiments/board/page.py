"""The page of `frcnn serve`, in gradio: an image, what one or two detectors see in it, and the scores of a box."""

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, Final, NamedTuple

import gradio as gr

from detector.errors import InputError, one_line
from detector.use.loading import TrainedDetector
from experiments.board.looking import VIEWS, Look, look

THEME: Final = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
_HIDDEN: Final = {"api_visibility": "private", "show_progress": "minimal"}
_MOST_NAMES: Final = 10


class _Column(NamedTuple):
    """What the page holds of a detector: the last pass, its picture, how much that is enlarged, a line, and scores."""

    look: gr.State
    picture: gr.Image
    enlarged: gr.State
    line: gr.Markdown
    scores: gr.Label


def build_page(detectors: Mapping[str, TrainedDetector], lock: Lock) -> gr.Blocks:
    """Return the page of some detectors by name, one column each; the lock is held while one of them computes."""
    every = dict.fromkeys(name for trained in detectors.values() for name in trained.class_names.values())
    with gr.Blocks(title="frcnn serve", analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            image = gr.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image", height=260
            )
            with gr.Column(scale=2):
                view = gr.Radio(list(VIEWS), value=next(iter(VIEWS)), label="Show")
                score = gr.Slider(0, 1, 0.5, step=0.01, label="Score from")
                classes = gr.Dropdown(list(every), multiselect=True, label="Classes", info="None chosen: all.")
        with gr.Row():
            columns = [_column(name) for name in detectors]
        choice = [view, score, classes]
        for column, trained in zip(columns, detectors.values(), strict=True):
            drawn = [column.picture, column.enlarged, column.line]
            shown = image.change(_seen(trained, lock), image, [column.look, column.scores], **_HIDDEN)
            shown.then(_drawn(lock), [column.look, *choice], drawn, **_HIDDEN)
            gr.on([one.change for one in choice], _drawn(lock), [column.look, *choice], drawn, **_HIDDEN)
            clicked = [column.look, column.enlarged, score, classes]
            column.picture.select(_clicked, clicked, [column.scores, column.line], **_HIDDEN)
    return page


def _column(name: str) -> _Column:
    with gr.Column():
        state = gr.State(None, time_to_live=3600)
        gr.Markdown(f"### `{name}`")
        line = gr.Markdown()
        buttons = ["download", "fullscreen"]
        picture = gr.Image(interactive=False, format="png", label="Click a box", buttons=buttons, elem_classes="drawn")
        scores = gr.Label(num_top_classes=_MOST_NAMES, label="Scores of the box")
        return _Column(state, picture, gr.State(1.0), line, scores)


def _seen(trained: TrainedDetector, lock: Lock) -> Callable[[str | None], tuple[Look | None, None]]:
    def see(path: str | None) -> tuple[Look | None, None]:
        if path is None:
            return None, None
        try:
            with lock:
                return look(trained, path), None
        except InputError as error:
            raise gr.Error(one_line(error)) from error

    return see


def _drawn(lock: Lock) -> Callable[..., tuple[Any, float, str]]:
    def draw(seen: Look | None, view: str, score: float, classes: list[str]) -> tuple[Any, float, str]:
        if seen is None:
            return None, 1.0, ""
        with lock:
            picture = seen.picture(VIEWS[view], score, classes)
        line = f"{len(seen.shown(score, classes))} of {len(seen.found)} detections shown"
        return picture.permute(1, 2, 0).numpy(), picture.shape[2] / seen.pixels.shape[2], line

    return draw


def _clicked(
    seen: Look | None, enlarged: float, score: float, classes: list[str], event: gr.SelectData
) -> tuple[Any, str]:
    """Return the scores of the box at a point of the picture, and what box it is."""
    if seen is None:
        return None, ""
    x, y = (place / enlarged for place in event.index)
    found = seen.scores_at(x, y, score, classes)
    return (
        (found.scores, f"Scores of {found.about}") if found else (None, "There is neither a detection nor a proposal")
    )
