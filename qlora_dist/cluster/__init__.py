"""This process among the ranks, and what ranks do together: World and its parts.

The only folder that imports accelerate and the collectives of torch.distributed, and that reads the launcher's
environment.
"""
