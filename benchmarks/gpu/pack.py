"""All results of a run of the queue, in one archive of limited size.

    python -m benchmarks.gpu.pack OUT ARCHIVE.tgz

Raw JSON, logs and test reports, without models and scratch files. The queue continues from it once it is unpacked next
to OUT (`tar xzf ARCHIVE.tgz -C build`). Standard library only: it must also run in a machine's last seconds.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

LARGEST_BYTES = 15 * 2**20  # per archive: 16 MiB may be returned, minus headers and padding
LARGEST_LOG_BYTES = 2**20  # the end of a log is kept
KINDS = (".json", ".xml", ".log", ".txt", ".csv", ".html")


def pack(out: Path, archive: Path, largest_bytes: int = LARGEST_BYTES) -> list[str]:
    """Replaces the archive atomically; returns the names of files that did not fit, largest first.

    Small files go first: results are small, while a large trace or log may be left out.
    """
    compressed = sorted((_content(path) for path in files(out)), key=lambda pair: len(pair[1]))
    named = {name: content for name, content in compressed}
    left_out, used = [], 0
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f".{archive.name}.part")
    with tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        for name, content in named.items():
            size = len(zlib.compress(content, 6)) + 512
            if used + size > largest_bytes:
                left_out.append(name)
                continue
            used += size
            _add(tar, f"{out.name}/{name}", content)
        _add(tar, f"{out.name}/left_out.json", json.dumps(left_out[::-1], indent=1).encode())
    temporary.rename(archive)
    return left_out[::-1]


def files(out: Path) -> Iterator[tuple[Path, str]]:
    """(path, name in the archive): what the items wrote, and the logs of their processes."""
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix in KINDS and path.name != "left_out.json":
            yield path, str(path.relative_to(out))
    for path in sorted((out.parent / f"{out.name}-scratch" / "cells").glob("*/log.txt")):
        yield path, f"cells/{path.parent.name}.log"


def _content(file: tuple[Path, str]) -> tuple[str, bytes]:
    path, name = file
    with path.open("rb") as stream:
        if path.suffix in (".log", ".txt"):
            stream.seek(max(0, path.stat().st_size - LARGEST_LOG_BYTES))
        return name, stream.read()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def main() -> None:
    if len(sys.argv) != 3:
        print("usage: python -m benchmarks.gpu.pack OUT ARCHIVE.tgz", file=sys.stderr)
        sys.exit(2)
    out, archive = Path(sys.argv[1]), Path(sys.argv[2])
    left_out = pack(out, archive)
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB" + (f", without {left_out}" if left_out else ""))


if __name__ == "__main__":
    main()
