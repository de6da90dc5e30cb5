"""A wheel that does not fit the installed numpy: its import raises something of its own."""

raise AttributeError("_ARRAY_API not found")
