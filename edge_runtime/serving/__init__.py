"""Worker processes: how a model version is loaded, proven, served and handed over.

The daemon imports `channel`, `spec`, `page` and `health` from here (values and messages, no numpy);
`template`, `worker` and what they use run in processes of their own.
"""
