"""What a profile can say, and what is known of a machine: the typed shapes, and their one error.

Law of this package: the leaf under everything. It imports nothing of edge_runtime, and besides the
standard library only msgspec, and yaml in `loading` when a file is read.
Law of this file: frozen structs with their units, defaults and reasons. No I/O and no decision;
reading is in `loading`, looking at a machine in `probe`, choosing in `matching`.

A *fact* is true of the board whoever owns it (a device node, a core); a *choice* is ours (how many
threads). Both name their source in `sources`, keyed by path; a key covers all that is below it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from device_profiles.ladder import Ladder

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
CPUSET_PATTERN = r"^([0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*)?$"
VERSIONS_PATTERN = r"^((>=|<=|==|!=|>|<)[0-9]+(\.[0-9]+)*(,|$))*$"
ID_PATTERN = r"^[0-9a-f]{4}:[0-9a-f]{4}$"

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Cpuset = Annotated[str, Meta(pattern=CPUSET_PATTERN)]  # "0-3,6"; empty: all
Versions = Annotated[str, Meta(pattern=VERSIONS_PATTERN)]  # ">=1.20,<2"; empty: any
Id = Annotated[str, Meta(pattern=ID_PATTERN)]  # vendor:device in hexadecimal

# Begins the source of a choice, after which comes its reason; a fact may not have such a source.
CHOICE = "choice: "


class ProfileError(ValueError):
    """A profile is wrong or missing: what, where (file and key path), what was expected, remedy.

    The same fields as an EdgeError, which this package may not import; whoever calls it turns one
    into the other.
    """

    def __init__(
        self, message: str, *, where: str = "", expected: str = "", remedy: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.expected = expected
        self.remedy = remedy


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By what a machine is known. Every rule given must hold; a rule holds by any of its values.

    Texts are globs (`fnmatch`, case matters). An empty rule asks nothing.
    """

    arch: tuple[str, ...] = ()  # machine names of uname: aarch64, x86_64
    compatible: tuple[str, ...] = ()  # the device tree's root `compatible`
    dmi: dict[str, tuple[str, ...]] = {}  # files of /sys/class/dmi/id: product_name, ...
    cpu_models: tuple[str, ...] = ()  # "model name" of /proc/cpuinfo (x86)
    cpu_parts: tuple[str, ...] = ()  # "implementer:part" of /proc/cpuinfo (arm): 0x41:0xd0b
    cpu_flags: tuple[str, ...] = ()  # of /proc/cpuinfo; here all must be there
    pci: tuple[Id, ...] = ()
    usb: tuple[Id, ...] = ()
    memory_bytes_min: Annotated[int, Meta(ge=0)] = 0  # what the kernel sees: less than is sold
    memory_bytes_max: Annotated[int, Meta(ge=0)] = 0  # 0: no upper bound


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cores of one kind."""

    cpus: Cpuset  # their numbers on a kernel that numbers them as the device tree does
    core: str = ""  # Cortex-A76
    part: str = ""  # as in Match.cpu_parts


class BackendChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A backend that may be tried here. The list's order is that of preference before measuring."""

    backend: Name
    device_class: Name = "cpu"
    options: dict[str, Any] = {}  # under the variant's own options
    versions: Versions = ""  # the lock: with others it was not tried, or is known to fail
    accelerator: str = ""  # of `accelerators`: without its device there is nothing to try


class Workers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Defaults of `workers` in the configuration, which wins. None: the daemon's own default."""

    threads: Annotated[int, Meta(ge=1, le=256)] | None = None  # of one run, where a backend asks
    cpuset: Cpuset | None = None
    runners: Literal["auto"] | Annotated[int, Meta(ge=0, le=64)] | None = None


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all models together may take. Both given: the smaller of the two."""

    share: Annotated[float, Meta(gt=0, le=0.95)] | None = None  # of the machine or its cgroup
    budget_bytes: Annotated[int, Meta(ge=0)] | None = None


class DriverLock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The kernel driver of an accelerator."""

    modules: tuple[str, ...] = ()  # one of them must have its /sys/module entry
    version_file: str = ""  # its first version-like number counts: /sys/module/gasket/version
    versions: Versions = ""


class Accelerator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device that runs models."""

    title: str
    device_class: Name
    nodes: tuple[str, ...] = ()  # globs of device nodes; one of them is its device
    usb: tuple[Id, ...] = ()  # its device is the node of that USB device
    # Paths that must exist besides, for a node that other hardware has too (any GPU has a
    # /dev/dri/renderD*): globs under /sys.
    present: tuple[str, ...] = ()
    exclusive: bool = False  # only one process may open it: its models share one worker
    driver: DriverLock = DriverLock()
    backends: tuple[Name, ...] = ()  # through which it can be used
    group: str = ""  # of the nodes, by custom: who may open them


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A board, or an add-on that a board may have, with all that it inherits."""

    name: Name
    title: str
    kind: Literal["board", "addon"] = "board"
    extends: str = ""  # a name, or a path beside the file
    match: Match = Match()
    clusters: tuple[Cluster, ...] = ()
    backends: tuple[BackendChoice, ...] = ()  # an add-on's come before the board's
    workers: Workers = Workers()
    memory: Memory = Memory()
    accelerators: dict[Name, Accelerator] = {}
    thermal: Ladder = Ladder()
    sources: dict[str, str] = {}  # key path -> URL or document, or CHOICE and the reason
    unknown: dict[str, str] = {}  # what was left out, and why


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What `probe` saw. What could not be read is empty or 0."""

    arch: str = ""
    title: str = ""  # the device tree's model, or DMI vendor and product
    compatible: tuple[str, ...] = ()  # most specific first
    dmi: dict[str, str] = {}
    cpu_model: str = ""
    cpu_flags: tuple[str, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    cpu_count: int = 0
    pci: tuple[str, ...] = ()  # vendor:device of each function
    usb: dict[str, tuple[str, ...]] = {}  # vendor:product -> its nodes under /dev/bus/usb
    memory_bytes: int = 0
    kernel: str = ""
    modules: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()  # types of thermal zones
