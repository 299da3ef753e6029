"""Who this process is among the ranks, and what ranks do together: World, and the parts that it is made of.

The only folder that imports accelerate and the collectives of torch.distributed, and that reads what a launcher says.
"""
