"""A disk that fails or waits as told by files, for daemons under test.

Law of this file: it is on the PYTHONPATH of daemons that a test starts, and of nothing else. While
the file named in EDGE_TEST_NO_SYNC is there, the next sync of a model's own directory takes it away
and is refused. While the one named in EDGE_TEST_SLOW_SYNC is there, such a sync waits, and says so
with a file NAME.waits beside it.
"""

import os
import time
from pathlib import Path

from edge_runtime import files
from edge_runtime.errors import StorageError

_NO_SYNC, _SLOW_SYNC = (
    Path(os.environ.get(name, "/nonexistent"))
    for name in ("EDGE_TEST_NO_SYNC", "EDGE_TEST_SLOW_SYNC")
)


class _Failing(files.SystemFiles):
    def sync_directory(self, path: Path) -> None:
        if path.parent.name == "models":
            while _SLOW_SYNC.exists():
                _SLOW_SYNC.with_suffix(".waits").touch()
                time.sleep(0.005)
            if _NO_SYNC.exists():
                _NO_SYNC.unlink()
                raise StorageError("cannot fsync directory: told so by a test", where=str(path))
        super().sync_directory(path)


files.SystemFiles = _Failing  # type: ignore[misc]
