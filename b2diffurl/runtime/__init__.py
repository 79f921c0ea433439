"""The machine: files, logs, device, hub, memory, threads."""
