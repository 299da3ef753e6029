"""The benchmark suite: every figure from a raw JSON file with its provenance, every peer in the same run.

    throughput    a grid of cells, each in a process of its own     python -m benchmarks.throughput --preset cpu
    report        raw JSON -> RESULTS.md and one HTML page          python -m benchmarks.report
    quantization  perplexity and weight error of 4-bit types        python -m benchmarks.quantization
    packing       documents a second and fill of packing            python benchmarks/packing.py
    gpu           what waits for a GPU, in order of value           benchmarks/gpu/queue.sh OUT

Inside: shapes and dataset make what is trained on, cells says what is compared, worker runs one cell by ours or peers
under the conductor, provenance and memory say where and how much.
"""
