"""An open-loop load generator: what `edge-runtime bench` is made of (docs/load.md).

Law of this package: `schedule` says when requests are due and `statistics` what came of them (pure:
values in, values out); `request` makes the one request that is repeated; `generator` sends and
receives; `campaign` is the order of the steps; `plot` is the door to matplotlib. Nothing is retried
and nothing is hidden: every refusal is seen as the server gave it. Importing the package costs no
numpy.
"""
