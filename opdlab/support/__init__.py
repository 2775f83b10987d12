"""Small helpers that every floor uses: validation, errors about objects in the wrong place,
progress, interrupts, files.
"""
