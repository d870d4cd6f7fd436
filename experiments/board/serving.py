"""`frcnn serve`: the page of a trained detector, and the same as JSON over HTTP, on one address."""

import os
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Final

import detector
from detector.errors import InputError, one_line
from detector.use.loading import TrainedDetector
from experiments.board.options import ServeOptions

PORTS: Final = range(7860, 7880)
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
MINUTE: Final = 60.0  # seconds
MOST_CALLERS: Final = 10_000  # whose requests are counted
MULTIPART: Final = 10_000  # bytes that a form may add to its image
PATIENCE: Final = 4  # times the limit: so much is read of what is too large


def serve(options: ServeOptions) -> None:
    """Load the detectors, print the address, and serve until Ctrl-C.

    Raises:
        InputError: gradio is not installed, a run cannot be loaded, or the address not be had.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported
    try:
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI

        from experiments.board.page import THEME, build_page
    except ImportError as error:
        raise InputError(f"frcnn serve needs gradio ({error.name} is missing); pip install '.[serve]'") from error
    paths = [options.run, *([] if options.beside is None else [options.beside])]
    detectors = {path: detector.load(path, options.device) for path in paths}
    for trained in detectors.values():
        _ = trained.module  # what is exported cannot be looked into, and says so
    lock, limit = Lock(), int(options.max_megabytes * 1e6)
    app = FastAPI(title="frcnn serve", docs_url=None, redoc_url=None, openapi_url=None)
    if options.api:
        add_api(app, detectors, lock, limit, options.requests_per_minute)
    page = build_page(detectors, lock)
    app = gr.mount_gradio_app(app, page, path="/", max_file_size=limit, theme=THEME, footer_links=[], show_error=True)
    with _listening(options) as listener:
        host, port = listener.getsockname()[:2]
        if options.host not in LOOPBACK:
            print(
                f"frcnn: --host {options.host}: whoever reaches this machine can use the page; there is no password",
                file=sys.stderr,
            )
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{address}  ({', '.join(paths)}{'; POST /detect' if options.api else ''}; Ctrl-C ends)", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            return


def _listening(options: ServeOptions) -> socket.socket:
    """Return a socket that listens at the address, by default at the first port that is free.

    Raises:
        InputError: There is none.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    for port in PORTS if options.port is None else [options.port]:
        try:
            return socket.create_server((options.host, port), family=family)
        except (OSError, OverflowError) as error:
            reason = error
    port_text = f"{PORTS[0]} to {PORTS[-1]}" if options.port is None else f"{options.port}"
    raise InputError(f"--host {options.host} --port {port_text}: {one_line(reason)}") from reason


class Requests:
    """Count the requests of each address in the last minute."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._times: dict[str, deque[float]] = {}

    def refused_for(self, caller: str, now: float) -> float:
        """Count a request at a time in seconds, and return for how many more it is refused; 0: it is not."""
        if len(self._times) >= MOST_CALLERS:
            self._times = {name: times for name, times in self._times.items() if now - times[-1] < MINUTE}
        times = self._times.setdefault(caller, deque())
        while times and now - times[0] >= MINUTE:
            times.popleft()
        if len(times) >= self.per_minute:
            return MINUTE - (now - times[0])
        times.append(now)
        return 0.0


def add_api(
    app: Any, detectors: Mapping[str, TrainedDetector], lock: Lock, limit: int, requests_per_minute: int
) -> None:
    """Let an app answer POST /detect, with an image of at most `limit` bytes as its body or in a form's `image`.

    The answer is `{"width", "height", "detections": {RUN: [{"name", "label", "score", "box": [x1, y1, x2, y2]}]}}`; of
    what is wrong `{"detail"}` under status 400, 413 (too large) or 429 (too many requests).
    """
    from fastapi import HTTPException, Request
    from fastapi.concurrency import run_in_threadpool

    requests = Requests(requests_per_minute)

    async def detect(request: Request, score_threshold: float = 0.5) -> dict[str, Any]:
        wait = requests.refused_for(request.client.host if request.client else "", time.monotonic())
        form = request.headers.get("content-type", "").startswith("multipart/form-data")
        body = await _body(request, 0 if wait else limit + (MULTIPART if form else 0), PATIENCE * limit)
        if wait:
            said = f"more than {requests_per_minute} requests in a minute; again in {wait:.0f} s"
            raise HTTPException(429, said, headers={"Retry-After": str(max(1, round(wait)))})
        if body is None:
            raise HTTPException(413, f"more than {limit / 1e6:g} MB")
        if form:
            request._body = body
            image = (await request.form()).get("image")
            if not hasattr(image, "read"):
                raise HTTPException(400, "the form has no file named image")
            body = await image.read()
        try:
            answer: dict[str, Any] = await run_in_threadpool(_detect, detectors, lock, body, score_threshold)
            return answer
        except InputError as error:
            raise HTTPException(400, one_line(error).removeprefix(": ")) from error

    detect.__annotations__["request"] = Request  # which is imported here
    app.post("/detect")(detect)


async def _body(request: Any, most: int, patience: int) -> bytes | None:
    """Return what a request sends, or None where it is more than `most` bytes.

    Of more than these, up to `patience` bytes are read all the same: a client that is still sending when the connection
    ends does not see the answer.
    """
    body, seen = bytearray(), 0
    async for part in request.stream():
        seen += len(part)
        if seen > patience:
            break
        if seen <= most:
            body += part
    return bytes(body) if seen <= most else None


def _detect(
    detectors: Mapping[str, TrainedDetector], lock: Lock, data: bytes, score_threshold: float
) -> dict[str, Any]:
    """Return what all detectors find in the bytes of an image file.

    Raises:
        InputError: They are none.
    """
    answer: dict[str, Any] = {"detections": {}}
    with tempfile.TemporaryDirectory() as folder, lock:
        path = Path(folder) / "image"
        path.write_bytes(data)
        for name, trained in detectors.items():
            try:
                found = trained(path, score_threshold)
            except InputError as error:
                raise InputError(str(error).replace(f"{path}", "image")) from error
            answer["height"], answer["width"] = found.size
            answer["detections"][name] = [
                {"name": one.name, "label": one.label, "score": one.score, "box": one.box} for one in found
            ]
    return answer
