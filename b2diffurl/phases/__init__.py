"""The verbs, one a script, and what they share."""
