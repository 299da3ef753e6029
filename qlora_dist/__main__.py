"""`python -m qlora_dist`, which is what launchers start."""

from .cli import main

main()
