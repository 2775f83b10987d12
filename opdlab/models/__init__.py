"""Language models as policies: load, check, sample and grade with them.

Start with `policy.py`. It stands on `weights.py` (one model with its adapters), which checks the
model with `requirements.py` and `self_check.py`; reads prompts with `encoding.py` and
`templates.py`; samples with `sampling.py`, `continuation.py` and `drawing.py`; and grades with
`forward.py` and `head.py`.
"""

import logging

# PEFT imports bitsandbytes where that is installed, which looks for a kernel on the Hub and warns
# at every start that it finds none. opdlab does not use that kernel: it rounds to bfloat16.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
