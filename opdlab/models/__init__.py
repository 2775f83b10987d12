"""Local models: weights and adapters, policies, output heads, sampling, and checks that their
numbers are right.
"""
