"""Phase 1: S reads at once over all completed summaries."""
