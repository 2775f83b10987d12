"""The documentation site: its pages are made of the repository, and built without a network.

`build.py` lists the steps. How the site is made, and why so: `docs/site.md`.
"""
