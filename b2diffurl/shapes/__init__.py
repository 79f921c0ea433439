"""The embedded world: two coloured shapes in a spatial relation, drawn, captioned and judged exactly."""
