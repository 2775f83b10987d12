"""Run opdlab's methods in other libraries' trainers.

Each module needs the library that it is named after.
"""
