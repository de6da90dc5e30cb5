"""The server side of updates: signed repository, inventory, rollouts in waves."""
