"""Everything that waits for a GPU: a list of measurements in order of value, run on borrowed minutes.

items      what there is to measure, with its command, time limit and needs
queue      runs what has no result for this code yet, each item alone in its process, time-boxed
ceilings   what the device can do: products, copies, dequantization, attention, launches
queue.sh   the one command:  bash benchmarks/gpu/queue.sh OUT [SECONDS]
"""
