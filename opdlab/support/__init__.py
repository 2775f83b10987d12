"""Help for all other folders: validation, error texts, progress, interrupts, files."""
