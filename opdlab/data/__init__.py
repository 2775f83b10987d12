"""Stored data: prompts, rollouts, columns, traces.

Nothing here imports a model or transformers.
"""
