"""Everything that waits for a GPU: a list of measurements in order of value, run on borrowed minutes.

items      what there is to measure: command, time limit, estimate, needs, and the part it is run in
queue      runs what has no result for this code yet, each item alone in its process, time-boxed
machine    what this machine has, asked in another process
pack       all results of a run as one archive
smoke      every CUDA path once on a tiny model; each failure by name
ceilings   what the device can do: products, copies, dequantization, attention, launches
calibrate  what a run's results say of the constants of the memory plan and the speed estimate
queue.sh   the one command:  bash benchmarks/gpu/queue.sh OUT [SECONDS]
lent.sh    the same in three commands of ten minutes, on a bare machine
"""
