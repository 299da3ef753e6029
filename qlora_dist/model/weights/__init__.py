"""Weights on their way from files to devices: read, quantized, shared out, kept in 4 bits."""
