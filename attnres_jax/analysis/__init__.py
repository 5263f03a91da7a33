"""What a model does over depth, and runs side by side."""
