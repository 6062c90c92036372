"""Errors a user can cause or meet, and the exit code each one ends the command with.

LowmemIclError
├── InputError      2   an argument, a file or a row is not what was expected
├── DoesNotFit      3   the work does not fit the memory or the disk it was given
├── NotFinite       4   values that a model computes are NaN, infinite, or too large
└── InUse          75   another process holds the folder
"""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LowmemIclError(Exception):
    """Base of all errors that are reported as one line, without a traceback."""

    exit_code = 1


class InputError(LowmemIclError):
    """An argument, a file or a row is not what was expected; the message says what to do."""

    exit_code = 2


class DoesNotFit(LowmemIclError):
    """The work does not fit; the message names the smallest setting that would."""

    exit_code = 3


class NotFinite(LowmemIclError):
    """Values that a model computes are not finite; the message says where and of what."""

    exit_code = 4


class InUse(LowmemIclError):
    """Another process works in the same folder."""

    exit_code = 75


def from_os_error(error: OSError) -> LowmemIclError:
    """Return what is told of an error of the disk or the system: the path, the cause and what to do."""
    where = f"{error.filename}: " if error.filename is not None else ""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        return DoesNotFit(
            f"{where}cannot be written ({reason}); free some space there or choose another folder, then run "
            "the same command again"
        )
    if error.errno == errno.ENOMEM:
        return DoesNotFit(f"{where}{reason}: give a smaller --memory, or allow this process more")
    if error.errno == errno.EIO:
        return InputError(f"{where}{reason}: the disk may be failing; choose another")
    done = "cannot be written" if type(error).__name__ == "NotWritten" else "cannot be used"
    return InputError(f"{where}{done} ({reason}); choose another place, or change its rights")
