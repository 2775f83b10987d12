"""Serve a GGUF file with llama.cpp's own server: `python llama_cpp.py FILE PORT`."""

import sys
import time

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.model_alias = {"smollm2"}
parameters.n_ctx, parameters.n_parallel = 2048, 2
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
while True:
    time.sleep(1)
