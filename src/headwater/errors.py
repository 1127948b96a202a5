"""Every exception that Headwater raises on purpose.

HeadwaterError
├── UsageError (also a ValueError)      the caller's call is wrong; nothing was sent
│   ├── ShapeMismatch                   shape, dtype or device differs from the table's
│   ├── GradientModified                a gradient changed after it left for the servers
│   ├── ParameterModified               a parameter was changed in place outside the optimizer
│   ├── NonFiniteGradient               NaN or Inf in a gradient, and the policy is "error"
│   ├── UnknownOptimizer                not in the closed list, or a hyperparameter it lacks
│   ├── BadInput                        a request to a served model that it cannot read
│   ├── DataError                       a corpus that is empty, unreadable or not text; a run folder that exists
│   └── RunInUse                        another process works in the run's folder
├── ClusterError                        the cluster refused; it goes on
│   ├── UnknownTable                    no table of that name or number
│   ├── UnknownVersion                  no version or tag of that name
│   ├── VersionExpired                  the version was retired, or its memory is lost
│   ├── VersionExists                   a version of that name is there already
│   ├── TableConflict                   the table exists with another shape, optimizer or policy
│   ├── RankTaken                       another live worker holds this rank
│   ├── NotEnoughMemory                 the table does not fit into a server's memory
│   ├── StaleEpoch                      the view moved on; ask the coordinator again
│   ├── StateInUse                      another coordinator runs on this state
│   ├── StateCorrupt                    stored state that cannot be read
│   ├── SnapshotCorrupt                 a snapshot that cannot be used; it was left as it is
│   └── SessionExpired                  the server does not know the session: unacknowledged pushes are unknown
├── LinkError (also a ConnectionError)  the way there
│   ├── LinkBroken                      the connection ended; unacknowledged pushes are unknown
│   ├── Unreachable                     nobody answers at the address
│   ├── AddressInUse                    the port to listen on is taken
│   ├── AuthenticationFailed            the token is wrong or missing
│   ├── DeltaCorrupt                    a delta that is damaged, or of another base; fetch the version whole
│   └── ProtocolError                   a frame that FORMAT.md does not allow
│       └── UnknownCodec                a payload in an encoding that this side does not know
├── WorkerLost                          another worker died; the step was not applied on any shard
├── DeadlineExceeded (also a TimeoutError)
├── DiskFull                            no room for a file: a full disk, a quota, a limit; nothing was left behind
└── InternalError                       a bug in Headwater; the message tells what led to it

``Halt`` stands outside the tree: it ends the process that raises it and never crosses the wire.
"""

from __future__ import annotations


class HeadwaterError(Exception):
    """Root of the tree. ``code`` names the class on the wire."""

    @property
    def code(self) -> str:
        return type(self).__name__


class UsageError(HeadwaterError, ValueError):
    """The caller's call is wrong; nothing was sent."""


class ShapeMismatch(UsageError):
    """A tensor's shape, dtype or device differs from the table's."""


class GradientModified(UsageError):
    """A gradient was changed after it had left for the servers."""


class ParameterModified(UsageError):
    """A parameter was changed in place outside the optimizer."""


class NonFiniteGradient(UsageError):
    """A gradient holds NaN or Inf and the table's policy is "error"; the step was not pushed."""


class UnknownOptimizer(UsageError):
    """The optimizer is not in the closed list, or does not take this hyperparameter."""


class BadInput(UsageError):
    """What a client sent to a served model cannot be read; ``status`` is the answer's: 400, 413 or 415."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class DataError(UsageError):
    """The data cannot be used: empty, unreadable, not text; or a run folder is in the way."""


class RunInUse(UsageError):
    """Another process works in this run's folder; nothing was changed."""


class ClusterError(HeadwaterError):
    """The cluster refused the request and goes on."""


class UnknownTable(ClusterError):
    """No table of that name or number."""


class UnknownVersion(ClusterError):
    """No version or tag of that name; nothing was leased or changed."""


class VersionExpired(ClusterError):
    """The version was retired while it was wanted, or no server holds it any more; what a reader maps stays whole."""


class VersionExists(ClusterError):
    """A version of that name is there already; nothing was published."""


class TableConflict(ClusterError):
    """The table exists with another shape, optimizer or policy."""


class RankTaken(ClusterError):
    """Another live worker holds this rank."""


class NotEnoughMemory(ClusterError):
    """The table does not fit into a server's memory; nothing was created."""


class StaleEpoch(ClusterError):
    """The shard's view moved on; nothing was applied."""


class StateInUse(ClusterError):
    """Another coordinator runs on this state; nothing was read or changed."""


class StateCorrupt(ClusterError):
    """Stored state that is damaged, foreign, or in the format of another Headwater; it was left as it is."""


class SnapshotCorrupt(ClusterError):
    """A snapshot that is damaged, incomplete, or in the format of another Headwater; it was left as it is."""


class SessionExpired(ClusterError):
    """The server does not know this session; pushes that were not acknowledged may or may not be applied."""


class LinkError(HeadwaterError, ConnectionError):
    """Something is wrong with the way to the other side."""


class LinkBroken(LinkError):
    """The connection ended; pushes that were not acknowledged may or may not be applied."""


class Unreachable(LinkError):
    """Nobody answers at the address."""


class AddressInUse(LinkError):
    """The address to listen on is taken."""


class AuthenticationFailed(LinkError):
    """The token is wrong or missing."""


class DeltaCorrupt(LinkError):
    """A delta is damaged, or its outcome is not the version it should be; the version must be fetched whole."""


class ProtocolError(LinkError):
    """A frame that wire/FORMAT.md does not allow; the connection was closed."""


class UnknownCodec(ProtocolError):
    """A payload is encoded in a way that this side does not know; nothing was applied, the connection was closed."""


class WorkerLost(HeadwaterError):
    """Another worker died; the step it belonged to was not applied on any shard."""


class DeadlineExceeded(HeadwaterError, TimeoutError):
    """The deadline passed; what was asked may still happen."""


class DiskFull(HeadwaterError):
    """There is no room for a file that was to be written; what was written of it is removed again."""


class InternalError(HeadwaterError):
    """A bug in Headwater; the message tells what led to it."""


class Halt(Exception):
    """This process cannot go on; the cause says why. No ``HeadwaterError``: no peer is at fault, none may catch it."""


def other_format(where: object, found: object, reads: object) -> str:
    """What to do with stored state that another release wrote, for the message of an error."""
    return (
        f"{where} has format {found}, this Headwater reads format {reads}; it was left as it is. Go on with the "
        "release that wrote it, or export its newest snapshot with that release (headwater export) and begin in an "
        "empty folder"
    )


def _tree(root: type[HeadwaterError]) -> dict[str, type[HeadwaterError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE = _tree(HeadwaterError)


def from_code(code: str, message: str) -> HeadwaterError:
    """The exception that an ERROR frame names; an unknown code becomes a ``ClusterError``."""
    return _BY_CODE.get(code, ClusterError)(message)
