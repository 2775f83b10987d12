"""The exercises, in one module per notebook.

`notebook_11_divergences` holds those of `notebooks/11_divergences.ipynb` as `EXERCISES`. In each
module a public function is a solution as the notebook shows it; `_reference…` functions are the
library's answers, `_cases…` the arguments to compare on, and the other private functions are
mistakes that readers make, named by what is wrong. A module is imported when a key asks for it.
"""
