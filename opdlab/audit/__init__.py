"""Name the gradient that a loss really trains; estimate the KL from one sampled token.

A value, a reward and a loss are three uses of one formula, and each has a gradient of its own:

    audit(estimator.as_loss("k3"))      # k3 estimates the reverse KL; this trains the forward KL
    audit(OPDPlus("forward_kl", stop_gradient=True))

The package holds the function `audit` of the same name; `opdlab.audit` is the function.
"""

from opdlab.audit.auditing import audit
from opdlab.audit.card import Audit
from opdlab.audit.kl import Estimate, as_loss, in_reward, k1, k2, k3

__all__ = ["Audit", "Estimate", "as_loss", "audit", "in_reward", "k1", "k2", "k3"]
