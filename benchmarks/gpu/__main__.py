"""python -m benchmarks.gpu status|run|calibrate OUT ..."""

from .queue import main

if __name__ == "__main__":
    main()
