"""Training: `loop.train` is the table of contents."""
