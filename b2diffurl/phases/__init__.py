"""The phases of a stage, one for each script: sample, select, train, evaluate; and what they share."""
