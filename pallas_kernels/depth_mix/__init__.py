"""Phase 1: S queries at once over R sources."""
