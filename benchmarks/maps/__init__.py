"""Maps of when each method wins, in worlds whose premises are knobs (docs/maps.md)."""
