"""From files, folders and hub datasets to this rank's micro-batches."""
