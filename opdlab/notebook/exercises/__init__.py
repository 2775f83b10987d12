"""The exercises, one module a notebook:

`ex11.py` has those of notebook 11 as `EXERCISES`. Found by key, loaded when needed.
"""
