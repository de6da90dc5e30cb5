"""What is installed on this device, and which of it serves.

Law of this package: content-addressed blobs, generations and the switch between them, on disk, safe
at every interruption. It does not know what a manifest says or what a blob is for.
"""

from edge_runtime.store.driver import BlobSource, Store, StoreStatistics, Verification
from edge_runtime.store.generations import BlobRef, Generation, Switch
from edge_runtime.store.records import DamagedError
from edge_runtime.store.recovery import Recovery
from edge_runtime.store.removal import Freed

__all__ = [
    "Store",
    "BlobSource",
    "Generation",
    "BlobRef",
    "Switch",
    "Recovery",
    "Freed",
    "Verification",
    "StoreStatistics",
    "DamagedError",
]
