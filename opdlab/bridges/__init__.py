"""Ways for opdlab's methods into other libraries' trainers.

Each module needs the library that it is named after.
"""
