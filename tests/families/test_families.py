"""Families of every kind are right in all that `family_checks` asks, or refused by name.

`make families` runs all of them.
"""

from __future__ import annotations

import contextlib

import pytest
from family_checks import CHECKS, Family, Refused, make
from family_zoo import REPRESENTATIVE

REFUSED = {"llama-dynamic-ntk": "rotary embedding", "bert": "computes its logits"}
SLOW = {"jamba", "mamba", "recurrent_gemma", "openai-gpt"}


@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.filterwarnings("ignore")
def test_family(name, tmp_path):
    family = make(name, tmp_path)
    if name in REFUSED:
        assert REFUSED[name] in str(family)
        return
    assert isinstance(family, Family), str(family)
    assert bool(family.warning) == (name in SLOW)
    for check in CHECKS.values():
        with contextlib.suppress(Refused):
            check(family)
