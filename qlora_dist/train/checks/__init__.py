"""The run's own checks: failures that are silent elsewhere end a run here, with their name.

    learning   before the model is read: does every step have labels, does the data teach the model to stop? After the
               first update: has every adapter moved?
    base       after loading: does this rank hold the bytes that its strategy promises, are they the bits of the files?
               At each save: is the base still what was loaded?

Nothing here runs between the first step and the next save, so a training step pays nothing for the checks. What is
compared between ranks is gathered by the caller, which has the World.
"""
