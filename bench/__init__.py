"""`python -m bench`: the project's figures, measured so that anybody can repeat them.

Law of this package: it uses what a user has (the command line, `edge_runtime.client`, a bundle, the
daemon as it ships) and never reaches into the parts it measures. A figure is a row of a table with
its spread and, where one was promised, its target. What is compared is measured in the same run,
in interleaved rounds.
"""

import os

# The in-process peers must be what our backend is: no report to the library's maker.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
