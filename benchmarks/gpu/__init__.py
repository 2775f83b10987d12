"""Measure opdlab on a GPU, against TRL, Liger, transformers, vLLM and the card's limits.

    python -m benchmarks.gpu --only limits loss scoring      (the first of three commands)

`cases` says what is measured, `sizes` with which shapes, `targets` what is expected of it, and
`__main__` runs every case in a process of its own.
"""
