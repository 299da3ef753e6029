"""The benchmark suite: every result comes from a raw JSON file with its provenance, every peer from the same run.

    throughput    a grid of cells, each in its own process          python -m benchmarks.throughput --preset cpu
    report        raw JSON -> RESULTS.md and one HTML page          python -m benchmarks.report
    quantization  perplexity and weight error of 4-bit types        python -m benchmarks.quantization
    packing       documents per second and fill of packing          python -m benchmarks.packing
    roofline      predicted time of a step, traced without a GPU    python -m benchmarks.roofline --json FILE
    gpu           measurements that need a GPU, by value            benchmarks/gpu/queue.sh OUT

Inside: shapes and dataset create models and data, cells defines what is compared, worker runs one cell with ours or
peers under the conductor, provenance and memory record where and how much.
"""
