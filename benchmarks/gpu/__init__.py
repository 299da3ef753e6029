"""All measurements that need a GPU: a list in order of value, run whenever a GPU is available for some minutes.

items      the measurements: command, time limit, estimate, requirements, and the part it belongs to
queue      runs what has no result for this code yet, each item in its own process, with a time limit
machine    what this machine has, queried in another process
pack       all results of a run as one archive
smoke      every CUDA path once on a tiny model; each failure by name
ceilings   what the device can do: matrix products, copies, dequantization, attention, launches
calibrate  fits the constants of the memory plan and the speed estimate to a run's results
queue.sh   the one command:  bash benchmarks/gpu/queue.sh OUT [SECONDS]
lent.sh    the same as three commands of ten minutes, on a bare machine
"""
