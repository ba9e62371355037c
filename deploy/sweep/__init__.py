"""A running server beside its simulation."""
