"""What the project claims of itself, measured; each module is a command."""
