"""What the machine is asked for: files, logs, device, model files of the hub, memory, threads."""
