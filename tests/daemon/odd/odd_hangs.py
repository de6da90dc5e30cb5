"""A driver that never answers: the import does not return."""

import time

time.sleep(3600)
