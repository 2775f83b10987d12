"""Language models as policies: load, check, sample and grade with them.

Start with `policy.py`. It stands on `weights.py` (one model with its adapters), which checks the
model with `requirements.py` and `self_check.py`; reads prompts with `encoding.py` and
`templates.py`; samples with `sampling.py` and `continuation.py`; and grades with `forward.py` and
`head.py`.
"""
