"""Find what caused a gain: controls of a run, and the effect of single tokens on the outcome."""
