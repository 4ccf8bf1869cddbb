"""Turns what goes wrong in torchvision's downloads into one line each."""

import io
import pickle
import socket
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from gatl.errors import UserError

TIMEOUT = 10.0
"""Seconds without an answer after which a download has failed."""

_UNREACHABLE = (URLError, TimeoutError, ConnectionError, HTTPException)
# What torchvision raises for incomplete or damaged files, checked or not.
_DAMAGED = (
    RuntimeError,
    AssertionError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    tarfile.TarError,
    zlib.error,
    pickle.UnpicklingError,
)


@contextmanager
def torchvision_dataset(name: str, folder: Path) -> Iterator[None]:
    """Open a torchvision dataset inside this context: ``download=True`` is safe there.

    Args:
        name: What the messages call the data set.
        folder: Where torchvision keeps what it downloads.

    Raises:
        UserError: If the files can be neither found nor downloaded, or are damaged.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    # torchvision draws a progress bar: welcome on a terminal, noise in a log.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    # The archives are checked before they are unpacked; and none may write outside its folder.
    trusting = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    ways_out = "or use data=folder data.root=PATH or data=digits, which need no download"
    try:
        with quiet:
            yield
    except _UNREACHABLE as error:
        raise _failed(name, folder, ways_out, error) from error
    except OSError as error:
        raise UserError(
            f"{name} cannot be kept in {folder} ({_reason(error)}): set data.root."
        ) from error
    except _DAMAGED as error:
        # The MNIST family reports an unreachable mirror as a RuntimeError of its own.
        if str(error).startswith("Error downloading"):
            raise _failed(name, folder, ways_out, error) from error
        raise UserError(
            f"The files of {name} in {folder} are incomplete or damaged ({_reason(error)}): "
            f"delete them to download them again, {ways_out}."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        tarfile.TarFile.extraction_filter = trusting


def _failed(name: str, folder: Path, ways_out: str, error: Exception) -> UserError:
    return UserError(
        f"{name} cannot be downloaded ({_reason(error)}): put its files into {folder}, {ways_out}."
    )


def _reason(error: Exception) -> str:
    """The last line of a message: the MNIST family lists its mirrors first."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip("<>. ") if lines else type(error).__name__
