"""Other servers with the same network and the same images, for comparison."""
