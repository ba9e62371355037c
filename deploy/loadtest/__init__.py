"""Loads an image-classification server over HTTP and says what its users would have seen."""
