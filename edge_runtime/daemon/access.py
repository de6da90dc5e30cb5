"""Who may do what.

Law of this file: pure verdicts over credentials that the kernel reported (SO_PEERCRED,
SO_PEERGROUPS); names are resolved once, when the configuration is read.
"""

from __future__ import annotations

import grp
import pwd
from typing import NamedTuple

from edge_runtime.config import AccessRule
from edge_runtime.errors import UsageError
from edge_runtime.wire.sockets import PeerCredentials


class Access(NamedTuple):
    """A rule with numbers for names."""

    anyone: bool
    uids: frozenset[int]
    gids: frozenset[int]

    def admits(self, peer: PeerCredentials, daemon_uid: int) -> bool:
        """Whether the peer may; root and the daemon's own user always may."""
        if self.anyone or peer.uid in (0, daemon_uid) or peer.uid in self.uids:
            return True
        return peer.gid in self.gids or not self.gids.isdisjoint(peer.groups)


def resolve(rule: AccessRule, where: str) -> Access:
    """Look the rule's names up.

    Raises:
        UsageError: there is no such user or group on this machine.
    """
    uids = frozenset(_uid(user, f"{where}.users") for user in rule.users)
    gids = frozenset(_gid(group, f"{where}.groups") for group in rule.groups)
    return Access(rule.anyone, uids, gids)


def _uid(user: str | int, where: str) -> int:
    if isinstance(user, int):
        return user
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise UsageError(f"there is no user {user!r} on this machine", where=where) from error


def _gid(group: str | int, where: str) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise UsageError(f"there is no group {group!r} on this machine", where=where) from error
