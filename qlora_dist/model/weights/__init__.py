"""Weights on their way from files to devices: read, quantized, sharded, cached in 4 bits."""
