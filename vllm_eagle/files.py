"""Files that are whole or absent, and one line where they cannot be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteError(ValueError):
    """A file cannot be written: `filename`, and `strerror` says why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: cannot be written ({reason})")
        self.filename, self.strerror = path, reason


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to. It becomes `path` if the block ends well; if not, `path` stays what it was.

    Raises:
        WriteError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            yield part
            with part.open("rb") as written:
                os.fsync(written.fileno())  # else a machine that loses power may know the new name and not the contents
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text in UTF-8.

    Raises:
        WriteError: it cannot be written.
    """
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says of whatever goes wrong in the block that it was meant for `path`.

    Raises:
        WriteError: in place of the error of the system, or of a library that writes.
    """
    try:
        yield
    except ValueError:
        raise
    except OSError as error:
        raise WriteError(path, str(error.strerror or error)) from None
    except Exception as error:  # torch and safetensors raise errors of their own, which say little
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise WriteError(path, f"{reason}; is the disk full?") from None
