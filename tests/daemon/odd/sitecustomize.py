"""Adds the backends of `odd_backends` to the tables of a daemon under test.

Law of this file: it is on the PYTHONPATH of daemons that a test starts, and of nothing else. A
table is the extension point that a real backend would use, so nothing is patched.
"""

from edge_runtime.backends import BACKENDS
from edge_runtime.bundle.lint import BACKEND_FORMATS

NAMES = {
    "ill-at-import": "odd_ill:Backend",
    "raises-at-import": "odd_raises:Backend",
    "hangs-at-import": "odd_hangs:Backend",
    "dies-once": "odd_dies_once:Backend",
    "burglar": "odd_burglar:Backend",
    "careless": "odd_careless:Backend",
    "unforkable": "odd_unforkable:Backend",
    "threaded": "odd_unforkable:Threaded",
}
BACKENDS.update(NAMES)
BACKEND_FORMATS.update(dict.fromkeys(NAMES, ("reference",)))
