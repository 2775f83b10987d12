"""Serve the shipped teacher in vLLM's wire format, in its own process: `serve_wire.py PORT`."""

from __future__ import annotations

import sys

import torch
import uvicorn
from wire import Wire

from opdlab.tasks.market import model

if __name__ == "__main__":
    torch.set_num_threads(1)
    app = Wire(model("teacher")).app()
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
