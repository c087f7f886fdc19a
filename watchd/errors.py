"""The exception hierarchy.

Every error that can reach a user carries one clear line: what is wrong and, in `remedy`, what to do about it. Which exit
status an error becomes is decided in `watchd.cli` alone. The hierarchy splits errors by whose fault they are: problems of a
watched tree (`LayerError`, `MountError`) degrade that tree and are reported; problems of our own journal (`JournalError`)
are fatal at the start, and later end all promises that need it, not the repairs.
"""

from __future__ import annotations


class WatchdError(Exception):
    """Base of all errors that watchd raises on purpose. `remedy` says what to do about it."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}; {self.remedy}" if self.remedy else message


class UsageError(WatchdError):
    """The command line or a request asks for something that cannot be."""


class ConfigError(WatchdError):
    """The configuration is bad; the message names file, line and key."""


class NotPermittedError(WatchdError):
    """A capability or a permission is missing."""


class DaemonUnreachableError(WatchdError):
    """No daemon answers on the control socket."""


class DeadlineError(WatchdError):
    """Something did not finish in the time that was given to it."""


class UnsupportedError(WatchdError):
    """The kernel or the filesystem lacks a feature, found by probing."""


class LayerError(WatchdError):
    """A lower layer cannot be watched or looked at; only that layer is degraded."""


class MountError(WatchdError):
    """A merged mount cannot be found, looked at or acted upon; only that mount is degraded."""


class RefusedError(MountError):
    """An action would harm or cannot help; nothing was changed. The message is the reason."""


class WireError(WatchdError):
    """Bytes from the kernel do not decode."""


class JournalError(WatchdError):
    """Our own journal cannot be read or written. Never papered over."""


class JournalAccessError(JournalError, NotPermittedError):
    """This user may not read or write the journal."""


class RecordsGoneError(JournalError):
    """Records that somebody still wanted to read were removed, because the journal keeps so much and no more."""

    def __init__(self, first_seq: int, last_seq: int) -> None:
        """`first_seq` and `last_seq`: of the records that are gone."""
        super().__init__(
            f"records {first_seq} to {last_seq} are gone: the journal does not reach back so far any more",
            remedy="look at everything once, and go on from now",
        )
        self.first_seq, self.last_seq = first_seq, last_seq
