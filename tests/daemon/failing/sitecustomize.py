"""A disk that once renames and then does not sync, as told by a file, for daemons under test.

Law of this file: it is on the PYTHONPATH of daemons that a test starts, and of nothing else. While
the file named in EDGE_TEST_NO_SYNC is there, the next sync of a model's own directory takes it away
and is refused.
"""

import os
from pathlib import Path

from edge_runtime import files
from edge_runtime.errors import StorageError

_ORDER = Path(os.environ["EDGE_TEST_NO_SYNC"])


class _Failing(files.SystemFiles):
    def sync_directory(self, path: Path) -> None:
        if path.parent.name == "models" and _ORDER.exists():
            _ORDER.unlink()
            raise StorageError("cannot fsync directory: told so by a test", where=str(path))
        super().sync_directory(path)


files.SystemFiles = _Failing  # type: ignore[misc]
