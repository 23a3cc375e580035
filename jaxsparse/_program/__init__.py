"""Traced programs: how values move through them, what they do with each weight, and how they run
from compressed weights.
"""
