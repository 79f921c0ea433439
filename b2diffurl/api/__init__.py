"""Python's front door: what a script does from the shell, called from a notebook or a program of one's own."""
