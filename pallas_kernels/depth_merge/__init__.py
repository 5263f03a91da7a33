"""Phase 2: one read of a block, merged with its running sum."""
