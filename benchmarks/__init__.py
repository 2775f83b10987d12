"""opdlab against TRL on one workload, side by side:

`python -m benchmarks.run` (see README.md in this folder).
"""
