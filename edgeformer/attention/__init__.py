"""Dynamic sparse attention: `reference` is the definition, `kernel` calls the C core."""
