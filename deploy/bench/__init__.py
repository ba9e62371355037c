"""Measurements of this machine, one a command."""
