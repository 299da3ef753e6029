"""`python -m qlora_dist`, which is what launchers start."""

import sys

from .cluster.stop_signal import listen

if "train" in sys.argv or "supervise" in sys.argv:
    listen()  # before anything heavy is imported: launchers start their workers with SIGUSR1 ignored

from .commands import main

main()
