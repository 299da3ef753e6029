"""`python -m qlora_dist`, which is what launchers start."""

import sys

from .cluster.stop_signal import listen

# the first word is the command: others may come after it (torchrun ... -m qlora_dist train)
if next((word for word in sys.argv[1:] if not word.startswith("-")), "") in ("train", "supervise"):
    listen()  # before anything heavy is imported: launchers start their workers with SIGUSR1 ignored

from .commands import main

main()
