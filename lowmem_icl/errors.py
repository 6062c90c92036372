"""Errors a user can cause or meet, and the exit code each one ends the command with.

LowmemIclError
├── InputError      2   an argument, a file or a row is not what was expected
├── DoesNotFit      3   the work does not fit the memory or the disk it was given
└── InUse          75   another process holds the folder
"""


class LowmemIclError(Exception):
    """Base of all errors that are reported as one line, without a traceback."""

    exit_code = 1


class InputError(LowmemIclError):
    """An argument, a file or a row is not what was expected; the message says what to do."""

    exit_code = 2


class DoesNotFit(LowmemIclError):
    """The work does not fit; the message names the smallest setting that would."""

    exit_code = 3


class InUse(LowmemIclError):
    """Another process works in the same folder."""

    exit_code = 75
