"""Language models over `through_depth`."""
