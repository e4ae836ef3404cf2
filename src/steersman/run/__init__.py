"""A run in its process: settings, device, seed, signals, what it tells before it starts; its numbers watched."""
