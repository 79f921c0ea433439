"""An example server for config.reward.name=http, for rewards that need their own environment or machine.

    pip install numpy pillow && python docs/reward_server.py my_rewards:redness --port 8000

It serves a function of a numpy array of images uint8 [N,H,W,3] and N prompts that returns N numbers. b2diffurl need not be
installed. A request is {"prompts": ["a cat", …], "images": ["<PNG, base64>", …]}, the answer {"scores": [0.5, …]}.
"""

import argparse
import base64
import importlib
import io
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def serve(reward, host: str, port: int) -> ThreadingHTTPServer:
    """A server that answers requests with `reward`'s scores. Call its serve_forever()."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                pictures = [Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB") for image in asked["images"]]
                prompts = list(asked["prompts"])
            except (ValueError, KeyError, TypeError, OSError) as error:
                return self.answer(400, {"error": f"not a request: {error!r}"})
            try:
                scores = [float(score) for score in reward(np.stack([np.array(picture) for picture in pictures]), prompts)]
            except Exception as error:
                self.log_error("%r", error)
                return self.answer(500, {"error": repr(error)})
            return self.answer(200, {"scores": scores})

        def answer(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return ThreadingHTTPServer((host, port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", help="module:function, on the Python path or in this folder")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in: there is no password")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    module, _, function = given.reward.partition(":")
    serve(getattr(importlib.import_module(module), function), given.host, given.port).serve_forever()
