"""Measure opdlab, beside TRL and CircuitsVis; README.md in this folder says how."""
