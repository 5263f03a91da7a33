"""Phase 2: one read of a block, in one kernel."""
