"""Traced programs: how values flow through them and how they use each weight."""
