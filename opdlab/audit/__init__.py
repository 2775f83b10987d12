"""Estimators of the KL from one sampled token, and `audit`: which gradient does a loss really
train?

    audit(estimator.as_loss("k3"))           # differentiates k3, an estimate of the reverse KL: this trains the forward KL
    audit(OPDPlus("forward_kl", stop_gradient=True))

A value, a reward and a loss are three uses of one formula, and each has a gradient of its own.
"""

from opdlab.audit.auditing import audit
from opdlab.audit.card import Audit
from opdlab.audit.kl import Estimate, as_loss, in_reward, k1, k2, k3

__all__ = ["Audit", "Estimate", "as_loss", "audit", "in_reward", "k1", "k2", "k3"]
