"""What the measurements of a row say when something of it cannot be had."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from ditflow.media.video import encode_video
from ditflow.metrics.base import MetricSettings
from pipeline.job import Job, Output
from pipeline.measurements import Measurements
from pipeline.stages.evaluate import EvaluateRow
from pipeline.store import Store


@pytest.mark.parametrize("status", [403, 404])
def test_a_row_whose_reference_had_a_signed_address_is_measured_without_it_and_says_why(tmp_path, status):
    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(status)

        do_GET = do_HEAD

        def log_message(self, *_) -> None: ...

    frames = np.zeros((9, 32, 32, 3), np.uint8)
    size = {"frames": 9, "height": 32, "width": 32}
    video = {**size, "start": 0, "stride": 1, "fit": "crop"}
    store, data = Store(str(tmp_path)), encode_video(frames, 8.0)
    stored = store.put("videos/0a.mp4", data)
    settings = MetricSettings(names=("motion_fidelity",))
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/a.mp4"
        made = {"row_id": "0a", "prompt": "x", "reference_uri": uri, "reference_sha256": "0" * 64, **size}
        made |= {"output_uri": stored.uri, "output_sha256": stored.sha256, "spec_json": json.dumps({"video": video})}
        job = Job("evaluate", "test", Output(str(tmp_path)), metrics=settings)
        EvaluateRow(job)._measure(made, ["motion_fidelity"])
        server.shutdown()
    (figure,) = Measurements(store).taken_with(settings)
    assert figure["value"] is None
    assert uri in figure["reason"]
    assert status == 404 or "signatures are not written down" in figure["reason"]
