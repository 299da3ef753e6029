"""From files, folders and the hub to this rank's micro-batches."""
