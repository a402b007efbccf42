"""Models whose experts are kept in 8 or 4 bits: made of a model, read from a checkpoint, saved."""
