from pathlib import Path


def calibrate(out: Path) -> None: ...
